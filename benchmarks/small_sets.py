"""Few images: a held-out fifth or all images in turn calibrate, on photographs of solar cells.

    python benchmarks/small_sets.py run --work small --images 30 60 100 200 --splits 20 --image_size 64
    python benchmarks/small_sets.py table --work small

Each split draws the images to train on, and 400 new normal ones, from 1,000 functional cells. The defective
ones are the same 200 cells in all splits. `run` trains in this process, with functions of the training job,
and writes a line of `small_sets.jsonl` for each split; it goes on where it was stopped. In the table, figures
are means over splits, ± is the 95 % interval of the mean, and after the comma stands the largest share of new
normal images that a split flags. Splits share photographs, so intervals say little about other products.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from quality_data import prepare
from quality_features import CPU, IN_MEMORY, cached_images
from sklearn.metrics import roc_auc_score
from torch import Tensor

from csflow import process
from csflow.calibration import drift, p_values
from csflow.model import Gaussians, StandardisedStatistic
from csflow.training.cache import INDEX, FeatureCache
from csflow.training.checkpoint import with_prefix
from csflow.training.closing import closing_tensors, cross_closing_tensors
from csflow.training.config import TrainConfig
from csflow.training.cross import train_fold
from csflow.training.gaussians import fit_gaussians
from csflow.training.loop import LoopSettings, Trainer, Worker
from csflow.training.sources import FeatureSource, open_features
from csflow.training.split import FOLDS, SUBSETS, TrainingData

RATES = (0.01, 0.05, 0.1)
NEW, DEFECTIVE = 400, 200
WORKER = Worker(rank=0, world_size=1, device=CPU)


@dataclass(frozen=True)
class Photographs:
    """Features of all images, as rows of their cache."""

    cache: FeatureCache
    functional: pa.Table
    defective: pa.Table

    @classmethod
    def of(cls, config: TrainConfig, work: Path) -> "Photographs":
        found = cached_images(config, prepare("elpv", work / "data"), work / "features")
        parts = [found.data.subset(name) for name in SUBSETS]
        return cls(
            found.cache,
            pa.concat_tables(parts).select(INDEX.names).sort_by("content_digest"),
            found.test.slice(0, DEFECTIVE),  # of the folder `defective`, which comes first
        )

    def opened(self, images: pa.Table, gaussians: Gaussians | None = None) -> FeatureSource:
        return open_features(self.cache, images, IN_MEMORY, CPU, gaussians and gaussians.whitening)

    def fitted(self, images: pa.Table) -> Gaussians:
        return fit_gaussians(self.opened(images))


class Trained(NamedTuple):
    """A training without Ray and model directory."""

    calibration: NDArray[np.float64]
    """Anomaly scores of the held-out images."""
    scores: Callable[[pa.Table], NDArray[np.float64]]
    """The anomaly scores of rows of the cache."""
    epochs: int


def trained(photographs: Photographs, config: TrainConfig, data: TrainingData) -> Trained:
    cache, is_cross = photographs.cache, data.is_cross
    training, validation, heldout = (data.subset(name) for name in SUBSETS)
    gaussians = photographs.fitted(training)
    settings = LoopSettings.of(config, training.num_rows)
    sources = [photographs.opened(part, gaussians) for part in (training, validation)]
    trainer = Trainer(settings, WORKER, *sources, gaussians)
    while not trainer.is_finished:
        trainer.run_epoch()
    trainer.whiten_latents(trainer.training)
    if is_cross:
        folds = [
            train_fold(settings, WORKER, training, fold, photographs.fitted, photographs.opened)
            for fold in range(FOLDS)
        ]
        closing = cross_closing_tensors(folds, gaussians, cache.feature_shapes)
    else:
        of_heldout = trainer.evaluate(photographs.opened(heldout, gaussians))
        closing = closing_tensors(
            trainer.evaluate(trainer.validation), of_heldout, gaussians, cache.feature_shapes
        )
    statistic = StandardisedStatistic(cache.feature_shapes)
    statistic.load_state_dict(with_prefix(closing, "state.statistic."))

    def scores(some: pa.Table) -> NDArray[np.float64]:
        energies = trainer.evaluate(photographs.opened(some, gaussians)).energies
        return as_float64(statistic(energies).anomaly_score_B)

    return Trained(as_float64(closing["calibration.anomaly_score"]), scores, len(trainer.history))


def measured(
    photographs: Photographs, config: TrainConfig, images: pa.Table, new: pa.Table
) -> dict[str, Any]:
    """The figures of one training."""
    started = time.process_time()
    is_cross = config.calibration == "cross"
    data = TrainingData.divide(images, config.validation, config.holdout, config.seed, is_cross)
    model = trained(photographs, config, data)
    seconds = time.process_time() - started
    return {"cpu_seconds": seconds, "epochs": model.epochs} | figures(
        model.calibration, model.scores(new), model.scores(photographs.defective)
    )


def figures(
    calibration: NDArray[np.float64], new: NDArray[np.float64], defective: NDArray[np.float64]
) -> dict[str, Any]:
    labels = [0] * len(new) + [1] * len(defective)
    found: dict[str, Any] = {
        "heldout": len(calibration),
        "auroc": float(roc_auc_score(labels, np.concatenate([new, defective]))),
        "shift": float((new.mean() - calibration.mean()) / calibration.std()),
    }
    for rate in RATES:
        found[f"normal {rate}"] = float((p_values(new, calibration) <= rate).mean())
        found[f"defective {rate}"] = float((p_values(defective, calibration) <= rate).mean())
    change = drift(new, 0.0, calibration)
    return found | {"verdict": change and change.verdict}


def as_float64(values_N: Tensor) -> NDArray[np.float64]:
    return values_N.double().numpy()


def shuffled(images: pa.Table, seed: int) -> pa.Table:
    return images.take(pa.array(np.random.default_rng(seed).permutation(images.num_rows)))


def run(arguments: argparse.Namespace) -> None:
    process.set_up(1, gpus=0)
    results: Path = arguments.work / "small_sets.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    side = arguments.image_size
    config = TrainConfig.model_validate({"input": ["unused"], "output": "unused", "image_size": [side]})
    photographs = Photographs.of(config, arguments.work)
    for split in range(arguments.splits):
        cells = shuffled(photographs.functional, split)
        for images in arguments.images:
            for calibration in arguments.calibrations:
                key = {"side": side, "images": images, "calibration": calibration, "split": split}
                if any(key.items() <= line.items() for line in done):
                    continue
                settings = config.model_copy(update={"calibration": calibration, "seed": split})
                new = cells.slice(cells.num_rows - NEW)
                line = key | measured(photographs, settings, cells.slice(0, images), new)
                with results.open("a") as file:
                    file.write(json.dumps(line) + "\n")


def table(arguments: argparse.Namespace) -> None:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for text in (arguments.work / "small_sets.jsonl").read_text().splitlines():
        line = json.loads(text)
        groups[line["side"], line["images"], line["calibration"]].append(line)
    wanted = " | ".join(f"{rate:.0%}" for rate in RATES)
    print(
        "| px | images | calibration | held out | splits | AUROC "
        f"| normal cells flagged: {wanted} | defective ones: {wanted} | drifts | CPU s |"
    )
    print("|---" * (8 + 2 * len(RATES)) + "|")
    for (side, images, calibration), lines in sorted(groups.items()):
        cells = [side, images, calibration, lines[0]["heldout"], len(lines), mean(lines, "auroc", ".3f")]
        for rate in RATES:
            worst = max(line[f"normal {rate}"] for line in lines)
            cells.append(f"{mean(lines, f'normal {rate}', '.1%')}, {worst:.1%}")
        cells += [mean(lines, f"defective {rate}", ".0%") for rate in RATES]
        drifts = sum(line["verdict"] in ("higher", "lower", "unlike") for line in lines)
        cells += [drifts, f"{np.mean([line['cpu_seconds'] for line in lines]):.0f}"]
        print("| " + " | ".join(map(str, cells)) + " |")


def mean(lines: Sequence[Mapping[str, Any]], name: str, form: str) -> str:
    """The mean over splits, and half its 95 % interval."""
    values = np.array([line[name] for line in lines])
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{values.mean():{form}} ± {half:{form}}" if values.any() else "0"


STEPS: dict[str, Callable[[argparse.Namespace], None]] = {"run": run, "table": table}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=list(STEPS))
    parser.add_argument("--work", type=Path, required=True, help="folder of data, features and results")
    parser.add_argument("--images", type=int, nargs="+", default=[30, 60, 100, 200])
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--calibrations", nargs="+", default=["holdout", "cross"])
    arguments = parser.parse_args()
    STEPS[arguments.step](arguments)


if __name__ == "__main__":
    main()
