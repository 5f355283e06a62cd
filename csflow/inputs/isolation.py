"""Reads and decodes in a child process, for shards whose worker died, perhaps because of an image."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from multiprocessing import get_context
from typing import Any

from csflow.errors import ErrorCode, ImageError
from csflow.inputs.loaded import LoadedImage, load_one
from csflow.inputs.reading import ImageReader
from csflow.preprocessing import Preprocessing
from csflow.process import IdleClock, Stages

ATTEMPTS = 2
"""An image is at fault if two child processes die; one child may die for another reason."""

_child_reader: ImageReader


class IsolatedLoader:
    """Loads one image after another in a child process, which an image may kill. For one thread."""

    def __init__(self, storage_options: Mapping[str, Any], preprocessing: Preprocessing) -> None:
        self._storage_options = storage_options
        self._preprocessing = preprocessing
        self._pool: ProcessPoolExecutor | None = None
        self.idle = IdleClock()
        """For how long the one who takes images has waited."""

    def load(
        self,
        image_uris: Sequence[str],
        image_versions: Sequence[str],
        while_waiting: AbstractContextManager[object] = nullcontext(),  # noqa: B008  # it has no state
    ) -> Iterator[LoadedImage]:
        """Yields the images as `ImageLoader` does, but loads each only when asked for it.

        An image that kills its process has the error CRASHED.
        """
        with self.idle.user():
            for image in zip(image_uris, image_versions, strict=True):
                with while_waiting, self.idle.waiting():
                    loaded = self._load_one(*image)
                yield loaded

    def _load_one(self, image_uri: str, image_version: str) -> LoadedImage:
        for _ in range(ATTEMPTS):
            if self._pool is None:
                # A fork of this process would share the locks of its threads.
                self._pool = ProcessPoolExecutor(1, get_context("spawn"), _start, (self._storage_options,))
            try:
                return self._pool.submit(_load, image_uri, image_version, self._preprocessing).result()
            except BrokenProcessPool:
                self._pool = None
        error = ImageError(ErrorCode.CRASHED, f"the process that read and decoded it died, {ATTEMPTS} times")
        return LoadedImage(image_uri, image_version, error, Stages())


def _start(storage_options: Mapping[str, Any]) -> None:
    global _child_reader
    _child_reader = ImageReader(storage_options)


def _load(image_uri: str, image_version: str, preprocessing: Preprocessing) -> LoadedImage:
    return load_one(_child_reader, preprocessing, False, image_uri, image_version)
