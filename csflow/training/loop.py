"""The training loop of one worker: trains the flow under DistributedDataParallel, keeps the best epoch."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from csflow.model import (
    Architecture,
    FlowOutput,
    Gaussians,
    Moments,
    fit_latents,
    negative_log_likelihood,
    new_flow,
)
from csflow.model.detector import energies_of
from csflow.precision import TrainingPrecision, uses_bfloat16
from csflow.training.config import TrainConfig
from csflow.training.recipe import RECIPES
from csflow.training.sources import FeatureSource
from csflow.training.step import annealed, new_optimizer, optimizer_step

SCORING_BATCH_SIZE = 64


@dataclass(frozen=True)
class LoopSettings:
    """The settings that decide the weights, besides the images."""

    architecture: Architecture
    epochs: int
    patience: int
    batch_size: int
    """Number of images per optimiser step, over all workers."""
    micro_batch_size: int | None
    """Largest number of images in one pass of a worker."""
    learning_rate: float
    is_annealed: bool
    adam_epsilon: float
    dropout: float
    precision: TrainingPrecision

    @classmethod
    def of(cls, config: TrainConfig, training_images: int) -> "LoopSettings":
        """The settings of a training job on this many images."""
        recipe = RECIPES[config.recipe]
        return cls(
            architecture=config.architecture(),
            epochs=config.epochs or config.recommended_epochs(training_images),
            patience=config.patience,
            batch_size=config.batch_size,
            micro_batch_size=config.micro_batch_size,
            learning_rate=config.learning_rate,
            is_annealed=recipe.is_annealed,
            adam_epsilon=recipe.adam_epsilon,
            dropout=recipe.dropout(training_images),
            precision=config.precision,
        )


@dataclass(frozen=True)
class Worker:
    """One of the processes that train together, seen by itself."""

    rank: int
    world_size: int
    device: torch.device


@dataclass(frozen=True)
class Epoch:
    """One line of the loss curves."""

    epoch: int
    """Number of the epoch, from 1."""
    loss: float
    """Mean training loss over the images of the epoch."""
    validation_loss: float | None
    """Like the training loss, before latents are whitened; None without validation images."""
    grad_norm: float
    """Mean norm of the gradients over the epoch's steps, before clipping."""
    images_per_second: float
    """Rate of training, not counting validation."""
    seconds: float
    """Duration of the whole epoch."""


@dataclass(frozen=True)
class Evaluation:
    """What a trained flow computes for some images, on the CPU."""

    energies: list[Tensor]
    """Energy maps (N, H, W), as from `csflow.model.energies`."""
    losses_N: Tensor
    """Losses of the whole model, including the layer behind the flow."""


class Trainer:
    """The flow, its optimiser and loss curves in one worker. All workers call its methods together."""

    def __init__(
        self,
        settings: LoopSettings,
        worker: Worker,
        training: FeatureSource,
        validation: FeatureSource,
        gaussians: Gaussians | None = None,
    ) -> None:
        """`gaussians` are those that whitened the sources' features."""
        self.settings, self.worker = settings, worker
        self.training, self.validation = training, validation
        self.gaussians = gaussians
        self._dimensions: int | None = None
        self._whitening_log_det = 0.0
        if gaussians:
            self._dimensions = gaussians.whitening.dimensions()
            self._whitening_log_det = gaussians.whitening.log_det() / self._dimensions
        self._format = _memory_format(worker.device)
        self.plain_flow = (
            new_flow(settings.architecture, training.feature_shapes)
            .to(worker.device)
            .to(memory_format=self._format)
        )
        self._flow: nn.Module = self.plain_flow
        if worker.world_size > 1:
            self._flow = DistributedDataParallel(self.plain_flow, forward_sync_buffers=False)
        self.optimizer = new_optimizer(
            self.plain_flow.parameters(), settings.learning_rate, settings.adam_epsilon
        )
        self.history: list[dict[str, Any]] = []
        self.best_epoch = 0
        self.best_state: dict[str, Tensor] = {}
        # All workers must agree, also on machines that differ.
        native = uses_bfloat16(settings.precision, worker.device)
        self.bfloat16 = self._sum(torch.tensor(float(native), device=worker.device)) == worker.world_size

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are done, or the validation loss has not fallen for `patience` epochs."""
        epochs = len(self.history)
        stops = len(self.validation) > 0 and epochs - self.best_epoch >= self.settings.patience
        return epochs >= self.settings.epochs or (epochs > 0 and stops)

    def run_epoch(self) -> Epoch:
        """Trains one more epoch; keeps its weights if they are best.

        Raises:
            FloatingPointError: a loss or the gradients are no longer finite, for all workers alike.
        """
        epoch, started = len(self.history) + 1, time.perf_counter()
        loss_sum, grad_norms = self._train(epoch)
        loss = self._sum(loss_sum) / len(self.training)
        grad_norm = torch.stack(grad_norms).mean().item()
        seconds = time.perf_counter() - started
        line = Epoch(
            epoch=epoch,
            loss=loss,
            validation_loss=self._validation_loss(),
            grad_norm=grad_norm,
            images_per_second=len(self.training) / seconds,
            seconds=time.perf_counter() - started,
        )
        self._check_finite(line)
        self.history.append(asdict(line))
        self._keep_if_best(line)
        return line

    def _check_finite(self, line: Epoch) -> None:
        figures = {"training loss": line.loss, "gradient": line.grad_norm}
        if line.validation_loss is not None:
            figures["validation loss"] = line.validation_loss
        for name, value in figures.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the {name} became {value} in epoch {line.epoch}; "
                    f"lower --learning_rate, which is {self.settings.learning_rate:g}"
                )

    @torch.no_grad()
    def whiten_latents(self, source: FeatureSource) -> None:
        """Fits the model's last layer to the latents of these images, with the best weights."""
        if self.gaussians is None:
            return
        zero = torch.zeros((), dtype=torch.float64, device=self.worker.device)
        is_tiled = self.gaussians.is_tiled
        region = self.gaussians.whitening.region
        levels = [
            Moments.about(zero.expand(shape[0]), shape, is_tiled, region.inside(level))
            for level, shape in enumerate(source.feature_shapes)
        ]
        shares = self._shares_of_all(source)
        with self._best_weights():
            for y in source.batches(0, shares):
                latents = self.plain_flow(y).z
                levels = [
                    moments.with_images(z_BCHW) for moments, z_BCHW in zip(levels, latents, strict=True)
                ]
        if self.worker.world_size > 1:
            for moments in levels:
                torch.distributed.all_reduce(moments.product_PCC)
        fit_latents(self.gaussians.latents, [replace(moments, images=len(source)) for moments in levels])

    @torch.no_grad()
    def evaluate(self, source: FeatureSource) -> Evaluation:
        """Energy maps and losses of every image, with the best weights."""
        sizes = [(height, width) for _, height, width in source.feature_shapes]
        shapes = [*(sizes if self.gaussians else []), *sizes, ()]
        columns = [torch.zeros(len(source), *shape, device=self.worker.device) for shape in shapes]
        shares = self._shares_of_all(source)
        # That of the last layer is the same for all images, and takes longer than the flow for some.
        latents_log_det = self.gaussians.latents.log_det() if self.gaussians else 0.0
        with self._best_weights():
            for share, x in zip(shares, source.batches(0, shares), strict=True):
                output, window = self.plain_flow(x), self.settings.architecture.latent_window
                energies = energies_of(self.gaussians, x, output.z, window)
                if self.gaussians:
                    whitened = self.gaussians.latents(output.z)
                    output = FlowOutput(whitened, output.log_det_B + latents_log_det)
                for column, value in zip(columns, [*energies, self._losses(output)], strict=True):
                    column[share] = value
        if self.worker.world_size > 1:
            # Each image has one worker, and the others zeros.
            for column in columns:
                torch.distributed.all_reduce(column)
        *maps, losses_N = (column.cpu() for column in columns)
        return Evaluation(maps, losses_N)

    @contextlib.contextmanager
    def _best_weights(self) -> Iterator[None]:
        last_state = {name: value.clone() for name, value in self.plain_flow.state_dict().items()}
        self.plain_flow.load_state_dict(self.best_state)
        yield
        self.plain_flow.load_state_dict(last_state)

    def _losses(self, output: FlowOutput) -> Tensor:
        """The loss (B,) of each image, including the constant log-determinant of the whitening."""
        return negative_log_likelihood(output, self._dimensions) - self._whitening_log_det

    def _train(self, epoch: int) -> tuple[Tensor, list[Tensor]]:
        """One pass over the training images; returns this worker's sum of losses, and the gradient norms."""
        loss_sum = torch.zeros((), device=self.worker.device)
        grad_norms = []
        seed = self.settings.architecture.seed
        batches = epoch_batches(len(self.training), self.settings.batch_size, seed, epoch)
        shares = [self._share(batch) for batch in batches]
        features = self.training.batches(epoch, [part for share in shares for part in share])
        for step, (batch, share) in enumerate(
            zip(batches, shares, strict=True), start=(epoch - 1) * len(batches)
        ):
            if self.settings.is_annealed:
                rate = annealed(self.settings.learning_rate, step, self.settings.epochs * len(batches))
                self.optimizer.param_groups[0]["lr"] = rate
            # DDP averages gradients over workers, whose shares may differ in size. So each sum is scaled such
            # that the average is the mean over the global batch, for any number of workers.
            weight = self.worker.world_size / len(batch) if self.worker.rank < len(batch) else 0.0
            drops = self.settings.dropout > 0
            keeps = self._kept_channels(step, len(batch)) if drops else [None] * len(share)
            for number, keep_BK in enumerate(keeps):
                with self._accumulating(number + 1 < len(keeps)):
                    loss_sum += self._backward(next(features), keep_BK, weight)
            grad_norms.append(optimizer_step(self.plain_flow.parameters(), self.optimizer))
        return loss_sum, grad_norms

    def _share(self, of_batch: Tensor) -> Sequence[Tensor]:
        """This worker's micro-batches of what a global batch has for each of its images."""
        share = of_batch[self.worker.rank :: self.worker.world_size]
        if not len(share):
            # A last batch may be smaller than the number of workers, yet all must join the all-reduce.
            share = of_batch[:1]
        return share.split(self.settings.micro_batch_size or len(share))

    def _kept_channels(self, step: int, images: int) -> Sequence[Tensor]:
        """For dropout, the factors of hidden channels of each micro-batch.

        They depend on seed and step only, so that they are the same for any number of workers and after a
        resumption.
        """
        dropout, seed = self.settings.dropout, self.settings.architecture.seed
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        kept_BK = torch.rand(images, self.plain_flow.hidden_count, generator=generator) >= dropout
        return [part_BK.to(self.worker.device) for part_BK in self._share(kept_BK / (1 - dropout))]

    def _backward(self, y: Sequence[Tensor], keep_BK: Tensor | None, weight: float) -> Tensor:
        """Adds the gradients of the weighted sum of losses; returns the sum of losses."""
        with self._autocast():
            output = self._flow([y_BCHW.contiguous(memory_format=self._format) for y_BCHW in y], keep_BK)
        loss_B = self._losses(output)
        (loss_B.sum() * weight).backward()
        return loss_B.detach().sum() * (weight > 0)

    @torch.no_grad()
    def _validation_loss(self) -> float | None:
        if not len(self.validation):
            return None
        loss_sum = torch.zeros((), device=self.worker.device)
        for y in self.validation.batches(0, self._shares_of_all(self.validation)):
            loss_sum += self._losses(self.plain_flow(y)).sum()
        return self._sum(loss_sum) / len(self.validation)

    def _keep_if_best(self, line: Epoch) -> None:
        is_best = True
        if self.best_epoch and line.validation_loss is not None:
            is_best = line.validation_loss < self.history[self.best_epoch - 1]["validation_loss"]
        if is_best:
            self.best_epoch = line.epoch
            self.best_state = {name: value.clone() for name, value in self.plain_flow.state_dict().items()}

    def _shares_of_all(self, source: FeatureSource) -> list[Tensor]:
        share = torch.arange(len(source))[self.worker.rank :: self.worker.world_size]
        return [part for part in share.split(SCORING_BATCH_SIZE) if len(part)]

    @contextlib.contextmanager
    def _accumulating(self, more_follows: bool) -> Iterator[None]:
        """Stops DDP from averaging gradients before the last micro-batch."""
        if more_follows and isinstance(self._flow, DistributedDataParallel):
            with self._flow.no_sync():
                yield
        else:
            yield

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.worker.device.type, torch.bfloat16, enabled=self.bfloat16)

    def _sum(self, value: Tensor) -> float:
        """The sum over all workers."""
        if self.worker.world_size > 1:
            torch.distributed.all_reduce(value)
        return value.item()


def _memory_format(device: torch.device) -> torch.memory_format:
    """The layout of weights and maps in which the flow trains fastest: half as fast again on GPUs."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def epoch_batches(images: int, batch_size: int, seed: int, epoch: int) -> Sequence[Tensor]:
    """The global batches of an epoch. They depend on seed and epoch only, so a resumed run repeats them."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(images, generator=generator).split(batch_size)
