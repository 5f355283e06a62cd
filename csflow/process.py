"""What this process has used: memory and time."""

import os
import re
import time
from pathlib import Path


def peak_memory_bytes() -> int:
    """The most memory that this process has had resident so far, from proc(5)."""
    # getrusage(2) counts what the process that started this one had, too.
    match = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def process_started_at() -> float:
    """When this process began, in seconds since the epoch, from proc(5)."""
    # The program's name, in brackets, may hold blanks.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - age
