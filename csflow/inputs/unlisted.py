"""What lies below the inputs and is not in their listing: what cannot be listed, and what is not taken.

What cannot be listed may hold images that nobody knows of: it is named, and the job ends with status 3. What
is not taken is counted by suffix and reason.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from threading import Lock

from csflow.errors import StorageFailed, WrongUse

NAMES_KEPT = 1000
"""Number of names to keep of what cannot be listed, and of kinds of what is not taken. All are counted."""
LINES_SHOWN, KINDS_SHOWN = 10, 6
"""Number of failures, and of kinds of each reason, to print."""
OTHERS = "others"
"""The kind of what is not taken beyond `NAMES_KEPT` kinds."""


class Reason(StrEnum):
    """Why something is not taken: the closed list behind `skipped` in `run.json`."""

    OTHER_FORMAT = "other_format"
    """By its name it is no image, archive or Parquet file."""
    HIDDEN = "hidden"
    """A file or folder that begins with a dot, or a folder that begins with an underscore."""
    SKIPPED_FOLDER = "skipped_folder"
    """A folder that `--skip_folders` names."""
    NO_IMAGE_COLUMN = "no_image_column"
    """A Parquet file without a column of image bytes; `--image_column` can name one."""
    NO_REGULAR_FILE = "no_regular_file"
    """A pipe, a socket or a device, or in a tar a link to what is no image in it."""
    NOT_SELECTED = "not_selected"
    """`--include`, `--exclude` or `--since` leave it out."""


WORDS = {
    Reason.OTHER_FORMAT: "no kind of input",
    Reason.HIDDEN: "hidden",
    Reason.SKIPPED_FOLDER: "see --skip_folders",
    Reason.NO_IMAGE_COLUMN: "without a column of image bytes, see --image_column",
    Reason.NO_REGULAR_FILE: "no regular files",
    Reason.NOT_SELECTED: "left out by --include, --exclude or --since",
}
"""Reasons as the summary says them."""


class Unlistable(WrongUse):
    """An input that exists is refused or damaged. If there are others, these are listed."""


@dataclass(frozen=True)
class Skipped:
    """How many files or folders of one kind were not taken for one reason."""

    reason: Reason
    kind: str
    """Suffix of files, empty if they have none; name of folders, which ends in /."""
    number: int


class Unlisted:
    """Collects what is not listed. Threads may share it."""

    def __init__(self, is_excluded: Callable[[str], bool] = lambda uri: False) -> None:
        """
        Args:
            is_excluded: whether the user leaves out a file or folder, which may then fail.
        """
        self._is_excluded = is_excluded
        self.failures: dict[str, str] = {}
        """Why files and folders (which end in /) cannot be listed, by URI, for the first `NAMES_KEPT`."""
        self.failed = 0
        """Number of files and folders that cannot be listed."""
        self._skipped: Counter[tuple[Reason, str]] = Counter()
        self._folders: set[str] = set()
        self._lock = Lock()

    def fail(self, uri: str, reason: str) -> None:
        """Notes a file or folder that cannot be listed, unless it is excluded."""
        if self._is_excluded(uri):
            return
        with self._lock:
            self.failed += 1
            if len(self.failures) < NAMES_KEPT:
                self.failures[uri] = reason

    def skip(self, reason: Reason, kind: str) -> None:
        """Counts a file that is not taken, by its suffix."""
        with self._lock:
            is_known = (reason, kind) in self._skipped or len(self._skipped) < NAMES_KEPT
            self._skipped[reason, kind if is_known else OTHERS] += 1

    def skip_folder(self, reason: Reason, uri: str) -> None:
        """Counts a folder that is not looked into, however often it is met; its URI ends in /."""
        with self._lock:
            if uri in self._folders:
                return
            self._folders.add(uri)
        self.skip(reason, uri.rstrip("/").rpartition("/")[2] + "/")

    @property
    def skipped(self) -> list[Skipped]:
        """What was not taken, the most frequent first."""
        return [Skipped(*key, number) for key, number in self._skipped.most_common()]

    def lines(self) -> Iterator[str]:
        """A line for each failure; of many the first `LINES_SHOWN`."""
        for uri, reason in islice(self.failures.items(), LINES_SHOWN):
            yield f"not listed: {uri}: {reason}"
        if self.failed > LINES_SHOWN:
            yield f"not listed: {self.failed - LINES_SHOWN:,} more"

    def check(self) -> None:
        """Raises StorageFailed if anything could not be listed, for jobs that need all of their input."""
        if self.failed:
            raise StorageFailed(failures_in_words(self.failed, self.failures))


def failures_in_words(failed: int, failures: Mapping[str, str]) -> str:
    """How many files and folders cannot be listed, with the first of them and the remedy."""
    return (
        f"{failed:,} files or folders of the input cannot be listed, {next(iter(failures))} first; repair "
        "them, or leave them out with --exclude or --skip_folders"
    )


def in_words(skipped: list[Skipped]) -> str:
    """What was not taken in one line, the most frequent kinds of each reason."""
    parts = []
    for reason in WORDS:
        kinds = [one for one in skipped if one.reason == reason]
        if not kinds:
            continue
        shown = [f"{one.number:,} {one.kind or 'without a suffix'}" for one in kinds[:KINDS_SHOWN]]
        rest = sum(one.number for one in kinds[KINDS_SHOWN:])
        parts.append(", ".join([*shown, *([f"{rest:,} others"] if rest else [])]) + f" ({WORDS[reason]})")
    return "; ".join(parts)
