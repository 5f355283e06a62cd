"""The report job, on Parquet files in the schema of a scoring job and images on a disk."""

import base64
import io
import re
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from csflow.config import parse
from csflow.errors import ExitStatus, WrongUse
from csflow.inputs.listing import list_images
from csflow.report import ReportConfig, colour_range, histogram, report
from csflow.scores import ERRORS, SCORES

NIGHT = datetime(2026, 9, 28, 2, tzinfo=UTC)


def write_image(path: Path, size: tuple[int, int] = (64, 48)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def scored(uri: str, version: str, score: float, **other: Any) -> dict[str, Any]:
    row = {
        "image_uri": uri,
        "image_version": version,
        "image_height": 48,
        "image_width": 64,
        "anomaly_score": score,
        "scale_scores": [score],
        "p_value": 1 / 40 if score > 2 else 0.5,
        "is_anomalous": score > 2,
        "anomaly_map": [0.5, 0.5, 0.5, 0.5, score, 0.5],
        "map_height": 2,
        "map_width": 3,
        "peak_y": 36.0,
        "peak_x": 32.0,
        "run_id": "r1",
        "scored_at": NIGHT,
    }
    return row | other


def failed(uri: str, code: str, version: str = "v1", night: int = 0) -> dict[str, Any]:
    return {
        "image_uri": uri,
        "image_version": version,
        "error_code": code,
        "error_message": "what happened",
        "is_transient": False,
        "run_id": "r1",
        "failed_at": NIGHT + timedelta(days=night),
    }


def write_rows(output: Path, rows: list[dict[str, Any]], schema: pa.Schema = SCORES, night: int = 0) -> None:
    kind = "scores" if schema is SCORES else "errors"
    folder = output / kind / "model_id=m1" / f"date={(NIGHT + timedelta(days=night)).date()}"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"part-{night}.parquet", compression="zstd")


def write_scored_images(tmp_path: Path, scores: list[float], **other: Any) -> list[str]:
    """Images on the disk, each with a row of scores; returns their URIs."""
    for number in range(len(scores)):
        write_image(tmp_path / "images" / f"{number:02}.png")
    listed = pa.Table.from_batches(list_images([str(tmp_path / "images")], {})).to_pylist()
    listed = sorted(listed, key=lambda image: image["image_uri"])
    rows = [
        scored(image["image_uri"], image["image_version"], score) | other
        for image, score in zip(listed, scores, strict=True)
    ]
    write_rows(tmp_path / "out", rows)
    return [image["image_uri"] for image in listed]


class Page(HTMLParser):
    """What the tests ask a page: its text, the attributes of its elements, and whether all are closed."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def make_report(tmp_path: Path, **settings: Any) -> tuple[str, Page]:
    output = tmp_path / "result" / "report.html"
    config = ReportConfig(scores=str(tmp_path / "out"), output=str(output), **settings)
    assert report(config) == ExitStatus.DONE
    html = output.read_text()
    page = Page(html)
    assert page.open == []
    return html, page


def test_the_page_is_one_file_that_asks_nothing_of_the_network(tmp_path: Path) -> None:
    write_scored_images(tmp_path, [3.0, 4.0])
    html, page = make_report(tmp_path)
    assert "default-src 'none'" in html
    assert not re.search(r"https?://|url\(|@import", html)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith("data:")


def test_the_highest_scores_are_shown_highest_first_each_with_its_map(tmp_path: Path) -> None:
    uris = write_scored_images(tmp_path, [1.0, 5.0, 3.0, 4.0])
    _, page = make_report(tmp_path, top=3)
    shown = [uri for text in page.texts for uri in uris if text.endswith(uri)]
    assert shown == [uris[1], uris[3], uris[2]]
    assert "p = 0.025" in page.text
    assert [image["alt"] for image in page.all("img")][:2] == ["01.png", "Anomaly map over 01.png"]
    assert len(page.all("img")) == 6
    assert "left: 50.00%; top: 75.00%" in [span.get("style") for span in page.all("span")]


def test_pictures_are_small_whatever_the_size_of_the_image(tmp_path: Path) -> None:
    write_image(tmp_path / "large.jpg", size=(3000, 1000))
    (image,) = pa.Table.from_batches(list_images([str(tmp_path / "large.jpg")], {})).to_pylist()
    row = scored(image["image_uri"], image["image_version"], 3.0, image_height=1000, image_width=3000)
    write_rows(tmp_path / "out", [row])
    _, page = make_report(tmp_path)
    for picture in page.all("img"):
        data = base64.b64decode((picture["src"] or "").partition("base64,")[2])
        assert Image.open(io.BytesIO(data)).size == (384, 128)


def test_the_summary_counts_images_flags_and_open_errors(tmp_path: Path) -> None:
    uris = write_scored_images(tmp_path, [1.0, 1.5, 3.0, 4.0])
    write_rows(
        tmp_path / "out",
        [
            failed("/d/a.png", "truncated"),
            failed("/d/b.png", "truncated"),
            failed("/d/c.png", "not_found"),
            failed("/d/c.png", "timeout", night=-1),
            # A later score of the image, whatever its version, settles an error.
            failed(uris[0], "timeout", night=-1),
            # Another attempt's error for the very version that has a score is none either.
            failed(
                uris[1],
                "timeout",
                version=pq.read_table(tmp_path / "out" / "scores")["image_version"][1].as_py(),
                night=1,
            ),
            # A newer version that failed is one, although an older version has a score.
            failed(uris[2], "corrupt", version="newer", night=1),
        ],
        ERRORS,
    )
    _, page = make_report(tmp_path)
    assert "Images scored 4" in page.text
    assert "Flagged as anomalous 2 50 % of the images" in page.text
    assert "Not scored, by error 4 2 truncated 1" in page.text
    assert "corrupt" in page.text
    assert "not_found" in page.text
    assert "timeout" not in page.text
    assert "Model m1" in page.text


def test_only_the_latest_score_of_an_image_is_reported(tmp_path: Path) -> None:
    uris = write_scored_images(tmp_path, [3.0, 1.0])
    write_rows(
        tmp_path / "out", [scored(uris[0], "older", 9.0, scored_at=NIGHT - timedelta(days=1))], night=-1
    )
    _, page = make_report(tmp_path)
    assert "Images scored 2" in page.text
    assert len(page.all("li")) == 2
    assert not {"9", "2026-09-27"} & set(page.texts)


def test_an_image_that_can_no_longer_be_read_gets_a_placeholder_with_the_reason(tmp_path: Path) -> None:
    uris = write_scored_images(tmp_path, [5.0, 4.0, 3.0, 2.5])
    Path(uris[0]).unlink()
    write_image(Path(uris[1]), size=(8, 8))
    stat = Path(uris[2]).stat()
    Path(uris[2]).write_bytes(b"\0" * stat.st_size)
    _, page = make_report(tmp_path)
    assert page.text.count("The image can no longer be read") == 3
    assert "not_found:" in page.text
    assert "changed:" in page.text
    assert len(page.all("img")) == 2
    assert all(any(text.endswith(uri) for text in page.texts) for uri in uris)


def test_uris_are_shown_as_text_and_never_as_markup(tmp_path: Path) -> None:
    write_rows(tmp_path / "out", [scored("/d/<script>alert(1)</script>\"'.png", "v1", 3.0)])
    html, page = make_report(tmp_path)
    assert "<script>" not in html
    assert "/d/<script>alert(1)</script>\"'.png" in page.text


def test_scores_without_maps_are_reported_with_the_originals_and_their_peaks(tmp_path: Path) -> None:
    write_scored_images(tmp_path, [3.0, 4.0], anomaly_map=None)
    _, page = make_report(tmp_path)
    assert len(page.all("img")) == 2
    assert sum(span.get("class") == "peak" for span in page.all("span")) == 2
    assert "same scale for every image" not in page.text


def test_a_score_that_is_no_number_is_shown_first(tmp_path: Path) -> None:
    uris = write_scored_images(tmp_path, [1.0, 3.0])
    write_rows(tmp_path / "out", [scored("/d/nan.png", "v1", float("nan"))], night=1)
    _, page = make_report(tmp_path, top=2)
    assert page.text.index("/d/nan.png") < page.text.index(uris[1])


def test_scores_without_a_row_make_an_empty_report(tmp_path: Path) -> None:
    write_rows(tmp_path / "out", [])
    _, page = make_report(tmp_path)
    assert "Images scored 0" in page.text
    assert page.all("li") == []


def test_all_maps_share_a_range_from_common_values_to_the_hottest() -> None:
    quiet = np.full((10, 10), 0.5, dtype=np.float32)
    hot = quiet.copy()
    hot[:3] = 20.0
    hot[9, 9] = np.nan
    shared = colour_range([quiet, hot])
    assert shared is not None
    assert (shared.vmin, shared.vmax) == (0.5, 20.0)
    assert colour_range([]) is None
    flat = colour_range([quiet])
    assert flat is not None
    assert flat.vmin < flat.vmax


def test_the_histogram_counts_every_image_and_marks_the_lowest_flagged_score() -> None:
    scores = np.array([0.4, 0.5, 0.5, 0.6, 7.0, 70.0, np.nan])
    drawn = histogram(scores, scores > 1)
    assert drawn is not None
    assert sum(bar.unflagged for bar in drawn.bars) == 4
    assert sum(bar.flagged for bar in drawn.bars) == 2
    assert drawn.threshold is not None
    assert drawn.threshold[0] == 7.0
    assert [tick for tick, _ in drawn.score_ticks] == pytest.approx([0.5, 1, 2, 5, 10, 20, 50])
    assert all(0 <= place <= 1 for _, place in drawn.score_ticks)
    assert histogram(np.array([np.nan]), np.array([True])) is None


def test_the_histogram_of_one_score_or_a_narrow_range_still_has_ticks() -> None:
    for scores in ([3.0], [0.61, 0.62, 0.63]):
        drawn = histogram(np.array(scores), np.zeros(len(scores), dtype=bool))
        assert drawn is not None
        assert sum(bar.unflagged for bar in drawn.bars) == len(scores)
        assert len(drawn.score_ticks) >= 2
        assert drawn.threshold is None


def test_wrong_use_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match="holds no scores"):
        make_report(tmp_path)
    with pytest.raises(WrongUse, match=r"--top: .* greater than or equal to 1"):
        parse(ReportConfig, None, ["--scores", "out", "--top", "0"])
