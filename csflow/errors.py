"""How a job ends: exit statuses, and the errors that a user can act on."""

from enum import IntEnum


class ExitStatus(IntEnum):
    """Exit statuses of every job (`docs/architecture.md`)."""

    DONE = 0
    """Every input image is accounted for."""
    FAILED = 1
    """The job broke; its log says where."""
    WRONG_USE = 2
    """A setting or an input is wrong; said in one line before any work starts."""
    INCOMPLETE = 3
    """Ended with rows missing; the same command continues."""


class WrongUse(Exception):
    """A setting, a URI or an input file is wrong: one line that names it and the remedy (exit status 2)."""
