"""The model directory: what is saved is what is loaded, under one id everywhere."""

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

import csflow
from csflow.errors import WrongUse
from csflow.model import Architecture, Detector, InferenceDetector, Scores
from csflow.model_directory import (
    CALIBRATION,
    Calibration,
    find_calibration,
    holds_model,
    load_model,
    read_model,
    save_model,
)
from csflow.preprocessing import Preprocessing
from csflow.storage import Location, to_parquet


@pytest.fixture(scope="module")
def detector() -> Detector:
    detector = Detector(
        Architecture("resnet10t", (64, 128), scales=2, hidden_channels=4, kernel_sizes=(3, 5))
    )
    for block in detector.flow.blocks:
        torch.nn.init.uniform_(block.subnetwork_first.gamma_S, 0.2, 1.0)
    return detector


def save(location: Location, detector: Detector, scores: tuple[float, ...] = (0.5, 1.5)) -> str:
    rows = [
        {"image_uri": f"{i}.png", "image_version": "1", "anomaly_score": score}
        for i, score in enumerate(scores)
    ]
    calibration = pa.Table.from_pylist(rows, schema=CALIBRATION)
    return save_model(location, detector, calibration, training={}, data={}, metrics={}, card={})


def assert_same_scores(actual: Scores, expected: Scores) -> None:
    # Without whitening there is no local score.
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_a_loaded_model_scores_like_the_saved_one(detector, tmp_path):
    model_id = save(Location(str(tmp_path)), detector)
    model = load_model(Location(str(tmp_path)))
    assert model.model_id == model_id
    assert model.calibration.anomaly_score.tolist() == [0.5, 1.5]
    image_BHWC = torch.randint(0, 256, (2, 64, 128, 3), dtype=torch.uint8)
    assert_same_scores(model.detector(image_BHWC), detector(image_BHWC))
    assert not any(parameter.requires_grad for parameter in model.detector.parameters())


def test_a_model_is_loaded_by_its_path_and_shows_itself_in_one_line(detector, tmp_path):
    model_id = save(Location(str(tmp_path)), detector)
    model = load_model(str(tmp_path))
    assert repr(model) == f"Model(model_id={model_id!r}, name=None)"
    assert len(repr(read_model(str(tmp_path)))) < 1000


def test_the_name_of_a_model_is_stored_and_leaves_its_id_alone(detector, tmp_path):
    calibration = pa.Table.from_pylist([{"image_uri": "a", "image_version": "1", "anomaly_score": 1.0}])
    rest = {"training": {}, "data": {}, "metrics": {}, "card": {}}
    ids = {
        save_model(Location(str(tmp_path / f"{name}")), detector, calibration, name=name, **rest)
        for name in ("gear", "board", None)
    }
    assert len(ids) == 1
    assert [load_model(str(tmp_path / f"{name}")).name for name in ("gear", "None")] == ["gear", None]


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
    assert_same_scores(model.detector(image_BHWC), several(image_BHWC))


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_dinov3_qkvb", "swin_tiny_patch4_window7_224"])
def test_a_loaded_transformer_has_all_its_numbers(backbone, tmp_path):
    # Frequencies, masks and indices of theirs are in no state dict.
    detector = Detector(Architecture(backbone, (64, 64), None, 1, 4, kernel_sizes=(3,)))
    save(Location(str(tmp_path)), detector)
    image_BHWC = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    loaded = load_model(Location(str(tmp_path))).detector
    assert_same_scores(loaded(image_BHWC), detector(image_BHWC))


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
        patch.setattr(detector, "architecture", replace(detector.architecture, decoding_version=99))
        save(Location(str(tmp_path)), detector)
    with pytest.raises(WrongUse, match="image decoding version 99"):
        load_model(Location(str(tmp_path)))


def test_a_model_that_does_not_say_how_images_fit_stretches_them_with_bilinear_weights(detector):
    values = detector.architecture.to_json()
    boxed = Architecture.from_json(values | {"fit": "letterbox", "interpolation": "bicubic"})
    assert boxed.preprocessing == Preprocessing((64, 128), "letterbox", "bicubic")
    assert not {"fit", "interpolation"} & values.keys()
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


OLD_ID = "a7496426c11d922d"
OLD_SCORES = [0.70322073, 0.69164294]
OLD_SCALE_SCORES = [[0.69466716, 0.73743522], [0.69050813, 0.69618213]]
OLD_MAP_ROWS = [[1.3715672, 1.3912129, 1.3888613, 1.3922286], [1.3772322, 1.3923834, 1.3775630, 1.3735677]]
"""What csflow wrote and gave when version 2 was its newest format; of the map the first row."""


def write_version_2(folder: Path) -> None:
    architecture = {"backbone": "resnet10t", "image_size": [64, 128], "cut_after": "layer4", "scales": 2}
    architecture |= {"hidden_channels": 4, "kernel_sizes": [3, 5], "seed": 0}
    images = {"image_uri": ["a.png", "b.png"], "image_version": ["1", "2"], "anomaly_score": [0.5, 1.5]}
    shapes = [[512, 2, 4], [512, 1, 2]]
    write_old_model(
        folder, 2, OLD_ID, architecture, {"fit": "letterbox", "interpolation": "bilinear"}, shapes, images
    )


WHITENED_ID = "f364b52cdee433b2"
WHITENED_SCORES = [11.495262, 10.032226]
WHITENED_LOCAL_SCORES = [7.1999779, 6.4714622]
WHITENED_SCALE_SCORES = [[0.70985931, 0.86016488], [0.69556028, 0.75706029]]
"""The same for version 3."""


def write_version_3(folder: Path) -> None:
    architecture = {"backbone": "resnet10t", "image_size": [64, 128], "cut_after": ["layer3", "layer4"]}
    architecture |= {"scales": 1, "hidden_channels": 4, "kernel_sizes": [3], "seed": 0, "whitening": True}
    images = {"image_uri": ["a.png"], "image_version": ["1"], "anomaly_score": [0.5]}
    images |= {"global_score": [0.7], "local_score": [0.6], "map_maximum": [2.0]}
    write_old_model(folder, 3, WHITENED_ID, architecture, {"fit": "crop"}, [[256, 4, 8], [512, 2, 4]], images)


def write_old_model(
    folder: Path,
    version: int,
    model_id: str,
    architecture: dict[str, Any],
    preprocessing: dict[str, Any],
    feature_shapes: list[list[int]],
    calibration: dict[str, list[Any]],
) -> None:
    """A model directory of an older version, with numbers that need no random generator."""
    detector = Detector(Architecture.from_json(architecture))
    state = {
        name: plain_numbers(name, value)
        for name, value in detector.state_dict().items()
        if not name.startswith("statistic.fine_")  # since version 4
    }
    safetensors.torch.save_file(state, folder / "model.safetensors")
    pq.write_table(pa.table(calibration), folder / "calibration.parquet")
    config = {
        "format_version": version,
        "model_id": model_id,
        "architecture": architecture | preprocessing,
        "preprocessing": {"decoding_version": 1, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        "feature_shapes": feature_shapes,
        "training": {"epochs": 1},
        "data": {},
    }
    (folder / "config.json").write_text(json.dumps(config))


def plain_numbers(name: str, value: torch.Tensor) -> torch.Tensor:
    if "permutation" in name:
        return torch.arange(value.numel()).flip(0).to(value.dtype)
    if name in ("mean", "std") or not value.is_floating_point():
        return value
    number = ((torch.arange(value.numel(), dtype=torch.float64) * 7919) % 257 - 128) / 1024
    offset = 1 if "running_var" in name or "statistic." in name else 0.5 if name.endswith("gamma_S") else 0
    return (number + offset).to(value.dtype).view(value.shape)


def test_a_model_of_version_2_keeps_its_id_and_its_scores(tmp_path):
    write_version_2(tmp_path)
    model = load_model(Location(str(tmp_path)))
    assert model.model_id == OLD_ID
    assert model.detector.architecture.preprocessing == Preprocessing((64, 128), "letterbox", "bilinear", 1)
    assert model.calibration.anomaly_score.tolist() == [0.5, 1.5]
    assert model.calibration.global_score is model.calibration.local_score is None
    assert model.calibration.map_threshold(0.5) is model.calibration.region_threshold(0.5) is None
    y = [
        (((torch.arange(2 * 512 * height * width) * 7919 + height) % 257 - 128) / 64).view(
            2, 512, height, width
        )
        for height, width in ((2, 4), (1, 2))
    ]
    for form in (model.detector, InferenceDetector(model.detector, "float32", 2)):
        scores = form.score_features(y)
        np.testing.assert_allclose(scores.anomaly_score_B, OLD_SCORES, rtol=1e-5)
        np.testing.assert_allclose(scores.scale_scores_BS, OLD_SCALE_SCORES, rtol=1e-5)
        np.testing.assert_allclose(scores.anomaly_map_BHW[:, 0], OLD_MAP_ROWS, rtol=1e-5)


def test_a_model_of_version_3_keeps_its_id_and_its_scores(tmp_path):
    write_version_3(tmp_path)
    model = load_model(Location(str(tmp_path)))
    assert model.model_id == WHITENED_ID
    # It knows no levels of regions: each held-out image counts with one region, its hottest cell.
    assert model.calibration.region_levels is None
    assert model.calibration.region_threshold(0.5) == 2
    y = [
        torch.linspace(-1, 1, 2 * 256 * 4 * 8).view(2, 256, 4, 8),
        torch.linspace(1, -1, 2 * 512 * 2 * 4).view(2, 512, 2, 4),
    ]
    for form in (model.detector, InferenceDetector(model.detector, "float32", 2)):
        scores = form.score_features(y)
        np.testing.assert_allclose(scores.anomaly_score_B, WHITENED_SCORES, rtol=1e-4)
        np.testing.assert_allclose(scores.local_score_B, WHITENED_LOCAL_SCORES, rtol=1e-4)
        np.testing.assert_allclose(scores.scale_scores_BS, WHITENED_SCALE_SCORES, rtol=1e-4)


def test_a_whitened_model_is_saved_with_all_that_decides_its_scores(tmp_path):
    detector = Detector(
        Architecture(
            "resnet10t",
            (64, 64),
            ("layer3", "layer4"),
            1,
            4,
            kernel_sizes=(3,),
            whitening=True,
            latent_window=3,
        )
    )
    for module in (detector.gaussians, detector.statistic):
        for value in module.buffers():
            value.add_(torch.rand(value.shape) / 10)
    columns = {"global_score": 1.0, "local_score": 1.5, "map_maximum": 2.0, "region_levels": [2.0, 1.2]}
    row = {"image_uri": "a.png", "image_version": "1", "anomaly_score": 1.0} | columns
    ids = []
    changes = ({}, {"local_score": 1.6}, {"map_maximum": 3.0}, {"region_levels": [2.0, 1.1]})
    for name, change in zip(("whole", "other", "third", "fourth"), changes, strict=True):
        table = pa.Table.from_pylist([row | change], schema=CALIBRATION)
        location = Location(str(tmp_path / name))
        ids.append(save_model(location, detector, table, training={}, data={}, metrics={}, card={}))
    assert len(set(ids)) == 4
    model = load_model(Location(str(tmp_path / "whole")))
    calibration = model.calibration
    assert (calibration.global_score, calibration.local_score, calibration.map_maximum) == (1, 1.5, 2)
    assert calibration.region_levels.tolist() == [[2.0, 1.2]]
    image_BHWC = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    scores = model.detector(image_BHWC)
    torch.testing.assert_close(scores, detector(image_BHWC), rtol=0, atol=0)
    assert scores.local_score_B.isfinite().all()


def test_the_configuration_says_how_the_model_was_made(detector, tmp_path):
    save(Location(str(tmp_path)), detector)
    config = json.loads((Path(tmp_path) / "config.json").read_text())
    assert config["architecture"]["cut_after"] == "layer4"
    assert config["feature_shapes"] == [[512, 2, 4], [512, 1, 2]]
    assert {"csflow", "torch", "timm", "pillow"} <= config["libraries"].keys()


@pytest.mark.parametrize(
    "change", [{"cut_after": "layer3"}, {"image_size": [128, 64]}, {"scales": 1}, {"new_setting": True}]
)
def test_a_directory_of_another_architecture_is_not_the_model_of_that_id(detector, tmp_path, change):
    save(Location(str(tmp_path)), detector)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architecture"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WrongUse, match="its content does not give the model_id"):
        read_model(Location(str(tmp_path)))


def test_nothing_stays_of_the_card_of_a_model_that_is_replaced(detector, tmp_path):
    location, calibration = Location(str(tmp_path)), CALIBRATION.empty_table()
    old = dict.fromkeys(("README.md", "curves.svg", "outliers/01.jpg", "outliers/02.jpg"), b"old")
    own = {"notes.md", "outliers/why.txt"}
    for name in own:
        (location / name).write(b"of the user")
    for card in (old, {"README.md": b"new", "outliers/01.jpg": b"new"}):
        save_model(location, detector, calibration, training={}, data={}, metrics={}, card=card)
    model = {"config.json", "model.safetensors", "calibration.parquet", "metrics.json"}
    present = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert present == own | model | {"README.md", "outliers/01.jpg"}
    assert (tmp_path / "outliers" / "01.jpg").read_bytes() == b"new"


def test_a_directory_is_no_model_until_all_its_files_are_there(detector, tmp_path, monkeypatch):
    location = Location(str(tmp_path / "model"))
    write, written = Location.write, []

    def write_and_note(self: Location, data: bytes) -> None:
        assert not holds_model(location)
        write(self, data)
        written.append(self.name)

    monkeypatch.setattr(Location, "write", write_and_note)
    calibration = CALIBRATION.empty_table()
    card = {"README.md": b"# Model", "curves.svg": b"<svg/>"}
    save_model(location, detector, calibration, training={}, data={}, metrics={"loss": 1}, card=card)
    assert holds_model(location)
    assert set(written) == {path.name for path in (tmp_path / "model").iterdir()} and len(written) == 6


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("config.json", None, "config.json does not exist; a model is the --output of `csflow train`"),
        ("model.safetensors", None, "model.safetensors does not exist"),
        ("calibration.parquet", None, "calibration.parquet does not exist"),
        (
            "config.json",
            b"{",
            r"is damaged \(config.json: JSONDecodeError: .*\); copy it again or train it anew",
        ),
        ("config.json", b"{}", r"is damaged \(config.json: KeyError: 'format_version'\)"),
        ("config.json", b"[" * 100_000, r"is damaged \(config.json: RecursionError"),
        ("config.json", b"[]", r"is damaged \(config.json: TypeError"),
        ("config.json", b'{"format_version": 4}', r"is damaged \(KeyError: 'architecture'\)"),
        (
            "config.json",
            b'{"format_version": 7}',
            "has format version 7, this csflow reads 6; use the csflow",
        ),
        ("model.safetensors", b"torn", r"is damaged \(SafetensorError"),
        ("calibration.parquet", b"torn", r"is damaged \(ArrowInvalid"),
        ("calibration.parquet", b"PAR1" + bytes(8) + b"\x08\0\0\0PAR1", r"is damaged \(OSError"),
        ("config.json", b"[" * 100_000, r"is damaged \(config.json: RecursionError"),
    ],
)
def test_a_directory_that_is_not_whole_is_named_with_what_is_wrong(
    detector, tmp_path, file, content, complaint
):
    save(Location(str(tmp_path)), detector)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(WrongUse, match=f"{tmp_path}.* ?{complaint}"):
        read_model(Location(str(tmp_path)))


def test_a_file_that_cannot_be_read_is_not_called_missing(detector, tmp_path):
    save(Location(str(tmp_path)), detector)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(
        WrongUse, match=r"model file .*/config\.json cannot be read: StorageFailed: .*directory"
    ):
        read_model(Location(str(tmp_path)))


@pytest.mark.parametrize(
    ("scores", "complaint"),
    [
        ({}, "KeyError: .*anomaly_score"),
        ({"anomaly_score": pa.array([None], pa.float64())}, "ValueError: .*anomaly_score"),
        ({"anomaly_score": ["high"]}, "ArrowInvalid: .*high"),
        ({"anomaly_score": [[1.0]]}, "ArrowNotImplementedError: .*list"),
    ],
)
def test_a_calibration_without_scores_is_damaged(detector, tmp_path, scores, complaint):
    save(Location(str(tmp_path)), detector)
    table = pa.table({"image_uri": ["a"], "image_version": ["1"]} | scores)
    pq.write_table(table, tmp_path / "calibration.parquet")
    with pytest.raises(WrongUse, match=rf"is damaged \({complaint}"):
        read_model(Location(str(tmp_path)))


@pytest.mark.parametrize(
    ("preprocessing", "complaint"), [({}, "KeyError: 'decoding_version'"), (None, "TypeError: ")]
)
def test_a_configuration_that_does_not_say_how_images_are_decoded_is_damaged(
    detector, tmp_path, preprocessing, complaint
):
    save(Location(str(tmp_path)), detector)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"preprocessing": preprocessing}))
    with pytest.raises(WrongUse, match=rf"is damaged \({complaint}"):
        read_model(Location(str(tmp_path)))


def test_a_model_that_lost_a_bit_is_damaged(detector, tmp_path):
    save(Location(str(tmp_path)), detector)
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(WrongUse, match="its content does not give the model_id"):
        read_model(Location(str(tmp_path)))


def test_tensors_that_are_not_of_the_architecture_are_damage(detector, tmp_path):
    odd = copy.deepcopy(detector)
    odd.architecture = replace(detector.architecture, hidden_channels=8)
    save(Location(str(tmp_path)), odd)
    assert read_model(Location(str(tmp_path))).architecture["hidden_channels"] == 8
    with pytest.raises(WrongUse, match=r"(?s)is damaged \(RuntimeError: .*size mismatch"):
        load_model(Location(str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"new_setting": 1}, "TypeError: .*new_setting"),
        ({"kernel_sizes": [2]}, "ValueError: kernel_sizes"),
        ({"subsampling": "median"}, "ValueError: subsampling 'median'"),
        ({"image_size": ...}, "KeyError: 'image_size'"),
        ({"scales": 0}, "IndexError"),
        ({"backbone": "unheard_of"}, "BackboneError: .*unheard_of"),
    ],
)
def test_an_architecture_that_cannot_be_built_is_damage(detector, tmp_path, change, complaint):
    values = detector.architecture.to_json() | change
    odd = copy.copy(detector)
    odd.architecture = SimpleNamespace(
        tiling=None,
        mask=None,
        has_foreign_features=False,
        to_json=lambda: {name: value for name, value in values.items() if value is not ...},
    )
    save(Location(str(tmp_path)), odd)
    with pytest.raises(WrongUse, match=rf"is damaged \({complaint}"):
        load_model(Location(str(tmp_path)))


def test_a_worker_needs_a_gibibyte_and_its_tensors_twice(detector, tmp_path):
    save(Location(str(tmp_path)), detector)
    tensors = sum(value.nbytes for value in detector.state_dict().values())
    assert read_model(Location(str(tmp_path))).worker_bytes == 2**30 + 2 * tensors


def calibration_of(maxima: Sequence[float | None]) -> Calibration:
    rows = [
        {"image_uri": f"{n}", "image_version": "1", "anomaly_score": 1.0, "map_maximum": value}
        for n, value in enumerate(maxima)
    ]
    return Calibration.of(pa.Table.from_pylist(rows, CALIBRATION))


def test_the_map_threshold_is_exceeded_by_no_more_normal_images_than_asked_for():
    ten = calibration_of([3.0, 1.0, 2.0, 4.0, 9.0, 8.0, 7.0, 6.0, 5.0])
    assert [ten.map_threshold(rate) for rate in (0.05, 0.099)] == [None, None]
    assert [ten.map_threshold(rate) for rate in (0.1, 0.15, 0.199, 0.2, 0.9)] == [9.0, 9.0, 9.0, 8.0, 1.0]
    # 0.29 · 100 is a little less than 29 in floating point.
    assert calibration_of(np.arange(99.0)).map_threshold(0.29) == 70.0
    assert calibration_of([1.0, None]).map_threshold(0.5) is None


def test_a_calibration_keeps_its_columns_and_what_older_models_lack_is_none():
    table = pa.table({"anomaly_score": [2.0], "image_uri": ["a"], "image_version": ["1"], "more": [0]})
    calibration = Calibration.of(table)
    assert calibration.table.schema == CALIBRATION
    assert calibration.anomaly_score.tolist() == [2.0]
    assert calibration.global_score is calibration.local_score is calibration.map_maximum is None


def test_held_out_scores_are_found_of_the_very_model(detector, tmp_path):
    model_id = save(Location(str(tmp_path)), detector, (0.5, 1.5))
    (tmp_path / "model.safetensors").unlink()
    found = find_calibration([Location(str(tmp_path))], model_id)
    assert found.anomaly_score.tolist() == [0.5, 1.5]
    assert find_calibration([Location(str(tmp_path))], "0" * 16) is None


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", None),
        ("config.json", b"torn"),
        ("config.json", b'{"format_version": 4}'),
        ("calibration.parquet", None),
        ("calibration.parquet", b"torn"),
        ("calibration.parquet", to_parquet(pa.table({"image_uri": ["a"]}))),
    ],
)
def test_no_held_out_scores_are_found_where_a_file_is_missing_or_damaged(detector, tmp_path, file, content):
    model_id = save(Location(str(tmp_path)), detector)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    assert find_calibration([Location(str(tmp_path))], model_id) is None


def test_a_directory_holds_what_it_was_given(detector, tmp_path):
    location = Location(str(tmp_path))
    card = {"README.md": b"# Model"}
    given = {"training": {"epochs": 7}, "data": {"training_images": 3}, "metrics": {"loss": 0.5}}
    model_id = save_model(location, detector, CALIBRATION.empty_table(), card=card, **given)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["training"], config["data"]) == (given["training"], given["data"])
    assert (config["format_version"], config["model_id"]) == (4, model_id)
    assert config["preprocessing"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert config["preprocessing"]["std"] == pytest.approx([0.229, 0.224, 0.225])
    assert config["libraries"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert config["libraries"]["csflow"] == csflow.__version__
    assert json.loads((tmp_path / "metrics.json").read_text()) == given["metrics"]
    assert (tmp_path / "README.md").read_bytes() == b"# Model"
    for name in ("config.json", "metrics.json"):
        text = (tmp_path / name).read_text()
        assert text == json.dumps(json.loads(text), indent=2) + "\n"
    assert re.fullmatch("[0-9a-f]{16}", model_id)
