"""How soon nodes that come are at work, and whether a pool that grew is as fast as one that was whole.

    python benchmarks/elastic.py

On simulated nodes of one CPU each, with scorers and decoders of fixed cost (`cluster.py`, `split.py`), a node
is added when a third of the images is scored. Without helpers (`beside`) it gets an actor that scores; with
them (`auto`) it helps a GPU of another node. The rate after that is compared with that of a cluster which had
the node from the beginning, over the same part of the images.
"""

import argparse
import operator
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import plant
import pyarrow.dataset as ds
import results
import split
from ray.cluster_utils import Cluster

import cluster
import csflow.scoring.pool

STEADY = slice(6, 9)
"""The rate is that between these tenths of the images, when the added node has long been at work."""
NODE = split.NODE


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
    lines += ["", f"{options.images} images, medians of {options.rounds} rounds."]
    command = f"python benchmarks/elastic.py --images {options.images} --rounds {options.rounds}"
    results.record("Nodes that join a run", "\n".join(lines), command)


if __name__ == "__main__":
    main()
