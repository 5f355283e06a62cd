"""Has images of a loader read and decoded by other processes while its own threads are too slow.

Helpers take images from the loader's queue, as its threads do, so that each works at its own speed. How many
there are is found out: while the model waits for input, a helper more is sent out, then two, then four. Each
first sends a call without images. It comes back when a CPU has been found for it, and tells the autoscaler
until then that one is wanted; so no image waits for a CPU that may never come. If images then wait long for a
CPU that other helpers have, there are more helpers than CPUs, and some go.
"""

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Literal

from csflow.inputs.loaded import LoadedImage

Decode = Literal["auto", "beside", "cluster"]
"""Where images are read and decoded: `beside` the model, in its process; in the whole `cluster`, too; or,
with `auto`, in the cluster if a GPU waits for images otherwise."""

MOST_HELPERS = 64
CHUNK_BYTES, MOST_CHUNK_IMAGES = 4 << 20, 16
"""Largest size of what a helper takes at a time. Small chunks are many, so a shard feeds many helpers."""
WAITING_SHARE = 0.05
"""The share of time for which a model may wait before helpers are called."""
REVIEW_S = 1.0
"""Seconds over which that share is measured."""
IDLE_S = 5.0
"""A helper that has had nothing to do for so long goes."""
HELPERS_PER_CPU = 1.5
"""While the pixels of one helper travel, another may have its CPU."""
TRAVEL_S = 0.1
"""Seconds of a call that count as travel, not as waiting for a CPU."""
LONGEST_PAUSE_S = 15.0
"""Whenever there were too many helpers, the pause before more are sent out doubles, up to this."""


class Pending:
    """An image that is to be loaded, and will be."""

    def __init__(self, image_uri: str, image_version: str) -> None:
        self.image = (image_uri, image_version)
        self.loaded: Future[LoadedImage] = Future()
        self.away_since: float | None = None
        """The time since when a helper has it, from `time.monotonic`."""

    def finish(self, loaded: LoadedImage) -> None:
        """Sets the result, unless another attempt was faster."""
        with suppress(InvalidStateError):
            self.loaded.set_result(loaded)


class Helpers:
    """Threads that pass images on to `load`, which blocks until another process has loaded them."""

    def __init__(
        self,
        load: Callable[[Sequence[tuple[str, str]]], tuple[Sequence[LoadedImage], float]],
        pixel_bytes: int,
        are_always_wanted: bool,
    ) -> None:
        """Starts none yet.

        Args:
            load: gives the images, and the seconds in which another process worked on them. Raises if that
                process is lost.
            pixel_bytes: size of a decoded image.
            are_always_wanted: whether to send them out before a model waits.
        """
        self._load = load
        self._chunk = max(1, min(MOST_CHUNK_IMAGES, CHUNK_BYTES // pixel_bytes))
        self._are_always_wanted = are_always_wanted
        self._pool = ThreadPoolExecutor(MOST_HELPERS, thread_name_prefix="image-helper")
        self._lock = threading.Lock()
        self._scouts = self._at_work = 0
        self._reviewed, self._idle_seconds = time.monotonic(), 0.0
        self._pause, self._paused_until = REVIEW_S, 0.0

    @property
    def images_ahead(self) -> int:
        """How many images more than a loader's own threads they can have under way."""
        return 2 * self._chunk * self._at_work

    def review(
        self, idle_seconds: float, queue: SimpleQueue[Pending], give_back: Callable[[Pending], None]
    ) -> None:
        """Sends out more helpers if the model has waited too long.

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
            is_wanted &= now >= self._paused_until
            self._reviewed, self._idle_seconds = now, idle_seconds
            most = MOST_HELPERS - self._at_work - self._scouts
            more = min(most, max(1, self._at_work) - self._scouts) if is_wanted else 0
            self._scouts += max(0, more)
        for _ in range(more):
            self._pool.submit(self._help, queue, give_back)

    def _help(self, queue: SimpleQueue[Pending], give_back: Callable[[Pending], None]) -> None:
        try:
            self._load([])
        except Exception:  # whatever it was, images are loaded without this helper
            with self._lock:
                self._scouts -= 1
            return
        with self._lock:
            self._scouts -= 1
            self._at_work += 1
        try:
            while chunk := self._taken(queue):
                if not self._finish(chunk, give_back):
                    return
        finally:
            with self._lock:
                self._at_work -= 1

    def _taken(self, queue: SimpleQueue[Pending]) -> list[Pending]:
        """The next images to load; none if there are none for a while."""
        chunk = []
        with suppress(Empty):
            chunk.append(queue.get(timeout=IDLE_S))
            while len(chunk) < self._chunk:
                chunk.append(queue.get_nowait())
        return chunk

    def _finish(self, chunk: Sequence[Pending], give_back: Callable[[Pending], None]) -> bool:
        """Has images loaded; returns whether the helper should go on."""
        started = time.monotonic()
        for pending in chunk:
            pending.away_since = started
        try:
            loaded, worked = self._load([pending.image for pending in chunk])
        except Exception:  # the process or its node is gone, perhaps because of an image
            for pending in chunk:
                give_back(pending)
            return False
        for pending, image in zip(chunk, loaded, strict=True):
            pending.finish(image)
        return self._is_of_use(worked / max(worked, time.monotonic() - started - TRAVEL_S))

    def _is_of_use(self, share: float) -> bool:
        """Whether a helper should go on whose call has worked for this share of its time.

        Each decides for itself. With n CPUs and h helpers all calls work for a share of n / h, so that in one
        round about `HELPERS_PER_CPU` · n helpers are left.
        """
        if random.random() < HELPERS_PER_CPU * share:
            return True
        now = time.monotonic()
        with self._lock:
            if now > self._paused_until:
                self._paused_until = now + self._pause
                self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
        return False
