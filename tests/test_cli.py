"""The `csflow` command: the jobs' functions under one name, with help, completion and `inspect`."""

import importlib.util
import re
import runpy
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from conftest import ROOT
from scored_output import NEW_MODEL, OLD_MODEL, write_output, write_record

from csflow import __version__, cli
from csflow.config import JobConfig
from csflow.model import Architecture, Detector
from csflow.model_directory import CALIBRATION, save_model
from csflow.output.runs import Progress
from csflow.storage import Location

VERBS = [v for v in cli.COMMANDS if importlib.util.find_spec(cli.COMMANDS[v].config.split(":")[0])]


@pytest.fixture
def csflow(capsys: pytest.CaptureFixture[str]):
    """Runs a command in this process; returns its exit status and what it printed and complained about."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = 0
        try:
            cli.main(list(map(str, arguments)))
        except SystemExit as ended:
            status = int(ended.code or 0)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def test_a_thread_that_a_job_leaves_behind_does_not_start_ray_when_the_process_ends(tmp_path):
    code = """
import atexit, sys
@atexit.register
def late():
    import ray
    try:
        ray.put(0)
    except Exception as error:
        print("refused:", type(error).__name__)
from csflow.cli import main
main(["inspect", sys.argv[1]])
"""
    command = [sys.executable, "-c", code, str(write_output(tmp_path / "out", range(1)))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1].startswith("refused:")


def test_the_console_script_is_the_command():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cli.load(project["scripts"]["csflow"]) is cli.main


def test_help_names_every_command_and_imports_none():
    code = "import sys; from csflow.cli import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert all(f"\n  {verb} " in done.stdout for verb in cli.COMMANDS)
    assert not {"pydantic", "yaml", "pyarrow", "torch", "ray"} & set(done.stdout.split())


@pytest.mark.parametrize("verb", ["train", "score", "evaluate", "report"])
def test_a_job_is_the_command_with_a_text_of_its_own(verb, monkeypatch):
    calls = []
    monkeypatch.setattr(cli, "run", lambda *arguments: calls.append(arguments))
    script = runpy.run_path(str(ROOT / "jobs" / f"{verb}.py"), run_name="__main__")
    assert calls == [(verb, script["__doc__"])]


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_explains_its_settings(verb, csflow):
    command = cli.COMMANDS[verb]
    assert callable(cli.load(command.main))
    status, out, _ = csflow(verb, "--help")
    assert status == 0
    assert f"usage: csflow {verb}" in out
    assert command.summary in out
    config: type[JobConfig] = cli.load(command.config)
    assert all(name in out.lower() for name in config.model_fields)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "a command is needed; see csflow --help"),
        (["scor"], "invalid choice: 'scor'"),
        (["score", "--modle", "m"], "unrecognized arguments: --modle m; see csflow score --help"),
        (["inspect"], "the following arguments are required: LOCATION; see csflow inspect --help"),
        (["inspect", "/no/such"], "/no/such holds neither a model (config.json) nor scores"),
        (["register", "--scores", "/no/such", "--format", "delta"], "/no/such holds no scores"),
        (["report", "--scores", "/no/such", "--top", "0"], "--top: "),
    ],
)
def test_wrong_use_is_said_in_one_line(arguments, complaint, csflow):
    status, out, err = csflow(*arguments)
    assert status == 2
    assert re.fullmatch(r"(csflow \S+ \w+: starting\n)?", out)
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert complaint in err


def test_settings_are_those_of_the_job(csflow, tmp_path):
    (tmp_path / "nightly.yaml").write_text("model: m\ninput: [a, b]\noutput: o\nworkers: 3\n")
    status, out, _ = csflow("score", "--config", tmp_path / "nightly.yaml", "--workers", 5, "--print_config")
    assert status == 0
    assert "input:\n- a\n- b\noutput: o\n" in out
    assert "workers: 5\n" in out


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_tells_its_version(verb, csflow):
    assert csflow(verb, "--version") == (0, f"csflow {__version__}\n", "")


@pytest.mark.parametrize(
    "words",
    [
        ["--batch-size", "4", "--retry-errors", "--print-config"],
        ["--batch_size", "4", "--retry_errors", "--print_config"],
        ["--batch-size=4", "--retry_errors", "--print-config"],
    ],
)
def test_hyphens_and_underscores_are_the_same_in_flags(words, csflow):
    status, out, _ = csflow("score", "--model", "m-1_a", "--input", "i-j", "--output", "o_p", *words)
    assert status == 0
    assert "batch_size: 4\n" in out
    assert "retry_errors: true\n" in out
    # Values are left alone.
    assert "model: m-1_a\n" in out
    assert "- i-j\n" in out


@pytest.mark.parametrize("flag", ["--no-retry-errors", "--no-retry_errors", "--no_retry_errors"])
def test_hyphens_and_underscores_are_the_same_in_negations(flag, csflow, tmp_path):
    (tmp_path / "nightly.yaml").write_text("model: m\ninput: i\noutput: o\nretry_errors: true\n")
    _, out, _ = csflow("score", "--config", tmp_path / "nightly.yaml", flag, "--print_config")
    assert "retry_errors: false\n" in out


def test_hyphens_and_underscores_are_the_same_in_yaml(csflow, tmp_path):
    config = tmp_path / "nightly.yaml"
    config.write_text("model: m\ninput: i\noutput: o\nbatch-size: 4\n")
    _, out, _ = csflow("score", "--config", config, "--print-config")
    assert "batch_size: 4\n" in out
    config.write_text("model: m\ninput: i\noutput: o\nbatch-size: 4\nbatch_size: 5\n")
    status, _, err = csflow("score", "--config", config, "--print-config")
    assert status == 2
    assert "names a setting twice" in err


@pytest.mark.parametrize("flag", ["--print_completion", "--print-completion"])
def test_hyphens_and_underscores_are_the_same_without_a_command(flag, csflow):
    assert csflow(flag, "no-shell")[0] == 2
    assert "invalid choice: 'no-shell'" in csflow(flag, "no-shell")[2]


@pytest.mark.skipif("import" not in VERBS, reason="csflow.importing.job is missing")
def test_bash_completes_commands_settings_and_choices(csflow, tmp_path):
    status, script, _ = csflow("--print_completion", "bash")
    assert status == 0
    (tmp_path / "csflow.bash").write_text(script)

    def complete(*words: str) -> set[str]:
        line = " ".join(f'"{word}"' for word in words)
        code = f"source {tmp_path}/csflow.bash; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; "
        function = next(w for w in script.split() if w.startswith("_shtab") and w.endswith("csflow()"))[:-2]
        done = subprocess.run(
            ["bash", "-c", f'{code} {function}; echo "${{COMPREPLY[@]}}"'],
            capture_output=True,
            text=True,
            check=True,
        )
        return set(done.stdout.split())

    assert complete("csflow", "ev") == {"evaluate"}
    assert complete("csflow", "score", "--ma") == {"--maps", "--max_error_rate", "--max_pixels"}
    assert complete("csflow", "score", "--maps", "") == {"native", "none"}


def test_inspect_shows_models_rows_dates_and_errors_of_an_output(csflow, tmp_path):
    status, out, _ = csflow("inspect", write_output(tmp_path / "out"))
    assert status == 0
    first, second = out.split("model_id")[1:]
    assert OLD_MODEL in first
    assert "488 images in 21 files; 21 dates, 2026-11-02 to 2026-11-22" in first
    assert "24 rows in 8 files; 8 dates, 2026-11-03 to 2026-11-20" in first
    assert NEW_MODEL in second
    assert "164 images in 7 files" in second


def test_inspect_tells_of_the_last_run_and_whether_it_ended(csflow, tmp_path):
    output = write_output(tmp_path / "out", range(1))
    counts = {"listed": 1300, "scored_in_this_run": 1290, "permanent_errors": 6, "missing": 4}
    run_id = "20261102T020000000000Z-aaaaaaaa"
    write_record(output, run_id, status="incomplete", exit_status=3, counts=counts)
    _, out, _ = csflow("inspect", output)
    assert "incomplete (exit status 3), ended 2026-11-02T02:10:00Z" in out
    assert "1,300 listed, 1,290 scored by this run, 6 permanent errors, 4 missing" in out
    assert "12.5% of p-values below 0.05" in out
    run_id = "20261103T020000000000Z-bbbbbbbb"
    (output / "_runs" / run_id / "listing").mkdir(parents=True)
    _, out, _ = csflow("inspect", output)
    assert run_id in out
    assert "at work or was cut off" in out and "progress" not in out
    times = {
        "started_at": datetime(2026, 11, 3, 2, tzinfo=UTC),
        "updated_at": datetime(2026, 11, 3, 3, tzinfo=UTC),
    }
    Progress(run_id=run_id, step="score", done=30, of=4000, **times).write(Location(str(output)))
    _, out, _ = csflow("inspect", output)
    assert "progress     score, 30 of 4,000 shards, last at 2026-11-03T03:00:00Z" in out


def test_inspect_tells_of_a_run_that_was_cut_off_before_it_scored(csflow, tmp_path):
    (tmp_path / "_runs" / "20261103T020000000000Z-bbbbbbbb" / "listing").mkdir(parents=True)
    status, out, _ = csflow("inspect", tmp_path)
    assert status == 0
    assert "at work or was cut off; the same command continues" in out


def test_inspect_reads_an_output_in_an_object_store(csflow, s3_bucket, tmp_path):
    local = write_output(tmp_path / "out", range(2))
    fsspec.filesystem("s3").put(f"{local}/", f"{s3_bucket}/out", recursive=True)
    status, out, _ = csflow("inspect", f"{s3_bucket}/out")
    assert status == 0
    assert "48 images in 2 files; 2 dates, 2026-11-02 to 2026-11-03" in out


def test_inspect_shows_what_a_model_is(csflow, tmp_path: Path):
    detector = Detector(
        Architecture("resnet10t", (64, 128), scales=2, hidden_channels=4, kernel_sizes=(3, 5))
    )
    rows = [
        {"image_uri": name, "image_version": name, "anomaly_score": score}
        for name, score in (("a", 0.5), ("b", 1.0), ("c", 1.5))
    ]
    calibration = pa.Table.from_pylist(rows, schema=CALIBRATION)
    training = {"input": ["good"], "epochs": 6}
    location = Location(str(tmp_path))
    data = {"calibration_folds": 3}
    model_id = save_model(location, detector, calibration, training=training, data=data, metrics={}, card={})
    status, out, _ = csflow("inspect", tmp_path)
    assert status == 0
    assert model_id in out
    assert "resnet10t, maps of " in out
    assert "64 x 128 pixels (stretch, bilinear), 2 scales" in out
    assert "2 coupling blocks of 4 hidden channels" in out
    assert "3 held-out images (in turn), smallest p-value 0.25" in out
    assert "6 epochs on good" in out
