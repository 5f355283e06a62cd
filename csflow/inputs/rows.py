"""Images in rows of Parquet files: a row's URI is `<file uri>#<row>`, its version the file's."""

import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from itertools import accumulate
from threading import Lock
from typing import Generic, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from csflow.errors import ErrorCode, ImageError
from csflow.inputs.objects import ObjectStore, StoredObject
from csflow.inputs.store_errors import parsing

SUFFIX = ".parquet"
ROW_URI = re.compile(r"(?s)(?P<file>.*\.parquet)#(?P<row>\d{1,18})", re.IGNORECASE)
COLUMN_NAMES = ("image", "bytes", "image_bytes", "data", "content")
FILES_KEPT = 8
ROW_GROUPS_KEPT = 2

Value = TypeVar("Value")


def split_row(uri: str) -> tuple[str, int] | None:
    """File URI and row number; None if the URI names no row."""
    match = ROW_URI.fullmatch(uri)
    return (match["file"], int(match["row"])) if match else None


def image_column(schema: pa.Schema) -> str | None:
    """Path of the column of image bytes: a column with a usual name, else the only possible one.

    `image.bytes` is the field of Hugging Face's struct<bytes, path>.
    """
    columns = {field.name: path for field in schema if (path := _bytes_path(field))}
    named = (columns[name] for name in COLUMN_NAMES if name in columns)
    return next(named, None) or (next(iter(columns.values())) if len(columns) == 1 else None)


def open_parquet(
    store: ObjectStore, file: StoredObject, metadata: pq.FileMetaData | None = None
) -> pq.ParquetFile:
    """Opens a Parquet file. Raises ImageError CORRUPT if it is none, or as `ObjectStore.fetch`."""
    with parsing("Parquet file"):
        return pq.ParquetFile(store.open(file), metadata=metadata)


def list_rows(store: ObjectStore, file: StoredObject) -> list[StoredObject] | None:
    """The rows of a file, read from its footer alone; None if no column holds image bytes.

    The size of a row is the average of its row group, since footers do not say more.

    Raises:
        ImageError: as `open_parquet`.
    """
    parquet = open_parquet(store, file)
    column = image_column(parquet.schema_arrow)
    if column is None:
        return None
    rows: list[StoredObject] = []
    for number in range(parquet.metadata.num_row_groups):
        group = parquet.metadata.row_group(number)
        chunks = (group.column(index) for index in range(group.num_columns))
        size = sum(chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema == column)
        numbers = range(len(rows), len(rows) + group.num_rows)
        rows += [StoredObject(f"{file.uri}#{row}", file.version, size // len(numbers)) for row in numbers]
    return rows


class RowReader:
    """Reads single rows. Keeps the last footers and row groups, since neighbours are read together.

    Threads may share it. If several need one row group, one fetches it and the others wait.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._footers = _Cache[_Footer](FILES_KEPT)
        self._groups = _Cache[pa.ChunkedArray](ROW_GROUPS_KEPT)

    def read(self, file_uri: str, version: str, row: int) -> bytes:
        """The bytes of a row; empty if the row is null.

        Raises:
            ImageError: NOT_FOUND if there is no such row, CORRUPT, UNSUPPORTED_FORMAT without a column of
                images, TOO_LARGE for a row group above `MAX_RANGE_BYTES`, or as `ObjectStore.fetch`.
        """
        file = (file_uri, version)
        footer = self._footers.get(file, lambda: self._read_footer(*file))
        number = bisect_right(footer.row_ends, row)
        if number == len(footer.row_ends):
            raise ImageError(ErrorCode.NOT_FOUND, f"the file has {footer.metadata.num_rows} rows")
        images = self._groups.get((*file, number), lambda: self._read_group(footer, number))
        first = footer.row_ends[number - 1] if number else 0
        data: bytes | None = images[row - first].as_py()
        return data or b""

    def _read_footer(self, uri: str, version: str) -> "_Footer":
        # The size now; should it belong to another version, the first read of bytes finds that out.
        file = StoredObject(uri, version, self._store.stat(uri).size)
        parquet = open_parquet(self._store, file)
        column = image_column(parquet.schema_arrow)
        if column is None:
            raise ImageError(ErrorCode.UNSUPPORTED_FORMAT, "no column of the Parquet file holds image bytes")
        groups = range(parquet.metadata.num_row_groups)
        row_ends = accumulate(parquet.metadata.row_group(number).num_rows for number in groups)
        return _Footer(file, parquet.metadata, column, list(row_ends))

    def _read_group(self, footer: "_Footer", number: int) -> pa.ChunkedArray:
        parquet = open_parquet(self._store, footer.file, footer.metadata)
        with parsing("Parquet file"):
            images = parquet.read_row_group(number, columns=[footer.column], use_threads=False).column(0)
            return pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images


class _Footer(NamedTuple):
    file: StoredObject
    metadata: pq.FileMetaData
    column: str
    row_ends: list[int]
    """For each row group, the number of rows up to its end."""


class _Cache(Generic[Value]):
    """Keeps the last results of slow calls. A caller waits for a result that another is computing."""

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
            # A failure is for those who wait now; later calls try again.
            with self._lock:
                if self._results.get(key) is result:
                    del self._results[key]
            result.set_exception(error)


def _bytes_path(field: pa.Field) -> str | None:
    kind = field.type
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return f"{field.name}.bytes" if index >= 0 and _is_binary(kind.field(index).type) else None
    return field.name if _is_binary(kind) else None


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))
