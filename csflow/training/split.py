"""Divides images among training, validation and calibration by their content, not by where they lie."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from csflow.errors import WrongUse
from csflow.training.cache import INDEX

SUBSETS = ("training", "validation", "heldout")
TRIMMED = "trimmed"
"""The subset for training images that are left out because they are unlike the others."""
FEWEST_TRAINING = 3
"""Smallest number of images to train on: what is usual cannot be told from one or two."""
FEWEST_IMAGES = 10
"""Smallest number of images that a training accepts. With so few, scoring can only rank."""
FOLDS = 5
"""Number of further trainings of a cross-calibration. Each leaves out a fold, the fifth of the images that it
scores."""
SPLIT = pa.schema(
    [
        pa.field("subset", pa.string(), nullable=False),
        pa.field("part", pa.string()),  # that the image shows; null if parts are not known
        pa.field("fold", pa.int32(), nullable=False),  # of a cross-calibration
        *INDEX,
    ]
)


class Split(NamedTuple):
    """Content digests of each subset, in an order that depends only on seed and digests."""

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


def split_sizes(
    images: int, validation: float, holdout: float, why: str = "", unit: str = "images"
) -> tuple[int, int, int]:
    """Number of training, validation and held-out images.

    Args:
        why: why there are no more images, for the message.
        unit: what is counted, `images` or `parts`.

    Raises:
        WrongUse: a subset would have too few images.
    """
    heldout = round(images * holdout)
    validating = max(1, round(images * validation)) if validation else 0
    training = images - heldout - validating
    if heldout < 1 or training < FEWEST_TRAINING:
        is_enough = images > FEWEST_TRAINING + bool(validation)
        change = "raise --holdout" if heldout < 1 else "lower --holdout or --validation"
        raise WrongUse(
            f"--holdout {holdout:g} and --validation {validation:g} of {images} {unit}{why} leave "
            f"{heldout} for calibration and {max(training, 0)} for training, which need at least 1 and "
            f"{FEWEST_TRAINING}; {f'{change}, or ' if is_enough else ''}add {unit}"
        )
    return training, validating, heldout


Parts = Mapping[str, str]
"""The part that each image shows, by the image's content digest."""


def split_images(
    digests: Iterable[str],
    validation: float,
    holdout: float,
    seed: int,
    why: str = "",
    parts: Parts | None = None,
) -> Split:
    """Divides distinct images by a hash of seed and content; those of one part stay together.

    The same images give the same split, wherever and however they are stored. Copies of an image count as one
    image, so they are in one subset. When images are added, hardly any image changes its subset.

    Args:
        parts: which images show the same part. The shares are then of parts.

    Raises:
        WrongUse: see `split_sizes`.
    """
    order = _order(digests, seed, parts)
    _, validating, heldout = split_sizes(len(order), validation, holdout, why, _unit(parts))
    # Held-out images first: another --validation leaves the calibration as it is.
    return Split(
        training=_images(order[heldout + validating :]),
        validation=_images(order[heldout : heldout + validating]),
        heldout=_images(order[:heldout]),
    )


def split_in_folds(digests: Iterable[str], seed: int, why: str = "", parts: Parts | None = None) -> Split:
    """Distinct images that are all trained on, and held out in turn, in an order as that of `split_images`.

    Raises:
        WrongUse: there are fewer images, or parts, than folds.
    """
    order = _order(digests, seed, parts)
    if len(order) < FOLDS:
        raise WrongUse(
            f"{len(order)} different {_unit(parts)}{why} are too few to train and to calibrate; add "
            f"{_unit(parts)}"
        )
    return Split(_images(order), [], [])


def _unit(parts: object | None) -> str:
    return "images" if parts is None else "parts"


def _order(digests: Iterable[str], seed: int, parts: Parts | None) -> list[list[str]]:
    """The distinct digests of each part by a hash of seed and content; its first image gives its place."""
    order = sorted(set(digests), key=lambda digest: hashlib.sha256(f"{seed} {digest}".encode()).digest())
    together: dict[str, list[str]] = defaultdict(list)
    for digest in order:
        together[digest if parts is None else parts[digest]].append(digest)
    return list(together.values())


def _folds(images: Iterable[str], parts: Parts | None) -> Iterator[int]:
    """The fold of each image, in whose order parts follow each other: part i is in fold i modulo `FOLDS`."""
    if parts is None:
        yield from (place % FOLDS for place, _ in enumerate(images))
        return
    places: dict[str, int] = {}
    for digest in images:
        yield places.setdefault(parts[digest], len(places)) % FOLDS


def _images(order: Iterable[list[str]]) -> list[str]:
    return [digest for part in order for digest in part]


def count_units(images: pa.Table) -> int:
    """The number of parts that these images show, or of images if it is not known what they show."""
    parts = images["part"] if "part" in images.schema.names else None
    return images.num_rows if parts is None or parts.null_count else len(parts.unique())


def unit_of(images: pa.Table) -> str:
    """What `count_units` counts."""
    return _unit(images["part"] if "part" in images.schema.names else None)


@dataclass(frozen=True)
class TrainingData:
    """The readable images, each content once, divided into subsets."""

    split: pa.Table
    """Rows in the `SPLIT` schema; their order within a subset depends only on seed and contents."""
    copies: int
    """Number of images left out because another image has the same bytes."""
    unreadable: int
    is_cross: bool = False
    """Whether all images are trained on and held out in turn, instead of once and for all."""

    @classmethod
    def divide(
        cls,
        cached: pa.Table,
        validation: float,
        holdout: float,
        seed: int,
        is_cross: bool = False,
        part_of: Mapping[str, str] | None = None,
    ) -> "TrainingData":
        """Divides the images in these rows of `INDEX`. Raises WrongUse if too few images are left.

        Args:
            is_cross: hold all images out in turn; the two shares then play no role.
            part_of: the part that each image shows, by URI; None if each shows another.
        """
        readable = cached.filter(pc.is_valid(pc.field("content_digest")))
        rows: dict[str, int] = {}
        for row, digest in enumerate(readable["content_digest"].to_pylist()):
            rows.setdefault(digest, row)
        copies, unreadable = readable.num_rows - len(rows), cached.num_rows - readable.num_rows
        left_out = {"are copies of others": copies, "cannot be read": unreadable}
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
        why = f" ({reasons}, of {cached.num_rows})" if reasons else ""
        parts = None
        if part_of is not None:
            uris = readable["image_uri"].to_pylist()
            parts = {digest: part_of[uris[row]] for digest, row in rows.items()}
        subsets = (
            split_in_folds(rows, seed, why, parts)
            if is_cross
            else split_images(rows, validation, holdout, seed, why, parts)
        )
        taken = readable.take(pa.array([rows[digest] for subset in subsets for digest in subset], pa.int64()))
        columns = {
            "subset": [name for name, subset in zip(SUBSETS, subsets, strict=True) for _ in subset],
            "part": [parts and parts[digest] for subset in subsets for digest in subset],
            "fold": [fold for subset in subsets for fold in _folds(subset, parts)],
        }
        arrays = [pa.array(columns[name], SPLIT.field(name).type) for name in columns]
        split = pa.Table.from_arrays([*arrays, *taken.columns], schema=SPLIT)
        return cls(split, copies, unreadable, is_cross)

    def trimmed(self, content_digests: Iterable[str]) -> "TrainingData":
        """The same data, with these training images left out."""
        left_out = set(content_digests)
        subsets = [
            TRIMMED if digest in left_out else subset
            for subset, digest in zip(
                self.split["subset"].to_pylist(), self.split["content_digest"].to_pylist(), strict=True
            )
        ]
        return replace(self, split=self.split.set_column(0, SPLIT.field("subset"), pa.array(subsets)))

    def subset(self, name: str) -> pa.Table:
        return self.split.filter(pc.field("subset") == name)

    @property
    def has_parts(self) -> bool:
        """Whether it is known which images show the same part."""
        return self.split["part"].null_count == 0

    @property
    def calibrating(self) -> pa.Table:
        """The images whose scores become the calibration."""
        return self.subset("training" if self.is_cross else "heldout")

    def summary(self) -> str:
        training, validation, heldout = (self.subset(name).num_rows for name in SUBSETS)
        copies = f"; {self.copies} copies of others left out" if self.copies else ""
        if self.has_parts:
            units = [count_units(self.subset(name)) for name in SUBSETS]
            copies = f" ({', '.join(map(str, filter(None, units)))} parts){copies}"
        if self.is_cross:
            return (
                f"{training} images to train on, each held out in turn for calibration, from one of {FOLDS} "
                f"further trainings{copies}"
            )
        return (
            f"{training} images to train on, {validation} to choose the epoch, {heldout} held out for "
            f"calibration{copies}"
        )
