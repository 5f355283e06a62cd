"""Whether what surrounds the model scales: a scoring job over 1, 2, 4 and 8 simulated Ray nodes.

    python benchmarks/cluster.py

The nodes are Ray's own, one CPU and one scoring actor each, on this machine. The actors are csflow's, but
reading gives blank images and a forward pass sleeps for a fixed time per image, so that the two real cores
can stand for many. Listing, plan, actors, files and account are the real ones. Efficiency is the images per
second of n nodes over n times those of one: from when every actor has begun until the first has run out, and
from the first image to the last. Each node has the same number of images, in shards of the same size.
"""

import argparse
import os
import secrets
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# A call after the benchmark's cluster has gone must not join, or start, another.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"

import numpy as np
import plant
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import ray
import results
import torch
from fixed_cost import Unit, wait_until
from ray.cluster_utils import Cluster

import csflow.scoring.job
import csflow.scoring.plan_log
import csflow.scoring.pool
from csflow.config import parse
from csflow.errors import ExitStatus
from csflow.images import DecodedImage
from csflow.inputs.loaded import LoadedImage
from csflow.model import Form, Scores
from csflow.preprocessing import whole
from csflow.process import IdleClock, Stages
from csflow.scoring.config import ScoreConfig
from csflow.scoring.kept_models import KeptModels
from csflow.scoring.scorer import ShardScorer

NODES = (1, 2, 4, 8)
SHARD_SIZE = 64
"""A real node is faster, and has larger shards, which take about as long."""
SECONDS_PER_IMAGE = 0.01


class BlankLoader:
    """Blank images at once; the process that asked is written in their height, to be found in the scores."""

    idle = IdleClock()

    def load(self, uris: Sequence[str], versions: Sequence[str], while_waiting: Any) -> Iterator[LoadedImage]:
        size = os.getpid(), 256
        blank = DecodedImage(np.zeros((256, 256, 3), dtype=np.uint8), *size, whole(*size))
        for uri, version in zip(uris, versions, strict=True):
            yield LoadedImage(uri, version, blank, Stages())


class FixedCostScorer(ShardScorer):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._loader: Any = BlankLoader()
        self._detector: Any = FixedCostDetector(self._detector.form, SECONDS_PER_IMAGE)


class FixedCostActor(KeptModels):
    scorer = FixedCostScorer


class FixedCostDetector:
    """Computes beside the thread that calls it, as a GPU does."""

    def __init__(self, form: Form, seconds_per_image: float) -> None:
        self.form = form
        self._unit = Unit(seconds_per_image)

    def submit(self, pixels_BHWC: torch.Tensor) -> Callable[[], Scores]:
        done_at = self._unit.take(len(pixels_BHWC))
        score_B, maps = torch.rand(len(pixels_BHWC)), torch.rand(len(pixels_BHWC), 8, 8)
        scale_BS, averages_BAHW = torch.rand(len(pixels_BHWC), 3), maps[:, None][:, :0]
        scores = Scores(score_B, score_B, score_B, scale_BS, maps, averages_BAHW)

        def finished() -> Scores:
            wait_until(done_at)
            return scores

        return finished


def blank_images(folder: Path, images: int) -> list[str]:
    """Writes a model, and a manifest of images that are nowhere; the arguments of a job over them."""
    model = plant.write_model(folder / "model", plant.SETTINGS["light"])
    uris = [f"{folder}/{i:06d}.png" for i in range(images)]
    manifest = folder / "images.parquet"
    pq.write_table(pa.table({"image_uri": uris, "image_version": ["1"] * len(uris)}), manifest)
    return ["--model", str(model), "--input", str(manifest)]


def run_job(
    nodes: Sequence[Mapping[str, int]],
    arguments: Sequence[str],
    output: Path,
    meanwhile: Callable[[Cluster], object] = lambda cluster: None,
) -> None:
    """Runs the job on a cluster of nodes that have this, in a thread, and something else beside it."""
    cluster = Cluster()
    try:
        for node in nodes:
            cluster.add_node(**node, include_dashboard=False)
        cluster.wait_for_nodes()
        with ThreadPoolExecutor() as pool:
            job = pool.submit(score_on, cluster.address, arguments, output)
            meanwhile(cluster)  # a node can be added in the main thread only
            job.result()
    finally:
        cluster.shutdown()


def score_on(address: str, arguments: Sequence[str], output: Path) -> None:
    """Runs the job on the cluster at this address."""
    ray.init(address=address, logging_level="error", log_to_driver=False)
    try:
        status = csflow.scoring.job.score(parse(ScoreConfig, None, [*arguments, "--output", str(output)]))
    finally:
        ray.shutdown()
    assert status == ExitStatus.DONE


def score(nodes: int, arguments: Sequence[str], output: Path) -> dict[str, float]:
    """Runs the job on a cluster of so many nodes; its images per second, and the first to last."""
    run_job([{"num_cpus": 1, "object_store_memory": 100 << 20}] * nodes, arguments, output)
    scores = ds.dataset(output / "scores").to_table(columns=["image_height", "scored_at"])
    times = scores["scored_at"].cast("int64").to_numpy() / 1e6
    actors = scores["image_height"].to_numpy()
    assert len(np.unique(actors)) == nodes
    start = max(times[actors == actor].min() for actor in np.unique(actors))
    end = min(times[actors == actor].max() for actor in np.unique(actors))
    while_all_work = ((times > start) & (times <= end)).sum() / (end - start)
    return {"while all work": while_all_work, "first to last": len(times) / (times.max() - times.min())}


def efficiency(rates: Mapping[tuple[int, str], Sequence[float]], kinds: Mapping[str, str]) -> list[str]:
    """A table of rates by number of nodes and kind, with heads for the kinds, and of their ratios to those of
    one node."""
    lines = ["".join(["| nodes |", *(f" {head} | efficiency |" for head in kinds.values())])]
    lines.append(f"|---|{'---|---|' * len(kinds)}")
    for nodes in sorted({nodes for nodes, _ in rates}):
        row = [str(nodes)]
        for kind in kinds:
            ratios = [a / b / nodes for a, b in zip(rates[nodes, kind], rates[1, kind], strict=True)]
            row += [f"{statistics.median(rates[nodes, kind]):.1f}", f"{statistics.median(ratios):.3f}"]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=6400, help="for each node")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = f"{plant.ROOT}{os.pathsep}{plant.ROOT / 'benchmarks'}"
    csflow.scoring.pool.ScoringActor = FixedCostActor
    csflow.scoring.plan_log.MAX_SHARD_SIZE = SHARD_SIZE
    rates: dict[tuple[int, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="csflow-cluster-") as name:
        folder = Path(name)
        arguments = blank_images(folder, options.images * max(NODES))
        for _ in range(options.rounds):
            for nodes in NODES:
                some = [*arguments, "--limit", str(options.images * nodes)]
                for kind, rate in score(nodes, some, folder / secrets.token_hex(4)).items():
                    rates[nodes, kind].append(rate)
                    print(nodes, kind, f"{rate:.1f}", file=sys.stderr, flush=True)
    heads = {"while all work": "images/s, all at work", "first to last": "images/s, first to last image"}
    lines = efficiency(rates, heads)
    lines += [
        "",
        f"{options.images} images of {1000 * SECONDS_PER_IMAGE:.0f} ms for each node, medians of "
        f"{options.rounds} rounds. The second pair includes the actors' uneven start on two real cores, and "
        "the end.",
    ]
    command = f"python benchmarks/cluster.py --images {options.images} --rounds {options.rounds}"
    results.record("Simulated cluster of fixed-cost scorers", "\n".join(lines), command)


if __name__ == "__main__":
    main()
