"""The inference form: the scores of the trained detector, whatever the model and the batch."""

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from csflow.images import decode
from csflow.inputs.listing import list_images
from csflow.model import (
    Architecture,
    Detector,
    InferenceDetector,
    Scores,
    fused_blocks,
    inference,
)
from csflow.model.backbone import IntermediateMaps
from csflow.model.fallbacks import Fallbacks
from csflow.model.gpu import GpuDetector, GpuFeatures, Recorded
from csflow.model.openvino_backbone import _compiled, _converted, _split
from csflow.model.rounding import rounding_shifts, without_shifts
from csflow.model_directory import load_model
from csflow.storage import Location
from csflow.training.rounding import moves_p_values

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import gpu


def random_detector(
    backbone: str,
    image_size: tuple[int, int],
    scales: int,
    kernel_sizes: tuple[int, ...],
    seed: int = 0,
    stages: tuple[str, ...] | str | None = None,
    whitening: bool = False,
) -> Detector:
    """A detector in which everything that folding moves differs from what it is at the start of training."""
    torch.manual_seed(seed)
    architecture = Architecture(
        backbone,
        image_size,
        stages,
        scales,
        hidden_channels=24,
        kernel_sizes=kernel_sizes,
        seed=seed,
        whitening=whitening,
        latent_window=3 if whitening else 1,
    )
    detector = Detector(architecture).eval().requires_grad_(False)
    for name, value in detector.named_parameters():
        if name.endswith("gamma_S"):
            value.uniform_(0.2, 0.6)
    for module in detector.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
            module.weight.uniform_(0.8, 1.2)
            module.bias.normal_(0, 0.1)
    if whitening:
        images = (smooth_images(detector, 24, seed=2), smooth_images(detector, 12, seed=3))
        gpu.fit(detector, *map(detector.features, images))
    return detector


def random_images(detector: Detector, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, *detector.architecture.image_size, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def smooth_images(detector: Detector, batch: int, seed: int) -> Tensor:
    """Images that differ more from each other than noise does, so that their features do."""
    generator = torch.Generator().manual_seed(seed)
    small_BCHW = torch.rand(batch, 3, 8, 8, generator=generator)
    image_BCHW = nn.functional.interpolate(small_BCHW, detector.architecture.image_size, mode="bilinear")
    return (255 * image_BCHW).to(torch.uint8).permute(0, 2, 3, 1)


def assert_scores_close(actual: Scores, expected: Scores, tolerance: float) -> None:
    """Within the tolerance, relative to the largest value of its kind."""
    for actual_values, expected_values in zip(actual, expected, strict=True):
        assert actual_values.dtype == torch.float32
        assert actual_values.shape == expected_values.shape
        if not expected_values.numel():
            continue  # what only models of tiles have
        limit = tolerance * expected_values.nan_to_num().abs().max().item()
        # Without whitening there is no local score.
        torch.testing.assert_close(actual_values, expected_values, rtol=0, atol=limit, equal_nan=True)


MODELS = [
    ("resnet10t", (64, 96), 1, (3,)),
    ("tf_efficientnet_lite0", (128, 192), 2, (5, 3)),
    ("regnety_002", (128, 256), 3, (1, 3, 7)),
    ("resnet10t", (256, 256), 4, (3, 5)),
    ("convnext_atto", (64, 128), 2, (3,)),
]


@pytest.mark.parametrize(("backbone", "image_size", "scales", "kernel_sizes"), MODELS)
def test_float32_scores_are_those_of_the_trained_form(backbone, image_size, scales, kernel_sizes):
    detector = random_detector(backbone, image_size, scales, kernel_sizes)
    images = random_images(detector)
    assert_scores_close(InferenceDetector(detector, "float32", 3)(images), detector(images), 1e-5)


# All but the one whose whitening takes half a minute to fit.
@pytest.mark.parametrize(("backbone", "image_size", "scales", "kernel_sizes"), MODELS[:3] + MODELS[4:])
def test_whitened_scores_are_those_of_the_trained_form(backbone, image_size, scales, kernel_sizes):
    detector = random_detector(backbone, image_size, scales, kernel_sizes, whitening=True)
    images = smooth_images(detector, 3, seed=4)
    expected = detector(images)
    assert not any(values.isnan().any() for values in expected)
    assert_scores_close(InferenceDetector(detector, "float32", 3)(images), expected, 1e-4)


SEVERAL_STAGES = [
    # In the layers of large maps, the last of them or none of them is a stage; or all are of large maps.
    ("tf_efficientnet_lite0", ("blocks.1", "blocks.2", "blocks.4", "blocks.5"), 1),
    ("tf_efficientnet_lite0", ("blocks.3", "blocks.5"), 2),
    ("tf_efficientnet_lite0", ("blocks.4", "blocks.5"), 1),
    ("resnet10t", ("layer1", "layer2"), 2),
    ("resnet10t", ("layer2", "layer3"), 1),
]


@pytest.mark.parametrize(("backbone", "stages", "scales"), SEVERAL_STAGES)
def test_several_stages_are_those_of_the_trained_form(backbone, stages, scales):
    detector = random_detector(backbone, (128, 192), scales, (3,), stages=stages)
    images = random_images(detector, batch=4)
    form = InferenceDetector(detector, "float32", 4)
    first = form.features(images)
    form.features(images.flip(0))  # what was returned stays as it is
    for actual, expected in zip(first, detector.features(images), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert_scores_close(form(images), detector(images), 1e-5)


@pytest.mark.parametrize(("backbone", "stages", "scales"), SEVERAL_STAGES)
def test_several_stages_in_mixed_precision_score_within_one_percent(backbone, stages, scales):
    detector = random_detector(backbone, (128, 192), scales, (3,), stages=stages)
    images = random_images(detector)
    detector.measure_rounding(images)
    exact, rounded = detector(images), InferenceDetector(detector, "mixed", 3)(images)
    torch.testing.assert_close(rounded.anomaly_score_B, exact.anomaly_score_B, rtol=0.01, atol=0)


TRANSFORMERS = [
    ("vit_tiny_patch16_224", (128, 192), ("blocks.3", "blocks.11"), 2),
    ("vit_small_patch14_reg4_dinov2", (84, 112), ("blocks.11",), 2),
    ("vit_tiny_patch16_dinov3_qkvb", (96, 64), ("blocks.5",), 2),
    ("swin_tiny_patch4_window7_224", (64, 128), ("layers.2", "layers.3"), 2),
]


@pytest.mark.parametrize(("backbone", "image_size", "stages", "scales"), TRANSFORMERS)
def test_transformers_are_those_of_the_trained_form(backbone, image_size, stages, scales, caplog):
    detector = random_detector(backbone, image_size, scales, (3,), stages=stages)
    images = random_images(detector)
    detector.measure_rounding(images)
    expected = detector(images)
    for precision, tolerance in (("float32", 1e-4), ("mixed", 0.05)):
        form = InferenceDetector(detector, precision, 3)
        assert_scores_close(form(images), expected, tolerance)
        for actual, features in zip(form.features(images), detector.features(images), strict=True):
            limit = 1e-4 * features.abs().max().item()
            torch.testing.assert_close(actual, features, rtol=0, atol=limit)
    assert not caplog.records


def test_a_transformer_runs_without_openvino_where_that_gives_something_else(monkeypatch, caplog):
    detector = random_detector("vit_tiny_patch16_224", (64, 64), 1, (3,), stages="blocks.1")
    images = random_images(detector)
    # Position embeddings that OpenVINO resamples are not PyTorch's.
    monkeypatch.setattr(IntermediateMaps, "at_size", lambda self, height, width: self)
    form = InferenceDetector(detector, "float32", 3)
    assert_scores_close(form(images), detector(images), 1e-5)
    (complaint,) = (record.getMessage() for record in caplog.records)
    assert "runs without OpenVINO, more slowly: its maps are off by" in complaint


@pytest.mark.parametrize("backbone", ["resnet10t", "regnety_002", "tf_efficientnet_lite0"])
def test_mixed_scores_are_within_one_percent(backbone):
    detector = random_detector(backbone, (128, 128), 3, (3, 5))
    images = random_images(detector)
    detector.measure_rounding(images)
    exact, rounded = detector(images), InferenceDetector(detector, "mixed", 3)(images)
    torch.testing.assert_close(rounded.anomaly_score_B, exact.anomaly_score_B, rtol=0.01, atol=0)
    assert rounded.anomaly_score_B.dtype == torch.float32


@pytest.mark.parametrize("backbone", ["resnet10t", "tf_efficientnet_lite0"])
def test_whitening_gaussian_and_flow_in_mixed_precision_are_within_one_percent(backbone):
    # Of features that are given: random backbones give features so alike that whitening magnifies their
    # rounding. What trained ones give is tested below.
    detector = random_detector(backbone, (128, 128), 2, (3, 5), whitening=True)
    y = detector.features(smooth_images(detector, 3, seed=4))
    rounded = InferenceDetector(detector, "mixed", 3).score_features(y)
    for actual, expected in zip(rounded, detector.score_features(y), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.01, atol=0)
        assert actual.dtype == torch.float32


@pytest.mark.parametrize("channels", [2, 5, 6])
def test_odd_and_even_channel_counts_are_split_alike(channels):
    detector = random_detector("resnet10t", (64, 128), 2, (3, 3))
    shapes = [(3, channels, 2 >> s, 4 >> s) for s in range(2)]
    y = [torch.randn(shape) for shape in shapes]
    flow = type(detector.flow)(channels, 2, 8, (3, 3), seed=4).requires_grad_(False)
    for name, value in flow.named_parameters():
        if name.endswith("gamma_S"):
            value.uniform_(0.2, 0.6)
    detector.flow = flow
    actual = InferenceDetector(detector, "float32", 3).score_features(y)
    assert_scores_close(actual, detector.score_features(y), 1e-5)


@pytest.mark.parametrize("whitening", [False, True])
def test_a_score_does_not_depend_on_the_other_images_of_the_batch(whitening):
    detector = random_detector("resnet10t", (128, 128), 3, (3, 5), whitening=whitening)
    form = InferenceDetector(detector, "float32", 4)
    images = random_images(detector, batch=4)
    together = form(images)
    alone = [form(images[b : b + 1]) for b in range(4)]
    assert_scores_close(Scores(*map(torch.cat, zip(*alone, strict=True))), together, 1e-5)


def test_the_trained_form_stays_as_it_was():
    detector = random_detector("tf_efficientnet_lite0", (64, 64), 1, (3,))
    before = copy.deepcopy(detector.state_dict())
    InferenceDetector(detector, "bfloat16", 3)(random_images(detector))
    after = detector.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_images_that_the_model_was_not_trained_on_are_refused():
    form = InferenceDetector(random_detector("resnet10t", (64, 64), 1, (3,)), "float32", 2)
    with pytest.raises(ValueError, match="expected uint8 images"):
        form(torch.zeros(1, 128, 128, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="3 images are more than a batch of 2"):
        form(torch.zeros(3, 64, 64, 3, dtype=torch.uint8))


GPU_MODELS = [
    ("tf_efficientnet_lite0", (128, 192), 2, (5, 3), True),
    ("tf_efficientnet_b0", (128, 128), 2, (3,), False),
    ("resnet10t", (64, 64), 1, (3,), True),
]


@pytest.mark.parametrize(("backbone", "image_size", "scales", "kernel_sizes", "whitening"), GPU_MODELS)
def test_the_form_for_gpus_gives_the_scores_of_the_trained_form(
    backbone, image_size, scales, kernel_sizes, whitening
):
    # What GPUs run, computed by this processor.
    detector = random_detector(backbone, image_size, scales, kernel_sizes, whitening=whitening)
    images = smooth_images(detector, 3, seed=4)
    with torch.inference_mode():
        assert_scores_close(GpuDetector(detector, torch.float32, Fallbacks())(images), detector(images), 1e-4)


def test_the_form_for_gpus_is_within_one_percent_in_float16():
    detector = random_detector("mobilenetv2_050", (64, 64), 2, (3,), whitening=True)
    y = detector.features(smooth_images(detector, 3, seed=4))
    form = GpuDetector(detector, torch.float16, Fallbacks())
    for actual, expected in zip(form.score_features(y), detector.score_features(y), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.01, atol=0)
        assert actual.dtype == torch.float32


@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite0", "tf_efficientnet_b0", "resnet10t"])
@pytest.mark.parametrize("whitening", [False, True])
def test_a_recorded_pass_takes_nothing_from_the_host(backbone, whitening):
    """A CUDA graph replays kernels only: a tensor made on the host would be lost or refused."""
    detector = Detector(Architecture(backbone, (128, 128), scales=2, hidden_channels=8, whitening=whitening))
    form = GpuDetector(detector, torch.float32, Fallbacks())

    class OnGpu(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for value in torch.utils._pytree.tree_leaves(result):
                assert not isinstance(value, Tensor) or value.device.type == "cuda", function
            return result

    # Fake tensors have a device but no values, so that nothing can ask for one, as `.item()` would.
    with FakeTensorMode(), torch.inference_mode():
        state = [*form.named_parameters(), *form.named_buffers()]
        on_gpu = {name: torch.empty(value.shape, dtype=value.dtype, device="cuda") for name, value in state}
        image_BHWC = torch.empty(2, 128, 128, 3, dtype=torch.uint8, device="cuda")
        with OnGpu():
            scores = torch.func.functional_call(form, on_gpu, image_BHWC)
    assert scores.anomaly_map_BHW.shape == (2, *detector.feature_shapes[0][1:])


def test_a_gpu_without_room_for_a_batch_takes_smaller_ones(monkeypatch):
    class SmallGpu(Recorded):
        def __init__(self, function, x, fallbacks):
            if len(x) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("csflow.model.gpu.Recorded", SmallGpu)
    detector = random_detector("resnet10t", (64, 64), 1, (3,))
    batches, fallbacks = inference._Batches(detector, 8), Fallbacks()
    inference._recorded(detector, batches, fallbacks)
    assert batches.size == 2
    assert fallbacks.messages[-1] == "batches have 2 images, more slowly: CUDA out of memory."


def test_where_fused_kernels_do_not_run_the_layers_do(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(fused_blocks, "with_fused_blocks", broken)
    detector = random_detector("mobilenetv2_050", (64, 64), 2, (3,))
    fallbacks = Fallbacks()
    form = GpuDetector(detector, torch.float16, fallbacks)
    (message,) = fallbacks.messages
    assert message == "the backbone runs without fused kernels, more slowly: Failed to find C compiler."
    images = random_images(detector)
    assert_scores_close(form(images), detector(images), 0.01)


def test_fused_kernels_that_compute_something_else_are_not_used(monkeypatch):
    monkeypatch.setattr(fused_blocks, "with_fused_blocks", lambda network: lambda x: [-y for y in network(x)])
    fallbacks = Fallbacks()
    GpuFeatures(random_detector("mobilenetv2_050", (64, 64), 1, (3,)), torch.float16, fallbacks)
    (message,) = fallbacks.messages
    assert message.startswith("the backbone runs without fused kernels, more slowly: its maps are off by")


def test_float16_is_for_gpus():
    with pytest.raises(ValueError, match="float16 is for GPUs; on CPUs, choose mixed or bfloat16"):
        InferenceDetector(random_detector("resnet10t", (64, 64), 1, (3,)), "float16", 2)


@pytest.mark.parametrize("has_units", [True, False])
def test_precisions_that_the_processor_only_emulates_are_named_as_slower(monkeypatch, has_units):
    monkeypatch.setattr(inference, "multiplies_bfloat16", lambda device: has_units)
    detector = random_detector("mobilenetv2_050", (64, 64), 1, (3,))
    slower = "--precision mixed, more slowly: this processor does not multiply bfloat16; leave it out"
    assert InferenceDetector(detector, "mixed", 1).form.fallbacks == (() if has_units else (slower,))
    assert InferenceDetector(detector, "float32", 1).form.fallbacks == ()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("float16", 0.02)])
def test_a_gpu_gives_the_scores_of_the_trained_form(monkeypatch, precision, tolerance):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # as in actors
    detector = random_detector("tf_efficientnet_lite0", (128, 192), 2, (5, 3))
    images = random_images(detector, batch=4)
    expected = detector(images)
    form = InferenceDetector(detector.to("cuda"), precision, 4)
    # Recorded once, and replayed with other images and smaller batches.
    for some in (slice(4), slice(1), slice(1, 4), slice(1, 2)):
        submitted = form.submit(images[some].pin_memory())
        assert_scores_close(submitted(), Scores(*(values[some] for values in expected)), tolerance)
    assert not form.form.fallbacks


@pytest.mark.soak
def test_the_benchmark_for_gpus_runs_without_one(tmp_path):
    command = [sys.executable, gpu.__file__, "--tiny", "--output", str(tmp_path / "gpu.md")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = (tmp_path / "gpu.md").read_text()
    assert figures.count("## ") == 7
    assert "failed" not in figures, figures


def test_a_bias_keeps_its_float32_value_in_bfloat16():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(8, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 1, bias=False))
    layers.requires_grad_(False)
    layers[0].weight.copy_(layers[0].weight.bfloat16())
    layers[0].bias.uniform_(4, 8)  # bfloat16 has steps of 1/32 here
    layers[2].weight.copy_(torch.eye(64)[:, :, None, None])
    x_BCHW = torch.randn(4, 8, 32, 32).bfloat16().float()
    compiled = _compiled(_converted(layers, x_BCHW[:1]), x_BCHW.shape, torch.bfloat16)
    request = compiled.create_infer_request()
    (actual,) = request.infer([x_BCHW.numpy()]).to_tuple()
    # Activations are rounded up and down; what is left on average is the error of the biases.
    error_C = (torch.from_numpy(actual) - layers(x_BCHW)).mean((0, 2, 3))
    assert error_C.abs().max() < 0.002


def test_rounding_is_measured_where_weights_are_rounded():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(16, 4, 1))
    layers.requires_grad_(False)
    x_BCHW = 1 + torch.rand(4, 8, 6, 6)
    corrected = without_shifts(layers, rounding_shifts(layers, x_BCHW))
    rounded = [copy.deepcopy(layers), corrected]
    for form in rounded:
        for name in ("0", "2"):
            convolution = form.get_submodule(name)
            convolution.weight = nn.Parameter(convolution.weight.bfloat16().float(), requires_grad=False)
    plain, compensated = ((form(x_BCHW) - layers(x_BCHW)).mean((0, 2, 3)).abs().max() for form in rounded)
    assert compensated < plain / 10


@pytest.mark.soak
def test_a_model_that_was_trained_scores_within_one_percent_in_mixed_precision(model, cells):
    detector = load_model(Location(str(model))).detector
    assert detector.rounding_shifts
    paths = sorted((cells / "defective").iterdir())[:64]
    size = detector.architecture.preprocessing
    images = torch.from_numpy(np.stack([decode(path.read_bytes(), size).pixels_HWC for path in paths]))
    assert detector.architecture.whitening
    exact = detector(images)
    form = InferenceDetector(detector, "mixed", 8)
    scores = Scores(*map(torch.cat, zip(*(form(batch) for batch in images.split(8)), strict=True)))
    torch.testing.assert_close(scores.anomaly_score_B, exact.anomaly_score_B, rtol=0.01, atol=0)
    torch.testing.assert_close(scores.global_score_B, exact.global_score_B, rtol=0.01, atol=0)
    torch.testing.assert_close(scores.local_score_B, exact.local_score_B, rtol=0.01, atol=0)
    assert_scores_close(scores, exact, 0.01)


def test_a_model_of_images_too_alike_for_rounding_is_scored_in_float32(model, cells, tmp_path):
    photograph = np.asarray(Image.open(next(cells.joinpath("functional", "train").iterdir())).convert("RGB"))
    random, uris = np.random.default_rng(0), []
    for i in range(60):
        noisy = photograph + np.round(random.normal(0, 1, photograph.shape[:2]))[..., None]
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(tmp_path / f"{i}.png")
        uris.append(str(tmp_path / f"{i}.png"))
    detector = Detector(
        Architecture(
            "tf_efficientnet_lite0", (128, 128), kernel_sizes=(1,), hidden_channels=8, whitening=True
        )
    )
    trained = load_model(Location(str(model)))
    detector.backbone.load_state_dict(trained.detector.backbone.state_dict())
    detector.eval().requires_grad_(False)
    pixels = [decode(Path(uri).read_bytes(), (128, 128)).pixels_HWC for uri in uris]
    images = torch.from_numpy(np.stack(pixels))
    gpu.fit(detector, *map(detector.features, (images[:30], images[30:40])))
    detector.measure_rounding(images[:8])

    listed = pa.Table.from_batches(list_images(uris[40:], {}))
    calibration = pa.table({"anomaly_score": detector(images[40:]).anomaly_score_B.double().numpy()})
    assert moves_p_values(detector, listed, calibration, {})
    # Photographs of different cells are no such images.
    heldout = trained.calibration.table
    assert not moves_p_values(trained.detector, heldout, heldout, {})
    exact = replace(detector.architecture, precision="float32")
    detector.architecture = Architecture.from_json(exact.to_json())
    assert InferenceDetector(detector, "auto", 8).form.precision == "float32"
    assert InferenceDetector(detector, "mixed", 8).form.precision == "mixed"


@pytest.mark.parametrize(
    ("backbone", "cut_after", "large"),
    [("tf_efficientnet_lite0", None, 6), ("resnet10t", None, 7), ("resnet10t", "layer1", 5)],
)
def test_maps_of_a_sixteenth_and_less_are_small(backbone, cut_after, large):
    detector = Detector(
        Architecture(backbone, (128, 128), cut_after, scales=2, hidden_channels=4, kernel_sizes=(3,))
    )
    parts = _split(detector.backbone.layers)
    assert [len(part) for part in parts] == [large, len(detector.backbone.layers) - large]
    images = random_images(detector)
    detector.measure_rounding(images)
    for actual, expected in zip(
        InferenceDetector(detector, "mixed", 3).features(images), detector.features(images), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05 * expected.std().item())
