"""Where a worker's time goes: seconds by stage, on the clock and of CPU."""

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec.asyn


class Stages:
    """Adds up what stages took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        """On the clock."""
        self.cpu_seconds: dict[str, float] = defaultdict(float)
        """Of the calling threads."""

    @contextmanager
    def measured(self, stage: str) -> Iterator[None]:
        """Adds what happens inside."""
        started, cpu_started = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - started
            self.cpu_seconds[stage] += time.thread_time() - cpu_started

    def add(self, other: "Stages") -> None:
        for stage in other.seconds:
            self.seconds[stage] += other.seconds[stage]
            self.cpu_seconds[stage] += other.cpu_seconds[stage]


class ProcessCpu:
    """CPU seconds of this process, handed out so that the parts add up to all. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = self._client_taken = 0.0

    def take(self) -> tuple[float, float]:
        """CPU seconds since the last call, or since the process began: of all threads, and of those in which
        clients of object stores run, on behalf of the threads that wait for them."""
        with self._lock:
            total, client = time.process_time(), _client_seconds()
            new = total - self._taken, max(0.0, client - self._client_taken)
            self._taken, self._client_taken = total, client
        return new


def _client_seconds() -> float:
    """Of the thread of fsspec's clients, and of those of obstore's."""
    seconds = 0.0
    thread = fsspec.asyn.iothread[0]
    if thread is not None and hasattr(time, "pthread_getcpuclockid"):
        seconds = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    for task in Path("/proc/self/task").glob("*"):
        with suppress(OSError):  # it has just ended
            if task.joinpath("comm").read_bytes().startswith(b"tokio-rt"):
                seconds += int(task.joinpath("schedstat").read_text().split()[0]) / 1e9
    return seconds
