"""Loads images: reads and decodes them in threads, ahead of the model, and groups them into batches."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from csflow.errors import ErrorCode, ImageError
from csflow.images import DecodedImage, decode
from csflow.inputs.reading import ImageReader
from csflow.preprocessing import Preprocessing
from csflow.process import Stages

T = TypeVar("T")


@dataclass(frozen=True)
class LoadedImage:
    """An image, or the error that explains why there is none."""

    image_uri: str
    image_version: str
    content: DecodedImage | ImageError
    stages: Stages
    """Time spent on reading and decoding the image."""


class ImageLoader:
    """Reads and decodes images in threads, ahead of whoever takes them. Threads may share it."""

    def __init__(self, reader: ImageReader, preprocessing: Preprocessing, threads: int) -> None:
        self._reader = reader
        self._preprocessing = preprocessing
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="image-loader")

    def load(
        self,
        image_uris: Sequence[str],
        image_versions: Sequence[str],
        while_waiting: AbstractContextManager[object] = nullcontext(),  # noqa: B008  # it has no state
    ) -> Iterator[LoadedImage]:
        """Starts to load, and returns the images in order; a failed image is returned with its error.

        At most `2 · threads` loaded images of a call wait in memory.

        Args:
            while_waiting: context that is entered while the next image is not ready.
        """
        images = zip(image_uris, image_versions, strict=True)
        waiting = deque(self._submit(*image) for image in islice(images, 2 * self._threads))
        return self._loaded(waiting, images, while_waiting)

    def _loaded(
        self,
        waiting: deque[Future[LoadedImage]],
        images: Iterator[tuple[str, str]],
        while_waiting: AbstractContextManager[object],
    ) -> Iterator[LoadedImage]:
        while waiting:
            future = waiting.popleft()
            if not future.done():
                with while_waiting:
                    wait([future])
            yield future.result()
            waiting.extend(self._submit(*image) for image in islice(images, 1))

    def _submit(self, image_uri: str, image_version: str) -> Future[LoadedImage]:
        return self._pool.submit(load_one, self._reader, image_uri, image_version, self._preprocessing)


def load_one(
    reader: ImageReader, image_uri: str, image_version: str, preprocessing: Preprocessing
) -> LoadedImage:
    """Reads and decodes one image; an error is returned in the result."""
    stages = Stages()
    content: DecodedImage | ImageError
    try:
        with stages.measured("read"):
            data = reader.read(image_uri, image_version)
        with stages.measured("decode"):
            content = decode(data, preprocessing)
    except ImageError as error:
        content = error
    except Exception as error:
        # One image must never take its neighbours down.
        content = ImageError(ErrorCode.INTERNAL, f"{type(error).__name__}: {error}")
    return LoadedImage(image_uri, image_version, content, stages)


def batches(items: Iterable[T], batch_size: int) -> Iterator[list[T]]:
    """Groups items into lists of one size; only the last list may be smaller."""
    iterator = iter(items)
    while batch := list(islice(iterator, batch_size)):
        yield batch
