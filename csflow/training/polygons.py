"""Reads regions that are drawn as polygons, from GeoJSON and COCO files, and fills them.

Coordinates are pixels of an upright photograph: x to the right, y down, from its upper left corner.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydantic import BaseModel, Field, FiniteFloat, TypeAdapter, ValidationError

from csflow.preprocessing import Preprocessing

FINENESS = 4
"""Polygons are filled on a raster with so many times the model's pixels a side."""
LEEWAY = 1.0
"""Pixels that a point may lie outside of the picture: drawing tools round."""

Position = Annotated[list[FiniteFloat], Field(min_length=2)]
Ring = list[tuple[float, float]]
"""The points (x, y) of a closed line."""
_PARTS: dict[str, TypeAdapter[Any]] = {
    "Polygon": TypeAdapter(list[list[Position]]),
    "MultiPolygon": TypeAdapter(list[list[list[Position]]]),
}


class Polygons(NamedTuple):
    """The region inside any of some polygons."""

    outlines: list[list[Ring]]
    """For each polygon its outer line and those of its holes."""
    size: tuple[int, int] | None
    """Height and width of the picture, if the file tells them."""


class _CocoImage(BaseModel):
    id: int
    height: int = Field(ge=1)
    width: int = Field(ge=1)


class _CocoAnnotation(BaseModel):
    image_id: int
    segmentation: list[list[FiniteFloat]] | dict[str, Any] = []


class _Coco(BaseModel):
    images: list[_CocoImage]
    annotations: list[_CocoAnnotation]


def is_json(data: bytes) -> bool:
    """Whether a file holds JSON, which no image file begins like."""
    return data.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[")


def read_polygons(data: bytes) -> Polygons:
    """The polygons in a GeoJSON or COCO file. Raises ValueError, which says what is wrong, if it has none."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON: {error}") from None
    try:
        if isinstance(content, dict) and "annotations" in content:
            return _of_coco(_Coco.model_validate(content))
        outlines = list(_of_geojson(content))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"is wrong at {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return Polygons(_checked(outlines), None)


def filled(polygons: Polygons, height: int, width: int, preprocessing: Preprocessing) -> NDArray[np.bool_]:
    """The model's pixels (H, W) that lie in the region of a picture of this size.

    Raises:
        ValueError: a point lies outside of the picture.
    """
    for x, y in (point for rings in polygons.outlines for ring in rings for point in ring):
        if not (-LEEWAY <= x <= width + LEEWAY and -LEEWAY <= y <= height + LEEWAY):
            raise ValueError(
                f"has the point x {x:g}, y {y:g} outside of a picture of {height} x {width} pixels; x goes "
                "right and y down, from the upper left corner"
            )
    box = preprocessing.place(height, width).box
    rows, columns = (side * FINENESS for side in preprocessing.image_size)
    x_factor, y_factor = columns / (box.right - box.left), rows / (box.bottom - box.top)
    region = Image.new("1", (columns, rows))
    for outer, *holes in polygons.outlines:
        # Apart, so that a hole is none in other polygons.
        canvas = Image.new("1", region.size) if holes else region
        for ring, is_inside in [(outer, True), *((hole, False) for hole in holes)]:
            points = [((x - box.left) * x_factor - 0.5, (y - box.top) * y_factor - 0.5) for x, y in ring]
            ImageDraw.Draw(canvas).polygon(points, fill=is_inside)
        if holes:
            region.paste(1, mask=canvas)
    fine = np.asarray(region).reshape(rows // FINENESS, FINENESS, columns // FINENESS, FINENESS)
    inside_HW: NDArray[np.bool_] = fine.mean((1, 3)) >= 0.5
    return inside_HW


def _of_geojson(content: Any) -> Iterator[list[Ring]]:
    kind = content.get("type") if isinstance(content, dict) else None
    if kind == "FeatureCollection":
        for feature in TypeAdapter(list[dict[str, Any]]).validate_python(content.get("features")):
            yield from _of_geojson(feature)
    elif kind == "Feature":
        if content.get("geometry") is not None:  # which GeoJSON allows
            yield from _of_geojson(content["geometry"])
    elif not isinstance(kind, str):
        raise ValueError("is neither GeoJSON (which has a type) nor COCO (images and annotations)")
    elif kind in _PARTS:
        shapes = _PARTS[kind].validate_python(content.get("coordinates"))
        for rings in filter(None, [shapes] if kind == "Polygon" else shapes):
            yield [[(position[0], position[1]) for position in ring] for ring in rings]
    else:
        raise ValueError(f"has a {kind}, which is no area; a region is a Polygon or MultiPolygon")


def _of_coco(content: _Coco) -> Polygons:
    sizes = {image.id: (image.height, image.width) for image in content.images}
    of_image: dict[int, list[list[float]]] = defaultdict(list)
    for annotation in content.annotations:
        if annotation.image_id not in sizes:
            raise ValueError(f"has an annotation of image {annotation.image_id}, which it does not list")
        if isinstance(annotation.segmentation, dict):
            raise ValueError(
                "has run-length encoded annotations; export polygons, or save the mask as an image"
            )
        of_image[annotation.image_id] += annotation.segmentation
    if len({(sizes[number], str(sorted(shapes))) for number, shapes in of_image.items()}) > 1:
        raise ValueError(
            f"has different annotations for {len(of_image)} images; a model has one mask, so annotate one "
            "image, or all alike"
        )
    if not of_image:
        raise ValueError("has no annotation")
    number, shapes = next(iter(of_image.items()))
    if any(len(shape) % 2 for shape in shapes):
        raise ValueError("has a polygon with an odd number of coordinates")
    outlines = [[list(zip(shape[::2], shape[1::2], strict=True))] for shape in shapes]
    return Polygons(_checked(outlines), sizes[number])


def _checked(outlines: list[list[Ring]]) -> list[list[Ring]]:
    """The same polygons. Raises ValueError if there is none, or if one is no area."""
    if not outlines:
        raise ValueError("has no polygon")
    for ring in (ring for rings in outlines for ring in rings):
        if len(set(ring)) < 3:
            raise ValueError(f"has a polygon of {len(set(ring))} points; 3 or more enclose an area")
        twice_the_area = sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in pairwise([*ring, ring[0]]))
        if not twice_the_area:
            raise ValueError("has a polygon that encloses no area")
    return outlines
