"""Augmented copies of training images, extracted anew in every epoch, since no cache can hold them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from csflow.errors import ImageError
from csflow.inputs.loading import ImageLoader
from csflow.inputs.reading import ImageReader
from csflow.model import Architecture, Whitening
from csflow.training.cache import FeatureCache
from csflow.training.features import READ_THREADS, load_backbone

BRIGHTNESS = 0.1
"""The largest relative change of brightness."""


@dataclass(frozen=True)
class AugmentedFeatures:
    """Features of training images as they look in this epoch: read, decoded, changed, through the backbone.

    The change of an image depends only on seed, epoch and image, whichever worker makes it.
    """

    cache: FeatureCache
    architecture: Architecture
    images: pa.Table
    """Rows in the `INDEX` schema."""
    device: torch.device
    whitening: Whitening | None

    @property
    def feature_shapes(self) -> Sequence[Sequence[int]]:
        return self.cache.feature_shapes

    @property
    def inside(self) -> Sequence[Tensor] | None:
        return self.cache.inside

    def __len__(self) -> int:
        return int(self.images.num_rows)

    def batches(self, epoch: int, shares: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """As in `FeatureSource`; raises ImageError if an image can no longer be read."""
        detector = load_backbone(self.architecture, self.cache).to(self.device)
        loader = ImageLoader(
            ImageReader(self.cache.folder.storage_options),
            self.architecture.preprocessing,
            READ_THREADS,
            limits=self.cache.limits,
        )
        order = torch.cat([*shares, torch.empty(0, dtype=torch.int64)]).tolist()
        rows = self.images.take(pa.array(order, pa.int64()))
        loaded = loader.load(rows["image_uri"].to_pylist(), rows["image_version"].to_pylist())
        for share in shares:
            pixels = []
            for position, image in zip(share.tolist(), islice(loaded, len(share)), strict=True):
                if isinstance(image.content, ImageError):
                    raise image.content
                random = np.random.default_rng((self.architecture.seed, epoch, position))
                pixels.append(augment(image.content.pixels_HWC, random))
            y = detector.features(torch.from_numpy(np.stack(pixels)).to(self.device))
            yield self.whitening(y) if self.whitening is not None else y


def augment(pixels_HWC: NDArray[np.uint8], random: np.random.Generator) -> NDArray[np.uint8]:
    """The image, flipped, turned by quarters (by halves if it is no square), and brighter or darker."""
    height, width, _ = pixels_HWC.shape
    turns = int(random.integers(4)) if height == width else 2 * int(random.integers(2))
    if random.integers(2):
        pixels_HWC = pixels_HWC[:, ::-1]
    factor = 1 + random.uniform(-BRIGHTNESS, BRIGHTNESS)
    turned_HWC = np.rot90(pixels_HWC, turns).astype(np.float32) * factor
    return np.ascontiguousarray(turned_HWC.round().clip(0, 255).astype(np.uint8))
