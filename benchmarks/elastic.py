"""How soon nodes that come are at work, and whether a pool that grew is as fast as one that was whole.

    python benchmarks/elastic.py

On simulated nodes of one CPU each, with scorers and decoders of fixed cost (`cluster.py`, `split.py`), a node
is added when a third of the images is scored. Without helpers (`beside`) it gets an actor that scores; with
them (`auto`) it helps a GPU of another node. The rate after that is compared with that of a cluster which had
the node from the beginning, over the same part of the images. Last, a job is started where there is no node
at all, and Ray's autoscaler has to start some.
"""

import argparse
import json
import operator
import os
import random
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import plant
import pyarrow.dataset as ds
import ray
import results
import split
from ray.cluster_utils import Cluster

import cluster
import csflow.scoring.pool

STEADY = slice(6, 9)
"""The rate is that between these tenths of the images, when the added node has long been at work."""
NODE = split.NODE
NOT_NEEDED = {
    "auth": {},
    "docker": {},
    "file_mounts": {},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
}
"""What an autoscaler's configuration has to state, also if its nodes are processes of this machine."""


@dataclass(frozen=True)
class Shape:
    """A cluster of one node that another one joins, and what works on it."""

    actor: type
    first: Mapping[str, int]
    arguments: Sequence[str]


SHAPES = {
    "beside": Shape(cluster.FixedCostActor, NODE, ["--decode", "beside"]),
    "auto": Shape(split.FixedCostActor, NODE | {"num_gpus": 1}, ["--decode", "auto"]),
}


def score(shape: Shape, arguments: Sequence[str], output: Path, joins_at: int) -> tuple[float, float]:
    """Runs the job on two nodes; the second joins when so many images are scored, or is there at once.

    Returns:
        The seconds from the second node's start to its first image, and the images a second of both.
    """
    joined_at = time.time()

    def join(nodes: Cluster) -> None:
        nonlocal joined_at
        while split.scored_images(output) < joins_at:
            time.sleep(0.1)
        joined_at = time.time()
        nodes.add_node(**NODE)

    csflow.scoring.pool.ScoringActor = shape.actor
    arguments = [*arguments, *shape.arguments]
    if joins_at:
        cluster.run_job([shape.first], arguments, output, join)
    else:
        cluster.run_job([shape.first, NODE], arguments, output)
    table = ds.dataset(output / "scores").to_table(columns=["image_height", "scored_at"]).sort_by("scored_at")
    times, processes = table["scored_at"].cast("int64").to_numpy() / 1e6, table["image_height"].to_numpy()
    first_of_second = times[processes != processes[0]].min()
    middle = times[len(times) * STEADY.start // 10 : len(times) * STEADY.stop // 10]
    return first_of_second - joined_at, (len(middle) - 1) / (middle[-1] - middle[0])


def from_nothing(arguments: Sequence[str], output: Path) -> float:
    """Runs the job where an autoscaler starts the nodes; seconds from the first node to the first shard."""
    came_at = 0.0

    def watch() -> None:
        nonlocal came_at
        while not ray.is_initialized() or not any(node["Resources"].get("CPU") for node in ray.nodes()):
            time.sleep(0.1)
        came_at = time.time()

    csflow.scoring.pool.ScoringActor = cluster.FixedCostActor
    with autoscaled() as address, ThreadPoolExecutor() as pool:
        watched = pool.submit(watch)
        # With a number of workers nothing is asked for but CPUs: such nodes cannot be given any memory.
        cluster.score_on(address, [*arguments, "--decode", "beside", "--workers", "2"], output)
        watched.result()
    return min(file.stat().st_mtime for file in output.glob("scores/*/*/part-*.parquet")) - came_at


@contextmanager
def autoscaled() -> Iterator[str]:
    """A head without CPUs, whose autoscaler starts at most two nodes of a CPU; its address."""
    # Below the ports that the kernel gives to whoever asks for any: it is a while until the head takes it.
    address = f"127.0.0.1:{random.randrange(20_000, 30_000)}"
    node_types = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {
            "resources": {"CPU": 1, "object_store_memory": 200 << 20},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 2,
        },
    }
    config = NOT_NEEDED | {
        "cluster_name": "elastic",
        "max_workers": 2,
        "provider": {"type": "fake_multinode", "gcs_address": address},
        "available_node_types": node_types,
        "head_node_type": "ray.head.default",
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
    }
    with tempfile.TemporaryDirectory(prefix="csflow-ray-", dir="/tmp") as folder:
        file = Path(folder) / "autoscaling.json"
        file.write_text(json.dumps(config))
        command = [Path(sys.executable).with_name("ray"), "start", "--head", "--num-cpus=0", "--block"]
        command += [f"--port={address.partition(':')[2]}", f"--temp-dir={folder}/ray"]
        command += [f"--autoscaling-config={file}", "--disable-usage-stats", "--include-dashboard=false"]
        mark = secrets.token_hex(16)
        variables = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "CSFLOW_CLUSTER": mark}
        with (Path(folder) / "printed").open("w") as printed:
            head = subprocess.Popen(command, env=os.environ | variables, stdout=printed, stderr=printed)
        try:
            yield address
        finally:
            for pid in processes_with(f"CSFLOW_CLUSTER={mark}"):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            head.wait()


def processes_with(variable: str) -> Iterator[int]:
    """Ids of the processes that have this `NAME=value` in their environment."""
    for folder in Path("/proc").iterdir():
        with suppress(OSError):  # it has just ended
            if folder.name.isdigit() and variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=9600)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = f"{plant.ROOT}{os.pathsep}{plant.ROOT / 'benchmarks'}"
    figures: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="csflow-elastic-") as name:
        folder = Path(name)
        arguments = cluster.blank_images(folder, options.images)
        for _ in range(options.rounds):
            for decode, shape in SHAPES.items():
                late, grown = score(shape, arguments, plant.fresh(folder), options.images // 3)
                _, whole = score(shape, arguments, plant.fresh(folder), 0)
                for figure, value in {"late": late, "grown": grown, "whole": whole}.items():
                    figures[f"{decode} {figure}"].append(value)
                print(
                    decode, f"{late:.1f} s, {grown:.1f} and {whole:.1f} images/s", file=sys.stderr, flush=True
                )
            figures["from nothing"].append(from_nothing([*arguments, "--limit", "640"], plant.fresh(folder)))
            print("from nothing", f"{figures['from nothing'][-1]:.1f} s", file=sys.stderr, flush=True)
    median = {name: statistics.median(values) for name, values in figures.items()}
    lines = [
        "| decode | s from added node to its first image | images/s after | both from the start | ratio |",
        "|---|---|---|---|---|",
    ]
    for decode in SHAPES:
        ratios = map(operator.truediv, figures[f"{decode} grown"], figures[f"{decode} whole"])
        cells = f"{median[f'{decode} late']:.1f} | {median[f'{decode} grown']:.1f}"
        cells += f" | {median[f'{decode} whole']:.1f} | {statistics.median(ratios):.3f}"
        lines.append(f"| {decode} | {cells} |")
    lines += [
        "",
        f"From the first node of an autoscaler to the first shard: {median['from nothing']:.1f} s. "
        f"{options.images} images, medians of {options.rounds} rounds.",
    ]
    command = f"python benchmarks/elastic.py --images {options.images} --rounds {options.rounds}"
    results.record("Nodes that join a run", "\n".join(lines), command)


if __name__ == "__main__":
    main()
