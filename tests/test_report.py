"""The report job, on Parquet files in the schema of a scoring job and images on a disk."""

import base64
import hashlib
import io
import json
import re
import urllib.request
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scored_output import write_record

from csflow.calibration import drift, p_values
from csflow.config import parse
from csflow.errors import ExitStatus, WrongUse
from csflow.inputs.listing import list_images
from csflow.maps import colour_range
from csflow.output.reading import open_scores
from csflow.output.runs import ScoredWith
from csflow.output.schemas import ERRORS, SCORES
from csflow.report import ReportConfig, gallery, report
from csflow.report.charts import folders, heat_map, histogram, time_line
from csflow.report.defects import without_formulas
from csflow.report.gallery import LARGEST_SIDE, PictureMaker, close_up_edges, picture_side
from csflow.report.links import links
from csflow.storage import Location, read_parquet, to_parquet

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

    VOID = frozenset({"meta", "img", "link", "input", "br"})

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

    @property
    def cards(self) -> list[dict[str, str | None]]:
        return [item for item in self.all("li") if "data-rank" in item]

    @property
    def pictures(self) -> list[dict[str, str | None]]:
        """The images of the gallery."""
        return [
            picture for picture in self.all("img") if (picture["src"] or "").startswith("data:image/webp")
        ]

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
    assert not {"iframe", "object"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))


def test_browsers_are_told_to_run_the_page_s_own_script_and_no_other(tmp_path: Path) -> None:
    write_scored_images(tmp_path, [3.0])
    html, _ = make_report(tmp_path)
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'\"" in html


def test_the_highest_scores_are_shown_highest_first_each_with_its_map(tmp_path: Path) -> None:
    uris = write_scored_images(tmp_path, [1.0, 5.0, 3.0, 4.0])
    _, page = make_report(tmp_path, top=3)
    assert [card["data-uri"] for card in page.cards] == [uris[1], uris[3], uris[2]]
    assert "p = 0.025" in page.text
    assert [picture["alt"] for picture in page.pictures][:2] == [
        "01.png",
        "Anomaly map over 01.png, hottest 50 % from the left and 75 % from the top",
    ]
    assert len(page.pictures) == 6
    assert "left: 50.00%; top: 75.00%" in [span.get("style") for span in page.all("span")]


def test_pictures_are_small_whatever_the_size_of_the_image(tmp_path: Path) -> None:
    write_image(tmp_path / "large.jpg", size=(3000, 1000))
    (image,) = pa.Table.from_batches(list_images([str(tmp_path / "large.jpg")], {})).to_pylist()
    row = scored(image["image_uri"], image["image_version"], 3.0, image_height=1000, image_width=3000)
    write_rows(tmp_path / "out", [row])
    _, page = make_report(tmp_path)
    photograph, anomaly_map, close_up = map(picture_in, page.pictures)
    assert photograph.size == (384, 128)
    assert anomaly_map.size == (96, 32)
    # A cell of the map has 500 x 1000 pixels.
    assert close_up.size == (768, 500)


def picture_in(element: dict[str, str | None]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode((element["src"] or "").partition("base64,")[2])))


def test_a_large_image_has_a_close_up_of_its_hottest_place_pixel_by_pixel(tmp_path: Path) -> None:
    # Smooth enough for a lossy picture, and different everywhere.
    y_H1, x_1W = np.arange(900)[:, None], np.arange(1200)[None]
    ramps_HWC = np.stack(np.broadcast_arrays(y_H1 / 4, x_1W / 5, (x_1W + y_H1) / 9), axis=-1)
    pixels_HWC = ramps_HWC.astype(np.uint8)
    Image.fromarray(pixels_HWC).save(tmp_path / "large.png")
    (image,) = pa.Table.from_batches(list_images([str(tmp_path / "large.png")], {})).to_pylist()
    sizes = {"image_height": 900, "image_width": 1200, "peak_y": 880.0, "peak_x": 600.0}
    map_9x12 = {"anomaly_map": [0.5] * 107 + [3.0], "map_height": 9, "map_width": 12}
    row = scored(image["image_uri"], image["image_version"], 3.0) | sizes | map_9x12
    write_rows(tmp_path / "out", [row])
    _, page = make_report(tmp_path)
    _, _, element = page.pictures
    assert (element["alt"] or "").startswith("Close-up of the hottest place of large.png, 384 × 384 pixels")
    shown_HWC = np.asarray(picture_in(element)).astype(int)
    assert shown_HWC.shape == (384, 384, 3)
    # Moved up from the peak, to lie in the image.
    assert np.abs(shown_HWC - pixels_HWC[516:900, 408:792]).mean() < 2
    (outline,) = [span["style"] for span in page.all("span") if span.get("class") == "outline"]
    assert outline == "left: 34.00%; top: 57.33%; width: 32.00%; height: 42.67%"


def test_regions_are_drawn_where_they_are(tmp_path: Path) -> None:
    region = {"x": 16.0, "y": 12.0, "width": 8.0, "height": 24.0}
    values = {"area": 1.0, "peak": 3.0, "mean": 2.0, "p_value": 0.1}
    write_scored_images(tmp_path, [3.0], regions=[region | values])
    _, page = make_report(tmp_path)
    (box,) = [span["style"] for span in page.all("span") if span.get("class") == "region"]
    assert box == "left: 25.00%; top: 25.00%; width: 12.50%; height: 50.00%"


@pytest.mark.parametrize(
    ("peak", "cell", "edges"),
    [
        ((450, 600), 10, [258, 408, 642, 792]),
        ((0, 1200), 10, [0, 816, 384, 1200]),
        ((450, 600), 500, [200, 350, 700, 850]),  # as large as a cell
        ((450, 600), 2000, [66, 216, 834, 984]),  # but at most twice as large
    ],
)
def test_a_close_up_lies_in_the_image_and_holds_the_hottest_cell(peak, cell, edges):
    row = {"image_height": 900, "image_width": 1200, "peak_y": peak[0], "peak_x": peak[1], "map_box": None}
    row |= {"map_height": 9, "map_width": 12, "map_box": [0.0, 0.0, 9.0 * cell, 12.0 * cell]}
    assert close_up_edges(row, 384) == edges
    assert close_up_edges(row, 800) is None


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
    assert "Not scored 4 most often truncated" in page.text
    assert "truncated 2 no 2026-09-28 02:00 /d/" in page.text
    assert "corrupt 1 no" in page.text
    assert "not_found 1 no" in page.text
    assert "timeout" not in page.text
    assert "Model m1" in page.text


def test_only_the_latest_score_of_an_image_is_reported(tmp_path: Path) -> None:
    uris = write_scored_images(tmp_path, [3.0, 1.0])
    write_rows(
        tmp_path / "out", [scored(uris[0], "older", 9.0, scored_at=NIGHT - timedelta(days=1))], night=-1
    )
    _, page = make_report(tmp_path)
    assert "Images scored 2" in page.text
    assert len(page.cards) == 2
    assert "2026-09-27" not in page.text
    assert "9" not in page.texts


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
    assert len(page.pictures) == 2
    assert all(any(text.endswith(uri) for text in page.texts) for uri in uris)


def test_uris_are_shown_as_text_and_never_as_markup(tmp_path: Path) -> None:
    write_rows(tmp_path / "out", [scored("/d/<script>alert(1)</script>\"'.png", "v1", 3.0)])
    html, page = make_report(tmp_path)
    assert "<script>alert" not in html
    assert "/d/<script>alert(1)</script>\"'.png" in page.text


def test_scores_without_maps_are_reported_with_the_originals_and_their_peaks(tmp_path: Path) -> None:
    write_scored_images(tmp_path, [3.0, 4.0], anomaly_map=None)
    _, page = make_report(tmp_path)
    assert len(page.pictures) == 2
    assert sum(span.get("class") == "peak" for span in page.all("span")) == 2
    assert "one scale for all images" not in page.text
    assert "Where anomalies occur" not in page.text


def test_the_page_says_what_the_defect_list_has_beyond_the_images_that_it_shows(tmp_path: Path) -> None:
    write_rows(tmp_path / "out", rows_of(20, 0.01, 5.0) + rows_of(80, 0.6, 1.0))
    _, page = make_report(tmp_path, top=8)
    assert (
        "On the defect list 20 of which at most 10 % are normal, on average See the worst 8 below"
        in page.text
    )
    assert "on the defect list (8 of 20)" in page.text
    _, page = make_report(tmp_path, top=30)
    assert "See all below" in page.text
    assert "on the defect list (20)" in page.text


def test_a_template_links_each_image_by_its_encoded_uri_or_path() -> None:
    uris = ["s3://plant/a b.tar!/c&d.png", "/data/{path}.png"]
    by_uri = links(uris, "https://viewer.example/?image={uri}", None, {})
    assert by_uri[0] == "https://viewer.example/?image=s3%3A%2F%2Fplant%2Fa%20b.tar%21%2Fc%26d.png"
    by_path = links(uris, "https://files.example/{path}", None, {})
    assert by_path == [
        "https://files.example/plant/a%20b.tar%21/c%26d.png",
        "https://files.example/data/%7Bpath%7D.png",
    ]


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("javascript:alert({uri})", "must begin with https:// or http://"),
        ("https://viewer.example/", "needs the placeholder {uri} or {path}"),
        ("https://viewer.example/{url}", "{url} is no placeholder"),
    ],
)
def test_a_template_that_makes_no_links_is_refused(template: str, complaint: str) -> None:
    with pytest.raises(WrongUse, match=f"--link: .*{re.escape(complaint)}"):
        parse(ReportConfig, None, ["--scores", "out", "--link", template])


def test_links_are_presigned_by_stores_that_can(s3_bucket: str) -> None:
    (Location(s3_bucket) / "images" / "a.png").write(b"content")
    objects = [f"{s3_bucket}/images/a.png", f"{s3_bucket}/images/b.tar!/a.png"]
    first, member = links(objects, None, 2, {})
    assert member is None
    assert first is not None
    with urllib.request.urlopen(first) as answer:
        assert answer.read() == b"content"
    assert "Expires" in first
    with pytest.raises(
        WrongUse, match="--presign_hours: no shown image is an object in a store that presigns"
    ):
        links(["/data/a.png"], None, 2, {})
    with pytest.raises(WrongUse, match="give one of them"):
        links(objects, "https://viewer.example/{uri}", 2, {})


def test_a_score_that_is_no_number_is_shown_first(tmp_path: Path) -> None:
    uris = write_scored_images(tmp_path, [1.0, 3.0])
    write_rows(tmp_path / "out", [scored("/d/nan.png", "v1", float("nan"))], night=1)
    _, page = make_report(tmp_path, top=2)
    assert page.text.index("/d/nan.png") < page.text.index(uris[1])


def test_scores_without_a_row_make_an_empty_report(tmp_path: Path) -> None:
    write_rows(tmp_path / "out", [])
    _, page = make_report(tmp_path)
    assert "Images scored 0" in page.text
    assert page.cards == []


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


def write_model(tmp_path: Path, heldout_scores: list[float], model_id: str = "m1") -> Path:
    """The two files of a model directory that a report reads."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"format_version": 4, "model_id": model_id}))
    images = [f"/held/out/{number}.png" for number in range(len(heldout_scores))]
    calibration = {"image_uri": images, "image_version": images, "anomaly_score": heldout_scores}
    pq.write_table(pa.table(calibration), model / "calibration.parquet")
    return model


def scored_with(model: Path) -> ScoredWith:
    return ScoredWith(location=str(model), model_id="m1")


def rows_of(count: int, p_value: float, score: float, **other: Any) -> list[dict[str, Any]]:
    return [
        scored(f"/d/{score}-{number:03}.png", "v1", score + number / 1000, p_value=p_value, **other)
        for number in range(count)
    ]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_the_defect_list_is_written_with_the_worst_image_first(tmp_path: Path, suffix: str) -> None:
    # At 0.1, 20 images of p = 0.01 may be listed among 100: 0.01 is below 0.1 · 20 / 100.
    write_rows(tmp_path / "out", rows_of(20, 0.01, 5.0) + rows_of(80, 0.6, 1.0))
    target = tmp_path / f"defects{suffix}"
    _, page = make_report(tmp_path, defects=str(target))
    rows = (pyarrow.csv.read_csv if suffix == ".csv" else pq.read_table)(target)
    assert rows["image_uri"].to_pylist() == [f"/d/5.0-{number:03}.png" for number in reversed(range(20))]
    assert {"image_version", "anomaly_score", "p_value", "peak_y", "run_id", "date"} <= set(rows.column_names)
    assert "On the defect list 20 of which at most 10 % are normal, on average" in page.text
    assert sum("data-listed" in card for card in page.cards) == 20


def test_the_list_says_how_many_held_out_images_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path, [0.5] * 99)
    write_rows(tmp_path / "out", rows_of(5, 0.01, 5.0) + rows_of(95, 0.6, 0.4))
    target = tmp_path / "defects.csv"
    _, page = make_report(tmp_path, model=str(model), defects=str(target))
    assert len(pyarrow.csv.read_csv(target)) == 0
    assert "it takes 199 held-out images to list so few" in capsys.readouterr().out
    assert "It takes 199 held-out images, not 99, to list the 5 above all of them" in page.text


def test_texts_that_a_spreadsheet_would_compute_are_marked_as_texts():
    texts = ["=1+1", "+1", "-1", "@a", "\t=1", "a=1", "/data/a.png", None]
    table = pa.table({"image_uri": texts, "anomaly_score": [-1.5] * 8})
    marked = without_formulas(table)
    assert marked["image_uri"].to_pylist() == [
        "'=1+1",
        "'+1",
        "'-1",
        "'@a",
        "'\t=1",
        "a=1",
        "/data/a.png",
        None,
    ]
    assert marked["anomaly_score"].to_pylist() == [-1.5] * 8
    assert marked.schema == table.schema


def test_a_report_of_one_run_decides_on_its_images_alone(tmp_path: Path) -> None:
    # With the old run's hundred normal images beside them, 0.02 would not be small enough.
    write_rows(tmp_path / "out", rows_of(100, 0.6, 1.0, run_id="20260927T0000Z-a"), night=-1)
    write_rows(tmp_path / "out", rows_of(2, 0.02, 5.0, run_id="20260928T0000Z-b"))
    _, page = make_report(tmp_path)
    assert "On the defect list 0" in page.text
    for run_id in ("latest", "20260928T0000Z-b"):
        _, page = make_report(tmp_path, run_id=run_id)
        assert "Images scored 2" in page.text
        assert "On the defect list 2" in page.text
    with pytest.raises(WrongUse, match="--run_id other scored no image of model m1"):
        make_report(tmp_path, run_id="other")


def test_the_model_is_found_where_the_last_run_had_it(tmp_path: Path) -> None:
    write_rows(tmp_path / "out", rows_of(3, 0.5, 1.0))
    model = write_model(tmp_path, [0.9, 1.0, 1.1])
    write_record(tmp_path / "out", "20260927T0000Z-a", model=scored_with(model))
    counts = {"errors_in_this_run": {"corrupt": 4}}
    write_record(tmp_path / "out", "20260928T0000Z-b", model=scored_with(model), counts=counts)
    (tmp_path / "out" / "_runs" / "20260929T0000Z-cut-off").mkdir()
    _, page = make_report(tmp_path)
    assert "beside what 3 held-out normal images let expect" in page.text
    assert "The last 2 runs" in page.text
    assert "20260928T0000Z-b done 3 1 4 12.5 12.5 % 0.250 (p = 1e-05) 20260927T0000Z-a" in page.text
    why = "3 images are held out, so the smallest p-value is 0.25, and --false_positive_rate 0.05 can flag no"
    assert why in page.text
    assert "never with 3 held-out images; too few images to tell" in page.text


def test_the_report_says_what_has_drifted_and_that_its_promises_do_not_hold_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "out", rows_of(30, 0.05, 9.0))
    model = write_model(tmp_path, [1 + n / 100 for n in range(19)])
    found = drift([9.0] * 30, 1.0, [1 + n / 100 for n in range(19)])
    write_record(tmp_path / "out", "20260928T0000Z-b", model=scored_with(model), drift=found)
    _, page = make_report(tmp_path)
    verdict = "100% of the images are unlike all of the 19 held-out images: another product"
    assert page.text.count(verdict) == 3  # above all, in the summary, and in the table of runs
    assert page.text.index(verdict) < page.text.index("Images scored 30")
    assert "Of normal images like the held-out ones, 5 % would be" in page.text
    assert (
        "On the defect list 30 made for a false-discovery rate of 10 %, which it need not keep" in page.text
    )
    printed = capsys.readouterr().out
    assert f"warning: the drift verdict is unlike: {verdict}" in printed
    assert "The promise of the defect list does not hold" in printed
    assert "at most 10 %" not in printed + page.text


def test_a_list_that_cannot_be_promised_is_estimated_if_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    normal, bad = 1 + random.exponential(size=20_000), random.uniform(16, 30, 12)
    heldout = 1 + random.exponential(size=199)
    every = np.concatenate([normal, bad])
    rows = [
        scored(f"{number}.png", "v1", float(score), p_value=float(p))
        for number, (score, p) in enumerate(zip(every, p_values(every, heldout), strict=True))
    ]
    write_rows(tmp_path / "out", rows)
    model = write_model(tmp_path, heldout.tolist())
    write_record(tmp_path / "out", "20260928T0000Z-b", model=scored_with(model))
    make_report(tmp_path)
    said = capsys.readouterr().out
    assert "no image is on the defect list" in said
    assert "held-out images to list so few; --estimate chooses some without a promise" in said

    _, page = make_report(tmp_path, estimate=True, defects=str(tmp_path / "list.csv"))
    said = capsys.readouterr().out
    listed = pyarrow.csv.read_csv(tmp_path / "list.csv")["image_uri"].to_pylist()
    assert {f"{number}.png" for number in range(20_000, 20_012)} <= set(listed)
    assert len(listed) <= 14
    found = re.search(
        rf"{len(listed)} of 20,012 images are on the defect list, by an estimate: [\d.]+ % of it are normal "
        r"images \(95 % interval 0 to \d+ %\), if their scores fall off as they do below",
        said,
    )
    assert found
    assert f"On the defect list {len(listed)} an estimate, no promise: " in page.text
    assert "on average" not in said


def test_another_model_s_held_out_scores_are_not_taken(tmp_path: Path) -> None:
    write_rows(tmp_path / "out", rows_of(3, 0.5, 1.0))
    model = write_model(tmp_path, [1.0], model_id="m2")
    write_record(tmp_path / "out", "20260928T0000Z-b", model=scored_with(model))
    _, page = make_report(tmp_path)
    assert "held-out normal images let expect" not in page.text
    with pytest.raises(WrongUse, match="does not hold model m1"):
        make_report(tmp_path, model=str(model))


def test_the_list_goes_to_a_table_or_nowhere(tmp_path: Path) -> None:
    write_rows(tmp_path / "out", rows_of(1, 0.5, 1.0))
    with pytest.raises(WrongUse, match=r"must end with \.csv or \.parquet"):
        make_report(tmp_path, defects=str(tmp_path / "defects.txt"))
    assert not (tmp_path / "result").exists() or not list((tmp_path / "result").iterdir())


def image_table(rows: list[dict[str, Any]]) -> pa.Table:
    rows = [{"date": NIGHT.date()} | row for row in rows]
    return pa.Table.from_pylist(rows, schema=pa.schema([*SCORES, pa.field("date", pa.date32())]))


def test_the_time_line_goes_by_day_or_by_run_if_there_is_one_day() -> None:
    first, second = NIGHT.date(), (NIGHT + timedelta(days=1)).date()
    rows = [scored("a", "v", 1.0, date=first), scored("b", "v", 3.0, date=second)]
    line = time_line(image_table([*rows, scored("c", "v", 1.0, date=second)]))
    assert line is not None
    assert line.by == "day"
    assert [(period.images, period.flagged) for period in line.periods] == [(1, 0), (2, 1)]
    assert line.highest_share >= 0.5
    by_run = time_line(image_table([scored("a", "v", 1.0), scored("b", "v", 3.0, run_id="r2")]))
    assert by_run is not None
    assert (by_run.by, [period.name for period in by_run.periods]) == ("run", ["r1", "r2"])
    assert time_line(image_table([scored("a", "v", 1.0)])) is None
    assert time_line(image_table([])) is None


def test_folders_are_named_without_what_they_have_in_common() -> None:
    uris = ["s3://p/line1/a/1.png", "s3://p/line1/b.tar!/x/2.png", "s3://p/line2/c.parquet#7", "s3://p/3.png"]
    table = image_table([scored(uri, "v", 3.0 if "line2" in uri else 1.0) for uri in uris])
    shown, count = folders(table, np.array([False, False, True, False]))
    assert {folder.name for folder in shown} == {"line1/a", "line1/b.tar!/x", "line2/c.parquet", "."}
    assert (shown[0].name, shown[0].flagged, shown[0].listed, count) == ("line2/c.parquet", 1, 1, 4)
    assert folders(table.slice(0, 1), np.array([False])) == ([], 1)


def test_the_heat_map_tells_in_what_share_of_flagged_images_a_place_is_hot(tmp_path: Path) -> None:
    hot_corner, hot_centre = [9.0, 0.5, 0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5, np.nan, 0.5]
    unflagged = [
        scored(f"/d/{i}.png", "v", 1.0, anomaly_map=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]) for i in range(9)
    ]
    flagged = [scored(f"/d/hot{i}.png", "v", 3.0, anomaly_map=hot_corner) for i in range(3)]
    write_rows(tmp_path / "out", [*unflagged, *flagged, scored("/d/n.png", "v", 4.0, anomaly_map=hot_centre)])
    drawn = heat_map(open_scores(Location(str(tmp_path / "out"))).scores)
    assert drawn is not None
    assert drawn.flagged == 4
    assert drawn.hot_share_HW.tolist() == [[0.75, 0.0, 0.0], [0.0, 0.25, 0.0]]
    assert drawn.hottest == (0.25, pytest.approx(1 / 6), 0.75)


def test_the_heat_map_joins_maps_of_images_of_different_sizes(tmp_path: Path) -> None:
    rows = []
    for number, (height, width) in enumerate([(300, 400), (10, 8)]):
        map_HW = np.full((height, width), 0.5)
        map_HW[-1, 0] = 9.0  # in the lower left corner
        size = {"map_height": height, "map_width": width, "image_height": height, "image_width": width}
        rows.append(scored(f"{number}.png", "v1", 3.0, anomaly_map=map_HW.ravel().tolist(), **size))
        normal = np.random.default_rng(number).uniform(0, 1, height * width).tolist()
        rows.append(scored(f"normal-{number}.png", "v1", 1.0, anomaly_map=normal, **size))
    write_rows(tmp_path / "out", rows)
    drawn = heat_map(open_scores(Location(str(tmp_path / "out"))).scores)
    assert drawn is not None
    assert drawn.hot_share_HW.shape == (32, 32)
    assert drawn.hot_share_HW[31, 0] == 1
    assert drawn.hot_share_HW[:28].max() == 0
    for row in rows[::2]:
        assert drawn.hot_cells(row).reshape(32, 32)[31, 0]


def test_the_heat_map_is_of_the_image_whatever_a_map_covers(tmp_path: Path) -> None:
    unflagged = [scored(f"/d/{i}.png", "v", 1.0, anomaly_map=[0.1] * 6) for i in range(9)]
    # A letterbox whose lower half is the image, and a crop to the image's right third.
    letterboxed = scored("/d/l.png", "v", 3.0, anomaly_map=[0.0, 0.0, 0.0, 0.0, 9.0, 0.0])
    height, width = letterboxed["image_height"], letterboxed["image_width"]
    letterboxed["map_box"] = [-height, 0.0, height, width]
    cropped = scored("/d/c.png", "v", 3.0, anomaly_map=[9.0] * 6)
    cropped["map_box"] = [0.0, 2 * width / 3, height, width]
    write_rows(tmp_path / "out", [*unflagged, letterboxed, cropped])
    drawn = heat_map(open_scores(Location(str(tmp_path / "out"))).scores)
    assert drawn is not None
    assert drawn.hot_share_HW.tolist() == [[0.0, 0.5, 0.5], [0.0, 0.5, 0.5]]


def test_the_held_out_scores_are_drawn_as_what_so_many_normal_images_would_be() -> None:
    drawn = histogram(np.array([1.0, 2.0, 2.0, 4.0]), np.zeros(4, dtype=bool), [0.5, 1.0])
    assert drawn is not None
    assert sum(bar.expected for bar in drawn.bars) == pytest.approx(4)
    assert drawn.bars[0].expected == 2


def test_pictures_get_smaller_when_there_are_many() -> None:
    assert picture_side(1) == picture_side(60) == LARGEST_SIDE
    assert 2000 * picture_side(2000) ** 2 <= 1.3 * 120 * LARGEST_SIDE**2


def test_an_actor_makes_the_same_pictures_as_this_process(tmp_path: Path) -> None:
    write_scored_images(tmp_path, [3.0, 4.0])
    (tmp_path / "images" / "01.png").unlink()
    rows = open_scores(Location(str(tmp_path / "out"))).scores.to_table()
    maker = PictureMaker({}, colour_range([np.array([[0.0, 1.0]], dtype=np.float32)]), 32)
    batch = {"shard": np.array([7]), "rows": np.array([to_parquet(rows)], dtype=object)}
    (result,) = maker(batch).to_pylist()
    made = pq.read_table(io.BytesIO(result["pictures"])).to_pylist()
    assert result["shard"] == 7
    assert made == [asdict(pictures) for pictures in maker.make(rows.to_pylist())]
    assert made[1]["original"] is None
    assert made[1]["problem"].startswith("not_found")


def test_of_very_many_images_the_cluster_makes_the_pictures(
    ray_cluster: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris = write_scored_images(tmp_path, [3.0, 4.0, 5.0])
    Path(uris[0]).unlink()
    monkeypatch.setattr(gallery, "RAY_FROM", 3)
    monkeypatch.setattr(gallery, "SHARD_IMAGES", 2)
    _, page = make_report(tmp_path)
    assert [card["data-uri"] for card in page.cards] == list(reversed(uris))
    assert [picture["alt"] for picture in page.pictures][::2] == ["02.png", "01.png"]
    assert page.text.count("not_found:") == 1


def test_scores_images_and_results_may_all_be_in_an_object_store(s3_bucket: str, tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    model = write_model(tmp_path, [0.9, 1.0])
    write_record(tmp_path / "out", "20260928T0000Z-b", model=scored_with(model))
    (Location(s3_bucket) / "images" / "a.png").write((tmp_path / "a.png").read_bytes())
    (image,) = pa.Table.from_batches(list_images([f"{s3_bucket}/images"], {})).to_pylist()
    row = scored(image["image_uri"], image["image_version"], 3.0, p_value=0.01)
    record = (tmp_path / "out" / "_runs" / "20260928T0000Z-b" / "run.json").read_bytes()
    day = f"scores/model_id=m1/date={NIGHT.date()}/part-0.parquet"
    (Location(s3_bucket) / "out" / day).write(to_parquet(pa.Table.from_pylist([row], SCORES)))
    (Location(s3_bucket) / "out" / "_runs" / "20260928T0000Z-b" / "run.json").write(record)
    config = ReportConfig(
        scores=f"{s3_bucket}/out", output=f"{s3_bucket}/report.html", defects=f"{s3_bucket}/list.parquet"
    )
    assert report(config) == ExitStatus.DONE
    page = Page((Location(s3_bucket) / "report.html").read().decode())
    assert len(page.pictures) == 2
    assert "20260928T0000Z-b done" in page.text
    assert read_parquet(Location(s3_bucket) / "list.parquet")["image_uri"].to_pylist() == [image["image_uri"]]
