"""A training worker under Ray Train: opens its features, runs the loop, reports checkpoints and progress."""

from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.compute as pc
import ray.train
import ray.train.torch
from ray.util.queue import Queue
from torch import Tensor

from csflow import device
from csflow.cluster import WorkerResources
from csflow.storage import Location, read_parquet
from csflow.training.augmentation import AugmentedFeatures
from csflow.training.cache import FeatureCache
from csflow.training.checkpoint import restore, written_checkpoint
from csflow.training.loop import LoopSettings, Trainer, Worker
from csflow.training.sources import FeatureSource, open_features


@dataclass(frozen=True)
class WorkerSettings:
    """What every training worker is told."""

    loop: LoopSettings
    cache: FeatureCache
    split: Location
    """Parquet file with the images of each part and where their features are."""
    augment: bool
    memory_bytes: int
    """For features; what is more is streamed."""
    checkpoint_epochs: int
    resources: WorkerResources


def train_worker(settings: WorkerSettings, progress: Queue | None) -> None:
    """Trains the flow; reports checkpoints to Ray Train and an `Epoch` each to `progress`."""
    device.set_up(settings.resources.cpus, settings.resources.gpus)
    context = ray.train.get_context()
    worker = Worker(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    split = read_parquet(settings.split)
    training = _open(settings, worker, split, "training", settings.augment)
    validation = _open(settings, worker, split, "validation")
    trainer = Trainer(settings.loop, worker, training, validation)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            if restore(trainer, folder):
                return
    while not trainer.is_finished:
        line = trainer.run_epoch()
        if progress is not None and worker.rank == 0:
            progress.put(asdict(line))
        if not trainer.is_finished and line.epoch % settings.checkpoint_epochs == 0:
            _report(trainer, {})
    scores_N, losses_N = trainer.evaluate(_open(settings, worker, split, "heldout"))
    _report(trainer, {"calibration": scores_N, "heldout_loss": losses_N.double().mean()})


def _open(
    settings: WorkerSettings, worker: Worker, split: pa.Table, part: str, augmented: bool = False
) -> FeatureSource:
    images = split.filter(pc.field("part") == part)
    if augmented:
        return AugmentedFeatures(settings.cache, settings.loop.architecture, images, worker.device)
    return open_features(settings.cache, images, settings.memory_bytes, worker.device)


def _report(trainer: Trainer, closing: dict[str, Tensor]) -> None:
    if trainer.worker.rank != 0:
        ray.train.report({})
        return
    with written_checkpoint(trainer, closing) as folder:
        metrics = {"epoch": len(trainer.history)}
        ray.train.report(metrics, ray.train.Checkpoint.from_directory(folder))
