"""Do normal images have as many regions as asked for? By simulation, and on photographs of solar cells.

    python benchmarks/quality_data.py data planted
    csflow train --input data/planted/train/good --output model --seed 0
    python benchmarks/regions.py --model model

Simulated maps are smoothed noise, and one in fifty is twice as bright: a dirty lens. Each draw takes held-out
maps out of a large pool, and the others are new. Of the cells, each draw divides those that the model holds
out. Realised is the mean number of regions of new images at the threshold or a higher one; ± is 95 % of the
mean over draws. Counted is the same if an image counts with at most as many as the worst held-out one. All
draws of cells share one model and one set of photographs.
"""

import argparse
import time

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy import ndimage

from csflow.calibration import region_threshold
from csflow.model_directory import Calibration
from csflow.preprocessing import whole
from csflow.regions import find_regions, region_levels
from csflow.training.closing import REGION_LEVELS

Levels = NDArray[np.float64]
POOL = 4000


def simulated(side: int, blur: float, seed: int) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(random.standard_normal((POOL, side, side)), (0, blur, blur))
    brightness = 1 + (random.random(POOL) < 0.02)
    return (noise * brightness[:, None, None]).astype(np.float32)


def levels_of(maps: NDArray[np.float32]) -> Levels:
    return np.array([region_levels(map_HW, REGION_LEVELS) for map_HW in maps])


def print_rows(name: str, levels: Levels, heldout: int, wanted: list[float], draws: int) -> None:
    for rate in wanted:
        random = np.random.default_rng(0)
        mean, counted = np.empty(draws), np.empty(draws)
        for i in range(draws):
            shuffled = random.permutation(levels)
            threshold = region_threshold(shuffled[:heldout], rate)
            if threshold is None:
                break
            new = (shuffled[heldout:] > threshold).sum(1)
            mean[i] = new.mean()
            of_worst = (shuffled[:heldout] > threshold).sum(1).max()
            counted[i] = new.clip(max=max(1, of_worst)).mean()
        else:
            half = 1.96 * mean.std(ddof=1) / np.sqrt(draws)
            shown = f"{mean.mean():.4f} ± {half:.4f} | {counted.mean():.4f} | {np.quantile(mean, 0.95):.3f}"
            print(f"| {name} | {heldout} | {len(levels) - heldout} | {rate} | {shown} |")


def print_cost() -> None:
    """Time of `find_regions` for maps of two sizes, in batches of 8 images."""
    for side in (32, 96):
        maps = simulated(side, 1.0, seed=1)[:512]
        sides, boxes = [1000] * 8, np.array([whole(1000, 1000)] * 8)
        peaks = maps.max((1, 2))
        for name, threshold in (("0.1", np.quantile(peaks, 0.9)), ("many", np.quantile(maps, 0.99))):
            seconds = []
            for _ in range(7):
                started = time.process_time()
                found = [
                    len(find_regions(maps[i : i + 8], float(threshold), sides, sides, boxes).image_N)
                    for i in range(0, len(maps), 8)
                ]
                seconds.append(time.process_time() - started)
            each = 1e6 * min(seconds) / len(maps)
            print(f"{side} x {side}, {name}: {sum(found) / len(maps):.2f} regions, {each:.0f} µs per image")
        started = time.process_time()
        levels_of(maps[:64])
        print(
            f"{side} x {side}: levels of a held-out map {1e6 * (time.process_time() - started) / 64:.0f} µs"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="model directory, whose held-out images are divided")
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--wanted", type=float, nargs="+", default=[0.02, 0.1, 0.3])
    arguments = parser.parse_args()
    print_cost()
    print("| maps | held out | new | wanted | realised | counted | 95 % below |")
    print("|---|---|---|---|---|---|---|")
    levels = levels_of(simulated(16, 1.0, seed=0))
    for heldout in (99, 499):
        print_rows("simulated", levels, heldout, arguments.wanted, arguments.draws)
    if arguments.model is not None:
        calibration = Calibration.of(pq.read_table(f"{arguments.model}/calibration.parquet"))
        assert calibration.region_levels is not None, "the model is of an older csflow"
        levels = calibration.region_levels
        print_rows("solar cells", levels, len(levels) // 2, arguments.wanted, arguments.draws)


if __name__ == "__main__":
    main()
