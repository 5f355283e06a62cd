"""Reads a listed image: the bytes of the version that was listed, or an error that says why not."""

from collections.abc import Mapping
from typing import Any

from csflow.errors import ErrorCode, ImageError
from csflow.inputs import archives, rows
from csflow.inputs.objects import ObjectStore, StoredObject
from csflow.inputs.parquet_files import ParquetFiles
from csflow.inputs.store_errors import image_error

MAX_BYTES = 512 << 20


class ImageReader:
    """Reads images of every kind that `csflow.inputs.listing` lists. Threads may share it.

    Args:
        storage_options: of remote stores.
        deadline_s: seconds during which transient failures of one image are tried again.
        max_bytes: largest image, as a file and unpacked from an archive.
    """

    def __init__(
        self, storage_options: Mapping[str, Any], deadline_s: float = 120.0, max_bytes: int = MAX_BYTES
    ) -> None:
        self._store = ObjectStore(storage_options, deadline_s)
        self._rows = rows.RowReader(self._store)
        self._parquet = ParquetFiles(self._store)
        self._max_bytes = max_bytes

    def read(self, image_uri: str, image_version: str) -> bytes:
        """The bytes of the image, at least one. Raises only ImageError, with a message without the URI."""
        try:
            data = self._read(image_uri, image_version)
        except Exception as error:
            failure = image_error(error)
        else:
            if data:
                return data
            failure = ImageError(ErrorCode.EMPTY, "it has no bytes")
        raise failure

    def _read(self, uri: str, version: str) -> bytes:
        member = archives.read_member(self._store, uri, version, self._max_bytes)
        if member is not None:
            return member
        row = rows.split_row(uri)
        if row is not None:
            return self._rows.read(row[0], version, row[1], self._max_bytes)
        if uri.lower().endswith((*archives.SUFFIXES, rows.SUFFIX)):
            raise self._why_not_listed(uri, version)
        return self._store.fetch(uri, version, limit=self._max_bytes)

    def _why_not_listed(self, uri: str, version: str) -> ImageError:
        """Why an archive or Parquet file was listed under its own URI, without its images."""
        file = StoredObject(uri, version, self._store.stat(uri).size)
        try:
            if uri.lower().endswith(rows.SUFFIX):
                is_listable = self._parquet.outline(file).column is not None
            else:
                is_listable = bool(archives.list_members(self._store, file, lambda name: True))
        except ImageError as failure:
            return failure
        if is_listable:
            return ImageError(ErrorCode.CHANGED, "it can be read now; the next run lists the images in it")
        return ImageError(ErrorCode.UNSUPPORTED_FORMAT, "it holds no images")
