"""Draws anomaly maps over images, on a colour scale that can be the same for every image."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from csflow.preprocessing import Box

# Inferno at eight even steps (Smith & van der Walt, https://bids.github.io/colormap): perceptually uniform,
# readable in grey and with colour-blind eyes.
ANCHORS = (
    (0, 0, 4),
    (40, 11, 84),
    (101, 21, 110),
    (159, 42, 99),
    (212, 72, 66),
    (245, 125, 21),
    (250, 193, 39),
    (252, 255, 164),
)


def _colour_table() -> NDArray[np.uint8]:
    """Inferno's 256 colours, shape (256, 3)."""
    anchors = np.array(ANCHORS, dtype=np.float64)
    steps = np.linspace(0, len(anchors) - 1, 256)
    channels = [np.interp(steps, np.arange(len(anchors)), channel) for channel in anchors.T]
    return np.stack(channels, axis=1).round().astype(np.uint8)


COLOUR_TABLE = _colour_table()


def overlay(
    image: Image.Image,
    anomaly_map: NDArray[np.float32],
    *,
    vmin: float,
    vmax: float,
    opacity: float = 0.8,
    box: Sequence[float] | None = None,
) -> Image.Image:
    """The RGB image with its anomaly map over it.

    Args:
        image: of any size; what is not RGB, such as grey, is drawn in RGB.
        anomaly_map: shape (map_height, map_width); upsampled bilinearly to the image's size.
        vmin: this value, and lower ones, leave the image as it is.
        vmax: this value, higher ones and NaN are brightest.
        opacity: opacity of the brightest cells; opacity grows linearly with the value.
        box: the part of the image that the map covers (`map_box`), as in `resample`; the rest stays as it is.

    Raises:
        ValueError: vmin is not below vmax.
    """
    colours = layer(anomaly_map, image.height, image.width, vmin=vmin, vmax=vmax, box=box)
    alpha = colours.getchannel("A").point(lambda value: round(value * opacity))
    return Image.composite(colours.convert("RGB"), image.convert("RGB"), alpha)


def layer(
    anomaly_map: NDArray[np.float32],
    height: int,
    width: int,
    *,
    vmin: float,
    vmax: float,
    box: Sequence[float] | None = None,
) -> Image.Image:
    """The map in colours of `height` x `width` pixels, RGBA, to be laid over its image.

    Arguments are those of `overlay`. Opacity grows linearly with the value, up to 1 for the brightest cells.

    Raises:
        ValueError: vmin is not below vmax.
    """
    if not vmin < vmax:
        raise ValueError(f"vmin {vmin} must be below vmax {vmax}")
    level = np.nan_to_num((anomaly_map.astype(np.float32) - vmin) / (vmax - vmin), nan=1.0)
    # Clipped before upsampling too: a cell far above vmax would bleed its colour over its neighbours.
    level_HW = resample(level.clip(0, 1), height, width, box, outside=0).clip(0, 1)
    colour_HW = (level_HW * 255).round().astype(np.uint8)
    return Image.fromarray(np.dstack([COLOUR_TABLE[colour_HW], colour_HW]))


def resample(
    anomaly_map: NDArray[np.float32],
    height: int,
    width: int,
    box: Sequence[float] | None = None,
    outside: float = 0.0,
) -> NDArray[np.float32]:
    """The map resampled to the pixels of an image, shape (height, width): bilinear, with cells as areas.

    Args:
        box: edges (top, left, bottom, right) of the part that the map covers, in pixels; None for the whole.
        outside: value of the pixels that the map does not cover.
    """
    top, left, bottom, right = (0, 0, height, width) if box is None else box
    rows, columns = anomaly_map.shape
    above, first_row, last_row, below = _cells(rows, top, bottom, height)
    before, first_column, last_column, after = _cells(columns, left, right, width)
    cells = np.pad(anomaly_map.astype(np.float32), ((above, below), (before, after)), mode="edge")
    resized = Image.fromarray(cells).resize(
        (width, height), Image.Resampling.BILINEAR, (first_column, first_row, last_column, last_row)
    )
    value_HW = np.array(resized)
    y_H, x_W = np.arange(height) + 0.5, np.arange(width) + 0.5
    value_HW[(y_H < top) | (y_H > bottom)] = outside
    value_HW[:, (x_W < left) | (x_W > right)] = outside
    return value_HW


def _cells(cells: int, start: float, end: float, side: int) -> tuple[int, float, float, int]:
    """The cells of a map from `start` to `end` (in pixels) that lie along one side of an image.

    Returns the number of cells to add in front, both edges of the image in cells, and the number to add
    behind.
    """
    step = (end - start) / cells
    before, after = max(0, math.ceil(start / step)), max(0, math.ceil((side - end) / step))
    first, last = before - start / step, before + (side - start) / step
    return before, max(0.0, first), min(float(before + cells + after), last), after


def box_of(row: Mapping[str, Any], height: int, width: int) -> Box | None:
    """The box that a row's map covers, in pixels of its image at this size; None for all of it."""
    box = row.get("map_box")  # an older csflow wrote none
    if box is None:
        return None
    across, down = width / row["image_width"], height / row["image_height"]
    top, left, bottom, right = map(float, box)
    return Box(top * down, left * across, bottom * down, right * across)


@dataclass(frozen=True)
class ColourRange:
    """Map values at the ends of the colour scale, the same for all images that are compared."""

    vmin: float
    vmax: float


def colour_range(anomaly_maps: Sequence[NDArray[np.float32]]) -> ColourRange | None:
    """A range from what most cells of these maps hold up to the hottest few; None without maps."""
    if not anomaly_maps:
        return None
    values = np.concatenate([anomaly_map.ravel() for anomaly_map in anomaly_maps])
    finite = values[np.isfinite(values)]
    vmin, vmax = np.percentile(finite, [50, 99.5]) if len(finite) else (0.0, 1.0)
    return ColourRange(float(vmin), float(vmax) if vmin < vmax else float(vmin) + 1)


def map_of(row: Mapping[str, Any]) -> NDArray[np.float32] | None:
    """The anomaly map of a row of `scores`, shape (map_height, map_width); None if it was not kept."""
    if row["anomaly_map"] is None:
        return None
    return np.array(row["anomaly_map"], dtype=np.float32).reshape(row["map_height"], row["map_width"])
