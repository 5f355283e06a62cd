"""What jobs say: lines in a log, a bar and colour in a terminal, less with --quiet; and Ctrl-C."""

import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import ROOT, SMALL_MODEL, copy_some, names, read_scores
from terminal import CTRL_C, Terminal, job_in_terminal

from csflow import __version__, console
from csflow.cli import COMMANDS
from csflow.console import Progress, Verbosity

OWN_RAY = {"RAY_ADDRESS": "local"}
"""The job starts Ray itself, so that all of it has to end with the job."""
PROGRESS = """
from contextlib import closing
from csflow.console import Progress, complain, say, warn
say("said"), warn("warned"), complain("complained")
with closing(Progress(3, "shards", line_seconds=0)) as progress:
    for done in (1, 2, 3):
        progress.update(done, f"{done * 32} scored")
        say(f"between {done}")
"""
COLOUR = "\x1b["


@pytest.fixture(autouse=True)
def usual_verbosity():
    yield
    console.set_verbosity(Verbosity.NORMAL)


def run_python(code: str, **streams: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, check=True, **streams)


def test_a_log_gets_lines_without_bars_or_colour():
    done = run_python(PROGRESS, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    lines = done.stdout.splitlines()
    assert lines[:2] == ["said", "warning: warned"]
    assert re.fullmatch(r"1/3 shards  32 scored  \d+ s left", lines[2])
    assert lines[3] == "between 1"
    assert done.stderr == "error: complained\n"
    assert COLOUR not in done.stdout


def test_lines_of_progress_come_now_and_then(capsys, monkeypatch):
    clock = iter(range(26))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(Progress, "seconds", 20.0)
    progress = Progress(30, "shards")
    for done in range(1, 26):
        progress.update(done, "figures")
    assert capsys.readouterr().out.splitlines() == [
        "10/30 shards  figures  40 s left",
        "20/30 shards  figures  10 s left",
    ]


def test_the_start_of_workers_is_no_part_of_a_rate(monkeypatch):
    clock = {"monotonic": 100.0, "time": 1_000.0}
    for name in clock:
        monkeypatch.setattr(console.time, name, lambda name=name: clock[name])
    progress = Progress(30, "shards")
    clock |= {"monotonic": 180.0, "time": 1_080.0}
    assert progress.seconds == 80
    progress.work_began(datetime.fromtimestamp(1_070, UTC))
    progress.work_began(datetime.fromtimestamp(1_075, UTC))  # a second worker
    assert progress.seconds == 10
    progress.work_began(datetime.fromtimestamp(1_060, UTC))
    assert progress.seconds == 20
    # Clocks that go wrong: work neither ends before it begins nor begins before the job.
    progress.work_began(datetime.fromtimestamp(5_000, UTC))
    assert progress.seconds == 20
    progress.work_began(datetime.fromtimestamp(0, UTC))
    assert progress.seconds == 80


def test_a_terminal_gets_a_bar_and_colour():
    terminal = Terminal(sys.executable, "-c", PROGRESS)
    assert terminal.wait() == 0
    assert "3/3 shards" in terminal.shown
    assert "96 scored" in terminal.shown
    assert "shards  32 scored" not in terminal.shown  # as in a line
    assert "\x1b[1;33mwarning:\x1b[0m warned" in terminal.shown
    assert "\x1b[1;31merror:\x1b[0m complained" in terminal.shown
    # Lines stand above the bar, each by itself.
    assert all(re.search(rf"[\r\n]between {n}\r\n", terminal.shown) for n in (1, 2, 3))


@pytest.mark.parametrize("variable", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colour_can_be_refused(variable):
    terminal = Terminal(sys.executable, "-c", PROGRESS, **variable)
    assert terminal.wait() == 0
    assert "warning: warned" in terminal.shown
    assert "\x1b[1;" not in terminal.shown


def test_a_terminal_without_room_for_a_bar_gets_lines():
    terminal = Terminal(sys.executable, "-c", PROGRESS, columns=0)
    assert terminal.wait() == 0
    assert "3/3 shards  96 scored  0 s left" in terminal.shown


def test_lines_that_are_kept_by_somebody_are_not_mixed_with_a_bar():
    terminal = Terminal("bash", "-c", f"{sys.executable} -c '{PROGRESS}' | cat")
    assert terminal.wait() == 0
    assert "3/3 shards  96 scored  0 s left" in terminal.shown
    assert "\r1/3" not in terminal.shown


def test_quiet_leaves_out_what_is_said_on_the_way(capsys):
    console.set_verbosity(Verbosity.QUIET)
    exec(PROGRESS, {})
    said = capsys.readouterr()
    assert said.out == "warning: warned\n"
    assert said.err == "error: complained\n"


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_job_says_that_it_starts_before_it_imports_what_takes_seconds(verb):
    code = f"""
import sys
import csflow.cli
def stop(place): sys.exit(0)
greet = csflow.cli.greet
def greet_first(*arguments):
    greet(*arguments)
    print(*sys.modules, file=sys.stderr)
csflow.cli.greet, csflow.cli.load = greet_first, stop
csflow.cli.main(["{verb}"])
"""
    done = run_python(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if not COMMANDS[verb].is_job:
        assert done.stdout == ""
        return
    assert done.stdout == f"csflow {__version__} {verb}: starting\n"
    assert not {"pydantic", "yaml", "numpy", "pyarrow", "torch", "ray", "tqdm"} & set(done.stderr.split())


@pytest.mark.parametrize(
    "flag", ["-h", "--help", "--version", "--print-config", "--print_config", "-q", "--quiet"]
)
def test_a_job_that_prints_something_else_says_nothing_first(flag, capsys):
    console.greet("score", ["--model", "m", flag])
    assert capsys.readouterr().out == ""


def test_a_scoring_run_in_a_terminal_shows_a_bar_and_no_line_of_rays(model, cells, tmp_path):
    images = copy_some(cells / "defective", tmp_path / "images", 40)
    arguments = ["--model", model, "--input", images, "--output", tmp_path / "out"]
    terminal = job_in_terminal("score", *arguments, **OWN_RAY)
    assert terminal.wait() == 0, terminal.shown
    # What a line shows in the end: a carriage return begins it anew.
    lines = [line.rpartition("\r")[2] for line in plain(terminal.shown).replace("\r\n", "\n").split("\n")]
    assert lines[0] == f"csflow {__version__} score: starting"
    assert "2/2 shards" in terminal.shown
    assert "RAY_BACKEND_LOG_LEVEL" not in terminal.shown
    expected = (
        r"csflow |run \d|40 images (listed|of 300 × 300)|warning: |scoring with |scored |errors |rate |"
        r"loading |drift |distance |output |$"
    )
    assert [line for line in lines if not re.match(expected, line)] == []


def test_quiet_and_verbose_jobs(model, cells, tmp_path):
    images = copy_some(cells / "defective", tmp_path / "images", 4)
    arguments = ["--model", model, "--input", images, "--output", tmp_path / "out"]
    command = [sys.executable, ROOT / "jobs" / "score.py", *arguments]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], capture_output=True, text=True, cwd=ROOT)

    quiet = run("--quiet")
    assert quiet.returncode == 0
    assert quiet.stderr == ""
    assert re.match(r"(warning: .*\n)?scored    4 images", quiet.stdout)
    verbose = run("-v", "--model", "/no/model")
    assert verbose.returncode == 2
    assert "Traceback" in verbose.stderr
    assert verbose.stderr.splitlines()[-1].startswith("error: model file /no/model")


def plain(shown: str) -> str:
    """Without colours and movements of the cursor."""
    return re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", shown)


def wait_for_no_children(terminal: Terminal) -> None:
    """Ray's processes follow theirs at once, but not in the same instant."""
    deadline = time.monotonic() + 20
    while terminal.children():
        assert time.monotonic() < deadline, terminal.children()
        time.sleep(0.1)


def test_ctrl_c_stops_scoring_and_the_same_command_continues(model, cells, tmp_path):
    images = copy_some(cells / "defective", tmp_path / "images", 96)
    arguments = ["--model", model, "--input", images, "--output", tmp_path / "out", "--workers", 1]
    terminal = job_in_terminal("score", *arguments, **OWN_RAY)
    terminal.read_until("1/3 shards")
    terminal.press(CTRL_C)
    assert terminal.wait(60) == 130
    assert plain(terminal.shown).rstrip().endswith("\nstopped; the same command continues")
    assert "Traceback" not in terminal.shown
    wait_for_no_children(terminal)
    assert job_in_terminal("score", *arguments).wait() == 0
    assert set(names(read_scores(tmp_path / "out")).values()) == {1}
    assert len(read_scores(tmp_path / "out")) == 96


@pytest.mark.parametrize("moment", ["train: starting", "images listed", "epoch 2/"])
def test_ctrl_c_stops_training(moment, good_cells, tmp_path):
    arguments = ["--input", good_cells, "--output", tmp_path / "model", *SMALL_MODEL, "--epochs", 500]
    terminal = job_in_terminal("train", *arguments, **OWN_RAY)
    terminal.read_until(moment, seconds=240)
    terminal.press(CTRL_C)
    assert terminal.wait(60) == 130
    assert plain(terminal.shown).rstrip().endswith("\nstopped; the same command with --resume continues")
    assert "Traceback" not in terminal.shown
    wait_for_no_children(terminal)
    assert not Path(tmp_path / "model" / "config.json").exists()
