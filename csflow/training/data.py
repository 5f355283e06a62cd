"""The images of a training: which part each one belongs to, and where its features are."""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from csflow.training.cache import INDEX
from csflow.training.split import split_images

PARTS = ("training", "validation", "heldout")
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
