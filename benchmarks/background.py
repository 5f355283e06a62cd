"""A part on a background: detection with and without a mask.

    python benchmarks/background.py --work /tmp/background
    python benchmarks/background.py --work /tmp/background --seeds 0 1 2 --image_size 128
    python benchmarks/background.py --work /tmp/still --still

Round pieces of photographs of solar cells lie on backgrounds that differ in every image: a strip of brick,
grass or gravel (package scikit-image), turned and brightened at random. Defective pieces are of cells that
are defective for certain. With --still all images of a seed have one background, as a fixture before a fixed
camera has, and `--mask auto` is measured, too. The mask is the circle in which a piece lies. Each seed draws
other backgrounds and trains with other weights; the AUROC is that of the anomaly score on test images.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from quality_data import skimage_data
from sklearn.metrics import roc_auc_score

import csflow
from csflow.demo import photographs

SIDE, RADIUS = 300, 115
TRAINING, TEST = 400, 200
"""Images; half of the test images are defective."""
NOISE = 2.0
"""Standard deviation of the camera's noise, in grey levels."""
TEXTURES = ("brick.png", "grass.png", "gravel.png")


def piece() -> NDArray[np.bool_]:
    """The circle (H, W) in which the part lies."""
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2
    inside_HW: NDArray[np.bool_] = np.hypot(y, x) <= RADIUS
    return inside_HW


def background(textures: list[NDArray[np.uint8]], random: np.random.Generator) -> NDArray[np.float64]:
    texture = textures[random.integers(len(textures))]
    top, left = (random.integers(side - SIDE) for side in texture.shape)
    cut_HW = np.rot90(texture[top : top + SIDE, left : left + SIDE], random.integers(4))
    return cut_HW * random.uniform(0.5, 1.2)


def write_images(folder: Path, seed: int, is_still: bool) -> None:
    """Writes `train`, `good` and `bad` and the mask of one seed."""
    random = np.random.default_rng(seed)
    textures = [
        np.asarray(Image.open(skimage_data() / name).convert("L").resize((512, 512))) for name in TEXTURES
    ]
    listed = sorted(photographs())
    normal = [path for path, probability, _ in listed if probability == 0]
    defective = [path for path, probability, _ in listed if probability == 1]
    random.shuffle(normal)
    random.shuffle(defective)
    parts = {
        "train": normal[:TRAINING],
        "good": normal[TRAINING : TRAINING + TEST // 2],
        "bad": defective[: TEST // 2],
    }
    inside_HW, still_HW = piece(), background(textures, random)
    for part, paths in parts.items():
        (folder / part).mkdir(parents=True)
        for number, path in enumerate(paths):
            cell_HW = np.asarray(Image.open(path).convert("L").resize((SIDE, SIDE)), np.float64)
            around_HW = still_HW if is_still else background(textures, random)
            image_HW = np.where(inside_HW, cell_HW, around_HW) + random.normal(0, NOISE, cell_HW.shape)
            file = folder / part / f"{number:03}.png"
            Image.fromarray(image_HW.clip(0, 255).astype(np.uint8)).save(file)
    Image.fromarray(inside_HW.astype(np.uint8) * 255).save(folder / "mask.png")


def measure(folder: Path, seed: int, settings: dict[str, Any]) -> dict[str, float]:
    model = folder / "model" / Path(settings.get("mask", "none")).stem
    settings = {"calibration": "holdout", "seed": seed, "overwrite": True} | settings
    csflow.train(input=[str(folder / "train")], output=str(model), **settings)
    judge = csflow.load(model)
    scores = {
        part: [result.anomaly_score for result in judge.score(sorted((folder / part).iterdir()))]
        for part in ("good", "bad")
    }
    labels = [0] * len(scores["good"]) + [1] * len(scores["bad"])
    threshold = np.quantile(scores["good"], 0.95)
    return {
        "auroc": float(roc_auc_score(labels, scores["good"] + scores["bad"])),
        "found": float(np.mean(np.array(scores["bad"]) > threshold)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--still", action="store_true")
    arguments = parser.parse_args()
    print("| seed | mask | AUROC | found at 5 % FPR |\n|---|---|---|---|")
    for seed in arguments.seeds:
        folder = arguments.work / str(seed)
        if not folder.exists():
            write_images(folder, seed, arguments.still)
        masks = {"no": {}, "yes": {"mask": str(folder / "mask.png")}}
        masks |= {"auto": {"mask": "auto"}} if arguments.still else {}
        for name, settings in masks.items():
            found = measure(folder, seed, settings | {"image_size": [arguments.image_size]})
            (folder / f"{name}.json").write_text(json.dumps(found))
            print(f"| {seed} | {name} | {found['auroc']:.3f} | {found['found']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
