"""Detection quality of the flow and of what it has to beat, on the data sets of `quality_data.py`.

    python benchmarks/quality.py run --data quality/data --work quality             # for hours
    python benchmarks/quality.py run --data quality/data --work quality --settings demo --names elpv
    python benchmarks/quality.py table --work quality             # what has finished so far, in Markdown

`run` trains as `jobs/train.py` does, with the same parts but in this process, and tests on images that
training never saw. It writes a line of `flows.jsonl` for each setting, data set and seed, and continues where
it was stopped. `table` joins these lines with those of `baselines.py` and `anomalib_quality.py` in the same
folder. Features are extracted once, are the same for all but anomalib, and their time is not counted.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from quality_data import TestImage, add_run_arguments, prepare, test_images
from quality_features import CPU, IN_MEMORY, CachedImages, cached_images
from quality_figures import image_figures, pixel_figures, validity
from quality_table import tables

from csflow import process
from csflow.model import Gaussians, PlainStatistic, Scores, fitted_statistic
from csflow.training.config import TrainConfig
from csflow.training.gaussians import fit_gaussians, gaussian_losses
from csflow.training.loop import LoopSettings, Trainer, Worker
from csflow.training.recipe import RECIPES
from csflow.training.sources import FeatureSource, open_features

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "former default": {
        "recipe": "paper",
        "cut_after": ["blocks.5"],
        "scales": 3,
        "coupling_blocks": 1,
        "hidden_channels": 256,
        "epochs": 30,
        "patience": 10,
        "learning_rate": 2e-4,
    },
    "default, 1 block": {"coupling_blocks": 1},
    "default, 4 blocks": {"coupling_blocks": 4},
    # Its 240 epochs would take a core the better part of a day.
    "paper, 4 epochs": {"recipe": "paper", "epochs": 4},
    "demo": {"epochs": 3},
}
"""Flags of the training job by the name of their row."""
WORKER = Worker(rank=0, world_size=1, device=CPU)


class Training:
    """One training and what it takes to score with it."""

    def __init__(self, config: TrainConfig, images: CachedImages) -> None:
        self._images = images
        started = time.process_time()
        self.gaussians: Gaussians | None = None
        if RECIPES[config.recipe].whitening:
            self.gaussians = fit_gaussians(self._part("training", whitened=False))
        self.trainer = Trainer(
            LoopSettings.of(config, images.data.subset("training").num_rows),
            WORKER,
            self._part("training"),
            self._part("validation"),
            self.gaussians,
        )
        while not self.trainer.is_finished:
            self.trainer.run_epoch()
        self.trainer.whiten_latents(self.trainer.training)
        self.cpu_seconds = time.process_time() - started
        """Gaussians, flow, and reading the features of its images."""
        self.usual = self.trainer.evaluate(self.trainer.validation)
        shapes = images.cache.feature_shapes
        self._statistic = (
            fitted_statistic(self.usual.energies, shapes) if self.gaussians else PlainStatistic(shapes)
        )

    def gaussian_loss(self) -> float | None:
        """Validation loss of the Gaussian of each position; None without whitening."""
        if self.gaussians is None:
            return None
        levels = len(self._images.cache.feature_shapes)
        return float(gaussian_losses(self.usual.energies[:levels], self.gaussians).mean())

    def batches(self, part: str) -> Iterator[list[torch.Tensor]]:
        """Whitened features of a part of the training job's images."""
        source = self._part(part)
        return source.batches(0, list(torch.arange(len(source)).split(32)))

    def heldout(self) -> Scores:
        return self._scores(self._part("heldout"))

    def test(self) -> Scores:
        return self._scores(self._open(self._images.test, whitened=True))

    @torch.no_grad()
    def _scores(self, source: FeatureSource) -> Scores:
        scores: Scores = self._statistic(self.trainer.evaluate(source).energies)
        return scores

    def _part(self, name: str, whitened: bool = True) -> FeatureSource:
        return self._open(self._images.data.subset(name), whitened)

    def _open(self, images: Any, whitened: bool) -> FeatureSource:
        whitening = self.gaussians.whitening if self.gaussians and whitened else None
        return open_features(self._images.cache, images, IN_MEMORY, CPU, whitening)


def measure(config: TrainConfig, folder: Path, features: Path) -> dict[str, Any]:
    """Trains once and tests: the figures of one line."""
    training = Training(config, cached_images(config, folder, features))
    trainer, tested = training.trainer, test_images(folder)
    heldout, scores = training.heldout(), training.test()
    line: dict[str, Any] = {
        "train_cpu_seconds": training.cpu_seconds,
        "epochs": len(trainer.history),
        "best_epoch": trainer.best_epoch,
        "parameters": sum(p.numel() for p in trainer.plain_flow.parameters()),
        "validation_loss": training.usual.losses_N.mean().item(),
        "gaussian_loss": training.gaussian_loss(),
    }
    line |= score_figures(scores.anomaly_score_B, heldout.anomaly_score_B, tested)
    if training.gaussians is not None:
        for name, part in (("global", "global_score_B"), ("local", "local_score_B")):
            figures = score_figures(getattr(scores, part), getattr(heldout, part), tested)
            line |= {f"{name}_{figure}": value for figure, value in figures.items()}
    return line | pixel_figures(scores.anomaly_map_BHW.numpy(), tested)


def score_figures(scores_N: torch.Tensor, heldout_N: torch.Tensor, tested: list[TestImage]) -> dict[str, Any]:
    scores, heldout = as_float64(scores_N), as_float64(heldout_N)
    return image_figures(scores, heldout, tested) | validity(scores, heldout, tested)


def as_float64(values_N: torch.Tensor) -> NDArray[np.float64]:
    return values_N.double().numpy()


def run(arguments: argparse.Namespace) -> None:
    process.set_up(arguments.threads, gpus=0)
    results: Path = arguments.work / "flows.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {(line["data"], line["detector"], line["seed"]) for line in lines}
    for setting in arguments.settings:
        for name in arguments.names:
            for seed in arguments.seeds:
                key = {"data": name, "detector": setting, "seed": seed}
                if tuple(key.values()) in done:
                    continue
                folder = prepare(name, arguments.data)
                flags = {"input": [str(folder)], "output": "unused", "seed": seed} | SETTINGS[setting]
                config = TrainConfig.model_validate(flags)
                line = key | measure(config, folder, arguments.work / "features")
                with results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=["run", "table"])
    parser.add_argument("--work", type=Path, required=True, help="folder of features and results")
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    add_run_arguments(parser)
    arguments = parser.parse_args()
    if arguments.step == "run":
        run(arguments)
    else:
        print(tables(arguments.work))


if __name__ == "__main__":
    main()
