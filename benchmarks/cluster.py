"""Whether what surrounds the model scales: a scoring job over 1, 2 and 4 simulated Ray nodes.

    python benchmarks/cluster.py

The nodes are Ray's own, one CPU and one scoring actor each, on this machine. The actors are csflow's, but
reading gives blank images and a forward pass sleeps for a fixed time per image, so that the two real cores
can stand for many. Listing, plan, actors, files and account are the real ones. Efficiency is the images per
second of n nodes over n times those of one, from when every actor has begun until the first has run out.
"""

import argparse
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from ray.cluster_utils import Cluster

import csflow.scoring.job
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

NODES = (1, 2, 4)
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
    def __init__(self, form: Form, seconds_per_image: float) -> None:
        self.form = form
        self._seconds = seconds_per_image

    def submit(self, pixels_BHWC: torch.Tensor) -> Callable[[], Scores]:
        time.sleep(self._seconds * len(pixels_BHWC))
        score_B, maps = torch.rand(len(pixels_BHWC)), torch.rand(len(pixels_BHWC), 8, 8)
        scale_BS, averages_BAHW = torch.rand(len(pixels_BHWC), 3), maps[:, None][:, :0]
        scores = Scores(score_B, score_B, score_B, scale_BS, maps, averages_BAHW)
        return lambda: scores


def blank_images(folder: Path, images: int) -> list[str]:
    """Writes a model, and a manifest of images that are nowhere; the arguments of a job over them."""
    model = plant.write_model(folder / "model", plant.SETTINGS["light"])
    uris = [f"{folder}/{i:06d}.png" for i in range(images)]
    manifest = folder / "images.parquet"
    pq.write_table(pa.table({"image_uri": uris, "image_version": ["1"] * len(uris)}), manifest)
    return ["--model", str(model), "--input", str(manifest), "--max_error_rate", "1"]


def run_job(nodes: Sequence[Mapping[str, int]], arguments: Sequence[str], output: Path) -> None:
    """Runs the job on a cluster of nodes that have this."""
    cluster = Cluster()
    try:
        for node in nodes:
            cluster.add_node(**node)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, logging_level="error", log_to_driver=False)
        status = csflow.scoring.job.score(parse(ScoreConfig, None, [*arguments, "--output", str(output)]))
    finally:
        ray.shutdown()
        cluster.shutdown()
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=6400)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(plant.ROOT)
    csflow.scoring.pool.ScoringActor = FixedCostActor
    rates: dict[tuple[int, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="csflow-cluster-") as name:
        folder = Path(name)
        arguments = blank_images(folder, options.images)
        for _ in range(options.rounds):
            for nodes in NODES:
                for kind, rate in score(nodes, arguments, folder / secrets.token_hex(4)).items():
                    rates[nodes, kind].append(rate)
                    print(nodes, kind, f"{rate:.1f}", file=sys.stderr, flush=True)
    kinds = ("while all work", "first to last")
    lines = ["| nodes | images/s, all at work | efficiency | images/s, first to last image | efficiency |"]
    lines.append("|---|---|---|---|---|")
    for nodes in NODES:
        row = [str(nodes)]
        for kind in kinds:
            ratios = [a / b / nodes for a, b in zip(rates[nodes, kind], rates[1, kind], strict=True)]
            row += [f"{statistics.median(rates[nodes, kind]):.1f}", f"{statistics.median(ratios):.3f}"]
        lines.append(f"| {' | '.join(row)} |")
    lines += [
        "",
        f"{options.images} images of {1000 * SECONDS_PER_IMAGE:.0f} ms, medians of {options.rounds} rounds. "
        "The second pair includes the actors' uneven start on two real cores, and the end.",
    ]
    command = f"python benchmarks/cluster.py --images {options.images} --rounds {options.rounds}"
    results.record("Simulated cluster of fixed-cost scorers", "\n".join(lines), command)


if __name__ == "__main__":
    main()
