"""Whether decoding on other nodes keeps a GPU busy: a scoring job on a simulated GPU node and CPU nodes.

    python benchmarks/split.py

The nodes are Ray's own, on this machine, with one CPU each; one has a GPU. Scoring an image takes 2 ms and
decoding it 10 ms, both of sleep, and in each process one image is decoded at a time, as by one CPU: so two
real cores can stand for many. Listing, plan, actors, helpers, files and account are the real ones, and so are
the pixels that helpers send, 256 x 256. The limit is what the scorer, or all CPUs together, can do in a
second, whichever is less.
"""

import argparse
import os
import secrets
import statistics
import sys
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plant
import pyarrow.dataset as ds
import results
from fixed_cost import DECODE_S, FixedCostSettings

import cluster
import csflow.scoring.pool
from csflow.cluster import WorkerResources, helpers
from csflow.preprocessing import Preprocessing
from csflow.scoring.config import ScoringSettings
from csflow.scoring.kept_models import KeptModels
from csflow.scoring.scorer import ShardScorer

SCORE_S = 0.002
"""Seconds for an image."""
CPU_NODES = (1, 2, 4)
STEADY = slice(5, 9)
"""The steady rate is that between these tenths of the images: helpers are there, and shards, too."""


class FixedCostScorer(ShardScorer):
    """A scorer on a GPU that sleeps, behind real loaders and helpers."""

    def __init__(self, settings: ScoringSettings, resources: WorkerResources, *_: object) -> None:
        super().__init__(settings, replace(resources, gpus=0, decode="beside"))
        self._detector: Any = cluster.FixedCostDetector(self._detector.form, SCORE_S)
        loader = FixedCostSettings({}, Preprocessing((256, 256)))
        self._loader = loader.loader(8, helpers(loader, resources))


class FixedCostActor(KeptModels):
    scorer = FixedCostScorer


def score(cpu_nodes: int, decode: str, arguments: list[str], output: Path) -> dict[str, float]:
    """Runs the job on a cluster of a GPU node and so many CPU nodes; images per second."""
    node = {"num_cpus": 1, "object_store_memory": 200 << 20}
    nodes = [node | {"num_gpus": 1}, *[node] * cpu_nodes]
    cluster.run_job(nodes, [*arguments, "--decode", decode], output)
    scored_at = ds.dataset(output / "scores").to_table(columns=["scored_at"])["scored_at"]
    times = np.sort(scored_at.cast("int64").to_numpy() / 1e6)
    middle = times[len(times) * STEADY.start // 10 : len(times) * STEADY.stop // 10]
    return {
        "steady": (len(middle) - 1) / (middle[-1] - middle[0]),
        "all": len(times) / (times[-1] - times[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=12800)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = f"{plant.ROOT}{os.pathsep}{plant.ROOT / 'benchmarks'}"
    csflow.scoring.pool.ScoringActor = FixedCostActor
    rates: dict[tuple[int, str, str], list[float]] = defaultdict(list)
    variants = [(0, "beside"), *((nodes, "auto") for nodes in CPU_NODES)]
    with tempfile.TemporaryDirectory(prefix="csflow-split-") as name:
        folder = Path(name)
        arguments = cluster.blank_images(folder, options.images)
        for _ in range(options.rounds):
            for nodes, decode in variants:
                for kind, rate in score(nodes, decode, arguments, folder / secrets.token_hex(4)).items():
                    rates[nodes, decode, kind].append(rate)
                    print(nodes, decode, kind, f"{rate:.1f}", file=sys.stderr, flush=True)
    lines = ["| CPU nodes | decode | limit | images/s, steady | of the limit | all images |"]
    lines.append("|---|---|---|---|---|---|")
    for nodes, decode in variants:
        limit = min(1 / SCORE_S, (nodes * (decode != "beside") + 1) / DECODE_S)
        steady, of_all = (statistics.median(rates[nodes, decode, kind]) for kind in ("steady", "all"))
        lines.append(
            f"| {nodes} | {decode} | {limit:.0f} | {steady:.1f} | {steady / limit:.2f} | {of_all:.1f} |"
        )
    lines += ["", f"{options.images} images, medians of {options.rounds} rounds."]
    command = f"python benchmarks/split.py --images {options.images} --rounds {options.rounds}"
    results.record("Decoding beside a simulated GPU and on other nodes", "\n".join(lines), command)


if __name__ == "__main__":
    main()
