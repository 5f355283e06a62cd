"""Sets up a worker process (threads, device), and measures its memory and its time."""

import ctypes
import faulthandler
import os
import re
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec.asyn

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Parameters of glibc's mallopt(3)."""


def set_up(cpus: int, gpus: int) -> "torch.device":
    """Gives this process its share of a machine; returns the device to compute on."""
    import torch  # a process that only asks for its memory or time needs none

    torch.set_num_threads(cpus)
    _die_of_fatal_signals()
    _keep_freed_memory()
    # Else "float32" is 10 bits of mantissa in cuDNN's convolutions, which moves scores by over a percent.
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda" if gpus else "cpu")


def _die_of_fatal_signals() -> None:
    """Makes Python's own handler answer SIGABRT, SIGSEGV and the like: it writes a traceback and lets go.

    Ray's handler looks up the names of native functions, which takes memory. Where that fails it is called
    again, without end: seen in a worker that kept a core and took ten gigabytes after its run had ended.
    """
    faulthandler.disable()  # else `enable` does nothing, since Ray has enabled it below its own handler
    faulthandler.enable()


def _keep_freed_memory() -> None:
    """Makes malloc keep large freed blocks for the next forward pass.

    By default malloc returns each freed activation of a megabyte to the kernel, and the next one is faulted
    in page by page: three or four percent of a training epoch (docs/performance.md).
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc; musl has none
            # Ray calls actors outside the main thread, where an arena of its own would map blocks singly.
            libc.mallopt(M_ARENA_MAX, 1)
            libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def peak_memory_bytes() -> int:
    """The largest resident memory of this process so far, from proc(5)."""
    # getrusage(2) counts what the process that started this one had, too.
    match = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def process_started_at() -> float:
    """The time when this process began, in seconds since the epoch, from proc(5)."""
    # The program's name, in brackets, may hold blanks.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - age


class Stages:
    """Adds up the time of stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        """Wall-clock seconds by stage."""
        self.cpu_seconds: dict[str, float] = defaultdict(float)
        """CPU seconds of the calling threads, by stage."""

    @contextmanager
    def measured(self, stage: str) -> Iterator[None]:
        """Adds the time inside this context."""
        started, cpu_started = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - started
            self.cpu_seconds[stage] += time.thread_time() - cpu_started

    def renamed(self, prefix: str) -> "Stages":
        """The same times under names with this prefix."""
        other = Stages()
        other.seconds.update({prefix + name: seconds for name, seconds in self.seconds.items()})
        other.cpu_seconds.update({prefix + name: seconds for name, seconds in self.cpu_seconds.items()})
        return other

    def add(self, other: "Stages") -> None:
        for stage in other.seconds:
            self.seconds[stage] += other.seconds[stage]
            self.cpu_seconds[stage] += other.cpu_seconds[stage]


class IdleClock:
    """Measures for how long all users of something wait. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = self._waiting = 0
        self._seconds = self._taken = self._since = 0.0

    def user(self) -> AbstractContextManager[None]:
        """Context of a user."""
        return self._changed(1, 0)

    def waiting(self) -> AbstractContextManager[None]:
        """Context in which a user waits."""
        return self._changed(0, 1)

    @property
    def users(self) -> int:
        """Number of users at this moment."""
        return self._users

    def seconds(self) -> float:
        """Seconds so far in which there were users, and all of them waited."""
        with self._lock:
            self._add()
            return self._seconds

    def take(self) -> float:
        """Seconds since the last call."""
        with self._lock:
            self._add()
            new, self._taken = self._seconds - self._taken, self._seconds
            return new

    @contextmanager
    def _changed(self, users: int, waiting: int) -> Iterator[None]:
        self._change(users, waiting)
        try:
            yield
        finally:
            self._change(-users, -waiting)

    def _change(self, users: int, waiting: int) -> None:
        with self._lock:
            self._add()
            self._users += users
            self._waiting += waiting

    def _add(self) -> None:
        now = time.perf_counter()
        if self._users and self._waiting == self._users:
            self._seconds += now - self._since
        self._since = now


class ProcessCpu:
    """Hands out CPU seconds of this process in parts that add up to all. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = self._client_taken = 0.0

    def take(self) -> tuple[float, float]:
        """CPU seconds since the last call, or since the process began: first of all threads, then of those in
        which clients of object stores work for the threads that wait for them."""
        with self._lock:
            total, client = time.process_time(), _client_seconds()
            new = total - self._taken, max(0.0, client - self._client_taken)
            self._taken, self._client_taken = total, client
        return new


def _client_seconds() -> float:
    """CPU seconds of fsspec's client thread and of obstore's threads."""
    seconds = 0.0
    thread = fsspec.asyn.iothread[0]
    if thread is not None and hasattr(time, "pthread_getcpuclockid"):
        seconds = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    for task in Path("/proc/self/task").glob("*"):
        with suppress(OSError):  # it has just ended
            if task.joinpath("comm").read_bytes().startswith(b"tokio-rt"):
                seconds += int(task.joinpath("schedstat").read_text().split()[0]) / 1e9
    return seconds
