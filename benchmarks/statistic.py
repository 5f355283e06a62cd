"""How the anomaly statistic was chosen: by pseudo-defects in held-out normal images, and by no test image.

    python benchmarks/statistic.py --data quality/data --work quality

Trains the default on each data set of `quality_data.py`. Then it draws a pseudo-defect into every held-out
image: a patch or a strip of the image itself from another place (as CutPaste by Li et al., arXiv 2104.04015),
or a larger area that is a little brighter or darker. For each variant of the statistic it prints the AUROC of
these images against the same without, over small, large and tiny pseudo-defects.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from quality import Training
from quality_data import add_run_arguments, prepare
from quality_features import cached_images
from scipy import ndimage
from sklearn.metrics import roc_auc_score
from torch import Tensor

from csflow import process
from csflow.images import decode
from csflow.model import Detector, StandardisedStatistic, fitted_statistic
from csflow.model.detector import energies_of
from csflow.training.config import TrainConfig
from csflow.training.job import build_detector

Image_HW = NDArray[np.uint8]
FEWEST = 150
"""Pseudo-defects of each kind, if there are fewer held-out images."""
AREAS = {"small": (0.001, 0.02), "large": (0.03, 0.3), "tiny": (0.0005, 0.005)}
"""Least and largest share of the image."""
WINDOWS = (1, 3)
"""Sides; 1 for latents behind the last layer, without windows."""


def pasted(size: str, image_HW: Image_HW, rng: Generator, number: int) -> Image_HW:
    """With a patch or, every other time, a strip of the image itself from another place."""
    height, width = image_HW.shape
    ratio = rng.uniform(1, 3) if number % 2 == 0 else rng.uniform(8, 20)
    u, v, a, b = _turned(rng, height, width, AREAS[size], ratio, 2)
    alpha_HW = ((abs(u) <= a) & (abs(v) <= max(b, 0.8))).astype(np.float32)
    shift = [int(rng.uniform(0.2, 0.8) * side) for side in (height, width)]
    other_HW = np.roll(image_HW, shift, (0, 1)).astype(np.float32) * rng.uniform(0.75, 1.25)
    return _blended(image_HW, other_HW, ndimage.gaussian_filter(alpha_HW, rng.uniform(0.4, 1.5)))


def large(image_HW: Image_HW, rng: Generator, number: int) -> Image_HW:
    """With an ellipse that is a little brighter or darker."""
    u, v, a, b = _turned(rng, *image_HW.shape, AREAS["large"], rng.uniform(1, 4), math.sqrt(math.pi))
    alpha_HW = ((u / a) ** 2 + (v / b) ** 2 <= 1).astype(np.float32)
    changed_HW = image_HW * np.float32(1 + rng.uniform(0.1, 0.3) * rng.choice([-1, 1]))
    return _blended(image_HW, changed_HW, ndimage.gaussian_filter(alpha_HW, rng.uniform(2, 12)))


KINDS: dict[str, Callable[[Image_HW, Generator, int], Image_HW]] = {
    "small": partial(pasted, "small"),
    "large": large,
    "tiny": partial(pasted, "tiny"),
}


def _turned(
    rng: Generator, height: int, width: int, areas: tuple[float, float], ratio: float, sides: float
) -> tuple[NDArray[np.float32], NDArray[np.float32], float, float]:
    """Coordinates along and across a shape at a random place and angle, and its half sides."""
    area = math.exp(rng.uniform(*map(math.log, areas))) * height * width
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle, (row, column) = rng.uniform(0, math.pi), rng.uniform(0.1, 0.9, 2) * (height, width)
    u = (x - column) * math.cos(angle) + (y - row) * math.sin(angle)
    v = (y - row) * math.cos(angle) - (x - column) * math.sin(angle)
    return u, v, math.sqrt(area * ratio) / sides, math.sqrt(area / ratio) / sides


def _blended(image_HW: Image_HW, other_HW: NDArray[np.float32], alpha_HW: NDArray[np.float32]) -> Image_HW:
    return np.clip(np.rint(image_HW + alpha_HW * (other_HW - image_HW)), 0, 255).astype(np.uint8)


class Energies:
    """Energy maps of images by side of the window."""

    @torch.no_grad()
    def __init__(self, training: Training, batches: Iterator[list[Tensor]]) -> None:
        """`batches` are whitened features."""
        gaussians, flow = training.gaussians, training.trainer.plain_flow
        assert gaussians is not None
        parts: dict[int, list[list[Tensor]]] = {window: [] for window in WINDOWS}
        for x in batches:
            z = flow(x).z
            for window, maps in parts.items():
                maps.append(energies_of(gaussians, x, z, window))
        self.of = {window: [torch.cat(maps) for maps in zip(*p, strict=True)] for window, p in parts.items()}


def pseudo_defects(
    training: Training, detector: Detector, uris: Sequence[str], kind: str, seed: int
) -> Iterator[list[Tensor]]:
    """Whitened features of these images with a pseudo-defect each."""
    assert training.gaussians is not None
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    for start in range(0, len(uris), 32):
        images = []
        for number, uri in enumerate(uris[start : start + 32]):
            plain = decode(Path(uri).read_bytes(), detector.architecture.preprocessing).pixels_HWC
            images.append(np.repeat(KINDS[kind](plain[..., 0], rng, number)[..., None], 3, axis=2))
        yield training.gaussians.whitening(detector.features(torch.from_numpy(np.stack(images))))


def one_average(statistic: StandardisedStatistic, name: str) -> StandardisedStatistic:
    """The statistic with the broad or the fine average alone, or with `both`."""
    if name != "both":
        weight_E = statistic.weight_E if name == "broad" else statistic.fine_weight_E
        statistic.weight_E.copy_(weight_E)
        statistic.fine_weight_E.copy_(weight_E)
        statistic.fine_line_2.copy_(torch.tensor([1.0, 0.0]))
    return statistic


@torch.no_grad()
def measure(name: str, seed: int, data: Path, features: Path) -> dict[tuple[int, str], list[float]]:
    """AUROC over each of the `KINDS`, by window and average."""
    folder = prepare(name, data)
    config = TrainConfig.model_validate({"input": [str(folder)], "output": "unused", "seed": seed})
    images = cached_images(config, folder, features)
    with torch.enable_grad():
        training = Training(config, images)
    detector = build_detector(config).eval()
    uris = images.data.subset("heldout")["image_uri"].to_pylist()
    uris *= math.ceil(FEWEST / len(uris))
    training.trainer.plain_flow.load_state_dict(training.trainer.best_state)
    usual, heldout = (Energies(training, training.batches(part)) for part in ("validation", "heldout"))
    defective = [Energies(training, pseudo_defects(training, detector, uris, kind, seed)) for kind in KINDS]
    found = {}
    for window in WINDOWS:
        for average in ("broad", "fine", "both"):
            statistic = one_average(fitted_statistic(usual.of[window], images.cache.feature_shapes), average)
            normal_N = statistic(heldout.of[window]).anomaly_score_B
            found[window, average] = [
                auroc(normal_N, statistic(some.of[window]).anomaly_score_B) for some in defective
            ]
    return found


def auroc(normal_N: Tensor, defective_N: Tensor) -> float:
    labels = [0] * len(normal_N) + [1] * len(defective_N)
    return float(roc_auc_score(labels, torch.cat([normal_N, defective_N])))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="folder of features")
    add_run_arguments(parser)
    arguments = parser.parse_args()
    process.set_up(arguments.threads, gpus=0)
    sums: dict[tuple[int, str], list[list[float]]] = {}
    print(f"| data set, seed | window | average | {' | '.join(KINDS)} |\n|{'---|' * (3 + len(KINDS))}")
    for name in arguments.names:
        for seed in arguments.seeds:
            found = measure(name, seed, arguments.data, arguments.work / "features")
            for variant, figures in found.items():
                sums.setdefault(variant, []).append(figures)
                print(line(f"{name}, {seed}", variant, figures), flush=True)
    for variant, all_figures in sums.items():
        print(line("mean", variant, np.mean(all_figures, axis=0).tolist()))


def line(of: str, variant: tuple[int, str], figures: Sequence[float]) -> str:
    return f"| {of} | {variant[0]} | {variant[1]} | {' | '.join(f'{figure:.3f}' for figure in figures)} |"


if __name__ == "__main__":
    main()
