"""How an image becomes the pixels that a model sees, and which part of the original they cover.

A model sees an image as a whole, resized to one size, or as tiles: the image is scaled, padded by reflection
so that tiles of one size cover it, and cut. Neighbouring tiles overlap. The image lies half an overlap from
the outer edges of its outermost tiles, so that none of its pixels has only a place at the edge of a tile.

This module has only values and arithmetic. The model keeps the values, `csflow.images` applies them.
"""

import math
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
class Tiling:
    """How an image is cut into tiles."""

    overlap: int
    """Pixels that neighbouring tiles share; even."""
    scale: float = 1.0
    """Factor by which the sides of an image are scaled before it is cut."""


@dataclass(frozen=True)
class Preprocessing:
    """Size, fit, filter and decoding of the pixels that a model sees."""

    image_size: tuple[int, int]
    """Height and width, of a tile if there are tiles."""
    fit: Fit = "stretch"
    interpolation: Interpolation = "bilinear"
    decoding_version: int = DECODING_VERSION
    """How files become pixels (`csflow.images`)."""
    tiling: Tiling | None = None
    """How images are cut into tiles; None if the model sees whole images. With tiles, `fit` means nothing."""
    mask: str | None = None
    """The region of interest among the pixels (`csflow.interest`); None if it is all of them."""

    def place(self, height: int, width: int) -> Placement:
        """How an original of this size is placed into the pixels, or into those that are cut into tiles."""
        if self.tiling:
            return self._covered_by_tiles(self.tiling, height, width)
        if self.fit == "letterbox":
            return _letterboxed(self.image_size, height, width)
        source = whole(height, width)
        if self.fit == "crop":
            source = _centred(self.image_size, height, width)
        return Placement(source, self.image_size, (0, 0, 0, 0))

    def tile_corners(self, height: int, width: int) -> list[tuple[int, int]]:
        """Upper left corners (row, column) of the tiles of an original of this size, row by row.

        They are those in the pixels that `place` describes. Raises ValueError if the model sees whole images.
        """
        if self.tiling is None:
            raise ValueError("a model without tiles sees whole images")
        rows, columns = (
            range(0, tiles * stride, stride)
            for tiles, stride in (
                _tiles(scaled, tile, self.tiling.overlap)
                for scaled, tile in zip(_scaled(self.tiling, height, width), self.image_size, strict=True)
            )
        )
        return [(row, column) for row in rows for column in columns]

    def _covered_by_tiles(self, tiling: Tiling, height: int, width: int) -> Placement:
        size = _scaled(tiling, height, width)
        before = tiling.overlap // 2
        behind = []
        for scaled, tile in zip(size, self.image_size, strict=True):
            tiles, stride = _tiles(scaled, tile, tiling.overlap)
            behind.append(tiles * stride + tiling.overlap - before - scaled)
        return Placement(whole(height, width), size, (before, before, behind[0], behind[1]))


def _scaled(tiling: Tiling, height: int, width: int) -> tuple[int, int]:
    """Height and width of an original after it is scaled."""
    return max(1, round(height * tiling.scale)), max(1, round(width * tiling.scale))


def _tiles(side: int, tile: int, overlap: int) -> tuple[int, int]:
    """The number of tiles along a side of a scaled image, and the distance from one to the next."""
    stride = tile - overlap
    return math.ceil(side / stride), stride


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
