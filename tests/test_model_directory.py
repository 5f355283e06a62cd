"""The model directory: what is saved is what is loaded, under one id everywhere."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from csflow.errors import WrongUse
from csflow.model import Architecture, Detector
from csflow.model_directory import CALIBRATION, load_model, save_model
from csflow.preprocessing import Preprocessing
from csflow.storage import Location


@pytest.fixture(scope="module")
def detector() -> Detector:
    detector = Detector(
        Architecture("resnet10t", (64, 128), scales=2, hidden_channels=4, kernel_sizes=(3, 5))
    )
    for block in detector.flow.blocks:
        torch.nn.init.uniform_(block.subnetwork_first.gamma_S, 0.2, 1.0)
    return detector


def save(location: Location, detector: Detector, scores: tuple[float, ...] = (0.5, 1.5)) -> str:
    images = [f"{i}.png" for i in range(len(scores))]
    calibration = pa.table([images, images, list(scores)], schema=CALIBRATION)
    return save_model(location, detector, calibration, training={}, data={}, metrics={}, card={})


def test_a_loaded_model_scores_like_the_saved_one(detector, tmp_path):
    model_id = save(Location(str(tmp_path)), detector)
    model = load_model(Location(str(tmp_path)))
    assert model.model_id == model_id
    assert model.calibration_scores.tolist() == [0.5, 1.5]
    image_BHWC = torch.randint(0, 256, (2, 64, 128, 3), dtype=torch.uint8)
    torch.testing.assert_close(model.detector(image_BHWC), detector(image_BHWC), rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in model.detector.parameters())


def test_what_rounding_shifts_is_saved_with_the_model_and_decides_its_id(detector, tmp_path):
    before = save(Location(str(tmp_path / "before")), detector)
    measured = copy.deepcopy(detector)
    measured.measure_rounding(torch.randint(0, 256, (2, 64, 128, 3), dtype=torch.uint8))
    assert save(Location(str(tmp_path / "measured")), measured) != before
    assert load_model(Location(str(tmp_path / "before"))).detector.rounding_shifts == {}
    loaded = load_model(Location(str(tmp_path / "measured"))).detector.rounding_shifts
    torch.testing.assert_close(loaded, measured.rounding_shifts, rtol=0, atol=0)


def test_loading_needs_no_proof_of_the_cut(detector, tmp_path, monkeypatch):
    save(Location(str(tmp_path)), detector)
    monkeypatch.delattr("csflow.model.Backbone._prove")
    loaded = load_model(Location(str(tmp_path))).detector
    assert (loaded.backbone.channels, loaded.backbone.strides) == ((512,), (32,))
    assert loaded.feature_shapes == detector.feature_shapes


def test_several_stages_are_a_list_in_the_configuration_and_load_again(tmp_path):
    several = Detector(
        Architecture("resnet10t", (64, 64), ("layer2", "layer4", "layer3"), 1, 4, kernel_sizes=(3,))
    )
    model_id = save(Location(str(tmp_path)), several)
    config = json.loads((Path(tmp_path) / "config.json").read_text())
    assert config["architecture"]["cut_after"] == ["layer2", "layer3", "layer4"]
    model = load_model(Location(str(tmp_path)))
    assert model.model_id == model_id
    assert model.detector.feature_shapes == [(128, 8, 8), (256, 4, 4), (512, 2, 2)]
    image_BHWC = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    torch.testing.assert_close(model.detector(image_BHWC), several(image_BHWC), rtol=0, atol=0)


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_dinov3_qkvb", "swin_tiny_patch4_window7_224"])
def test_a_loaded_transformer_has_all_its_numbers(backbone, tmp_path):
    # Frequencies, masks and indices of theirs are in no state dict.
    detector = Detector(Architecture(backbone, (64, 64), None, 1, 4, kernel_sizes=(3,)))
    save(Location(str(tmp_path)), detector)
    image_BHWC = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    loaded = load_model(Location(str(tmp_path))).detector
    torch.testing.assert_close(loaded(image_BHWC), detector(image_BHWC), rtol=0, atol=0)


def test_one_stage_in_a_list_is_that_stage_alone():
    one = Architecture("resnet10t", (64, 64), ("layer4",))
    assert one.to_json()["cut_after"] == "layer4"
    assert Architecture.from_json(one.to_json() | {"cut_after": ["layer4"]}) == one


def test_the_id_is_the_same_wherever_the_model_lies(detector, tmp_path, s3_bucket):
    here = save(Location(str(tmp_path)), detector)
    there = save(Location(f"{s3_bucket}/model"), detector)
    assert here == there
    assert load_model(Location(f"{s3_bucket}/model")).model_id == here


def test_the_id_changes_with_whatever_decides_scores_and_p_values(detector, tmp_path):
    ids = [
        save(Location(str(tmp_path / "a")), detector),
        save(Location(str(tmp_path / "b")), detector, (0.5, 1.6)),
    ]
    other = Detector(detector.architecture)
    ids.append(save(Location(str(tmp_path / "c")), other))
    permutation = other.flow.blocks[0].get_buffer("permutation_0")
    permutation.copy_(permutation.flip(0))
    ids.append(save(Location(str(tmp_path / "d")), other))
    assert len(set(ids)) == 4


def test_a_model_of_another_decoding_is_refused(detector, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("csflow.model_directory.DECODING_VERSION", 99)
        save(Location(str(tmp_path)), detector)
    with pytest.raises(WrongUse, match="image decoding version 99"):
        load_model(Location(str(tmp_path)))


def test_a_model_that_does_not_say_how_images_fit_stretches_them_with_bilinear_weights(detector):
    values = detector.architecture.to_json()
    boxed = Architecture.from_json(values | {"fit": "letterbox", "interpolation": "bicubic"})
    assert boxed.preprocessing == Preprocessing((64, 128), "letterbox", "bicubic")
    del values["fit"], values["interpolation"]
    assert Architecture.from_json(values).preprocessing == Preprocessing((64, 128), "stretch", "bilinear")


def test_fit_and_filter_decide_the_id(detector, tmp_path):
    ids = set()
    for name, change in enumerate([{}, {"fit": "crop"}, {"interpolation": "bicubic"}]):
        changed = copy.deepcopy(detector)
        changed.architecture = replace(detector.architecture, **change)
        ids.add(save(Location(str(tmp_path / str(name))), changed))
        loaded = load_model(Location(str(tmp_path / str(name)))).detector
        assert loaded.architecture.preprocessing == changed.architecture.preprocessing
    assert len(ids) == 3


def test_the_configuration_says_how_the_model_was_made(detector, tmp_path):
    save(Location(str(tmp_path)), detector)
    config = json.loads((Path(tmp_path) / "config.json").read_text())
    assert config["architecture"]["cut_after"] == "layer4"
    assert config["feature_shapes"] == [[512, 2, 4], [512, 1, 2]]
    assert {"csflow", "torch", "timm", "pillow"} <= config["libraries"].keys()
