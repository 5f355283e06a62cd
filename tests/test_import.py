"""Importing models of other code bases: the same scores on the same features, and no pickled code run.

tests/golden/anomalib_golden.py says how the checkpoint and values of anomalib were made, and
official_extractor.py those of the official extractor. The official flow's are in tests/golden/official*.npz.
"""

import gzip
import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
import torchvision
from torch import Tensor

import csflow
from csflow.config import parse
from csflow.errors import ExitStatus, WrongUse
from csflow.importing.checkpoints import ForeignModelError, load_extractor, permutations, read_foreign
from csflow.importing.job import IMAGENET_MEAN, IMAGENET_STD, ImportConfig, import_model
from csflow.model import (
    Architecture,
    Backbone,
    CrossScaleFlow,
    Detector,
    InferenceBackbone,
    InferenceDetector,
    load_weights,
)
from csflow.model_directory import load_model
from csflow.storage import Location
from csflow.weights import find_weights

GOLDEN = Path(__file__).parent / "golden"
sys.path.append(str(GOLDEN))
import extractors  # noqa: E402

OFFICIAL = sorted(GOLDEN.glob("official*.npz"))
ANOMALIB = json.loads((GOLDEN / "anomalib_2.7.0.json").read_text())


def anomalib_bytes() -> bytes:
    return gzip.decompress((GOLDEN / "anomalib_2.7.0.ckpt.gz").read_bytes())


def anomalib_checkpoint() -> dict[str, Any]:
    return torch.load(io.BytesIO(anomalib_bytes()), weights_only=True)


def anomalib_features() -> list[Tensor]:
    """As `features` in tests/golden/anomalib_golden.py."""
    shapes = [(2, 304, 8 >> s, 8 >> s) for s in range(3)]
    return [
        torch.from_numpy(
            ((np.arange(np.prod(shape)) * 7919 + s) % 257 - 128).astype(np.float32) / 64
        ).reshape(shape)
        for s, shape in enumerate(shapes)
    ]


def official_state(golden: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {
        name.removeprefix("state/"): torch.from_numpy(value)
        for name, value in golden.items()
        if name.startswith("state/")
    }


def scores_of(flow: CrossScaleFlow, y: list[Tensor]) -> Any:
    detector = Detector(Architecture("resnet10t", (128, 128), hidden_channels=4, kernel_sizes=(3,)))
    detector.flow = flow
    return detector.score_features(y)


@pytest.fixture(params=OFFICIAL, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    return dict(np.load(request.param))


def test_an_official_state_dict_gives_the_scores_of_the_original(golden):
    foreign = read_foreign(official_state(golden))
    assert foreign.source == "official"
    assert foreign.kernel_sizes == tuple(golden["kernel_sizes"])
    scores = scores_of(foreign.flow, [torch.from_numpy(golden[f"input/scale{s}"]) for s in range(3)])
    np.testing.assert_allclose(scores.anomaly_score_B, golden["score"], rtol=1e-5)
    np.testing.assert_allclose(scores.anomaly_map_BHW, golden["map/scale0"], rtol=1e-5, atol=1e-6)


def test_permutations_that_no_checkpoint_holds_are_drawn_as_the_original_drew_them(golden):
    channels, _, blocks = (int(value) for value in golden["config"][:3])
    for b in range(blocks):
        for s, permutation_C in enumerate(permutations("official", b, channels)):
            np.testing.assert_array_equal(permutation_C, golden[f"permutation/block{b}_scale{s}"])


def test_an_anomalib_checkpoint_gives_the_scores_of_the_original():
    foreign = read_foreign(anomalib_checkpoint())
    assert (foreign.source, foreign.channels, foreign.hidden_channels) == ("anomalib", 304, 1)
    assert (foreign.kernel_sizes, foreign.image_size) == ((3, 5), (256, 256))
    scores = scores_of(foreign.flow, anomalib_features())
    np.testing.assert_allclose(scores.anomaly_score_B, ANOMALIB["score"], rtol=1e-5)
    np.testing.assert_allclose(scores.anomaly_map_BHW, ANOMALIB["map"], rtol=1e-4)
    log_det_B = foreign.flow(anomalib_features()).log_det_B
    assert log_det_B.sum().item() == pytest.approx(ANOMALIB["log_det_sum"], rel=1e-4)


def test_prefixes_of_wrappers_do_not_matter(golden):
    state = official_state(golden)
    wrapped = read_foreign({f"module.{name}": value for name, value in state.items()})
    torch.testing.assert_close(wrapped.flow.state_dict(), read_foreign(state).flow.state_dict())


@pytest.fixture(scope="module")
def extractor() -> torch.nn.Module:
    """torchvision's EfficientNet-B5 up to its sixth stage."""
    network = torchvision.models.efficientnet_b5(weights=None).features[:7].eval()
    network.load_state_dict(extractors.weights(network.state_dict()))
    return network


@pytest.fixture(scope="module")
def b5() -> Backbone:
    return Backbone("efficientnet_b5")


def extractor_state(extractor: torch.nn.Module) -> dict[str, Tensor]:
    """Under the names of an anomalib checkpoint, which holds the network twice."""
    path = "model.feature_extractor.feature_extractor"
    prefixes = (f"{path}.backbone.features.", f"{path}.feature_extractor.features.")
    return {prefix + name: value for prefix in prefixes for name, value in extractor.state_dict().items()}


def test_the_feature_extractor_of_an_anomalib_checkpoint_gives_the_same_features(extractor, b5):
    foreign = read_foreign(
        anomalib_checkpoint()
        | {"state_dict": anomalib_checkpoint()["state_dict"] | extractor_state(extractor)}
    )
    load_extractor(b5, foreign.extractor)
    image_BCHW = torch.rand(2, 3, 96, 64)
    with torch.inference_mode():
        torch.testing.assert_close(b5(image_BCHW)[0], extractor(image_BCHW), rtol=1e-3, atol=1e-4)
    assert extractor(image_BCHW).std() > 0.01


def test_the_features_of_an_official_model_are_those_of_the_original():
    shape = Architecture(
        "tf_efficientnet_b5",
        (extractors.SIDE, extractors.SIDE),
        hidden_channels=1,
        kernel_sizes=(3,),
        subsampling="first",
        static_padding=True,
    )
    detector = Detector(shape).eval()
    whole = timm.create_model(shape.backbone).state_dict()  # in the order of the original's tensors
    load_weights(detector.backbone, extractors.weights(whole))
    for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        detector.get_buffer(name).copy_(torch.tensor(values))
    image_BHWC = torch.from_numpy(extractors.images())
    golden = np.load(GOLDEN / "efficientnet_pytorch.npz")
    for features in (detector.features(image_BHWC), InferenceBackbone(detector, "float32", 2)(image_BHWC)):
        for s, y_BCHW in enumerate(features):
            np.testing.assert_allclose(y_BCHW, golden[f"scale{s}"], rtol=1e-3, atol=1e-4)


def test_another_feature_extractor_is_refused(extractor, b5):
    state = dict(list(extractor.state_dict().items())[:-3])
    with pytest.raises(ForeignModelError, match="not a efficientnet_b5 up to blocks"):
        load_extractor(b5, state)


@pytest.fixture(scope="module")
def good_images(cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    for path in sorted((cells / "functional" / "test").iterdir())[:5]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "damaged.png").write_bytes(b"no image")
    return folder


def run(*arguments: object) -> ExitStatus:
    return import_model(parse(ImportConfig, None, list(map(str, arguments))))


def test_an_imported_model_is_whole_and_calibrated_on_the_named_images(
    tmp_path, good_images, extractor, capsys
):
    checkpoint = anomalib_checkpoint()
    checkpoint["state_dict"] |= extractor_state(extractor)
    torch.save(checkpoint, tmp_path / "model.ckpt")
    arguments = ["--checkpoint", tmp_path / "model.ckpt", "--calibrate", good_images]
    arguments += ["--output", tmp_path / "model"]
    assert run(*arguments, "--image_size", 128) == ExitStatus.DONE
    assert "left out: " in (printed := capsys.readouterr().out) and "damaged.png" in printed
    model = load_model(Location(str(tmp_path / "model")))
    assert model.detector.architecture.image_size == (128, 128)
    scores = model.detector.score_features(anomalib_features())
    np.testing.assert_allclose(scores.anomaly_score_B, ANOMALIB["score"], rtol=1e-5)
    image_BHWC = torch.from_numpy(extractors.images())
    form = InferenceDetector(model.detector, "float32", 2)
    for score_B in (model.detector(image_BHWC).anomaly_score_B, form(image_BHWC).anomaly_score_B):
        np.testing.assert_allclose(score_B, ANOMALIB["whole_scores"], rtol=1e-4)
    for image_HWC, expected in zip(extractors.images(), ANOMALIB["whole_scores"], strict=True):
        found = csflow.load(tmp_path / "model").score(image_HWC)
        assert found.anomaly_score == pytest.approx(expected, rel=1e-4)
    calibration = pq.read_table(tmp_path / "model" / "calibration.parquet").to_pylist()
    assert [Path(row["image_uri"]).name for row in calibration] == sorted(
        path.name for path in good_images.iterdir() if path.name != "damaged.png"
    )
    assert all(row["anomaly_score"] > 0 for row in calibration)
    assert (
        (tmp_path / "model" / "README.md").read_text().startswith("# Imported: anomalib CS-Flow, 2 coupling")
    )
    with pytest.raises(WrongUse, match="already holds a model"):
        run(*arguments)


def test_an_official_flow_of_other_channels_than_the_backbone_is_refused(tmp_path, good_images):
    state = official_state(dict(np.load(OFFICIAL[0])))
    torch.save(state, tmp_path / "flow.pth")
    arguments = ["--checkpoint", tmp_path / "flow.pth", "--calibrate", good_images, "--image_size", 128]
    with pytest.raises(WrongUse, match="resnet10t gives 512 channels, the flow takes 16"):
        run(*arguments, "--backbone", "resnet10t", "--output", tmp_path / "model")


def test_a_checkpoint_without_its_backbone_needs_weights_by_name(tmp_path, good_images):
    (tmp_path / "model.ckpt").write_bytes(anomalib_bytes())
    arguments = ["--checkpoint", tmp_path / "model.ckpt", "--calibrate", good_images, "--image_size", 128]
    with pytest.raises(
        WrongUse, match="--weights is required, since the checkpoint holds no feature extractor"
    ):
        run(*arguments, "--output", tmp_path / "model")


class Trap:
    """Its unpickling would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.target, "executed")


def test_no_pickled_code_is_run(tmp_path, good_images, monkeypatch):
    whole = torch.nn.Linear(1, 1)
    monkeypatch.setitem(sys.modules, "freia_funcs", type(sys)("freia_funcs"))
    network = type("ReversibleGraphNet", (torch.nn.Module,), {"__module__": "freia_funcs"})
    sys.modules["freia_funcs"].ReversibleGraphNet = network
    for content, complaint in (
        ({"state_dict": {}, "callback": Trap(tmp_path / "trap")}, r"pickled objects \(builtins\.getattr"),
        (network(), r"pickled objects \(freia_funcs\.ReversibleGraphNet\), .*torch\.save\("),
        ([whole.weight], "is no state dict"),
        (whole.state_dict(), "holds no tensors of a flow"),
        ({"state_dict": [1, 2], "hyper_parameters": None}, "its state_dict is none"),
        ({1: whole.weight.detach()}, "holds no tensors of a flow"),
    ):
        torch.save(content, tmp_path / "model.pth")
        with pytest.raises(WrongUse, match=complaint):
            run(
                "--checkpoint", tmp_path / "model.pth", "--calibrate", good_images, "--output", tmp_path / "m"
            )
    assert not (tmp_path / "trap").exists()
    (tmp_path / "model.pth").write_bytes(b"something else")
    with pytest.raises(WrongUse, match="is no readable checkpoint"):
        run("--checkpoint", tmp_path / "model.pth", "--calibrate", good_images, "--output", tmp_path / "m")
    with pytest.raises(WrongUse, match="does not exist"):
        run("--checkpoint", tmp_path / "none.pth", "--calibrate", good_images, "--output", tmp_path / "m")


def kernel_of_a_row(state: dict[str, Any]) -> None:
    weight = next(name for name in state if name.endswith("conv_scale0_0.weight"))
    state[weight] = torch.ones(1, 152, 100_000)  # a kernel of 100,000 x 100,000, if one believes it


def many_channels_without_values(state: dict[str, Any]) -> None:
    weight = next(name for name in state if name.endswith("conv_scale0_0.weight"))
    state[weight] = torch.ones(0, 1 << 50, 3, 3)


def one_value_everywhere(state: dict[str, Any]) -> None:
    state["more"] = torch.ones(1).expand(1 << 40)


@pytest.mark.parametrize(
    ("inflate", "complaint"),
    [
        (kernel_of_a_row, "its tensors are not those of a three-scale CS-Flow"),
        (many_channels_without_values, "weights without values"),
        (one_value_everywhere, "describes tensors of more bytes than it has"),
    ],
)
def test_the_size_of_a_checkpoint_bounds_what_reading_it_takes(tmp_path, good_images, inflate, complaint):
    checkpoint = anomalib_checkpoint()
    inflate(checkpoint["state_dict"])
    torch.save(checkpoint, tmp_path / "model.ckpt")
    arguments = ["--checkpoint", tmp_path / "model.ckpt", "--calibrate", good_images]
    with pytest.raises(WrongUse, match=complaint):
        run(*arguments, "--output", tmp_path / "m", "--image_size", 128)


def test_lists_that_a_checkpoint_shares_are_walked_once():
    nested: list[object] = []
    for _ in range(60):
        nested = [nested, nested]
    assert read_foreign(anomalib_checkpoint() | {"anomalib_pre_processor_config": nested}).preprocessing == {}


def test_packed_checkpoints_and_weights_are_refused(tmp_path, good_images):
    torch.save({"zeros": torch.zeros(1 << 20)}, tmp_path / "stored.pth")
    with (
        zipfile.ZipFile(tmp_path / "stored.pth") as stored,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in stored.infolist():
            packed.writestr(member.filename, stored.read(member))
    with pytest.raises(WrongUse, match=r"packed\.pth is no readable checkpoint: ValueError"):
        run("--checkpoint", tmp_path / "packed.pth", "--calibrate", good_images, "--output", tmp_path / "m")
    with pytest.raises(WrongUse, match=r"packed\.pth is no readable weights file: ValueError"):
        find_weights(str(tmp_path / "packed.pth"), "resnet10t", {})
    torch.save({"one": torch.ones(1).expand(1 << 40)}, tmp_path / "inflated.pth")
    with pytest.raises(WrongUse, match="describes tensors of more bytes than it has"):
        find_weights(str(tmp_path / "inflated.pth"), "resnet10t", {})


def test_flows_that_csflow_cannot_represent_are_refused():
    checkpoint = anomalib_checkpoint()
    with pytest.raises(ForeignModelError, match="clamp 5; csflow's flow has 3"):
        read_foreign(checkpoint | {"hyper_parameters": {"clamp": 5}})
    with pytest.raises(ForeignModelError, match=r"clamp .*; csflow.s flow has 3"):
        read_foreign(checkpoint | {"hyper_parameters": {"clamp": torch.ones(2)}})
    state = checkpoint["state_dict"]
    unused = {name: value * 0 if "gamma" in name else value for name, value in state.items()}
    with pytest.raises(ForeignModelError, match="every γ is 0"):
        read_foreign(unused)
    partial = {name: value for name, value in state.items() if "down_conv12" not in name}
    with pytest.raises(ForeignModelError, match=r"not those of a three-scale CS-Flow: .*down_conv12"):
        read_foreign(partial)
