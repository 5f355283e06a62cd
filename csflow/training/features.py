"""The extraction pass: reads and decodes images that the cache lacks, and runs the backbone on them."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from csflow import process
from csflow.cluster import WorkerResources, helpers, map_shards, on_this_node
from csflow.errors import ImageError
from csflow.inputs.loaded import LoadedImage
from csflow.inputs.loading import LoaderSettings, batches
from csflow.model import Architecture, Detector, InferenceBackbone
from csflow.training.cache import BACKBONE_FILE, FeatureCache, FeatureFile, backbone_bytes
from csflow.training.shards import cut

SHARD_SIZE, SHARDS_PER_WORKER = 64, 4
"""Largest number of images in a shard. Few images are cut so that each worker has several shards: then all
work, and progress shows."""
READ_THREADS = 8
CPU_BATCH_SIZE, GPU_BATCH_SIZE = 8, 32
"""Number of images per backbone pass. More is slower on CPUs: early activations leave the cache."""

RESULT = pa.schema(
    [
        pa.field("images", pa.int64()),  # with features
        pa.field("began_at", pa.timestamp("us", tz="UTC")),
        pa.field("failed_for_now", pa.list_(pa.string())),  # messages of errors that may pass
        pa.field("deep", pa.int64()),  # images of more than 8 bits a sample
        pa.field("range_used", pa.float64()),  # by the brightest of these, as a share
    ]
)


def extract(
    images: pa.Table, detector: Detector, cache: FeatureCache, resources: WorkerResources
) -> Iterator[dict[str, Any]]:
    """Writes the features of these images into the cache; yields a `RESULT` row per finished shard.

    Args:
        images: `image_uri` and `image_version` of images that the cache lacks.
    """
    if not images.num_rows:
        return
    uris, versions = images["image_uri"].to_pylist(), images["image_version"].to_pylist()
    work = [
        {
            "name": shard.name,
            "image_uris": list(shard.image_uris),
            "image_versions": list(shard.image_versions),
        }
        for shard in cut(uris, versions, _images_per_shard(len(uris), cache, resources))
    ]
    # Through the store and not as an argument, so that an actor can start anew on any node.
    (cache.folder / BACKBONE_FILE).write(backbone_bytes(detector))
    yield from map_shards(work, FeatureExtractor, (detector.architecture, cache, resources), resources)


def _shard_size(images: int, resources: WorkerResources) -> int:
    """Number of images in a shard: a multiple of that in a backbone pass, so that passes are full."""
    step = GPU_BATCH_SIZE if resources.gpus else CPU_BATCH_SIZE
    passes = math.ceil(images / (step * SHARDS_PER_WORKER * resources.workers))
    return min(SHARD_SIZE, step * passes)


def _images_per_shard(images: int, cache: FeatureCache, resources: WorkerResources) -> int:
    """Number of images in a shard, fewer if each has tiles."""
    if cache.tiles is None:
        return _shard_size(images, resources)
    return max(1, _shard_size(images * cache.tiles.most, resources) // cache.tiles.most)


def load_backbone(architecture: Architecture, cache: FeatureCache) -> Detector:
    """A detector with the cache's backbone and an untrained flow."""
    detector = Detector(architecture, cache.feature_shapes)
    state = safetensors.torch.load((cache.folder / BACKBONE_FILE).read())
    detector.load_state_dict(state, strict=False)
    return detector


class FeatureExtractor:
    """The actor of the extraction pass."""

    def __init__(self, architecture: Architecture, cache: FeatureCache, resources: WorkerResources) -> None:
        resources = on_this_node(resources)
        self._device = process.set_up(resources.cpus, resources.gpus)
        detector = load_backbone(architecture, cache).to(self._device)
        batch_size = GPU_BATCH_SIZE if resources.gpus else CPU_BATCH_SIZE
        self._backbone = InferenceBackbone(detector, "float32", batch_size)
        self._cache = cache
        settings = LoaderSettings(
            cache.folder.storage_options, architecture.preprocessing, with_sha256=True, limits=cache.limits
        )
        self._loader = settings.loader(READ_THREADS, helpers(settings, resources))

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        began_at = datetime.now(UTC)
        file, seen = self._extract(list(batch["image_uris"][0]), list(batch["image_versions"][0]))
        self._cache.write(batch["name"][0], file)
        row = {
            "images": len(seen.uris),
            "began_at": began_at,
            "failed_for_now": seen.failed_for_now,
            "deep": len(seen.ranges_used),
            "range_used": max(seen.ranges_used, default=0.0),
        }
        return pa.Table.from_pylist([row], schema=RESULT)

    def _extract(self, image_uris: list[str], image_versions: list[str]) -> tuple[FeatureFile, "_Seen"]:
        """Features of the readable images, or of tiles drawn from each, and what is noted of them."""
        seen = _Seen()
        parts: list[Tensor] = [torch.empty(0, sum(self._cache.sizes))]
        samples = self._samples(self._loader.load(image_uris, image_versions), seen)
        for pixels in batches(samples, self._backbone.batch_size):
            features = self._backbone(torch.from_numpy(np.stack(pixels)).to(self._device))
            parts.append(torch.cat([y_BCHW.flatten(1) for y_BCHW in features], dim=1).float().cpu())
        readable = seen.uris, seen.versions, seen.digests, seen.sizes
        return FeatureFile(*readable, features_ND=torch.cat(parts), failed=seen.failed), seen

    def _samples(self, images: Iterable[LoadedImage], seen: "_Seen") -> Iterator[NDArray[np.uint8]]:
        """The pixels of what goes through the backbone."""
        for image in images:
            seen.add(image)
            if isinstance(image.content, ImageError):
                continue
            pixels_HWC, height, width = image.content[:3]
            if self._cache.tiles is None:
                yield pixels_HWC
            else:
                yield from self._cache.tiles.draw(pixels_HWC, height, width, seen.digests[-1])


@dataclass
class _Seen:
    """What is noted of the images of a shard."""

    uris: list[str] = field(default_factory=list)
    """Of the images that can be read, as are versions, digests and sizes."""
    versions: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    failed: list[tuple[str, str, str]] = field(default_factory=list)
    failed_for_now: list[str] = field(default_factory=list)
    ranges_used: list[float] = field(default_factory=list)

    def add(self, image: LoadedImage) -> None:
        if not isinstance(image.content, ImageError):
            assert image.sha256 is not None
            self.uris.append(image.image_uri)
            self.versions.append(image.image_version)
            self.digests.append(image.sha256)
            self.sizes.append((image.content.height, image.content.width))
            if image.content.range_used is not None:
                self.ranges_used.append(image.content.range_used)
        elif image.content.is_transient:
            # Not in the file, so that the next training tries again.
            self.failed_for_now.append(f"{image.image_uri}: {image.content}")
        else:
            self.failed.append((image.image_uri, image.image_version, str(image.content)))
