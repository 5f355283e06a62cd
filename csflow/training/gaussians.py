"""The closed-form part of a training: one pass over the features of the training images, before the flow.

Dimension letters: N images, H height, W width.
"""

import functools
import operator
from collections.abc import Sequence

import safetensors.torch
import torch
from torch import Tensor

from csflow.model import (
    Gaussians,
    Moments,
    Scores,
    StandardisedStatistic,
    fitted_statistic,
    gaussians_of,
)
from csflow.model.statistic import energy_map
from csflow.storage import Location
from csflow.training.cache import FeatureCache
from csflow.training.sources import FeatureSource

BATCH_SIZE = 32
LATENTS = "latents."


@torch.no_grad()
def gaussian_energies(gaussians: Gaussians, y: Sequence[Tensor]) -> list[Tensor]:
    """Energy maps (N, H, W) of the Gaussian of each position, per level, given features."""
    return [energy_map(x_BCHW) for x_BCHW in gaussians.positions(gaussians.whitening(y))]


def write_gaussians(gaussians: Gaussians, location: Location) -> None:
    """Writes the Gaussians of features. Those of latents are fitted only after the flow is trained."""
    state = gaussians.state_dict().items()
    location.write(safetensors.torch.save({k: v for k, v in state if not k.startswith(LATENTS)}))


def read_gaussians(location: Location, cache: FeatureCache, device: torch.device) -> Gaussians:
    """Reads what `write_gaussians` has written for features of this cache."""
    gaussians = Gaussians(cache.feature_shapes, cache.tiles is not None, cache.inside)
    gaussians.load_state_dict(gaussians.state_dict() | safetensors.torch.load(location.read()))
    return gaussians.to(device)


def fit_gaussians(source: FeatureSource, tile_counts: Sequence[int] | None = None) -> Gaussians:
    """Fits the Gaussians to the images of a source, which are not whitened."""
    return gaussians_of_folds(fold_moments(source, 1, tile_counts))


def image_numbers(samples: int, tile_counts: Sequence[int] | None) -> Tensor:
    """The number of the image (N,) that each sample of a source is, or is a tile of.

    Args:
        tile_counts: as `FeatureCache.tile_counts` returns.
    """
    if tile_counts is None:
        return torch.arange(samples)
    return torch.arange(len(tile_counts)).repeat_interleave(torch.tensor(tile_counts))


def fold_moments(
    source: FeatureSource, folds: int, tile_counts: Sequence[int] | None = None
) -> list[list[Moments]]:
    """The moments of each fold's images, per level. Image i is in fold i modulo `folds`, with all its
    tiles."""
    shares = fold_batches(image_numbers(len(source), tile_counts), folds)
    found: list[list[Moments]] = []
    for (fold, _), y in zip(shares, source.batches(0, [share for _, share in shares]), strict=True):
        if not found:
            inside: Sequence[Tensor | None] = source.inside or [None] * len(y)
            of_none = [
                Moments.around(y_BCHW, tile_counts is not None, inside_HW)
                for y_BCHW, inside_HW in zip(y, inside, strict=True)
            ]
            found = [of_none] * folds
        found[fold] = [moments.with_images(y_BCHW) for moments, y_BCHW in zip(found[fold], y, strict=True)]
    return found


def fold_batches(image_N: Tensor, folds: int) -> list[tuple[int, Tensor]]:
    """Batches of samples of the same fold, with that fold.

    Args:
        image_N: the image of each sample, as from `image_numbers`.
    """
    return [
        (fold, share)
        for fold in range(folds)
        for share in torch.nonzero(image_N % folds == fold)[:, 0].split(BATCH_SIZE)
        if len(share)
    ]


def gaussians_of_folds(folds: Sequence[Sequence[Moments]]) -> Gaussians:
    """The Gaussians of all images in these folds."""
    return gaussians_of([functools.reduce(operator.add, levels) for levels in zip(*folds, strict=True)])


def gaussian_statistic(
    energies: Sequence[Tensor], feature_shapes: Sequence[Sequence[int]], is_tiled: bool = False
) -> StandardisedStatistic:
    """The statistic of a detector that consists only of the Gaussian of each position.

    Args:
        energies: energy maps (N, H, W) of the Gaussian in usual images, or in single tiles, per level.
    """
    # Its own energies stand where those of the latents would.
    tile_counts = [1] * len(energies[0]) if is_tiled else None
    return fitted_statistic([*energies, *energies], feature_shapes, tile_counts)


def gaussian_scores(statistic: StandardisedStatistic, energies: Sequence[Tensor]) -> Tensor:
    """The anomaly score of each image by a `gaussian_statistic`, (N,); 1 is usual."""
    scores: Scores = statistic([*energies, *energies])
    return scores.anomaly_score_B


def gaussian_losses(energies: Sequence[Tensor], gaussians: Gaussians) -> Tensor:
    """The loss of each image if the Gaussian of each position were the whole model, (N,).

    Args:
        energies: energy maps (N, H, W) of the Gaussian, per level.
    """
    sizes = [gaussians.whitening.mean(level).numel() for level in range(len(energies))]
    log_det = gaussians.whitening.log_det() + gaussians.positions.log_det()
    squares_N = torch.stack(
        [size * energy_NHW.mean((1, 2)) for size, energy_NHW in zip(sizes, energies, strict=True)]
    ).sum(0)
    return (squares_N / 2 - log_det) / gaussians.whitening.dimensions()
