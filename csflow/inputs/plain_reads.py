"""Reads from stores that know no versions, through their fsspec drivers, and never much beyond a limit."""

from contextlib import suppress
from typing import Any

from fsspec.implementations.ftp import FTPFileSystem

from csflow.inputs.store_errors import check_size


def read(fs: Any, path: str, start: int, end: int | None, limit: int) -> bytes:
    """Bytes `start` to `end` of the current object. Raises ImageError TOO_LARGE above `limit` bytes."""
    if end is None and isinstance(fs, FTPFileSystem):
        data = _read_ftp(fs, path, start, limit + 1)
    else:
        data = fs.cat_file(path, start=start, end=start + limit + 1 if end is None else end)
    check_size(len(data), limit)
    return data


class _Enough(Exception):
    """As many bytes have come as are wanted."""


def _read_ftp(fs: FTPFileSystem, path: str, start: int, most: int) -> bytes:
    """Reads with one command: for a part of a file, the driver lists the file's folder first."""
    data = bytearray()

    def take(chunk: bytes) -> None:
        data.extend(chunk)
        if len(data) >= most:
            raise _Enough

    try:
        fs.ftp.retrbinary(f"RETR {path}", take, rest=start or None)
    except _Enough:
        with suppress(OSError, EOFError):
            fs.ftp.close()
        fs._connect()  # the old connection still brings the rest
    return bytes(data)
