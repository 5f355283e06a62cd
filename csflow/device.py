"""Where a worker computes, and how its process is set up for it."""

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Parameters of glibc's mallopt(3)."""


def set_up(cpus: int, gpus: int) -> torch.device:
    """Gives this process its share of a machine; returns the device to compute on."""
    torch.set_num_threads(cpus)
    _keep_freed_memory()
    # Else "float32" is 10 bits of mantissa in cuDNN's convolutions, which moves scores by over a percent.
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda" if gpus else "cpu")


def _keep_freed_memory() -> None:
    """Has malloc keep large freed blocks for the next forward pass.

    By default each activation of a megabyte is returned to the kernel when freed, and faulted in page by
    page when allocated again: three or four percent of a training epoch (docs/performance.md).
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc; musl has none
            # Ray calls actors outside the main thread, where an arena of its own would map blocks singly.
            libc.mallopt(M_ARENA_MAX, 1)
            libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
