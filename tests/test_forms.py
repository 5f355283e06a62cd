"""Compiled forms are kept in the user's cache folder: they spare time, and change nothing."""

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from csflow import forms
from csflow.forms import Forms
from csflow.model import Architecture, CpuBackbone, Detector, Scores
from csflow.model_directory import CALIBRATION, ROUNDING, ModelFiles, read_model, save_model
from csflow.precision import PrecisionSetting
from csflow.storage import Location

CPU = torch.device("cpu")


def saved(folder: Path, backbone: str = "resnet10t", scales: int = 1) -> ModelFiles:
    """A model of small images, with random weights."""
    torch.manual_seed(0)
    architecture = Architecture(backbone, (64, 64), scales=scales, hidden_channels=4, kernel_sizes=(3,))
    detector = Detector(architecture)
    for block in detector.flow.blocks:
        torch.nn.init.uniform_(block.subnetwork_first.gamma_S, 0.2, 1.0)
    if detector.backbone.is_chain:
        detector.measure_rounding(images()[:1])
    rows = [{"image_uri": f"{i}.png", "image_version": "1", "anomaly_score": 0.5 + i} for i in range(2)]
    calibration = pa.Table.from_pylist(rows, schema=CALIBRATION)
    location = Location(str(folder))
    save_model(location, detector, calibration, training={}, data={}, metrics={}, card={})
    return read_model(location)


def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def efficientnet(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return saved(tmp_path_factory.mktemp("efficientnet"), "tf_efficientnet_lite0", scales=2)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of forms of a user who has none yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "csflow" / "forms"


def scores(model: ModelFiles, precision: PrecisionSetting = "float32", batch_size: int = 4) -> Scores:
    return Forms(model, precision, CPU).form(batch_size)(images())


def assert_equal(actual: Scores, expected: Scores) -> None:
    # Without whitening there is no local score.
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("precision", ["float32", "mixed", "bfloat16"])
def test_a_kept_form_gives_the_scores_of_a_new_one_bit_for_bit(efficientnet, folder, precision, monkeypatch):
    new = scores(efficientnet, precision)
    (kept,) = folder.iterdir()
    monkeypatch.setattr(ModelFiles, "detector", None)  # none is built
    assert_equal(scores(efficientnet, precision), new)
    assert list(folder.iterdir()) == [kept]
    assert folder.stat().st_mode & 0o777 == 0o700 and kept.stat().st_mode & 0o777 == 0o600


def test_the_form_of_a_vision_transformer_is_kept_too(tmp_path, folder):
    model = saved(tmp_path / "model", "vit_tiny_patch16_224")
    new = scores(model)
    assert len(list(folder.iterdir())) == 1
    assert_equal(scores(model), new)


def test_a_process_with_a_kept_form_imports_no_timm_and_no_compiler(model, folder):
    scores(model, "auto")
    program = (
        "import sys, torch; from csflow.forms import Forms; from csflow.model_directory import read_model\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        f"form = Forms(read_model({str(model.location)!r}), 'auto', torch.device('cpu')).form(4)\n"
        "form(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))\n"
        "print([name for name in ('timm', 'torchvision', 'torch._dynamo') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n" and len(list(folder.iterdir())) == 1


def test_other_models_precisions_batches_and_threads_have_other_forms(model, folder, tmp_path):
    other = saved(tmp_path / "model", scales=2)
    threads = torch.get_num_threads()
    scores(model), scores(other), scores(model, "bfloat16"), scores(model, batch_size=3)
    try:
        torch.set_num_threads(threads + 1)
        scores(model)
    finally:
        torch.set_num_threads(threads)
    assert len(list(folder.iterdir())) == 5


def retrained(model: ModelFiles) -> ModelFiles:
    """A model with the same backbone and another flow, whose rounding was measured on other images."""
    return replace(
        model,
        model_id="f" * 16,
        state={
            name: value + 0.1 if name.startswith(("flow.", ROUNDING)) and value.dtype.kind == "f" else value
            for name, value in model.state.items()
        },
    )


def test_models_with_a_common_backbone_share_it_compiled(efficientnet, folder, monkeypatch):
    other = retrained(efficientnet)
    expected = scores(other)
    for file in folder.iterdir():
        file.unlink()
    backbones: dict[str, CpuBackbone] = {}
    first, second = (Forms(one, "float32", CPU, backbones).form(4) for one in (efficientnet, other))
    assert first.backbone is second.backbone
    assert len(list(folder.iterdir())) == len(backbones) == 1
    assert_equal(second(images()), expected)
    assert not torch.equal(first(images()).anomaly_score_B, expected.anomaly_score_B)
    monkeypatch.setattr(ModelFiles, "detector", None)  # another process compiles nothing for either
    assert_equal(scores(other), expected)


def test_a_backbone_whose_rounding_is_corrected_is_that_of_one_model(efficientnet, folder):
    backbones: dict[str, CpuBackbone] = {}
    models = efficientnet, retrained(efficientnet)
    first, second = (Forms(one, "bfloat16", CPU, backbones).form(4) for one in models)
    assert first.backbone is not second.backbone
    assert len(list(folder.iterdir())) == 2


def test_a_form_of_other_code_is_not_used(model, folder, monkeypatch):
    scores(model)
    monkeypatch.setattr(forms, "_code", lambda: "other")
    scores(model)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut off", "a changed byte", "another file"])
def test_a_damaged_form_is_made_again_and_named_in_one_line(model, folder, damage, caplog):
    new = scores(model)
    (kept,) = folder.iterdir()
    whole = kept.read_bytes()
    middle = len(whole) // 2
    damaged = {
        "cut off": whole[:middle],
        "a changed byte": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "another file": b"no form",
    }
    kept.write_bytes(damaged[damage])
    with caplog.at_level(logging.WARNING, "csflow.forms"):
        assert_equal(scores(model), new)
    (record,) = caplog.records
    assert kept.name in record.message and "\n" not in record.message
    caplog.clear()
    assert_equal(scores(model), new)
    assert caplog.records == [] and list(folder.iterdir()) == [kept]


def test_a_folder_that_others_can_write_is_not_trusted(model, folder, caplog):
    folder.mkdir(parents=True)
    folder.chmod(0o770)
    scores(model)
    assert list(folder.iterdir()) == []
    (record,) = caplog.records
    assert str(folder) in record.message


def test_a_folder_is_no_link_to_one_elsewhere(model, folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    folder.parent.mkdir(parents=True)
    folder.symlink_to(elsewhere)
    scores(model)
    assert list(elsewhere.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_no_error(model, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    new = scores(model)
    assert_equal(scores(model), new)
    assert caplog.records == []


def test_a_disk_that_is_full_leaves_no_part_of_a_form(model, folder, monkeypatch, caplog):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    new = scores(model)
    assert list(folder.iterdir()) == []
    (record,) = caplog.records
    assert "No space left" in record.message
    monkeypatch.undo()
    assert_equal(scores(model), new)


def test_forms_that_were_not_used_for_longest_make_room(model, folder, monkeypatch):
    def kept() -> set[str]:
        return {path.name for path in folder.iterdir()}

    scores(model, batch_size=3)
    first = kept()
    scores(model, batch_size=4)
    second = kept() - first
    for age, path in enumerate(folder.iterdir()):
        os.utime(path, (age, age))
    scores(model, batch_size=3)  # is used now
    monkeypatch.setattr(forms, "MOST_BYTES", 2.5 * next(folder.iterdir()).stat().st_size)
    scores(model, batch_size=5)
    assert first < kept() and len(kept()) == 2 and not second & kept()
