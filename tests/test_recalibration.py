"""Recalibration: other held-out images, the same weights."""

import csv
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import copy_some

from csflow.config import parse
from csflow.errors import ExitStatus, WrongUse
from csflow.model_directory import load_model, read_config, read_model
from csflow.recalibration import RecalibrateConfig, recalibrate
from csflow.storage import Location


def run(*arguments: object) -> ExitStatus:
    return recalibrate(parse(RecalibrateConfig, None, list(map(str, arguments))))


def manifest_of_heldout(model: Path, file: Path) -> Path:
    with file.open("w", newline="") as out:
        rows = [[uri] for uri in pq.read_table(model / "calibration.parquet")["image_uri"].to_pylist()]
        csv.writer(out).writerows([["image_uri"], *rows])
    return file


def test_the_same_heldout_images_give_the_calibration_that_training_gave(model: Path, tmp_path: Path) -> None:
    same = manifest_of_heldout(model, tmp_path / "heldout.csv")
    assert run("--model", model, "--input", same, "--output", tmp_path / "again") == ExitStatus.DONE
    before, after = (pq.read_table(folder / "calibration.parquet") for folder in (model, tmp_path / "again"))
    assert after.select(["image_uri", "image_version"]).sort_by("image_uri") == before.select(
        ["image_uri", "image_version"]
    ).sort_by("image_uri")
    for name in ("anomaly_score", "global_score", "local_score", "map_maximum"):
        values = (table.sort_by("image_uri")[name].to_numpy() for table in (after, before))
        np.testing.assert_allclose(*values, rtol=0.01)


def test_other_images_give_other_p_values_and_the_same_scores(
    model: Path, cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = copy_some(cells / "functional" / "test", tmp_path / "good", 20)
    (good / "damaged.png").write_bytes(b"no image")
    output = tmp_path / "recent"
    assert run("--model", model, "--input", good, "--output", output) == ExitStatus.DONE
    old, new = (read_model(Location(str(folder))) for folder in (model, output))
    printed = capsys.readouterr().out
    assert f"model {new.model_id} written to {output}, with the weights of {old.model_id}" in printed
    assert f"{len(old.calibration.anomaly_score)} before, 20 now" in printed
    assert "damaged.png" in printed
    assert new.model_id != old.model_id
    assert new.state.keys() == old.state.keys()
    assert all(np.array_equal(new.state[name], old.state[name]) for name in old.state)
    assert new.architecture == old.architecture
    data = read_config(Location(str(output)))["data"]
    assert data == {"recalibrated_from": old.model_id, "calibration_images": 20, "unreadable_images": 1}
    card = (output / "README.md").read_text()
    assert f"those of model `{old.model_id}`" in card
    assert "| smallest possible p-value | 0.048 |" in card
    assert (output / "calibration.svg").exists()
    # It can be recalibrated itself.
    assert run("--model", output, "--input", good, "--output", tmp_path / "third") == ExitStatus.DONE
    assert load_model(Location(str(tmp_path / "third"))).model_id == new.model_id


def test_what_cannot_be_recalibrated_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "damaged.png").write_bytes(b"no image")
    with pytest.raises(WrongUse, match="--input: none of the images can be read"):
        run("--model", model, "--input", tmp_path / "bad", "--output", tmp_path / "new")
    with pytest.raises(WrongUse, match="already holds a model"):
        run("--model", model, "--input", tmp_path / "bad", "--output", model)
    with pytest.raises(WrongUse, match="does not exist"):
        run("--model", tmp_path / "none", "--input", tmp_path / "bad", "--output", tmp_path / "new")
    assert not (tmp_path / "new" / "config.json").exists()
