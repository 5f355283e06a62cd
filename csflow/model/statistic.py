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

A model of tiles sees its images in pieces, and a piece may come from anywhere in an image. So all places of a
level have one usual energy. The scores of an image come from the maps of all its tiles, joined
(`csflow.model.tiles`). Its local score averages as many places as that of a tile does, since a defect is no
larger in a larger image. But the most unusual of more places are more unusual: the score of normal images
grows with the logarithm of their area, as the largest of many values with exponential tails does (Gumbel's
law). What it grows by is measured, and subtracted.

Dimension letters: B batch, H height, W width, P places (H · W), S levels of the pyramid, E energy maps, N
images (or tiles) that define what is usual.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOCAL_SHARE = 0.005
"""Share of the area that the local score averages, of what the model sees at once: the most unusual
places."""
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
    averages_BAHW: Tensor
    """Of tiles: the averages that the scores come from, the broad and the fine one. Else none (A = 0)."""


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
        nan_B = torch.full_like(score_B, torch.nan)
        return Scores(score_B, score_B, nan_B, scale_scores_BS, energies[0], energies[0][:, None][:, :0])


class StandardisedStatistic(nn.Module):
    """Compares energies with the usual ones at the same place; see the docstring of this module."""

    def __init__(self, feature_shapes: Sequence[Sequence[int]], is_tiled: bool = False) -> None:
        """All usual energies are 1 until a state is loaded. `fitted_statistic` makes a state.

        Args:
            is_tiled: whether the shapes are those of tiles.
        """
        super().__init__()
        self.levels = len(feature_shapes)
        self.size = tuple(feature_shapes[0][1:])
        self.most_unusual = max(1, round(LOCAL_SHARE * math.prod(self.size)))
        """The number of places that the local score averages."""
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
        self.growth: Tensor | None = nn.Buffer(torch.tensor(0.0)) if is_tiled else None
        """What the local score of normal images grows by when their area grows e-fold; None without tiles."""
        self.register_load_state_dict_pre_hook(_without_fine_average)

    def forward(self, energies: Sequence[Tensor]) -> Scores:
        """Scores, given energy maps (B, H, W): of each level's Gaussian, then of its latents."""
        relative_EBHW = self.relative(energies)
        averages_ABHW = self.averages(relative_EBHW)
        map_BHW = _weighted(self.map_weight_E, relative_EBHW)
        return self.scores(averages_ABHW, map_BHW, _scale_scores(energies[self.levels :]))

    def scores(self, averages_ABHW: Tensor, anomaly_map_BHW: Tensor, scale_scores_BS: Tensor) -> Scores:
        """The scores of images, or of tiles, with these averages, maps and scores of levels."""
        local_B, global_B = self.local_and_global(averages_ABHW)
        kept_ABHW = averages_ABHW[: 0 if self.growth is None else len(averages_ABHW)]
        return Scores(
            anomaly_score_B=self.score_weight_2[0] * local_B + self.score_weight_2[1] * global_B,
            global_score_B=global_B,
            local_score_B=local_B,
            scale_scores_BS=scale_scores_BS,
            anomaly_map_BHW=anomaly_map_BHW,
            averages_BAHW=kept_ABHW.movedim(0, 1),
        )

    def averages(self, relative_EBHW: Tensor) -> Tensor:
        """The broad and the fine average (2, B, H, W), given what `relative` returns."""
        weights = self.weight_E, self.fine_weight_E
        return torch.stack([_weighted(weight_E, relative_EBHW) for weight_E in weights])

    def local_and_global(self, averages_ABHW: Tensor) -> tuple[Tensor, Tensor]:
        """The two scores (B,), given what `averages` returns."""
        broad_BHW, fine_BHW = averages_ABHW
        slope, intercept = self.fine_line_2
        fine_B = slope * _mean_of_largest(fine_BHW, self.most_unusual) + intercept
        local_B = torch.maximum(_mean_of_largest(broad_BHW, self.most_unusual), fine_B)
        if self.growth is not None:
            local_B = local_B - self.growth * math.log(broad_BHW[0].numel() / math.prod(self.size))
        return local_B, broad_BHW.mean((1, 2))

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
    energies: Sequence[Tensor],
    feature_shapes: Sequence[Sequence[int]],
    tile_counts: Sequence[int] | None = None,
) -> StandardisedStatistic:
    """The statistic for which these images are usual.

    They should be normal images on which nothing was trained, since training images have energies that are
    too small. P-values hold whatever these images are, as long as none of them is used for calibration.

    Args:
        energies: as `StandardisedStatistic.forward` takes them, (N, H, W).
        tile_counts: how many of the N are tiles of the first image, of the second, and so on; None if all are
            whole images.
    """
    is_tiled = tile_counts is not None
    statistic = StandardisedStatistic(feature_shapes, is_tiled).to(energies[0].device)
    images, levels = len(energies[0]), len(feature_shapes)
    trust = 0.0 if is_tiled else images / (images + PRIOR_IMAGES)
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
    averages_ANHW = statistic.averages(relative_ENHW)
    broad_N, fine_N = (_mean_of_largest(average_NHW, statistic.most_unusual) for average_NHW in averages_ANHW)
    slope = _spread(broad_N) / _spread(fine_N)
    statistic.fine_line_2.copy_(torch.stack([slope, broad_N.mean() - slope * fine_N.mean()]))
    local_N, global_N = statistic.local_and_global(averages_ANHW)
    if statistic.growth is not None and tile_counts is not None:
        statistic.growth.fill_(_growth(statistic, averages_ANHW, tile_counts))
    share_2 = torch.stack([1 / _spread(local_N), GLOBAL_WEIGHT / _spread(global_N)])
    # 1 for an image whose two scores are the usual ones.
    usual_2 = torch.stack([local_N.mean(), global_N.mean()])
    statistic.score_weight_2.copy_(share_2 / (share_2 @ usual_2.clamp(min=SMALLEST)))
    return statistic


def _growth(statistic: StandardisedStatistic, averages_ANHW: Tensor, tile_counts: Sequence[int]) -> float:
    """By how much the mean local score grows from a tile to e times as many of the same image; at least 0.

    Tiles of one image are joined by 1, 2, 4 and so on, and a line is fitted to the mean scores of the joined
    ones.
    """
    means: dict[int, list[float]] = {}
    for tiles_ANHW in averages_ANHW.split(list(tile_counts), dim=1):
        number = 1
        while number <= tiles_ANHW.shape[1]:
            for some_ANHW in tiles_ANHW.split(number, dim=1):
                if some_ANHW.shape[1] == number:
                    joined_ABHW = some_ANHW.flatten(1, 2)[:, None]
                    means.setdefault(number, []).append(statistic.local_and_global(joined_ABHW)[0].item())
            number *= 2
    if len(means) < 2:
        return 0.0
    logs = torch.tensor([math.log(number) for number in means])
    scores = torch.tensor([sum(values) / len(values) for values in means.values()])
    return max(
        0.0,
        float(((logs - logs.mean()) * (scores - scores.mean())).sum() / ((logs - logs.mean()) ** 2).sum()),
    )


def _mean_of_largest(value_BHW: Tensor, most: int) -> Tensor:
    """The mean (B,) over the most unusual places, so many of them if there are so many."""
    place_BP = value_BHW.flatten(1)
    return place_BP.topk(min(most, place_BP.shape[1]), dim=1).values.mean(1)


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
