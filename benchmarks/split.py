"""Whether decoding on other nodes keeps a GPU busy: a scoring job on a simulated GPU node and CPU nodes.

    python benchmarks/split.py
    python benchmarks/split.py --gpus 1 2 4 8

The nodes are Ray's own, on this machine, with one CPU each; one has a GPU. Scoring an image takes 2 ms and
decoding it 10 ms, both of sleep, and in each process one image is decoded at a time, as by one CPU: so two
real cores can stand for many. Listing, plan, actors, helpers, files and account are the real ones, and so are
the pixels that helpers send, 256 x 256. The limit is what the scorer, or all CPUs together, can do in a
second, whichever is less. Every run has as many images as it can do in the same time at its limit.

On a machine that does other work, too, `--times 5` makes all costs five times as long, so that the benchmark
itself takes a fifth of the processors.

With `--gpus`, so many GPU nodes have a CPU node each, and the rates from the first image to the last are
compared with those of one such pair. Shards are then smaller (`cluster.py`).
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import fixed_cost
import numpy as np
import plant
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import results
from fixed_cost import DECODE_S, SCORE_S, FixedCostSettings

import cluster
import csflow.scoring.plan_log
import csflow.scoring.pool
from csflow.cluster import WorkerResources, helpers
from csflow.preprocessing import Preprocessing
from csflow.scoring.config import ScoringSettings
from csflow.scoring.kept_models import KeptModels
from csflow.scoring.scorer import ShardScorer

CPU_NODES = (1, 2, 4)
NODE = {"num_cpus": 1, "object_store_memory": 200 << 20}
STEADY = slice(5, 9)
"""The steady rate is that between these tenths of the images: helpers are there, and shards, too."""


class FixedCostScorer(ShardScorer):
    """A scorer on a GPU that sleeps, behind real loaders and helpers."""

    def __init__(self, settings: ScoringSettings, resources: WorkerResources, *_: object) -> None:
        super().__init__(settings, replace(resources, gpus=0, decode="beside"))
        self._detector: Any = cluster.FixedCostDetector(self._detector.form, fixed_cost.SCORE_S)
        loader = FixedCostSettings({}, Preprocessing((256, 256)))
        self._loader = loader.loader(8, helpers(loader, resources))


class FixedCostActor(KeptModels):
    scorer = FixedCostScorer


def score(gpu_nodes: int, cpu_nodes: int, arguments: list[str], output: Path) -> dict[str, float]:
    """Runs the job on a cluster of so many GPU nodes and CPU nodes; images per second."""
    nodes = [*[NODE | {"num_gpus": 1}] * gpu_nodes, *[NODE] * cpu_nodes]
    cluster.run_job(nodes, arguments, output)
    scored_at = ds.dataset(output / "scores").to_table(columns=["scored_at"])["scored_at"]
    times = np.sort(scored_at.cast("int64").to_numpy() / 1e6)
    middle = times[len(times) * STEADY.start // 10 : len(times) * STEADY.stop // 10]
    return {
        "steady": (len(middle) - 1) / (middle[-1] - middle[0]),
        "all": len(times) / (times[-1] - times[0]),
    }


def scored_images(output: Path) -> int:
    """How many images a run has scored so far, if all its shards but the last have the same size."""
    files = sorted(output.glob("scores/*/*/part-*.parquet"))
    return len(files) * pq.read_metadata(files[0]).num_rows if files else 0


def limit(nodes: int, decode: str, options: argparse.Namespace) -> float:
    """Images per second that a GPU node and so many CPU nodes can do."""
    return min(1 / SCORE_S, (nodes * (decode != "beside") + 1) / DECODE_S) / options.times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=40, help="of a run at its limit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--times", type=int, default=1, help="that decoding and scoring take longer")
    parser.add_argument("--gpus", type=int, nargs="*", help="numbers of GPU nodes")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = f"{plant.ROOT}{os.pathsep}{plant.ROOT / 'benchmarks'}"
    csflow.scoring.pool.ScoringActor = FixedCostActor
    os.environ["CSFLOW_DECODE_S"] = str(options.times * DECODE_S)
    (measure_scaling if options.gpus else measure_helping)(options)


def measure_helping(options: argparse.Namespace) -> None:
    rates: dict[tuple[int, str, str], list[float]] = defaultdict(list)
    variants = [(0, "beside"), *((nodes, "auto") for nodes in CPU_NODES)]
    limits = {variant: limit(*variant, options) for variant in variants}
    with tempfile.TemporaryDirectory(prefix="csflow-split-") as name:
        folder = Path(name)
        arguments = cluster.blank_images(folder, round(options.seconds * max(limits.values())))
        for _ in range(options.rounds):
            for (nodes, decode), most in limits.items():
                flags = ["--decode", decode, "--limit", str(round(options.seconds * most))]
                for kind, rate in score(1, nodes, [*arguments, *flags], plant.fresh(folder)).items():
                    rates[nodes, decode, kind].append(rate)
                    print(nodes, decode, kind, f"{rate:.1f}", file=sys.stderr, flush=True)
    lines = ["| CPU nodes | decode | limit | images/s, steady | of the limit | all images |"]
    lines.append("|---|---|---|---|---|---|")
    for (nodes, decode), most in limits.items():
        steady, of_all = (statistics.median(rates[nodes, decode, kind]) for kind in ("steady", "all"))
        lines.append(
            f"| {nodes} | {decode} | {most:.0f} | {steady:.1f} | {steady / most:.2f} | {of_all:.1f} |"
        )
    lines += ["", f"Runs of {options.seconds} s at their limit, medians of {options.rounds} rounds."]
    command = f"python benchmarks/split.py --times {options.times} --seconds {options.seconds}"
    title = "Decoding beside a simulated GPU and on other nodes"
    results.record(title, "\n".join(lines), f"{command} --rounds {options.rounds}")


def measure_scaling(options: argparse.Namespace) -> None:
    csflow.scoring.plan_log.MAX_SHARD_SIZE = cluster.SHARD_SIZE
    of_each = round(options.seconds * limit(1, "auto", options))
    rates: dict[tuple[int, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="csflow-split-") as name:
        folder = Path(name)
        arguments = cluster.blank_images(folder, of_each * max(options.gpus))
        for _ in range(options.rounds):
            for nodes in options.gpus:
                flags = ["--decode", "auto", "--limit", str(of_each * nodes)]
                for kind, rate in score(nodes, nodes, [*arguments, *flags], plant.fresh(folder)).items():
                    rates[nodes, kind].append(rate)
                    print(nodes, kind, f"{rate:.1f}", file=sys.stderr, flush=True)
    lines = cluster.efficiency(rates, {"steady": "images/s, steady", "all": "images/s, first to last image"})
    lines += ["", f"{of_each} images for each pair, medians of {options.rounds} rounds."]
    command = f"python benchmarks/split.py --gpus {' '.join(map(str, options.gpus))} --times {options.times} "
    command += f"--seconds {options.seconds} --rounds {options.rounds}"
    results.record("Simulated cluster of GPU nodes with a CPU node each", "\n".join(lines), command)


if __name__ == "__main__":
    main()
