"""Tells in the output that a run is at work, for those who watch it when its driver cannot be asked."""

import contextlib
import time
from collections.abc import Generator, Iterable
from datetime import UTC, datetime
from typing import TypeVar

from csflow.errors import StorageFailed
from csflow.output.layout import run_folder
from csflow.output.runs import Progress
from csflow.storage import Location

T = TypeVar("T")

BEAT_SECONDS = 60.0
"""Seconds between two writes while a step is at work, at least."""


class Heartbeat:
    """Writes the progress of a run when something has been done, at most once in `BEAT_SECONDS`.

    What waits, or hangs, does nothing: then the time in the file grows old, and that is the alarm.
    """

    def __init__(self, output: Location, run_id: str, started_at: datetime) -> None:
        self._output = output
        self._progress = Progress(run_id=run_id, started_at=started_at, updated_at=started_at, step="list")
        self._last = float("-inf")

    def begin(self, step: str, of: int = 0) -> None:
        """Begins a step, and writes so.

        Args:
            of: number of items that the step has, if that is known.
        """
        self._write(step=step, done=0, of=of)

    def over(self, items: Iterable[T]) -> Generator[T, None, None]:
        """The items of the step. Each that comes is something done."""
        for item in items:
            self._progress = self._progress.model_copy(update={"done": self._progress.done + 1})
            if time.monotonic() - self._last >= BEAT_SECONDS:
                self._write()
            yield item

    def forget(self) -> None:
        """Removes what the run has left so far: for it was called wrongly, and was not cut off."""
        with contextlib.suppress(StorageFailed):
            run_folder(self._output, self._progress.run_id).remove_folder()

    def _write(self, **changes: str | int) -> None:
        self._last = time.monotonic()
        self._progress = self._progress.model_copy(update=changes | {"updated_at": datetime.now(UTC)})
        # Nothing rests on it, and what does rest on the store will say what is wrong with that.
        with contextlib.suppress(StorageFailed):
            self._progress.write(self._output)
