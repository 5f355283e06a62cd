"""Where an image to score comes from: a path, a URL, bytes, an array or a Pillow image.

Everything becomes the bytes of an image file first, so that all of it is decoded as by the scoring job.
"""

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from csflow.errors import ErrorCode, ImageError, WrongUse
from csflow.inputs.manifests import canonical_uri
from csflow.inputs.objects import ObjectStore
from csflow.inputs.reading import MAX_BYTES

READ_DEADLINE_S = 30.0
"""Seconds during which transient failures of one image are tried again."""
PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})
"""Pillow's modes that a PNG keeps as they are; the others go into a TIFF."""

ImageLike: TypeAlias = str | os.PathLike[str] | bytes | bytearray | NDArray[Any] | Image.Image


def open_store(storage_options: Mapping[str, Any]) -> ObjectStore:
    """A store for sources, which may share it."""
    return ObjectStore(storage_options, READ_DEADLINE_S)


@dataclass(frozen=True)
class Source:
    """An image that was given to `Model.score`."""

    given: ImageLike
    store: ObjectStore
    """Shared, since its connections are worth keeping."""

    @property
    def image_uri(self) -> str | None:
        """The canonical URI, as in `scores`; None for an image in memory."""
        return canonical_uri(os.fspath(self.given)) if isinstance(self.given, str | os.PathLike) else None

    @property
    def name(self) -> str:
        """What messages call the image."""
        return self.image_uri or f"the image given as {type(self.given).__name__}"

    def read(self) -> bytes:
        """The bytes of an image file. Raises ImageError, and WrongUse for a folder or no image at all."""
        uri = self.image_uri
        if uri is not None:
            return self._fetch(uri)
        if isinstance(self.given, bytes | bytearray):
            return bytes(self.given)
        if isinstance(self.given, np.ndarray):
            return _as_file(_from_array(self.given))
        if isinstance(self.given, Image.Image):
            return _as_file(self.given)
        raise WrongUse(
            "an image is a path, a URL, bytes, a NumPy array or a Pillow image, "
            f"not {type(self.given).__name__}"
        )

    def _fetch(self, uri: str) -> bytes:
        if "://" not in uri and Path(uri).is_dir():
            raise WrongUse(
                f"{uri} is a folder; give its images, such as sorted(Path({uri!r}).glob('*.png')), "
                "or score it all with csflow.score"
            )
        stored = self.store.stat(uri)
        return self.store.fetch(uri, stored.version, limit=MAX_BYTES)


def _from_array(pixels: NDArray[Any]) -> Image.Image:
    """Grey (H, W) or (H, W, 1), RGB (H, W, 3) or RGBA (H, W, 4)."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    is_grey = pixels.ndim == 2
    if not (is_grey or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))) or 0 in pixels.shape:
        raise WrongUse(
            f"an array of shape {pixels.shape} is no image; expected (H, W), or (H, W, 3) or (H, W, 4) in "
            "the order red, green, blue"
        )
    if is_grey and pixels.dtype.kind == "f":
        pixels = pixels.astype(np.float32)  # its range is chosen as that of a float TIFF
    elif pixels.dtype == np.uint16 and not is_grey:
        pixels = (pixels >> 8).astype(np.uint8)  # the high byte, as of colour files of 16 bits
    elif pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * 255
    elif pixels.dtype != np.uint8 and not (is_grey and pixels.dtype in (np.uint16, np.int32)):
        raise WrongUse(f"an array of {pixels.dtype} is no image; convert it to uint8, 0 to 255")
    return Image.fromarray(np.ascontiguousarray(pixels))


def _as_file(image: Image.Image) -> bytes:
    """A file with exactly these pixels, and the orientation, which `decode` applies after resizing."""
    data, exif = io.BytesIO(), Image.Exif()
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    try:
        if image.mode in PNG_MODES:
            image.save(data, "PNG", compress_level=1, exif=exif)
        else:
            image.save(data, "TIFF", exif=exif)
    except (OSError, KeyError, ValueError) as error:
        raise ImageError(ErrorCode.UNSUPPORTED_FORMAT, f"Pillow's mode {image.mode}: {error}") from None
    return data.getvalue()
