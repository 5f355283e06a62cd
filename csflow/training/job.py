"""The training job: lists normal images, extracts their features once, trains, writes a model directory."""

import hashlib
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train
import ray.train.torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.util.queue import Queue

import csflow
from csflow.cluster import WorkerResources, connect, share_out
from csflow.errors import ExitStatus, WrongUse
from csflow.inputs.listing import list_table
from csflow.model import BackboneError, Detector, load_weights
from csflow.model_directory import CALIBRATION, holds_model, save_model, worker_bytes
from csflow.storage import Location
from csflow.training.card import CARD, curves_svg
from csflow.training.config import TrainConfig
from csflow.training.features import cache_folder, extract, load_features, uncached
from csflow.training.loop import LoopSettings, read_checkpoint, train_worker, with_prefix
from csflow.training.shards import Shard, cut, fingerprint
from csflow.weights import find_weights

SHARD_SIZE = 64
WORKER_RETRIES = 3


@dataclass(frozen=True)
class Split:
    """The listed images, divided."""

    training: tuple[Shard, ...]
    heldout: tuple[Shard, ...]


def train(config: TrainConfig) -> ExitStatus:
    """Runs the job. Raises WrongUse before any cluster work starts if a setting or input is wrong."""
    output = Location(config.output, config.storage_options)
    if holds_model(output) and not (config.overwrite or config.resume):
        raise WrongUse(f"--output {output} already holds a model; choose another, or pass --overwrite")
    output.check_writable()
    detector = _build_detector(config)
    images = list_table(config.input, config.storage_options)
    split = split_images(images, config.holdout, config.seed)
    print(f"{images.num_rows} images listed, {sum(map(len, split.heldout))} of them held out for calibration")

    connect()
    work_dir = Location(config.work_dir, config.storage_options) if config.work_dir else output / "_work"
    features = cache_folder(work_dir / "features", detector)
    if not _extract_features(split, detector, features):
        return ExitStatus.INCOMPLETE
    resources = share_out(config.workers)
    checkpoint = _fit(config, split, features, work_dir, resources)
    model_id = _save(config, output, detector, split, features, checkpoint, images)
    print(f"model {model_id} written to {output}")
    return ExitStatus.DONE


def split_images(images: pa.Table, holdout: float, seed: int) -> Split:
    """Sets aside the held-out share, chosen by hash so that an image keeps its side as the data grow.

    Raises:
        WrongUse: either side would be empty.
    """
    uris = images["image_uri"].to_pylist()
    versions = images["image_version"].to_pylist()
    heldout = round(len(uris) * holdout)
    if not 0 < heldout < len(uris):
        raise WrongUse(
            f"--holdout {holdout} of {len(uris)} images leaves {heldout} for calibration and "
            f"{len(uris) - heldout} for training; both need at least one: add images"
        )
    order = sorted(range(len(uris)), key=lambda i: hashlib.sha256(f"{seed} {uris[i]}".encode()).digest())

    def shards(indices: Sequence[int]) -> tuple[Shard, ...]:
        chosen = sorted(indices)
        return tuple(cut([uris[i] for i in chosen], [versions[i] for i in chosen], SHARD_SIZE))

    return Split(training=shards(order[heldout:]), heldout=shards(order[:heldout]))


def _build_detector(config: TrainConfig) -> Detector:
    try:
        detector = Detector(config.architecture())
        load_weights(detector.backbone, find_weights(config.weights, config.backbone, config.storage_options))
    except BackboneError as error:
        raise WrongUse(f"--backbone, --weights: {error}") from None
    except ValueError as error:
        raise WrongUse(str(error)) from None
    return detector


def _extract_features(split: Split, detector: Detector, folder: Location) -> bool:
    """Fills the feature cache; returns whether it is complete, but for images that stay unreadable."""
    started = time.monotonic()
    shards = [*split.training, *split.heldout]
    unreadable: list[str] = []
    is_complete, images = True, 0
    for row in extract(
        shards,
        detector,
        folder,
        share_out(None, worker_bytes(sum(value.nbytes for value in detector.state_dict().values()))),
    ):
        images += row["images"]
        unreadable += row["errors"]
        is_complete &= not row["is_transient"]
    seconds = time.monotonic() - started
    cached = sum(map(len, shards)) - images - len(unreadable)
    print(f"features: {images} images extracted in {seconds:.0f} s, {cached} in the cache")
    for error in unreadable:
        print(f"left out: {error}")
    if uncached(shards, folder) or not is_complete:
        print("INCOMPLETE: some images could not be read this time; the same command tries them again")
        return False
    return True


def _fit(
    config: TrainConfig, split: Split, features: Location, work_dir: Location, resources: WorkerResources
) -> ray.train.Checkpoint:
    """Trains under Ray Train and returns the last checkpoint."""
    settings = LoopSettings(
        architecture=config.architecture(),
        features=features,
        training_shards=split.training,
        heldout_shards=split.heldout,
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        checkpoint_epochs=config.checkpoint_epochs,
        resources=resources,
    )
    name = _run_name(settings)
    runs = work_dir / "training"
    if not config.resume and (runs / name).exists():
        (runs / name).fs.rm((runs / name).path, recursive=True)
    progress = Queue(actor_options={"num_cpus": 0})
    printer = threading.Thread(target=_print_progress, args=(progress, config.epochs), daemon=True)
    printer.start()
    trainer = ray.train.torch.TorchTrainer(
        lambda: train_worker(settings, progress),
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker={"CPU": resources.cpus},
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=runs.path,
            storage_filesystem=PyFileSystem(FSSpecHandler(runs.fs)),
            failure_config=ray.train.FailureConfig(max_failures=WORKER_RETRIES),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
    )
    result = trainer.fit()
    progress.put(None)
    printer.join()
    progress.shutdown()
    if result.checkpoint is None:
        raise RuntimeError(f"training ended without a checkpoint below {runs}")
    return result.checkpoint


def _run_name(settings: LoopSettings) -> str:
    """Names a training by what decides its result, so that --resume cannot continue another one."""
    shards = [[shard.name for shard in part] for part in (settings.training_shards, settings.heldout_shards)]
    decides = [
        settings.architecture.to_json(),
        settings.features.url,
        shards,
        settings.epochs,
        settings.batch_size,
        settings.learning_rate,
    ]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]


def _print_progress(progress: Queue, epochs: int) -> None:
    while (line := progress.get()) is not None:
        left = line["seconds"] * (epochs - line["epoch"])
        print(
            f"epoch {line['epoch']}/{epochs}  loss {line['loss']:.4f}  held-out {line['heldout_loss']:.4f}  "
            f"{line['images_per_second']:.0f} images/s  {left:.0f} s left",
            flush=True,
        )


def _save(
    config: TrainConfig,
    output: Location,
    detector: Detector,
    split: Split,
    features: Location,
    checkpoint: ray.train.Checkpoint,
    images: pa.Table,
) -> str:
    """Writes the model directory; returns the model id."""
    tensors, progress = read_checkpoint(checkpoint)
    history, training_images = progress["history"], progress["training_images"]
    detector.flow.load_state_dict(with_prefix(tensors, "flow."))
    heldout = load_features(features, split.heldout)
    scores = tensors["calibration"].double().numpy()
    calibration = pa.table([heldout.image_uris, heldout.image_versions, scores], schema=CALIBRATION)
    settings = config.model_dump(mode="json", exclude={"storage_options"})
    unreadable = images.num_rows - training_images - len(scores)
    card = CARD.format(
        backbone=config.backbone,
        blocks=config.coupling_blocks,
        plural="" if config.coupling_blocks == 1 else "s",
        height=config.image_size[0],
        width=config.image_size[-1],
        csflow_version=csflow.__version__,
        training_images=training_images,
        heldout_images=len(scores),
        unreadable_images=unreadable,
        epochs=len(history),
        loss=history[-1]["loss"],
        heldout_loss=history[-1]["heldout_loss"],
        score_median=np.median(scores),
        score_95=np.quantile(scores, 0.95),
        smallest_p_value=1 / (len(scores) + 1),
        settings=json.dumps(settings, indent=2),
    )
    data: dict[str, Any] = {
        "images": images.num_rows,
        "fingerprint": fingerprint(images["image_uri"].to_pylist(), images["image_version"].to_pylist()),
        "training_images": training_images,
        "heldout_images": len(scores),
        "unreadable_images": unreadable,
    }
    return save_model(
        output,
        detector,
        calibration,
        training=settings,
        data=data,
        metrics={"history": history},
        card={"README.md": card.encode(), "curves.svg": curves_svg(history)},
    )
