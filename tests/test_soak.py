"""What happens at night, at length: many random failures in a run, dead nodes, two schedulers at once.

`python -m pytest -m soak tests/test_soak.py`, some minutes. Seeds are fixed. Every run is compared with a
plain loop over the same images.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import bad_images
import faulty_s3
import fsspec
import pytest
from conftest import SMALL_MODEL, read_errors, read_scores, run_score, wait_for
from plain_loop import contents
from processes import score_in_a_process, start_job, workers
from ray.cluster_utils import Cluster

from csflow.errors import ExitStatus

pytestmark = pytest.mark.soak

KILLS = 10


SHAPES = {"beside": ["--decode", "beside"], "cluster": ["--decode", "cluster", "--workers", "1"]}
"""Where images are read and decoded: by the actors that score, or by helpers, too."""


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> list[str]:
    return SHAPES[request.param]


@pytest.fixture(scope="module")
def photographs(cells: Path) -> list[Path]:
    return sorted((cells / "functional" / "test").iterdir())


def assert_nothing_half_visible(output: Path) -> None:
    """Every file that a reader would take for scores is whole, and no image is in two."""
    if list(output.glob("scores/*/*/*.parquet")):
        assert not read_scores(output).duplicated(["image_uri", "image_version"]).any()


def test_drivers_killed_at_ten_random_moments(model, photographs, plain_loop, tmp_path, shape):
    images, output = tmp_path / "images", tmp_path / "output"
    images.mkdir()
    arguments = ["--model", model, "--input", images, "--output", output, *shape]
    share = len(photographs) // (KILLS + 1)
    generator = random.Random(0)
    moments = []
    for kill in range(KILLS):
        # More images come every night, so that there is something to list, plan and score each time.
        for path in photographs[kill * share : (kill + 1) * share]:
            shutil.copy2(path, images / path.name)
        before = steps(output)
        # Within its first seconds, at its listing, at its plan, or after some of its shards.
        wanted = before + generator.randint(0, 5)
        job = start_job(*arguments)
        wait_for(lambda: steps(output) >= wanted, job)  # noqa: B023  # called within this turn
        with suppress(subprocess.TimeoutExpired):
            job.communicate(timeout=generator.uniform(0, 0.5))
        assert job.returncode is None, "it was to be killed"
        job.kill()
        job.communicate()
        moments.append(steps(output) - before)
        assert_nothing_half_visible(output)
    print(f"killed after so many steps: {moments}")
    assert max(moments) >= 3, "none was killed while it scored"
    for path in photographs[KILLS * share :]:
        shutil.copy2(path, images / path.name)
    assert run_score(*arguments) == ExitStatus.DONE
    plain_loop.assert_same(read_scores(output), contents(images))


def steps(output: Path) -> int:
    """How much all runs together have got done: frozen listings, plans, finished shards."""
    done = ["_runs/*/listing/part-*.parquet", "_plans/*/*.json", "scores/*/*/part-*.parquet"]
    return sum(len(list(output.glob(pattern))) for pattern in done)


def test_workers_and_actors_killed_at_random_moments(
    model, photographs, plain_loop, tmp_path, ray_cluster, shape
):
    images, output = photographs[0].parent, tmp_path / "output"
    generator = random.Random(1)
    arguments = ["--model", model, "--input", images, "--output", output, *shape]
    job = start_job(*arguments)
    wait_for(lambda: list(output.glob("scores/*/*/part-*.parquet")), job)
    killed = 0
    while killed < 8 and job.poll() is None:
        if victims := workers():
            os.kill(generator.choice(victims), signal.SIGKILL)
            killed += 1
        try:
            job.wait(generator.uniform(0.2, 3))
        except subprocess.TimeoutExpired:
            assert_nothing_half_visible(output)
    printed = job.communicate(timeout=400)[0]
    assert job.returncode in (ExitStatus.DONE, ExitStatus.INCOMPLETE), printed
    assert killed >= 3
    assert run_score(*arguments) == ExitStatus.DONE
    plain_loop.assert_same(read_scores(output), contents(images))


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """A cluster of its own: a head that computes nothing, and two nodes with a CPU each."""
    # A node that is gone is declared dead after two missed checks: seconds, in place of half a minute.
    health = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 1000,
        "health_check_timeout_ms": 1000,
        "health_check_failure_threshold": 2,
    }
    temporary = tempfile.mkdtemp(prefix="csflow-nodes-", dir="/tmp")
    head = {"num_cpus": 0, "temp_dir": temporary, "_system_config": health, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()
    shutil.rmtree(temporary, ignore_errors=True)


def test_a_node_lost_and_another_one_added(model, photographs, plain_loop, nodes, tmp_path, shape):
    images, output = photographs[0].parent, tmp_path / "output"
    arguments = ["--model", model, "--input", images, "--output", output, *shape]
    job = start_job(*arguments, RAY_ADDRESS=nodes.address)
    wait_for(lambda: len(list(output.glob("scores/*/*/part-*.parquet"))) >= 2, job)
    nodes.remove_node(min(nodes.worker_nodes, key=lambda node: node.node_id), allow_graceful=False)
    at_the_loss = len(list(output.glob("scores/*/*/part-*.parquet")))
    nodes.add_node(num_cpus=1)
    printed = job.communicate(timeout=400)[0]
    assert job.returncode == ExitStatus.DONE, printed
    assert at_the_loss < len(list(output.glob("scores/*/*/part-*.parquet")))
    plain_loop.assert_same(read_scores(output), contents(images))


def test_nodes_that_leave_and_join_every_fifteen_seconds_for_five_minutes(
    model, photographs, plain_loop, nodes, tmp_path, shape
):
    images, output = tmp_path / "images", tmp_path / "output"
    for copy in range(24):
        folder = images / str(copy)
        folder.mkdir(parents=True)
        for path in photographs:
            os.link(path, folder / path.name)
    arguments = ["--model", model, "--input", images, "--output", output, *shape]
    generator, statuses = random.Random(2), []
    ends = time.monotonic() + 300
    job = start_job(*arguments, RAY_ADDRESS=nodes.address)
    while time.monotonic() < ends and ExitStatus.DONE not in statuses:
        with suppress(subprocess.TimeoutExpired):
            printed = job.communicate(timeout=15)[0]
            statuses.append(job.returncode)
            assert job.returncode in (ExitStatus.DONE, ExitStatus.INCOMPLETE), printed
            job = start_job(*arguments, RAY_ADDRESS=nodes.address)
        assert_nothing_half_visible(output)
        # Every other time without a notice.
        lost = generator.choice(sorted(nodes.worker_nodes, key=lambda node: node.node_id))
        nodes.remove_node(lost, allow_graceful=generator.random() < 0.5)
        nodes.add_node(num_cpus=1)
    job.communicate(timeout=900)
    print(f"runs that ended meanwhile: {statuses}")
    assert run_score(*arguments) == ExitStatus.DONE
    plain_loop.assert_same(read_scores(output), contents(images))


def test_training_goes_on_with_fewer_workers_after_a_node_is_lost(good_cells, nodes, tmp_path):
    arguments = ["--input", good_cells, *SMALL_MODEL, "--epochs", 30, "--patience", 30, "--workers", 2]
    # Differences of rounding grow from step to step; these settings keep them small.
    arguments += ["--precision", "float32", "--learning_rate", "2e-4"]
    arguments += ["--checkpoint_epochs", 2, "--work_dir", tmp_path / "work", "--overwrite"]
    arguments += ["--output", tmp_path / "model"]
    losses = []
    for loses_a_node in (True, False):
        flags = ["--min_workers", 1] if loses_a_node else []
        job = start_job(*arguments, *flags, job="train", RAY_ADDRESS=nodes.address)
        if loses_a_node:
            snapshots = tmp_path / "work" / "training"
            wait_for(lambda: list(snapshots.glob("*/checkpoint_*")), job)  # noqa: B023
            nodes.remove_node(min(nodes.worker_nodes, key=lambda node: node.node_id), allow_graceful=False)
        printed = job.communicate(timeout=400)[0]
        assert job.returncode == ExitStatus.DONE, printed
        history = json.loads((tmp_path / "model" / "metrics.json").read_text())["history"]
        losses.append([line["loss"] for line in history])
        if loses_a_node:
            nodes.add_node(num_cpus=1)
    assert len(losses[1]) == 30
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_two_runs_over_one_output(kind, model, photographs, plain_loop, s3_bucket, tmp_path):
    images = contents(photographs[0].parent)
    source: object = photographs[0].parent
    output: Path | str = tmp_path / "output"
    if kind == "s3":
        source, output = f"{s3_bucket}/night", f"{s3_bucket}/scores"
        images = {f"{source}/{Path(uri).name}": data for uri, data in images.items()}
        fsspec.filesystem("s3").pipe(images)
    arguments = ["--model", model, "--input", source, "--output", output]
    # Each starts a Ray of its own, as two schedulers' machines would.
    jobs = [start_job(*arguments, RAY_ADDRESS="local") for _ in range(2)]
    printed = [job.communicate(timeout=500)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [ExitStatus.DONE, ExitStatus.DONE], printed
    plain_loop.assert_same(read_scores(output), images)
    remote, root = fsspec.core.url_to_fs(str(output))
    records = [json.loads(remote.cat_file(path)) for path in remote.find(root) if path.endswith("run.json")]
    assert len(records) == 2
    assert sum(record["counts"]["scored_in_this_run"] for record in records) == len(images)


@pytest.fixture
def store() -> Iterator[faulty_s3.FaultyS3]:
    started = faulty_s3.FaultyS3()
    started.options["config_kwargs"] = {"read_timeout": 3}
    yield started
    started.stop()


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
def test_a_store_that_fails_in_every_way(share, model, photographs, plain_loop, store, shape):
    images = {store.put(f"night/{path.name}", path.read_bytes()): path.read_bytes() for path in photographs}
    store.weather = faulty_s3.storm(share, seed=round(100 * share))
    output = f"s3://{faulty_s3.BUCKET}/scores"
    arguments = ["--model", model, "--input", f"s3://{faulty_s3.BUCKET}/night", "--output", output]
    arguments += ["--storage_options", json.dumps(store.options), *shape]
    runs = []
    while (status := run_score(*arguments)) == ExitStatus.INCOMPLETE and len(runs) < 6:
        runs.append(status)
    assert status == ExitStatus.DONE
    requests = Counter(request.partition(" ")[0] for request in store.requests)
    print(f"{share:.0%} of {dict(requests)} failed; {len(runs) + 1} runs")
    store.weather = faulty_s3.clear_sky
    plain_loop.assert_same(read_scores(output, **store.options), images)


def test_an_output_that_stops_answering_ends_the_run(model, photographs, plain_loop, store, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for path in photographs[:100]:
        shutil.copy2(path, images / path.name)
    output = f"s3://{faulty_s3.BUCKET}/scores"
    # botocore's retries inside those of s3fs would take two minutes to give an operation up.
    store.options["config_kwargs"]["retries"] = {"total_max_attempts": 1}
    arguments = ["--model", model, "--input", images, "--output", output]
    arguments += ["--storage_options", json.dumps(store.options)]

    def before(method: str, path: str) -> None:
        """After two shards the store never answers again."""
        if "/scores/" in path and method == "PUT":
            published.add(path)
        if len(published) > 2:
            store.weather = lambda method, path: "hang"

    published: set[str] = set()
    store.before = before
    status, printed = score_in_a_process(*arguments, "--stall_timeout", 20, RAY_ADDRESS="local")
    assert status == ExitStatus.INCOMPLETE, printed
    assert f"error: {output}/" in printed.splitlines()[-1], printed
    assert "Traceback" not in printed
    store.before, store.weather = lambda method, path: None, faulty_s3.clear_sky
    assert run_score(*arguments) == ExitStatus.DONE
    plain_loop.assert_same(read_scores(output, **store.options), contents(images))


def test_an_input_that_hangs_while_it_is_listed_ends_the_run(model, store, tmp_path):
    store.weather = lambda method, path: "hang"
    source = f"s3://{faulty_s3.BUCKET}/night"
    arguments = ["--model", model, "--input", source, "--output", tmp_path / "output"]
    status, printed = score_in_a_process(*arguments, "--storage_options", json.dumps(store.options))
    assert status == ExitStatus.INCOMPLETE
    assert printed.splitlines() == [f"error: {source} cannot be listed: no answer in time (ReadTimeoutError)"]


def test_every_kind_of_damage_is_accounted_for_once(model, plain_loop, tmp_path, run_record, shape):
    images = bad_images.write_all_damage(tmp_path / "images")
    arguments = ["--model", model, "--input", tmp_path / "images", "--output", tmp_path / "output", *shape]
    assert run_score(*arguments, "--max_error_rate", 1) == ExitStatus.DONE
    plain_loop.assert_same(read_scores(tmp_path / "output"), images)
    errors = read_errors(tmp_path / "output")
    assert len(errors) == errors.image_uri.nunique()
    assert set(errors.image_uri) | set(read_scores(tmp_path / "output").image_uri) == set(images)
    print(f"peak {run_record(tmp_path / 'output')['peak_memory_bytes']}")
