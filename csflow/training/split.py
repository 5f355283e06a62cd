"""Dividing images among training, validation and calibration by what they show, not by where they lie."""

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

from csflow.errors import WrongUse


class Split(NamedTuple):
    """Content digests of each part, in an order that depends on seed and digests only."""

    training: list[str]
    validation: list[str]
    """Chooses the epoch to stop at; takes no part in calibration."""
    heldout: list[str]
    """Calibrates; decides nothing about the weights."""


def split_sizes(images: int, validation: float, holdout: float) -> tuple[int, int, int]:
    """Number of training, validation and held-out images.

    Raises:
        WrongUse: a part would be empty, or nothing is left to train on.
    """
    heldout = round(images * holdout)
    validating = max(1, round(images * validation)) if validation else 0
    training = images - heldout - validating
    if heldout < 1 or training < 1:
        raise WrongUse(
            f"--holdout {holdout} and --validation {validation} of {images} images leave {heldout} for "
            f"calibration and {max(training, 0)} for training; both need at least one: add images"
        )
    return training, validating, heldout


def split_images(digests: Iterable[str], validation: float, holdout: float, seed: int) -> Split:
    """Divides distinct images by a hash of seed and content.

    The same images give the same split wherever they are stored and however they are packed. Copies of an
    image are one image, so that none is on two sides. As images are added, hardly any changes sides.

    Raises:
        WrongUse: see `split_sizes`.
    """
    order = sorted(set(digests), key=lambda digest: hashlib.sha256(f"{seed} {digest}".encode()).digest())
    _, validating, heldout = split_sizes(len(order), validation, holdout)
    # Held-out images first: another --validation leaves the calibration as it is.
    return Split(
        training=order[heldout + validating :],
        validation=order[heldout : heldout + validating],
        heldout=order[:heldout],
    )
