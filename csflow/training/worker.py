"""The training worker under Ray Train: opens features, runs the loop, reports checkpoints and progress."""

from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.compute as pc
import ray.train
import ray.train.torch
from ray.util.queue import Queue
from torch import Tensor

from csflow import process
from csflow.cluster import WorkerResources
from csflow.errors import DamagedFile
from csflow.model import Gaussians
from csflow.storage import Location, read_parquet
from csflow.training.augmentation import AugmentedFeatures
from csflow.training.cache import FeatureCache
from csflow.training.checkpoint import restore, written_checkpoint
from csflow.training.closing import closing_tensors
from csflow.training.gaussians import read_gaussians
from csflow.training.loop import LoopSettings, Trainer, Worker
from csflow.training.sources import FeatureSource, open_features


@dataclass(frozen=True)
class WorkerSettings:
    """The settings that every training worker receives."""

    loop: LoopSettings
    cache: FeatureCache
    split: Location
    """A Parquet file with the images of each part, and where their features are."""
    gaussians: Location | None
    """The file from `write_gaussians`; None without whitening."""
    augment: bool
    memory_bytes: int
    """Bytes of features to keep in memory; more features are streamed."""
    checkpoint_epochs: int
    resources: WorkerResources


def train_worker(settings: WorkerSettings, progress: Queue | None) -> str | None:
    """Trains the flow; reports checkpoints to Ray Train, and every `Epoch` to `progress`.

    Returns:
        Why the training cannot be finished, however often it is tried; None if it is finished.
    """
    try:
        _train(settings, progress)
    except (FloatingPointError, DamagedFile) as error:
        # Raised it would make Ray Train start the workers anew.
        return str(error)
    return None


def _train(settings: WorkerSettings, progress: Queue | None) -> None:
    process.set_up(settings.resources.cpus, settings.resources.gpus)
    context = ray.train.get_context()
    worker = Worker(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    split = read_parquet(settings.split)
    gaussians = None
    if settings.gaussians is not None:
        gaussians = read_gaussians(settings.gaussians, settings.cache, worker.device)
    parts = Parts(settings, worker, split, gaussians)
    training, validation = parts.open("training", settings.augment), parts.open("validation")
    trainer = Trainer(settings.loop, worker, training, validation, gaussians)
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
    # Opened once where it can be: in memory, a second time would take as much again.
    plain = parts.open("training") if settings.augment else training
    trainer.whiten_latents(plain)
    # Without validation images training ones must tell what is usual.
    usual = trainer.evaluate(validation if len(validation) else plain)
    _report(
        trainer,
        closing_tensors(
            usual, trainer.evaluate(parts.open("heldout")), gaussians, settings.cache.feature_shapes
        ),
    )


@dataclass(frozen=True)
class Parts:
    """Opens the features of each part of the images for one worker."""

    settings: WorkerSettings
    worker: Worker
    split: pa.Table
    gaussians: Gaussians | None

    def open(self, part: str, augmented: bool = False) -> FeatureSource:
        images = self.split.filter(pc.field("part") == part)
        cache, device = self.settings.cache, self.worker.device
        whitening = self.gaussians.whitening if self.gaussians else None
        if augmented:
            return AugmentedFeatures(cache, self.settings.loop.architecture, images, device, whitening)
        return open_features(cache, images, self.settings.memory_bytes, device, whitening)


def _report(trainer: Trainer, closing: dict[str, Tensor]) -> None:
    if trainer.worker.rank != 0:
        ray.train.report({})
        return
    with written_checkpoint(trainer, closing) as folder:
        metrics = {"epoch": len(trainer.history)}
        ray.train.report(metrics, ray.train.Checkpoint.from_directory(folder))
