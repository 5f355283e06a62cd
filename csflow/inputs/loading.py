"""From image URIs to batches of pixels: reads and decodes in threads, ahead of the model."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from csflow.errors import ErrorCode, ImageError
from csflow.images import DecodedImage, decode
from csflow.inputs.reading import ImageReader


@dataclass(frozen=True)
class LoadedImage:
    """One image, or why there is none."""

    image_uri: str
    image_version: str
    content: DecodedImage | ImageError
    read_seconds: float
    decode_seconds: float


class ImageLoader:
    """Reads and decodes images in threads; at most `2 · threads` of them wait in memory."""

    def __init__(self, reader: ImageReader, image_size: tuple[int, int], threads: int) -> None:
        self._reader = reader
        self._image_size = image_size
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="image-loader")

    def load(self, image_uris: Sequence[str], image_versions: Sequence[str]) -> Iterator[LoadedImage]:
        """Yields the images in order; an image that fails is yielded with its error."""
        images = zip(image_uris, image_versions, strict=True)
        waiting: deque[Future[LoadedImage]] = deque()
        for image in islice(images, 2 * self._threads):
            waiting.append(self._submit(*image))
        while waiting:
            yield waiting.popleft().result()
            for image in islice(images, 1):
                waiting.append(self._submit(*image))

    def _submit(self, image_uri: str, image_version: str) -> Future[LoadedImage]:
        return self._pool.submit(load_one, self._reader, image_uri, image_version, self._image_size)


def load_one(
    reader: ImageReader, image_uri: str, image_version: str, image_size: tuple[int, int]
) -> LoadedImage:
    """Reads and decodes one image; whatever goes wrong is in the result."""
    started = read_done = time.perf_counter()
    content: DecodedImage | ImageError
    try:
        data = reader.read(image_uri, image_version)
        read_done = time.perf_counter()
        content = decode(data, image_size)
    except ImageError as error:
        content = error
    except Exception as error:
        # One image must never take its neighbours down.
        content = ImageError(ErrorCode.INTERNAL, f"{type(error).__name__}: {error}")
    done = time.perf_counter()
    return LoadedImage(image_uri, image_version, content, read_done - started, done - read_done)


def batches(images: Iterable[LoadedImage], batch_size: int) -> Iterator[list[LoadedImage]]:
    """Groups images; only the last group may be smaller."""
    iterator = iter(images)
    while batch := list(islice(iterator, batch_size)):
        yield batch
