"""The anomaly statistic: turns energies at each place of an image into scores and a map.

An *energy map* is the mean of squares over the channels of a level. A whitened detector has two per level: of
the Gaussian at each position, and of the flow's latents. Each finds what the other misses. The Gaussian is
blind to all but covariance; the flow predicts one half of the channels from the other, and so hides what is
odd about both.

Energies differ in size and spread between places and levels. So each is divided by the usual energy of its
place, and they are averaged with weights that give all the same spread. A value of 1 is usual.

Dimension letters: B batch, H height, W width, P places (H · W), S levels of the pyramid, E energy maps, N
images that define what is usual.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOCAL_SHARE = 0.005
"""Share of an image's area that the local score averages: the most unusual places."""
GLOBAL_WEIGHT = 0.1
"""Weight of the global score in the anomaly score; the local score has weight 1, and both the same spread."""
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
    """The mean of z²/2 of each level, largest map first."""
    anomaly_map_BHW: Tensor
    """How unusual each place is, in the resolution of level 0. Without whitening, it is the mean of z²."""


def energy_map(x_BCHW: Tensor) -> Tensor:
    """The mean of squares over the channels, (B, H, W), float32."""
    return x_BCHW.float().square().mean(1)


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
        self.map_weight_E = nn.Buffer(self.weight_E.clone())
        """Weights of the energy maps in the anomaly map."""
        self.score_weight_2 = nn.Buffer(torch.tensor([1.0, 0.0]))
        """Weights of the local and the global score in the anomaly score."""

    def forward(self, energies: Sequence[Tensor]) -> Scores:
        """Scores, given energy maps (B, H, W): of each level's Gaussian, then of its latents."""
        relative_EBHW = self.relative(energies)
        scored_BHW = _weighted(self.weight_E, relative_EBHW)
        local_B, global_B = local_score(scored_BHW), scored_BHW.mean((1, 2))
        return Scores(
            anomaly_score_B=self.score_weight_2[0] * local_B + self.score_weight_2[1] * global_B,
            global_score_B=global_B,
            local_score_B=local_B,
            scale_scores_BS=_scale_scores(energies[self.levels :]),
            anomaly_map_BHW=_weighted(self.map_weight_E, relative_EBHW),
        )

    def relative(self, energies: Sequence[Tensor]) -> Tensor:
        """Energies (E, B, H, W) divided by the usual ones, all in the resolution of level 0."""
        relative = [
            _upsampled(energy_BHW / self.get_buffer(f"usual_{e}"), self.size)
            for e, energy_BHW in enumerate(energies)
        ]
        return torch.stack(relative)


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
    images = len(energies[0])
    trust = images / (images + PRIOR_IMAGES)
    for e, energy_NHW in enumerate(energies):
        usual_HW = trust * energy_NHW.mean(0) + (1 - trust) * energy_NHW.mean()
        statistic.get_buffer(f"usual_{e}").copy_(usual_HW.clamp(min=SMALLEST))
    relative_ENHW = statistic.relative(energies)
    weight_E = 1 / relative_ENHW.flatten(1).std(1, correction=0).clamp(min=SMALLEST)
    statistic.weight_E.copy_(weight_E / weight_E.sum())
    # Where a defect is, the finest levels know best: each weighs as much as it has places. Latents spread it
    # over the reach of the flow's kernels (benchmarks/quality.md), so the map is the Gaussian's.
    places = [float(energy_NHW[0].numel()) for energy_NHW in energies[: len(feature_shapes)]]
    places += [0.0] * len(feature_shapes)
    map_weight_E = weight_E * torch.tensor(places).to(weight_E)
    statistic.map_weight_E.copy_(map_weight_E / map_weight_E.sum())
    scored_NHW = _weighted(statistic.weight_E, relative_ENHW)
    pair_2N = torch.stack([local_score(scored_NHW), scored_NHW.mean((1, 2))])
    spread_2 = pair_2N.std(1, correction=0).clamp(min=SMALLEST)
    share_2 = torch.tensor([1.0, GLOBAL_WEIGHT]).to(spread_2) / spread_2
    # 1 for an image whose two scores are the usual ones.
    statistic.score_weight_2.copy_(share_2 / (share_2 @ pair_2N.mean(1).clamp(min=SMALLEST)))
    return statistic


def local_score(scored_BHW: Tensor) -> Tensor:
    """The mean (B,) over the most unusual `LOCAL_SHARE` of each image's places, at least one place."""
    place_BP = scored_BHW.flatten(1)
    most = max(1, round(LOCAL_SHARE * place_BP.shape[1]))
    return place_BP.topk(most, dim=1).values.mean(1)


def _weighted(weight_E: Tensor, maps_EBHW: Tensor) -> Tensor:
    # No matrix product, which autocast would round to bfloat16.
    return (weight_E[:, None, None, None] * maps_EBHW).sum(0)


def _scale_scores(latent_energies: Sequence[Tensor]) -> Tensor:
    return torch.stack([energy_BHW.mean((1, 2)) for energy_BHW in latent_energies], dim=1) / 2


def _upsampled(map_BHW: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(map_BHW.shape[1:]) == tuple(size):
        return map_BHW
    return F.interpolate(map_BHW[:, None], size=list(size), mode="bilinear", align_corners=False)[:, 0]
