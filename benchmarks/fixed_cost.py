"""A loader of fixed cost for simulated nodes, in a module of its own, which helpers import without torch."""

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

DECODE_S = float(os.environ.get("CSFLOW_DECODE_S", "0.01"))
"""Seconds for an image, of which a process decodes one at a time."""
SCORE_S = DECODE_S / 5
"""Seconds for an image on a GPU."""


class Unit:
    """A processor that takes a fixed time for an image, one after the other.

    What `sleep` oversleeps is not lost while other images wait.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._free_at = 0.0
        self._lock = threading.Lock()

    def take(self, images: int = 1) -> float:
        """Gives it work; returns the time when this will be done, from `time.monotonic`."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + images * self._seconds
            return self._free_at


def wait_until(moment: float) -> None:
    """Sleeps until a time of `time.monotonic`."""
    time.sleep(max(0.0, moment - time.monotonic()))


class FixedCostReader(ImageReader):
    def read(self, image_uri: str, image_version: str) -> bytes:
        return b"an image"


class FixedCostSettings(LoaderSettings):
    """Of a loader whose process decodes one image in `DECODE_S`."""

    def loader(self, threads: int, helpers: Helpers | None = None) -> ImageLoader:
        cpu = Unit(DECODE_S)

        def decode(data: bytes, target: Preprocessing, *limits: object) -> DecodedImage:
            size = os.getpid(), 256
            wait_until(cpu.take())
            return DecodedImage(np.zeros((256, 256, 3), dtype=np.uint8), *size, whole(*size))

        csflow.inputs.loaded.decode = decode  # type: ignore[assignment]
        return ImageLoader(FixedCostReader({}), self.preprocessing, threads, helpers=helpers)
