"""Features of the frozen backbone: extracted once by a Ray Data pass into a cache, then read by trainers.

A cache file holds the features of one shard of images. Its name is a function of the images, its
folder one of whatever decides the features, so that a second training finds what a first one left.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from torch import Tensor

from csflow import device
from csflow.cluster import WorkerResources, map_shards
from csflow.errors import ImageError
from csflow.images import DECODING_VERSION
from csflow.inputs.loading import ImageLoader, LoadedImage, batches
from csflow.inputs.reading import ImageReader
from csflow.model import Architecture, Detector
from csflow.storage import Location
from csflow.training.shards import Shard

SUFFIX = ".features.safetensors"
BACKBONE_FILE = "backbone.safetensors"
READ_THREADS = 8
BATCH_SIZE = 8
"""Images per backbone pass. More is slower on CPUs: the early layers' activations leave the cache."""


RESULT = pa.schema(
    [
        pa.field("images", pa.int64()),  # with features
        pa.field("errors", pa.list_(pa.string())),  # messages of those without
        pa.field("is_transient", pa.bool_()),  # an error may pass, so that the shard was not cached
    ]
)


class FeatureSet(NamedTuple):
    """Features of a list of images, in its order."""

    image_uris: list[str]
    image_versions: list[str]
    features: list[Tensor]
    """Per scale (images, C, H, W), float32."""


def cache_folder(cache: Location, detector: Detector) -> Location:
    """The cache folder of this backbone, these weights, this image size and decoding."""
    architecture = detector.architecture
    decides = {
        "backbone": architecture.backbone,
        "cut_after": detector.backbone.cut_after,
        "image_size": list(architecture.image_size),
        "scales": architecture.scales,
        "decoding_version": DECODING_VERSION,
    }
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
    digest.update(_backbone_bytes(detector))
    return cache / digest.hexdigest()[:16]


def uncached(shards: Sequence[Shard], folder: Location) -> list[Shard]:
    """The shards whose features the cache lacks."""
    cached = {location.name for location in folder.find(SUFFIX)}
    return [shard for shard in shards if shard.name + SUFFIX not in cached]


def extract(
    shards: Sequence[Shard], detector: Detector, folder: Location, resources: WorkerResources
) -> Iterator[dict[str, Any]]:
    """Fills the cache with the shards it lacks; yields a row in the `RESULT` schema per finished shard."""
    work = [
        {
            "name": shard.name,
            "image_uris": list(shard.image_uris),
            "image_versions": list(shard.image_versions),
        }
        for shard in uncached(shards, folder)
    ]
    if not work:
        return
    # Through the store and not as an argument, so that an actor can start anew on any node.
    (folder / BACKBONE_FILE).write(_backbone_bytes(detector))
    constructor_args = (detector.architecture, folder, resources)
    yield from map_shards(work, FeatureExtractor, constructor_args, resources)


class FeatureExtractor:
    """Actor of the extraction pass."""

    def __init__(
        self,
        architecture: Architecture,
        folder: Location,
        resources: WorkerResources,
    ) -> None:
        self._device = device.set_up(resources.cpus, resources.gpus)
        detector = Detector(architecture)
        backbone_state = safetensors.torch.load((folder / BACKBONE_FILE).read())
        detector.load_state_dict(backbone_state, strict=False)
        self._detector = detector.to(self._device)
        self._folder = folder
        reader = ImageReader(folder.storage_options)
        self._loader = ImageLoader(reader, architecture.image_size, READ_THREADS)

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        uris, versions = list(batch["image_uris"][0]), list(batch["image_versions"][0])
        failed: list[LoadedImage] = []
        feature_set = self._features(self._loader.load(uris, versions), failed)
        errors = [f"{image.image_uri}: {image.content}" for image in failed]
        is_transient = any(isinstance(i.content, ImageError) and i.content.is_transient for i in failed)
        if not is_transient:
            # Else the cache would lack these images for ever.
            (self._folder / f"{batch['name'][0]}{SUFFIX}").write(_to_bytes(feature_set))
        row = {"images": len(feature_set.image_uris), "errors": errors, "is_transient": is_transient}
        return pa.Table.from_pylist([row], schema=RESULT)

    def _features(self, images: Iterator[LoadedImage], failed: list[LoadedImage]) -> FeatureSet:
        """Features of the images that can be loaded; the others are appended to `failed`."""
        uris: list[str] = []
        versions: list[str] = []
        parts = [[torch.empty(0, *shape)] for shape in self._detector.feature_shapes]
        for batch in batches(images, BATCH_SIZE):
            pixels = []
            for image in batch:
                if isinstance(image.content, ImageError):
                    failed.append(image)
                else:
                    pixels.append(image.content.pixels_HWC)
                    uris.append(image.image_uri)
                    versions.append(image.image_version)
            if pixels:
                features = self._detector.features(torch.from_numpy(np.stack(pixels)).to(self._device))
                for part, y_BCHW in zip(parts, features, strict=True):
                    part.append(y_BCHW.cpu())
        return FeatureSet(uris, versions, [torch.cat(part).contiguous() for part in parts])


def load_features(folder: Location, shards: Sequence[Shard]) -> FeatureSet:
    """Reads the cached features of these shards into memory; images that had an error are absent."""
    sets = [_from_bytes((folder / (shard.name + SUFFIX)).read()) for shard in shards]
    return FeatureSet(
        [uri for part in sets for uri in part.image_uris],
        [version for part in sets for version in part.image_versions],
        [torch.cat(tensors) for tensors in zip(*(part.features for part in sets), strict=True)],
    )


def _backbone_bytes(detector: Detector) -> bytes:
    """Everything but the flow, as a safetensors file; the same weights give the same bytes."""
    state = sorted(detector.state_dict().items())
    return safetensors.torch.save({k: v.contiguous() for k, v in state if not k.startswith("flow.")})


def _to_bytes(feature_set: FeatureSet) -> bytes:
    images = json.dumps({"image_uris": feature_set.image_uris, "image_versions": feature_set.image_versions})
    tensors = {f"scale{s}": y_BCHW for s, y_BCHW in enumerate(feature_set.features)}
    return safetensors.torch.save(tensors, metadata={"images": images})


def _from_bytes(data: bytes) -> FeatureSet:
    header_size = int.from_bytes(data[:8], "little")
    images = json.loads(json.loads(data[8 : 8 + header_size])["__metadata__"]["images"])
    tensors = safetensors.torch.load(data)
    features = [tensors[f"scale{s}"] for s in range(len(tensors))]
    return FeatureSet(images["image_uris"], images["image_versions"], features)
