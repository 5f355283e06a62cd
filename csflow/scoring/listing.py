"""The frozen listing: what a run found in its input, written down before any work starts."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import pyarrow as pa

from csflow.inputs.listing import LISTING
from csflow.storage import Location, read_parquet, to_parquet

PART_ROWS = 500_000


@dataclass(frozen=True)
class Listing:
    """A frozen listing in the `LISTING` schema, in parts of `PART_ROWS` images."""

    folder: Location
    images: int

    @classmethod
    def freeze(cls, folder: Location, batches: Iterable[pa.RecordBatch], limit: int | None) -> "Listing":
        """Writes the first `limit` images of a listing, or all, part by part."""
        images = 0
        for number, part in enumerate(_parts(_first(batches, limit))):
            (folder / f"part-{number:05d}.parquet").write(to_parquet(part))
            images += part.num_rows
        return cls(folder, images)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The listing in its order; a part at a time is in memory."""
        for part in self.folder.find(".parquet"):
            yield from read_parquet(part, LISTING).to_batches(max_chunksize=65_536)


def _first(batches: Iterable[pa.RecordBatch], limit: int | None) -> Iterator[pa.RecordBatch]:
    left = limit
    for batch in batches:
        yield batch.slice(0, left)
        if left is not None:
            left -= batch.num_rows
            if left <= 0:
                return


def _parts(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Groups batches into tables of about `PART_ROWS` rows."""
    iterator = iter(batches)
    for first in iterator:
        part, rows = [first], first.num_rows
        while rows < PART_ROWS and (following := list(islice(iterator, 1))):
            part += following
            rows += following[0].num_rows
        yield pa.Table.from_batches(part, LISTING)
