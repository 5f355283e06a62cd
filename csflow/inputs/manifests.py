"""Manifests: CSV or Parquet tables that name images one by one in a column `image_uri`."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from csflow.errors import ImageError, WrongUse
from csflow.inputs import archives
from csflow.inputs.objects import UNKNOWN_VERSION, ObjectStore, StoredObject
from csflow.inputs.unlisted import Unlistable
from csflow.inputs.uris import SAME_SCHEMES, as_text, local_path, resolve
from csflow.redaction import holds_credentials

SUFFIX = ".csv"
READ_AHEAD = 4 << 20
URI = "image_uri"
COLUMNS = {URI: pa.binary(), "image_version": pa.binary(), "etag": pa.binary(), "size": pa.int64()}
"""Texts are bytes here, so that one name that is not UTF-8 does not keep the others from being read."""


def read_csv(store: ObjectStore, file: StoredObject) -> Iterator[StoredObject]:
    """The images that a CSV manifest names. Version and size default to `UNKNOWN_VERSION` and 0.

    Reads the header at once, and the rest lazily.

    Raises:
        Unlistable: the manifest is not readable as CSV, has no column `image_uri`, or a row that is refused.
        ImageError: as `ObjectStore.fetch`.
    """
    with _reading(file.uri):
        names = _open_csv(store, file, None).schema.names
    if URI not in names:
        raise Unlistable(
            f"{file.uri} has no column {URI}, only {', '.join(names)[:200]}; name it in the header"
        )
    return _images(file.uri, _csv_batches(store, file, [name for name in COLUMNS if name in names]))


def read_parquet(file_uri: str, batches: Iterable[pa.RecordBatch]) -> Iterator[StoredObject]:
    """The images that a Parquet manifest with these `parquet_batches` names, as `read_csv`."""
    return _images(file_uri, batches)


def parquet_batches(parquet: pq.ParquetFile, rows: int) -> Iterator[pa.RecordBatch]:
    """The columns of a Parquet manifest that are used, some rows at a time."""
    names = [name for name in COLUMNS if name in parquet.schema_arrow.names]
    yield from parquet.iter_batches(rows, columns=names, use_threads=False)


def is_manifest(column_names: Sequence[str]) -> bool:
    return URI in column_names


def canonical_uri(uri: str, folder: str | None = None) -> str:
    """The canonical URI of an object: absolute, without `file://`, and with one scheme for each store.

    Relative URIs start at `folder`, or at the working directory.
    """
    member = archives.split_member(uri)
    if member is not None:
        # Members keep the names that they have, `../x.jpg` too.
        return f"{canonical_uri(member[0], folder)}{archives.SEPARATOR}{member[1]}"
    path = local_path(uri)
    if path is None:
        scheme, _, rest = uri.partition("://")
        return f"{SAME_SCHEMES.get(scheme, scheme)}://{rest}"
    if folder is not None and local_path(folder) is None and not path.startswith("/"):
        return resolve(folder, path)
    return os.path.normpath(Path(folder or Path.cwd(), _at_home(path)))


def _at_home(path: str) -> Path:
    """The path with `~` replaced by a home folder, if it stands for one: a file may be named `~1.png`."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def _open_csv(store: ObjectStore, file: StoredObject, columns: list[str] | None) -> csv.CSVStreamingReader:
    convert = csv.ConvertOptions(include_columns=columns, column_types=COLUMNS)
    read = csv.ReadOptions(use_threads=False)
    with _reading(file.uri):
        return csv.open_csv(store.open(file, READ_AHEAD), read_options=read, convert_options=convert)


def _csv_batches(store: ObjectStore, file: StoredObject, columns: list[str]) -> Iterator[pa.RecordBatch]:
    # Other columns are left alone: a type guessed from the first rows need not hold for the last.
    yield from _open_csv(store, file, columns)


def _images(manifest_uri: str, batches: Iterable[pa.RecordBatch]) -> Iterator[StoredObject]:
    folder = manifest_uri.rpartition("/")[0] or "/"
    number = 0
    with _reading(manifest_uri):
        for batch in batches:
            columns = [_values(batch, name) for name in COLUMNS]
            for uri, version, etag, size in zip(*columns, strict=True):
                number += 1
                if not uri:
                    raise Unlistable(
                        f"{manifest_uri}: row {number} has no {URI}; fill it in or remove the row"
                    )
                if holds_credentials(uri):
                    raise Unlistable(
                        f"{manifest_uri}: row {number} holds credentials in its URL, which would be written "
                        "down with its score; name the object itself"
                    )
                known = str(version or etag or "").strip('"')
                yield StoredObject(canonical_uri(uri, folder), known or UNKNOWN_VERSION, size or 0)


def _values(batch: pa.RecordBatch, name: str) -> list[Any]:
    if name not in batch.schema.names:
        return [None] * len(batch)
    column = batch.column(name)
    if COLUMNS[name] != pa.binary():
        return column.cast(COLUMNS[name]).to_pylist()
    if not pa.types.is_binary(column.type):
        column = column.cast(pa.string()).cast(pa.binary())
    return [None if value is None else as_text(os.fsdecode(value)) for value in column.to_pylist()]


@contextmanager
def _reading(uri: str) -> Iterator[None]:
    """Turns whatever a parser raises on damaged or hostile bytes into one line."""
    try:
        yield
    except (WrongUse, ImageError, OSError, MemoryError, GeneratorExit):
        raise
    except Exception as error:
        text = " ".join(as_text(str(error)).split())[:300]
        raise Unlistable(f"{uri} cannot be read as a manifest: {text}; save it as CSV in UTF-8") from None
