"""Real parts for every test: one Ray cluster a session, an S3 protocol server, solar-cell photographs."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Ray reads these when it is imported. A token is what protects a cluster by default.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
# Whoever runs the tests keeps none of their compiled models.
CACHE = tempfile.TemporaryDirectory(prefix="csflow-cache-")
os.environ["XDG_CACHE_HOME"] = CACHE.name

from csflow.threads import let_waiting_threads_sleep

let_waiting_threads_sleep()  # as commands do, before PyTorch is loaded

import boto3
import emulators
import fsspec
import pandas as pd
import pyarrow.dataset as ds
import pytest
import ray
from emulators import free_port
from plain_loop import PlainLoop

from csflow.config import parse
from csflow.demo import write_cells
from csflow.errors import ExitStatus
from csflow.scoring.config import ScoreConfig
from csflow.scoring.job import score

ROOT = Path(__file__).parent.parent
S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long runs may take half an hour each, where other tests have the `timeout` of pyproject.toml."""
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.timeout(1800))


def find_tool(name: str) -> str:
    """A checker beside Python, on the PATH, or fetched by `make tools`; without it the test is skipped."""
    path = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ["PATH"], str(ROOT / ".tools" / "bin")]
    )
    found = shutil.which(name, path=path)
    if found is None:
        pytest.skip(f"{name} is not installed; see `make tools`")
    return found


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Endpoint of an S3 protocol server; the standard AWS variables point at it for the whole session.

    Tests that name a bucket of their own create it with the `s3_bucket` fixture.
    """
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= S3_ENVIRONMENT | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    yield os.environ["AWS_ENDPOINT_URL"]
    server.stop()


@pytest.fixture(scope="session")
def localstack() -> Iterator[emulators.Emulator]:
    """A server that speaks S3's protocol and is not moto, with one bucket."""
    with emulators.localstack() as emulator:
        yield emulator


@pytest.fixture(scope="session")
def rclone() -> Iterator[emulators.Emulator]:
    """A server that speaks S3's protocol but for conditional writes, with one bucket."""
    with emulators.rclone() as emulator:
        yield emulator


@pytest.fixture(scope="session")
def google() -> Iterator[emulators.Emulator]:
    """A server that speaks Google Cloud Storage's protocol, with one bucket."""
    with emulators.google() as emulator:
        yield emulator


@pytest.fixture(scope="session")
def azure() -> Iterator[emulators.Emulator]:
    """A server that speaks Azure Blob Storage's protocol, with one container."""
    with emulators.azure() as emulator:
        yield emulator


@pytest.fixture
def s3_bucket(s3_endpoint: str) -> str:
    """URL of a new bucket."""
    name = f"plant-{secrets.token_hex(4)}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def ray_cluster(s3_endpoint: str) -> Iterator[dict[str, str]]:
    """A cluster as `ray start --head` makes it, with the job server; this process and all jobs join it.

    Yields the variables that name it to a client.
    """
    # The agent's own default would be that of another cluster on this machine, and no job could be submitted.
    port, dashboard_port, agent_port = free_port(), free_port(), free_port()
    temporary = tempfile.mkdtemp(prefix="csflow-ray-", dir="/tmp")
    ray_cli = str(Path(sys.executable).with_name("ray"))
    command = [ray_cli, "start", "--head", "--num-cpus=2", f"--port={port}", f"--temp-dir={temporary}"]
    command += [f"--dashboard-port={dashboard_port}", f"--dashboard-agent-listen-port={agent_port}"]
    command += ["--object-store-memory=500000000"]
    command += ["--disable-usage-stats", "--block"]
    # Submitted jobs find `python` through the head's PATH.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # With this process's standard error it would keep whoever reads that waiting, should this process crash.
    with (Path(temporary) / "stderr").open("w") as errors:
        streams = {"stdout": subprocess.PIPE, "stderr": errors}
        head = subprocess.Popen(command, start_new_session=True, text=True, cwd=ROOT, **streams)
    assert head.stdout is not None
    for line in head.stdout:
        if "--block" in line:
            break
    client = {
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard_port}",
    }
    os.environ |= client
    ray.init(logging_level="warning", log_to_driver=False)
    yield client
    ray.shutdown()
    # On SIGTERM it would wait half a minute for a drained node.
    os.killpg(head.pid, signal.SIGKILL)
    head.wait(timeout=60)
    shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture(scope="session")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's photographs: functional/train, functional/test, defective, uncertain, labels.csv."""
    folder = tmp_path_factory.mktemp("photographs") / "cells"
    write_cells(folder)
    return folder


def copy_some(source: Path, target: Path, count: int) -> Path:
    """The first photographs of a folder in a new one."""
    target.mkdir(parents=True)
    for path in sorted(source.iterdir())[:count]:
        shutil.copy2(path, target / path.name)
    return target


def run_job(verb: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`python jobs/<verb>.py …` as a user runs it."""
    command = [sys.executable, str(ROOT / "jobs" / f"{verb}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Polls while the process runs; fails if it ends first."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the job ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def run_score(*arguments: object) -> ExitStatus:
    """The scoring job in this process, on the session's cluster."""
    return score(parse(ScoreConfig, None, list(map(str, arguments))))


def read_scores(output: Path | str, **storage_options: object) -> pd.DataFrame:
    return _read_table(f"{output}/scores", storage_options)


def read_errors(output: Path | str, **storage_options: object) -> pd.DataFrame:
    return _read_table(f"{output}/errors", storage_options)


def _read_table(url: str, storage_options: dict[str, object]) -> pd.DataFrame:
    remote = storage_options | {"use_listings_cache": False} if "://" in url else {}
    fs, path = fsspec.core.url_to_fs(url, **remote)
    return ds.dataset(path, filesystem=fs, partitioning="hive").to_table().to_pandas()


def names(frame: pd.DataFrame) -> Counter[str]:
    return Counter(Path(uri).name for uri in frame.image_uri)


SHARD_ROW: dict[str, Any] = {
    "model_id": "0" * 16,
    "failure": None,
    "is_of_model": False,
    "loads": 0,
    "is_published": True,
    "images": 10,
    "helped": 0,
    "deep": 0,
    "range_used": 0.0,
    "scored": 10,
    "anomalous": 0,
    "p_values_below_5_percent": 0,
    "error_codes": [],
    "peak_memory_bytes": 0,
    "seconds": [],
    "cpu_seconds": [],
    "began_at": None,
    "first_scored_at": None,
    "form": "{}",
    "anomaly_scores": [],
    "global_scores": [],
    "groups": [],
}
"""What a scoring actor gives back of a shard of ten good images, apart from its name."""


SMALL_MODEL = ["--image_size", "128", "--hidden_channels", "16", "--epochs", "2", "--learning_rate", "1e-3"]
SMALL_MODEL += ["--precision", "float32"]  # roundings of bfloat16 depend on how a batch is divided
SMALL_MODEL += ["--calibration", "holdout"]  # five trainings fewer
"""Real weights, real photographs; only the flow is small."""


@pytest.fixture(scope="session")
def good_cells(cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 photographs of functional cells to train on."""
    return copy_some(cells / "functional" / "train", tmp_path_factory.mktemp("good") / "cells", 48)


@pytest.fixture(scope="session")
def trained(
    ray_cluster: dict[str, str], good_cells: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A model directory written by the training job, and how the job ended."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    return folder, run_job("train", "--input", good_cells, "--output", folder, *SMALL_MODEL)


@pytest.fixture(scope="session")
def model(trained: tuple[Path, subprocess.CompletedProcess[str]]) -> Path:
    folder, job = trained
    assert job.returncode == 0, job.stderr
    return folder


@pytest.fixture(scope="session")
def plain_loop(model: Path) -> PlainLoop:
    """Scores image by image what runs have scored in shards."""
    return PlainLoop(model)


@pytest.fixture
def run_record() -> Callable[[Path], dict[str, object]]:
    """Reads the run.json of an output's latest run."""
    return lambda output: json.loads(max(output.glob("_runs/*/run.json")).read_text())
