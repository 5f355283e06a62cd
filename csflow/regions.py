"""Regions of anomaly maps: connected cells above a threshold, each of which may be a defect.

Cells are connected through any of their eight neighbours.

Dimension letters: B images, H, W rows and columns of their maps; C cells above the threshold; N regions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)
_OF_ONE_MAP = np.stack([np.zeros((3, 3), dtype=bool), EIGHT_NEIGHBOURS, np.zeros((3, 3), dtype=bool)])
"""The neighbours of a cell in a stack of maps: those in its own map."""


@dataclass(frozen=True)
class Regions:
    """The regions of a batch of images: by image, and in an image the highest peak first. Shape (N,) each."""

    image_N: NDArray[np.int64]
    """Number of the image in the batch."""
    x_N: NDArray[np.float64]
    """Left edge of the box around the region, in pixels of the original, as are y, width and height."""
    y_N: NDArray[np.float64]
    width_N: NDArray[np.float64]
    height_N: NDArray[np.float64]
    area_N: NDArray[np.float64]
    """Area of its cells, in square pixels of the original."""
    peak_N: NDArray[np.float64]
    """Its hottest cell."""
    mean_N: NDArray[np.float64]
    """The mean of its cells."""

    def take(self, chosen: NDArray[np.generic]) -> "Regions":
        """The regions with these numbers, or where this is true."""
        return Regions(*(getattr(self, field.name)[chosen] for field in fields(self)))


def find_regions(
    anomaly_map_BHW: NDArray[np.float32],
    threshold: float,
    image_height_B: ArrayLike,
    image_width_B: ArrayLike,
    box_B4: NDArray[np.float64],
) -> Regions:
    """The regions above the threshold, without what lies in the padding of a letterbox.

    Args:
        image_height_B: heights of the original images, in pixels.
        image_width_B: their widths.
        box_B4: the part that each map covers: top, left, bottom and right edge.
    """
    is_hot_BHW = anomaly_map_BHW > threshold
    image_C, row_C, column_C = np.nonzero(is_hot_BHW)
    if not len(image_C):  # as on most images
        return Regions(image_C, *(np.empty(0) for _ in fields(Regions)[1:]))
    # Cells of one region are made neighbours in memory, so that it can be summed up at once.
    region_C = ndimage.label(is_hot_BHW, _OF_ONE_MAP)[0][is_hot_BHW]
    order = np.argsort(region_C, kind="stable")
    region_C, image_C, row_C, column_C = region_C[order], image_C[order], row_C[order], column_C[order]
    rows, columns = anomaly_map_BHW.shape[1:]
    top_C, bottom_C = _edges(row_C, rows, box_B4[image_C, 0::2], np.asarray(image_height_B)[image_C])
    left_C, right_C = _edges(column_C, columns, box_B4[image_C, 1::2], np.asarray(image_width_B)[image_C])
    is_seen_C = (top_C < bottom_C) & (left_C < right_C)
    top_C, bottom_C, left_C, right_C = (edge_C[is_seen_C] for edge_C in (top_C, bottom_C, left_C, right_C))
    value_C = anomaly_map_BHW[image_C, row_C, column_C][is_seen_C].astype(np.float64)
    first_N = np.flatnonzero(np.diff(region_C[is_seen_C], prepend=0))
    if not len(first_N):
        return Regions(image_C[:0], *(np.empty(0) for _ in fields(Regions)[1:]))
    top_N, left_N = np.minimum.reduceat(top_C, first_N), np.minimum.reduceat(left_C, first_N)
    regions = Regions(
        image_N=image_C[is_seen_C][first_N],
        x_N=left_N,
        y_N=top_N,
        width_N=np.maximum.reduceat(right_C, first_N) - left_N,
        height_N=np.maximum.reduceat(bottom_C, first_N) - top_N,
        area_N=np.add.reduceat((bottom_C - top_C) * (right_C - left_C), first_N),
        peak_N=np.maximum.reduceat(value_C, first_N),
        mean_N=np.add.reduceat(value_C, first_N) / np.diff(first_N, append=len(value_C)),
    )
    return regions.take(np.lexsort((-regions.peak_N, regions.image_N)))


def _edges(
    cell_C: NDArray[np.int64], cells: int, covered_C2: NDArray[np.float64], side_C: NDArray[np.generic]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where cells begin and end along one side of their image, in pixels, without what lies beyond it.

    Args:
        covered_C2: begin and end of what the map covers.
        side_C: length of the image's side.
    """
    start_C, end_C = covered_C2.T
    step_C = (end_C - start_C) / cells
    return tuple((start_C + (cell_C + k) * step_C).clip(0, side_C) for k in (0, 1))


def region_pixels(
    anomaly_map_HW: NDArray[np.float32],
    threshold: float,
    height: int,
    width: int,
    box: Sequence[float] | None = None,
) -> NDArray[np.int64]:
    """The region of each pixel of an image (height, width): its place in `find_regions`, from 1; 0 for none.

    A pixel belongs to the cell under its centre. A region that is narrower than a pixel may have none.

    Args:
        box: the part of the image that the map covers (`map_box`); None for the whole image.
    """
    top, left, bottom, right = (0, 0, height, width) if box is None else box
    label_HW, labels = ndimage.label(anomaly_map_HW > threshold, EIGHT_NEIGHBOURS)
    seen = np.ix_(
        *(
            np.less(*_edges(np.arange(cells), cells, np.array([covered]), np.array([side])))
            for cells, covered, side in zip(
                label_HW.shape, ((top, bottom), (left, right)), (height, width), strict=True
            )
        )
    )
    found = np.unique(label_HW[seen])
    found = found[found > 0]
    peak_N = np.asarray(ndimage.maximum(anomaly_map_HW[seen], label_HW[seen], found))
    number = np.zeros(labels + 1, dtype=np.int64)
    number[found[np.argsort(-peak_N, kind="stable")]] = np.arange(1, len(found) + 1)
    # One more row and column of no region, for pixels that the map does not cover.
    number_HW = np.pad(number[label_HW], ((0, 1), (0, 1)))
    rows = _cells_under(height, label_HW.shape[0], top, bottom)
    columns = _cells_under(width, label_HW.shape[1], left, right)
    return number_HW[np.ix_(rows, columns)]


def _cells_under(side: int, cells: int, start: float, end: float) -> NDArray[np.int64]:
    """The cell under the centre of each pixel along one side of an image; −1 if there is none."""
    cell = np.floor((np.arange(side) + 0.5 - start) * cells / (end - start)).astype(np.int64)
    return np.where((cell >= 0) & (cell < cells), cell, -1)


def region_levels(anomaly_map_HW: NDArray[np.float32], most: int) -> NDArray[np.float64]:
    """The levels below which a map has at least 1, 2, … `most` regions; −∞ if it never has so many.

    While a threshold falls, regions appear, grow and merge. The j-th level is the value just below which
    there are j regions for the first time. So the number of levels above a threshold is the largest number of
    regions at this threshold or a higher one. Other than the number of regions it can only grow when the
    threshold falls, which `csflow.calibration.region_threshold` needs.
    """
    levels = np.full(most, -np.inf)
    height, width = anomaly_map_HW.shape
    value_P = anomaly_map_HW.ravel()
    order = np.argsort(-value_P, kind="stable").tolist()
    values = value_P[order].tolist()
    root: dict[int, int] = {}  # a cell above the threshold, and another one of its region

    def find(cell: int) -> int:
        while root[cell] != cell:
            root[cell] = cell = root[root[cell]]
        return cell

    regions = known = 0
    for i, cell in enumerate(order):
        row, column = divmod(cell, width)
        root[cell] = cell
        regions += 1
        for y in range(max(0, row - 1), min(height, row + 2)):
            for x in range(max(0, column - 1), min(width, column + 2)):
                if (other := y * width + x) in root and (merged := find(other)) != (own := find(cell)):
                    root[merged] = own
                    regions -= 1
        # Equal values come into sight together.
        if regions > known and (i + 1 == len(values) or values[i + 1] != values[i]):
            levels[known:regions] = values[i]
            known = regions
            if known >= most:
                break
    return levels
