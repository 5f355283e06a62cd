"""The training loop of one worker: DistributedDataParallel over features that stay in memory."""

import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import safetensors.torch
import torch
import torch.distributed
from ray.util.queue import Queue
from torch import Tensor, nn

from csflow import device
from csflow.cluster import WorkerResources
from csflow.model import Architecture, CrossScaleFlow, Detector, negative_log_likelihood
from csflow.storage import Location
from csflow.training.features import FeatureSet, load_features
from csflow.training.shards import Shard
from csflow.training.step import new_optimizer, optimizer_step

SCORING_BATCH_SIZE = 64
STATE_FILE = "state.safetensors"
PROGRESS_FILE = "progress.json"


@dataclass(frozen=True)
class LoopSettings:
    """What every training worker is told."""

    architecture: Architecture
    features: Location
    """Cache folder of the features."""
    training_shards: tuple[Shard, ...]
    heldout_shards: tuple[Shard, ...]
    epochs: int
    batch_size: int
    """Images per optimiser step over all workers."""
    learning_rate: float
    checkpoint_epochs: int
    resources: WorkerResources


@dataclass(frozen=True)
class Epoch:
    """One line of the loss curves."""

    epoch: int
    """Finished epochs, from 1."""
    loss: float
    """Mean training loss over the epoch's images."""
    heldout_loss: float
    grad_norm: float
    """Mean over the epoch's steps, before clipping."""
    images_per_second: float
    """While training; the held-out images are not counted."""
    seconds: float
    """Of the whole epoch."""


def train_worker(settings: LoopSettings, progress: Queue | None) -> None:
    """Trains the flow; reports checkpoints to Ray Train and an `Epoch` each to `progress`."""
    device.set_up(settings.resources.cpus, settings.resources.gpus)
    trainer = _Trainer(settings)
    first_epoch = trainer.restore(ray.train.get_checkpoint())
    for epoch in range(first_epoch, settings.epochs + 1):
        line = trainer.run_epoch(epoch)
        if progress is not None and trainer.rank == 0:
            progress.put(asdict(line))
        if epoch == settings.epochs or epoch % settings.checkpoint_epochs == 0:
            trainer.report_checkpoint(is_last=epoch == settings.epochs)


class _Trainer:
    """State of one worker: its rank, the flow under DDP, the optimiser and the features."""

    def __init__(self, settings: LoopSettings) -> None:
        context = ray.train.get_context()
        self.settings = settings
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        flow = Detector(settings.architecture).flow
        self.flow: nn.Module = ray.train.torch.prepare_model(flow)
        self.optimizer = new_optimizer(self.flow.parameters(), settings.learning_rate)
        self.training = load_features(settings.features, settings.training_shards)
        self.heldout = load_features(settings.features, settings.heldout_shards)
        if not self.training.image_uris or not self.heldout.image_uris:
            raise ValueError("none of the training or held-out images could be read")
        self.history: list[dict[str, Any]] = []

    @property
    def plain_flow(self) -> CrossScaleFlow:
        """The flow without its DDP wrapper."""
        module = self.flow.module if self.world_size > 1 else self.flow
        assert isinstance(module, CrossScaleFlow)
        return module

    def run_epoch(self, epoch: int) -> Epoch:
        started = time.perf_counter()
        loss_sum = torch.zeros((), device=self.device)
        grad_norms = []
        batches = epoch_batches(
            len(self.training.image_uris), self.settings.batch_size, self.settings.architecture.seed, epoch
        )
        for batch in batches:
            loss_sum += self._backward(batch)
            grad_norms.append(optimizer_step(self.flow.parameters(), self.optimizer))
        images = len(self.training.image_uris)
        seconds = time.perf_counter() - started
        line = Epoch(
            epoch=epoch,
            loss=self._sum_over_workers(loss_sum) / images,
            heldout_loss=self._heldout_loss(),
            grad_norm=sum(grad_norms) / len(grad_norms),
            images_per_second=images / seconds,
            seconds=time.perf_counter() - started,
        )
        if not math.isfinite(line.loss):
            raise FloatingPointError(f"the loss became {line.loss} in epoch {epoch}; lower --learning_rate")
        self.history.append(asdict(line))
        return line

    def _backward(self, batch: Tensor) -> Tensor:
        """Gradients of the global batch's mean loss from this worker's share; returns its loss sum.

        DDP averages gradients over workers, whose shares may differ in size: each sum is scaled so that
        the average is the mean over the global batch, whatever the number of workers.
        """
        share = batch[self.rank :: self.world_size]
        weight = 1.0
        if not len(share):
            # A last batch may be smaller than the number of workers, yet all must join the all-reduce.
            share, weight = batch[:1], 0.0
        loss_B = negative_log_likelihood(self.flow(_select(self.training, share, self.device)))
        (loss_B.sum() * (weight * self.world_size / len(batch))).backward()
        return loss_B.detach().sum() * weight

    @torch.no_grad()
    def _heldout_loss(self) -> float:
        indices = torch.arange(len(self.heldout.image_uris))[self.rank :: self.world_size]
        loss_sum = torch.zeros((), device=self.device)
        for share in indices.split(SCORING_BATCH_SIZE):
            y = _select(self.heldout, share, self.device)
            loss_sum += negative_log_likelihood(self.plain_flow(y)).sum()
        return self._sum_over_workers(loss_sum) / len(self.heldout.image_uris)

    def _heldout_scores(self) -> Tensor:
        """Anomaly score of every held-out image, shape (n,)."""
        detector = Detector(self.settings.architecture)
        detector.flow = self.plain_flow
        shares = torch.arange(len(self.heldout.image_uris)).split(SCORING_BATCH_SIZE)
        selected = (_select(self.heldout, share, self.device) for share in shares)
        return torch.cat([detector.score_features(y).anomaly_score_B.cpu() for y in selected])

    def _sum_over_workers(self, value: Tensor) -> float:
        if self.world_size > 1:
            torch.distributed.all_reduce(value)
        return value.item()

    def restore(self, checkpoint: ray.train.Checkpoint | None) -> int:
        """Takes up a checkpoint if there is one; returns the epoch to begin with."""
        if checkpoint is None:
            return 1
        tensors, progress = read_checkpoint(checkpoint)
        self.history = progress["history"]
        self.plain_flow.load_state_dict(with_prefix(tensors, "flow."))
        self.optimizer.load_state_dict(
            _unflatten_optimizer(self.optimizer.state_dict(), with_prefix(tensors, "optimizer."))
        )
        return len(self.history) + 1

    def report_checkpoint(self, is_last: bool) -> None:
        """Stores flow, optimiser and curves; the last one with the held-out images' scores."""
        if self.rank != 0:
            ray.train.report({})
            return
        with tempfile.TemporaryDirectory() as folder:
            state = {f"flow.{k}": v.contiguous() for k, v in self.plain_flow.state_dict().items()}
            state |= _flatten_optimizer(self.optimizer.state_dict())
            if is_last:
                state["calibration"] = self._heldout_scores()
            safetensors.torch.save_file(state, Path(folder) / STATE_FILE)
            progress = {"history": self.history, "training_images": len(self.training.image_uris)}
            (Path(folder) / PROGRESS_FILE).write_text(json.dumps(progress))
            ray.train.report({"epoch": len(self.history)}, ray.train.Checkpoint.from_directory(folder))


def read_checkpoint(checkpoint: ray.train.Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and progress of a checkpoint.

    Tensors' names begin with `flow.` or `optimizer.`; the last checkpoint has `calibration` too, the
    anomaly scores of the held-out images. Progress holds `history`, the loss curves, and the number of
    `training_images`.
    """
    with checkpoint.as_directory() as folder:
        tensors = safetensors.torch.load_file(Path(folder) / STATE_FILE)
        return tensors, json.loads((Path(folder) / PROGRESS_FILE).read_text())


def epoch_batches(images: int, batch_size: int, seed: int, epoch: int) -> Sequence[Tensor]:
    """The global batches of an epoch: a function of seed and epoch, so that a resumed run repeats it."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(images, generator=generator).split(batch_size)


def _select(features: FeatureSet, indices: Tensor, device: torch.device) -> list[Tensor]:
    return [y_BCHW[indices].to(device, non_blocking=True) for y_BCHW in features.features]


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without that beginning."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _flatten_optimizer(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Adam's state as named tensors: safetensors in place of a pickle."""
    return {
        f"optimizer.{index}.{name}": value.contiguous()
        for index, values in state_dict["state"].items()
        for name, value in values.items()
    }


def _unflatten_optimizer(fresh: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": fresh["param_groups"]}
