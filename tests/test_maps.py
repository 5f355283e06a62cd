"""Anomaly maps over images."""

import re
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from PIL import Image

from csflow.inputs.listing import list_images
from csflow.maps import ANCHORS, COLOUR_TABLE, colour_range, overlay, resample
from csflow.overlays import overlay_row, write_overlays
from csflow.preprocessing import Fit, Preprocessing

GREY = Image.new("RGB", (90, 60), (120, 120, 120))


def _map(hot: tuple[int, int] | None = None, value: float = 10.0) -> np.ndarray:
    anomaly_map = np.zeros((4, 6), dtype=np.float32)
    if hot is not None:
        anomaly_map[hot] = value
    return anomaly_map


def test_overlay_has_the_size_and_mode_of_the_image() -> None:
    drawn = overlay(GREY, _map(), vmin=0, vmax=1)
    assert (drawn.size, drawn.mode) == ((90, 60), "RGB")


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA"])
def test_a_picture_of_another_mode_gets_the_colours_of_the_map_too(mode: str) -> None:
    drawn = overlay(GREY.convert(mode), _map(hot=(3, 0)), vmin=0, vmax=10)
    assert drawn.mode == "RGB"
    assert np.array_equal(drawn, overlay(GREY, _map(hot=(3, 0)), vmin=0, vmax=10))


def test_values_up_to_vmin_leave_the_image_as_it_is() -> None:
    assert np.array_equal(overlay(GREY, _map() - 5, vmin=0, vmax=1), GREY)


def test_the_hot_cell_is_drawn_at_its_place_and_nowhere_else() -> None:
    drawn = np.asarray(overlay(GREY, _map(hot=(3, 0)), vmin=0, vmax=10), dtype=int)
    changed = np.abs(drawn - 120).sum(axis=2)
    assert changed[52, 7] > 100
    assert changed[:30].max() == 0
    assert changed[:, 45:].max() == 0


def test_one_value_has_one_colour_in_every_image() -> None:
    alone = np.asarray(overlay(GREY, np.full((4, 6), 3, np.float32), vmin=0, vmax=10))
    beside_hotter = _map(hot=(0, 5))
    beside_hotter[:, :3] = 3
    assert np.array_equal(np.asarray(overlay(GREY, beside_hotter, vmin=0, vmax=10))[:, :30], alone[:, :30])


def test_alpha_grows_with_the_value() -> None:
    white = Image.new("RGB", (6, 4), "white")
    ramp = np.tile(np.linspace(0, 1, 6, dtype=np.float32), (4, 1))
    table_colour = COLOUR_TABLE[(ramp[0] * 255).round().astype(int)].astype(float)
    drawn = np.asarray(overlay(white, ramp, vmin=0, vmax=1), dtype=float)[0]
    blue = slice(2, 3)  # the channel in which no colour of the scale's lower part is white
    alpha = ((255 - drawn[:, blue]) / (255 - table_colour[:, blue])).ravel()
    assert alpha == pytest.approx(0.8 * ramp[0], abs=0.02)


def test_values_above_vmax_and_values_that_are_no_number_are_brightest() -> None:
    expected = np.asarray(overlay(GREY, np.full((4, 6), 10, np.float32), vmin=0, vmax=10))
    for value in (11.0, np.inf, np.nan):
        drawn = overlay(GREY, np.full((4, 6), value, np.float32), vmin=0, vmax=10)
        assert np.array_equal(drawn, expected)


def test_the_colour_scale_gets_brighter_at_every_step() -> None:
    luminance = COLOUR_TABLE @ np.array([0.2126, 0.7152, 0.0722])
    assert (COLOUR_TABLE.shape, tuple(COLOUR_TABLE[0]), tuple(COLOUR_TABLE[-1])) == (
        (256, 3),
        ANCHORS[0],
        ANCHORS[-1],
    )
    assert (np.diff(luminance) > -0.5).all()


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(ValueError, match="must be below"):
        overlay(GREY, _map(), vmin=1, vmax=1)


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


@pytest.fixture
def scores(tmp_path: Path) -> pa.Table:
    """Rows of `scores` and their images: flat grey, 64 by 48, with a map whose last cell is hottest."""
    for name in ("a.png", "b c.png"):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (64, 48), (120, 120, 120)).save(tmp_path / "images" / name)
    listed = pa.Table.from_batches(list_images([str(tmp_path / "images")], {})).to_pylist()
    rows = [
        {
            "image_uri": image["image_uri"],
            "image_version": image["image_version"],
            "image_height": 48,
            "image_width": 64,
            "anomaly_score": float(number),
            "anomaly_map": [0.0, 0.0, 0.0, 0.0, 0.0, 4.0 * (number + 1)],
            "map_height": 2,
            "map_width": 3,
        }
        for number, image in enumerate(sorted(listed, key=lambda image: image["image_uri"]))
    ]
    return pa.Table.from_pylist(rows)


def test_a_row_of_scores_becomes_its_image_with_its_map(scores: pa.Table) -> None:
    drawn = np.asarray(overlay_row(scores.to_pylist()[0]), dtype=int)
    assert drawn.shape == (48, 64, 3)
    assert np.array_equal(drawn[:10, :10], np.full((10, 10, 3), 120))
    assert np.abs(drawn[40, 60] - 120).sum() > 100
    assert overlay_row(scores.to_pylist()[0], side=32).size == (32, 24)


def test_a_map_is_resampled_into_the_part_that_it_covers() -> None:
    ramp = np.tile(np.arange(6, dtype=np.float32), (4, 1))
    whole = resample(ramp, 40, 60)
    # As large as the image, it is what it always was; moved and halved, it is the same values elsewhere.
    np.testing.assert_array_equal(whole, resample(ramp, 40, 60, (0, 0, 40, 60)))
    np.testing.assert_allclose(resample(ramp, 80, 90, (20, 10, 60, 70), outside=-1)[20:60, 10:70], whole)
    beyond = resample(ramp, 80, 90, (20, 10, 60, 70), outside=-1)
    assert (beyond[:20] == -1).all()
    assert (beyond[60:] == -1).all()
    assert (beyond[:, :10] == -1).all()
    assert (beyond[:, 70:] == -1).all()
    # A map that reaches beyond the image gives it its middle.
    np.testing.assert_allclose(resample(ramp, 20, 40, (-10, -10, 30, 50)), whole[10:30, 10:50], atol=1e-6)
    # Edges that lie between pixels.
    assert resample(ramp, 7, 3, (2.5, -1.2, 4.5, 9.7), outside=9).max(axis=1).tolist()[:2] == [9, 9]


@pytest.mark.parametrize("fit", ["stretch", "letterbox", "crop"])
@pytest.mark.parametrize("shape", [(90, 200), (200, 90)])
def test_a_hot_cell_is_drawn_where_it_was_seen(fit: Fit, shape: tuple[int, int]) -> None:
    box = Preprocessing((64, 64), fit).place(*shape).box
    anomaly_map = np.zeros((8, 8), np.float32)
    anomaly_map[4, 3] = 1
    y, x = box.top + 4.5 / 8 * (box.bottom - box.top), box.left + 3.5 / 8 * (box.right - box.left)
    drawn = overlay(Image.new("RGB", shape[::-1], (0, 0, 0)), anomaly_map, vmin=0, vmax=1, box=box)
    weight_HW = np.asarray(drawn, dtype=float).sum(axis=2)
    rows, columns = np.indices(shape) + 0.5
    found = (weight_HW * rows).sum() / weight_HW.sum(), (weight_HW * columns).sum() / weight_HW.sum()
    np.testing.assert_allclose(found, (y, x), atol=0.6)


def test_a_row_says_what_its_map_covers(scores: pa.Table) -> None:
    # The map's first row is padding above the image, which its second row covers alone.
    row = scores.to_pylist()[0] | {"map_box": [-48.0, 0.0, 48.0, 64.0]}
    drawn = np.asarray(overlay_row(row), dtype=int)
    reaches = np.abs(drawn - 120).sum(axis=2) > 100
    assert reaches[40:, 60:].all()
    assert not reaches[:, :20].any()
    cropped = scores.to_pylist()[0] | {"map_box": [0.0, 0.0, 48.0, 32.0]}
    beyond = np.asarray(overlay_row(cropped, side=32), dtype=int)
    assert beyond.shape == (24, 32, 3)
    assert (beyond[:, 16:] == 120).all()
    assert (beyond[20, 14] != 120).any()


def test_a_row_without_a_map_is_refused(scores: pa.Table) -> None:
    with pytest.raises(ValueError, match="--maps none"):
        overlay_row(scores.to_pylist()[0] | {"anomaly_map": None})


def test_pngs_in_bulk_share_one_scale_and_are_numbered_as_the_rows(scores: pa.Table, tmp_path: Path) -> None:
    written = write_overlays(scores, str(tmp_path / "pngs"))
    first, second = scores["image_uri"].to_pylist()
    assert [Path(written[uri]).name for uri in (first, second)] == ["00000-a.png", "00001-b_c.png"]
    drawn = [np.asarray(Image.open(written[uri]), dtype=int)[40, 60].sum() for uri in (first, second)]
    assert drawn[0] < drawn[1]
    alone = np.asarray(overlay_row(scores.to_pylist()[0]), dtype=int)[40, 60].sum()
    assert alone == drawn[1]


def test_rows_of_pandas_polars_and_duckdb_become_the_same_pictures(scores: pa.Table, tmp_path: Path) -> None:
    tables = [scores, scores.to_pandas(), pl.from_arrow(scores), duckdb.from_arrow(scores)]
    pictures = []
    for number, table in enumerate(tables):
        written = write_overlays(table, str(tmp_path / str(number)))
        pictures.append({uri: Path(file).read_bytes() for uri, file in written.items()})
    assert pictures == [pictures[0]] * 4
    assert len(pictures[0]) == 2


def test_an_image_that_is_gone_is_warned_about_and_the_others_are_written(
    scores: pa.Table, tmp_path: Path
) -> None:
    first, second = scores["image_uri"].to_pylist()
    Path(first).unlink()
    with pytest.warns(UserWarning, match="not_found"):
        assert list(write_overlays(scores, str(tmp_path / "pngs"))) == [second]


def test_the_examples_of_the_documentation_run_as_they_stand(
    scores: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "demo" / "scores" / "scores" / "model_id=m" / "date=2026-11-23"
    folder.mkdir(parents=True)
    pq.write_table(scores, folder / "part-0.parquet")
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "explore.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    for example in examples:
        exec(example, names)
    assert names["picture"].size == (64, 48)
    assert len(list((tmp_path / "worst").glob("*.png"))) == 2
