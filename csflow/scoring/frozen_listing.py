"""The frozen listing: the images in a run's input, stored before any work starts."""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from csflow.inputs.listing import LISTING
from csflow.scoring.key_sets import KeySet, Omitted, keys, repeated
from csflow.storage import Location, read_parquet, to_parquet

PART_ROWS = 250_000


@dataclass(frozen=True)
class Listing:
    """A frozen listing in the `LISTING` schema, each URI once, in parts of `PART_ROWS` images."""

    folder: Location
    images: int
    first_uri: str
    """The smallest URI in the listing; empty if the listing is."""
    last_uri: str
    """The largest URI in the listing."""

    @classmethod
    def freeze(cls, folder: Location, batches: Iterable[pa.RecordBatch], limit: int | None) -> "Listing":
        """Writes the first `limit` images of a listing, or all, but each URI only once.

        The listing waits on local disk, since repeated URIs are only known at its end.
        """
        images, first_uri, last_uri = 0, "", ""
        with tempfile.TemporaryDirectory(prefix="csflow-") as temporary:
            spool = Path(temporary) / "listing.arrow"
            repeats = _spool(spool, _first(batches, limit))
            for number, part in enumerate(rebatched(repeats.drop_from(_read(spool)), PART_ROWS)):
                (folder / f"part-{number:05d}.parquet").write(to_parquet(part))
                least, greatest = pc.min_max(part["image_uri"]).as_py().values()
                first_uri, last_uri = min(first_uri or least, least), max(last_uri, greatest)
                images += part.num_rows
        return cls(folder, images, first_uri, last_uri)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The batches of the listing in order; one part at a time is in memory."""
        for part in self.folder.find(".parquet"):
            yield from read_parquet(part, LISTING).to_batches(max_chunksize=65_536)

    @cached_property
    def keys(self) -> KeySet:
        """Keys of the listed image versions, with their positions, as plan and account need them."""
        listed = KeySet()
        for batch in self.batches():
            listed.add(keys(batch), np.arange(len(listed), len(listed) + batch.num_rows))
        return listed


def rebatched(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """The batches' rows in tables of `rows` rows; the last may have fewer, and none is empty."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(part.num_rows for part in waiting) >= rows:
            table = pa.Table.from_batches(waiting)
            full = table.num_rows // rows * rows
            for start in range(0, full, rows):
                yield table.slice(start, rows)
            waiting = table.slice(full).to_batches()
    if sum(part.num_rows for part in waiting):
        yield pa.Table.from_batches(waiting)


def _spool(file: Path, batches: Iterable[pa.RecordBatch]) -> Omitted:
    """Writes batches to a local file; returns the rows whose URI came up earlier."""
    found = KeySet()
    rows = 0
    with pa.ipc.new_file(file, LISTING, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        for batch in batches:
            writer.write(batch)
            found.add(keys(batch, ["image_uri"]), np.arange(rows, rows + batch.num_rows))
            rows += batch.num_rows
    return Omitted(repeated(part)["number"] for part in found.parts())


def _read(file: Path) -> Iterator[pa.RecordBatch]:
    with pa.OSFile(str(file)) as source, pa.ipc.open_file(source) as reader:
        yield from map(reader.get_batch, range(reader.num_record_batches))


def _first(batches: Iterable[pa.RecordBatch], limit: int | None) -> Iterator[pa.RecordBatch]:
    left = limit
    for batch in batches:
        yield batch.slice(0, left)
        if left is not None:
            left -= batch.num_rows
            if left <= 0:
                return
