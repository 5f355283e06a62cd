"""The frozen listing: the images in a run's input, stored before any work starts."""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from csflow.inputs.listing import LISTING
from csflow.output.schemas import TAGS
from csflow.scoring.key_sets import KeySet, Omitted, keys, repeated
from csflow.storage import Location, read_parquet, to_parquet

PART_ROWS = 250_000
FROZEN = LISTING.append(pa.field("tags", TAGS))
"""Schema of a frozen listing; tags are null if no pattern gave the image any."""

Assigned = tuple[int, Mapping[str, str] | None]
"""The number of the listing that an image comes into, and its tags."""


@dataclass(frozen=True)
class Listing:
    """A frozen listing in the `FROZEN` schema, each URI once."""

    folder: Location
    images: int
    first_uri: str
    """The smallest URI in the listing; empty if the listing is."""
    last_uri: str
    """The largest URI in the listing."""
    untagged: int = 0
    """Number of images without tags."""

    @classmethod
    def freeze(
        cls,
        folder: Location,
        batches: Iterable[pa.RecordBatch],
        limit: int | None,
        tags_of: Callable[[str], Mapping[str, str] | None] | None = None,
    ) -> "Listing":
        """Writes the first `limit` images of a listing, or all, but each URI only once.

        Args:
            tags_of: gives the tags of an image by its URI.
        """
        assign = (lambda uri: (0, tags_of(uri))) if tags_of else None
        (listing,) = freeze_apart([folder], batches, limit, assign)
        return listing

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The batches of the listing in order; one part at a time is in memory."""
        for part in self.folder.find(".parquet"):
            yield from read_parquet(part, FROZEN).to_batches(max_chunksize=65_536)

    def first_uris(self, number: int) -> list[str]:
        """So many of the URIs, or all if there are fewer."""
        first = next(self.batches(), None)
        return [] if first is None else first["image_uri"].slice(0, number).to_pylist()

    @cached_property
    def keys(self) -> KeySet:
        """Keys of the listed image versions, with their positions, as plan and account need them."""
        listed = KeySet()
        for batch in self.batches():
            listed.add(keys(batch), np.arange(len(listed), len(listed) + batch.num_rows))
        return listed


def freeze_apart(
    folders: Sequence[Location],
    batches: Iterable[pa.RecordBatch],
    limit: int | None,
    assign: Callable[[str], Assigned] | None = None,
) -> list[Listing]:
    """Writes the first `limit` images of a listing, or all, but each URI only once, each into one folder.

    The listing waits on local disk, since repeated URIs are only known at its end.

    Args:
        assign: tells by an image's URI which of the folders it comes into, and its tags; without, all come
            into the first, and have no tags.

    Returns:
        The listing in each folder, maybe of no image.
    """
    writers = [_Writer(folder) for folder in folders]
    waiting = 0
    with tempfile.TemporaryDirectory(prefix="csflow-") as temporary:
        spool = Path(temporary) / "listing.arrow"
        repeats = _spool(spool, _first(batches, limit))
        for batch in repeats.drop_from(_read(spool)):
            for number, part in _apart(batch, assign):
                writers[number].waiting.append(part)
            waiting += batch.num_rows
            if waiting >= PART_ROWS:
                waiting = 0
                for writer in writers:
                    writer.flush()
    return [writer.finished() for writer in writers]


class _Writer:
    """Writes one of several listings that are frozen at once."""

    def __init__(self, folder: Location) -> None:
        self.waiting: list[pa.RecordBatch] = []
        self._folder = folder
        self._parts = self._images = self._untagged = 0
        self._first_uri = self._last_uri = ""

    def flush(self) -> None:
        """Writes what is waiting as a part."""
        part = pa.Table.from_batches(self.waiting, FROZEN)
        self.waiting = []
        if not part.num_rows:
            return
        (self._folder / f"part-{self._parts:05d}.parquet").write(to_parquet(part))
        least, greatest = pc.min_max(part["image_uri"]).as_py().values()
        self._first_uri = min(self._first_uri or least, least)
        self._last_uri = max(self._last_uri, greatest)
        self._parts += 1
        self._images += part.num_rows
        self._untagged += part["tags"].null_count

    def finished(self) -> Listing:
        self.flush()
        return Listing(self._folder, self._images, self._first_uri, self._last_uri, self._untagged)


def _apart(
    batch: pa.RecordBatch, assign: Callable[[str], Assigned] | None
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The rows of a batch with their tags, by the number of the listing that they come into."""
    if assign is None:
        yield 0, batch.append_column(FROZEN.field("tags"), pa.nulls(batch.num_rows, TAGS))
        return
    assigned = [assign(uri) for uri in batch["image_uri"].to_pylist()]
    tags = pa.array((tags for _, tags in assigned), TAGS, size=len(assigned))
    tagged = batch.append_column(FROZEN.field("tags"), tags)
    rows: dict[int, list[int]] = defaultdict(list)
    for row, (number, _) in enumerate(assigned):
        rows[number].append(row)
    for number, some in rows.items():
        yield number, tagged.take(pa.array(some))


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
