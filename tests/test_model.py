"""The model: the flow's mathematics, agreement with the official implementation, backbone and detector."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from csflow.model import (
    Architecture,
    Backbone,
    BackboneError,
    CrossScaleFlow,
    Detector,
    download_weights,
    load_weights,
    negative_log_likelihood,
)
from csflow.training.step import new_optimizer, optimizer_step

GOLDEN = sorted((Path(__file__).parent / "golden").glob("official*.npz"))


def random_flow(
    channels: Sequence[int] | int, scales: int, kernel_sizes: tuple[int, ...] = (3,), hidden: int = 8
) -> CrossScaleFlow:
    """A flow in float64 with random γ: with γ = 0 every block is the identity and hides its bugs."""
    torch.manual_seed(1)
    flow = CrossScaleFlow(channels, scales, hidden, kernel_sizes).double()
    for block in flow.blocks:
        for subnetwork in (block.subnetwork_first, block.subnetwork_second):
            torch.nn.init.uniform_(subnetwork.gamma_S, 0.2, 1.0)
    return flow


def random_features(
    channels: Sequence[int] | int,
    scales: int,
    batch: int = 3,
    size: tuple[int, int] = (8, 16),
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    channels = [channels] * scales if isinstance(channels, int) else channels
    shapes = [(batch, c, size[0] >> s, size[1] >> s) for s, c in enumerate(channels)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def official_flow(golden: dict[str, np.ndarray]) -> CrossScaleFlow:
    """Our flow with the official weights."""
    channels, hidden, blocks = (int(v) for v in golden["config"][:3])
    flow = CrossScaleFlow(channels, 3, hidden, [int(k) for k in golden["kernel_sizes"]])
    layers = {
        "enter": "conv_scale{0}_0",
        "same": "conv_scale{0}_1",
        "down": "down_conv{0}{1}",
        "up": "up_conv{1}{0}",
    }
    state = {}
    for b in range(blocks):
        for s in range(3):
            state[f"blocks.{b}.permutation_{s}"] = golden[f"permutation/block{b}_scale{s}"]
        # In the official module list each coupling block stands between other nodes.
        official = sorted({int(k.split(".")[1]) for k in golden if k.startswith("state/")})[b]
        for ours, theirs in (("subnetwork_first", "s2"), ("subnetwork_second", "s1")):
            source = f"state/module_list.{official}.{theirs}"
            state[f"blocks.{b}.{ours}.gamma_S"] = np.concatenate(
                [golden[f"{source}.gamma{s}"] for s in range(3)]
            )
            for layer, name in layers.items():
                for s in range(3 if layer in ("enter", "same") else 2):
                    for kind in ("weight", "bias"):
                        value = golden[f"{source}.{name.format(s, s + 1)}.{kind}"]
                        state[f"blocks.{b}.{ours}.{layer}.{s}.{kind}"] = value
    flow.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    return flow


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    return dict(np.load(request.param))


def golden_input(golden: dict[str, np.ndarray]) -> list[Tensor]:
    return [torch.from_numpy(golden[f"input/scale{s}"]) for s in range(3)]


def test_flow_equals_the_official_implementation(golden):
    output = official_flow(golden)(golden_input(golden))
    for s, z_BCHW in enumerate(output.z):
        np.testing.assert_allclose(z_BCHW.detach(), golden[f"z/scale{s}"], rtol=1e-5, atol=1e-5)
    log_det_B = sum(golden[f"log_det/scale{s}"] for s in range(3))
    np.testing.assert_allclose(output.log_det_B.detach(), log_det_B, rtol=1e-5)
    assert negative_log_likelihood(output).mean().item() == pytest.approx(float(golden["loss"]), rel=1e-5)


def test_score_and_map_equal_the_official_implementation(golden):
    detector = Detector(Architecture("resnet10t", (128, 128), hidden_channels=4, kernel_sizes=(3,)))
    detector.flow = official_flow(golden)
    scores = detector.score_features(golden_input(golden))
    np.testing.assert_allclose(scores.anomaly_score_B, golden["score"], rtol=1e-5)
    np.testing.assert_allclose(scores.anomaly_map_BHW, golden["map/scale0"], rtol=1e-5, atol=1e-6)
    maps = [golden[f"map/scale{s}"] for s in range(3)]
    expected_BS = np.stack([m.reshape(len(m), -1).mean(1) / 2 for m in maps], axis=1)
    np.testing.assert_allclose(scores.scale_scores_BS, expected_BS, rtol=1e-5)


def test_training_steps_equal_the_official_implementation(golden):
    flow = official_flow(golden)
    optimizer = new_optimizer(flow.parameters(), learning_rate=float(golden["lr"]))
    y = golden_input(golden)
    for loss, grad_norm in zip(golden["train/loss"], golden["train/grad_norm"], strict=True):
        step_loss = negative_log_likelihood(flow(y)).mean()
        step_loss.backward()
        assert step_loss.item() == pytest.approx(loss, rel=1e-4)
        assert optimizer_step(flow.parameters(), optimizer) == pytest.approx(grad_norm, rel=1e-4)


@pytest.mark.parametrize("scales", [1, 2, 3, 4])
@pytest.mark.parametrize(("channels", "kernel_sizes"), [(2, (3,)), (5, (3, 5)), (6, (1, 3, 5, 7))])
def test_inverse_undoes_the_flow(scales, channels, kernel_sizes):
    flow = random_flow(channels, scales, kernel_sizes)
    y = random_features(channels, scales)
    output = flow(y)
    restored = flow.inverse(output.z)
    for y_BCHW, z_BCHW, restored_BCHW in zip(y, output.z, restored.z, strict=True):
        assert z_BCHW.shape == y_BCHW.shape
        assert not torch.allclose(z_BCHW, y_BCHW)
        torch.testing.assert_close(restored_BCHW, y_BCHW, rtol=0, atol=1e-9)
    torch.testing.assert_close(output.log_det_B + restored.log_det_B, torch.zeros(3, dtype=torch.float64))


def test_levels_of_other_channels_are_inverted_too():
    flow = random_flow((2, 7, 4), 3, (3, 5))
    y = random_features((2, 7, 4), 3)
    output = flow(y)
    for y_BCHW, restored_BCHW in zip(y, flow.inverse(output.z).z, strict=True):
        torch.testing.assert_close(restored_BCHW, y_BCHW, rtol=0, atol=1e-9)


def test_channels_of_each_level_or_of_all_give_the_same_flow():
    states = []
    for channels in (6, (6, 6)):
        torch.manual_seed(3)
        states.append(CrossScaleFlow(channels, 2, 4, (3, 5), seed=2).state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("channels", [3, (5, 2)])
def test_log_determinant_is_that_of_the_jacobian(channels):
    flow = random_flow(channels, scales=2, kernel_sizes=(3, 3), hidden=4)
    y = random_features(channels, 2, batch=1, size=(2, 4))
    shapes = [y_BCHW.shape for y_BCHW in y]

    def flat_flow(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        z = flow([part.view(shape) for part, shape in zip(parts, shapes, strict=True)]).z
        return torch.cat([z_BCHW.flatten() for z_BCHW in z])

    jacobian = torch.autograd.functional.jacobian(flat_flow, torch.cat([y_BCHW.flatten() for y_BCHW in y]))
    torch.testing.assert_close(flow(y).log_det_B[0], torch.linalg.slogdet(jacobian).logabsdet)


def test_a_new_flow_is_a_permutation_with_zero_log_determinant():
    flow = CrossScaleFlow(6, 2, 8, (3,))
    y = random_features(6, 2, dtype=torch.float32)
    output = flow(y)
    for s, (y_BCHW, z_BCHW) in enumerate(zip(y, output.z, strict=True)):
        torch.testing.assert_close(z_BCHW, y_BCHW[:, flow.blocks[0].get_buffer(f"permutation_{s}")])
    assert output.log_det_B.tolist() == [0, 0, 0]


def test_a_batch_equals_its_samples_one_by_one():
    flow = random_flow(5, 3, (3, 5))
    y = random_features(5, 3)
    together = negative_log_likelihood(flow(y))
    alone = [negative_log_likelihood(flow([y_BCHW[[b]] for y_BCHW in y])) for b in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_a_dropped_hidden_channel_is_one_without_weights():
    flow, y = random_flow((4, 6), 2, (3, 1)), random_features((4, 6), 2)
    keep_BK = torch.ones(3, flow.hidden_count, dtype=torch.float64)
    torch.testing.assert_close(flow(y, keep_BK).z, flow(y).z, rtol=0, atol=0)
    last = flow.blocks[-1].subnetwork_second.enter[-1]  # the last of all hidden channels is its last one
    keep_BK[0, -1] = 0
    dropped = flow(y, keep_BK)
    with torch.no_grad():
        last.weight[-1], last.bias[-1] = 0, 0
    without = flow(y)
    for images, expected in ((slice(0, 1), without), (slice(1, 3), random_flow((4, 6), 2, (3, 1))(y))):
        for z_BCHW, expected_BCHW in zip(dropped.z, expected.z, strict=True):
            torch.testing.assert_close(z_BCHW[images], expected_BCHW[images])
    torch.testing.assert_close(dropped.log_det_B[:1], without.log_det_B[:1])


def test_permutations_are_buffers_that_differ_per_scale_and_block():
    flow = CrossScaleFlow(32, 3, 8, (3, 3))
    permutations = [value for name, value in flow.state_dict().items() if "permutation" in name]
    assert len({tuple(p.tolist()) for p in permutations}) == 6
    assert all(sorted(p.tolist()) == list(range(32)) for p in permutations)


def test_permutations_do_not_depend_on_the_global_seed():
    torch.manual_seed(5)
    first = CrossScaleFlow(16, 1, 4, (3,), seed=3).state_dict()["blocks.0.permutation_0"]
    torch.manual_seed(6)
    second = CrossScaleFlow(16, 1, 4, (3,), seed=3).state_dict()["blocks.0.permutation_0"]
    assert first.tolist() == second.tolist()


def test_sums_accumulate_in_float32_under_autocast():
    flow = random_flow(64, 2, (3,), hidden=16).float()
    y = random_features(64, 2, size=(16, 16), dtype=torch.float32)
    exact = negative_log_likelihood(flow(y))
    with torch.autocast("cpu", torch.bfloat16):
        output = flow(y)
        loss_B = negative_log_likelihood(output)
    assert output.log_det_B.dtype == loss_B.dtype == torch.float32
    torch.testing.assert_close(loss_B, exact, rtol=2e-2, atol=2e-2)
    # In bfloat16 a sum of 16384 terms would stall at 8 significant bits.
    assert len({round(v, 6) for v in output.log_det_B.tolist()}) == 3


def test_sums_of_a_flow_in_bfloat16_are_in_float32():
    flow = random_flow(6, 2).bfloat16()
    output = flow(random_features(6, 2, dtype=torch.bfloat16))
    assert output.z[0].dtype == torch.bfloat16
    sums = (output.log_det_B, flow.inverse(output.z).log_det_B, negative_log_likelihood(output))
    assert [values_B.dtype for values_B in sums] == [torch.float32] * 3


def test_a_flow_stays_on_the_device_of_its_features():
    flow = CrossScaleFlow(6, 2, 8).to("meta")
    output = flow([y_BCHW.to("meta") for y_BCHW in random_features(6, 2, dtype=torch.float32)])
    assert {tensor.device.type for tensor in (*output.z, output.log_det_B)} == {"meta"}


def test_hidden_channels_are_in_proportion_to_a_scale_s_channels_and_at_least_one():
    flow = CrossScaleFlow((3, 24, 12, 2), 4, 8, (3, 5))
    hidden = [enter.out_channels for enter in flow.blocks[0].subnetwork_first.enter]
    assert hidden == [1, 8, 4, 1]
    assert flow.hidden_count == 2 * 2 * sum(hidden)


@pytest.mark.parametrize("kernel_size", [5, 7])
def test_gradients_in_bfloat16_hold_where_a_kernel_is_larger_than_the_map(kernel_size):
    flow = random_flow(128, 2, (kernel_size,), hidden=128).float()
    y = random_features(128, 2, batch=16, size=(2, 2), dtype=torch.float32)
    gradients = []
    for is_rounded in (False, True):
        flow.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_rounded):
            output = flow(y)
        negative_log_likelihood(output).mean().backward()
        gradients.append([value.grad for value in flow.parameters()])
    for exact, rounded in zip(*gradients, strict=True):
        assert (rounded - exact).norm() <= 0.2 * exact.norm()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"channels": (4, 4), "scales": 3}, "channels must be one number for each of 3 scales"),
        ({"channels": (4, 1), "scales": 2}, "channels must be at least 2"),
        ({"channels": 1}, "channels must be at least 2"),
        ({"channels": 4, "scales": 0}, "scales must be 1 to 4"),
        ({"channels": 4, "scales": 5}, "scales must be 1 to 4"),
        ({"channels": 4, "kernel_sizes": ()}, "kernel_sizes must be one odd number per block"),
        ({"channels": 4, "kernel_sizes": (3, -1)}, "kernel_sizes must be one odd number per block"),
        ({"channels": 4, "kernel_sizes": (2,)}, "kernel_sizes must be one odd number per block"),
    ],
)
def test_impossible_flows_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        CrossScaleFlow(**setting)


@pytest.mark.parametrize(
    ("name", "cut_after", "channels", "stride"),
    [
        ("tf_efficientnet_b5", "blocks.5", 304, 32),
        ("tf_efficientnet_lite0", "blocks.5", 192, 32),
        ("resnet10t", "layer4", 512, 32),
        ("convnext_atto", "stages.3", 320, 32),
        ("regnety_002", "s4", 368, 32),
    ],
)
def test_backbone_finds_cut_channels_and_stride(name, cut_after, channels, stride):
    backbone = Backbone(name)
    assert (backbone.stages, backbone.channels, backbone.strides) == ((cut_after,), (channels,), (stride,))
    (features,) = backbone(torch.rand(2, 3, 64, 96))
    assert features.shape == (2, channels, 64 // stride, 96 // stride)


def test_backbone_drops_what_comes_after_the_cut():
    whole = Backbone("tf_efficientnet_lite0", "blocks.6")
    cut = Backbone("tf_efficientnet_lite0", "blocks.3.1")
    assert cut.strides == (16,)
    assert sum(p.numel() for p in cut.parameters()) < 0.2 * sum(p.numel() for p in whole.parameters())


def test_maps_of_several_stages_are_those_of_the_stages_alone():
    several = Backbone("tf_efficientnet_lite0", ("blocks.5", "blocks.2", "blocks.3.1"))
    assert several.stages == ("blocks.2", "blocks.3.1", "blocks.5")
    assert (several.channels, several.strides) == ((40, 80, 192), (8, 16, 32))
    published = timm.create_model("tf_efficientnet_lite0").state_dict()
    load_weights(several, published)
    image_BCHW = torch.rand(2, 3, 64, 96)
    for stage, features_BCHW in zip(several.stages, several(image_BCHW), strict=True):
        alone = Backbone("tf_efficientnet_lite0", stage)
        load_weights(alone, published)
        torch.testing.assert_close(features_BCHW, alone(image_BCHW)[0])


def test_a_backbone_that_was_proven_before_is_the_same_without_a_proof(monkeypatch):
    stages = ("layer1", "layer3")
    proven = Backbone("resnet10t", stages)
    monkeypatch.delattr("csflow.model.Backbone._prove")
    again = Backbone("resnet10t", stages, is_proven=True)
    assert (again.channels, again.strides) == (proven.channels, proven.strides) == ((64, 256), (4, 16))


def test_a_stage_within_another_is_refused():
    with pytest.raises(BackboneError, match=r"blocks\.3 holds another of the stages"):
        Backbone("tf_efficientnet_lite0", ("blocks.3", "blocks.3.1"))


@pytest.mark.parametrize(
    ("stages", "scales", "shapes"),
    [
        ("layer4", 3, [(512, 4, 8), (512, 2, 4), (512, 1, 2)]),
        (("layer2", "layer3", "layer4"), 1, [(128, 16, 32), (256, 8, 16), (512, 4, 8)]),
        (("layer3", "layer4"), 2, [(256, 8, 16), (768, 4, 8), (512, 2, 4)]),
        (("maxpool", "layer1"), 1, [(128, 32, 64)]),
    ],
)
def test_maps_of_one_reduction_are_one_level(stages, scales, shapes):
    detector = Detector(Architecture("resnet10t", (128, 256), stages, scales, 4, (3,)))
    assert detector.feature_shapes == shapes
    image_BHWC = torch.randint(0, 256, (2, 128, 256, 3), dtype=torch.uint8)
    features = detector.features(image_BHWC)
    assert [tuple(y_BCHW.shape[1:]) for y_BCHW in features] == shapes
    assert detector(image_BHWC).scale_scores_BS.shape == (2, len(shapes))


def test_a_level_holds_the_maps_of_the_larger_image_first():
    detector = Detector(Architecture("resnet10t", (128, 128), ("layer3", "layer4"), 2, 4, (3,)))
    image_BHWC = torch.randint(0, 256, (2, 128, 128, 3), dtype=torch.uint8)
    features = detector.features(image_BHWC)
    pixel_BCHW = detector._normalised(image_BHWC)
    large, small = detector.backbone(pixel_BCHW), detector.backbone(F.avg_pool2d(pixel_BCHW, 2))
    expected = [large[0], torch.cat([large[1], small[0]], dim=1), small[1]]
    torch.testing.assert_close(features, expected, rtol=0, atol=0)


def test_levels_that_do_not_double_are_refused_with_stages_that_fit():
    with pytest.raises(ValueError, match=r"reduced by 4, 16, which do not double.*layer2 \(8\), layer3"):
        Detector(Architecture("resnet10t", (128, 128), ("layer1", "layer3"), 1, 4, (3,)))


def test_backbone_stays_frozen_and_in_eval_mode():
    detector = Detector(Architecture("resnet10t", (64, 64), scales=1, hidden_channels=4, kernel_sizes=(3,)))
    before = {name: value.clone() for name, value in detector.backbone.state_dict().items()}
    detector.train()
    detector.features(torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8))
    assert not any(module.training for module in detector.backbone.modules())
    assert not any(p.requires_grad for p in detector.backbone.parameters())
    assert all(torch.equal(value, before[name]) for name, value in detector.backbone.state_dict().items())


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18.a1_in1k", "local-dir:.", "timm/resnet18", "../a"])
@pytest.mark.parametrize("use", [Backbone, download_weights])
def test_a_backbone_reaches_neither_network_nor_disk(monkeypatch, name, use):
    def reached(*_, **__):
        pytest.fail("timm was asked for it")

    monkeypatch.setattr("timm.create_model", reached)
    with pytest.raises(BackboneError, match="is not a timm model"):
        use(name)


def test_networks_that_give_no_maps_are_refused():
    with pytest.raises(BackboneError, match="'no_such_network' is not a timm model"):
        Backbone("no_such_network")
    with pytest.raises(
        BackboneError, match=r"vit_tiny_patch16_224 cannot be cut after.*its stages are blocks\.0, bl"
    ):
        Backbone("vit_tiny_patch16_224", "blocks.3.mlp")
    with pytest.raises(BackboneError, match="levit_128s gives no map"):
        Backbone("levit_128s")


def test_a_chain_that_computes_something_else_is_refused(monkeypatch):
    network = timm.create_model("resnet10t")
    forward = type(network).forward
    monkeypatch.setattr(type(network), "forward", lambda self, x: forward(self, 2 * x))
    with pytest.raises(BackboneError, match="resnet10t is no chain of convolutional layers up to layer4"):
        Backbone("resnet10t")


TRANSFORMERS = [
    ("vit_tiny_patch16_224", ("blocks.3", "blocks.11"), (192, 192), (16, 16)),
    ("vit_small_patch14_reg4_dinov2", ("blocks.11",), (384,), (14,)),
    ("vit_tiny_patch16_dinov3_qkvb", ("blocks.5", "blocks.11"), (192, 192), (16, 16)),
    ("swin_tiny_patch4_window7_224", ("layers.1", "layers.2", "layers.3"), (192, 384, 768), (8, 16, 32)),
    ("hrnet_w18_small", ("stage3", "stage4"), (512, 1024), (16, 32)),
]


@pytest.mark.parametrize(("name", "stages", "channels", "strides"), TRANSFORMERS)
def test_networks_that_are_no_chain_give_their_own_maps(name, stages, channels, strides):
    backbone = Backbone(name, stages)
    assert (backbone.stages, backbone.channels, backbone.strides) == (stages, channels, strides)
    height, width = 4 * strides[-1], 6 * strides[-1]
    maps = backbone(torch.rand(2, 3, height, width))
    expected = [(2, c, height // s, width // s) for c, s in zip(channels, strides, strict=True)]
    assert [tuple(map_BCHW.shape) for map_BCHW in maps] == expected
    assert not any(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("vit_tiny_patch16_224", 1), ("vit_small_patch14_reg4_dinov2", 5), ("vit_tiny_patch16_dinov3_qkvb", 5)],
)
def test_maps_of_a_vision_transformer_are_its_patch_tokens(name, prefix):
    network = timm.create_model(name, dynamic_img_size=True).eval()
    backbone = Backbone(name, "blocks.4")
    load_weights(backbone, network.state_dict())
    stride = backbone.strides[0]
    image_BCHW = torch.rand(2, 3, 3 * stride, 5 * stride)
    found: list[Tensor] = []
    network.blocks[4].register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.inference_mode():
        network(image_BCHW)
    tokens_BNC = found[0][:, prefix:]
    assert tokens_BNC.shape[1] == 15
    (map_BCHW,) = backbone(image_BCHW)
    for y, x in [(0, 0), (0, 4), (2, 1)]:
        torch.testing.assert_close(map_BCHW[:, :, y, x], tokens_BNC[:, 5 * y + x])


def test_maps_of_a_swin_transformer_have_their_channels_first():
    network = timm.create_model("swin_tiny_patch4_window7_224", strict_img_size=False).eval()
    backbone = Backbone("swin_tiny_patch4_window7_224", ("layers.1", "layers.2"))
    load_weights(backbone, network.state_dict())
    image_BCHW = torch.rand(1, 3, 96, 160)
    with torch.inference_mode():
        second_BHWC = network.layers[:2](network.patch_embed(image_BCHW))
        third_BHWC = network.layers[2](second_BHWC)
    expected = [second_BHWC.permute(0, 3, 1, 2), third_BHWC.permute(0, 3, 1, 2)]
    torch.testing.assert_close(backbone(image_BCHW), expected)


def test_what_lies_behind_the_deepest_block_is_left_out():
    shallow, deep = Backbone("vit_tiny_patch16_224", "blocks.2"), Backbone("vit_tiny_patch16_224")
    assert deep.stages == ("blocks.11",)
    sizes = [sum(p.numel() for p in backbone.parameters()) for backbone in (shallow, deep)]
    assert sizes[0] < 0.35 * sizes[1]


@pytest.mark.parametrize(
    ("backbone", "image_size", "scales", "message"),
    [
        ("vit_tiny_patch16_224", 250, 3, r"multiples of 64 .*nearest: 192 or 256"),
        ("vit_small_patch14_dinov2", 256, 1, r"multiples of 14 .*nearest: 252 or 266"),
        ("swin_tiny_patch4_window7_224", 224, 2, r"multiples of 64 .*nearest: 192 or 256"),
        ("maxvit_tiny_tf_224", 256, 1, r"multiples of 32 that the network takes .*nearest: 224 or 448"),
        ("test_vit_relpos", 320, 1, r"multiples of 16 that the network takes .*nearest: 160\)"),
        ("test_vit_relpos", 160, 2, r"nearest: none; choose fewer scales"),
    ],
)
def test_image_sizes_that_a_transformer_does_not_take_are_refused(backbone, image_size, scales, message):
    with pytest.raises(ValueError, match=message):
        Detector(Architecture(backbone, (image_size, image_size), None, scales, 4, (3,)))


@pytest.mark.parametrize(
    ("name", "mean", "interpolation"),
    [
        ("tf_efficientnet_b5", (0.485, 0.456, 0.406), "bicubic"),
        ("fbnetc_100", (0.485, 0.456, 0.406), "bilinear"),
        ("vit_tiny_patch16_224", (0.5, 0.5, 0.5), "bicubic"),
    ],
)
def test_images_are_prepared_as_the_network_was_trained_on_them(name, mean, interpolation):
    backbone = Backbone(name)
    assert (backbone.mean, backbone.interpolation) == (mean, interpolation)


def test_a_cut_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(BackboneError, match=r"no module layer9 .* layer1, layer2"):
        Backbone("resnet10t", "layer9")


def test_weights_with_foreign_names_load_in_order_and_others_are_refused():
    network = timm.create_model("resnet10t").eval()
    foreign = {f"_{i}": value for i, value in enumerate(network.state_dict().values())}
    backbone = Backbone("resnet10t", "layer3")
    load_weights(backbone, foreign)
    torch.testing.assert_close(backbone.layers.layer3.state_dict(), network.layer3.state_dict())
    foreign.popitem()
    with pytest.raises(BackboneError, match="not those of a resnet10t"):
        load_weights(backbone, foreign)


def test_image_sizes_that_do_not_fit_are_refused_with_those_that_do():
    with pytest.raises(
        ValueError, match=r"image size 300 does not fit.*multiples of 128 \(nearest: 256 or 384\)"
    ):
        Detector(Architecture("resnet10t", (256, 300), hidden_channels=4, kernel_sizes=(3,)))


@pytest.fixture(scope="module")
def rectangular_detector() -> Detector:
    return Detector(Architecture("resnet10t", (128, 256), hidden_channels=8, kernel_sizes=(3, 5)))


def test_detector_scores_rectangular_images_per_scale_with_a_native_map(rectangular_detector):
    image_BHWC = torch.randint(0, 256, (3, 128, 256, 3), dtype=torch.uint8)
    scores = rectangular_detector(image_BHWC)
    assert scores.anomaly_map_BHW.shape == (3, 4, 8)
    weights_S = torch.tensor([16.0, 4.0, 1.0]) / 21
    torch.testing.assert_close(scores.anomaly_score_B, (scores.scale_scores_BS * weights_S).sum(1))
    torch.testing.assert_close(scores.scale_scores_BS[:, 0], scores.anomaly_map_BHW.mean((1, 2)) / 2)
    assert torch.equal(scores.global_score_B, scores.anomaly_score_B)
    assert scores.local_score_B.isnan().all()


def test_scores_of_cached_and_live_features_are_equal(rectangular_detector):
    image_BHWC = torch.randint(0, 256, (2, 128, 256, 3), dtype=torch.uint8)
    cached = rectangular_detector.score_features(rectangular_detector.features(image_BHWC))
    live = rectangular_detector(image_BHWC)
    torch.testing.assert_close(cached, live, rtol=0, atol=0, equal_nan=True)


def test_detector_refuses_images_that_are_not_what_it_was_trained_on(rectangular_detector):
    with pytest.raises(ValueError, match="expected uint8 images"):
        rectangular_detector(torch.zeros(1, 128, 128, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="expected uint8 images"):
        rectangular_detector(torch.zeros(1, 128, 256, 3))
