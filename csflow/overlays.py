"""Makes pictures of rows of `scores`: reads their images again and draws the anomaly maps over them."""

import io
import math
import posixpath
import re
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from csflow.errors import ImageError
from csflow.images import decode
from csflow.inputs.reading import ImageReader
from csflow.maps import ColourRange, box_of, colour_range, map_of, overlay
from csflow.storage import Location

READ_THREADS = 8
READ_DEADLINE_S = 10.0
"""Deadline per image, so that a user waits minutes, not hours, if a store is down."""


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
        colours: ends of the colour scale; by default those of this map alone.
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
    scores: Any,
    folder: str,
    *,
    colours: ColourRange | None = None,
    side: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Writes the picture of each row of `scores` as a PNG into a local or remote folder.

    Files are numbered in the order of the rows. An image that can no longer be read, or has no map, is left
    out with a warning.

    Args:
        scores: a table of pyarrow, pandas or Polars, or a relation of DuckDB, with the columns of `scores`.
        colours: ends of the colour scale; by default one scale that suits all these maps.
        side: longest side of a PNG in pixels, at most the image's own, which is the default.

    Returns:
        Address of the PNG by image URI.
    """
    rows = pa.table(scores).to_pylist()
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
        file = target / f"{number:05}-{_stem(row['image_uri'])}.png"
        file.write(data.getvalue())
        return file.url

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
    """The image of a row, RGB, its longest side at most `side` pixels. Raises ImageError if it is gone."""
    return reduced(reader.read(row["image_uri"], row["image_version"]), row, side)


def reduced(data: bytes, row: Mapping[str, Any], side: int | None = None) -> Image.Image:
    """The image in these bytes, RGB, its longest side at most `side` pixels. Raises ImageError if damaged.

    Args:
        row: its row of `scores`, which has its size.
    """
    sides = np.array([row["image_height"], row["image_width"]])
    small = sides * min(1.0, (side or sides.max()) / sides.max())
    height, width = np.maximum(1, small.round()).astype(int).tolist()
    return Image.fromarray(decode(data, (height, width), max_pixels=math.prod(sides.tolist())).pixels_HWC)


def _stem(image_uri: str) -> str:
    """A file name for an image, made from the last part of its URI."""
    name = posixpath.splitext(image_uri.rpartition("/")[2])[0]
    return re.sub(r"[^\w.-]", "_", name)[:100]
