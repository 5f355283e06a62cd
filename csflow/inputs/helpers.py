"""Has images of a loader read and decoded by other processes while its own threads are too slow.

Helpers take images from the loader's queue, as its threads do, so that each works at its own speed. How many
there are is found out: while the model waits for input, a helper more is asked for, then two, then four. Each
has a process with a CPU of its own. Until a CPU is found the helper takes no image, and tells the autoscaler
that one is wanted; so no image waits for a CPU that may never come.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from queue import Empty, SimpleQueue

from csflow.decode_limits import ThreadClock
from csflow.inputs.loaded import LoadedImage

MOST_HELPERS = 64
CHUNK_BYTES, MOST_CHUNK_IMAGES = 4 << 20, 16
"""Largest size of what a helper takes at a time. Small chunks are many, so a shard feeds many helpers."""
WAITING_SHARE = 0.05
"""The share of time for which a model may wait before helpers are called."""
REVIEW_S = 1.0
"""Seconds over which that share is measured."""
IDLE_S = 5.0
"""A helper that has had nothing to do for so long goes."""
LEASE_S = 60.0
"""A helper gives its CPU back after so long, in case that a worker waits for it, and asks for another."""

Images = Sequence[tuple[str, str]]
"""URIs and versions."""
Load = Callable[[Images], Callable[[], Sequence[LoadedImage]]]
"""Has another process begin to load images; what it returns waits for them."""


class Pending:
    """An image that is to be loaded, and will be."""

    def __init__(self, image_uri: str, image_version: str) -> None:
        self.image = (image_uri, image_version)
        self.loaded: Future[LoadedImage] = Future()
        self.decode_clock: ThreadClock | None = None
        """The clock of the thread that decodes it here, once one does."""
        self.away_since: float | None = None
        """The time since when a helper has it, from `time.monotonic`."""

    def begin_decoding(self, clock: ThreadClock) -> None:
        self.decode_clock = clock

    def finish(self, loaded: LoadedImage) -> None:
        """Sets the result, unless another attempt was faster."""
        with suppress(InvalidStateError):
            self.loaded.set_result(loaded)


class Helpers:
    """Threads that pass images on to other processes."""

    def __init__(
        self,
        helper: Callable[[], AbstractContextManager[Load]],
        pixel_bytes: int,
        are_always_wanted: bool,
        most_bytes: int = 1 << 30,
    ) -> None:
        """Starts none yet.

        Args:
            helper: entering its context starts a process, and waits until it has a CPU. Whatever is done with
                the process raises if it is lost.
            pixel_bytes: size of a decoded image.
            are_always_wanted: whether to start helpers before a model waits.
            most_bytes: largest size of all images that helpers may have under way.
        """
        self._helper = helper
        self._most_images = most_bytes // pixel_bytes
        self._chunk = max(1, min(MOST_CHUNK_IMAGES, CHUNK_BYTES // pixel_bytes))
        self._are_always_wanted = are_always_wanted
        self._pool = ThreadPoolExecutor(MOST_HELPERS, thread_name_prefix="image-helper")
        self._lock = threading.Lock()
        self._asked_for = self._at_work = 0
        self._reviewed, self._idle_seconds = time.monotonic(), 0.0

    def images_ahead(self, calls: int, own: int) -> int:
        """How many images more than its own threads each call of a loader is to have under way.

        Args:
            calls: number of calls at once.
            own: number of images that a call has under way for its own threads, which helpers may take, too.
        """
        return max(0, min(3 * self._chunk * self._at_work, self._most_images // calls - own))

    def review(
        self, idle_seconds: float, queue: SimpleQueue[Pending], give_back: Callable[[Pending], None]
    ) -> None:
        """Asks for more helpers if the model has waited too long.

        Args:
            idle_seconds: for how long the model has waited in all.
            queue: the images that nobody has begun to load.
            give_back: called with each image that a helper failed to have loaded.
        """
        now = time.monotonic()
        with self._lock:
            passed = now - self._reviewed
            if passed < REVIEW_S and not (self._are_always_wanted and not self._at_work):
                return
            is_wanted = self._are_always_wanted or idle_seconds - self._idle_seconds > WAITING_SHARE * passed
            self._reviewed, self._idle_seconds = now, idle_seconds
            room = MOST_HELPERS - self._at_work - self._asked_for
            more = max(0, min(room, max(1, self._at_work) - self._asked_for)) if is_wanted else 0
            self._asked_for += more
        for _ in range(more):
            self._pool.submit(self._help, queue, give_back)

    def _help(self, queue: SimpleQueue[Pending], give_back: Callable[[Pending], None]) -> None:
        is_at_work = False
        try:
            with self._helper() as load:
                with self._lock:
                    self._asked_for -= 1
                    self._at_work += 1
                is_at_work = True
                self._work(load, queue, give_back)
        except Exception:  # whatever it was, images are loaded without this helper
            return
        finally:
            with self._lock:
                if is_at_work:
                    self._at_work -= 1
                else:
                    self._asked_for -= 1

    def _work(self, load: Load, queue: SimpleQueue[Pending], give_back: Callable[[Pending], None]) -> None:
        """Has images loaded until there are none for a while. While some travel, the next are loaded."""
        under_way: deque[tuple[Sequence[Pending], Callable[[], Sequence[LoadedImage]]]] = deque()
        ends = time.monotonic() + LEASE_S
        try:
            while True:
                chunk = self._taken(queue, 0 if under_way else IDLE_S) if time.monotonic() < ends else []
                if not chunk and not under_way:
                    return
                if chunk:
                    under_way.append((chunk, load([pending.image for pending in chunk])))
                if not chunk or len(under_way) > 1:
                    for pending, image in zip(under_way[0][0], under_way[0][1](), strict=True):
                        pending.finish(image)
                    under_way.popleft()
        finally:
            # The process or its node is gone, perhaps because of an image.
            for pending in (pending for lost, _ in under_way for pending in lost):
                give_back(pending)

    def _taken(self, queue: SimpleQueue[Pending], seconds: float) -> list[Pending]:
        """The next images to load; none if there are none in so many seconds."""
        chunk: list[Pending] = []
        with suppress(Empty):
            chunk.append(queue.get(timeout=seconds) if seconds else queue.get_nowait())
            while len(chunk) < self._chunk:
                chunk.append(queue.get_nowait())
        for pending in chunk:
            pending.away_since = time.monotonic()
        return chunk
