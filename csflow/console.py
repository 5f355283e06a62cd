"""Prints what a job does: lines in a log, and in a terminal also a progress bar and colour.

Results go through `print`. Messages about the work go through `say`, `warn` and `Progress`, so that `--quiet`
can leave them out. Verbosity is a property of the process, like the level of a log.
"""

import os
import sys
import time
from datetime import datetime
from enum import IntEnum
from typing import IO, TYPE_CHECKING, Any

from csflow import __version__
from csflow.flags import spelling

if TYPE_CHECKING:
    from tqdm import tqdm

LINE_SECONDS = 10.0
"""Seconds between two lines of progress in a log, at least."""


class Verbosity(IntEnum):
    """How much a job prints."""

    QUIET = 0
    """Only results, warnings and errors."""
    NORMAL = 1
    VERBOSE = 2
    """Also what Ray and its workers log, and the traceback of an error that is printed as one line."""


_verbosity = Verbosity.NORMAL
_bars: "list[tqdm[Any]]" = []
"""The bar that is now on the screen, if any. Lines are printed above it."""


def set_verbosity(verbosity: Verbosity) -> None:
    """Sets how much this process prints from now on."""
    global _verbosity
    _verbosity = verbosity


def is_verbose() -> bool:
    return _verbosity == Verbosity.VERBOSE


def greet(verb: str, words: list[str]) -> None:
    """Prints that a job has started, before the imports that take seconds.

    Prints nothing if the command line asks for quiet, or for another output such as `--help`.
    """
    if not {"__help", "_h", "__version", "__print_config", "__quiet", "_q"} & set(map(spelling, words)):
        print(f"csflow {__version__} {verb}: starting", flush=True)


def say(line: str) -> None:
    """Prints a line about the work, unless the job is quiet."""
    if _verbosity > Verbosity.QUIET:
        _print(line, sys.stdout)


def warn(line: str) -> None:
    """Prints a warning, even if the job is quiet."""
    _print(f"{_coloured('warning:', 33, sys.stdout)} {line}", sys.stdout)


def complain(line: str) -> None:
    """Prints an error that the user can act on, in one line on standard error."""
    _print(f"{_coloured('error:', 31, sys.stderr)} {line}", sys.stderr)


def _print(line: str, stream: IO[str]) -> None:
    if _bars:
        _bars[-1].write(line, file=stream)
    else:
        print(line, file=stream, flush=True)


def _is_terminal(stream: IO[str]) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _has_room(stream: IO[str]) -> bool:
    """Whether the terminal is wide enough for a bar: in some containers it is 0 characters wide."""
    return _is_terminal(stream) and os.get_terminal_size(stream.fileno()).columns > 0


def _coloured(word: str, code: int, stream: IO[str]) -> str:
    """The word, in colour in a terminal whose user has not set NO_COLOR (https://no-color.org)."""
    if _is_terminal(stream) and not os.environ.get("NO_COLOR"):
        return f"\x1b[1;{code}m{word}\x1b[0m"
    return word


class Progress:
    """Shows the progress of a job: a bar in a terminal, or a line now and then in a log.

    A bar needs both output streams to be terminals; otherwise somebody keeps the lines, as with `| tee log`.
    """

    def __init__(self, total: int, unit: str, line_seconds: float = LINE_SECONDS) -> None:
        """
        Args:
            unit: what is counted, in the plural.
            line_seconds: shortest time between two lines in a log.
        """
        self._total, self._unit, self._line_seconds = total, unit, line_seconds
        self._created = self._last_line = time.monotonic()
        self._started: float | None = None
        self._bar: tqdm[Any] | None = None
        if _verbosity > Verbosity.QUIET and _is_terminal(sys.stdout) and _has_room(sys.stderr):
            self._bar = _draw_bar(total, unit)
            _bars.append(self._bar)

    @property
    def seconds(self) -> float:
        """Seconds since the work began; at least a microsecond, so that rates can be computed."""
        return max(1e-6, time.monotonic() - (self._started or self._created))

    def work_began(self, at: datetime) -> None:
        """Leaves what came before, such as the start of workers, out of rates and of the time left.

        Of several times the earliest counts. A worker's clock may be wrong, but its work began after this
        object was made.
        """
        began = time.monotonic() - max(0.0, time.time() - at.timestamp())
        self._started = max(self._created, min(began, self._started or began))

    def update(self, done: int, figures: str, left: float | None = None) -> None:
        """Shows how many of the total are done.

        Args:
            figures: further figures to show.
            left: seconds until the end; by default estimated from the rate so far.
        """
        if left is None:
            left = self.seconds / max(1, done) * (self._total - done)
        figures = f"{figures}  {left:.0f} s left"
        if self._bar is not None:
            self._bar.n = done
            self._bar.set_description_str(figures)
            return
        now = time.monotonic()
        if now - self._last_line >= self._line_seconds:
            self._last_line = now
            say(f"{done}/{self._total} {self._unit}  {figures}")

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            _bars.remove(self._bar)
            self._bar.close()
            self._bar = None


def _draw_bar(total: int, unit: str) -> "tqdm[Any]":
    from tqdm import tqdm

    return tqdm(
        total=total,
        leave=False,
        dynamic_ncols=True,
        bar_format=f"{{n_fmt}}/{{total_fmt}} {unit} {{bar}} {{desc}}",
    )
