"""Turns what ends a job into an exit status and, if the user can act on the reason, one error line."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from csflow.config import Config, parse
from csflow.console import complain, is_verbose
from csflow.errors import ExitStatus, Failed, StorageFailed, WrongUse
from csflow.redaction import redact
from csflow.threads import one_was_left


def run_job(
    config_type: type[Config],
    main: Callable[[Config], ExitStatus],
    doc: str | None,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
) -> NoReturn:
    """Parses the command line, runs `main` and leaves the process with its exit status.

    By default the command line is that of the process; `prog` is the command's name in messages.

    If the user can act on an error, it becomes one line on standard error and a status: 2 for a `WrongUse`, 1
    for a `Failed`, 3 for files out of reach. Any other error keeps its traceback. Neither shows secrets in
    storage options.
    """
    options: dict[str, Any] = {}
    try:
        config = parse(config_type, doc, argv, prog)
        options = config.storage_options
        status = main(config)
    except (WrongUse, Failed, StorageFailed, ConnectionError) as error:
        if is_verbose():
            _print_traceback(error, options)
        complain(redact(" ".join(str(error).split()), options))
        status = _status_of(error)
    except Exception as error:
        _print_traceback(error, options)
        status = ExitStatus.FAILED
    leave(status)


def leave(status: ExitStatus) -> NoReturn:
    """Ends the process with this status, whatever still hangs in it."""
    sys.stdout.flush()
    if one_was_left():
        # While Ray shuts down, its processes go, and a thread that still asks them ends this process with a
        # status of Ray's. Those that this process has started end with it.
        sys.stderr.flush()
        os._exit(int(status))
    sys.exit(int(status))


def _status_of(error: Exception) -> ExitStatus:
    if isinstance(error, WrongUse):
        return ExitStatus.WRONG_USE
    return ExitStatus.FAILED if isinstance(error, Failed) else ExitStatus.INCOMPLETE


def _print_traceback(error: Exception, options: dict[str, Any]) -> None:
    print(redact("".join(traceback.format_exception(error)), options), end="", file=sys.stderr)
