"""Cross-calibration: further trainings, each without a fold of the images, which it then scores.

Few images are too precious to be set aside. So the model is trained on all of them, and the scores that
calibrate it come from trainings that differ from its own by nothing but the fold that they leave out.
docs/calibration.md says what that promises.

Dimension letter: N images.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from csflow.model import Gaussians
from csflow.training.gaussians import gaussian_losses
from csflow.training.loop import Evaluation, LoopSettings, Trainer, Worker
from csflow.training.sources import FeatureSource


class Fold(NamedTuple):
    """What a training that left out a fold computes for the images of the fold."""

    places: NDArray[np.int64]
    """Where these are among all images."""
    evaluation: Evaluation
    gaussian_losses_N: Tensor
    """Losses if the Gaussian of each position were the whole model."""


def train_fold(
    settings: LoopSettings,
    worker: Worker,
    images: pa.Table,
    fold: int,
    fitted: Callable[[pa.Table], Gaussians],
    opened: Callable[[pa.Table, Gaussians], FeatureSource],
) -> Fold:
    """Trains on all images but those of a fold, and evaluates these. All workers call it together.

    Args:
        settings: those of the training on all images.
        images: rows in the `SPLIT` schema, which tells the fold of each.
        fitted: fits the Gaussians of images.
        opened: opens the features of images, whitened by these Gaussians.

    Raises:
        FloatingPointError: the training diverges.
    """
    is_left_out = images["fold"].to_numpy() == fold
    left_out, others = images.filter(pa.array(is_left_out)), images.filter(pa.array(~is_left_out))
    gaussians = fitted(others)
    source = opened(others, gaussians)
    trainer = Trainer(settings, worker, source, opened(images.slice(0, 0), gaussians), gaussians)
    while not trainer.is_finished:
        trainer.run_epoch()
    trainer.whiten_latents(source)
    evaluation = trainer.evaluate(opened(left_out, gaussians))
    levels = len(source.feature_shapes)
    return Fold(
        np.flatnonzero(is_left_out),
        evaluation,
        gaussian_losses(evaluation.energies[:levels], gaussians.cpu()),
    )
