"""Features of a data set's images as the training job caches them: the same for every detector."""

from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import torch
from quality_data import test_images
from torch import Tensor

from csflow.cluster import WorkerResources
from csflow.inputs.listing import list_table
from csflow.storage import Location
from csflow.training.cache import BACKBONE_FILE, FeatureCache, backbone_bytes, find_images
from csflow.training.config import TrainConfig
from csflow.training.features import SHARD_SIZE, FeatureExtractor
from csflow.training.job import build_detector
from csflow.training.shards import cut
from csflow.training.sources import open_features
from csflow.training.split import TrainingData

CPU = torch.device("cpu")
IN_MEMORY = 1 << 40
"""Bytes: all of them."""


class CachedImages(NamedTuple):
    """Rows of a cache's index."""

    cache: FeatureCache
    data: TrainingData
    """What the training job makes of `train/good`."""
    test: pa.Table
    """As `test_images` orders them."""


def cached_images(config: TrainConfig, folder: Path, features: Path) -> CachedImages:
    """Extracts what the cache below `features` lacks, in this process."""
    training, test = _listed(folder / "train" / "good"), _listed(folder / "test")
    detector = build_detector(config)
    cache = FeatureCache.of(Location(str(features)), detector)
    missing = find_images(pa.concat_tables([training, test]), cache.index())[1]
    if missing.num_rows:
        (cache.folder / BACKBONE_FILE).write(backbone_bytes(detector))
        extractor = FeatureExtractor(detector.architecture, cache, WorkerResources(1, 1, 0))
        uris, versions = missing["image_uri"].to_pylist(), missing["image_version"].to_pylist()
        for shard in cut(uris, versions, SHARD_SIZE):
            batch = {
                "name": [shard.name],
                "image_uris": [shard.image_uris],
                "image_versions": [shard.image_versions],
            }
            extractor(batch)
    index = cache.index()
    data = TrainingData.divide(
        find_images(training, index)[0], config.validation, config.holdout, config.seed
    )
    rows = {uri: row for row, uri in enumerate(test["image_uri"].to_pylist())}
    ordered = test.take([rows[str(image.path.resolve())] for image in test_images(folder)])
    return CachedImages(cache, data, find_images(ordered, index)[0])


def read_levels(cache: FeatureCache, images: pa.Table) -> list[Tensor]:
    """Per level (N, C, H, W), float32, finest first."""
    source = open_features(cache, images, IN_MEMORY, CPU)
    return next(source.batches(0, [torch.arange(len(source))]))


def _listed(folder: Path) -> pa.Table:
    return list_table([str(folder.resolve())], {})
