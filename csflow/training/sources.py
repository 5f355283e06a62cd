"""Sources of a training worker's features: memory, or the cache during training.

All sources give the same batches: the features of the image positions that they are asked for. If the model
sees tiles, then tiles stand in the place of images.

Dimension letters: N images or tiles, D numbers of one of them (all levels, one after the other).
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import pyarrow as pa
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from csflow.errors import DamagedFile
from csflow.model import Whitening
from csflow.training.cache import DTYPES, FeatureCache

WHITENED_AT_ONCE = 64
"""Number of images that are whitened at once."""
PREFETCHED = 4
"""Number of batches that a streaming worker reads ahead."""


class FeatureSource(Protocol):
    @property
    def feature_shapes(self) -> Sequence[Sequence[int]]:
        """Channels, height and width of each level."""

    @property
    def inside(self) -> Sequence[Tensor] | None:
        """The places in the region of interest, as from `Architecture.inside`."""

    def __len__(self) -> int:
        """Number of images or tiles."""

    def batches(self, epoch: int, shares: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """For each list of image positions, the features per level (B, C, H, W), float32, on the device."""


def open_features(
    cache: FeatureCache,
    images: pa.Table,
    memory_bytes: int,
    device: torch.device,
    whitening: Whitening | None = None,
) -> FeatureSource:
    """The features of these images, kept in memory if they take no more than `memory_bytes`.

    Args:
        images: rows in the `INDEX` schema.
        whitening: layer, on the device, whose output replaces the features.
    """
    images = cache.samples(images)
    stored_bytes = sum(DTYPES[dtype].itemsize for dtype in images["dtype"].to_pylist()) * sum(cache.sizes)
    if stored_bytes > memory_bytes:
        return StreamedFeatures(cache, images, device, whitening)
    if device.type == "cuda" and stored_bytes > torch.cuda.mem_get_info(device)[0] // 2:
        return ResidentFeatures(cache, _load(cache, images), device, whitening)
    return ResidentFeatures(cache, _load(cache, images).to(device), device, whitening)


class ResidentFeatures:
    """Features in memory, whitened once, in the precision of the cache."""

    def __init__(
        self,
        cache: FeatureCache,
        features_ND: Tensor,
        device: torch.device,
        whitening: Whitening | None = None,
    ) -> None:
        self.feature_shapes, self.inside = cache.feature_shapes, cache.inside
        self._cache = cache
        self._features_ND = features_ND
        self._device = device
        if whitening is not None:
            for some_ND in features_ND.split(WHITENED_AT_ONCE):
                x = whitening(cache.split_scales(some_ND.to(device).float()))
                x_BD = torch.cat([x_BCHW.flatten(1) for x_BCHW in x], dim=1)
                # An image unlike all others may be beyond float16.
                largest = torch.finfo(some_ND.dtype).max
                some_ND.copy_(x_BD.clamp(-largest, largest))

    def __len__(self) -> int:
        return len(self._features_ND)

    def batches(self, epoch: int, shares: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        for share in shares:
            share_ND = self._features_ND[share.to(self._features_ND.device)]
            yield self._cache.split_scales(share_ND.to(self._device).float())


class StreamedFeatures:
    """Features read from the cache image by image, a few batches ahead, with bounded memory.

    A worker reads only its own images, so that more workers do not mean more traffic.
    """

    def __init__(
        self,
        cache: FeatureCache,
        images: pa.Table,
        device: torch.device,
        whitening: Whitening | None = None,
    ) -> None:
        self.feature_shapes, self.inside = cache.feature_shapes, cache.inside
        self._cache = cache
        self._images = images
        self._device = device
        self._whitening = whitening

    def __len__(self) -> int:
        return self._images.num_rows

    def batches(self, epoch: int, shares: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        waiting: deque[Future[Tensor]] = deque()
        with ThreadPoolExecutor(PREFETCHED, thread_name_prefix="feature-stream") as pool:
            for share in shares:
                waiting.append(pool.submit(self._read, share))
                if len(waiting) > PREFETCHED:
                    yield self._split(waiting.popleft())
            while waiting:
                yield self._split(waiting.popleft())

    def _split(self, share: Future[Tensor]) -> list[Tensor]:
        y = self._cache.split_scales(share.result().to(self._device))
        return self._whitening(y) if self._whitening is not None else y

    def _read(self, share: Tensor) -> Tensor:
        """The features of some images as float32, in the order of the images."""
        rows = self._images.take(pa.array(share.numpy()))
        features_ND = torch.empty(len(share), sum(self._cache.sizes))
        dtypes = rows["dtype"].to_pylist()
        for dtype in set(dtypes):
            positions = [position for position, found in enumerate(dtypes) if found == dtype]
            some = rows.take(pa.array(positions))
            read_ND = self._cache.read_images(some["file"].to_pylist(), some["offset"].to_pylist(), dtype)
            features_ND[positions] = read_ND.float()
        return features_ND


def _load(cache: FeatureCache, images: pa.Table) -> Tensor:
    """Features of these images, (N, D); each file of the cache is read once."""
    dtypes = set(images["dtype"].to_pylist())
    dtype = torch.float16 if dtypes == {"F16"} else torch.float32
    features_ND = torch.empty(images.num_rows, sum(cache.sizes), dtype=dtype)
    positions: dict[str, list[int]] = {}
    for position, name in enumerate(images["file"].to_pylist()):
        positions.setdefault(name, []).append(position)
    offsets = images["offset"].to_pylist()
    for (name, wanted), data in zip(positions.items(), cache.read_files(positions), strict=True):
        try:
            stored_ND = safetensors.torch.load(data)["features"]
        except (SafetensorError, KeyError) as error:
            raise DamagedFile(
                f"{cache.folder / name} of the feature cache is damaged ({error})",
                "delete it, and run the same command again, which makes it anew",
            ) from None
        step = stored_ND[0].nbytes
        start = 8 + int.from_bytes(data[:8], "little")
        rows = [(offsets[position] - start) // step for position in wanted]
        features_ND[wanted] = stored_ND[rows].to(dtype)
    return features_ND
