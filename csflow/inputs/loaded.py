"""Reads and decodes one image."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from csflow.decode_limits import DEFAULT_LIMITS, OF_PROCESS, DecodeLimits, PixelBudget, ThreadClock
from csflow.errors import ErrorCode, ImageError
from csflow.images import DecodedImage, decode
from csflow.inputs.reading import ImageReader
from csflow.preprocessing import Preprocessing
from csflow.process import Stages

HELPED = "helped_"
"""Prefix of stages in helping processes, whose time is not that of the worker."""


@dataclass(frozen=True)
class LoadedImage:
    """An image, or the error that explains why there is none."""

    image_uri: str
    image_version: str
    content: DecodedImage | ImageError
    stages: Stages
    """Time spent on reading and decoding the image."""
    sha256: str | None = None
    """Hexadecimal digest of the bytes of an image that could be decoded, if it was asked for."""
    is_helped: bool = False
    """Whether a helper loaded it, in another process."""

    def by_helper(self) -> "LoadedImage":
        """The image with the names of its stages changed to `helped_…`."""
        return replace(self, stages=self.stages.renamed(HELPED), is_helped=True)


def load_one(
    reader: ImageReader,
    preprocessing: Preprocessing,
    with_sha256: bool,
    image_uri: str,
    image_version: str,
    limits: DecodeLimits = DEFAULT_LIMITS,
    budget: PixelBudget = OF_PROCESS,
    decoding: Callable[[ThreadClock], object] = lambda clock: None,
) -> LoadedImage:
    """Reads and decodes one image; an error is returned in the result.

    Args:
        budget: shared with other threads.
        decoding: called when the image has been read, with a clock of what decoding takes.
    """
    stages, sha256 = Stages(), None
    content: DecodedImage | ImageError
    try:
        with stages.measured("read"):
            data = reader.read(image_uri, image_version)
        with stages.measured("decode"):
            decoding(ThreadClock())
            content = decode(data, preprocessing, limits.max_pixels, limits.is_strict, budget)
        sha256 = hashlib.sha256(data).hexdigest() if with_sha256 else None
    except ImageError as error:
        content = error
    except Exception as error:
        # One image must never take its neighbours down.
        content = ImageError(ErrorCode.INTERNAL, f"{type(error).__name__}: {error}")
    return LoadedImage(image_uri, image_version, content, stages, sha256)
