"""What happens at night, in short: killed processes, failing stores, full disks, hostile files.

Every run is compared with a plain loop over the same images. The long and random ones are in test_soak.py.
"""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import bad_images
import faulty_s3
import pytest
from conftest import copy_some, free_port, read_errors, read_scores, run_score, wait_for
from plain_loop import contents
from processes import helping_workers, score_in_a_process, scoring_workers, start_job

from csflow.errors import ErrorCode, ExitStatus
from csflow.exit import run_job
from csflow.scoring.config import ScoreConfig
from csflow.scoring.job import score

WORKER_MEMORY_BOUND = 2_000_000_000
"""Bytes that a worker may take at its peak, whatever files it meets; 0.7 GB of them are libraries."""


@pytest.fixture
def store() -> Iterator[faulty_s3.FaultyS3]:
    started = faulty_s3.FaultyS3()
    # A hanging request is given up after two seconds in place of fifteen.
    started.options["config_kwargs"] = {"read_timeout": 2}
    yield started
    started.stop()


@pytest.fixture
def night(cells: Path, store: faulty_s3.FaultyS3) -> dict[str, bytes]:
    """72 photographs in the store, by URI: three shards."""
    photographs = sorted((cells / "functional" / "test").iterdir())[:72]
    return {store.put(f"night/{path.name}", path.read_bytes()): path.read_bytes() for path in photographs}


def from_store(model: Path, store: faulty_s3.FaultyS3, output: object) -> list[object]:
    """Arguments of a run over the night's photographs."""
    options = json.dumps(store.options)
    return ["--model", model, "--input", NIGHT, "--output", output, "--storage_options", options]


NIGHT = f"s3://{faulty_s3.BUCKET}/night"
STORED_OUTPUT = f"s3://{faulty_s3.BUCKET}/scores-of-the-night"


# --- Processes that die ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "decode", [[], pytest.param(["--decode", "cluster", "--workers", "1"], marks=pytest.mark.soak)]
)
def test_a_killed_worker_costs_no_image(model, cells, plain_loop, tmp_path, decode):
    images, output = copy_some(cells / "functional" / "test", tmp_path / "images", 120), tmp_path / "output"
    job = start_job("--model", model, "--input", images, "--output", output, *decode)
    wait_for(lambda: len(list(output.glob("scores/*/*/part-*.parquet"))) >= 2, job)
    victims = scoring_workers()
    assert victims
    os.kill(victims[0], signal.SIGKILL)
    printed = job.communicate(timeout=300)[0]
    assert job.returncode == 0, printed
    plain_loop.assert_same(read_scores(output), contents(images))


def test_killed_helpers_cost_no_image(model, cells, plain_loop, tmp_path, run_record):
    images, output = copy_some(cells / "functional" / "test", tmp_path / "images", 500), tmp_path / "output"
    cluster = ["--decode", "cluster", "--workers", "1"]
    job = start_job("--model", model, "--input", images, "--output", output, *cluster)
    for _ in range(2):
        wait_for(helping_workers, job)
        for victim in helping_workers():
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
    printed = job.communicate(timeout=300)[0]
    assert job.returncode == 0, printed
    plain_loop.assert_same(read_scores(output), contents(images))
    record = run_record(output)
    assert record["images_helped"] > 0
    assert record["seconds_in_workers"].keys() >= {"helped_read", "helped_decode", "wait", "score"}
    assert f"{record['images_helped'] / 500:.0%} on other CPUs" in printed


def test_drivers_killed_while_they_list_and_plan_leave_nothing_in_the_way(model, cells, plain_loop, tmp_path):
    images, output = copy_some(cells / "functional" / "test", tmp_path / "images", 40), tmp_path / "output"
    arguments = ["--model", model, "--input", images, "--output", output]
    for trace in ("_runs/*/listing", "_plans/*/*/part-*.parquet", "_plans/*/*.json"):
        job = start_job(*arguments)
        wait_for(lambda trace=trace: list(output.glob(trace)), job)
        job.kill()
        job.communicate()
        assert not list(output.glob("_runs/*/run.json"))
    assert run_score(*arguments) == ExitStatus.DONE
    plain_loop.assert_same(read_scores(output), contents(images))


# --- Stores that fail ------------------------------------------------------------------------------------


def test_a_store_that_fails_now_and_then_costs_no_image(model, night, store, plain_loop):
    # Reads, writes and listings: one request in five fails, in one of six ways.
    store.weather = faulty_s3.storm(share=0.2, seed=0)
    arguments = from_store(model, store, STORED_OUTPUT)
    statuses = [run_score(*arguments)]
    while statuses[-1] == ExitStatus.INCOMPLETE and len(statuses) < 4:
        statuses.append(run_score(*arguments))
    assert statuses[-1] == ExitStatus.DONE
    store.weather = faulty_s3.clear_sky
    plain_loop.assert_same(read_scores(STORED_OUTPUT, **store.options), night)
    # No secret is written down.
    for path in store.fs.find(STORED_OUTPUT):
        if path.endswith(".json"):
            assert store.options["secret"].encode() not in store.fs.cat_file(path)


@pytest.mark.soak
def test_refused_writes_end_the_run_and_the_next_one_completes_though_no_write_is_answered(
    model, night, store, plain_loop, capsys
):
    arguments = from_store(model, store, STORED_OUTPUT)

    def no_scores(method: str, path: str) -> str | None:
        return "denied" if method == "PUT" and "/scores/" in path else None

    store.weather = no_scores
    status, message = how_it_ends(capsys, *arguments)
    assert status == ExitStatus.FAILED
    assert "shards failed" in message
    assert "Access Denied" in message
    assert not [path for path in store.fs.find(STORED_OUTPUT) if "/scores/" in path]

    answered: set[str] = set()

    def first_answer_is_lost(method: str, path: str) -> str | None:
        if method != "PUT" or path in answered:
            return None
        answered.add(path)
        return "lost answer"

    store.weather = first_answer_is_lost
    assert run_score(*arguments) == ExitStatus.DONE
    assert any("/scores/" in path for path in answered)
    plain_loop.assert_same(read_scores(STORED_OUTPUT, **store.options), night)


@pytest.mark.soak
def test_a_store_that_refuses_for_good_leaves_errors_that_the_next_run_tries_again(
    model, night, store, plain_loop, tmp_path
):
    refused = set(sorted(night)[5:8])

    def some_are_refused(method: str, path: str) -> str | None:
        return "denied" if f"s3:/{path}" in refused and method == "GET" else None

    store.weather = some_are_refused
    arguments = from_store(model, store, tmp_path / "output")
    assert run_score(*arguments) == ExitStatus.INCOMPLETE
    errors = read_errors(tmp_path / "output")
    assert dict(zip(errors.image_uri, errors.error_code, strict=True)) == dict.fromkeys(
        refused, "permission_denied"
    )
    assert errors.is_transient.all()
    store.weather = faulty_s3.clear_sky
    assert run_score(*arguments) == ExitStatus.DONE
    plain_loop.assert_same(read_scores(tmp_path / "output"), night)


def test_objects_replaced_deleted_or_added_after_the_listing_are_settled_by_the_next_run(
    model, night, store, cells, plain_loop, tmp_path
):
    uris = sorted(night)
    replaced, deleted, added = uris[3:6], uris[20:22], f"{NIGHT}/new.png"
    defective = [path.read_bytes() for path in sorted((cells / "defective").iterdir())[:4]]
    now = {uri: data for uri, data in night.items() if uri not in deleted}
    now |= dict(zip([*replaced, added], defective, strict=True))

    def change_all(method: str, path: str) -> None:
        """Before the first image is read, and so after the listing is frozen."""
        if method == "GET" and f"s3:/{path}" in night:
            store.before = lambda method, path: None
            for uri in deleted:
                store.behind.delete_object(Bucket=faulty_s3.BUCKET, Key=f"night/{Path(uri).name}")
            for uri in (*replaced, added):
                key = f"night/{Path(uri).name}"
                store.behind.put_object(Bucket=faulty_s3.BUCKET, Key=key, Body=now[uri])

    store.before = change_all
    arguments = from_store(model, store, tmp_path / "output")
    assert run_score(*arguments) == ExitStatus.INCOMPLETE
    errors = read_errors(tmp_path / "output")
    assert dict(zip(errors.image_uri, errors.error_code, strict=True)) == (
        dict.fromkeys(replaced, "changed") | dict.fromkeys(deleted, "not_found")
    )
    unchanged = {uri: night[uri] for uri in uris if uri not in (*replaced, *deleted)}
    plain_loop.assert_same(read_scores(tmp_path / "output"), unchanged)

    assert run_score(*arguments) == ExitStatus.DONE
    plain_loop.assert_same(read_scores(tmp_path / "output"), now)


def test_a_store_that_stops_answering_ends_the_run_and_the_next_one_completes(
    model, night, store, plain_loop, tmp_path
):
    def reads_hang(method: str, path: str) -> str | None:
        return "hang" if method == "GET" and f"s3:/{path}" in night else None

    store.weather = reads_hang
    arguments = from_store(model, store, tmp_path / "output")
    # Its actors hang on: they end with the job's own cluster.
    status, printed = score_in_a_process(*arguments, "--stall_timeout", 5, RAY_ADDRESS="local")
    assert status == ExitStatus.INCOMPLETE, printed
    assert "stalled: no shard finished for 5 s, 3 are still waited for" in printed
    assert "INCOMPLETE: 72 images are missing" in printed
    store.weather = faulty_s3.clear_sky
    assert run_score(*arguments) == ExitStatus.DONE
    plain_loop.assert_same(read_scores(tmp_path / "output"), night)


# --- Disks that are full ---------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 120 kB: room for the listing, the plan and some of the scores."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=120k", "csflow-test", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.soak
def test_a_full_disk_ends_the_run_and_with_more_space_the_next_one_completes(
    model, cells, plain_loop, small_disk, tmp_path, capsys
):
    images = copy_some(cells / "functional" / "test", tmp_path / "images", 150)
    output = small_disk / "output"
    arguments = ["--model", model, "--input", images, "--output", output]
    status, message = how_it_ends(capsys, *arguments)
    assert status == ExitStatus.INCOMPLETE
    assert "No space left on device" in message
    # Whatever is visible is whole.
    before = read_scores(output)
    assert 0 < len(before) < 150
    assert not before.duplicated("image_uri").any()

    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    assert run_score(*arguments) == ExitStatus.DONE
    plain_loop.assert_same(read_scores(output), contents(images))


# --- Files that are no photographs -----------------------------------------------------------------------


def test_every_bad_file_is_accounted_for_once(model, plain_loop, tmp_path, run_record):
    images, broken = bad_images.write_corpus(tmp_path / "images")
    assert len(images) + len(broken) >= 300
    output = tmp_path / "output"
    arguments = ["--model", model, "--input", tmp_path / "images", "--output", output]
    # More than half of what comes fails: the run stops early, unless it is told not to mind.
    assert run_score(*arguments) == ExitStatus.INCOMPLETE
    assert run_record(output)["counts"]["missing"] > 0
    assert run_score(*arguments, "--max_error_rate", 1) == ExitStatus.DONE

    plain_loop.assert_same(read_scores(output), images)
    outcomes = {uri: plain_loop.outcome(data) for uri, data in images.items()}
    expected = broken | {uri: code for uri, code in outcomes.items() if isinstance(code, ErrorCode)}
    errors = read_errors(output)
    assert Counter(errors.image_uri) == Counter(list(expected))
    assert dict(zip(errors.image_uri, errors.error_code, strict=True)) == expected
    assert not errors.is_transient.any()
    counts = run_record(output)["counts"]
    assert counts["listed"] == len(images) + len(broken) == counts["scored"] + counts["permanent_errors"]
    assert run_record(output)["peak_memory_bytes"]["worker"] < WORKER_MEMORY_BOUND


# --- What stops a run at once ----------------------------------------------------------------------------


def how_it_ends(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit status of the job in this process, and what it said."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["score.py", *map(str, arguments)])
        run_job(ScoreConfig, score, None)
    printed = capsys.readouterr()
    errors = printed.err.strip().splitlines()
    assert len([line for line in errors if line.startswith("error: ")]) <= 1
    return int(str(ended.value.code)), printed.out + printed.err


def refused(method: str, path: str) -> str | None:
    return "denied"


@pytest.mark.parametrize(
    ("inputs", "output", "weather", "message"),
    [
        ("s3://no-such-bucket/night", "here", faulty_s3.clear_sky, "bucket no-such-bucket does not exist"),
        (NIGHT, "s3://no-such-bucket/scores", faulty_s3.clear_sky, "specified bucket does not exist"),
        (NIGHT, "here", refused, "access denied"),
        (NIGHT, STORED_OUTPUT, refused, "cannot be written to"),
    ],
)
def test_wrong_buckets_and_credentials_stop_the_run_at_once_with_one_line(
    inputs, output, weather, message, model, night, store, tmp_path, capsys
):
    store.weather = weather
    output = tmp_path / "output" if output == "here" else output
    arguments = ["--model", model, "--input", inputs, "--output", output]
    status, printed = how_it_ends(capsys, *arguments, "--storage_options", json.dumps(store.options))
    assert status == ExitStatus.WRONG_USE
    assert message in printed
    assert len(printed.splitlines()) == 1
    assert len([request for request in store.requests if "/night" in request]) < 20


def test_a_store_that_is_not_there_stops_the_run_with_one_line(model, night, store, capsys, tmp_path):
    options = store.options | {"endpoint_url": f"http://127.0.0.1:{free_port()}"}
    options["config_kwargs"] = {"retries": {"total_max_attempts": 1}}
    arguments = ["--model", model, "--input", NIGHT, "--output", STORED_OUTPUT]
    status, printed = how_it_ends(capsys, *arguments, "--storage_options", json.dumps(options))
    assert status == ExitStatus.WRONG_USE
    assert len(printed.splitlines()) == 1
    assert options["endpoint_url"] in printed
