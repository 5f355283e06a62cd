"""How the threads of PyTorch wait for each other, and which of a job's threads may hang for ever."""

import os
import threading

SPIN_COUNT = "3000"
"""How often a thread of PyTorch's OpenMP asks whether the others are done before it sleeps. Its own default
is a hundred times as much. Beside other processes, threads then wait on the very processors that the threads
need for which they wait (`benchmarks/waiting.py`)."""


def let_waiting_threads_sleep() -> None:
    """Sets so in the environment, unless the user has decided.

    It takes effect in processes that start from now on, and in this one if PyTorch is not loaded yet.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


ROWS_THREAD = "csflow-rows"
"""Name of threads that pull results which may never come."""


def one_was_left() -> bool:
    """Whether a thread still waits for results that the job has given up."""
    return any(thread.name == ROWS_THREAD for thread in threading.enumerate())
