"""A job in a terminal of its own, as a person sees it: what it draws there, and Ctrl-C."""

import os
import pty
import secrets
import select
import subprocess
import sys
import termios
import time

from conftest import ROOT
from processes import processes_with

CTRL_C = b"\x03"
# Not as `preexec_fn`: with it Python forks, which can cut the connections of gRPC's threads in this process.
IN_TERMINAL = (
    # A shell starts jobs in the foreground so, even if these tests run in the background, without Ctrl-C.
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.login_tty(int(sys.argv[1])); os.execvp(sys.argv[2], sys.argv[2:])"
)


class Terminal:
    """A process whose standard streams are a terminal."""

    def __init__(self, *command: object, columns: int = 100, **environment: str) -> None:
        self._mark = f"CSFLOW_TEST_TERMINAL={secrets.token_hex(8)}"
        name, _, value = self._mark.partition("=")
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, columns))
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_TERMINAL, str(theirs), *map(str, command)],
            cwd=ROOT,
            env=os.environ | {"TERM": "xterm", name: value} | environment,
            pass_fds=[theirs],
        )
        os.close(theirs)
        self.shown = ""

    def read_until(self, text: str, seconds: float = 120) -> None:
        """Reads on until the terminal has shown the text."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            assert self._read(deadline), self.shown

    def press(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def wait(self, seconds: float = 120) -> int:
        """Reads to the end; returns the exit status."""
        deadline = time.monotonic() + seconds
        while self._read(deadline):
            assert time.monotonic() < deadline, self.shown
        os.close(self._ours)
        return self.process.wait(timeout=seconds)

    def children(self) -> list[str]:
        """Command lines of what the process has started and what still runs."""
        found = processes_with(self._mark)
        return [line.replace(b"\0", b" ").decode() for pid, line in found if pid != self.process.pid]

    def _read(self, deadline: float) -> bool:
        """Reads what there is; False at the end."""
        ready, _, _ = select.select([self._ours], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            return True
        try:
            data = os.read(self._ours, 65536)
        except OSError:  # Linux's way to say that nobody has the other end any more
            return False
        self.shown += data.decode(errors="replace")
        return bool(data)


def job_in_terminal(job: str, *arguments: object, **environment: str) -> Terminal:
    """`python jobs/score.py …`, or another job, in a terminal."""
    return Terminal(sys.executable, ROOT / "jobs" / f"{job}.py", *arguments, **environment)
