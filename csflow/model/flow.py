"""The cross-scale normalizing flow of CS-Flow (Rudolph et al., WACV 2022, arXiv 2110.02855, section 3).

Dimension letters: B batch, C channels, H height, W width (of the scale at hand), K hidden channels, S scales.
Scale 0 is the largest; scale s + 1 has half its height and width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csflow.model.pyramid import Region

SOFT_CLAMP = 3.0
"""α of the soft clamp σ(s) = α · 0.636 · atan(s / α), which bounds one block's scaling to exp(±α)."""

LEAKY_SLOPE = 0.1


Step = Callable[[Sequence[Tensor]], tuple[list[Tensor], Tensor]]


class FlowOutput(NamedTuple):
    z: list[Tensor]
    """For each scale, the latent tensor, with the shape of that scale's input."""
    log_det_B: Tensor
    """For each sample, log|det dz/dy| over all scales, in float32 or better."""


class CrossScaleFlow(nn.Module):
    """A bijection between feature maps of 1 to 4 scales and latents that training makes standard normal."""

    def __init__(
        self,
        channels: Sequence[int] | int,
        scales: int = 3,
        hidden_channels: int = 1024,
        kernel_sizes: Sequence[int] = (3, 3, 3, 5),
        seed: int = 0,
        inside: Sequence[Tensor] | None = None,
    ) -> None:
        """Makes one coupling block per entry of `kernel_sizes`; `seed` draws the channel permutations.

        Args:
            channels: of each scale, or one number for all scales.
            hidden_channels: of the scale with most channels; other scales have them in proportion.
            inside: for each scale, 1 at the places of the region of interest and 0 at others, (H, W). The
                flow is a bijection there, and the identity elsewhere.
        """
        super().__init__()
        channels = [channels] * scales if isinstance(channels, int) else channels
        if not 1 <= scales <= 4:
            raise ValueError(f"scales must be 1 to 4, not {scales}: each level of the pyramid is one")
        if len(channels) != scales:
            raise ValueError(f"channels must be one number for each of {scales} scales, not {list(channels)}")
        if min(channels) < 2:
            raise ValueError(f"channels must be at least 2 to be split into halves, not {min(channels)}")
        if not kernel_sizes or any(k < 1 or k % 2 == 0 for k in kernel_sizes):
            raise ValueError(f"kernel_sizes must be one odd number per block, not {list(kernel_sizes)}")
        generator = torch.Generator().manual_seed(seed)
        hidden = [max(1, round(hidden_channels * count / max(channels))) for count in channels]
        self.blocks = nn.ModuleList(
            CouplingBlock(channels, hidden, k, generator, inside) for k in kernel_sizes
        )
        self.hidden_count = len(self.blocks) * 2 * sum(hidden)
        """Number K of hidden channels of all subnetworks."""

    def forward(self, y: Sequence[Tensor], keep_BK: Tensor | None = None) -> FlowOutput:
        """Maps features to latents.

        Args:
            y: a tensor (B, C, H, W) per scale, each with half the height and width of the one before.
            keep_BK: factors of each image's hidden channels, for dropout.
        """
        keeps = _chunks(keep_BK, len(self.blocks))
        blocks = (cast(CouplingBlock, block) for block in self.blocks)
        return self._run([partial(block, keep_BK=keep) for block, keep in zip(blocks, keeps, strict=True)], y)

    def inverse(self, z: Sequence[Tensor]) -> FlowOutput:
        """Maps latents back to features; the log-determinant is that of the inverse."""
        return self._run([cast(CouplingBlock, block).inverse for block in reversed(self.blocks)], z)

    @staticmethod
    def _run(steps: Sequence[Step], x: Sequence[Tensor]) -> FlowOutput:
        log_det_B = x[0].new_zeros(x[0].shape[0])  # `len` would fix the batch in an exported graph
        for step in steps:
            x, step_log_det_B = step(x)
            log_det_B = log_det_B + step_log_det_B
        return FlowOutput(list(x), log_det_B)


class CouplingBlock(nn.Module):
    """Permutes the channels of each scale, then transforms each half of them given the other half.

    A subnetwork that reads the second halves of all scales transforms the first half of every scale. Then
    another one, which reads the new first halves, transforms the second half (equation 2 of the paper).
    """

    def __init__(
        self,
        channels: Sequence[int],
        hidden_channels: Sequence[int],
        kernel_size: int,
        generator: torch.Generator,
        inside: Sequence[Tensor] | None = None,
    ) -> None:
        """`channels` and `hidden_channels` have one number per scale; `inside` is as for the flow."""
        super().__init__()
        self.halves = [(count // 2, count - count // 2) for count in channels]
        """Number of channels in the first and the second half of each scale."""
        for s, count in enumerate(channels):
            # On the CPU, as the generator is, also when the weights are to be on no device yet.
            permutation_C = torch.randperm(count, generator=generator, device="cpu")
            self.register_buffer(f"permutation_{s}", permutation_C)
        first, second = zip(*self.halves, strict=True)
        self.subnetwork_first = CrossScaleSubnetwork(second, first, hidden_channels, kernel_size, inside)
        self.subnetwork_second = CrossScaleSubnetwork(first, second, hidden_channels, kernel_size, inside)

    def forward(self, y: Sequence[Tensor], keep_BK: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        permuted = [y_BCHW[:, self.get_buffer(f"permutation_{s}")] for s, y_BCHW in enumerate(y)]
        first, second = self._split(permuted)
        keep_first, keep_second = _chunks(keep_BK, 2)
        first, log_det_first_B = _transform(first, self.subnetwork_first(second, keep_first))
        second, log_det_second_B = _transform(second, self.subnetwork_second(first, keep_second))
        return _join(first, second), log_det_first_B + log_det_second_B

    def inverse(self, z: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        first, second = self._split(z)
        second, log_det_second_B = _untransform(second, self.subnetwork_second(first))
        first, log_det_first_B = _untransform(first, self.subnetwork_first(second))
        joined = enumerate(_join(first, second))
        y = [x_BCHW[:, self.get_buffer(f"permutation_{s}").argsort()] for s, x_BCHW in joined]
        return y, log_det_first_B + log_det_second_B

    def _split(self, x: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        halves = [x_BCHW.split(sizes, dim=1) for x_BCHW, sizes in zip(x, self.halves, strict=True)]
        return [first for first, _ in halves], [second for _, second in halves]


class CrossScaleSubnetwork(nn.Module):
    """Two layers of cross-scale convolutions: predicts scaling and shift of one half from the other half.

    The scalar γ per scale starts at 0, so that a new coupling block is the identity.
    """

    def __init__(
        self,
        given: Sequence[int],
        predicted: Sequence[int],
        hidden: Sequence[int],
        kernel_size: int,
        inside: Sequence[Tensor] | None = None,
    ) -> None:
        """`given` and `predicted` are the channels of both halves at each scale, `hidden` those between."""
        super().__init__()
        out = [2 * count for count in predicted]

        def convolutions(channels: Sequence[int], out: Sequence[int], stride: int = 1) -> nn.ModuleList:
            pairs = zip(channels, out, strict=True)
            return nn.ModuleList(MapConvolution(*pair, kernel_size, stride) for pair in pairs)

        self.enter = convolutions(given, hidden)
        self.same = convolutions(hidden, out)
        self.down = convolutions(hidden[:-1], out[1:], stride=2)
        """down[s] feeds scale s + 1 from scale s."""
        self.up = convolutions(hidden[1:], out[:-1])
        """up[s] feeds scale s from scale s + 1."""
        self.gamma_S = nn.Parameter(torch.zeros(len(given)))
        self.region = Region(inside)

    def forward(self, x: Sequence[Tensor], keep_BK: Tensor | None = None) -> list[Tensor]:
        hidden = [
            F.leaky_relu(enter(x_BCHW), LEAKY_SLOPE) for enter, x_BCHW in zip(self.enter, x, strict=True)
        ]
        if keep_BK is not None:
            keeps = keep_BK.to(hidden[0].dtype).split([hidden_BCHW.shape[1] for hidden_BCHW in hidden], dim=1)
            hidden = [
                h_BCHW * keep_BC[:, :, None, None] for h_BCHW, keep_BC in zip(hidden, keeps, strict=True)
            ]
        out = []
        for s, hidden_BCHW in enumerate(hidden):
            out_BCHW = self.same[s](hidden_BCHW)
            if s > 0:
                out_BCHW = out_BCHW + self.down[s - 1](hidden[s - 1])
            if s + 1 < len(hidden):
                upsampled_BCHW = F.interpolate(
                    hidden[s + 1], scale_factor=2, mode="bilinear", align_corners=False
                )
                out_BCHW = out_BCHW + self.up[s](upsampled_BCHW)
            out.append(self.region.only(out_BCHW * self.gamma_S[s], s))
        return out


class MapConvolution(nn.Conv2d):
    """A convolution with padding of half its kernel, on maps that may be smaller than the kernel reaches."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        # Taps that meet padding alone are left out. They add nothing to the result, but oneDNN gives them
        # whatever is in memory as gradient (PyTorch 2.15, bfloat16, AVX-512 without AMX).
        reach = self.kernel_size[0] // 2
        rows, columns = (max(reach - size + 1, 0) for size in x_BCHW.shape[2:])
        weight = self.weight[:, :, rows : 2 * reach + 1 - rows, columns : 2 * reach + 1 - columns]
        return F.conv2d(x_BCHW, weight, self.bias, self.stride, (reach - rows, reach - columns))


def negative_log_likelihood(output: FlowOutput, dimensions: int | None = None) -> Tensor:
    """The training loss of each sample: (½‖z‖² − log|det J|) / dim(z), up to a constant, shape (B,).

    Args:
        dimensions: dim(z), if latents outside a region of interest are zero and no part of the model.
    """
    energy_B = torch.stack([_sum_of_squares(z_BCHW) for z_BCHW in output.z]).sum(0) / 2
    if dimensions is None:
        dimensions = sum(z_BCHW[0].numel() for z_BCHW in output.z)
    loss_B: Tensor = (energy_B - output.log_det_B) / dimensions
    return loss_B


def _chunks(keep_BK: Tensor | None, number: int) -> Sequence[Tensor | None]:
    return [None] * number if keep_BK is None else keep_BK.chunk(number, dim=1)


def _transform(x: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """x · exp(σ(s)) + t on every scale, and the log-determinant summed over all of them, shape (B,)."""
    transformed, log_dets = [], []
    for x_BCHW, parameters_BCHW in zip(x, parameters, strict=True):
        scaling_BCHW, shift_BCHW = parameters_BCHW.chunk(2, dim=1)
        scaling_BCHW = _soft_clamp(scaling_BCHW)
        transformed.append(scaling_BCHW.exp() * x_BCHW + shift_BCHW)
        log_dets.append(scaling_BCHW.flatten(1).sum(1, dtype=_accumulation_dtype(scaling_BCHW)))
    return transformed, torch.stack(log_dets).sum(0)


def _untransform(x: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The inverse of `_transform`, with the log-determinant of the inverse."""
    restored, log_dets = [], []
    for x_BCHW, parameters_BCHW in zip(x, parameters, strict=True):
        scaling_BCHW, shift_BCHW = parameters_BCHW.chunk(2, dim=1)
        scaling_BCHW = _soft_clamp(scaling_BCHW)
        restored.append((x_BCHW - shift_BCHW) * (-scaling_BCHW).exp())
        log_dets.append(-scaling_BCHW.flatten(1).sum(1, dtype=_accumulation_dtype(scaling_BCHW)))
    return restored, torch.stack(log_dets).sum(0)


def _soft_clamp(scaling: Tensor) -> Tensor:
    # 0.636 in place of 2/π is the authors' constant; a trained model depends on it.
    return SOFT_CLAMP * 0.636 * torch.atan(scaling / SOFT_CLAMP)


def _join(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    return [torch.cat(halves, dim=1) for halves in zip(first, second, strict=True)]


def _sum_of_squares(z_BCHW: Tensor) -> Tensor:
    dtype = _accumulation_dtype(z_BCHW)
    return z_BCHW.to(dtype).square().flatten(1).sum(1)


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums over a feature map: at least float32, also under autocast (bfloat16 keeps 8 bits)."""
    return torch.promote_types(x.dtype, torch.float32)
