"""What one image may cost, and how many pixels may be decoded at once."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

MAX_PIXELS = 175_000_000
"""Default limit of height x width. Any single-shot camera has less (151 million pixels)."""
MAX_SECONDS = 60.0
"""CPU seconds that decoding may take. 175 million pixels take some seconds in all formats."""


@dataclass(frozen=True)
class DecodeLimits:
    """Which images are decoded, for how long, and how carefully."""

    max_pixels: int = MAX_PIXELS
    seconds: float = MAX_SECONDS
    is_strict: bool = False
    """Whether an image is refused that decodes, but whose file is damaged inside."""


DEFAULT_LIMITS = DecodeLimits()


class ThreadClock:
    """CPU seconds of the thread that creates it, since then. Other threads may read it."""

    def __init__(self) -> None:
        # macOS has no such clock of another thread.
        of_thread = getattr(time, "pthread_getcpuclockid", None)
        self._clock = of_thread(threading.get_ident()) if of_thread else time.CLOCK_MONOTONIC
        self._started = time.clock_gettime(self._clock)

    def seconds(self) -> float:
        """The seconds; 0 if the thread has ended."""
        try:
            return time.clock_gettime(self._clock) - self._started
        except OSError:
            return 0.0


class PixelBudget:
    """Bounds the pixels that the threads of a process decode at once, and so its memory."""

    def __init__(self, pixels: int = MAX_PIXELS) -> None:
        self._pixels = self._free = pixels
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    @contextmanager
    def holding(self, pixels: int) -> Iterator[None]:
        """Waits until so many pixels are free, and takes them; an image of more than all is decoded alone.

        First come, first served, so that small images cannot keep a large one waiting.
        """
        share, ticket = min(pixels, self._pixels), object()
        with self._changed:
            self._waiting.append(ticket)
            self._changed.wait_for(lambda: self._waiting[0] is ticket and self._free >= share)
            self._waiting.popleft()
            self._free -= share
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += share
                self._changed.notify_all()


OF_PROCESS = PixelBudget()
"""Shared by all who decode in this process and have no budget of their own."""
