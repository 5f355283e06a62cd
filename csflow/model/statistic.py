"""The anomaly statistic: turns energies at each place of an image into scores and a map.

An *energy map* is the mean of squares over the channels of a level. A whitened detector has two per level: of
the Gaussian at each position, and of the flow's latents, averaged over windows of a few places. Each finds
what the other misses. The Gaussian is blind to all but covariance; the flow predicts one half of the channels
from the other, and so hides what is odd about both. At one place latents are mostly noise; the mean over a
window lowers the noise, and keeps what neighbours have in common.

Energies differ in size and spread between places and levels. So each is divided by the usual energy of its
place, and they are averaged with weights that give all the same spread. A value of 1 is usual. A second
average, the *fine* one, has larger weights for larger maps and smaller ones for latents: it finds small
defects, which levels of few places dilute.

Dimension letters: B batch, H height, W width, P places (H · W), S levels of the pyramid, E energy maps, N
images that define what is usual.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOCAL_SHARE = 0.005
"""Share of an image's area that the local score averages: the most unusual places."""
GLOBAL_WEIGHT = 0.1
"""Weight of the global score in the anomaly score; the local score has weight 1, and both the same spread."""
FINE_LATENTS = 0.5
"""Weight of latents in the fine average, relative to that of the Gaussian."""
PRIOR_IMAGES = 10
"""The usual energy of a place is drawn towards that of its level as if by this many images."""
SMALLEST = 1e-6
"""Smallest energy and spread; smaller values, of images that never differ, are replaced by this."""


class Scores(NamedTuple):
    anomaly_score_B: Tensor
    """The score that a model is calibrated for, float32. Without whitening, it is the global score."""
    global_score_B: Tensor
    """How unusual the whole image is: the mean of its map. Without whitening, it is the mean of z²/2."""
    local_score_B: Tensor
    """How unusual the worst places are: the mean over `LOCAL_SHARE` of them. NaN without whitening."""
    scale_scores_BS: Tensor
    """Half of each level's mean latent energy, largest map first. Without windows, it is the mean of z²/2."""
    anomaly_map_BHW: Tensor
    """How unusual each place is, in the resolution of level 0. Without whitening, it is the mean of z²."""


def energy_map(x_BCHW: Tensor, window: int = 1) -> Tensor:
    """The mean of squares over the channels, (B, H, W), float32, of `window_means`."""
    return window_means(x_BCHW.float(), window).square().mean(1)


def window_means(x_BCHW: Tensor, window: int) -> Tensor:
    """The mean around each place over a square with this odd side, or over what of it lies in the map."""
    if window == 1:
        return x_BCHW
    return F.avg_pool2d(x_BCHW, window, 1, window // 2, count_include_pad=False)


class PlainStatistic(nn.Module):
    """The statistic of the paper: the mean of z²/2 over all entries of all levels."""

    def __init__(self, feature_shapes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        numbers = [channels * height * width for channels, height, width in feature_shapes]
        # No buffer: it would be in no state, and so without a value in a model that is loaded.
        self.shares = [number / sum(numbers) for number in numbers]

    def forward(self, energies: Sequence[Tensor]) -> Scores:
        """Scores, given the latents' energy map of each level, (B, H, W)."""
        scale_scores_BS = _scale_scores(energies)
        weighted = [share * score_B for share, score_B in zip(self.shares, scale_scores_BS.T, strict=True)]
        score_B = torch.stack(weighted).sum(0)
        return Scores(score_B, score_B, torch.full_like(score_B, torch.nan), scale_scores_BS, energies[0])


class StandardisedStatistic(nn.Module):
    """Compares energies with the usual ones at the same place; see the docstring of this module."""

    def __init__(self, feature_shapes: Sequence[Sequence[int]]) -> None:
        """All usual energies are 1 until a state is loaded. `fitted_statistic` makes a state."""
        super().__init__()
        self.levels = len(feature_shapes)
        self.size = tuple(feature_shapes[0][1:])
        for e, (_, height, width) in enumerate([*feature_shapes, *feature_shapes]):
            self.register_buffer(f"usual_{e}", torch.ones(height, width))
        self.weight_E = nn.Buffer(torch.full((2 * self.levels,), 1 / (2 * self.levels)))
        """Weights of the energy maps in the scores; their sum is 1."""
        self.fine_weight_E = nn.Buffer(self.weight_E.clone())
        """The same for the fine average."""
        self.fine_line_2 = nn.Buffer(torch.tensor([1.0, 0.0]))
        """Slope and intercept that give the fine average's local score the mean and spread of the other's."""
        self.map_weight_E = nn.Buffer(self.weight_E.clone())
        """Weights of the energy maps in the anomaly map."""
        self.score_weight_2 = nn.Buffer(torch.tensor([1.0, 0.0]))
        """Weights of the local and the global score in the anomaly score."""
        self.register_load_state_dict_pre_hook(_without_fine_average)

    def forward(self, energies: Sequence[Tensor]) -> Scores:
        """Scores, given energy maps (B, H, W): of each level's Gaussian, then of its latents."""
        relative_EBHW = self.relative(energies)
        local_B, global_B = self.local_and_global(relative_EBHW)
        return Scores(
            anomaly_score_B=self.score_weight_2[0] * local_B + self.score_weight_2[1] * global_B,
            global_score_B=global_B,
            local_score_B=local_B,
            scale_scores_BS=_scale_scores(energies[self.levels :]),
            anomaly_map_BHW=_weighted(self.map_weight_E, relative_EBHW),
        )

    def local_and_global(self, relative_EBHW: Tensor) -> tuple[Tensor, Tensor]:
        """The two scores (B,), given what `relative` returns."""
        scored_BHW = _weighted(self.weight_E, relative_EBHW)
        fine_B = _most_unusual(_weighted(self.fine_weight_E, relative_EBHW))
        slope, intercept = self.fine_line_2
        local_B = torch.maximum(_most_unusual(scored_BHW), slope * fine_B + intercept)
        return local_B, scored_BHW.mean((1, 2))

    def relative(self, energies: Sequence[Tensor]) -> Tensor:
        """Energies (E, B, H, W) divided by the usual ones, all in the resolution of level 0."""
        relative = [
            _upsampled(energy_BHW / self.get_buffer(f"usual_{e}"), self.size)
            for e, energy_BHW in enumerate(energies)
        ]
        return torch.stack(relative)


def _without_fine_average(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets the state of an older model, which has no fine average, give the scores that it gave."""
    if f"{prefix}fine_weight_E" not in state and f"{prefix}weight_E" in state:
        state[f"{prefix}fine_weight_E"] = state[f"{prefix}weight_E"]
        state[f"{prefix}fine_line_2"] = torch.tensor([1.0, 0.0])


@torch.no_grad()
def fitted_statistic(
    energies: Sequence[Tensor], feature_shapes: Sequence[Sequence[int]]
) -> StandardisedStatistic:
    """The statistic for which these images are usual.

    They should be normal images on which nothing was trained, since training images have energies that are
    too small. P-values hold whatever these images are, as long as none of them is used for calibration.

    Args:
        energies: as `StandardisedStatistic.forward` takes them, (N, H, W).
    """
    statistic = StandardisedStatistic(feature_shapes).to(energies[0].device)
    images, levels = len(energies[0]), len(feature_shapes)
    trust = images / (images + PRIOR_IMAGES)
    for e, energy_NHW in enumerate(energies):
        usual_HW = trust * energy_NHW.mean(0) + (1 - trust) * energy_NHW.mean()
        statistic.get_buffer(f"usual_{e}").copy_(usual_HW.clamp(min=SMALLEST))
    relative_ENHW = statistic.relative(energies)
    weight_E = 1 / relative_ENHW.flatten(1).std(1, correction=0).clamp(min=SMALLEST)
    places_E = torch.tensor([float(energy_NHW[0].numel()) for energy_NHW in energies]).to(weight_E)
    is_latent_E = torch.arange(2 * levels, device=weight_E.device) >= levels
    _set_shares(statistic.weight_E, weight_E)
    of_kind_E = torch.where(is_latent_E, FINE_LATENTS, 1)
    _set_shares(statistic.fine_weight_E, weight_E * places_E.sqrt() * of_kind_E)
    # Where a defect is, the finest levels know best: each weighs as much as it has places. Latents spread it
    # over the reach of the flow's kernels (benchmarks/quality.md), so the map is the Gaussian's.
    _set_shares(statistic.map_weight_E, weight_E * places_E * ~is_latent_E)
    broad_N, fine_N = (
        _most_unusual(_weighted(shares_E, relative_ENHW))
        for shares_E in (statistic.weight_E, statistic.fine_weight_E)
    )
    slope = _spread(broad_N) / _spread(fine_N)
    statistic.fine_line_2.copy_(torch.stack([slope, broad_N.mean() - slope * fine_N.mean()]))
    local_N, global_N = statistic.local_and_global(relative_ENHW)
    share_2 = torch.stack([1 / _spread(local_N), GLOBAL_WEIGHT / _spread(global_N)])
    # 1 for an image whose two scores are the usual ones.
    usual_2 = torch.stack([local_N.mean(), global_N.mean()])
    statistic.score_weight_2.copy_(share_2 / (share_2 @ usual_2.clamp(min=SMALLEST)))
    return statistic


def _most_unusual(scored_BHW: Tensor) -> Tensor:
    """The mean (B,) over the most unusual `LOCAL_SHARE` of each image's places, at least one place."""
    place_BP = scored_BHW.flatten(1)
    most = max(1, round(LOCAL_SHARE * place_BP.shape[1]))
    return place_BP.topk(most, dim=1).values.mean(1)


def _spread(values_N: Tensor) -> Tensor:
    return values_N.std(correction=0).clamp(min=SMALLEST)


def _set_shares(shares_E: Tensor, weight_E: Tensor) -> None:
    shares_E.copy_(weight_E / weight_E.sum())


def _weighted(weight_E: Tensor, maps_EBHW: Tensor) -> Tensor:
    # No matrix product, which autocast would round to bfloat16.
    return (weight_E[:, None, None, None] * maps_EBHW).sum(0)


def _scale_scores(latent_energies: Sequence[Tensor]) -> Tensor:
    return torch.stack([energy_BHW.mean((1, 2)) for energy_BHW in latent_energies], dim=1) / 2


def _upsampled(map_BHW: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(map_BHW.shape[1:]) == tuple(size):
        return map_BHW
    return F.interpolate(map_BHW[:, None], size=list(size), mode="bilinear", align_corners=False)[:, 0]
