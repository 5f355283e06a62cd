"""The closed-form part of a training: one pass over the features of the training images, before the flow.

Dimension letters: N images, H height, W width.
"""

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor

from csflow.model import (
    Moments,
    PositionGaussian,
    Scores,
    StandardisedStatistic,
    Whitening,
    fitted_statistic,
    gaussians_of,
)
from csflow.model.statistic import energy_map
from csflow.storage import Location
from csflow.training.cache import FeatureCache
from csflow.training.sources import FeatureSource

BATCH_SIZE = 32


@dataclass(frozen=True)
class Gaussians:
    """What the flow's input is whitened with, and the Gaussian of each position behind that."""

    whitening: Whitening
    positions: PositionGaussian

    @torch.no_grad()
    def energies(self, y: Sequence[Tensor]) -> list[Tensor]:
        """Energy maps of the Gaussian, per level (N, H, W), given features that are not whitened."""
        return [energy_map(x_BCHW) for x_BCHW in self.positions(self.whitening(y))]

    def write(self, location: Location) -> None:
        state = {f"whitening.{k}": v for k, v in self.whitening.state_dict().items()}
        state |= {f"gaussian.{k}": v for k, v in self.positions.state_dict().items()}
        location.write(safetensors.torch.save(state))

    @classmethod
    def read(cls, location: Location, cache: FeatureCache, device: torch.device) -> "Gaussians":
        """What `write` has written for features of this cache."""
        state = safetensors.torch.load(location.read())
        gaussians = cls(Whitening(cache.feature_shapes), PositionGaussian(cache.feature_shapes))
        for name, module in (("whitening.", gaussians.whitening), ("gaussian.", gaussians.positions)):
            module.load_state_dict({k.removeprefix(name): v for k, v in state.items() if k.startswith(name)})
            module.to(device)
        return gaussians


def fit_gaussians(source: FeatureSource) -> Gaussians:
    """Those of the images of a source, which are not whitened."""
    return gaussians_of_folds(fold_moments(source, folds=1))


def fold_moments(source: FeatureSource, folds: int) -> list[list[Moments]]:
    """Per fold and level the moments of its images; image i is in fold i modulo `folds`."""
    shares = [
        share for fold in range(folds) for share in fold_batches(torch.arange(len(source)), folds, fold)
    ]
    empty: list[Moments] = []
    found: list[list[Moments]] = []
    for share, y in zip(shares, source.batches(0, shares), strict=True):
        if not found:
            empty = [Moments.around(y_BCHW) for y_BCHW in y]
            found = [empty] * folds
        fold = int(share[0]) % folds
        found[fold] = [moments.with_images(y_BCHW) for moments, y_BCHW in zip(found[fold], y, strict=True)]
    return found


def fold_batches(images_N: Tensor, folds: int, fold: int) -> list[Tensor]:
    """Those of these positions of images that are in this fold, in batches."""
    return [share for share in images_N[images_N % folds == fold].split(BATCH_SIZE) if len(share)]


def gaussians_of_folds(folds: Sequence[Sequence[Moments]]) -> Gaussians:
    """Those of the images of these folds together."""
    return Gaussians(
        *gaussians_of([functools.reduce(operator.add, levels) for levels in zip(*folds, strict=True)])
    )


def gaussian_statistic(
    energies: Sequence[Tensor], feature_shapes: Sequence[Sequence[int]]
) -> StandardisedStatistic:
    """The statistic of a detector that is the Gaussian of each position alone.

    Args:
        energies: of the Gaussian in usual images, per level (N, H, W).
    """
    # Its own energies stand where those of the latents would.
    return fitted_statistic([*energies, *energies], feature_shapes)


def gaussian_scores(statistic: StandardisedStatistic, energies: Sequence[Tensor]) -> Tensor:
    """Anomaly score of each image by a `gaussian_statistic`, (N,); 1 is usual."""
    scores: Scores = statistic([*energies, *energies])
    return scores.anomaly_score_B


def gaussian_losses(energies: Sequence[Tensor], gaussians: Gaussians) -> Tensor:
    """Loss of each image if the Gaussian of each position were the whole model, (N,).

    Args:
        energies: of the Gaussian, per level (N, H, W).
    """
    sizes = [gaussians.whitening.mean(level).numel() for level in range(len(energies))]
    log_det = gaussians.whitening.log_det() + gaussians.positions.log_det()
    squares_N = torch.stack(
        [size * energy_NHW.mean((1, 2)) for size, energy_NHW in zip(sizes, energies, strict=True)]
    ).sum(0)
    return (squares_N / 2 - log_det) / sum(sizes)
