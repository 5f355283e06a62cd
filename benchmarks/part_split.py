"""Whether p-values keep their rate where two photographs show one part: halves of solar cells, with --part.

    python benchmarks/part_split.py --work build/parts --seeds 0 1 2

Functional cells of the package elpv-dataset are cut into two halves that overlap in half of their width: two
photographs of one part. Each seed draws the cells to train on, and others, whose halves are new normal
photographs. The training is that of the job, in this process, as without `--part` and as with it. `realised`
is the share of new halves whose p-value is at most the rate. In brackets is where 95 % of trainings would be
if p-values were exact, and both halves of a new cell had the same one.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import results
from numpy.typing import NDArray
from PIL import Image
from quality_features import cached_images
from scipy.stats import betabinom
from small_sets import Photographs, trained

from csflow import process
from csflow.calibration import p_values, part_weights
from csflow.demo import photographs
from csflow.training.cache import INDEX
from csflow.training.config import TrainConfig
from csflow.training.split import TrainingData

RATES = (0.01, 0.05, 0.1)
TRAINED_ON, NEW = 600, 400
"""Number of cells."""
WIDTH = 3 / 4
"""Of a half, as a share of the cell's."""


def write_halves(folder: Path) -> None:
    """Halves named `<cell>_<side>.png` below `train/good` and `test/good`; seeds draw from both."""
    cells = sorted(source for source, probability, _ in photographs() if probability == 0)
    for number in np.random.default_rng(0).permutation(len(cells))[: TRAINED_ON + NEW]:
        target = folder / ("test" if number % 3 else "train") / "good"
        target.mkdir(parents=True, exist_ok=True)
        cell = Image.open(cells[number])
        width, height = cell.size
        for side, left in (("left", 0), ("right", round(width * (1 - WIDTH)))):
            half = cell.crop((left, 0, left + round(width * WIDTH), height))
            half.save(target / f"{cells[number].stem}_{side}.png")


def part_of(uri: str) -> str:
    return Path(uri).stem.rpartition("_")[0]


def run(
    halves: Photographs, config: TrainConfig, by_part: bool
) -> tuple[NDArray[np.float64], int, NDArray[np.float64]]:
    """The shares of halves of new cells at each rate, the number of held-out units, and exact p-values'
    limits."""
    uris = halves.functional["image_uri"].to_pylist()
    cells = np.random.default_rng(config.seed).permutation(sorted(set(map(part_of, uris))))
    of_training, new = (
        halves.functional.filter(pa.array([part_of(uri) in some for uri in uris]))
        for some in (set(cells[:TRAINED_ON]), set(cells[TRAINED_ON:]))
    )
    parts = {uri: part_of(uri) for uri in uris} if by_part else None
    data = TrainingData.divide(of_training, config.validation, config.holdout, config.seed, part_of=parts)
    model = trained(halves, config, data)
    weights = part_weights(data.calibrating["part"].to_pylist()) if by_part else None
    p = p_values(model.scores(new), model.calibration, weights)
    heldout = round(float(weights.sum())) if weights is not None else len(model.calibration)
    k = [int(rate * (heldout + 1)) for rate in RATES]
    limits = np.array([betabinom.interval(0.95, NEW, some, heldout + 1 - some) for some in k]) / NEW
    return np.array([(p <= rate).mean() for rate in RATES]), heldout, limits


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of images and features")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--image_size", type=int, default=64)
    options = parser.parse_args()
    process.set_up(1, gpus=0)
    settings: dict[str, Any] = {"input": ["unused"], "output": "unused", "image_size": [options.image_size]}
    config = TrainConfig.model_validate(settings)
    if not (options.work / "data").exists():
        write_halves(options.work / "data")
    found = cached_images(config, options.work / "data", options.work / "features")
    rows = pa.concat_tables([found.data.split.select(INDEX.names), found.test])
    halves = Photographs(found.cache, rows, rows.slice(0, 0))
    lines = [f"| split by | seed | held out | {' | '.join(f'realised at {rate:.0%}' for rate in RATES)} |"]
    lines.append("|---" * (3 + len(RATES)) + "|")
    means: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    for by_part, unit in ((False, "photographs"), (True, "parts")):
        for seed in options.seeds:
            realised, heldout, limits = run(halves, config.model_copy(update={"seed": seed}), by_part)
            means[unit].append(realised)
            shown = [
                f"{share:.1%} ({low:.1%} to {high:.1%})"
                for share, (low, high) in zip(realised, limits, strict=True)
            ]
            lines.append(f"| {unit} | {seed} | {heldout} {unit} | {' | '.join(shown)} |")
            print(lines[-1], flush=True)
        mean = np.mean(means[unit], axis=0)
        lines.append(f"| {unit} | mean | | {' | '.join(f'{share:.1%}' for share in mean)} |")
    seeds = " ".join(map(str, options.seeds))
    command = f"python benchmarks/part_split.py --work build/parts --seeds {seeds}"
    results.record("Two photographs of one part: p-values with --part and without", "\n".join(lines), command)


if __name__ == "__main__":
    main()
