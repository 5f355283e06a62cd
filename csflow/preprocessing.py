"""How an image becomes the pixels that a model sees, and which part of the original they cover.

This module has only values and arithmetic. The model keeps the values, `csflow.images` applies them.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

Fit = Literal["stretch", "letterbox", "crop"]
"""How an image of another aspect ratio than the model's is resized: distorted, padded or cut."""
Interpolation = Literal["bilinear", "bicubic"]
"""The resizing filter, always antialiased."""
DECODING_VERSION = 2
"""Increases when `csflow.images` gives other pixels of the same bytes. A model scores with the version that
it was trained with."""
DECODING_VERSIONS = (1, DECODING_VERSION)
"""Those that are still known."""


class Box(NamedTuple):
    """Edges in pixels of an upright image, from its upper left corner; they may lie beyond the image."""

    top: float
    left: float
    bottom: float
    right: float


class Placement(NamedTuple):
    """How one image is laid into the model's pixels: `source` is resized to `size`, then padded."""

    source: Box
    """The part of the original that is used."""
    size: tuple[int, int]
    """Height and width to which the source is resized."""
    padding: tuple[int, int, int, int]
    """Rows and columns added above, to the left, below and to the right."""

    @property
    def box(self) -> Box:
        """The part of the original that all pixels cover, including padding."""
        cell_height = (self.source.bottom - self.source.top) / self.size[0]
        cell_width = (self.source.right - self.source.left) / self.size[1]
        above, left, below, right = self.padding
        return Box(
            self.source.top - above * cell_height,
            self.source.left - left * cell_width,
            self.source.bottom + below * cell_height,
            self.source.right + right * cell_width,
        )


@dataclass(frozen=True)
class Preprocessing:
    """Size, fit, filter and decoding of the pixels that a model sees."""

    image_size: tuple[int, int]
    """Height and width."""
    fit: Fit = "stretch"
    interpolation: Interpolation = "bilinear"
    decoding_version: int = DECODING_VERSION
    """How files become pixels (`csflow.images`)."""

    def place(self, height: int, width: int) -> Placement:
        """How an original of this size is placed into the pixels."""
        if self.fit == "letterbox":
            return _letterboxed(self.image_size, height, width)
        source = whole(height, width)
        if self.fit == "crop":
            source = _centred(self.image_size, height, width)
        return Placement(source, self.image_size, (0, 0, 0, 0))


def whole(height: int, width: int) -> Box:
    """The box that covers all of an image of this size."""
    return Box(0.0, 0.0, float(height), float(width))


def distortion(image_size: tuple[int, int], height: int, width: int) -> float:
    """The factor by which stretching an original to `image_size` changes its aspect ratio; at least 1."""
    ratio = (image_size[0] / height) / (image_size[1] / width)
    return max(ratio, 1 / ratio)


def _centred(image_size: tuple[int, int], height: int, width: int) -> Box:
    """The largest part with the model's aspect ratio, in the middle of the original."""
    scale = min(height / image_size[0], width / image_size[1])
    # No larger than the original, whatever rounding says.
    cut_height, cut_width = min(height, image_size[0] * scale), min(width, image_size[1] * scale)
    top, left = (height - cut_height) / 2, (width - cut_width) / 2
    return Box(top, left, height - top, width - left)


def _letterboxed(image_size: tuple[int, int], height: int, width: int) -> Placement:
    """Places the whole original in the middle, in whole pixels."""
    scale = max(height / image_size[0], width / image_size[1])
    size = max(1, round(height / scale)), max(1, round(width / scale))
    rows, columns = image_size[0] - size[0], image_size[1] - size[1]
    above, left = rows // 2, columns // 2
    return Placement(whole(height, width), size, (above, left, rows - above, columns - left))
