"""Whether images that helpers send keep within Ray's object stores: 10,000 JPEGs of 768 px for one GPU.

    python benchmarks/store.py

A job on simulated nodes (`cluster.py`): one with a CPU and a GPU, and CPU nodes whose helpers read and decode
for it. The images are real ones, each under many names. A forward pass sleeps for a fixed time, which is
longer than decoding takes, so that images pile up as far as they are let. What every node's store holds is
asked for ten times a second.
"""

import argparse
import os
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import plant
import results
from PIL import Image
from ray._private.internal_api import node_stats
from ray.cluster_utils import Cluster

import cluster
import csflow.scoring.pool
from csflow.cluster import WorkerResources
from csflow.demo import photographs
from csflow.model import Architecture
from csflow.scoring.config import ScoringSettings
from csflow.scoring.kept_models import KeptModels
from csflow.scoring.scorer import ShardScorer, WorkerProcess

SIDE = 768
MODEL = Architecture("tf_efficientnet_lite0", (SIDE, SIDE), hidden_channels=16, kernel_sizes=(3,))
PHOTOGRAPHS = 50


class FixedCostScorer(ShardScorer):
    """A scorer on a GPU that sleeps, with the loader and the helpers that a GPU has."""

    def __init__(self, settings: ScoringSettings, resources: WorkerResources, *_: object) -> None:
        super().__init__(settings, resources, WorkerProcess(replace(resources, gpus=0)))
        seconds = float(os.environ["CSFLOW_SECONDS_PER_IMAGE"])
        self._detector: Any = cluster.FixedCostDetector(self._detector.form, seconds)


class FixedCostActor(KeptModels):
    scorer = FixedCostScorer


class Stores:
    """The peaks of what the nodes' object stores hold during a run."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self.peaks: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        """By node, then by the name of the figure in Ray's statistics."""

    def watch(self, nodes: Cluster) -> None:
        """Looks until the run has written its record."""
        while not list(self._output.glob("_runs/*/run.json")):
            for number, node in enumerate(nodes.list_all_nodes()):
                address, port = node.node_ip_address, node.node_manager_port
                stats = node_stats(address, port, include_memory_info=False).store_stats
                for name in ("object_store_bytes_used", "object_store_bytes_fallback", "spilled_bytes_total"):
                    peaks = self.peaks["of the GPU" if number == 0 else f"of CPUs, {number}"]
                    peaks[name] = max(peaks[name], getattr(stats, name))
            time.sleep(0.1)


def write_images(folder: Path, images: int) -> Path:
    """A folder with so many JPEGs of 768 px, of which only a few are not links to others."""
    archive = folder / "archive"
    archive.mkdir()
    sources = [path for path, _, _ in sorted(photographs())[:PHOTOGRAPHS]]
    for number in range(images):
        source = archive / f"{number % PHOTOGRAPHS:06d}.jpg"
        if number < PHOTOGRAPHS:
            Image.open(sources[number]).convert("RGB").resize((SIDE, SIDE)).save(source, quality=92)
        else:
            os.link(source, archive / f"{number:06d}.jpg")
    return archive


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--nodes", type=int, default=2, help="with CPUs alone")
    parser.add_argument("--megabytes", type=int, default=256, help="of each node's object store")
    parser.add_argument("--milliseconds", type=int, default=15, help="that an image is scored for")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = f"{plant.ROOT}{os.pathsep}{plant.ROOT / 'benchmarks'}"
    os.environ["CSFLOW_SECONDS_PER_IMAGE"] = str(options.milliseconds / 1000)
    csflow.scoring.pool.ScoringActor = FixedCostActor
    node = {"num_cpus": 1, "object_store_memory": options.megabytes << 20}
    with tempfile.TemporaryDirectory(prefix="csflow-store-") as name:
        folder = Path(name)
        model, output = plant.write_model(folder / "model", MODEL), folder / "output"
        arguments = ["--model", str(model), "--input", str(write_images(folder, options.images))]
        stores = Stores(output)
        nodes = [node | {"num_gpus": 1}, *[node] * options.nodes]
        cluster.run_job(nodes, [*arguments, "--decode", "cluster"], output, stores.watch)
        run = plant.run_record(output)
    lines = [
        "| object store | size, MB | peak, MB | outside of it, MB | to disk, MB |",
        "|---|---|---|---|---|",
    ]
    for store, peaks in stores.peaks.items():
        figures = " | ".join(f"{value / 1e6:.0f}" for value in peaks.values())
        lines.append(f"| {store} | {(options.megabytes << 20) / 1e6:.0f} | {figures} |")
    lines += [
        "",
        f"{options.images} images, {run['images_helped']} of them helped; {run['images_per_second']:.0f} "
        f"images/s, while the model waited for {run['seconds_in_workers']['wait']:.0f} s.",
    ]
    command = f"python benchmarks/store.py --images {options.images} --nodes {options.nodes} --megabytes "
    command += f"{options.megabytes} --milliseconds {options.milliseconds}"
    results.record("Object stores: images of 768 px from helpers", "\n".join(lines), command)


if __name__ == "__main__":
    main()
