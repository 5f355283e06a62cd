"""Reads and decodes in a child process, for shards whose worker died, perhaps because of an image."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from csflow.decode_limits import DEFAULT_LIMITS, DecodeLimits
from csflow.errors import ErrorCode, ImageError
from csflow.inputs.loaded import LoadedImage, load_one
from csflow.inputs.reading import ImageReader
from csflow.preprocessing import Preprocessing
from csflow.process import IdleClock, Stages

ATTEMPTS = 2
"""An image is at fault if two child processes die; one child may die for another reason."""
DECODE_PATIENCE = 2
"""A child is killed after this many times the CPU seconds that decoding may take: it shares its CPU."""


class IsolatedLoader:
    """Loads one image after another in a child process, which an image may kill. For one thread."""

    def __init__(
        self,
        storage_options: Mapping[str, Any],
        preprocessing: Preprocessing,
        limits: DecodeLimits = DEFAULT_LIMITS,
    ) -> None:
        self._settings = storage_options, preprocessing, limits
        self._seconds = limits.seconds * DECODE_PATIENCE
        self._child: _Child | None = None
        self.idle = IdleClock()
        """For how long the one who takes images has waited."""

    def load(
        self,
        image_uris: Sequence[str],
        image_versions: Sequence[str],
        while_waiting: AbstractContextManager[object] = nullcontext(),  # noqa: B008  # it has no state
    ) -> Iterator[LoadedImage]:
        """Yields the images as `ImageLoader` does, but loads each only when asked for it.

        An image that kills its process has the error CRASHED, and one whose decoding does not end TOO_SLOW.
        """
        with self.idle.user():
            for image in zip(image_uris, image_versions, strict=True):
                with while_waiting, self.idle.waiting():
                    loaded = self._load_one(*image)
                yield loaded

    def _load_one(self, image_uri: str, image_version: str) -> LoadedImage:
        error = ImageError(ErrorCode.CRASHED, f"the process that read and decoded it died, {ATTEMPTS} times")
        for _ in range(ATTEMPTS):
            if self._child is None:
                self._child = _Child(self._settings)
            try:
                return self._child.load(image_uri, image_version, self._seconds)
            except EOFError:
                self._child = None
            except TimeoutError:
                self._child = None
                error = ImageError(ErrorCode.TOO_SLOW, f"decoding took over {self._seconds:g} seconds")
                break
        return LoadedImage(image_uri, image_version, error, Stages())


_Settings = tuple[Mapping[str, Any], Preprocessing, DecodeLimits]


class _Child:
    """A process that loads images, until it dies or is killed."""

    def __init__(self, settings: _Settings) -> None:
        # A fork of this process would share the locks of its threads.
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, settings), daemon=True)
        self._process.start()
        theirs.close()

    def load(self, image_uri: str, image_version: str, seconds: float) -> LoadedImage:
        """The image. Raises EOFError if the process dies, TimeoutError if decoding takes longer."""
        try:
            self._connection.send((image_uri, image_version))
            answer = self._connection.recv()
            if answer is _DECODING:
                if not self._connection.poll(seconds):
                    raise TimeoutError
                answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.kill()
            self._process.join()
            raise TimeoutError if isinstance(error, TimeoutError) else EOFError from None
        loaded: LoadedImage = answer
        return loaded


_DECODING = None
"""What a child says when it has read an image."""


def _serve(connection: Connection, settings: _Settings) -> None:
    storage_options, preprocessing, limits = settings
    reader = ImageReader(storage_options)
    with suppress(EOFError):  # when the parent has ended
        while True:
            uri, version = connection.recv()
            connection.send(
                load_one(
                    *(reader, preprocessing, False, uri, version, limits),
                    decoding=lambda _: connection.send(_DECODING),
                )
            )
