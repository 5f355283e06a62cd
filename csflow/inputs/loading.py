"""Loads images: reads and decodes them ahead of the model, and groups them into batches."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from csflow.decode_limits import DEFAULT_LIMITS, DecodeLimits, PixelBudget
from csflow.errors import ErrorCode, ImageError
from csflow.images import DecodedImage
from csflow.inputs.helpers import REVIEW_S, Helpers, Images, Pending
from csflow.inputs.loaded import LoadedImage, load_one
from csflow.inputs.reading import ImageReader
from csflow.preprocessing import Preprocessing
from csflow.process import IdleClock, Stages

T = TypeVar("T")

PATIENCE_S = 10.0
"""An image that a helper has had for so long, when it is the next one to score, is loaded here, too."""
WAITING_BYTES = 512 << 20
"""Most bytes of images that wait to be cut into tiles, unless one image alone has more."""
HELPER_THREADS = 8
"""Number of reading threads in a helping process, most of which wait for the store."""


class ImageLoader:
    """Reads and decodes images in threads, ahead of whoever takes them. Threads may share it."""

    def __init__(
        self,
        reader: ImageReader,
        preprocessing: Preprocessing,
        threads: int,
        with_sha256: bool = False,
        helpers: Helpers | None = None,
        limits: DecodeLimits = DEFAULT_LIMITS,
    ) -> None:
        """Starts the threads when there is something to load.

        Args:
            with_sha256: whether to compute the digest of each image's bytes.
            helpers: load images in other processes while `threads` are too few.
            limits: of each image; one that takes longer has the error TOO_SLOW.
        """
        self._reader = reader
        self._preprocessing = preprocessing
        self._with_sha256 = with_sha256
        self._threads = threads
        self._helpers = helpers
        self._limits = limits
        self._budget = PixelBudget()
        self._largest_bytes = 0
        """Of the images seen so far."""
        self._pool = self._new_pool()
        self._queue: SimpleQueue[Pending] = SimpleQueue()
        self.idle = IdleClock()
        """For how long all those who take images have waited."""

    def load(
        self,
        image_uris: Sequence[str],
        image_versions: Sequence[str],
        while_waiting: AbstractContextManager[object] = nullcontext(),  # noqa: B008  # it has no state
    ) -> Iterator[LoadedImage]:
        """Starts to load, and returns the images in order; a failed image is returned with its error.

        At most `2 · threads` loaded images of a call wait in memory, and those that helpers have under way.
        Of images that are to be cut into tiles, which keep their size, at most `WAITING_BYTES` or one do.

        Args:
            while_waiting: context that is entered while the next image is not ready.
        """
        images = zip(image_uris, image_versions, strict=True)
        waiting: deque[Pending] = deque()
        self._begin(images, waiting)
        return self._loaded(images, waiting, while_waiting)

    def _loaded(
        self,
        images: Iterator[tuple[str, str]],
        waiting: deque[Pending],
        while_waiting: AbstractContextManager[object],
    ) -> Iterator[LoadedImage]:
        with self.idle.user():
            while waiting:
                pending = waiting.popleft()
                if not pending.loaded.done():
                    with while_waiting, self.idle.waiting():
                        while self._is_late(pending):
                            self._begin(images, waiting)
                loaded = pending.loaded.result()
                if isinstance(loaded.content, DecodedImage):
                    self._largest_bytes = max(self._largest_bytes, loaded.content.pixels_HWC.nbytes)
                yield loaded
                del loaded  # else it would be in memory beside the next
                self._begin(images, waiting)

    def _begin(self, images: Iterator[tuple[str, str]], waiting: deque[Pending]) -> None:
        """Has the next images loaded, as many as may wait in memory."""
        ahead = 2 * self._threads
        if self._preprocessing.tiling:
            # Before the first image is there, nothing tells how large they are.
            room = WAITING_BYTES // self._largest_bytes if self._largest_bytes else 1
            ahead = max(1, min(ahead, room))
        if self._helpers:
            self._helpers.review(self.idle.seconds(), self._queue, self._load_here)
            ahead += self._helpers.images_ahead(max(1, self.idle.users), ahead)
        for image in islice(images, max(0, ahead - len(waiting))):
            pending = Pending(*image)
            waiting.append(pending)
            self._queue.put(pending)
            self._pool.submit(self._load_next)

    def _is_late(self, pending: Pending) -> bool:
        """Waits for an image; returns whether it is worth a look at what goes on meanwhile."""
        if not wait([pending.loaded], REVIEW_S).not_done:
            return False
        if pending.decode_clock and pending.decode_clock.seconds() > self._limits.seconds:
            self._give_up(pending)
        elif pending.away_since and time.monotonic() - pending.away_since > PATIENCE_S:
            self._load_here(pending)
        return True

    def _load_next(self) -> None:
        """Loads the first image of the queue, if helpers have left one."""
        try:
            pending = self._queue.get_nowait()
        except Empty:
            return
        self._finish(pending)

    def _load_here(self, pending: Pending) -> None:
        pending.away_since = None
        self._pool.submit(self._finish, pending)

    def _finish(self, pending: Pending) -> None:
        options = self._preprocessing, self._with_sha256, *pending.image, self._limits, self._budget
        pending.finish(load_one(self._reader, *options, pending.begin_decoding))

    def _give_up(self, pending: Pending) -> None:
        """Goes on without an image that takes too long, and without its thread, which cannot be stopped.

        The threads that are not stuck end when nothing is left to do for them; new ones go on with the queue.
        """
        error = ImageError(ErrorCode.TOO_SLOW, f"decoding took over {self._limits.seconds:g} CPU seconds")
        pending.finish(LoadedImage(*pending.image, error, Stages()))
        self._pool = self._new_pool()
        for _ in range(self._queue.qsize()):
            self._pool.submit(self._load_next)

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._threads, thread_name_prefix="image-loader")


@dataclass(frozen=True)
class LoaderSettings:
    """What another process needs to know to load images."""

    storage_options: Mapping[str, Any]
    preprocessing: Preprocessing
    with_sha256: bool = False
    limits: DecodeLimits = DEFAULT_LIMITS

    def loader(self, threads: int, helpers: Helpers | None = None) -> ImageLoader:
        reader = ImageReader(self.storage_options)
        return ImageLoader(reader, self.preprocessing, threads, self.with_sha256, helpers, self.limits)


class HelpingLoader:
    """Loads images in the process of a helper, which keeps its connections from call to call."""

    def __init__(self, settings: LoaderSettings) -> None:
        self._loader = settings.loader(HELPER_THREADS)

    def load(self, images: Images) -> list[LoadedImage]:
        uris, versions = [uri for uri, _ in images], [version for _, version in images]
        return [image.by_helper() for image in self._loader.load(uris, versions)]


def batches(items: Iterable[T], batch_size: int) -> Iterator[list[T]]:
    """Groups items into lists of one size; only the last list may be smaller."""
    iterator = iter(items)
    while batch := list(islice(iterator, batch_size)):
        yield batch
