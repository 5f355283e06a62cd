"""cluster/submit.py on a real head: one attempt at a time, whatever happens to the head and to the script."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, free_port
from ray.job_submission import JobStatus, JobSubmissionClient

from csflow.errors import ExitStatus

TOKEN = os.environ["RAY_AUTH_TOKEN"]
RAY = str(Path(sys.executable).with_name("ray"))
HEAD_SECONDS = 60


class Head:
    """A head without workers, at ports that stay the same when it goes and comes back."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = [free_port() for _ in range(3)]
        self._process: subprocess.Popen[str] | None = None
        self.address = f"http://127.0.0.1:{self._ports[1]}"

    def start(self) -> None:
        port, dashboard_port, agent_port = self._ports
        command = [
            RAY,
            "start",
            "--head",
            "--num-cpus=0",
            f"--port={port}",
            "--disable-usage-stats",
            "--block",
        ]
        command += [f"--dashboard-port={dashboard_port}", f"--dashboard-agent-listen-port={agent_port}"]
        command += ["--object-store-memory=80000000", f"--temp-dir={self._folder}"]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with (self._folder / "log").open("a") as log:
            streams = {"stdout": log, "stderr": log}
            self._process = subprocess.Popen(command, start_new_session=True, env=environment, **streams)

    def kill(self) -> None:
        """As a lost node: at once, with all that runs on it, the drivers of jobs included."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(timeout=60)
            self._process = None

    def client(self) -> JobSubmissionClient:
        return JobSubmissionClient(self.address)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """Sockets lie below its folder, whose path must be short."""
    folder = Path(f"/tmp/csflow-{secrets.token_hex(3)}")
    folder.mkdir()
    head = Head(folder)
    variables = {"RAY_API_SERVER_ADDRESS": head.address}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    head.start()
    wait_until(lambda: jobs(head) is not None)
    yield head
    head.kill()
    shutil.rmtree(folder, ignore_errors=True)
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def jobs(head: Head) -> dict[str, str] | None:
    """Status by submission id of all jobs; None while the head does not answer."""
    try:
        return {str(job.submission_id): job.status for job in head.client().list_jobs()}
    except (ConnectionError, RuntimeError):
        return None


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + HEAD_SECONDS
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def submit(head: Head, run: str, script: str, *options: str, **environment: str) -> subprocess.Popen[str]:
    """`python cluster/submit.py --run RUN … -- sh -c SCRIPT`, started."""
    command = [sys.executable, str(ROOT / "cluster" / "submit.py"), "--run", run, *options]
    return subprocess.Popen(
        [*command, "--", "sh", "-c", script],
        env=os.environ | {"RAY_API_SERVER_ADDRESS": head.address} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and output, which never has the token."""
    printed = process.communicate(timeout=120)[0]
    assert TOKEN not in printed
    return process.returncode, printed


def test_the_exit_status_is_that_of_the_job(head):
    scripts = {status: f"echo status {status}; exit {status}" for status in (0, 1, 2, 3, 4)}
    scripts[128 + signal.SIGKILL] = "kill -9 $$"
    started = {status: submit(head, f"exit-{status}", script) for status, script in scripts.items()}
    for status, process in started.items():
        returned, printed = end(process)
        assert returned == status, printed
        if status <= 4:
            assert printed.count(f"status {status}\n") >= 1


def test_a_repeated_run_submits_again_only_after_a_failure(head):
    assert end(submit(head, "repeated", "exit 3"))[0] == 3
    assert end(submit(head, "repeated", "echo second; exit 0"))[0] == 0
    status, printed = end(submit(head, "repeated", "echo third; exit 1"))
    assert status == 0
    assert "found repeated-2, which was submitted before" in printed and "second" in printed
    assert sorted(name for name in jobs(head) if name.startswith("repeated")) == ["repeated", "repeated-2"]


def test_after_the_loss_of_the_pod_the_next_one_follows_the_same_job(head, tmp_path):
    script = f"echo begun; while [ ! -e {tmp_path}/go ]; do sleep 0.1; done; echo ended; exit 4"
    first = submit(head, "night", script)
    wait_until(lambda: jobs(head).get("night") == JobStatus.RUNNING, first)
    first.kill()
    first.communicate()
    second = submit(head, "night", script)
    assert second.stdout is not None
    assert "found night, which was submitted before" in second.stdout.readline()
    (tmp_path / "go").touch()
    status, printed = end(second)
    assert status == ExitStatus.DRIFT
    assert printed.count("\nbegun\n") == printed.count("\nended\n") == 1
    assert [name for name in jobs(head) if name.startswith("night")] == ["night"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_job_and_the_next_pod_begins_an_attempt_of_its_own(head, number):
    run = f"deadline-{number}"
    process = submit(head, run, "sleep 600")
    wait_until(lambda: jobs(head).get(run) == JobStatus.RUNNING, process)
    process.send_signal(number)
    status, printed = end(process)
    assert status == 128 + number
    assert "stopped; the same command continues" in printed
    assert jobs(head)[run] == JobStatus.STOPPED
    assert end(submit(head, run, "exit 0"))[0] == 0
    assert jobs(head)[f"{run}-2"] == JobStatus.SUCCEEDED


def test_a_night_that_somebody_stopped_is_no_success(head):
    process = submit(head, "stopped", "sleep 600")
    wait_until(lambda: jobs(head).get("stopped") == JobStatus.RUNNING, process)
    head.client().stop_job("stopped")
    status, printed = end(process)
    assert status == ExitStatus.STOPPED
    assert "stopped has ended" in printed


def test_a_wrong_token_is_said_at_once_and_not_shown(head):
    status, printed = end(submit(head, "wrong", "exit 0", RAY_AUTH_TOKEN="0" * 64))
    assert status == ExitStatus.WRONG_USE
    assert "the head refuses the token" in printed
    assert "0" * 64 not in printed


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--run", "x"], "the job's command is missing"),
        (["--", "true"], "--run"),
        (["--run", "x", "--head_timeout", "soon", "--", "true"], "head_timeout"),
    ],
)
def test_wrong_use_is_said_in_one_line(words, complaint):
    command = [sys.executable, str(ROOT / "cluster" / "submit.py"), *words]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == ExitStatus.WRONG_USE
    assert complaint in ran.stderr and ran.stderr.count("\n") == 1


@pytest.mark.soak
def test_a_head_that_goes_and_comes_back_gets_the_job_again(head, tmp_path):
    """Without memory of its own it has forgotten the job, and the job's driver has gone with it."""
    script = f"echo begun >> {tmp_path}/log; while [ ! -e {tmp_path}/go ]; do sleep 0.1; done"
    process = submit(head, "away", script)
    wait_until(lambda: (tmp_path / "log").exists(), process)
    head.kill()
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    assert any("waiting for the head" in line for line in lines)
    (tmp_path / "go").touch()
    head.start()
    status, printed = end(process)
    assert status == 0, printed
    assert "the head has answered" in printed
    assert (tmp_path / "log").read_text() == "begun\nbegun\n"


def test_a_head_that_stays_away_leaves_a_run_to_be_continued(tmp_path):
    head = Head(tmp_path)
    status, printed = end(submit(head, "x", "exit 0", "--head_timeout", "0.5"))
    assert status == ExitStatus.INCOMPLETE
    assert "the head was away" in printed
