"""The closed-form part of a training: one pass over the features of the training images, before the flow."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import ray
import safetensors.torch
import torch
from torch import Tensor

from csflow.model import Moments, PositionGaussian, Whitening, gaussians_of
from csflow.storage import Location
from csflow.training.cache import FeatureCache
from csflow.training.sources import FeatureSource, open_features

BATCH_SIZE = 32


@dataclass(frozen=True)
class Gaussians:
    """What the flow's input is whitened with, and the Gaussian of each position behind that."""

    whitening: Whitening
    positions: PositionGaussian

    def write(self, location: Location) -> None:
        state = {f"whitening.{k}": v for k, v in self.whitening.state_dict().items()}
        state |= {f"gaussian.{k}": v for k, v in self.positions.state_dict().items()}
        location.write(safetensors.torch.save(state))

    @classmethod
    def read(cls, location: Location, cache: FeatureCache, device: torch.device) -> "Gaussians":
        """What `write` has written for features of this cache."""
        state = safetensors.torch.load(location.read())
        gaussians = cls(Whitening(cache.feature_shapes), PositionGaussian(cache.feature_shapes))
        for name, module in (("whitening.", gaussians.whitening), ("gaussian.", gaussians.positions)):
            module.load_state_dict({k.removeprefix(name): v for k, v in state.items() if k.startswith(name)})
            module.to(device)
        return gaussians


def fit_gaussians(source: FeatureSource) -> Gaussians:
    """Those of the images of a source, which are not whitened."""
    levels: list[Moments] = []
    for y in source.batches(0, torch.arange(len(source)).split(BATCH_SIZE)):
        levels = levels or [Moments.around(y_BCHW) for y_BCHW in y]
        levels = [moments.with_images(y_BCHW) for moments, y_BCHW in zip(levels, y, strict=True)]
    return Gaussians(*gaussians_of(levels))


def write_gaussians(cache: FeatureCache, images: pa.Table, location: Location) -> None:
    """Fits the Gaussians of these images on one CPU of the cluster, whatever number trains, and writes them.

    Args:
        images: rows in the `INDEX` schema.
    """

    @ray.remote(num_cpus=1, max_retries=3)
    def fit() -> None:
        # Streamed: features may be more than one worker holds.
        source = open_features(cache, images, memory_bytes=0, device=torch.device("cpu"))
        fit_gaussians(source).write(location)

    ray.get(fit.remote())


def gaussian_losses(energies: Sequence[Tensor], gaussians: Gaussians) -> Tensor:
    """Loss of each image if the Gaussian of each position were the whole model, (N,).

    Args:
        energies: of the Gaussian, per level (N, H, W).
    """
    sizes = [gaussians.whitening.mean(level).numel() for level in range(len(energies))]
    log_det = gaussians.whitening.log_det() + gaussians.positions.log_det()
    squares_N = torch.stack(
        [size * energy_NHW.mean((1, 2)) for size, energy_NHW in zip(sizes, energies, strict=True)]
    ).sum(0)
    return (squares_N / 2 - log_det) / sum(sizes)
