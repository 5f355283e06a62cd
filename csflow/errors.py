"""How a job ends: exit statuses, and the errors that a user can act on."""

from enum import IntEnum, StrEnum


class ExitStatus(IntEnum):
    """Exit statuses of every job (docs/reference/output.md)."""

    DONE = 0
    """Every input image is accounted for."""
    FAILED = 1
    """The job failed; its output says why."""
    WRONG_USE = 2
    """A setting or an input is wrong; one line says so before any work starts."""
    INCOMPLETE = 3
    """The job ended with rows missing; the same command continues."""
    DRIFT = 4
    """Done, but the scores have drifted from calibration; only with --exit_on_drift."""
    STOPPED = 130
    """Ctrl-C stopped the job: 128 plus the number of the signal, as in shells."""


class WrongUse(Exception):
    """A setting, URI or input is wrong; the message names it and the remedy in one line (exit status 2)."""


class Failed(RuntimeError):
    """A reason outside of the job, which the message names in one line, stops the job (exit status 1)."""


class Incomplete(RuntimeError):
    """A job that was called as a function ended with rows or epochs missing; the same call continues it."""


class StorageFailed(OSError):
    """A file of the job's own cannot be read or written: the disk is full, or the store refuses or is away.

    Or a part of the input cannot be listed, and the job needs all of it. The message names the file in one
    line. Written files stay; the same command continues (exit status 3).
    """


class DamagedFile(Exception):
    """A file that a training has written is damaged; the message is one line.

    Args:
        what: names the file and its damage.
        remedy: what to do.
    """

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}"


class ErrorCode(StrEnum):
    """Why an image has no score: the closed list behind `errors.error_code`."""

    NOT_FOUND = "not_found"
    """The object or member was listed, but no longer exists."""
    EMPTY = "empty"
    """The object has zero bytes."""
    UNSUPPORTED_FORMAT = "unsupported_format"
    """The bytes are not an image in a known format."""
    TRUNCATED = "truncated"
    """The image ends early."""
    CORRUPT = "corrupt"
    """The image or the archive around it is damaged."""
    TOO_LARGE = "too_large"
    """The image has more pixels or bytes than the stated limit."""
    TOO_SLOW = "too_slow"
    """Decoding the image takes more time than the stated limit."""
    CRASHED = "crashed"
    """The process that handled the image died more than once."""
    INTERNAL = "internal"
    """An unexpected error occurred; please report it as a bug."""
    CHANGED = "changed"
    """The object is another version than the one listed; the next run lists it anew."""
    PERMISSION_DENIED = "permission_denied"
    """The store refuses this object."""
    THROTTLED = "throttled"
    """The store asked to slow down until the deadline of the object had passed."""
    TIMEOUT = "timeout"
    """The store did not answer before the deadline of the object."""
    CONNECTION = "connection"
    """The connection to the store failed."""
    SERVER_ERROR = "server_error"
    """The store answered with a 5xx status."""


TRANSIENT = frozenset(
    {
        ErrorCode.CHANGED,
        ErrorCode.PERMISSION_DENIED,
        ErrorCode.THROTTLED,
        ErrorCode.TIMEOUT,
        ErrorCode.CONNECTION,
        ErrorCode.SERVER_ERROR,
    }
)
"""Codes of errors that may be temporary or repaired: the next run tries these images again."""


OF_CONTENT = frozenset(
    {ErrorCode.CORRUPT, ErrorCode.CRASHED, ErrorCode.TOO_LARGE, ErrorCode.UNSUPPORTED_FORMAT}
)
"""Codes of errors that the content of a container is to blame for, so that reading it again is in vain."""


class ImageError(Exception):
    """One image cannot be read or decoded; it becomes a row of `errors` and its neighbours go on."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[type["ImageError"], tuple[ErrorCode, str]]:
        return type(self), (self.code, self.message)

    @property
    def is_transient(self) -> bool:
        return self.code in TRANSIENT
