"""timm's inverted residual blocks as three Triton kernels each, for GPUs.

Batch norms are folded into the convolutions before them. Of EfficientNets and MobileNets these blocks are
nearly the whole network; other networks stay as they are.

Dimension letters: B batch, C channels, H height, W width, K kernel rows or columns, N output channels.
"""

import copy
from typing import Any, NamedTuple, TypeVar, cast

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual, SqueezeExcite
from torch import Tensor, nn

from csflow.model.triton_kernels import CHANNEL_MULTIPLE, depthwise, pointwise

ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Identity: "none",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
}
"""Names of the kernels' activations."""

Module = TypeVar("Module", bound=nn.Module)


def with_fused_blocks(network: Module) -> Module:
    """A copy of the network with `FusedBlock`s in place of those blocks that can be fused."""
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            layers = _layers(child)
            if layers is not None:
                setattr(parent, name, FusedBlock(child, layers))
    return network


class Layers(NamedTuple):
    """A block's convolutions, each with the norm and the activation behind it."""

    expand: tuple[nn.Conv2d, BatchNormAct2d] | None
    """Makes more channels of each pixel; some blocks have none."""
    middle: tuple[nn.Conv2d, BatchNormAct2d]
    """Convolves each channel by itself."""
    project: tuple[nn.Conv2d, BatchNormAct2d]
    """Makes the channels of the block's result."""


class FusedBlock(nn.Module):
    """Expands the channels, convolves each by itself, scales them, and projects them back."""

    def __init__(self, block: Any, layers: Layers) -> None:
        super().__init__()
        self.expand = None if layers.expand is None else _Pointwise(*layers.expand)
        self.depthwise = _Depthwise(*layers.middle)
        self.project = _Pointwise(*layers.project)
        self.squeeze = None if isinstance(block.se, nn.Identity) else block.se
        self.has_skip: bool = block.has_skip

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        if self.expand is not None:
            y_BCHW = self.expand(y_BCHW)
        y_BCHW, mean_BC = self.depthwise(y_BCHW, self.squeeze is not None)
        gate_BC = None if self.squeeze is None else self._gate(mean_BC)
        return cast(Tensor, self.project(y_BCHW, gate_BC, x_BCHW if self.has_skip else None))

    def _gate(self, mean_BC: Tensor) -> Tensor:
        squeeze = cast(Any, self.squeeze)
        hidden = squeeze.act1(squeeze.conv_reduce(mean_BC[:, :, None, None]))
        return squeeze.gate(squeeze.conv_expand(hidden)).flatten(1).float()


class _Pointwise(nn.Module):
    def __init__(self, convolution: nn.Conv2d, norm: BatchNormAct2d) -> None:
        super().__init__()
        weight, bias = _folded(convolution, norm)
        self.weight_NC = nn.Buffer(weight.flatten(1).to(convolution.weight.dtype).contiguous())
        self.bias_N = nn.Buffer(bias)
        self.activation = ACTIVATIONS[type(norm.act)]

    def forward(
        self, x_BCHW: Tensor, gate_BC: Tensor | None = None, residual_BCHW: Tensor | None = None
    ) -> Tensor:
        return pointwise(x_BCHW, self.weight_NC, self.bias_N, self.activation, gate_BC, residual_BCHW)


class _Depthwise(nn.Module):
    def __init__(self, convolution: nn.Conv2d, norm: BatchNormAct2d) -> None:
        super().__init__()
        weight, bias = _folded(convolution, norm)
        self.weight_KKC = nn.Buffer(weight.squeeze(1).permute(1, 2, 0).contiguous())
        self.bias_C = nn.Buffer(bias)
        self.activation = ACTIVATIONS[type(norm.act)]
        self.stride = convolution.stride[0]
        # None: what TensorFlow calls "same", which depends on the size of the map.
        self.padding = None if isinstance(convolution, Conv2dSame) else cast(int, convolution.padding[0])

    def forward(self, x_BCHW: Tensor, with_means: bool) -> tuple[Tensor, Tensor | None]:
        padding = (*self._edges(x_BCHW.shape[2]), *self._edges(x_BCHW.shape[3]))
        return depthwise(
            x_BCHW, self.weight_KKC, self.bias_C, self.activation, self.stride, padding, with_means
        )

    def _edges(self, size: int) -> tuple[int, int]:
        if self.padding is not None:
            return self.padding, self.padding
        missing = max((-(-size // self.stride) - 1) * self.stride + len(self.weight_KKC) - size, 0)
        return missing // 2, missing - missing // 2


@torch.no_grad()
def _folded(convolution: nn.Conv2d, norm: BatchNormAct2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution with the norm behind it, float32."""
    mean_N, variance_N = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    scale_N = norm.weight.float() * (variance_N.float() + norm.eps).rsqrt()
    bias_N = norm.bias.float() - mean_N.float() * scale_N
    if convolution.bias is not None:
        bias_N = bias_N + convolution.bias.float() * scale_N
    return convolution.weight.float() * scale_N[:, None, None, None], bias_N


def _layers(block: Any) -> Layers | None:
    """The layers of a block, if it has no others and the kernels can compute them."""
    if type(block) is InvertedResidual:
        layers = Layers((block.conv_pw, block.bn1), (block.conv_dw, block.bn2), (block.conv_pwl, block.bn3))
    elif type(block) is DepthwiseSeparableConv:
        layers = Layers(None, (block.conv_dw, block.bn1), (block.conv_pw, block.bn2))
    else:
        return None
    is_plain = block.conv_s2d is None and isinstance(block.aa, nn.Identity)
    is_squeezed = isinstance(block.se, nn.Identity) or type(block.se) is SqueezeExcite
    is_known = _is_depthwise(layers.middle[0]) and all(
        type(norm) is BatchNormAct2d
        and type(norm.act) in ACTIVATIONS
        and norm.num_features % CHANNEL_MULTIPLE == 0
        and (convolution is layers.middle[0] or _is_pointwise(convolution))
        for convolution, norm in filter(None, layers)
    )
    return layers if is_plain and is_squeezed and is_known else None


def _is_pointwise(convolution: nn.Conv2d) -> bool:
    return convolution.kernel_size == convolution.stride == (1, 1) and convolution.groups == 1


def _is_depthwise(convolution: nn.Conv2d) -> bool:
    pairs = [convolution.kernel_size, convolution.stride]
    if not isinstance(convolution, Conv2dSame):
        pairs.append(cast(tuple[int, int], convolution.padding))
    return (
        convolution.groups == convolution.in_channels == convolution.out_channels
        and convolution.dilation == (1, 1)
        and all(rows == columns for rows, columns in pairs)
    )
