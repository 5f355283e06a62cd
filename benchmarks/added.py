"""Processor time that csflow and Ray take for an image, beside reading, decoding and the model.

    python benchmarks/added.py

A job on simulated nodes (`cluster.py`, `split.py`) whose decoders and models sleep, so all processor time
is that of the rest: driver, actors, helpers and Ray's own processes. It is taken between two moments in the
middle of the run, so that starting and ending do not count. Images are 256 px: 0.2 MB of pixels each.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

os.environ["CSFLOW_DECODE_S"] = "0.004"

import plant
import results
import split
from ray.cluster_utils import Cluster

import cluster
import csflow.scoring.pool

NODE = split.NODE
SHAPES = {
    "fused: a node of a GPU and a CPU": ([NODE | {"num_gpus": 1}], ["--decode", "beside"]),
    "split: and two nodes of a CPU": ([NODE | {"num_gpus": 1}, NODE, NODE], ["--decode", "cluster"]),
}
KINDS = {"FixedCostActor": "actor", "HelpingLoader": "helpers"}
MIDDLE = (0.3, 0.9)
"""Shares of the images that are scored at the two moments."""


def cpu_seconds() -> Counter[str]:
    """Of this process and all that descend from it so far, by kind."""
    seconds: Counter[str] = Counter()
    for pid in plant.descendants(os.getpid()):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        kind = next((kind for name, kind in KINDS.items() if name in command), "Ray")
        seconds["driver" if pid == os.getpid() else kind] += plant.cpu_seconds_of(pid)
    return seconds


def measure(nodes: list[dict[str, int]], arguments: list[str], images: int, output: Path) -> Counter[str]:
    """Runs the job; milliseconds of processor time for an image, by kind of process."""
    moments: list[tuple[int, Counter[str]]] = []

    def watch(_: Cluster) -> None:
        for share in MIDDLE:
            while (scored := split.scored_images(output)) < share * images:
                time.sleep(0.5)
            moments.append((scored, cpu_seconds()))

    cluster.run_job(nodes, arguments, output, watch)
    (first, before), (last, after) = moments
    after.subtract(before)
    return Counter({kind: 1000 * seconds / (last - first) for kind, seconds in after.items()})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=12_800)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = f"{plant.ROOT}{os.pathsep}{plant.ROOT / 'benchmarks'}"
    csflow.scoring.pool.ScoringActor = split.FixedCostActor
    rows: dict[str, list[Counter[str]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="csflow-added-") as name:
        folder = Path(name)
        arguments = cluster.blank_images(folder, options.images)
        for _ in range(options.rounds):
            for shape, (nodes, flags) in SHAPES.items():
                spent = measure(nodes, [*arguments, *flags], options.images, plant.fresh(folder))
                print(shape, dict(spent), file=sys.stderr, flush=True)
                rows[shape].append(spent)
    kinds = ["actor", "helpers", "driver", "Ray"]
    lines = [f"| ms of a CPU for an image | {' | '.join(kinds)} | sum |", f"|---|{'---|' * len(kinds)}---|"]
    for shape, runs in rows.items():
        cells = [f"{statistics.median(run[kind] for run in runs):.2f}" for kind in kinds]
        total = statistics.median(sum(run.values()) for run in runs)
        lines.append(f"| {shape} | {' | '.join(cells)} | {total:.2f} |")
    lines += ["", f"{options.images} images of 256 px, medians of {options.rounds} rounds."]
    command = f"python benchmarks/added.py --images {options.images} --rounds {options.rounds}"
    results.record("Processor time that the engine adds", "\n".join(lines), command)


if __name__ == "__main__":
    main()
