"""File systems for pyarrow and Ray: names in them are no patterns, and files of known size take few requests.

fsspec's `rm` takes `m[1]` for a pattern, and removes `m1`.
"""

import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem

from csflow.ranged_file import RangedFile

REMOVED_AT_ONCE = 16
READ_AHEAD = 1 << 20
"""Number of bytes to fetch at least: another request takes longer than what it would save."""


def remove_folder(fs: fsspec.AbstractFileSystem, path: str) -> None:
    """Removes all files below a folder, whose name is no pattern."""
    if isinstance(fs, LocalFileSystem):
        shutil.rmtree(path)
        return
    with ThreadPoolExecutor(REMOVED_AT_ONCE) as pool:
        list(pool.map(fs.rm_file, fs.find(path)))


def arrow_filesystem(fs: fsspec.AbstractFileSystem, sizes: Mapping[str, int] | None = None) -> PyFileSystem:
    """The file system for pyarrow and Ray, with names that are no patterns.

    Args:
        sizes: of files by path, in bytes, as far as a listing told. A store is not asked for these again.
    """
    return PyFileSystem(_LiteralHandler(fs, sizes or {}))


class _LiteralHandler(FSSpecHandler):  # type: ignore[misc]  # pyarrow has no types
    """pyarrow's adapter, in those methods that removed by `fs.rm` or asked for sizes."""

    def __init__(self, fs: fsspec.AbstractFileSystem, sizes: Mapping[str, int]) -> None:
        super().__init__(fs)
        self._sizes = sizes

    def open_input_file(self, path: str) -> pa.NativeFile:
        size = self._sizes.get(path)
        if size is None:
            return super().open_input_file(path)

        def fetch(start: int, end: int) -> bytes:
            return bytes(self.fs.cat_file(path, start=start, end=end))

        return pa.PythonFile(RangedFile(fetch, size, READ_AHEAD), mode="r")

    def delete_dir(self, path: str) -> None:
        remove_folder(self.fs, path)

    def delete_file(self, path: str) -> None:
        self.fs.rm_file(path)

    def _delete_dir_contents(self, path: str, missing_dir_ok: bool) -> None:
        if self.fs.exists(path):
            for below in self.fs.ls(path, detail=False):
                (self.delete_dir if self.fs.isdir(below) else self.delete_file)(below)
        elif not missing_dir_ok:
            raise FileNotFoundError(path)
