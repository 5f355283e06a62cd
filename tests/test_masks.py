"""Masks of regions for labelling tools: COCO as pycocotools reads it, and PNGs of the images' size."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from PIL import Image
from pycocotools.coco import COCO
from scored_output import NEW_MODEL, OLD_MODEL, write_output

from csflow.errors import ExitStatus, WrongUse
from csflow.evaluation.masks import MaskReader
from csflow.masks import MasksConfig, write_masks
from csflow.storage import Location, to_parquet

NIGHTS = range(13, 16)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_output(tmp_path_factory.mktemp("scored") / "out", NIGHTS)


def rows_of(output: Path, model_id: str) -> dict[str, dict[str, Any]]:
    """The rows with regions, by URI."""
    table = ds.dataset(output / "scores" / f"model_id={model_id}").to_table()
    return {row["image_uri"]: row for row in table.to_pylist() if row["regions"]}


def test_coco_holds_the_regions_of_every_image_and_pycocotools_reads_their_masks(output, tmp_path, capsys):
    config = MasksConfig(scores=str(output), output=str(tmp_path), model_id=OLD_MODEL)
    assert write_masks(config) == ExitStatus.DONE
    expected = rows_of(output, OLD_MODEL)
    assert f"{len(expected)} of 68 images have regions" in capsys.readouterr().out
    coco = COCO(tmp_path / "coco.json")
    images = {image["coco_url"]: image for image in coco.dataset["images"]}
    assert images.keys() == expected.keys()
    assert all(uri == f"s3://plant/images/{image['file_name']}" for uri, image in images.items())
    for uri, image in images.items():
        annotations = coco.loadAnns(coco.getAnnIds([image["id"]]))
        for region, annotation in zip(expected[uri]["regions"], annotations, strict=True):
            mask = coco.annToMask(annotation)
            assert mask.shape == (480, 640)
            # Cells are whole pixels here.
            assert mask.sum() == annotation["area"] == region["area"]
            rows, columns = np.nonzero(mask)
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert box == annotation["bbox"] == [region[name] for name in ("x", "y", "width", "height")]
            assert annotation["p_value"] == region["p_value"]
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == ["defect"]


def test_png_masks_have_the_size_of_the_image_and_mark_its_regions(output, tmp_path):
    config = MasksConfig(scores=str(output), output=str(tmp_path), model_id=NEW_MODEL, format="png")
    write_masks(config)
    expected = rows_of(output, NEW_MODEL)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    named = {f"{uri.removeprefix('s3://plant/images/')[:-4]}_mask.png": row for uri, row in expected.items()}
    assert files == sorted(named)
    for name, row in named.items():
        mask = MaskReader({}).read(str(tmp_path / name)).is_defective_HW
        assert mask.shape == (480, 640)
        assert mask.sum() == sum(region["area"] for region in row["regions"])


def write_one(folder: Path, row: dict[str, Any], schema: pa.Schema, **changes: Any) -> Path:
    """An output with one image of one night."""
    path = folder / "scores" / f"model_id={OLD_MODEL}" / "date=2026-11-15" / "part-1.parquet"
    Location(str(path)).write(to_parquet(pa.Table.from_pylist([row | changes], schema)))
    return folder


def test_only_the_wanted_run_and_the_latest_score_of_an_image_count(output, tmp_path):
    shutil.copytree(output, tmp_path / "out")
    schema = ds.dataset(output / "scores").schema
    row = next(iter(rows_of(output, OLD_MODEL).values()))
    write_one(tmp_path / "out", row, schema, scored_at=row["scored_at"].replace(year=2030), regions=[])
    settings = {"scores": str(tmp_path / "out"), "model_id": OLD_MODEL}
    write_masks(MasksConfig(output=str(tmp_path / "all"), **settings))
    images = {image["coco_url"] for image in COCO(tmp_path / "all" / "coco.json").dataset["images"]}
    assert images == rows_of(output, OLD_MODEL).keys() - {row["image_uri"]}
    write_masks(MasksConfig(output=str(tmp_path / "last"), run_id="latest", **settings))
    images = {image["coco_url"] for image in COCO(tmp_path / "last" / "coco.json").dataset["images"]}
    assert images
    assert all("2026-11-17" in uri for uri in images)
    with pytest.raises(WrongUse, match="--run_id never scored no image"):
        write_masks(MasksConfig(output=str(tmp_path / "no"), run_id="never", **settings))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"region_threshold": None, "regions": None}, "holds no regions: .* score anew"),
        ({"anomaly_map": None}, "was scored without an anomaly map, .* --maps native"),
    ],
)
def test_scores_without_regions_or_maps_are_wrong_use(output, tmp_path, changes, said):
    schema = ds.dataset(output / "scores").schema
    row = next(iter(rows_of(output, OLD_MODEL).values()))
    one = write_one(tmp_path / "one", row, schema, **changes)
    with pytest.raises(WrongUse, match=said):
        write_masks(MasksConfig(scores=str(one), output=str(tmp_path / "masks")))


def test_images_that_differ_in_their_suffix_alone_have_masks_of_their_own(output, tmp_path):
    schema = ds.dataset(output / "scores").schema
    row = next(iter(rows_of(output, OLD_MODEL).values()))
    path = tmp_path / "out" / "scores" / f"model_id={OLD_MODEL}" / "date=2026-11-15" / "part-1.parquet"
    uris = ["/plant/a.png", "/plant/a.jpg", "/plant/b.tar!/in/c.png", "/plant/d.parquet#3"]
    table = pa.Table.from_pylist([row | {"image_uri": uri} for uri in uris], schema)
    Location(str(path)).write(to_parquet(table))
    write_masks(MasksConfig(scores=str(tmp_path / "out"), output=str(tmp_path / "masks"), format="png"))
    found = {path.relative_to(tmp_path / "masks").as_posix() for path in (tmp_path / "masks").rglob("*.png")}
    assert found == {"a.png_mask.png", "a.jpg_mask.png", "b.tar/in/c_mask.png", "d_mask.png"}
    with Image.open(tmp_path / "masks" / "d_mask.png") as mask:
        assert (mask.mode, mask.size) == ("L", (640, 480))
