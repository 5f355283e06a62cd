"""Divides images among training, validation and calibration by their content, not by where they lie."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from csflow.errors import WrongUse
from csflow.training.cache import INDEX

PARTS = ("training", "validation", "heldout")
TRIMMED = "trimmed"
"""The part for training images that are left out because they are unlike the others."""
FEWEST_TRAINING = 3
"""Smallest number of images to train on: what is usual cannot be told from one or two."""
FEWEST_IMAGES = 10
"""Smallest number of images that a training accepts. With so few, scoring can only rank."""
FOLDS = 5
"""Number of further trainings of a cross-calibration. Each leaves out a fold, the fifth of the images that it
scores."""
SPLIT = pa.schema([pa.field("part", pa.string(), nullable=False), *INDEX])


class Split(NamedTuple):
    """Content digests of each part, in an order that depends only on seed and digests."""

    training: list[str]
    validation: list[str]
    """Images that choose the epoch to keep; they take no part in the calibration."""
    heldout: list[str]
    """Images that calibrate; they decide nothing about the weights."""


def check_shares(validation: float, holdout: float) -> None:
    """Raises WrongUse if these shares leave nothing to train on, however many images there are."""
    if validation + holdout >= 1:
        raise WrongUse(
            f"--holdout {holdout:g} and --validation {validation:g} leave no image to train on; lower them"
        )


def check_enough(images: int) -> None:
    """Raises WrongUse if no useful model can come of so few images, whatever the shares are."""
    if images < FEWEST_IMAGES:
        raise WrongUse(
            f"--input has {images} image{'s' * (images != 1)}, and what is normal cannot be told from fewer "
            f"than {FEWEST_IMAGES}; add images of good parts, at least 100 for a first try"
        )


def split_sizes(images: int, validation: float, holdout: float, why: str = "") -> tuple[int, int, int]:
    """Number of training, validation and held-out images.

    Args:
        why: why there are no more images, for the message.

    Raises:
        WrongUse: a part would have too few images.
    """
    heldout = round(images * holdout)
    validating = max(1, round(images * validation)) if validation else 0
    training = images - heldout - validating
    if heldout < 1 or training < FEWEST_TRAINING:
        is_enough = images > FEWEST_TRAINING + bool(validation)
        change = "raise --holdout" if heldout < 1 else "lower --holdout or --validation"
        raise WrongUse(
            f"--holdout {holdout:g} and --validation {validation:g} of {images} images{why} leave "
            f"{heldout} for calibration and {max(training, 0)} for training, which need at least 1 and "
            f"{FEWEST_TRAINING}; {f'{change}, or ' if is_enough else ''}add images"
        )
    return training, validating, heldout


def split_images(
    digests: Iterable[str], validation: float, holdout: float, seed: int, why: str = ""
) -> Split:
    """Divides distinct images by a hash of seed and content.

    The same images give the same split, wherever and however they are stored. Copies of an image count as one
    image, so they are in one part. When images are added, hardly any image changes its part.

    Raises:
        WrongUse: see `split_sizes`.
    """
    order = _order(digests, seed)
    _, validating, heldout = split_sizes(len(order), validation, holdout, why)
    # Held-out images first: another --validation leaves the calibration as it is.
    return Split(
        training=order[heldout + validating :],
        validation=order[heldout : heldout + validating],
        heldout=order[:heldout],
    )


def split_in_folds(digests: Iterable[str], seed: int, why: str = "") -> Split:
    """Distinct images that are all trained on, and held out in turn, in an order as that of `split_images`.

    Raises:
        WrongUse: there are fewer images than folds.
    """
    order = _order(digests, seed)
    if len(order) < FOLDS:
        raise WrongUse(
            f"{len(order)} different images{why} are too few to train and to calibrate; add images"
        )
    return Split(order, [], [])


def _order(digests: Iterable[str], seed: int) -> list[str]:
    """Distinct digests by a hash of seed and content."""
    return sorted(set(digests), key=lambda digest: hashlib.sha256(f"{seed} {digest}".encode()).digest())


@dataclass(frozen=True)
class TrainingData:
    """The readable images, each content once, divided into parts."""

    split: pa.Table
    """Rows in the `SPLIT` schema; their order within a part depends only on seed and contents."""
    copies: int
    """Number of images left out because another image has the same bytes."""
    unreadable: int
    is_cross: bool = False
    """Whether all images are trained on and held out in turn, instead of once and for all."""

    @classmethod
    def divide(
        cls, cached: pa.Table, validation: float, holdout: float, seed: int, is_cross: bool = False
    ) -> "TrainingData":
        """Divides the images in these rows of `INDEX`. Raises WrongUse if too few images are left.

        Args:
            is_cross: hold all images out in turn; the two shares then play no part.
        """
        readable = cached.filter(pc.is_valid(pc.field("content_digest")))
        rows: dict[str, int] = {}
        for row, digest in enumerate(readable["content_digest"].to_pylist()):
            rows.setdefault(digest, row)
        copies, unreadable = readable.num_rows - len(rows), cached.num_rows - readable.num_rows
        left_out = {"are copies of others": copies, "cannot be read": unreadable}
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
        why = f" ({reasons}, of {cached.num_rows})" if reasons else ""
        parts = (
            split_in_folds(rows, seed, why)
            if is_cross
            else split_images(rows, validation, holdout, seed, why)
        )
        order = [rows[digest] for part in parts for digest in part]
        names = [name for name, part in zip(PARTS, parts, strict=True) for _ in part]
        split = readable.take(pa.array(order, pa.int64())).add_column(0, SPLIT.field("part"), pa.array(names))
        return cls(split, copies, unreadable, is_cross)

    def trimmed(self, content_digests: Iterable[str]) -> "TrainingData":
        """The same data, with these training images left out."""
        left_out = set(content_digests)
        parts = [
            TRIMMED if digest in left_out else part
            for part, digest in zip(
                self.split["part"].to_pylist(), self.split["content_digest"].to_pylist(), strict=True
            )
        ]
        return replace(self, split=self.split.set_column(0, SPLIT.field("part"), pa.array(parts)))

    def part(self, name: str) -> pa.Table:
        return self.split.filter(pc.field("part") == name)

    @property
    def calibrating(self) -> pa.Table:
        """The images whose scores become the calibration."""
        return self.part("training" if self.is_cross else "heldout")

    def summary(self) -> str:
        training, validation, heldout = (self.part(name).num_rows for name in PARTS)
        copies = f"; {self.copies} copies of others left out" if self.copies else ""
        if self.is_cross:
            return (
                f"{training} images to train on, each held out in turn for calibration, from one of {FOLDS} "
                f"further trainings{copies}"
            )
        return (
            f"{training} images to train on, {validation} to choose the epoch, {heldout} held out for "
            f"calibration{copies}"
        )
