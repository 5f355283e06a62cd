"""Reads the region of interest that `--mask` names: an image, or polygons."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from csflow.errors import Failed, ImageError, WrongUse
from csflow.images import decode
from csflow.interest import to_text
from csflow.preprocessing import Preprocessing
from csflow.storage import Location
from csflow.training.config import AUTO, TrainConfig
from csflow.training.polygons import Polygons, filled, is_json, read_polygons

SAME_SHAPE = 1.01
"""Aspect ratios that differ by less than this factor are the same."""


class Mask(NamedTuple):
    """The region of interest of a camera's photographs."""

    location: Location
    text: str
    """The region among the model's pixels, as `csflow.interest.from_text` reads it."""
    height: int
    """Of the picture that the mask was made for, in pixels."""
    width: int
    has_own_size: bool = True
    """Whether the file tells height and width; else they are those of a photograph."""

    def check_shapes(self, images: pa.Table) -> None:
        """Raises WrongUse if there is an image (a row of `INDEX`) that the mask does not fit."""
        columns = ("image_uri", "image_height", "image_width")
        for uri, height, width in zip(*(images[name].to_pylist() for name in columns), strict=True):
            if height is not None:  # it could be read
                self.check_shape(height, width, uri)

    def check_shape(self, height: int, width: int, image: str) -> None:
        """Raises WrongUse if an image of this size, called so, has another aspect ratio than the mask.

        If coordinates are pixels of the photographs, these must also have one size.
        """
        if not self.has_own_size and (height, width) != (self.height, self.width):
            raise WrongUse(
                f"--mask {self.location}: photographs have {self.height} x {self.width} pixels, but {image} "
                f"{height} x {width}, and GeoJSON does not say which of them it means; name a COCO file or "
                "an image"
            )
        ratio = (height / width) / (self.height / self.width)
        if not 1 / SAME_SHAPE < ratio < SAME_SHAPE:
            raise WrongUse(
                f"--mask {self.location} has {self.height} x {self.width} pixels, and {image} "
                f"{height} x {width}: the mask must have the shape of the photographs"
            )


class UnsizedMask(NamedTuple):
    """Polygons in pixels of the photographs, whose size their file does not tell."""

    location: Location
    polygons: Polygons
    preprocessing: Preprocessing


def read_mask(config: TrainConfig) -> Mask | UnsizedMask | None:
    """The mask in the file that `--mask` names; None if it names none.

    Raises:
        WrongUse: the file is no image and has no polygons, or nothing is in the region.
    """
    if config.mask is None or config.mask == AUTO:
        return None
    location = Location(config.mask, config.storage_options)
    # The backbone's own filter is not known yet, and would move a mask's edge by less than a pixel.
    preprocessing = replace(config.architecture(), interpolation="bilinear").preprocessing
    try:
        data = location.read()
        if not is_json(data):
            return _of_image(data, location, preprocessing, config.max_pixels)
    except (ImageError, FileNotFoundError) as error:
        raise WrongUse(
            f"--mask {location} cannot be read ({error}); name an image, or a GeoJSON or COCO file"
        ) from None
    try:
        polygons = read_polygons(data)
    except ValueError as error:
        raise WrongUse(f"--mask {location} {error}") from None
    if polygons.size is None:
        return UnsizedMask(location, polygons, preprocessing)
    return _of_polygons(polygons, location, preprocessing, polygons.size)


def mask_for(mask: Mask | UnsizedMask, sizes: Sequence[tuple[int, int]]) -> Mask:
    """The mask of photographs of which some have these heights and widths.

    Raises:
        WrongUse: the mask is not one of such photographs.
        Failed: no size is known, but needed.
    """
    if isinstance(mask, UnsizedMask):
        if not sizes:
            raise Failed(
                f"--mask {mask.location}: GeoJSON does not tell the size of the photographs, and the first "
                "of them cannot be read; the same command tries again, or name a COCO file or an image"
            )
        mask = _of_polygons(mask.polygons, mask.location, mask.preprocessing, sizes[0])
    for height, width in sizes:
        mask.check_shape(height, width, "a photograph")
    return mask


def _of_image(data: bytes, location: Location, preprocessing: Preprocessing, max_pixels: int) -> Mask:
    """The mask in an image file, whose bright pixels are in the region. Raises ImageError, too."""
    image = decode(data, preprocessing, max_pixels)
    largest = decode(data, max_pixels=max_pixels).pixels_HWC.max()
    if not largest:
        raise WrongUse(f"--mask {location} is all black; what the model is to look at must be white")
    # Half of the maximum: masks of 0 and 1 are common, too.
    is_inside_HW = image.pixels_HWC.max(2) > np.float32(largest) / 2
    return Mask(location, _text(is_inside_HW, location), image.height, image.width)


def _of_polygons(
    polygons: Polygons, location: Location, preprocessing: Preprocessing, size: tuple[int, int]
) -> Mask:
    try:
        is_inside_HW = filled(polygons, *size, preprocessing)
    except ValueError as error:
        raise WrongUse(f"--mask {location} {error}") from None
    return Mask(location, _text(is_inside_HW, location), *size, has_own_size=polygons.size is not None)


def _text(is_inside_HW: NDArray[np.bool_], location: Location) -> str:
    if not is_inside_HW.any():
        height, width = is_inside_HW.shape
        raise WrongUse(
            f"--mask {location}: nothing is left of its region at {height} x {width} pixels; "
            "enlarge the region or --image_size"
        )
    return to_text(is_inside_HW)
