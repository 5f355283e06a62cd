"""Anomaly maps laid over their images, and drawn there on a colour scale that is the same for every image."""

import io
import math
import posixpath
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from csflow.errors import ImageError
from csflow.images import decode
from csflow.inputs.reading import ImageReader
from csflow.preprocessing import Box
from csflow.storage import Location

READ_THREADS = 8
READ_DEADLINE_S = 10.0
"""Per image: a store that is down should cost whoever looks at maps minutes, not hours."""

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
        image: RGB, any size.
        anomaly_map: shape (map_height, map_width); upsampled bilinearly to the image's size.
        vmin: value, and everything below it, that leaves the image as it is.
        vmax: value, and everything above it, that is brightest; cells that are no number count as such.
        opacity: of the brightest cells; it grows linearly with the value.
        box: what the map covers of the image, as `resample` takes it (`map_box`). What is beyond stays as it
            is.

    Raises:
        ValueError: vmin is not below vmax.
    """
    if not vmin < vmax:
        raise ValueError(f"vmin {vmin} must be below vmax {vmax}")
    level = np.nan_to_num((anomaly_map.astype(np.float32) - vmin) / (vmax - vmin), nan=1.0)
    # Clipped before upsampling too: a cell far above vmax would bleed its colour over its neighbours.
    level_HW = resample(level.clip(0, 1), image.height, image.width, box, outside=0).clip(0, 1)
    colours = Image.fromarray(COLOUR_TABLE[(level_HW * 255).round().astype(np.uint8)])
    alpha = Image.fromarray((level_HW * opacity * 255).round().astype(np.uint8))
    return Image.composite(colours, image, alpha)


def resample(
    anomaly_map: NDArray[np.float32],
    height: int,
    width: int,
    box: Sequence[float] | None = None,
    outside: float = 0.0,
) -> NDArray[np.float32]:
    """The map in the pixels of an image, shape (height, width): bilinear, with cells as areas.

    Args:
        box: top, left, bottom and right edge of what the map covers, in these pixels; None for all of them.
        outside: value of the pixels that it does not cover.
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
    """Which cells lie along one side of an image, of a map that reaches from `start` to `end` in its pixels.

    Returns the cells to add in front, the two edges of the image in cells, and the cells to add behind.
    """
    step = (end - start) / cells
    before, after = max(0, math.ceil(start / step)), max(0, math.ceil((side - end) / step))
    first, last = before - start / step, before + (side - start) / step
    return before, max(0.0, first), min(float(before + cells + after), last), after


def box_of(row: Mapping[str, Any], height: int, width: int) -> Box | None:
    """What the map of a row of `scores` covers, in pixels of its image at this size; None for all of it."""
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


def overlay_row(
    row: Mapping[str, Any],
    *,
    colours: ColourRange | None = None,
    side: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Image.Image:
    """The image of a row of `scores` with its map over it.

    Args:
        row: a dict, or a row of pandas, Polars or DuckDB with the columns of `scores`.
        colours: ends of the colour scale; without them those of this map alone.
        side: longest side of the result in pixels, at most the image's own, which is the default.

    Raises:
        ImageError: the image version that was scored can no longer be read.
        ValueError: the scores hold no map.
    """
    anomaly_map = map_of(row)
    if anomaly_map is None:
        raise ValueError(f"{row['image_uri']} has no anomaly map: it was scored with --maps none")
    reader = ImageReader(storage_options or {}, deadline_s=READ_DEADLINE_S)
    return _overlay(row, anomaly_map, colours or colour_range([anomaly_map]), side, reader)


def write_overlays(
    scores: pa.Table,
    folder: str,
    *,
    colours: ColourRange | None = None,
    side: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Writes a PNG per row of `scores`, its image with its map over it, into a local or remote folder.

    Files are numbered in the order of the rows. An image that can no longer be read, or whose map was not
    kept, is warned about and left out.

    Args:
        colours: ends of the colour scale; without them one that suits all these maps.
        side: longest side of a PNG in pixels, at most the image's own, which is the default.

    Returns:
        Address of the PNG by image URI.
    """
    rows = scores.to_pylist()
    reader = ImageReader(storage_options or {}, deadline_s=READ_DEADLINE_S)
    target = Location(folder, storage_options or {})
    shared = colours or colour_range([found for row in rows if (found := map_of(row)) is not None])

    def write(number: int, row: Mapping[str, Any]) -> str | None:
        anomaly_map = map_of(row)
        if anomaly_map is None:
            return None
        try:
            drawn = _overlay(row, anomaly_map, shared, side, reader)
        except ImageError as error:
            warnings.warn(f"{row['image_uri']}: {error}", stacklevel=2)
            return None
        data = io.BytesIO()
        drawn.save(data, "PNG")
        place = target / f"{number:05}-{_stem(row['image_uri'])}.png"
        place.write(data.getvalue())
        return place.url

    with ThreadPoolExecutor(READ_THREADS) as pool:
        written: Iterator[str | None] = pool.map(write, range(len(rows)), rows)
        return {row["image_uri"]: url for row, url in zip(rows, written, strict=True) if url}


def _overlay(
    row: Mapping[str, Any],
    anomaly_map: NDArray[np.float32],
    colours: ColourRange | None,
    side: int | None,
    reader: ImageReader,
) -> Image.Image:
    assert colours is not None  # there is a map
    image = read_image(row, reader, side)
    box = box_of(row, image.height, image.width)
    return overlay(image, anomaly_map, vmin=colours.vmin, vmax=colours.vmax, box=box)


def read_image(row: Mapping[str, Any], reader: ImageReader, side: int | None = None) -> Image.Image:
    """The image version that a row of `scores` is about, RGB, its longest side at most `side` pixels.

    Raises:
        ImageError: it can no longer be read.
    """
    sides = np.array([row["image_height"], row["image_width"]])
    small = sides * min(1.0, (side or sides.max()) / sides.max())
    height, width = np.maximum(1, small.round()).astype(int).tolist()
    data = reader.read(row["image_uri"], row["image_version"])
    return Image.fromarray(decode(data, (height, width)).pixels_HWC)


def _stem(image_uri: str) -> str:
    """A file name for an image, from the last part of its URI."""
    name = posixpath.splitext(image_uri.rpartition("/")[2])[0]
    return re.sub(r"[^\w.-]", "_", name)[:100]
