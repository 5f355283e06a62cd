"""Data sets of the quality benchmark, made from photographs that packages ship; the same files every time.

    python benchmarks/quality_data.py quality/data                 # all of them
    python benchmarks/quality_data.py quality/data elpv planted    # some

A data set is a folder in the layout of MVTec AD: `train/good` to train on and to calibrate with, `test/good`,
`test/<class>`, and `ground_truth/<class>/<name>_mask.png` where it is known which pixels are defective.

| data set | normal | defective |
|---|---|---|
| elpv | functional solar cells, as the demo lays them out | cells that are defective for certain |
| elpv-mono, elpv-poly | the same, of monocrystalline or polycrystalline cells only | the same |
| planted | functional solar cells | others with a planted scratch, spot or smear |
| textures | tiles of photographs of brick, grass and gravel (package scikit-image) | the same |

Photographs of solar cells are those of the package elpv-dataset (csflow/demo.py).
"""

import argparse
import hashlib
import importlib.util
import random
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from planted_defects import KINDS, Planted, plant

from csflow.demo import TRAINING_CELLS, photographs
from csflow.training.split import split_images

TRAINING_SHARE = 0.65
PLANTED_TEST_CELLS = 600
"""Functional cells that `planted` tests on, half of them with a defect."""
TILE = 64
"""Side of a texture's tile in pixels. Tiles do not overlap: else those that calibrate would be half known."""
TILE_SHOWN = 256
TILE_BLUR = 1.3
"""Standard deviation in pixels of what enlarging a tile does to an edge."""
TEST_TILES = 20
"""Of the 64 of each photograph."""
TILE_DEFECTS = (0.004, 0.04)
TILE_STRENGTH = 1.7
"""Least and largest share of a tile that a defect covers, and how much stronger it is than on a solar cell:
what is smaller or weaker is lost among blades and stones."""


class TestImage(NamedTuple):
    path: Path
    defect_class: str
    """`good` for a normal image."""
    mask: Path | None
    """Picture of the defective pixels, where they are known."""


def prepare(name: str, data: Path) -> Path:
    """Folder of a data set below `data`; made if it is missing, and never half there."""
    folder = data / name
    if not folder.exists():
        unfinished = data / f"{name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        DATA_SETS[name](unfinished)
        unfinished.rename(folder)
    return folder


def training_images(folder: Path) -> list[Path]:
    return sorted((folder / "train" / "good").iterdir())


def test_images(folder: Path) -> list[TestImage]:
    return list(_test_images(folder))


def _test_images(folder: Path) -> Iterator[TestImage]:
    for path in sorted((folder / "test").glob("*/*")):
        defect_class = path.parent.name
        mask = folder / "ground_truth" / defect_class / f"{path.stem}_mask.png"
        yield TestImage(path, defect_class, mask if mask.exists() else None)


def split(folder: Path, seed: int, validation: float = 0.1, holdout: float = 0.2) -> dict[str, list[Path]]:
    """Training images as the training job divides them by these settings: training, validation, heldout."""
    paths = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in training_images(folder)}
    parts = split_images(paths, validation, holdout, seed)
    return {name: [paths[digest] for digest in part] for name, part in parts._asdict().items()}


def write_elpv(folder: Path) -> None:
    """As `csflow.demo.write_cells` divides them."""
    cells = sorted(photographs())
    random.Random(0).shuffle(cells)
    functional = [(source, kind) for source, probability, kind in cells if probability == 0]
    defective = [(source, kind) for source, probability, kind in cells if probability == 1]
    _copy(functional[:TRAINING_CELLS], folder / "train" / "good")
    _copy(functional[TRAINING_CELLS:], folder / "test" / "good")
    _copy(defective, folder / "test" / "defective")


def _write_elpv_kind(wanted: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        functional = [cell for cell in _functional_cells() if cell[1] == wanted]
        trained_on = round(TRAINING_SHARE * len(functional))
        _copy(functional[:trained_on], folder / "train" / "good")
        _copy(functional[trained_on:], folder / "test" / "good")
        defective = [(source, kind) for source, p, kind in sorted(photographs()) if p == 1 and kind == wanted]
        _copy(defective, folder / "test" / "defective")

    return write


def write_planted(folder: Path) -> None:
    cells = _functional_cells()
    tested, trained_on = cells[:PLANTED_TEST_CELLS], cells[PLANTED_TEST_CELLS:]
    _copy(trained_on, folder / "train" / "good")
    _copy(tested[::2], folder / "test" / "good")
    for i, (source, kind) in enumerate(tested[1::2]):
        image_HW = np.asarray(Image.open(source).convert("L"))
        defect_class = list(KINDS)[i % len(KINDS)]
        _save_planted(plant(image_HW, defect_class, seed=i), folder, defect_class, f"{source.stem}-{kind}")


def write_textures(folder: Path) -> None:
    for texture in ("brick", "grass", "gravel"):
        photograph_HW = np.asarray(Image.open(skimage_data() / f"{texture}.png").convert("L"))
        corners = [(y, x) for y in range(0, 512, TILE) for x in range(0, 512, TILE)]
        random.Random(texture).shuffle(corners)
        for i, (y, x) in enumerate(corners):
            tile = Image.fromarray(photograph_HW[y : y + TILE, x : x + TILE])
            tile = tile.resize((TILE_SHOWN, TILE_SHOWN), Image.Resampling.BICUBIC)
            name = f"{texture}-{y:03}-{x:03}"
            if i >= TEST_TILES:
                _save(tile, folder / "train" / "good" / f"{name}.png")
                continue
            _save(tile, folder / "test" / "good" / f"{name}.png")
            # Each is there clean and with every kind of defect: there are not tiles enough for more.
            for kind in KINDS:
                seed = zlib.crc32(name.encode())
                planted = plant(np.asarray(tile), kind, seed, TILE_BLUR, TILE_DEFECTS, TILE_STRENGTH)
                _save_planted(planted, folder, kind, name)


def _save_planted(planted: Planted, folder: Path, kind: str, name: str) -> None:
    _save(Image.fromarray(planted.image_HW), folder / "test" / kind / f"{name}.png")
    mask = Image.fromarray(planted.mask_HW.astype(np.uint8) * 255)
    _save(mask, folder / "ground_truth" / kind / f"{name}_mask.png")


def _functional_cells() -> list[tuple[Path, str]]:
    cells = [(source, kind) for source, probability, kind in sorted(photographs()) if probability == 0]
    random.Random(0).shuffle(cells)
    return cells


def _copy(cells: Sequence[tuple[Path, str]], folder: Path) -> None:
    folder.mkdir(parents=True)
    for source, kind in cells:
        shutil.copy2(source, folder / f"{source.stem}-{kind}{source.suffix}")


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def skimage_data() -> Path:
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("error: the photographs of textures are missing; pip install scikit-image")
    return Path(spec.submodule_search_locations[0]) / "data"


DATA_SETS: dict[str, Callable[[Path], None]] = {
    "elpv": write_elpv,
    "elpv-mono": _write_elpv_kind("mono"),
    "elpv-poly": _write_elpv_kind("poly"),
    "planted": write_planted,
    "textures": write_textures,
}


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what every program that trains on these data sets is told."""
    parser.add_argument("--names", nargs="+", default=list(DATA_SETS), choices=list(DATA_SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--threads", type=int, default=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder to write below")
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(DATA_SETS)}; default: all")
    arguments = parser.parse_args()
    for name in arguments.names or DATA_SETS:
        folder = prepare(name, arguments.data)
        tested = test_images(folder)
        normal = sum(image.defect_class == "good" for image in tested)
        print(
            f"{folder}: {len(training_images(folder))} to train on; tested on {normal} normal images and "
            f"{len(tested) - normal} defective ones"
        )


if __name__ == "__main__":
    main()
