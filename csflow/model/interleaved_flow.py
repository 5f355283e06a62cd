"""The flow for scoring on CPUs: γ folded into the last convolutions, no log-determinant, packed weights.

Maps are *interleaved*, (H, W, B, C): the pixels of a batch at one place lie side by side. On maps of 8 × 8
and less, a convolution per image would leave matrix units idle and multiply padding (docs/performance.md).

Dimension letters: B batch, C channels, H height, W width (of the scale at hand), K taps of a kernel along one
side, N columns of a product, P positions, S scales.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csflow.model.flow import LEAKY_SLOPE, SOFT_CLAMP, CouplingBlock, CrossScaleFlow, CrossScaleSubnetwork
from csflow.model.statistic import window_means
from csflow.model.whitening import Gaussians, PositionGaussian, Whitening

Activation = tuple[str, list[float]]
"""The activation that oneDNN applies to a result in registers: its name and its constants."""
NO_ACTIVATION: Activation = ("none", [])
LEAKY: Activation = ("leaky_relu", [LEAKY_SLOPE])
MapSize = tuple[int, int, int]
"""Batch, height and width of a scale's maps."""
ONEDNN = torch.ops.mkldnn
HAS_ONEDNN = torch.backends.mkldnn.is_available()


class InterleavedFlow(nn.Module):
    """Computes energy maps from features: `detector.energies` without what only training needs."""

    def __init__(
        self,
        gaussians: Gaussians | None,
        flow: CrossScaleFlow,
        latent_window: int,
        dtype: torch.dtype,
        sizes: Sequence[MapSize],
    ) -> None:
        """Without a whitening, maps may have any size; these sizes are fastest.

        Args:
            dtype: of convolutions and matrix products; the flow's state and all sums are float32.
            sizes: of each scale's maps.
        """
        super().__init__()
        self.latent_window = latent_window
        self.blocks = nn.ModuleList(
            _InterleavedBlock(cast(CouplingBlock, block), dtype, sizes) for block in flow.blocks
        )
        self.gaussians: _InterleavedGaussians | None = None
        if gaussians is not None:
            # The order of channels that the first block wants: one pass over memory permutes and transposes.
            orders = [self._block(0).get_buffer(name) for name in self._block(0).permutations]
            self.gaussians = _InterleavedGaussians(gaussians, orders, latent_window == 1, dtype)

    def _block(self, number: int) -> "_InterleavedBlock":
        return cast(_InterleavedBlock, self.blocks[number])

    def forward(self, y: Sequence[Tensor]) -> list[Tensor]:
        x = [y_BCHW.permute(2, 3, 0, 1).float() for y_BCHW in y]
        if self.gaussians is None:
            return self._energy_maps([], self._latents(self._block(0).ordered(x)))
        x = self.gaussians.whitening(x)
        # The blocks write in place of their input: it is read first.
        read = self.gaussians.positions(x)
        z = self._latents(x)
        return self._energy_maps(read, self.gaussians.latents(z) if self.gaussians.latents else z)

    def _latents(self, z: list[Tensor]) -> list[Tensor]:
        """Latents of maps whose channels are in the order of the first block; overwrites the maps."""
        for number in range(len(self.blocks)):
            z = self._block(number)(z if number == 0 else self._block(number).ordered(z))
        return z

    def _energy_maps(self, read: Sequence[Tensor], latents: Sequence[Tensor]) -> list[Tensor]:
        """As `detector.energies_of`, given what the Gaussian reads."""
        means = [_window_means(z_HWBC, self.latent_window) for z_HWBC in latents]
        return [x_HWBC.square().mean(3).permute(2, 0, 1) for x_HWBC in [*read, *means]]


def _window_means(z_HWBC: Tensor, window: int) -> Tensor:
    """As `statistic.window_means`. All images and channels are channels of one image."""
    z_1CHW = z_HWBC.flatten(2).permute(2, 0, 1).unsqueeze(0)
    return window_means(z_1CHW, window)[0].permute(1, 2, 0).view_as(z_HWBC)


class _InterleavedGaussians(nn.Module):
    """`Gaussians` on (H, W, B, C) maps.

    The whitening takes channels in the order of the features and gives them in `orders`. Blocks return the
    order that their trained form returns.
    """

    def __init__(
        self, gaussians: Gaussians, orders: Sequence[Tensor], reads_last: bool, dtype: torch.dtype
    ) -> None:
        """`reads_last` tells whether scores are of latents behind the last layer."""
        super().__init__()
        self.whitening = _InterleavedWhitening(gaussians.whitening, orders)
        self.positions = _InterleavedGaussian(gaussians.positions, orders, dtype)
        self.latents: _InterleavedGaussian | None = None
        if reads_last:
            as_trained = map(torch.arange, map(len, orders))
            self.latents = _InterleavedGaussian(gaussians.latents, as_trained, dtype)


class _InterleavedWhitening(nn.Module):
    """`Whitening` on (H, W, B, C) maps, with the means in a bias; it also reorders the channels."""

    def __init__(self, whitening: Whitening, orders: Sequence[Tensor]) -> None:
        super().__init__()
        self.levels = range(whitening.levels)
        for level, order_C in enumerate(orders):
            matrix_CC = whitening.matrix(level)[order_C][:, order_C]
            mean_HWC = whitening.mean(level)[order_C].permute(1, 2, 0)
            self.register_buffer(f"order_{level}", order_C)
            self.register_buffer(f"matrix_{level}", matrix_CC)
            self.register_buffer(f"bias_{level}", -(mean_HWC @ matrix_CC.T).unsqueeze(2))
        self.region = whitening.region.interleaved(whitening.levels)

    def forward(self, y: Sequence[Tensor]) -> list[Tensor]:
        whitened = []
        for level, y_HWBC in zip(self.levels, y, strict=True):
            ordered_HWBC = y_HWBC.index_select(3, self.get_buffer(f"order_{level}"))
            x_HWBC = F.linear(ordered_HWBC, self.get_buffer(f"matrix_{level}"))
            x_HWBC.add_(self.get_buffer(f"bias_{level}"))
            whitened.append(self.region.only(x_HWBC, level))
        return whitened


class _InterleavedGaussian(nn.Module):
    """`PositionGaussian` on (H, W, B, C) maps with channels in this order, as a product per position."""

    def __init__(self, gaussian: PositionGaussian, orders: Iterable[Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.levels = range(len(gaussian.positions))
        for level, order_C in enumerate(orders):
            matrix_PCC = gaussian.matrix(level)[:, :, order_C].mT.to(dtype)
            self.register_buffer(f"matrix_{level}", matrix_PCC.contiguous())

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        """The whitened float32 maps, in the given shapes and with the trained form's order of channels."""
        products = []
        for level, x_HWBC in zip(self.levels, x, strict=True):
            x_PBC = x_HWBC.flatten(0, 1).to(self.dtype)
            products.append((x_PBC @ self.get_buffer(f"matrix_{level}")).float().view_as(x_HWBC))
        return products


class _InterleavedBlock(nn.Module):
    """`CouplingBlock` on (H, W, B, C) float32 maps, without the log-determinant."""

    def __init__(self, block: CouplingBlock, dtype: torch.dtype, sizes: Sequence[MapSize]) -> None:
        super().__init__()
        self.halves = block.halves
        self.permutations = [name for name, _ in block.named_buffers(recurse=False)]
        for name in self.permutations:
            self.register_buffer(name, block.get_buffer(name))
        self.subnetwork_first = _InterleavedSubnetwork(block.subnetwork_first, dtype, sizes)
        self.subnetwork_second = _InterleavedSubnetwork(block.subnetwork_second, dtype, sizes)

    def ordered(self, y: Sequence[Tensor]) -> list[Tensor]:
        """A copy of the maps with channels in the order that `forward` takes."""
        # The order within a half could be folded into the weights; which channels share a half could not.
        return [
            y_HWBC.index_select(3, self.get_buffer(name))
            for y_HWBC, name in zip(y, self.permutations, strict=True)
        ]

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """The block's output, which overwrites its input."""
        halves = [x_HWBC.split(sizes, dim=3) for x_HWBC, sizes in zip(x, self.halves, strict=True)]
        first, second = ([half[i] for half in halves] for i in range(2))
        _transform_(first, self.subnetwork_first(second))
        _transform_(second, self.subnetwork_second(first))
        return x


def _transform_(x: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    """x · exp(σ(s)) + t in place, on every scale."""
    for x_HWBC, parameters_HWBC in zip(x, parameters, strict=True):
        scaling_HWBC, shift_HWBC = parameters_HWBC.chunk(2, dim=3)
        clamped_HWBC = scaling_HWBC.div(SOFT_CLAMP).atan_().mul_(SOFT_CLAMP * 0.636)
        x_HWBC.mul_(clamped_HWBC.exp_()).add_(shift_HWBC)


class _InterleavedSubnetwork(nn.Module):
    """`CrossScaleSubnetwork` on interleaved maps, with γ in the weights of its second layer."""

    def __init__(self, trained: CrossScaleSubnetwork, dtype: torch.dtype, sizes: Sequence[MapSize]) -> None:
        super().__init__()
        self.dtype = dtype
        self.scales = len(trained.enter)
        self.region = trained.region.interleaved(self.scales)
        gamma_S = trained.gamma_S.detach()
        self.enter = nn.ModuleList(
            _InterleavedConvolution(*_parameters(convolution), LEAKY, dtype, size)
            for convolution, size in zip(trained.enter, sizes, strict=True)
        )
        self.same = nn.ModuleList(
            _InterleavedConvolution(*_parameters(convolution, gamma), NO_ACTIVATION, dtype, size)
            for convolution, gamma, size in zip(trained.same, gamma_S, sizes, strict=True)
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
            out.append(self.region.only(out_HWBC, s))
        return out


def _parameters(convolution: nn.Module, scale: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Weight (out, in, k, k) and bias of a trained convolution, multiplied by a scalar."""
    convolution = cast(nn.Conv2d, convolution)
    return convolution.weight.detach() * scale, cast(Tensor, convolution.bias).detach() * scale


class _InterleavedConvolution(nn.Module):
    """A convolution of stride 1 with its activation, on interleaved maps (H, W, B, C).

    A row of interleaved maps is like one row of W · B pixels, in which neighbours in an image are B apart. So
    the convolution has dilation B. oneDNN leaves out multiplications with the padding.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, activation: Activation, dtype: torch.dtype, size: MapSize
    ) -> None:
        super().__init__()
        self.reach = weight.shape[2] // 2
        self.activation = activation
        weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
        if HAS_ONEDNN:
            # The order that oneDNN wants depends on the maps; another would be rearranged in every call.
            batch, height, width = size
            how = ([self.reach, self.reach * batch], [1, 1], [1, batch], 1)
            input_size = [1, weight.shape[1], height, width * batch]
            weight = ONEDNN._reorder_convolution_weight(weight, *how, input_size)
        self.weight = nn.Buffer(weight)
        self.bias = nn.Buffer(bias.to(dtype))

    def forward(self, x_HWBC: Tensor) -> Tensor:
        batch = x_HWBC.shape[2]
        x_1CHW = x_HWBC.flatten(1, 2).permute(2, 0, 1).unsqueeze(0)
        y_1CHW = self._convolve(x_1CHW, [self.reach, self.reach * batch], [1, batch])
        return y_1CHW[0].permute(1, 2, 0).unflatten(1, (-1, batch))

    def _convolve(self, x_BCHW: Tensor, padding: list[int], dilation: list[int]) -> Tensor:
        # oneDNN's kernels, whatever PyTorch's heuristics would choose: they take single-threaded
        # convolutions in float32 to matrix products of rearranged copies.
        if HAS_ONEDNN:
            how = ([1, 1], dilation, 1, *self.activation, "")
            return cast(Tensor, ONEDNN._convolution_pointwise(x_BCHW, self.weight, self.bias, padding, *how))
        y_BCHW = F.conv2d(x_BCHW, self.weight, self.bias, padding=padding, dilation=dilation)
        return y_BCHW if self.activation == NO_ACTIVATION else F.leaky_relu_(y_BCHW, LEAKY_SLOPE)


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

    Both are linear, so the weights come first, where there are a quarter of the pixels: each pixel makes a
    contribution through each of the k · k taps. Then two small products, along height and width, interpolate
    the contributions, move each to the place of its tap and add them up.
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
    """The matrix (2 · size, size · k) that upsamples the taps' contributions and moves each to its place."""
    reach = kernel_size // 2
    identity = torch.eye(size)[None]
    doubled = F.interpolate(identity, scale_factor=2, mode="linear", align_corners=False)[0].T
    padded = F.pad(doubled, (0, 0, reach, reach))
    return torch.stack([padded[tap : tap + 2 * size] for tap in range(kernel_size)], dim=2).flatten(1)


class _MatrixProduct(nn.Module):
    """`nn.Linear`, with packed weights in bfloat16."""

    def __init__(self, weight_NC: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.is_packed = dtype == torch.bfloat16 and HAS_ONEDNN
        weight_NC = weight_NC.to(dtype).contiguous()
        self.weight = nn.Buffer(ONEDNN._reorder_linear_weight(weight_NC) if self.is_packed else weight_NC)
        self.bias = None if bias is None else nn.Buffer(bias.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.is_packed:
            return cast(Tensor, ONEDNN._linear_pointwise(x, self.weight, self.bias, *NO_ACTIVATION, ""))
        return F.linear(x, self.weight, self.bias)
