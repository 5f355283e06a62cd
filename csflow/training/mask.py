"""Reads the region of interest that `--mask` names."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from csflow.errors import ImageError, WrongUse
from csflow.images import decode
from csflow.interest import to_text
from csflow.preprocessing import Preprocessing
from csflow.storage import Location

SAME_SHAPE = 1.01
"""Aspect ratios that differ by less than this factor are the same."""


class Mask(NamedTuple):
    """The region of interest of a camera's photographs."""

    location: Location
    text: str
    """The region among the model's pixels, as `csflow.interest.from_text` reads it."""
    height: int
    """Of the mask's image, in pixels."""
    width: int

    def check_shapes(self, images: pa.Table) -> None:
        """Raises WrongUse if an image (a row of `INDEX`) has another aspect ratio than the mask."""
        columns = ("image_uri", "image_height", "image_width")
        for uri, height, width in zip(*(images[name].to_pylist() for name in columns), strict=True):
            if height is not None:  # it could be read
                self.check_shape(height, width, uri)

    def check_shape(self, height: int, width: int, image: str) -> None:
        """Raises WrongUse if an image of this size, called so, has another aspect ratio than the mask."""
        ratio = (height / width) / (self.height / self.width)
        if not 1 / SAME_SHAPE < ratio < SAME_SHAPE:
            raise WrongUse(
                f"--mask {self.location} has {self.height} x {self.width} pixels, and {image} "
                f"{height} x {width}: the mask must have the shape of the photographs"
            )


def read_mask(location: Location, preprocessing: Preprocessing) -> Mask:
    """The mask in an image file, whose bright pixels are in the region.

    Args:
        preprocessing: how photographs become pixels; the mask is laid over them the same way.

    Raises:
        WrongUse: the file is no image, or has no bright pixel.
    """
    try:
        data = location.read()
        image = decode(data, preprocessing)
        largest = decode(data).pixels_HWC.max()
    except (ImageError, FileNotFoundError) as error:
        raise WrongUse(f"--mask {location} cannot be read ({error}); name an image file") from None
    if not largest:
        raise WrongUse(f"--mask {location} is all black; what the model is to look at must be white")
    # Half of the maximum: masks of 0 and 1 are common, too.
    is_inside_HW = image.pixels_HWC.max(2) > np.float32(largest) / 2
    if not is_inside_HW.any():
        height, width = is_inside_HW.shape
        raise WrongUse(
            f"--mask {location}: nothing is left of its region at {height} x {width} pixels; "
            "enlarge the region or --image_size"
        )
    return Mask(location, to_text(is_inside_HW), image.height, image.width)
