"""The training worker under Ray Train: opens features, runs the loop, reports checkpoints and progress."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.compute as pc
import ray.train
import ray.train.torch
import torch
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
from csflow.training.closing import closing_tensors, cross_closing_tensors
from csflow.training.cross import Fold, train_fold
from csflow.training.gaussians import fit_gaussians, read_gaussians
from csflow.training.loop import LoopSettings, Trainer, Worker
from csflow.training.sources import FeatureSource, open_features
from csflow.training.split import FOLDS


@dataclass(frozen=True)
class WorkerSettings:
    """The settings that every training worker receives."""

    loop: LoopSettings
    cache: FeatureCache
    split: Location
    """A Parquet file with the images of each part, and where their features are."""
    gaussians: Location | None
    """The file from `write_gaussians`; None without whitening."""
    is_cross: bool
    """Whether the calibration comes from further trainings (`csflow.training.cross`)."""
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
    features = Features(settings, worker)

    def opened(part: str, augmented: bool = False) -> FeatureSource:
        return features.opened(split.filter(pc.field("subset") == part), gaussians, augmented)

    training, validation = opened("training", settings.augment), opened("validation")
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
    plain = opened("training") if settings.augment else training
    trainer.whiten_latents(plain)
    shapes = settings.cache.feature_shapes
    if settings.is_cross and gaussians:
        _report(trainer, {})  # so that a worker which dies in a fold does not take the training with it
        folds = list(_folds(features, split.filter(pc.field("subset") == "training"), progress))
        _report(trainer, cross_closing_tensors(folds, gaussians, shapes))
        return
    # Without validation images training ones must tell what is usual.
    usual = trainer.evaluate(validation if len(validation) else plain)
    counted = split.filter(pc.field("subset") == ("validation" if len(validation) else "training"))
    heldout, tile_counts = trainer.evaluate(opened("heldout")), settings.cache.tile_counts(counted)
    _report(trainer, closing_tensors(usual, heldout, gaussians, shapes, tile_counts))


def _folds(features: "Features", images: pa.Table, progress: Queue | None) -> Iterator[Fold]:
    """Trains without each fold in turn; tells `progress` how many are done, and the seconds of the last."""
    for fold in range(FOLDS):
        started, settings = time.perf_counter(), features.settings.loop
        yield train_fold(settings, features.worker, images, fold, features.fitted, features.opened)
        if progress is not None and features.worker.rank == 0:
            progress.put({"fold": fold + 1, "seconds": time.perf_counter() - started})


@dataclass(frozen=True)
class Features:
    """Opens the features of images for one worker."""

    settings: WorkerSettings
    worker: Worker

    def opened(self, images: pa.Table, gaussians: Gaussians | None, augmented: bool = False) -> FeatureSource:
        cache, device = self.settings.cache, self.worker.device
        whitening = gaussians.whitening if gaussians else None
        if augmented:
            return AugmentedFeatures(cache, self.settings.loop.architecture, images, device, whitening)
        return open_features(cache, images, self.settings.memory_bytes, device, whitening)

    def fitted(self, images: pa.Table) -> Gaussians:
        """The Gaussians of these images."""
        source = open_features(self.settings.cache, images, memory_bytes=0, device=torch.device("cpu"))
        return fit_gaussians(source).to(self.worker.device)


def _report(trainer: Trainer, closing: dict[str, Tensor]) -> None:
    if trainer.worker.rank != 0:
        ray.train.report({})
        return
    with written_checkpoint(trainer, closing) as folder:
        metrics = {"epoch": len(trainer.history)}
        ray.train.report(metrics, ray.train.Checkpoint.from_directory(folder))
