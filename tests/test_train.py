"""The training job: on real photographs and weights, under Ray Train."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, SMALL_MODEL, copy_some, wait_for
from PIL import Image
from ray.util.state import list_actors
from tensorboardX.proto import event_pb2

from csflow.cluster import ONE_CPU, WorkerResources, run_task
from csflow.config import parse
from csflow.errors import ExitStatus, Failed, WrongUse
from csflow.images import decode
from csflow.inputs.listing import list_table
from csflow.model_directory import load_model
from csflow.preprocessing import Preprocessing
from csflow.storage import Location
from csflow.training.cache import FeatureCache
from csflow.training.config import TrainConfig
from csflow.training.job import build_detector, train
from csflow.training.resumption import check_replacement


def configure(*arguments: object) -> TrainConfig:
    return parse(TrainConfig, None, [*SMALL_MODEL, *map(str, arguments)])


def test_a_task_computes_with_its_own_number_of_threads_whatever_its_process_did_before(ray_cluster):
    resources = [WorkerResources(workers=1, cpus=2, gpus=0), ONE_CPU] * 2
    assert [run_task(lambda device: torch.get_num_threads(), resources=its_own) for its_own in resources] == [
        2,
        1,
        2,
        1,
    ]


def history(model: Path) -> list[dict[str, float]]:
    return json.loads((model / "metrics.json").read_text())["history"]


def test_the_job_shows_its_progress_and_says_what_it_wrote(trained):
    folder, job = trained
    assert job.returncode == 0, job.stderr
    assert "48 images listed" in job.stdout
    assert "features: 48 images extracted" in job.stdout
    assert "33 images to train on, 5 to choose the epoch, 10 held out for calibration" in job.stdout
    assert "epoch 2/2  loss " in job.stdout
    assert "validation" in job.stdout
    assert "images/s" in job.stdout
    assert "s left" in job.stdout
    model_id = json.loads((folder / "config.json").read_text())["model_id"]
    assert f"model {model_id} written to {folder}" in job.stdout
    described = "48 images of 300 × 300 → 128 × 128 pixels; a map cell is 19 × 19 pixels of the original\n"
    assert described in job.stdout
    few = (
        "10 images are held out, so the smallest p-value is 0.091, and --false_positive_rate 0.01 can flag no"
    )
    # Before the work, and at its end beside the model, whose card keeps it.
    assert job.stdout.count(few) == 2
    assert few in (folder / "README.md").read_text()


def test_the_model_directory_is_complete_and_free_of_pickles(model):
    names = {path.name for path in model.iterdir() if path.is_file()}
    assert names == {
        "model.safetensors", "config.json", "calibration.parquet", "metrics.json",
        "README.md", "curves.svg", "calibration.svg", "outliers.csv",
    }  # fmt: skip
    config = json.loads((model / "config.json").read_text())
    assert config["architecture"]["backbone"] == "tf_efficientnet_lite0"
    assert config["architecture"]["image_size"] == [128, 128]
    assert config["data"]["training_images"] == 33
    assert "pillow" in config["libraries"]
    card = (model / "README.md").read_text()
    assert "curves.svg" in card
    assert "calibration.svg" in card
    assert config["data"]["fingerprint"] in card
    assert all(path.suffix not in (".pt", ".pth", ".pkl") for path in model.rglob("*"))


def test_training_lowers_the_loss_at_the_rate_that_it_is_told(model):
    lines = history(model)
    for name in ("loss", "validation_loss"):
        assert lines[1][name] < lines[0][name]
    # A flow begins with every γ at 0, and Adam moves by the learning rate a step: six, along half a cosine.
    total = 1e-3 * sum((1 + math.cos(math.pi * step / 6)) / 2 for step in range(6))
    state = load_model(Location(str(model))).detector.flow.state_dict()
    gammas = torch.cat([value for name, value in state.items() if name.endswith("gamma_S")])
    assert gammas.all()
    assert total / 2 < gammas.abs().max() < 1.2 * total


def test_calibration_scores_are_what_the_detector_gives_for_the_held_out_photographs(model):
    calibration = pq.read_table(model / "calibration.parquet")
    assert calibration.num_rows == 10
    detector = load_model(Location(str(model))).detector
    assert detector.architecture.preprocessing == Preprocessing((128, 128), "stretch", "bicubic")
    pixels = [
        decode(Path(uri).read_bytes(), detector.architecture.preprocessing).pixels_HWC
        for uri in calibration["image_uri"].to_pylist()
    ]
    scores = detector(torch.from_numpy(np.stack(pixels))).anomaly_score_B
    np.testing.assert_allclose(calibration["anomaly_score"], scores, rtol=2e-4)


def test_few_images_are_all_trained_on_and_held_out_in_turn(model, good_cells, ray_cluster, tmp_path, capfd):
    arguments = ["--input", good_cells, "--output", tmp_path / "model", "--work_dir", model / "_work"]
    assert train(configure(*arguments, "--calibration", "auto")) == ExitStatus.DONE
    printed = capfd.readouterr().out
    assert (
        "--calibration cross: the model is trained on all 48 images, and each is held out in turn" in printed
    )
    assert "48 images to train on, each held out in turn for calibration, from one of 5 further" in printed
    assert "held out fold 5/5" in printed
    assert "48 images are held out, so the smallest p-value is 0.021" in printed
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    counts = {
        name: config["data"][name] for name in ("training_images", "heldout_images", "calibration_folds")
    }
    assert counts == {"training_images": 48, "heldout_images": 48, "calibration_folds": 5}
    assert config["training"]["calibration"] == "cross"
    calibration = pq.read_table(tmp_path / "model" / "calibration.parquet")
    uris = calibration["image_uri"].to_pylist()
    assert sorted(Path(uri).name for uri in uris) == sorted(path.name for path in good_cells.iterdir())
    # The model has seen these images, and the trainings that scored them have not.
    detector = load_model(Location(str(tmp_path / "model"))).detector
    pixels = [decode(Path(uri).read_bytes(), detector.architecture.preprocessing).pixels_HWC for uri in uris]
    own = detector(torch.from_numpy(np.stack(pixels))).anomaly_score_B.double().numpy()
    assert (own < calibration["anomaly_score"].to_numpy()).mean() > 0.8
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| held-out images (calibration) | 48, each in turn from one of 5 further trainings |" in card
    assert "| held-out loss of the Gaussian of each position |" in card


def test_two_workers_give_the_loss_curve_of_one_and_reuse_its_features(
    trained, model, good_cells, tmp_path, capfd
):
    files = sorted((model / "_work" / "features").rglob("*"))
    arguments = ["--input", good_cells, "--output", tmp_path / "two", "--workers", 2]
    # A batch of 16 leaves a last one of 1: an empty share is part of the claim.
    assert train(configure(*arguments, "--work_dir", model / "_work")) == ExitStatus.DONE
    assert "features: 0 images extracted in 0 s, 48 in the cache" in capfd.readouterr().out
    assert sorted((model / "_work" / "features").rglob("*")) == files
    for one, two in zip(history(model), history(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    one, two = (pq.read_table(folder / "calibration.parquet") for folder in (model, tmp_path / "two"))
    assert two["image_uri"] == one["image_uri"]
    for name in ("anomaly_score", "global_score", "local_score", "map_maximum"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-3)
    for levels, of_two, maximum in zip(
        *(one["region_levels"].to_pylist(), two["region_levels"].to_pylist()),
        one["map_maximum"].to_pylist(),
        strict=True,
    ):
        assert (levels[0], sorted(levels, reverse=True)) == (maximum, levels)
        np.testing.assert_allclose(of_two, levels, rtol=1e-3)


def test_resuming_replaces_a_model_that_is_its_own_or_for_which_there_is_a_checkpoint(
    model, good_cells, tmp_path
):
    images = list_table([str(good_cells)], {})

    def check(config: TrainConfig, output: Path, work: Path) -> None:
        detector, work_dir = build_detector(config), Location(str(work))
        cache = FeatureCache.of(work_dir / "features", detector)
        check_replacement(Location(str(output)), config, detector, images, cache, work_dir)

    arguments = ["--input", good_cells, "--output", model, "--resume"]
    check(configure(*arguments), model, tmp_path / "no_work")
    for other in (["--seed", 17], ["--learning_rate", 0.1], ["--holdout", 0.3], ["--trim", 0.1]):
        with pytest.raises(WrongUse, match="the model of another training"):
            check(configure(*arguments, *other), model, model / "_work")
    another = tmp_path / "another"
    another.mkdir()
    stored = json.loads((model / "config.json").read_text())
    (another / "config.json").write_text(json.dumps(stored | {"training": {"imported_from": "anomalib"}}))
    check(configure(*arguments), another, model / "_work")
    with pytest.raises(WrongUse, match="no checkpoint of this one"):
        check(configure(*arguments), another, tmp_path / "no_work")


def test_a_training_that_diverges_fails_at_once_in_one_line_with_the_remedy(
    model, good_cells, tmp_path, capfd
):
    arguments = ["--input", good_cells, "--output", tmp_path / "model", "--work_dir", model / "_work"]
    with pytest.raises(
        Failed, match=r"training failed: the .* became .* lower --learning_rate, which is"
    ) as e:
        train(configure(*arguments, "--learning_rate", "1e30"))
    assert "\n" not in str(e.value)
    printed = capfd.readouterr()
    assert "Traceback" not in printed.out + printed.err
    assert not (tmp_path / "model" / "config.json").exists()


@pytest.mark.soak
def test_training_starts_with_the_workers_that_have_room(model, good_cells, tmp_path):
    arguments = ["--input", good_cells, "--output", tmp_path / "elastic", "--work_dir", model / "_work"]
    # The cluster has room for two.
    assert train(configure(*arguments, "--workers", 4, "--min_workers", 1)) == ExitStatus.DONE
    for one, some in zip(history(model), history(tmp_path / "elastic"), strict=True):
        assert some["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert some["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-4)


@pytest.mark.soak
def test_an_unreadable_image_is_left_out_and_named(ray_cluster, good_cells, tmp_path, capfd):
    images = copy_some(good_cells, tmp_path / "images", 12)
    (images / "broken.png").write_bytes(next(images.iterdir()).read_bytes()[:5000])
    assert train(configure("--input", images, "--output", tmp_path / "model")) == ExitStatus.DONE
    assert f"left out: {images / 'broken.png'}: truncated" in capfd.readouterr().out
    assert json.loads((tmp_path / "model" / "config.json").read_text())["data"]["unreadable_images"] == 1


def test_where_no_image_can_be_read_some_are_named_and_the_input_is_to_blame(ray_cluster, tmp_path, capfd):
    for number in range(12):
        (tmp_path / f"{number:02}.png").write_bytes(b"no image")
    with pytest.raises(WrongUse, match="--input: none of the 12 images can be read; see why above"):
        train(configure("--input", tmp_path, "--output", tmp_path / "model"))
    named = [line for line in capfd.readouterr().out.splitlines() if line.startswith("left out: ")]
    assert len(named) == 11
    assert named[0].startswith(f"left out: {tmp_path / '00.png'}: unsupported_format")
    assert named[-1] == "left out: 2 more, 12 in all"


@pytest.mark.soak
def test_excluded_images_take_no_part_and_leave_the_fingerprint_of_an_input_without_them(
    model, good_cells, tmp_path, capfd
):
    bad, *good = sorted(good_cells.iterdir())
    (tmp_path / "bad.csv").write_text(f"image_uri\n{bad}\n")
    (tmp_path / "good.csv").write_text("image_uri\n" + "".join(f"{path}\n" for path in good))
    arguments = ["--work_dir", model / "_work", "--epochs", 1]
    some = ["--input", good_cells, "--exclude", tmp_path / "bad.csv", "--output", tmp_path / "some"]
    assert train(configure(*some, *arguments)) == ExitStatus.DONE
    printed = capfd.readouterr().out
    assert "48 images listed\n1 images left out by --exclude" in printed
    assert "features: 0 images extracted in 0 s, 47 in the cache" in printed
    rest = ["--input", tmp_path / "good.csv", "--output", tmp_path / "rest"]
    assert train(configure(*rest, *arguments)) == ExitStatus.DONE
    some_config, rest_config = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("some", "rest")
    )
    assert some_config["data"] == rest_config["data"]
    assert some_config["training"]["exclude"] == [str(tmp_path / "bad.csv")]


def test_excluding_all_images_is_wrong_use(good_cells, tmp_path):
    with pytest.raises(WrongUse, match="--exclude leaves none of the 48 images of --input"):
        train(configure("--input", good_cells, "--output", tmp_path / "model", "--exclude", "*/none/*", "*"))


@pytest.mark.soak
def test_images_that_are_stretched_are_told_of_until_they_are_letterboxed(
    ray_cluster, good_cells, tmp_path, capfd
):
    (tmp_path / "images").mkdir()
    for path in sorted(good_cells.iterdir())[:12]:
        Image.open(path).crop((0, 0, 300, 120)).save(tmp_path / "images" / path.name)
    arguments = ["--input", tmp_path / "images", "--work_dir", tmp_path / "work", "--epochs", 1]
    warning = (
        "warning: 12 of 12 images are stretched by more than 1.5 to become 128 x 128 pixels (median 2.50)"
    )
    assert train(configure(*arguments, "--output", tmp_path / "stretched")) == ExitStatus.DONE
    assert warning in capfd.readouterr().out
    assert (
        train(configure(*arguments, "--output", tmp_path / "boxed", "--fit", "letterbox")) == ExitStatus.DONE
    )
    printed = capfd.readouterr().out
    assert "features: 12 images extracted" in printed
    assert "images are stretched" not in printed
    detector = load_model(Location(str(tmp_path / "boxed"))).detector
    assert detector.architecture.preprocessing == Preprocessing((128, 128), "letterbox", "bicubic")
    calibration = pq.read_table(tmp_path / "boxed" / "calibration.parquet")
    pixels = [
        decode(Path(uri).read_bytes(), detector.architecture.preprocessing).pixels_HWC
        for uri in calibration["image_uri"].to_pylist()
    ]
    scores = detector(torch.from_numpy(np.stack(pixels))).anomaly_score_B
    np.testing.assert_allclose(calibration["anomaly_score"], scores, rtol=2e-4)


def tensorboard_curves(file: Path) -> dict[str, dict[int, float]]:
    """The scalars of an event file, by name and epoch. Records stand between their length and a checksum."""
    curves: dict[str, dict[int, float]] = {}
    with file.open("rb") as records:
        while head := records.read(12):
            event = event_pb2.Event.FromString(records.read(int.from_bytes(head[:8], "little")))
            records.read(4)
            for value in event.summary.value:
                curves.setdefault(value.tag, {})[event.step] = value.simple_value
    return curves


def test_tensorboard_has_the_curves(model):
    expected = {
        name: {line["epoch"]: float(np.float32(line[name])) for line in history(model)}
        for name in ("loss", "validation_loss", "grad_norm", "images_per_second")
    }
    # Other trainings may have used this model's working folder since; each writes a file of its own.
    files = list((model / "_work" / "tensorboard").rglob("events.*"))
    assert expected in [tensorboard_curves(file) for file in files]


@pytest.mark.soak
@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_killed_training_resumes_to_the_weights_of_an_unbroken_one(
    model, good_cells, tmp_path, s3_bucket, capfd, where
):
    work = f"{s3_bucket}/work" if where == "s3" else str(tmp_path / "work")
    arguments = ["--input", good_cells, *SMALL_MODEL, "--epochs", 30, "--patience", 30]
    arguments += ["--checkpoint_epochs", 1]
    broken = [*map(str, arguments), "--output", str(tmp_path / "broken"), "--work_dir", work]
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), *broken]
    process = subprocess.Popen(command, start_new_session=True, cwd=ROOT, text=True)
    wait_for(lambda: "checkpoint_2" in noted_checkpoints(Location(work)), process)
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


@pytest.mark.soak
def test_a_training_worker_killed_between_checkpoints_does_not_change_the_result(model, good_cells, tmp_path):
    arguments = ["--input", good_cells, *SMALL_MODEL, "--epochs", 40, "--patience", 40]
    arguments += ["--checkpoint_epochs", 5, "--work_dir", tmp_path / "work", "--overwrite"]
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), *map(str, arguments)]
    process = subprocess.Popen([*command, "--output", str(tmp_path / "killed")], cwd=ROOT, text=True)
    wait_for(lambda: "checkpoint_2" in noted_checkpoints(Location(str(tmp_path / "work"))), process)
    workers = list_actors(filters=[("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")])
    os.kill(workers[0].pid, signal.SIGKILL)
    assert process.wait() == ExitStatus.DONE
    assert train(parse(TrainConfig, None, [*map(str, arguments), "--output", str(tmp_path / "whole")])) == 0
    killed, whole = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("killed", "whole")
    )
    assert killed["heldout_loss"] == pytest.approx(whole["heldout_loss"], rel=1e-4)
    assert len(killed["history"]) == 40


def noted_checkpoints(work: Location) -> str:
    """What Ray Train has written down of checkpoints, some time after they were stored."""
    noted = [found.read().decode() for found in work.find("checkpoint_manager_snapshot.json")]
    return "".join(noted)
