"""The training job: on real photographs and weights, under Ray Train."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, SMALL_MODEL, copy_some, wait_for

from csflow.config import parse
from csflow.errors import ExitStatus
from csflow.images import decode
from csflow.inputs.listing import list_images
from csflow.model_directory import load_model
from csflow.storage import Location
from csflow.training.config import TrainConfig
from csflow.training.job import split_images, train
from csflow.training.loop import epoch_batches


def configure(*arguments: object) -> TrainConfig:
    return parse(TrainConfig, None, [*SMALL_MODEL, *map(str, arguments)])


def history(model: Path) -> list[dict[str, float]]:
    return json.loads((model / "metrics.json").read_text())["history"]


def test_the_job_shows_its_progress_and_says_what_it_wrote(trained):
    folder, job = trained
    assert job.returncode == 0, job.stderr
    assert "48 images listed, 10 of them held out for calibration" in job.stdout
    assert "features: 48 images extracted" in job.stdout
    assert "epoch 2/2  loss " in job.stdout
    assert "held-out" in job.stdout
    assert "images/s" in job.stdout
    assert "s left" in job.stdout
    model_id = json.loads((folder / "config.json").read_text())["model_id"]
    assert f"model {model_id} written to {folder}" in job.stdout


def test_the_model_directory_is_complete_and_free_of_pickles(model):
    names = {path.name for path in model.iterdir() if path.is_file()}
    assert names == {
        "model.safetensors", "config.json", "calibration.parquet", "metrics.json", "README.md", "curves.svg",
    }  # fmt: skip
    config = json.loads((model / "config.json").read_text())
    assert config["architecture"]["backbone"] == "tf_efficientnet_lite0"
    assert config["architecture"]["image_size"] == [128, 128]
    assert config["data"]["training_images"] == 38
    assert "pillow" in config["libraries"]
    assert "curves.svg" in (model / "README.md").read_text()
    assert all(path.suffix not in (".pt", ".pth", ".pkl") for path in model.rglob("*"))


def test_training_lowers_the_loss(model):
    losses = [line["loss"] for line in history(model)]
    assert losses[-1] < losses[0]


def test_calibration_scores_are_what_the_detector_gives_for_the_held_out_photographs(model):
    calibration = pq.read_table(model / "calibration.parquet")
    assert calibration.num_rows == 10
    detector = load_model(Location(str(model))).detector
    pixels = [
        decode(Path(uri).read_bytes(), (128, 128)).pixels_HWC for uri in calibration["image_uri"].to_pylist()
    ]
    scores = detector(torch.from_numpy(np.stack(pixels))).anomaly_score_B
    np.testing.assert_allclose(calibration["anomaly_score"], scores, rtol=1e-5)


def test_two_workers_give_the_loss_curve_of_one_and_reuse_its_features(
    trained, model, good_cells, tmp_path, capfd
):
    arguments = ["--input", good_cells, "--output", tmp_path / "two", "--workers", 2]
    # A batch of 16 leaves a last one of 6: shares of unequal weight are part of the claim.
    assert train(configure(*arguments, "--work_dir", model / "_work")) == ExitStatus.DONE
    assert "features: 0 images extracted" in capfd.readouterr().out
    for one, two in zip(history(model), history(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["heldout_loss"] == pytest.approx(one["heldout_loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


def test_an_unreadable_image_is_left_out_and_named(ray_cluster, good_cells, tmp_path, capfd):
    images = copy_some(good_cells, tmp_path / "images", 12)
    (images / "broken.png").write_bytes(next(images.iterdir()).read_bytes()[:5000])
    assert train(configure("--input", images, "--output", tmp_path / "model")) == ExitStatus.DONE
    assert f"left out: {images / 'broken.png'}: truncated" in capfd.readouterr().out
    assert json.loads((tmp_path / "model" / "config.json").read_text())["data"]["unreadable_images"] == 1


def test_an_image_keeps_its_side_of_the_split_as_images_are_added(cells):
    images = pa.Table.from_batches(list_images([str(cells / "functional" / "test")], {}))
    small = split_images(images.slice(0, 90), holdout=0.2, seed=0)
    large = split_images(images.slice(0, 100), holdout=0.2, seed=0)
    heldout_small = {uri for shard in small.heldout for uri in shard.image_uris}
    heldout_large = {uri for shard in large.heldout for uri in shard.image_uris}
    assert len(heldout_small) == 18
    assert len(heldout_large) == 20
    assert len(heldout_small & heldout_large) >= 15


def test_every_epoch_sees_every_image_once_in_an_order_of_its_own():
    orders = [torch.cat(list(epoch_batches(50, 16, seed=0, epoch=epoch))) for epoch in (1, 2)]
    assert all(sorted(order.tolist()) == list(range(50)) for order in orders)
    assert orders[0].tolist() != orders[1].tolist()
    assert torch.equal(orders[0], torch.cat(list(epoch_batches(50, 16, seed=0, epoch=1))))


@pytest.mark.soak
def test_a_killed_training_resumes_to_the_weights_of_an_unbroken_one(model, good_cells, tmp_path, capfd):
    arguments = ["--input", good_cells, *SMALL_MODEL, "--epochs", 30, "--checkpoint_epochs", 1]
    arguments += ["--work_dir", tmp_path / "work"]
    broken = [*map(str, arguments), "--output", str(tmp_path / "broken")]
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), *broken]
    process = subprocess.Popen(command, start_new_session=True, cwd=ROOT, text=True)
    # Ray Train writes down which checkpoints count some time after they are stored.
    noted = "training/*/checkpoint_manager_snapshot.json"
    wait_for(lambda: any("checkpoint_2" in p.read_text() for p in (tmp_path / "work").glob(noted)), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "broken" / "config.json").exists()
    capfd.readouterr()

    assert train(parse(TrainConfig, None, [*broken, "--resume"])) == ExitStatus.DONE
    first = re.search(r"epoch (\d+)/30", capfd.readouterr().out)
    assert first is not None
    assert int(first[1]) > 1
    whole = [*map(str, arguments), "--output", str(tmp_path / "whole"), "--work_dir", str(tmp_path / "work2")]
    assert train(parse(TrainConfig, None, whole)) == ExitStatus.DONE
    broken_flow, whole_flow = (
        load_model(Location(str(tmp_path / name))).detector.flow.state_dict() for name in ("broken", "whole")
    )
    for name, value in whole_flow.items():
        torch.testing.assert_close(broken_flow[name], value, rtol=1e-5, atol=1e-6)
    assert len(history(tmp_path / "broken")) == 30
