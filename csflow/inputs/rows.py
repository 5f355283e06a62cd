"""Images in rows of Parquet files: a row's URI is `<file uri>#<row>`, its version the file's.

If `--image_column` chooses another column than csflow would, the version also names the column, since reading
needs it and other bytes are another image: `<file version>:column=<path>`.
"""

import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from itertools import accumulate
from threading import Lock
from typing import Any, Generic, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from csflow.errors import OF_CONTENT, ErrorCode, ImageError
from csflow.inputs.objects import MAX_RANGE_BYTES, ObjectStore, StoredObject
from csflow.inputs.store_errors import check_size, parsing

SUFFIX = ".parquet"
ROW_URI = re.compile(r"(?s)(?P<file>.*\.parquet)#(?P<row>\d{1,18})", re.IGNORECASE)
COLUMN_NAMES = ("image", "bytes", "image_bytes", "data", "content", "img", "jpg", "jpeg", "png", "webp")
"""Usual names of columns of image bytes, in any case; of several the first in this list counts."""
OF_COLUMN = ":column="
FILES_KEPT = 8
ROW_GROUPS_KEPT = 2
MAX_ROWS = 10_000_000
"""Largest number of rows of a file: a file of two megabytes may say that it has a billion, all null."""
PIECE_BYTES = 64 << 20
"""About how much is unpacked at once: in a dictionary a few bytes stand for a whole image."""

Value = TypeVar("Value")


class Outline(NamedTuple):
    """What the footer of a Parquet file says about images in it."""

    column_names: tuple[str, ...]
    column: str | None
    """Path of the column of image bytes; None if there is none."""
    is_chosen: bool
    """Whether this is another column than csflow would take by itself."""
    groups: tuple[tuple[int, int], ...]
    """For each row group the number of its rows, and their average size in bytes."""

    def images(self, file: StoredObject) -> Iterator[StoredObject]:
        """The rows of the file."""
        first = 0
        for rows, size in self.groups:
            for row in range(first, first + rows):
                yield StoredObject(f"{file.uri}#{row}", self.version(file), size, file.modified_at)
            first += rows

    def find(self, file: StoredObject, uri: str) -> StoredObject | None:
        """The row of this URI."""
        part, first = split_row(uri), 0
        if self.column is None or part is None or uri != f"{file.uri}#{part[1]}":
            return None
        for rows, size in self.groups:
            if part[1] < first + rows:
                return StoredObject(uri, self.version(file), size)
            first += rows
        return None

    def version(self, file: StoredObject) -> str:
        """The version of every row."""
        return f"{file.version}{OF_COLUMN}{self.column}" if self.is_chosen else file.version


def split_row(uri: str) -> tuple[str, int] | None:
    """File URI and row number; None if the URI names no row."""
    match = ROW_URI.fullmatch(uri)
    return (match["file"], int(match["row"])) if match else None


def image_column(schema: pa.Schema) -> str | None:
    """Path of the column of image bytes: a column with a usual name, else the only possible one.

    `image.bytes` is the field of Hugging Face's struct<bytes, path>. Bytes of fixed length need a usual name:
    they are rather digests.
    """
    columns: dict[str, str] = {}
    named: dict[str, str] = {}
    for field in schema:
        path = _bytes_path(field)
        if path is None:
            continue
        if field.name.lower() in COLUMN_NAMES:
            named.setdefault(field.name.lower(), path)
        if not pa.types.is_fixed_size_binary(field.type):
            columns[field.name] = path
    best = next((named[name] for name in COLUMN_NAMES if name in named), None)
    return best or (next(iter(columns.values())) if len(columns) == 1 else None)


def open_parquet(
    store: ObjectStore, file: StoredObject, metadata: pq.FileMetaData | None = None
) -> pq.ParquetFile:
    """Opens a Parquet file. Raises ImageError CORRUPT if it is none, or as `ObjectStore.fetch`."""
    with parsing("Parquet file"):
        return pq.ParquetFile(store.open(file), metadata=metadata)


def outline(store: ObjectStore, file: StoredObject, chosen: str | None) -> Outline:
    """What a file's footer says, which alone is read. A hostile one may end this process.

    Args:
        chosen: path of the column of image bytes, if the user has named it.

    Raises:
        ImageError: TOO_LARGE above `MAX_ROWS`, or as `open_parquet`.
    """
    parquet = open_parquet(store, file)
    with parsing("Parquet file"):
        schema, metadata = parquet.schema_arrow, parquet.metadata
        names = tuple(schema.names)
        usual = image_column(schema)
        column = usual
        if chosen is not None:
            column = chosen if _is_binary(_type_at(schema, chosen)) else None
        if column is None:
            return Outline(names, None, False, ())
        if metadata.num_rows > MAX_ROWS:
            raise ImageError(ErrorCode.TOO_LARGE, f"{metadata.num_rows} rows; at most {MAX_ROWS} are listed")
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        sizes = tuple(
            (group.num_rows, _chunk(group, column).total_compressed_size // max(1, group.num_rows))
            for group in groups
        )
    return Outline(names, column, column != usual, sizes)


class RowReader:
    """Reads single rows. Keeps the last footers and row groups, since neighbours are read together.

    Threads may share it. If several need one row group, one fetches it and the others wait.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._footers = _Cache[_Footer](FILES_KEPT)
        self._groups = _Cache[list[bytes | None]](ROW_GROUPS_KEPT)

    def read(self, file_uri: str, version: str, row: int, max_bytes: int) -> bytes:
        """The bytes of a row; empty if the row is null.

        Raises:
            ImageError: NOT_FOUND if there is no such row, CORRUPT, UNSUPPORTED_FORMAT without a column of
                images, TOO_LARGE for a row above `max_bytes` or a row group above `MAX_RANGE_BYTES` (packed
                or unpacked), or as `ObjectStore.fetch`.
        """
        file = (file_uri, version)
        footer = self._footers.get(file, lambda: self._read_footer(*file))
        number = bisect_right(footer.row_ends, row)
        if number == len(footer.row_ends):
            raise ImageError(ErrorCode.NOT_FOUND, f"the file has {footer.metadata.num_rows} rows")
        images = self._groups.get((*file, number), lambda: self._read_group(footer, number))
        data = images[row - (footer.row_ends[number - 1] if number else 0)] or b""
        check_size(len(data), max_bytes)
        return data

    def _read_footer(self, uri: str, version: str) -> "_Footer":
        version, _, chosen = version.partition(OF_COLUMN)
        # The size now; should it belong to another version, the first read of bytes finds that out.
        file = StoredObject(uri, version, self._store.stat(uri).size)
        parquet = open_parquet(self._store, file)
        column = chosen or image_column(parquet.schema_arrow)
        if column is None:
            raise ImageError(ErrorCode.UNSUPPORTED_FORMAT, "no column of the Parquet file holds image bytes")
        groups = range(parquet.metadata.num_row_groups)
        row_ends = accumulate(parquet.metadata.row_group(number).num_rows for number in groups)
        return _Footer(file, parquet.metadata, column, list(row_ends))

    def _read_group(self, footer: "_Footer", number: int) -> list[bytes | None]:
        parquet = open_parquet(self._store, footer.file, footer.metadata)
        with parsing("Parquet file"):
            # A piece of a dictionary's values may be as many times the dictionary as it has rows.
            unpacked = _chunk(footer.metadata.row_group(number), footer.column).total_uncompressed_size
            rows = min(max(1, PIECE_BYTES // max(1, unpacked)), 65_536)
            images: list[bytes | None] = []
            size = 0
            for batch in parquet.iter_batches(rows, [number], [footer.column], use_threads=False):
                for value in _values(batch, footer.column):
                    images.append(value)
                    size += len(value or b"")
                if size > MAX_RANGE_BYTES:
                    images.clear()  # The error is kept, and with it what this function holds.
                    raise ImageError(ErrorCode.TOO_LARGE, "its row group unpacks to more than 1 GiB")
        return images


class _Footer(NamedTuple):
    file: StoredObject
    metadata: pq.FileMetaData
    column: str
    row_ends: list[int]
    """For each row group, the number of rows up to its end."""


class _Cache(Generic[Value]):
    """Keeps the last results of slow calls. A caller waits for a result that another is computing.

    What the content of a file is to blame for is kept, too: all rows of a row group ask for the same.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = Lock()
        self._results: OrderedDict[Hashable, Future[Value]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        with self._lock:
            result = self._results.get(key)
            is_first = result is None
            if result is None:
                result = self._results[key] = Future()
            self._results.move_to_end(key)
            while len(self._results) > self._size:
                self._results.popitem(last=False)
        if is_first:
            self._make(key, result, make)
        return result.result()

    def _make(self, key: Hashable, result: Future[Value], make: Callable[[], Value]) -> None:
        try:
            result.set_result(make())
        except BaseException as error:
            # Any other failure is for those who wait now; later calls try again.
            is_kept = isinstance(error, ImageError) and error.code in OF_CONTENT
            with self._lock:
                if not is_kept and self._results.get(key) is result:
                    del self._results[key]
            result.set_exception(error)


def _bytes_path(field: pa.Field) -> str | None:
    """Path of the bytes in a column: itself, the field `bytes` of a struct, or a struct's only such field."""
    if not pa.types.is_struct(field.type):
        return field.name if _is_binary(field.type) else None
    inner = [child.name for child in field.type if _is_binary(child.type)]
    if "bytes" in inner:
        return f"{field.name}.bytes"
    return f"{field.name}.{inner[0]}" if len(inner) == 1 else None


def _type_at(schema: pa.Schema, path: str) -> pa.DataType | None:
    """The type of a column, or of a field of a struct; None if there is none. A name may itself have dots."""
    fields: Any = schema
    for field in fields:
        if field.name == path:
            return field.type
        if path.startswith(f"{field.name}.") and pa.types.is_struct(field.type):
            return _type_at(field.type, path[len(field.name) + 1 :])
    return None


def _values(batch: pa.RecordBatch, path: str) -> Iterator[bytes | None]:
    """The bytes of one column or field of a struct, which is the only one in the batch."""
    column = batch.column(0)
    while pa.types.is_struct(column.type):
        column = column.flatten()[0]  # nulls of the struct are those of its fields, too
    return (value.as_py() for value in column)


def _chunk(group: pq.RowGroupMetaData, path: str) -> pq.ColumnChunkMetaData:
    chunks = (group.column(index) for index in range(group.num_columns))
    return next(chunk for chunk in chunks if chunk.path_in_schema == path)


def _is_binary(kind: pa.DataType | None) -> bool:
    if kind is None:
        return False
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_one = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
        pa.types.is_fixed_size_binary,
    )
    return any(is_kind(kind) for is_kind in is_one)
