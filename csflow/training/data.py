"""The images of a training: which part each one belongs to, and where its features are."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from csflow.preprocessing import Preprocessing, distortion
from csflow.training.cache import INDEX
from csflow.training.split import split_images

PARTS = ("training", "validation", "heldout")
MOST_DISTORTION = 1.5
"""Up to which change of their aspect ratio images are stretched without a word."""
SPLIT = pa.schema([pa.field("part", pa.string(), nullable=False), *INDEX])


@dataclass(frozen=True)
class TrainingData:
    """The images that can be read, each content once, divided."""

    split: pa.Table
    """Rows in the `SPLIT` schema; their order within a part depends on seed and contents only."""
    copies: int
    """Images left out because another one has the same bytes."""
    unreadable: int

    @classmethod
    def divide(cls, cached: pa.Table, validation: float, holdout: float, seed: int) -> "TrainingData":
        """Raises WrongUse if too few images are left.

        Args:
            cached: rows in the `INDEX` schema.
        """
        readable = cached.filter(pc.is_valid(pc.field("content_digest")))
        rows: dict[str, int] = {}
        for row, digest in enumerate(readable["content_digest"].to_pylist()):
            rows.setdefault(digest, row)
        parts = split_images(rows, validation, holdout, seed)
        order = [rows[digest] for part in parts for digest in part]
        names = [name for name, part in zip(PARTS, parts, strict=True) for _ in part]
        split = readable.take(pa.array(order, pa.int64())).add_column(0, SPLIT.field("part"), pa.array(names))
        return cls(split, readable.num_rows - len(rows), cached.num_rows - readable.num_rows)

    def part(self, name: str) -> pa.Table:
        return self.split.filter(pc.field("part") == name)

    def summary(self) -> str:
        training, validation, heldout = (self.part(name).num_rows for name in PARTS)
        copies = f"; {self.copies} copies of others left out" if self.copies else ""
        return (
            f"{training} images to train on, {validation} to choose the epoch, {heldout} held out for "
            f"calibration{copies}"
        )


def stretch_warning(cached: pa.Table, preprocessing: Preprocessing) -> str | None:
    """What to say of images that are stretched by more than `MOST_DISTORTION`; None if there are none.

    Args:
        cached: rows in the `INDEX` schema.
    """
    if preprocessing.fit != "stretch":
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
