"""A file of known size whose bytes are fetched in ranges."""

import errno
import io
from collections.abc import Callable


class RangedFile(io.RawIOBase):
    """A seekable, read-only file for one thread, in which each read is one fetch at most."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int, read_ahead: int = 0) -> None:
        """
        Args:
            fetch: returns the bytes from one position to another.
            size: of the file, in bytes.
            read_ahead: number of bytes to fetch at least; what is not read yet is kept.
        """
        self._fetch = fetch
        self._size = size
        self._read_ahead = read_ahead
        self._position = 0
        self._buffer = b""
        self._buffer_start = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, "seek before the start of the file")  # as files do
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        start, end = self._position, self._size
        if size is not None and size >= 0:
            end = min(end, start + size)
        if end <= start:
            return b""
        buffer_end = self._buffer_start + len(self._buffer)
        if not self._buffer_start <= start <= end <= buffer_end:
            fetch_end = min(max(end, start + self._read_ahead), self._size)
            self._buffer = self._fetch(start, fetch_end)
            self._buffer_start = start
        self._position = end
        return self._buffer[start - self._buffer_start : end - self._buffer_start]

    def readall(self) -> bytes:
        return self.read()
