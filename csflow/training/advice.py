"""Warns that a training has too few images, stretches them, was too short, or that the flow is no use."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from csflow.calibration import heldout_for, lowest_rate, why_none_is_flagged
from csflow.config import FALSE_POSITIVE_RATE
from csflow.preprocessing import Preprocessing, distortion

MOST_DISTORTION = 1.5
"""Largest change of the aspect ratio for which stretching gives no warning."""
STILL_FALLING = 0.005
"""A validation loss (per dimension) that falls by more than this in the last epoch has not settled."""


def advice(
    history: Sequence[Mapping[str, Any]],
    validation_loss: float | None,
    gaussian_loss: float | None,
    epochs: int,
    recommended_epochs: int,
    learning_rate: float,
) -> list[str]:
    """A line for each thing to do better, with the remedy; empty if all is well or nothing is known.

    Args:
        history: each `Epoch` as a dictionary.
        validation_loss: that of the finished model; None without validation images.
        gaussian_loss: validation loss of the Gaussian of each position; None without whitening.
        epochs: largest number of epochs that was allowed.
        recommended_epochs: the recipe's number of epochs for these images.
        learning_rate: that of the training.
    """
    if validation_loss is None:
        return []
    # A cross-calibration has a validation loss of the end alone.
    losses = [line["validation_loss"] for line in history if line["validation_loss"] is not None]
    best = min(losses, default=validation_loss)
    has_risen = bool(losses) and losses[0] == best and losses[-1] - best > STILL_FALLING
    is_falling = len(losses) == epochs > 1 and losses[-1] == best and losses[-2] - best > STILL_FALLING
    is_worse = gaussian_loss is not None and validation_loss >= gaussian_loss
    slower = f"lower --learning_rate, which is {learning_rate:g}"
    more_epochs = recommended_epochs if epochs < recommended_epochs else 2 * epochs
    longer = f"train for longer (--epochs {more_epochs})"
    lines = []
    if is_worse:
        # A flow begins as that Gaussian: what is worse was moved too far, unless it had no time to come back.
        remedy = longer if epochs < recommended_epochs and not has_risen else slower
        lines.append(
            "warning: the flow is no better than a Gaussian of each position (validation loss "
            f"{validation_loss:.4f}, the Gaussian's {gaussian_loss:.4f}); {remedy}"
        )
    elif has_risen:
        rise = losses[-1] - best
        lines.append(f"warning: the validation loss rose from the first epoch on, by {rise:.4f}; {slower}")
    elif is_falling:
        lines.append(
            f"warning: the validation loss was still falling, by {losses[-2] - best:.4f} in the last epoch; "
            f"{longer}"
        )
    return lines


def calibration_warning(
    images: int,
    heldout: int,
    holdout: float,
    validation: float,
    is_cross: bool = False,
    unit: str = "images",
) -> str | None:
    """A warning that the model cannot flag any image at the usual rate, with the remedies; None if it can.

    Args:
        images: number of different images, of which `heldout` are held out.
        holdout: the share of them that is; `validation` likewise.
        is_cross: whether all are held out in turn.
        unit: what is counted, `images` or `parts`.
    """
    why = why_none_is_flagged(heldout, FALSE_POSITIVE_RATE, unit)
    if why is None:
        return None
    needed = heldout_for(FALSE_POSITIVE_RATE)
    if is_cross:
        return (
            f"{why}; train on {needed} {unit}, or score with --false_positive_rate {lowest_rate(heldout):g}"
        )
    remedies = [f"train on {math.ceil(needed / holdout - 1e-9)} {unit}"]
    share = math.ceil(100 * needed / max(1, images)) / 100
    # Not at the price of the training: as many images have to be left for it.
    if share <= (1 - validation) / 2:
        remedies.append(f"train with --holdout {share:g}")
    remedies.append(f"score with --false_positive_rate {lowest_rate(heldout):g}")
    return f"{why}; {', or '.join(remedies)}"


def stretch_warning(cached: pa.Table, preprocessing: Preprocessing) -> str | None:
    """A warning about images (rows of `INDEX`) stretched by more than `MOST_DISTORTION`; None without any."""
    if preprocessing.fit != "stretch" or preprocessing.tiling:
        return None
    size = preprocessing.image_size
    sides = zip(cached["image_height"].to_pylist(), cached["image_width"].to_pylist(), strict=True)
    found = np.array([distortion(size, *pair) for pair in sides if None not in pair])
    strong = found[found > MOST_DISTORTION]
    if not len(strong):
        return None
    return (
        f"warning: {len(strong)} of {len(found)} images are stretched by more than {MOST_DISTORTION} to "
        f"become {size[0]} x {size[1]} pixels (median {np.median(strong):.2f}); --fit letterbox pads them "
        "instead, --fit crop takes their middle, --image_size can give height and width in their ratio"
    )
