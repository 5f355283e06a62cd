"""Finds the region of interest where photographs vary: `--mask auto`.

A fixture, or an empty border, looks the same on all photographs of a fixed camera; parts do not. Sums over
photographs are of whole numbers, so that the same photographs give the same region, in any order.

Dimension letters: H height, W width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import ndimage

from csflow.decode_limits import DecodeLimits
from csflow.errors import Failed, ImageError
from csflow.inputs.child_process import Child, ChildDied
from csflow.inputs.loading import ImageLoader
from csflow.inputs.reading import ImageReader
from csflow.interest import to_text
from csflow.preflight import spread
from csflow.preprocessing import Preprocessing

LOOKED_AT = 256
"""Largest number of photographs whose pixels are compared: standard deviations are then known to 4 %."""
AT_ONCE = 16
READ_THREADS = 8
NOISE = 0.5
"""Standard deviation in grey levels below which all pixels count as equally still."""
SMOOTHED, MARGIN = 1 / 128, 1 / 64
"""Shares of the image's shorter side: standard deviation of the smoothing, and width of the margin."""
SPECK = 0.001
"""Smallest share of the pixels that one piece of the region has."""
SEPARATION, FACTOR = 0.8, 3.0
"""Two groups of pixels are apart if the difference of their means explains this share of the variance (of a
normal distribution cut in its middle 0.64), and one varies so many times as much as the other."""
LEAST, MOST = 0.02, 0.95
"""Shares of the pixels between which a region is believed."""

NO_MASK = ", so the model looks everywhere; if there is a background, name an image or polygons of the part"


class Varying(NamedTuple):
    """The region in which some photographs vary."""

    text: str | None
    """As `csflow.interest.from_text` reads it; None if there is no such region, and all pixels are kept."""
    line: str
    """What was found, for the user; a warning if there is no region."""


class _Sums(NamedTuple):
    """Sums over images: their number, pixels (H, W, 3), and squares of pixels."""

    images: int
    pixels_HWC: NDArray[np.int64]
    squares_HWC: NDArray[np.int64]

    @classmethod
    def zero(cls, preprocessing: Preprocessing) -> "_Sums":
        nothing = np.zeros((*preprocessing.image_size, 3), np.int64)
        return cls(0, nothing, nothing)

    def plus(self, other: "_Sums") -> "_Sums":
        return _Sums(
            self.images + other.images,
            self.pixels_HWC + other.pixels_HWC,
            self.squares_HWC + other.squares_HWC,
        )


def find_varying(
    images: pa.Table, preprocessing: Preprocessing, storage_options: Mapping[str, Any], limits: DecodeLimits
) -> Varying:
    """The region in which these images vary, from up to `LOOKED_AT` of them, spread over the listing.

    Args:
        images: `image_uri` and `image_version` of all images.

    Raises:
        Failed: an image cannot be read this time.
    """
    images = spread(images, LOOKED_AT)
    sums = _Sums.zero(preprocessing)
    child = Child(storage_options)
    try:
        for start in range(0, images.num_rows, AT_ONCE):
            some = images.slice(start, AT_ONCE)
            uris, versions = some["image_uri"].to_pylist(), some["image_version"].to_pylist()
            sums = sums.plus(child.call(_summed, uris, versions, preprocessing, limits))
    except ChildDied:
        raise Failed(
            f"--mask auto: an image from {uris[0]} to {uris[-1]} ends the process that decodes it, or takes "
            "minutes; leave it out with --exclude"
        ) from None
    finally:
        child.close()
    if sums.images < 2:
        return Varying(None, f"--mask auto: {sums.images} photographs can be read{NO_MASK}")
    variance_HWC = (sums.images * sums.squares_HWC - sums.pixels_HWC**2) / sums.images**2
    return _varying(variance_HWC.mean(2), sums.images)


def _summed(
    storage_options: Mapping[str, Any],
    uris: Sequence[str],
    versions: Sequence[str],
    preprocessing: Preprocessing,
    limits: DecodeLimits,
) -> _Sums:
    loader = ImageLoader(ImageReader(storage_options), preprocessing, READ_THREADS, limits=limits)
    sums = _Sums.zero(preprocessing)
    for image in loader.load(uris, versions):
        if not isinstance(image.content, ImageError):
            pixels_HWC = image.content.pixels_HWC.astype(np.int64)
            sums = sums.plus(_Sums(1, pixels_HWC, pixels_HWC**2))
        elif image.content.is_transient:
            raise Failed(
                f"--mask auto: {image.image_uri} cannot be read this time ({image.content}); the same "
                "command tries again"
            )
    return sums


def _varying(variance_HW: NDArray[np.float64], images: int) -> Varying:
    """The region of high variance.

    Args:
        variance_HW: of the pixels, in squared grey levels.
        images: how many it was computed from.
    """
    side = min(variance_HW.shape)
    smooth_HW = ndimage.gaussian_filter(variance_HW, side * SMOOTHED, mode="nearest")
    level_HW = np.log(np.sqrt(smooth_HW + NOISE**2))
    threshold, separation, factor = _cut_in_two(level_HW)
    if separation < SEPARATION or factor < FACTOR:
        return Varying(None, f"--mask auto: {images} photographs vary by about the same everywhere{NO_MASK}")
    inside_HW = _rounded_off(level_HW > threshold, max(1, round(side * MARGIN)))
    share = inside_HW.mean()
    if not LEAST <= share <= MOST:
        return Varying(None, f"--mask auto: {images} photographs vary in {share:.0%} of the pixels{NO_MASK}")
    return Varying(
        to_text(inside_HW),
        f"--mask auto: the model looks at {share:.0%} of the pixels, where {images} photographs vary "
        f"{factor:.0f} times as much as elsewhere",
    )


def _cut_in_two(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """The threshold of Otsu (1979), above which values are in the upper group.

    Returns:
        Threshold, share of the variance between the groups, and exponential of the distance of their means.
    """
    values = np.sort(values, axis=None)
    variance = values.var()
    if not variance:
        return float(values[0]), 0.0, 1.0
    total = len(values)
    below = np.arange(1, total)
    sums = values.cumsum()
    distance = (sums[-1] - sums[:-1]) / (total - below) - sums[:-1] / below
    between = below * (total - below) / total**2 * distance**2
    cut = int(between.argmax())
    return float(values[cut]), float(between[cut] / variance), float(np.exp(distance[cut]))


def _rounded_off(inside_HW: NDArray[np.bool_], margin: int) -> NDArray[np.bool_]:
    """The region without specks, with its holes and narrow gaps, and with a margin around it.

    A hole is more often the even middle of a part than a background, and nobody looks where a mask is not.
    """
    number_HW, _ = ndimage.label(inside_HW)
    pixels = np.bincount(number_HW.ravel())
    pixels[0] = 0
    inside_HW = (pixels >= SPECK * inside_HW.size)[number_HW]
    if not inside_HW.any():
        return inside_HW
    grown_HW = ndimage.binary_fill_holes(ndimage.distance_transform_edt(~inside_HW) <= 2 * margin)
    if grown_HW.all():
        return grown_HW
    shrunk_HW: NDArray[np.bool_] = ndimage.distance_transform_edt(grown_HW) > margin
    return shrunk_HW
