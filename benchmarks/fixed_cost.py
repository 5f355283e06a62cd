"""A loader of fixed cost for `split.py`, in a module of its own, which helpers import without torch."""

import os
import threading
import time

import numpy as np

import csflow.inputs.loaded
from csflow.images import DecodedImage
from csflow.inputs.helpers import Helpers
from csflow.inputs.loading import ImageLoader, LoaderSettings
from csflow.inputs.reading import ImageReader
from csflow.preprocessing import Preprocessing, whole

DECODE_S = 0.01
"""Seconds for an image, of which a process decodes one at a time."""


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
