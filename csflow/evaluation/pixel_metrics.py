"""Pixel-level metrics in bounded memory: AUROC and AUPRO from histograms of anomaly-map values.

Maps are upsampled bilinearly to the size of the mask. Only counts are kept of an image, so memory does not
grow with the number of images or regions.

Dimension letters: H, W rows and columns of the image; D bins of map values, highest first.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from csflow.maps import resample
from csflow.regions import EIGHT_NEIGHBOURS

FPR_LIMIT = 0.3
"""False positive rate up to which the PRO curve is integrated (Bergmann et al., CVPR 2019)."""

MANTISSA_BITS = 11
"""Bits of a map value's mantissa that its bin keeps: a bin is 0.024 % to 0.049 % of its value wide."""
_SHIFT = 23 - MANTISSA_BITS
_BINS = 1 << (31 - _SHIFT)


class Area(NamedTuple):
    """An area under a curve."""

    value: float
    binning_error: float
    """The exact area, in which every value is its own bin, lies within `value` ± this error."""


class PixelHistograms:
    """Counts of map values over normal pixels, defective pixels and defective regions.

    A region is a set of defective pixels connected through any of their eight neighbours. PRO is the mean
    over regions of the share that is found. It equals the share of all defective pixels found if each counts
    1 / (regions · pixels of its region), so one weighted histogram serves for any number of regions.
    """

    def __init__(self) -> None:
        # A float32 that is not negative has the order of its bits, so their highest ones number the bins:
        # no range must be known in advance, and the resolution is relative.
        self._normal = np.zeros(_BINS, np.int64)
        self._defective = np.zeros(_BINS, np.int64)
        self._region_shares = np.zeros(_BINS, np.float64)
        self.regions = 0

    @property
    def normal_pixels(self) -> int:
        return int(self._normal.sum())

    @property
    def defective_pixels(self) -> int:
        return int(self._defective.sum())

    def add(
        self,
        anomaly_map: NDArray[np.float32],
        mask_HW: NDArray[np.bool_],
        box: Sequence[float] | None = None,
    ) -> None:
        """Counts one image: its map in native resolution, and which of its pixels are defective.

        Map values that are not finite rank highest. Pixels beyond the box rank lowest: the model does not see
        them, so it finds no defect there and raises no alarm. If they were left out, a model that sees half
        of a part would rank as well as one that sees all of it.

        Args:
            box: the part of the image that the map covers (`map_box`); None for the whole image.

        Raises:
            ValueError: a map value is negative.
        """
        height, width = mask_HW.shape
        bin_HW = _bins(upsample(anomaly_map, height, width, box))
        first = int(bin_HW.min())
        if first < 0:
            raise ValueError("anomaly maps are means of squares, and cannot be negative")
        bin_HW -= first  # the counts of one image span few bins
        counted = slice(first, first + int(bin_HW.max()) + 1)
        pixels = np.bincount(bin_HW.ravel())
        if mask_HW.any():
            region_HW, regions = ndimage.label(mask_HW, EIGHT_NEIGHBOURS)
            sizes = np.bincount(region_HW.ravel())
            found, weights = bin_HW[mask_HW], 1 / sizes[region_HW[mask_HW]]
            defective = np.bincount(found, minlength=len(pixels))
            self._defective[counted] += defective
            self._region_shares[counted] += np.bincount(found, weights, minlength=len(pixels))
            self.regions += regions
            pixels = pixels - defective
        self._normal[counted] += pixels

    def auroc(self) -> Area:
        """Area under recall of defective pixels against false positive rate of normal ones."""
        return _area(*self._curve(self._defective), limit=1.0)

    def aupro(self, limit: float = FPR_LIMIT) -> Area:
        """Area under PRO against the false positive rate, from 0 to `limit`, divided by `limit`."""
        return _area(*self.pro_curve(), limit)

    def pro_curve(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """False positive rate of the normal pixels of all images, and PRO, from (0, 0) to (1, 1)."""
        return self._curve(self._region_shares)

    def _curve(self, found: NDArray[np.generic]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        used = np.flatnonzero((self._normal > 0) | (self._defective > 0))[::-1]
        rates = [np.append(0.0, counts[used]).cumsum() for counts in (self._normal, found)]
        return rates[0] / rates[0][-1], rates[1] / rates[1][-1]


def upsample(
    anomaly_map: NDArray[np.float32], height: int, width: int, box: Sequence[float] | None = None
) -> NDArray[np.float32]:
    """The map at image size, bilinear with cells as areas (`align_corners=False`), and 0 beyond the box."""
    top = float(np.finfo(np.float32).max)
    finite = np.nan_to_num(anomaly_map.astype(np.float32), nan=top, posinf=top)
    return resample(finite, height, width, box, outside=0)


def _bins(values: NDArray[np.float32]) -> NDArray[np.int64]:
    # Adding 0 turns a negative zero into zero, whose bits are the lowest.
    return ((values + np.float32(0)).view(np.int32) >> _SHIFT).astype(np.int64)


def _area(x: NDArray[np.float64], y: NDArray[np.float64], limit: float) -> Area:
    """The area by trapezoids from x = 0 to `limit`, divided by `limit`."""
    end = int(np.searchsorted(x, limit, side="right"))
    x_D, y_D = x[:end], y[:end]
    # Inside a bin the exact curve climbs anywhere in the box whose diagonal stands for it.
    error = np.dot(np.diff(x_D), np.diff(y_D)) / 2
    if x_D[-1] < limit:
        error += (limit - x_D[-1]) * (y[end] - y_D[-1])
        x_D, y_D = np.append(x_D, limit), np.append(y_D, np.interp(limit, x, y))
    return Area(float(np.trapezoid(y_D, x_D) / limit), float(error / limit))
