"""Looks into Parquet files in a child process: some make pyarrow end the process that opens them."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TypeVar

import pyarrow as pa

from csflow.errors import ErrorCode, ImageError
from csflow.inputs import manifests, rows
from csflow.inputs.child_process import Child, ChildDied
from csflow.inputs.objects import ObjectStore, StoredObject
from csflow.inputs.rows import Outline

T = TypeVar("T")

PIECE_ROWS = 10_000
OPEN_MANIFESTS = 4


class ParquetFiles:
    """Looks into Parquet files of a store; one child process does so for all. Threads may share it.

    A file on which the child dies is tried again alone, in another child: another file may be to blame.
    """

    def __init__(self, store: ObjectStore, image_column: str | None = None) -> None:
        self._store = store
        self._image_column = image_column
        self._child: Child | None = None
        self._careful: Child | None = None
        """Has one call at a time."""
        self._lock, self._alone = threading.Lock(), threading.Lock()

    def outline(self, file: StoredObject) -> Outline:
        """What the footer of a file says.

        Raises:
            ImageError: CRASHED if the file kills the process that reads it, or as `rows.outline`.
        """
        return self._isolated(lambda child: child.call(rows.outline, file, self._image_column))

    def manifest(self, file: StoredObject) -> Iterator[pa.RecordBatch]:
        """The columns of a manifest, a bounded number of rows at a time. Raises as `outline`."""
        number = 0
        while (batch := self._piece(file, number)) is not None:
            yield batch
            number += 1

    def close(self) -> None:
        """Ends the child processes."""
        with self._lock, self._alone:
            for child in (self._child, self._careful):
                if child is not None:
                    child.close()
            self._child = self._careful = None

    def _piece(self, file: StoredObject, number: int) -> pa.RecordBatch | None:
        return self._isolated(lambda child: child.call(manifest_piece, file, number))

    def _isolated(self, call: Callable[[Child], T]) -> T:
        with self._lock:
            if self._child is None:
                self._child = Child(self._store)
            child = self._child
        try:
            return call(child)
        except ChildDied:
            with self._lock:
                if self._child is child:
                    self._child = None
        with self._alone:
            if self._careful is None:
                self._careful = Child(self._store)
            try:
                return call(self._careful)
            except ChildDied:
                self._careful = None
                message = "the process that looked into it died, two times"
                raise ImageError(ErrorCode.CRASHED, message) from None


_open_manifests: OrderedDict[StoredObject, tuple[int, Iterator[pa.RecordBatch]]] = OrderedDict()
"""In the child: manifests that are being read, each with the number of its next piece."""


def manifest_piece(store: ObjectStore, file: StoredObject, number: int) -> pa.RecordBatch | None:
    """The rows of a manifest from `number · PIECE_ROWS` on; None after the last."""
    next_number, pieces = _open_manifests.pop(file, (-1, iter(())))
    if next_number != number:
        pieces = islice(manifests.parquet_batches(rows.open_parquet(store, file), PIECE_ROWS), number, None)
    piece = next(pieces, None)
    if piece is not None:
        _open_manifests[file] = (number + 1, pieces)
    while len(_open_manifests) > OPEN_MANIFESTS:
        _open_manifests.popitem(last=False)
    return piece
