"""The inference form: a trained detector rebuilt for scoring alone, with the same call and the same scores.

Backbone: batch norms are folded into the convolutions before them, activations fused behind them. Flow: γ is
folded into the last convolutions and there is no log-determinant. bfloat16 weights are packed once on CPUs,
in the order in which oneDNN's kernels read them.

The flow's convolutions see the images of a batch side by side, as one wide *strip* with columns of zeros
in between: maps of 8 × 8 and less leave matrix units idle, a strip of them does not (docs/performance.md).

Dimension letters: B batch, C channels, H height, W width (of the scale at hand), P pitch: W and the gap to
the next image of the strip, S scales.
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

FUSED_ACTIVATIONS: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
}
"""What oneDNN applies to a convolution's result while it is in registers."""


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
        # Height outermost, so that the rows of a strip are contiguous.
        z = [y_BCHW.permute(2, 0, 3, 1).float() for y_BCHW in y]
        for block in self.blocks:
            z = block(z)
        squares = [z_HBWC.square() for z_HBWC in z]
        energy_BS = torch.stack([square_HBWC.sum((0, 2, 3)) for square_HBWC in squares], dim=1)
        sizes_S = torch.tensor([z_HBWC[:, 0].numel() for z_HBWC in z], device=energy_BS.device)
        return Scores(
            anomaly_score_B=energy_BS.sum(1) / sizes_S.sum() / 2,
            scale_scores_BS=energy_BS / sizes_S / 2,
            anomaly_map_BHW=squares[0].mean(3).transpose(0, 1),
        )


def _native_precision(device: torch.device) -> Precision:
    if device.type == "cuda":
        return "mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "mixed" if torch.cpu._is_amx_tile_supported() else "float32"


class _InferenceBlock(nn.Module):
    """`CouplingBlock` on (H, B, W, C) float32 maps, without the log-determinant."""

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
            y_HBWC.index_select(3, self.get_buffer(name))
            for y_HBWC, name in zip(y, self.permutations, strict=True)
        ]
        first = [x_HBWC[..., : self.first] for x_HBWC in permuted]
        second = [x_HBWC[..., self.first :] for x_HBWC in permuted]
        _transform_(first, self.subnetwork_first(second))
        _transform_(second, self.subnetwork_second(first))
        return permuted


def _transform_(x: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    """x · exp(σ(s)) + t in place, on every scale."""
    for x_HBWC, parameters_HBWC in zip(x, parameters, strict=True):
        scaling_HBWC, shift_HBWC = parameters_HBWC.chunk(2, dim=3)
        clamped_HBWC = scaling_HBWC.div(SOFT_CLAMP).atan_().mul_(SOFT_CLAMP * 0.636)
        x_HBWC.mul_(clamped_HBWC.exp_()).add_(shift_HBWC)


class _InferenceSubnetwork(nn.Module):
    """`CrossScaleSubnetwork` on strips, with γ in the weights of its second layer."""

    def __init__(self, trained: CrossScaleSubnetwork, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.scales = len(trained.enter)
        self.reach = cast(nn.Conv2d, trained.enter[0]).kernel_size[0] // 2
        gamma_S = trained.gamma_S.detach()
        leaky = ("leaky_relu", [LEAKY_SLOPE])
        none: tuple[str, list[float]] = ("none", [])

        def scaled(convolution: nn.Module, gamma: Tensor) -> Convolution:
            convolution = cast(nn.Conv2d, convolution)
            weight, bias = (
                convolution.weight.detach() * gamma,
                cast(Tensor, convolution.bias).detach() * gamma,
            )
            return Convolution(convolution, weight, bias, none, dtype)

        self.enter = nn.ModuleList(
            Convolution(
                convolution,
                convolution.weight.detach(),
                cast(Tensor, convolution.bias).detach(),
                leaky,
                dtype,
            )
            for convolution in cast(Sequence[nn.Conv2d], trained.enter)
        )
        self.same = nn.ModuleList(map(scaled, trained.same, gamma_S))
        self.down = nn.ModuleList(map(scaled, trained.down, gamma_S[1:]))
        self.up = nn.ModuleList(map(scaled, trained.up, gamma_S))

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        """Scaling and shift (H, B, W, 2 · half) of each scale, given the other half (H, B, W, half)."""
        hidden = []
        for s, x_HBWC in enumerate(x):
            height, batch, width, channels = x_HBWC.shape
            strip_HBPC = x_HBWC.new_zeros(height, batch, width + self._gap(s), channels, dtype=self.dtype)
            strip_HBPC[:, :, :width] = x_HBWC
            hidden_HBPC = self._convolve(self.enter[s], strip_HBPC)
            hidden_HBPC[:, :, width:] = 0
            hidden.append(hidden_HBPC)
        out = []
        for s, hidden_HBPC in enumerate(hidden):
            width = x[s].shape[2]
            out_HBWC = self._convolve(self.same[s], hidden_HBPC)[:, :, :width].float()
            if s > 0:
                out_HBWC += self._convolve(self.down[s - 1], hidden[s - 1])[:, :, :width]
            if s + 1 < self.scales:
                pitches = (hidden[s + 1].shape[2], hidden_HBPC.shape[2])
                upsampled_HBPC = _upsample(hidden[s + 1], width // 2, pitches)
                out_HBWC += self._convolve(self.up[s], upsampled_HBPC)[:, :, :width]
            out.append(out_HBWC)
        return out

    def _gap(self, scale: int) -> int:
        """Columns of zeros between images: what a kernel reaches; even where a stride of 2 follows."""
        return self.reach + self.reach % 2 if scale + 1 < self.scales else self.reach

    @staticmethod
    def _convolve(convolution: nn.Module, strip_HBPC: Tensor) -> Tensor:
        batch = strip_HBPC.shape[1]
        strip_1CHW = strip_HBPC.flatten(1, 2).permute(2, 0, 1).unsqueeze(0)
        out_HWC = convolution(strip_1CHW)[0].permute(1, 2, 0)
        return cast(Tensor, out_HWC.unflatten(1, (batch, -1)))


def _upsample(strip_HBPC: Tensor, width: int, pitches: tuple[int, int]) -> Tensor:
    """Bilinear upsampling by 2 of a strip of maps `width` wide; gaps are zero."""
    height, batch, _, channels = strip_HBPC.shape
    vertical = _interpolation(height, (height, 2 * height)).to(strip_HBPC)
    horizontal = _interpolation(width, pitches).to(strip_HBPC)
    tall_HX = vertical @ strip_HBPC.reshape(height, -1)
    wide = horizontal @ tall_HX.view(2 * height * batch, pitches[0], channels)
    return wide.view(2 * height, batch, pitches[1], channels)


@lru_cache
def _interpolation(size: int, padded: tuple[int, int]) -> Tensor:
    """The matrix (padded[1], padded[0]) that doubles `size` samples linearly; what is beyond them is zero."""
    identity = torch.eye(size)[None]
    doubled = F.interpolate(identity, scale_factor=2, mode="linear", align_corners=False)[0].T
    return F.pad(doubled, (0, padded[0] - size, 0, padded[1] - 2 * size))


class Convolution(nn.Module):
    """A convolution with its activation; on CPUs one oneDNN kernel with weights packed for it."""

    def __init__(
        self,
        trained: nn.Conv2d,
        weight: Tensor,
        bias: Tensor,
        activation: tuple[str, list[float]],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.stride, self.dilation, self.groups = trained.stride, trained.dilation, trained.groups
        # timm's convolutions with TensorFlow's padding say how much only when they see the image.
        self.pads_like_tensorflow = isinstance(trained, Conv2dSame)
        self.padding = (0, 0) if self.pads_like_tensorflow else cast(tuple[int, int], trained.padding)
        self.kernel_size = trained.kernel_size
        self.activation, self.constants = activation
        # In float32, oneDNN takes packed weights to kernels four times as slow.
        is_cpu_bfloat16 = weight.device.type == "cpu" and dtype == torch.bfloat16
        self.is_packed = is_cpu_bfloat16 and torch.backends.mkldnn.is_available()
        weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
        if self.is_packed:
            weight = torch.ops.mkldnn._reorder_convolution_weight(
                weight, self.padding, self.stride, self.dilation, self.groups, None
            )
        self.weight = nn.Buffer(weight)
        self.bias = nn.Buffer(bias.to(dtype))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.pads_like_tensorflow:
            x_BCHW = pad_same(x_BCHW, list(self.kernel_size), list(self.stride), list(self.dilation))
        if self.is_packed:
            return cast(
                Tensor,
                torch.ops.mkldnn._convolution_pointwise(
                    x_BCHW,
                    self.weight,
                    self.bias,
                    self.padding,
                    self.stride,
                    self.dilation,
                    self.groups,
                    self.activation,
                    self.constants,
                    "",
                ),
            )
        y_BCHW = F.conv2d(
            x_BCHW, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups
        )
        return _activate(y_BCHW, self.activation, self.constants)


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
    activation: tuple[str, list[float]] | None = None
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
    fused = Convolution(convolution, weight.detach(), bias.detach(), activation or ("none", []), dtype)
    traced.add_submodule(str(node.target), fused)


def _module(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None
