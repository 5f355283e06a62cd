"""What benchmarks of whole jobs work on: models, photographs in an S3 server, CPU seconds of processes.

The photographs are those of the package elpv-dataset, as they are (PNG, 300 x 300 pixels). The S3 server is
`rclone serve s3`, which takes a quarter of the processor time that moto takes for an object: what it takes is
lacking to the job on the same cores. The weights are random: they decide nothing about speed.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import torch
from botocore.exceptions import BotoCoreError

from csflow.demo import photographs
from csflow.model import Architecture, Detector
from csflow.model_directory import CALIBRATION, save_model
from csflow.storage import Location

ROOT = Path(__file__).parent.parent
BUCKET = "plant"
SETTINGS = {
    "light": Architecture("tf_efficientnet_lite0", (256, 256), hidden_channels=256, kernel_sizes=(3,)),
    "paper": Architecture("tf_efficientnet_b5", (256, 256), hidden_channels=1024, kernel_sizes=(3, 3, 3, 5)),
}
"""Training's defaults, and the paper's settings at 256 px."""


def write_model(folder: Path, architecture: Architecture, seed: int = 0) -> Path:
    """A model directory with random weights; γ is not 0, at which a flow would have nothing to compute.

    All seeds have the same backbone, as trained models of a plant have.
    """
    torch.manual_seed(0)
    detector = Detector(architecture)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in detector.flow.named_parameters():
            if "gamma" in name:
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    pixels_BHWC = torch.randint(0, 256, (1, *architecture.image_size, 3), dtype=torch.uint8)
    detector.measure_rounding(pixels_BHWC)
    rows = [
        {"image_uri": f"{i}.png", "image_version": "1", "anomaly_score": 0.5 + i / 400} for i in range(200)
    ]
    calibration = pa.Table.from_pylist(rows, schema=CALIBRATION)
    nothing: dict[str, Any] = {}
    save_model(
        Location(str(folder)), detector, calibration, training=nothing, data=nothing, metrics=nothing, card={}
    )
    return folder


@dataclass(frozen=True)
class S3Server:
    process: subprocess.Popen[bytes]
    bucket: Path
    """The folder that the server shows as its bucket."""

    def put_photographs(self, prefix: str, count: int) -> str:
        """Puts so many photographs, some of them more than once, below a prefix; returns its URL."""
        folder = self.bucket / prefix
        folder.mkdir(parents=True)
        sources = [path for path, _, _ in sorted(photographs())]
        for i in range(count):
            first = folder / f"{i % len(sources):06d}.png"
            if i < len(sources):
                shutil.copyfile(sources[i], first)
            else:
                os.link(first, folder / f"{i:06d}.png")
        return f"s3://{BUCKET}/{prefix}"


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Runs an S3 server with an empty bucket; the standard AWS variables point at it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    with tempfile.TemporaryDirectory(prefix="csflow-s3-") as folder:
        (Path(folder) / BUCKET).mkdir()
        rclone = Path(sys.executable).with_name("rclone")
        server = subprocess.Popen(
            [rclone, "serve", "s3", folder, "--addr", address, "--auth-key", "test,testtest"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.environ |= {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "testtest",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{address}",
        }
        try:
            while not _answers():
                if server.poll() is not None:
                    raise RuntimeError("the S3 server ended at once")
                time.sleep(0.1)
            yield S3Server(server, Path(folder) / BUCKET)
        finally:
            server.kill()
            server.wait()


def _answers() -> bool:
    try:
        boto3.client("s3").head_bucket(Bucket=BUCKET)
    except BotoCoreError:
        return False
    return True


@dataclass(frozen=True)
class Run:
    """How a command went."""

    seconds: float
    """Of the whole command."""
    cpu_seconds: dict[str, float]
    """Of all its processes, by kind, and of the S3 server meanwhile."""
    output: str


def run(command: Sequence[str], server: S3Server, root: Path = ROOT) -> Run:
    """Runs a command of a source tree with the processor time of all its processes accounted for; raises if
    it fails."""
    before = cpu_seconds_of(server.process.pid)
    started = time.perf_counter()
    environment = os.environ | {"RAY_ADDRESS": "local", "PYTHONPATH": str(root)}
    process = subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    spent: dict[int, tuple[str, float]] = {}
    watcher = threading.Thread(target=_watch, args=(process, spent))
    watcher.start()
    output = process.communicate()[0]
    seconds = time.perf_counter() - started
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output}")
    by_kind: dict[str, float] = defaultdict(float)
    for kind, value in spent.values():
        by_kind[kind] += value
    by_kind["S3 server"] = cpu_seconds_of(server.process.pid) - before
    return Run(seconds, dict(by_kind), output)


def _watch(process: subprocess.Popen[str], spent: dict[int, tuple[str, float]]) -> None:
    """Notes the processor time of a process and all that descend from it, until it ends."""
    while process.poll() is None:
        for pid in descendants(process.pid):
            try:
                kind = "driver" if pid == process.pid else _kind(pid)
                spent[pid] = (kind, cpu_seconds_of(pid))
            except (OSError, IndexError):
                continue  # it has just ended
        time.sleep(1)  # looking costs time, too


def descendants(root: int) -> set[int]:
    """Ids of a process and of all that it started, and those did."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
            except OSError:
                continue
            parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    found = {root}
    while new := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= new
    return found


def _kind(pid: int) -> str:
    command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    if "ScoringActor" in command:
        return "scoring workers"
    if any(
        name in command for name in ("raylet", "gcs_server", "dashboard", "log_monitor", "ray::", "agent")
    ):
        return "Ray"
    return "DataLoader workers"


def cpu_seconds_of(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def score_command(model: Path, images: str, output: Path | str, *arguments: str) -> list[str]:
    job = [sys.executable, "jobs/score.py", "--model", str(model), "--input", images]
    return [*job, "--output", str(output), *arguments]


def run_record(output: Path) -> dict[str, Any]:
    """The run.json of an output's only run."""
    (path,) = output.glob("_runs/*/run.json")
    return dict(json.loads(path.read_text()))


def steady_rate(scored_at: Sequence[float]) -> float:
    """Images per second over the middle half of the images: without start-up, uneven starts and end."""
    times = np.sort(np.asarray(scored_at))
    first, last = len(times) // 4, len(times) * 3 // 4
    return float((last - first) / (times[last] - times[first]))


def fresh(folder: Path) -> Path:
    """A path in a folder that no run has used."""
    return folder / secrets.token_hex(4)
