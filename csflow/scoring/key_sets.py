"""Sets of images that may exceed memory: hashes, stored in parts on local disk."""

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from csflow.output.schemas import KEY_COLUMNS

KEY_PARTS = 256
BUFFER_ROWS = 1 << 18

Keys = NDArray[np.bytes_]
"""128-bit hashes: 16 bytes per image, where a URI would take about a hundred."""

KEYED = np.dtype([("key", "S16"), ("number", "<i8")])
Keyed = NDArray[np.void]
"""Keys with a number each, such as the position in the listing, in the dtype `KEYED`."""


def keys(table: pa.RecordBatch | pa.Table, columns: Sequence[str] = KEY_COLUMNS) -> Keys:
    """The keys of image versions, or of other columns, in order."""
    rows = zip(*(table[name].to_pylist() for name in columns), strict=True)
    digests = (hashlib.blake2b("\0".join(row).encode(), digest_size=16).digest() for row in rows)
    return np.frombuffer(b"".join(digests), dtype="S16")


class Partitioned:
    """Numpy records in numbered parts, one of which is in memory at a time.

    Up to `BUFFER_ROWS` new records wait in memory; more go to a temporary folder (TMPDIR), which lasts as
    long as this object.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._rows = 0
        self._buffer: list[tuple[NDArray[Any], NDArray[np.int64]]] = []
        self._buffered_rows = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __len__(self) -> int:
        return self._rows

    def add(self, records: NDArray[Any], parts: NDArray[np.int64]) -> None:
        """Adds each record to the part with the number given beside it."""
        # Most parts of few images are empty, and each part looks through what is buffered.
        if not len(records):
            return
        self._rows += len(records)
        self._buffered_rows += len(records)
        self._buffer.append((records, parts))
        if self._buffered_rows > BUFFER_ROWS:
            self._spill()

    def part(self, number: int) -> NDArray[Any]:
        """The records of a part, in the order in which they were added."""
        file = self._file(number)
        stored = [np.fromfile(file, self._dtype)] if file and file.exists() else []
        return np.concatenate(
            [
                np.empty(0, self._dtype),
                *stored,
                *(records[parts == number] for records, parts in self._buffer),
            ]
        )

    def _spill(self) -> None:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="csflow-")
        records, parts = (np.concatenate(column) for column in zip(*self._buffer, strict=True))
        order = np.argsort(parts, kind="stable")
        numbers, starts = np.unique(parts[order], return_index=True)
        for number, group in zip(numbers, np.split(records[order], starts[1:]), strict=True):
            file = self._file(int(number))
            assert file is not None
            with file.open("ab") as out:
                group.tofile(out)
        self._buffer, self._buffered_rows = [], 0

    def _file(self, part: int) -> Path | None:
        return Path(self._folder.name) / str(part) if self._folder else None


class KeySet:
    """A set of keys with numbers, in `KEY_PARTS` parts. Equal keys are in the same part of every set."""

    def __init__(self) -> None:
        self._partitioned = Partitioned(KEYED)

    def __len__(self) -> int:
        return len(self._partitioned)

    def add(self, keys: Keys, numbers: NDArray[np.int64] | int = 0) -> None:
        records = np.empty(len(keys), KEYED)
        records["key"], records["number"] = keys, numbers
        first_bytes = np.ascontiguousarray(keys).view(np.uint8)[::16]
        self._partitioned.add(records, first_bytes.astype(np.int64))

    def parts(self) -> Iterator[Keyed]:
        return map(self._partitioned.part, range(KEY_PARTS))


def joined_parts(sets: Sequence[KeySet]) -> Iterator[Keyed]:
    """The parts of several sets together."""
    return (np.concatenate(parts) for parts in zip(*(keys.parts() for keys in sets), strict=True))


def repeated(keyed: Keyed) -> Keyed:
    """Among records with equal keys, all but the one with the lowest number."""
    ordered = keyed[np.lexsort((keyed["number"], keyed["key"]))]
    return ordered[1:][ordered["key"][1:] == ordered["key"][:-1]]


class Omitted:
    """Rows to leave out of a stream of batches, by their position in it."""

    def __init__(self, positions: Iterable[NDArray[np.int64]]) -> None:
        self._partitioned = Partitioned(np.dtype("<i8"))
        for some in positions:
            self._partitioned.add(some, some // BUFFER_ROWS)
        self._part = lru_cache(maxsize=2)(self._partitioned.part)

    def __len__(self) -> int:
        return len(self._partitioned)

    def drop_from(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        start = 0
        for batch in batches:
            end = start + batch.num_rows
            is_kept = np.ones(batch.num_rows, dtype=bool)
            for part in range(start // BUFFER_ROWS, end // BUFFER_ROWS + 1):
                positions = self._part(part)
                is_kept[positions[(start <= positions) & (positions < end)] - start] = False
            yield batch.filter(pa.array(is_kept))
            start = end
