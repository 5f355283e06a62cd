"""Stand-ins of fixed cost for `split.py`, in a module of their own that all its processes import."""

import os
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np

import cluster
import csflow.inputs.loaded
from csflow.cluster import WorkerResources, helpers
from csflow.images import DecodedImage
from csflow.inputs.helpers import Helpers
from csflow.inputs.loading import ImageLoader, LoaderSettings
from csflow.inputs.reading import ImageReader
from csflow.preprocessing import Preprocessing, whole
from csflow.scoring.config import ScoringSettings
from csflow.scoring.scorer import ShardScorer

SCORE_S, DECODE_S = 0.002, 0.01
"""Seconds an image."""


class FixedCostReader(ImageReader):
    def read(self, image_uri: str, image_version: str) -> bytes:
        return b"an image"


class FixedCostSettings(LoaderSettings):
    """Of a loader whose process decodes one image in `DECODE_S`."""

    def loader(self, threads: int, helpers: Helpers | None = None) -> ImageLoader:
        cpu = threading.Lock()

        def decode(data: bytes, target: Preprocessing) -> DecodedImage:
            size = os.getpid(), 256
            with cpu:
                time.sleep(DECODE_S)
            return DecodedImage(np.zeros((256, 256, 3), dtype=np.uint8), *size, whole(*size))

        csflow.inputs.loaded.decode = decode  # type: ignore[assignment]
        return ImageLoader(FixedCostReader({}), self.preprocessing, threads, helpers=helpers)


class FixedCostScorer(ShardScorer):
    """A scorer on a GPU that sleeps, behind real loaders and helpers."""

    def __init__(self, settings: ScoringSettings, resources: WorkerResources) -> None:
        super().__init__(settings, replace(resources, gpus=0, decode="beside"))
        self._detector: Any = cluster.FixedCostDetector(self._detector.form, SCORE_S)
        loader = FixedCostSettings({}, Preprocessing((256, 256)))
        self._loader = loader.loader(8, helpers(loader, resources))
