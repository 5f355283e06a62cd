"""Removes folders by their very names: fsspec's `rm` takes `m[1]` for a pattern, and removes `m1`."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem

REMOVED_AT_ONCE = 16


def remove_folder(fs: fsspec.AbstractFileSystem, path: str) -> None:
    """Removes all files below a folder, whose name is no pattern."""
    if isinstance(fs, LocalFileSystem):
        shutil.rmtree(path)
        return
    with ThreadPoolExecutor(REMOVED_AT_ONCE) as pool:
        list(pool.map(fs.rm_file, fs.find(path)))


def arrow_filesystem(fs: fsspec.AbstractFileSystem) -> PyFileSystem:
    """The file system for pyarrow and Ray, with names that are no patterns."""
    return PyFileSystem(_LiteralHandler(fs))


class _LiteralHandler(FSSpecHandler):  # type: ignore[misc]  # pyarrow has no types
    """pyarrow's adapter, in those methods that removed by `fs.rm`."""

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
