"""Says before any cluster work what a job is about to do, from its listing, its model and a few images."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import pyarrow as pa

from csflow.errors import ImageError
from csflow.images import measure
from csflow.inputs.child_process import Child, ChildDied
from csflow.inputs.reading import ImageReader
from csflow.preprocessing import Preprocessing

LOOKED_AT = 4
READ_DEADLINE_S = 5.0
"""Seconds for reading one of these images: no job waits for a store in order to describe its work."""
LARGEST_FILE = 256 << 20


def describe_images(
    images: int,
    sizes: Sequence[tuple[int, int]],
    preprocessing: Preprocessing,
    map_shape: Sequence[int],
) -> str:
    """How many images there are, of which size, what the model makes of them, and what one map cell covers.

    Args:
        sizes: height and width of some of the images.
        map_shape: height and width of an anomaly map, in cells.
    """
    height, width = preprocessing.image_size
    sizes = sorted(set(sizes))
    resized = f"{_count(images)} → {'tiles of ' * bool(preprocessing.tiling)}{width} × {height} pixels"
    if not sizes:
        return f"{resized}, {map_shape[1]} × {map_shape[0]} map cells"
    shown = " to ".join(f"{w} × {h}" for h, w in dict.fromkeys([sizes[0], sizes[-1]]))
    if preprocessing.tiling:
        tiles = len(preprocessing.tile_corners(*sizes[-1]))
        return (
            f"{_count(images)} of {shown} → tiles of {width} × {height} pixels at scale "
            f"{preprocessing.tiling.scale:g}, {tiles} of the largest"
        )
    box = preprocessing.place(*sizes[-1]).box
    cell = (box.right - box.left) / map_shape[1], (box.bottom - box.top) / map_shape[0]
    whose = "the original" if len(sizes) == 1 else "the largest of them"
    return (
        f"{_count(images)} of {shown} → {width} × {height} pixels; "
        f"a map cell is {cell[0]:.0f} × {cell[1]:.0f} pixels of {whose}"
    )


def some_sizes(images: pa.Table, storage_options: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Height and width of a few images, up to the first that cannot be read; none if one kills its process.

    Args:
        images: `image_uri` and `image_version` of all images.
    """
    child = Child(storage_options)
    try:
        return child.call(_measured, spread(images).select(["image_uri", "image_version"]).to_pylist())
    except ChildDied:
        return []
    finally:
        child.close()


def spread(images: pa.Table, most: int = LOOKED_AT) -> pa.Table:
    """Up to so many rows from all over a listing, since one folder's images may be of one camera."""
    last = images.num_rows - 1
    rows = sorted({round(last * i / (most - 1)) for i in range(most)})
    return images.take(pa.array([row for row in rows if 0 <= row <= last], pa.int64()))


def _measured(
    storage_options: Mapping[str, Any], images: Sequence[Mapping[str, str]]
) -> list[tuple[int, int]]:
    reader = ImageReader(storage_options, READ_DEADLINE_S, LARGEST_FILE)
    sizes = []
    with suppress(ImageError):  # the job itself reads the image again, and says what is wrong
        for image in images:
            sizes.append(measure(reader.read(image["image_uri"], image["image_version"])))
    return sizes


def _count(images: int) -> str:
    return f"{images:,} image{'s' * (images != 1)}"
