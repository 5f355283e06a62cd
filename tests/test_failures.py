"""What happens at night: two runs at once, workers that die, a store that fails now and then."""

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import faulty_s3
import pytest
from conftest import ROOT, copy_some, names, read_errors, read_scores, run_score, wait_for

from csflow.errors import ExitStatus


def start_job(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "jobs" / "score.py"), *map(str, arguments)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.soak
def test_two_runs_over_one_output_score_each_image_once(model, cells, ray_cluster, tmp_path):
    images, output = copy_some(cells / "functional" / "test", tmp_path / "images", 120), tmp_path / "output"
    arguments = ["--model", model, "--input", images, "--output", output]
    # Each starts a Ray of its own, as two schedulers' machines would.
    jobs = [start_job(*arguments, RAY_ADDRESS="local") for _ in range(2)]
    printed = [job.communicate(timeout=300)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], printed
    assert names(read_scores(output)) == Counter(path.name for path in images.iterdir())
    assert len(list(output.glob("_plans/*/*.json"))) == 1
    runs = [json.loads(path.read_text()) for path in output.glob("_runs/*/run.json")]
    assert len(runs) == 2
    assert sum(record["counts"]["scored_in_this_run"] for record in runs) == 120


def scoring_workers() -> list[int]:
    """Process ids of the actors that score."""
    pids = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue  # it has just ended
            if b"ShardScorer" in command:
                pids.append(int(folder.name))
    return pids


def test_a_killed_worker_costs_no_image(model, cells, tmp_path):
    images, output = cells / "functional" / "test", tmp_path / "output"
    job = start_job("--model", model, "--input", images, "--output", output)
    wait_for(lambda: len(list(output.glob("scores/*/*/part-*.parquet"))) >= 2, job)
    victims = scoring_workers()
    assert victims
    os.kill(victims[0], signal.SIGKILL)
    printed = job.communicate(timeout=300)[0]
    assert job.returncode == 0, printed
    assert names(read_scores(output)) == Counter(path.name for path in images.iterdir())


@pytest.fixture
def faulty_store() -> Iterator[faulty_s3.FaultyS3]:
    store = faulty_s3.FaultyS3()
    yield store
    store.stop()


def test_a_store_that_fails_now_and_then_costs_no_image(model, cells, faulty_store, tmp_path):
    photographs = sorted((cells / "functional" / "test").iterdir())[:60]
    for path in photographs:
        faulty_store.put(f"night/{path.name}", path.read_bytes())
    generator = random.Random(0)
    faults = ["slow down", "broken", "cut", "reset", "too many"]
    # One request in five fails.
    faulty_store.faults.extend(
        generator.choice(faults) if generator.random() < 0.2 else "none" for _ in range(2000)
    )
    arguments = [
        "--model",
        model,
        "--input",
        f"s3://{faulty_s3.BUCKET}/night",
        "--output",
        tmp_path / "output",
    ]
    options = json.dumps(faulty_store.options)
    assert run_score(*arguments, "--storage_options", options) == ExitStatus.DONE
    assert names(read_scores(tmp_path / "output")) == Counter(path.name for path in photographs)
    assert not (tmp_path / "output" / "errors").exists()
    assert len(faulty_store.requests) > 60
    # No secret is written down.
    for path in (tmp_path / "output").rglob("*.json"):
        assert faulty_store.options["secret"] not in path.read_text()


def test_a_store_that_refuses_for_good_leaves_errors_that_the_next_run_tries_again(
    model, cells, faulty_store, tmp_path
):
    photographs = sorted((cells / "functional" / "test").iterdir())[:8]
    for path in photographs:
        faulty_store.put(f"night/{path.name}", path.read_bytes())
    output = tmp_path / "output"
    arguments = ["--model", model, "--input", f"s3://{faulty_s3.BUCKET}/night", "--output", output]
    arguments += ["--storage_options", json.dumps(faulty_store.options), "--max_error_rate", 1]
    # The listing goes through, then three reads are refused.
    listing_requests = count_requests(faulty_store, lambda: run_score(*arguments, "--limit", 1))
    faulty_store.faults.extend(["none"] * (listing_requests - 1) + ["denied"] * 3)
    assert run_score(*arguments) == ExitStatus.INCOMPLETE
    errors = read_errors(output)
    assert errors.error_code.tolist() == ["permission_denied"] * 3
    assert errors.is_transient.all()
    assert run_score(*arguments) == ExitStatus.DONE
    assert names(read_scores(output)) == Counter(path.name for path in photographs)


def count_requests(store: faulty_s3.FaultyS3, action) -> int:
    store.requests.clear()
    assert action() == ExitStatus.DONE
    return len(store.requests)
