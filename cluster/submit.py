"""Runs one job on a Ray cluster and ends with the job's own exit status, for schedulers.

    python cluster/submit.py --run nightly-2026-11-27 -- python /opt/csflow/jobs/score.py --config …

`--run` names the scheduled run. Its attempts have the submission ids `<run>`, `<run>-2`, `<run>-3`, …, and
only one of them is at work at any time:

- If an attempt is at work, as after the loss of this process, it is followed, and nothing is submitted.
- If an attempt has succeeded, nothing is submitted either. If the last one failed, the next is submitted.
- While the head is away, this waits, up to `--head_timeout`. A head that comes back without its memory has
  lost the attempt, which is submitted again.
- SIGTERM, which schedulers send at a deadline, and Ctrl-C end the attempt, too.

Exit status: that of the job; 128 plus the number of the signal, if one ended the job or this process; 130, if
somebody stopped the job; 3, if the head stays away, or the job was lost; 2, if the head refuses the token.

The cluster is the one that RAY_API_SERVER_ADDRESS names; with RAY_AUTH_MODE=token, RAY_AUTH_TOKEN or
RAY_AUTH_TOKEN_PATH has the token.
"""

import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from csflow.console import complain, say, warn
from csflow.errors import ExitStatus, WrongUse
from csflow.flags import FlagParser
from csflow.redaction import redact

T = TypeVar("T")

ANSWER_SECONDS = 20.0
"""The client has no time-out of its own: a lost node would keep it waiting for ever."""
STOP_SECONDS = 30.0
"""Seconds to wait for a stopped job to end. Ray kills it after three; the rest is for a slow head."""
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0
"""Seconds between two looks at the job; each is half as long again as the one before."""


class Away(Exception):
    """The head does not answer, or not with what was asked for."""


@dataclass(frozen=True)
class Attempt:
    """One submission of a run."""

    number: int
    job: JobDetails

    @property
    def is_at_work(self) -> bool:
        return not self.job.status.is_terminal()

    def exit_status(self) -> int:
        """The exit status of an attempt that has ended."""
        if self.job.status == JobStatus.SUCCEEDED:
            return ExitStatus.DONE
        if self.job.status == JobStatus.STOPPED:
            return ExitStatus.STOPPED
        code = self.job.driver_exit_code
        if code is None:  # it was lost with its node, or never began
            return ExitStatus.INCOMPLETE
        return code if code >= 0 else 128 - code


def submission_id(run: str, number: int) -> str:
    """The submission id of an attempt; numbers begin with 1."""
    return run if number == 1 else f"{run}-{number}"


def last_attempt(run: str, jobs: Sequence[JobDetails]) -> Attempt | None:
    """The latest attempt at a run among all jobs that a head knows."""
    matches = [(re.fullmatch(rf"{re.escape(run)}(?:-(\d+))?", job.submission_id or ""), job) for job in jobs]
    attempts = [Attempt(int(match[1] or 1), job) for match, job in matches if match]
    return max(attempts, key=lambda attempt: attempt.number, default=None)


class Head:
    """The job server of a cluster. Every request raises Away if there is no proper answer in time."""

    def __init__(self) -> None:
        self._client: JobSubmissionClient | None = None

    def jobs(self) -> list[JobDetails]:
        return self._ask(lambda client: client.list_jobs())

    def submit(self, entrypoint: str, submission: str) -> None:
        self._ask(lambda client: client.submit_job(entrypoint=entrypoint, submission_id=submission))

    def log(self, submission: str) -> str:
        return self._ask(lambda client: client.get_job_logs(submission))

    def stop(self, submission: str) -> None:
        self._ask(lambda client: client.stop_job(submission))

    def _ask(self, question: Callable[[JobSubmissionClient], T]) -> T:
        """The answer. Raises WrongUse if the head refuses the token."""
        answer: Future[T] = Future()

        def wait() -> None:
            try:
                self._client = self._client or JobSubmissionClient()
                answer.set_result(question(self._client))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=wait, daemon=True).start()
        try:
            return answer.result(timeout=ANSWER_SECONDS)
        except AuthenticationError as error:
            raise WrongUse(f"the head refuses the token: {error.message}") from None
        except (OSError, RuntimeError) as error:  # TimeoutError and those of requests are OSErrors
            raise Away(f"{type(error).__name__}: {error}") from None


class Run:
    """Follows the attempts at one run until one of them has ended."""

    def __init__(self, run: str, entrypoint: str, head_timeout: float, head: Head) -> None:
        self._run, self._entrypoint, self._head_timeout, self._head = run, entrypoint, head_timeout, head
        self._followed = ""
        self._printed = 0
        self._signal = 0
        self._stop = threading.Event()

    def stop(self, number: int, _frame: Any = None) -> None:
        """Handles a signal: the attempt is to be ended."""
        self._signal = number
        self._stop.set()

    def exit_status(self) -> int:
        """Submits or finds an attempt, waits until it has ended, prints its log; returns its exit status."""
        heard_at, pause = time.monotonic(), FIRST_PAUSE
        is_away = False
        while not self._stop.is_set():
            try:
                attempt = self._advance()
            except Away as error:
                if not is_away:
                    say(redact(f"waiting for the head of the cluster: {error}"))
                is_away = True
                if time.monotonic() - heard_at > self._head_timeout:
                    complain(f"the head was away for {self._head_timeout:.0f} s; the same command continues")
                    return ExitStatus.INCOMPLETE
            else:
                if attempt and not attempt.is_at_work:
                    return self._end(attempt)
                if is_away:
                    say("the head has answered")
                heard_at, is_away = time.monotonic(), False
            self._stop.wait(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE)
        return self._end_by_signal()

    def _advance(self) -> Attempt | None:
        """Submits what is to be submitted, or prints what the attempt at work has logged since."""
        attempt = last_attempt(self._run, self._head.jobs())
        if attempt is None or self._is_to_be_repeated(attempt):
            number = attempt.number + 1 if attempt else 1
            self._follow(submission_id(self._run, number))
            self._head.submit(self._entrypoint, self._followed)
            say(f"submitted {self._followed}: {self._entrypoint}")
            return None
        if attempt.job.submission_id != self._followed:
            self._follow(str(attempt.job.submission_id))
            say(f"found {self._followed}, which was submitted before")
        self._print_log()
        return attempt

    def _is_to_be_repeated(self, attempt: Attempt) -> bool:
        """Whether an attempt failed before this process began."""
        is_failed = not attempt.is_at_work and attempt.exit_status() != ExitStatus.DONE
        return is_failed and attempt.job.submission_id != self._followed

    def _follow(self, submission: str) -> None:
        self._followed, self._printed = submission, 0

    def _print_log(self) -> None:
        log = self._head.log(self._followed)
        print(log[self._printed :], end="", flush=True)
        self._printed = len(log)

    def _end(self, attempt: Attempt) -> int:
        status = attempt.exit_status()
        if attempt.job.status != JobStatus.SUCCEEDED:
            # Ray's message goes on with the end of the log, which has been printed.
            message = (attempt.job.message or attempt.job.status).partition(", last available logs")[0]
            warn(redact(f"{self._followed} has ended: {message}"))
        say(f"exit status {status}")
        return status

    def _end_by_signal(self) -> int:
        """Stops what is at work, so that nothing runs on behind a scheduler that has given it up."""
        say(f"{signal.Signals(self._signal).name}: stopping the job")
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline:
            try:
                attempt = last_attempt(self._run, self._head.jobs())
                if attempt is None or not attempt.is_at_work:
                    say("stopped; the same command continues")
                    break
                self._head.stop(str(attempt.job.submission_id))
            except Away as error:
                say(redact(f"the head does not answer: {error}"))
            time.sleep(FIRST_PAUSE)
        else:
            warn(f"{self._followed or self._run} may still be at work: the head has not confirmed its end")
        return 128 + self._signal


def main(words: Sequence[str]) -> int:
    """Runs the command line of this script; returns the exit status."""
    own, entrypoint = list(words), []
    if "--" in own:
        cut = own.index("--")
        own, entrypoint = own[:cut], own[cut + 1 :]
    parser = FlagParser(prog="submit.py", description=__doc__)
    parser.add_argument("--run", required=True, help="Name of the scheduled run, such as nightly-2026-11-27.")
    parser.add_argument(
        "--head_timeout",
        type=float,
        default=1800.0,
        metavar="SECONDS",
        help="How long the head may be away. [default: 1800]",
    )
    try:
        options = parser.parse(own)
        if not entrypoint:
            raise WrongUse("the job's command is missing; it follows after --")
        run = Run(options["run"], shlex.join(entrypoint), options["head_timeout"], Head())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, run.stop)
        return run.exit_status()
    except WrongUse as error:
        complain(redact(str(error)))
        return ExitStatus.WRONG_USE


if __name__ == "__main__":
    sys.exit(int(main(sys.argv[1:])))
