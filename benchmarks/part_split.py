"""Whether p-values keep their rate where two photographs show one part: halves of solar cells, with --part.

    python benchmarks/part_split.py --work build/parts --seeds 0 1 2

Each functional cell of the package elpv-dataset is cut into two halves that overlap in half of its width: two
photographs of one part. Each seed draws the cells to train on, and others, whose halves are new normal ones.
Both jobs run as users run them, with `--part` and without. `realised` is the share of halves of new cells
whose p-value is at most the rate, with the 95 % interval of what exact p-values give for one draw of held-out
cells or halves, and of as many new cells.
"""

import argparse
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import plant
import pyarrow.dataset as ds
import results
from PIL import Image
from scipy.stats import betabinom

from csflow.demo import photographs
from csflow.model_directory import read_calibration
from csflow.storage import Location

RATES = (0.01, 0.05, 0.1)
NEW = 400
WIDTH = 3 / 4
"""Of a half, as a share of the cell's."""


def write_halves(folder: Path, trained_on: int, seed: int) -> None:
    """Halves of functional cells below `good` and `new`, named `<cell>_<side>.png`."""
    cells = sorted(source for source, probability, _ in photographs() if probability == 0)
    order = np.random.default_rng(seed).permutation(len(cells))
    for place, number in enumerate(order[: trained_on + NEW]):
        target = folder / ("good" if place < trained_on else "new")
        target.mkdir(parents=True, exist_ok=True)
        cell = Image.open(cells[number])
        width, height = cell.size
        for side, left in (("left", 0), ("right", round(width * (1 - WIDTH)))):
            half = cell.crop((left, 0, left + round(width * WIDTH), height))
            half.save(target / f"{cells[number].stem}_{side}.png")


def job(verb: str, *arguments: object) -> None:
    command = [sys.executable, str(plant.ROOT / "jobs" / f"{verb}.py"), *map(str, arguments)]
    environment = os.environ | {"RAY_ADDRESS": "local", "PYTHONPATH": str(plant.ROOT)}
    subprocess.run(command, cwd=plant.ROOT, env=environment, check=True, stdout=sys.stderr)


def p_values(work: Path, seed: int, options: argparse.Namespace, by_part: bool) -> tuple[int, np.ndarray]:
    """The number of held-out units, and the p-values of the halves of new cells."""
    images, place = work / f"seed-{seed}", work / f"seed-{seed}-{'part' if by_part else 'photograph'}"
    if not images.exists():
        write_halves(images, options.cells, seed)
    part = ["--tags", f"{images.resolve()}/good/{{part}}_{{side}}.png", "--part", "part"] if by_part else []
    if not (place / "model" / "config.json").exists():
        job(
            *("train", "--input", images / "good", "--output", place / "model", "--seed", seed),
            *("--image_size", options.image_size, "--calibration", "holdout"),
            *("--work_dir", work / "_work", "--resume", *part),
        )
    job("score", "--model", place / "model", "--input", images / "new", "--output", place / "scores")
    rows = ds.dataset(place / "scores" / "scores", partitioning="hive").to_table(columns=["p_value"])
    return read_calibration(Location(str(place / "model"))).size, rows["p_value"].to_numpy()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of images, models and scores")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cells", type=int, default=600, help="to train on")
    parser.add_argument("--image_size", type=int, default=128)
    options = parser.parse_args()
    lines = [f"| split by | seed | held out | {' | '.join(f'realised at {rate:.0%}' for rate in RATES)} |"]
    lines.append("|---" * (3 + len(RATES)) + "|")
    means: dict[str, list[np.ndarray]] = defaultdict(list)
    for by_part in (False, True):
        unit = "part" if by_part else "photograph"
        for seed in options.seeds:
            heldout, p = p_values(options.work, seed, options, by_part)
            realised = np.array([(p <= rate).mean() for rate in RATES])
            means[unit].append(realised)
            lines.append(row(unit, str(seed), f"{heldout} {unit}s", realised, heldout, len(p) // 2))
        lines.append(row(unit, "mean", "", np.mean(means[unit], axis=0)))
    command = "python benchmarks/part_split.py --work build/parts --seeds " + " ".join(
        map(str, options.seeds)
    )
    results.record("Photographs of one part: p-values with --part and without", "\n".join(lines), command)


def row(unit: str, seed: str, held_out: str, realised: np.ndarray, heldout: int = 0, new: int = 0) -> str:
    cells = []
    for rate, share in zip(RATES, realised, strict=True):
        cells.append(f"{share:.1%}")
        if heldout:
            k = int(rate * (heldout + 1))
            low, high = (value / new for value in betabinom.interval(0.95, new, k, heldout + 1 - k))
            cells[-1] += f" ({low:.1%} to {high:.1%})"
    return f"| {unit} | {seed} | {held_out} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
