"""Jobs as processes of their own, and the processes of Ray behind them, so that tests can kill both."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT


def start_job(*arguments: object, job: str = "score", **environment: str) -> subprocess.Popen[str]:
    """`python jobs/score.py …`, or another job, started; its standard output and error come together."""
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def score_in_a_process(*arguments: object, **environment: str) -> tuple[int, str]:
    """Exit status and output of a whole job."""
    job = start_job(*arguments, **environment)
    printed = job.communicate(timeout=400)[0]
    return job.returncode, printed


def scoring_workers() -> list[int]:
    """Process ids of the actors that score, in the clusters of this test session."""
    return list(_ray_processes(rb"ray::.*ScoringActor"))


def helping_workers() -> list[int]:
    """Process ids of Ray's workers that load images for others."""
    return list(_ray_processes(rb"ray::HelpingLoader"))


def workers() -> list[int]:
    """Process ids of Ray's workers in the clusters of this test session: actors, tasks and idle ones."""
    return list(_ray_processes(rb"ray::(?!.*Agent)"))


def _ray_processes(title: bytes) -> Iterator[int]:
    # Every process of this session's clusters has inherited its token.
    found = processes_with(f"RAY_AUTH_TOKEN={os.environ['RAY_AUTH_TOKEN']}")
    return (pid for pid, command_line in found if re.match(title, command_line))


def processes_with(variable: str) -> Iterator[tuple[int, bytes]]:
    """Id and command line of every process that runs with this `NAME=value` in its environment."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    yield int(folder.name), (folder / "cmdline").read_bytes()
            except OSError:
                continue  # it has just ended
