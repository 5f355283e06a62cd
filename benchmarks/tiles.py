"""Small defects in large images: images squeezed into 256 pixels, and images cut into tiles of 512.

    python benchmarks/tiles.py --work /tmp/tiles            # data, models, scores, table
    python benchmarks/tiles.py --work /tmp/tiles --cells    # then: how hot defects are among normal cells
    python benchmarks/tiles.py --work /tmp/tiles --strips   # time and memory of strips, with the tiled model

An image is 4,000 x 3,000 pixels of photographs of functional solar cells, side by side. Half of the test
images have defects of 8 to 40 pixels (the longer side of what is visible), each in its own cell. A defect
is found if the box of a region overlaps it. Regions are those at `--false_regions 0.1`: one on ten normal
images.
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from planted_defects import KINDS, plant

import csflow
from csflow.demo import photographs

HEIGHT, WIDTH, CELL = 3000, 4000, 300
PATCH = 160
"""Side of the square of a cell in which a defect is drawn."""
SIZES = (8, 16, 28, 41)
"""Limits of the classes of sizes in the table."""
DEFECTS = 6
"""Of a defective image."""
MODELS: dict[str, dict[str, Any]] = {
    "squeezed": {"image_size": [256]},
    "tiled": {"tile": 512, "overlap": 64, "tiles_per_image": 8},
}


class Defect(NamedTuple):
    x: int
    """Left edge of what is visible, in pixels of the image, as y, width and height."""
    y: int
    width: int
    height: int

    @property
    def size(self) -> int:
        return max(self.width, self.height)

    @property
    def size_class(self) -> int:
        """Its place among the classes of the table."""
        return int(np.searchsorted(SIZES, self.size, "right")) - 1


class Map(NamedTuple):
    """An anomaly map, and the part of its image that it covers: top, left, bottom and right edge."""

    map_HW: NDArray[np.float64]
    box: tuple[float, float, float, float]

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Map":
        shape = row["map_height"], row["map_width"]
        return cls(np.reshape(row["anomaly_map"], shape), row["map_box"] or (0, 0, HEIGHT, WIDTH))

    def hottest(self, y: int, x: int, height: int, width: int) -> float:
        """The hottest cell of the map that has some of this part of the image."""
        top, left, bottom, right = self.box
        step_y, step_x = (bottom - top) / self.map_HW.shape[0], (right - left) / self.map_HW.shape[1]
        rows = slice(int((y - top) // step_y), int((y + height - 1 - top) // step_y) + 1)
        columns = slice(int((x - left) // step_x), int((x + width - 1 - left) // step_x) + 1)
        return float(self.map_HW[rows, columns].max())


def cells() -> list[NDArray[np.uint8]]:
    """Photographs of functional solar cells, 300 x 300 pixels of grey."""
    functional = [path for path, probability, _ in sorted(photographs()) if probability == 0]
    return [np.asarray(Image.open(path).convert("L").resize((CELL, CELL))) for path in functional]


def plate(
    some: list[NDArray[np.uint8]], random: np.random.Generator, height: int = HEIGHT
) -> NDArray[np.uint8]:
    """An image of cells drawn at random."""
    rows, columns = -(-height // CELL), -(-WIDTH // CELL)
    chosen = random.integers(len(some), size=(rows, columns))
    return np.concatenate([np.concatenate([some[i] for i in row], 1) for row in chosen])[
        :height, :WIDTH
    ].copy()


def with_defects(image_HW: NDArray[np.uint8], random: np.random.Generator) -> list[Defect]:
    """Draws defects into an image; each is in the middle of a cell of its own."""
    places = random.permutation((HEIGHT // CELL) * (WIDTH // CELL))[:DEFECTS]
    return [_with_defect(image_HW, *divmod(int(place), WIDTH // CELL), random) for place in places]


def _with_defect(image_HW: NDArray[np.uint8], row: int, column: int, random: np.random.Generator) -> Defect:
    margin = (CELL - PATCH) // 2
    top, left = row * CELL + margin, column * CELL + margin
    patch_HW = image_HW[top : top + PATCH, left : left + PATCH]
    while True:
        kind = list(KINDS)[random.integers(len(KINDS))]
        planted = plant(patch_HW, kind, int(random.integers(1 << 31)), area=(0.001, 0.04))
        ys, xs = np.nonzero(planted.mask_HW)
        defect = Defect(left + xs.min(), top + ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)
        if SIZES[0] <= defect.size < SIZES[-1]:
            patch_HW[:] = planted.image_HW
            return Defect(*map(int, defect))


def make_data(work: Path, normal: int, tested: int) -> dict[str, list[Defect]]:
    """Writes images to train on and to test on; returns the defects of each test image."""
    some = cells()
    random = np.random.default_rng(0)
    random.shuffle(some)
    known, new = some[: len(some) // 2], some[len(some) // 2 :]
    truth: dict[str, list[Defect]] = {}
    for folder, count, of in (("train", normal, known), ("test", 2 * tested, new)):
        (work / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image_HW, name = plate(of, random), f"{number:03}.png"
            if folder == "test":
                truth[name] = with_defects(image_HW, random) if number % 2 else []
            Image.fromarray(image_HW).save(work / folder / name, compress_level=1)
    (work / "truth.json").write_text(json.dumps(truth))
    return truth


def is_found(defect: Defect, regions: list[dict[str, float]]) -> bool:
    return any(
        region["x"] < defect.x + defect.width
        and region["x"] + region["width"] > defect.x
        and region["y"] < defect.y + defect.height
        and region["y"] + region["height"] > defect.y
        for region in regions
    )


def measure(name: str, work: Path, truth: dict[str, list[Defect]]) -> None:
    """Prints a row of the table."""
    model, out = work / name / "model", work / name / "out"
    if not (model / "config.json").exists():
        # One epoch: regions are those of maps, which are made of the Gaussian, and no epoch changes it.
        csflow.train(input=[str(work / "train")], output=str(model), holdout=0.3, epochs=1, **MODELS[name])
    record = csflow.score(model=str(model), input=[str(work / "test")], output=str(out), workers=1)
    rows = csflow.read_scores(str(out)).to_arrow().to_pylist()
    regions = {Path(row["image_uri"]).name: row["regions"] for row in rows}
    found: list[list[bool]] = [[] for _ in SIZES[1:]]
    for image, defects in truth.items():
        for defect in defects:
            found[defect.size_class].append(is_found(defect, regions[image]))
    normal = [len(regions[image]) for image, defects in truth.items() if not defects]
    recalls = " | ".join(f"{sum(some)} of {len(some)}" for some in found)
    work_s = sum(record.seconds_in_workers.get(stage, 0.0) for stage in ("read", "decode", "score"))
    megapixels = len(rows) * HEIGHT * WIDTH / 1e6
    peak = record.peak_memory_bytes["worker"] / 1e9
    print(
        f"| {name} | {recalls} | {sum(normal)} on {len(normal)} | {work_s / megapixels:.2f} | {peak:.1f} |",
        flush=True,
    )


def compare_with_cells(name: str, work: Path) -> None:
    """Prints how hot the map is at defects, and in the cells of normal images."""
    truth = {
        image: [Defect(*values) for values in of_image]
        for image, of_image in json.loads((work / "truth.json").read_text()).items()
    }
    at_defects: list[list[float]] = [[] for _ in SIZES[1:]]
    in_cells: list[float] = []
    for row in csflow.read_scores(str(work / name / "out")).to_arrow().to_pylist():
        map_of_image = Map.of(row)
        defects = truth[Path(row["image_uri"]).name]
        for defect in defects:
            hottest = map_of_image.hottest(defect.y, defect.x, defect.height, defect.width)
            at_defects[defect.size_class].append(hottest)
        if not defects:
            places = np.ndindex(HEIGHT // CELL, WIDTH // CELL)
            in_cells += [map_of_image.hottest(CELL * i, CELL * j, CELL, CELL) for i, j in places]
    limit = np.quantile(in_cells, 0.99)
    shares = " | ".join(f"{np.mean(np.array(some) > limit):.2f}" for some in at_defects)
    every = np.concatenate(at_defects)
    above = np.searchsorted(np.sort(in_cells), every).mean() / len(in_cells)
    print(f"| {name} | {shares} | {above:.2f} |")


def measure_strips(work: Path) -> None:
    """Prints time and memory for strips of growing length."""
    some = cells()
    print("| strip | megapixels | s per megapixel | peak memory, GB |\n|---|---|---|---|")
    for height in (3_000, 12_500, 50_000):
        folder = work / f"strip-{height}"
        folder.mkdir(exist_ok=True)
        strip_HW = np.pad(plate(some, np.random.default_rng(1), height), ((0, 0), (0, 96)), mode="reflect")
        Image.fromarray(strip_HW).save(folder / "strip.tif")
        record = csflow.score(
            model=str(work / "tiled" / "model"),
            input=[str(folder)],
            output=str(work / f"strip-{height}-out"),
            max_pixels=strip_HW.size,
            workers=1,
        )
        work_s = sum(record.seconds_in_workers.get(stage, 0.0) for stage in ("read", "decode", "score"))
        peak = record.peak_memory_bytes["worker"] / 1e9
        print(
            f"| {strip_HW.shape[1]:,} x {height:,} | {strip_HW.size / 1e6:.0f} | "
            f"{work_s / strip_HW.size * 1e6:.2f} | {peak:.1f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of data, models and scores")
    parser.add_argument(
        "--train", type=int, default=30, help="normal images to learn from and to calibrate with"
    )
    parser.add_argument("--test", type=int, default=5, help="normal, and as many defective images to test on")
    parser.add_argument("--strips", action="store_true", help="measure strips")
    parser.add_argument("--cells", action="store_true", help="compare defects with normal cells")
    arguments = parser.parse_args()
    if arguments.strips:
        measure_strips(arguments.work)
        return
    classes = " | ".join(f"found, {low} to {high - 1} px" for low, high in pairwise(SIZES))
    if arguments.cells:
        print(f"| model | {classes} | hotter than a normal cell |\n|---|---|---|---|---|")
        for name in MODELS:
            compare_with_cells(name, arguments.work)
        return
    truth = make_data(arguments.work, arguments.train, arguments.test)
    print(f"| model | {classes} | regions on normal images | s per megapixel | peak memory, GB |")
    print("|---|---|---|---|---|---|---|")
    for name in MODELS:
        measure(name, arguments.work, truth)


if __name__ == "__main__":
    main()
