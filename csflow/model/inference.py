"""The inference form: a trained detector rebuilt for scoring alone, with the same call and the same scores.

Backbone: batch norms are folded into the convolutions before them, activations fused behind them. Flow: γ is
folded into the last convolutions and there is no log-determinant. Weights are packed once on CPUs, in the
order in which oneDNN's kernels read them.

The flow's maps are *interleaved*, (H, W, B, C): the pixels of a batch at one place lie side by side. On maps
of 8 × 8 and less a convolution image by image leaves matrix units idle and multiplies padding
(docs/performance.md).

Dimension letters: B batch, C channels, H height, W width (of the scale at hand), K taps of a kernel along one
side, N columns of a product, S scales.
"""

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, cast

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from csflow.model.detector import Detector, Scores
from csflow.model.flow import LEAKY_SLOPE, SOFT_CLAMP, CouplingBlock, CrossScaleSubnetwork

Precision = Literal["float32", "mixed", "bfloat16"]
PrecisionSetting = Literal["auto", "float32", "mixed", "bfloat16"]

Activation = tuple[str, list[float]]
"""oneDNN's name of it and its constants."""

FUSED_ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
}
"""What oneDNN applies to a convolution's result while it is in registers."""
NO_ACTIVATION: Activation = ("none", [])
ONEDNN = torch.ops.mkldnn


class InferenceDetector(nn.Module):
    """Scores of a trained detector, without what only training needs."""

    def __init__(self, detector: Detector, precision: PrecisionSetting) -> None:
        """Copies what it needs of the detector, which stays as it is.

        Args:
            precision: of convolutions and matrix products; the flow's state and all sums are float32.
                `mixed` is float32 in the backbone, whose roundings the flow would take for anomalies, and
                bfloat16 in the flow; `auto` is `mixed` where the processor multiplies matrices in bfloat16.
        """
        super().__init__()
        device = detector.get_buffer("mean").device
        self.precision: Precision = _native_precision(device) if precision == "auto" else precision
        self.architecture = detector.architecture
        self.dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        self.backbone = _inference_backbone(detector.backbone.layers, self.dtype)
        flow_dtype = torch.float32 if self.precision == "float32" else torch.bfloat16
        self.blocks = nn.ModuleList(
            _InferenceBlock(cast(CouplingBlock, block), flow_dtype) for block in detector.flow.blocks
        )
        for name in ("mean", "std"):
            self.register_buffer(name, detector.get_buffer(name))

    @torch.inference_mode()
    def forward(self, image_BHWC: Tensor) -> Scores:
        """Scores of uint8 RGB images of `image_size`."""
        return self.score_features(self.features(image_BHWC))

    @torch.inference_mode()
    def features(self, image_BHWC: Tensor) -> list[Tensor]:
        """The flow's input, as `Detector.features` gives it, in the backbone's precision."""
        shape = (*self.architecture.image_size, 3)
        if image_BHWC.dtype != torch.uint8 or tuple(image_BHWC.shape[1:]) != shape:
            found = f"{image_BHWC.dtype} of {tuple(image_BHWC.shape)}"
            raise ValueError(f"expected uint8 images of shape (B, *{shape}), not {found}")
        # Permuted, NHWC pixels are an NCHW tensor in channels-last order, which every layer keeps.
        pixel_BCHW = image_BHWC.permute(0, 3, 1, 2).float()
        mean_C11 = 255 * self.get_buffer("mean")[:, None, None]
        std_C11 = 255 * self.get_buffer("std")[:, None, None]
        pixel_BCHW = pixel_BCHW.sub_(mean_C11).div_(std_C11)
        return [
            self.backbone((F.avg_pool2d(pixel_BCHW, 2**s) if s else pixel_BCHW).to(self.dtype))
            for s in range(self.architecture.scales)
        ]

    @torch.inference_mode()
    def score_features(self, y: Sequence[Tensor]) -> Scores:
        """Scores of images whose features are known."""
        z = [y_BCHW.permute(2, 3, 0, 1).float() for y_BCHW in y]
        for block in self.blocks:
            z = block(z)
        squares = [z_HWBC.square() for z_HWBC in z]
        energy_BS = torch.stack([square_HWBC.sum((0, 1, 3)) for square_HWBC in squares], dim=1)
        sizes_S = torch.tensor([z_HWBC[:, :, 0].numel() for z_HWBC in z], device=energy_BS.device)
        return Scores(
            anomaly_score_B=energy_BS.sum(1) / sizes_S.sum() / 2,
            scale_scores_BS=energy_BS / sizes_S / 2,
            anomaly_map_BHW=squares[0].mean(3).permute(2, 0, 1),
        )


def _native_precision(device: torch.device) -> Precision:
    if device.type == "cuda":
        multiplies_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        multiplies_bfloat16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "mixed" if multiplies_bfloat16 else "float32"


class _InferenceBlock(nn.Module):
    """`CouplingBlock` on (H, W, B, C) float32 maps, without the log-determinant."""

    def __init__(self, block: CouplingBlock, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = block.halves[0]
        self.permutations = [name for name, _ in block.named_buffers(recurse=False)]
        for name in self.permutations:
            self.register_buffer(name, block.get_buffer(name))
        self.subnetwork_first = _InferenceSubnetwork(block.subnetwork_first, dtype)
        self.subnetwork_second = _InferenceSubnetwork(block.subnetwork_second, dtype)

    def forward(self, y: Sequence[Tensor]) -> list[Tensor]:
        # The order within a half could be folded into the weights; which channels share a half could not.
        permuted = [
            y_HWBC.index_select(3, self.get_buffer(name))
            for y_HWBC, name in zip(y, self.permutations, strict=True)
        ]
        first = [x_HWBC[..., : self.first] for x_HWBC in permuted]
        second = [x_HWBC[..., self.first :] for x_HWBC in permuted]
        _transform_(first, self.subnetwork_first(second))
        _transform_(second, self.subnetwork_second(first))
        return permuted


def _transform_(x: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    """x · exp(σ(s)) + t in place, on every scale."""
    for x_HWBC, parameters_HWBC in zip(x, parameters, strict=True):
        scaling_HWBC, shift_HWBC = parameters_HWBC.chunk(2, dim=3)
        clamped_HWBC = scaling_HWBC.div(SOFT_CLAMP).atan_().mul_(SOFT_CLAMP * 0.636)
        x_HWBC.mul_(clamped_HWBC.exp_()).add_(shift_HWBC)


class _InferenceSubnetwork(nn.Module):
    """`CrossScaleSubnetwork` on interleaved maps, with γ in the weights of its second layer."""

    def __init__(self, trained: CrossScaleSubnetwork, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.scales = len(trained.enter)
        gamma_S = trained.gamma_S.detach()
        leaky = ("leaky_relu", [LEAKY_SLOPE])
        self.enter = nn.ModuleList(
            _InterleavedConvolution(*_parameters(convolution), leaky, dtype) for convolution in trained.enter
        )
        self.same = nn.ModuleList(
            _InterleavedConvolution(*_parameters(convolution, gamma), NO_ACTIVATION, dtype)
            for convolution, gamma in zip(trained.same, gamma_S, strict=True)
        )
        self.down = nn.ModuleList(
            _DownConvolution(*_parameters(convolution, gamma), dtype)
            for convolution, gamma in zip(trained.down, gamma_S[1:], strict=True)
        )
        self.up = nn.ModuleList(
            _UpConvolution(*_parameters(convolution, gamma), dtype)
            for convolution, gamma in zip(trained.up, gamma_S[:-1], strict=True)
        )

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        """Scaling and shift (H, W, B, 2 · half) of each scale, given the other half (H, W, B, half)."""
        hidden = [
            enter(x_HWBC.to(self.dtype).contiguous()) for enter, x_HWBC in zip(self.enter, x, strict=True)
        ]
        out = []
        for s, hidden_HWBC in enumerate(hidden):
            out_HWBC = self.same[s](hidden_HWBC).float()
            if s > 0:
                out_HWBC += self.down[s - 1](hidden[s - 1])
            if s + 1 < self.scales:
                out_HWBC += self.up[s](hidden[s + 1])
            out.append(out_HWBC)
        return out


def _parameters(convolution: nn.Module, scale: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Weight (out, in, k, k) and bias of a trained convolution, times a scalar."""
    convolution = cast(nn.Conv2d, convolution)
    return convolution.weight.detach() * scale, cast(Tensor, convolution.bias).detach() * scale


class _InterleavedConvolution(nn.Module):
    """A convolution of stride 1 with its activation, on interleaved maps (H, W, B, C).

    For a kernel, a row of interleaved maps is one row of W · B pixels in which an image's neighbours are B
    apart: a convolution of dilation B. oneDNN leaves out multiplications with the padding.
    """

    def __init__(self, weight: Tensor, bias: Tensor, activation: Activation, dtype: torch.dtype) -> None:
        super().__init__()
        self.reach = weight.shape[2] // 2
        self.kernel = _Kernel(weight, bias, activation, dtype)

    def forward(self, x_HWBC: Tensor) -> Tensor:
        batch = x_HWBC.shape[2]
        x_1CHW = x_HWBC.flatten(1, 2).permute(2, 0, 1).unsqueeze(0)
        y_1CHW = self.kernel(x_1CHW, (self.reach, self.reach * batch), (1, batch))
        return cast(Tensor, y_1CHW[0].permute(1, 2, 0).unflatten(1, (-1, batch)))


class _DownConvolution(nn.Module):
    """A convolution of stride 2 on interleaved maps (H, W, B, C), as one matrix product."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.kernel_size = weight.shape[2]
        # As `F.pad` wants it, from the last dimension on: channels, batch, width, height.
        self.padding = [0, 0, 0, 0] + 4 * [self.kernel_size // 2]
        self.product = _MatrixProduct(weight.permute(0, 2, 3, 1).flatten(1), bias, dtype)

    def forward(self, x_HWBC: Tensor) -> Tensor:
        windows = F.pad(x_HWBC, self.padding).unfold(0, self.kernel_size, 2).unfold(1, self.kernel_size, 2)
        # (H, W, B, C, k, k) to (H, W, B, k · k · C)
        return cast(Tensor, self.product(windows.permute(0, 1, 2, 4, 5, 3).flatten(3)))


class _UpConvolution(nn.Module):
    """Bilinear upsampling by 2 and a convolution behind it, on interleaved maps (H, W, B, C).

    Both are linear, so the weights go first, where there are a quarter of the pixels: each pixel gives its
    contribution through each of the k · k taps. Then two small products, along height and width, interpolate
    the contributions, move them to where their tap puts them and add them up.
    """

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.kernel_size = weight.shape[2]
        weight_NC = weight.permute(2, 3, 0, 1).flatten(0, 2)
        self.product = _MatrixProduct(weight_NC, None, dtype)
        self.bias = nn.Buffer(bias.float())

    def forward(self, x_HWBC: Tensor) -> Tensor:
        height, width, batch, _ = x_HWBC.shape
        k = self.kernel_size
        taps_HWBKKC = self.product(x_HWBC).unflatten(3, (k, k, -1))
        taps_HKWKBC = taps_HWBKKC.permute(0, 3, 1, 4, 2, 5).float()
        vertical = _upsampled_taps(height, k).to(taps_HKWKBC)
        horizontal = _upsampled_taps(width, k).to(taps_HKWKBC)
        tall = (vertical @ taps_HKWKBC.reshape(height * k, -1)).view(2 * height, width * k, -1)
        wide = (horizontal @ tall).view(2 * height, 2 * width, batch, -1)
        return wide + self.bias


@lru_cache
def _upsampled_taps(size: int, kernel_size: int) -> Tensor:
    """The matrix (2 · size, size · k) from contributions through taps to where they arrive when upsampled."""
    reach = kernel_size // 2
    identity = torch.eye(size)[None]
    doubled = F.interpolate(identity, scale_factor=2, mode="linear", align_corners=False)[0].T
    padded = F.pad(doubled, (0, 0, reach, reach))
    return torch.stack([padded[tap : tap + 2 * size] for tap in range(kernel_size)], dim=2).flatten(1)


class _Kernel(nn.Module):
    """A convolution and its activation: on CPUs oneDNN's, whatever PyTorch's heuristics would choose.

    They take single-threaded convolutions in float32 to matrix products of rearranged copies.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        activation: Activation,
        dtype: torch.dtype,
        stride: tuple[int, ...] = (1, 1),
        groups: int = 1,
        is_packed: bool = True,
    ) -> None:
        super().__init__()
        self.activation, self.constants = activation
        self.stride, self.groups = stride, groups
        self.is_onednn = _has_onednn(weight)
        self.is_packed = self.is_onednn and is_packed
        weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
        if self.is_packed:
            padding = [size // 2 for size in weight.shape[2:]]
            weight = ONEDNN._reorder_convolution_weight(weight, padding, stride, (1, 1), groups, None)
        self.weight = nn.Buffer(weight)
        self.bias = nn.Buffer(bias.to(dtype))

    def forward(self, x_BCHW: Tensor, padding: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
        where = (padding, self.stride, dilation, self.groups)
        if self.is_packed:
            fused = (self.activation, self.constants, "")
            y_BCHW = ONEDNN._convolution_pointwise(x_BCHW, self.weight, self.bias, *where, *fused)
            return cast(Tensor, y_BCHW)
        if self.is_onednn:
            y_BCHW = torch.mkldnn_convolution(x_BCHW, self.weight, self.bias, *where)
        else:
            y_BCHW = F.conv2d(x_BCHW, self.weight, self.bias, self.stride, padding, dilation, self.groups)
        return _activate(y_BCHW, self.activation, self.constants)


class _MatrixProduct(nn.Module):
    """`nn.Linear`, on CPUs with packed weights in bfloat16."""

    def __init__(self, weight_NC: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.is_packed = dtype == torch.bfloat16 and _has_onednn(weight_NC)
        weight_NC = weight_NC.to(dtype).contiguous()
        self.weight = nn.Buffer(ONEDNN._reorder_linear_weight(weight_NC) if self.is_packed else weight_NC)
        self.bias = None if bias is None else nn.Buffer(bias.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.is_packed:
            return cast(Tensor, ONEDNN._linear_pointwise(x, self.weight, self.bias, *NO_ACTIVATION, ""))
        return F.linear(x, self.weight, self.bias)


class _BackboneConvolution(nn.Module):
    """A convolution of the backbone, with the batch norm and the activation behind it."""

    def __init__(
        self, trained: nn.Conv2d, weight: Tensor, bias: Tensor, activation: Activation, dtype: torch.dtype
    ) -> None:
        super().__init__()
        # timm's convolutions with TensorFlow's padding say how much only when they see the image.
        self.pads_like_tensorflow = isinstance(trained, Conv2dSame)
        self.padding = (0, 0) if self.pads_like_tensorflow else cast(tuple[int, int], trained.padding)
        self.kernel_size, self.stride, self.dilation = trained.kernel_size, trained.stride, trained.dilation
        # In float32, packed weights gain nothing on large maps, and were four times as slow on Xeons.
        is_packed = dtype == torch.bfloat16
        self.kernel = _Kernel(weight, bias, activation, dtype, trained.stride, trained.groups, is_packed)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.pads_like_tensorflow:
            x_BCHW = pad_same(x_BCHW, list(self.kernel_size), list(self.stride), list(self.dilation))
        return cast(Tensor, self.kernel(x_BCHW, self.padding, self.dilation))


def _has_onednn(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and torch.backends.mkldnn.is_available()


def _activate(x: Tensor, activation: str, constants: Sequence[float]) -> Tensor:
    match activation:
        case "relu":
            return F.relu_(x)
        case "hardtanh":
            return F.hardtanh_(x, *constants)
        case "swish":
            return F.silu(x, inplace=True)
        case "leaky_relu":
            return F.leaky_relu_(x, *constants)
    return x


class _Tracer(fx.Tracer):
    """Opens timm's blocks down to convolutions and batch norms, which stay whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def _inference_backbone(layers: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The backbone with each convolution, the batch norm and the activation behind it as one module.

    What follows what is read off the traced graph; the order of registration does not prove it.
    """
    layers = copy.deepcopy(layers)
    try:
        traced = fx.GraphModule(layers, _Tracer().trace(layers))
    except (fx.proxy.TraceError, TypeError):
        # Its forward pass branches on its input. Such networks (ConvNeXt) have few batch norms to fold.
        return layers.to(dtype=dtype).to(memory_format=torch.channels_last)
    for node in list(traced.graph.nodes):
        if isinstance(_module(traced, node), nn.Conv2d):
            _fuse(traced, node, dtype)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced.to(dtype=dtype)


def _fuse(traced: fx.GraphModule, node: fx.Node, dtype: torch.dtype) -> None:
    """Replaces a convolution and what can be fused behind it."""
    convolution = cast(nn.Conv2d, _module(traced, node))
    weight, bias = convolution.weight, convolution.bias
    activation: Activation | None = None
    while activation is None and len(node.users) == 1:
        follower = next(iter(node.users))
        module = _module(traced, follower)
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            weight, bias = fuse_conv_bn_weights(
                weight, bias, module.running_mean, module.running_var, module.eps, module.weight, module.bias
            )
            act = getattr(module, "act", nn.Identity())  # of timm's BatchNormAct2d
            if type(act) is not nn.Identity:
                activation = FUSED_ACTIVATIONS.get(type(act))
                if activation is None:
                    traced.add_submodule(str(follower.target), act)
                    break
        elif module is not None and type(module) in FUSED_ACTIVATIONS:
            activation = FUSED_ACTIVATIONS[type(module)]
        elif type(module) is not nn.Identity:
            break
        follower.replace_all_uses_with(node)
        traced.graph.erase_node(follower)
    if bias is None:
        bias = weight.new_zeros(len(weight))
    fused = _BackboneConvolution(
        convolution, weight.detach(), bias.detach(), activation or NO_ACTIVATION, dtype
    )
    traced.add_submodule(str(node.target), fused)


def _module(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None
