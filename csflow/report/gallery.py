"""Makes the gallery: pictures of the highest anomaly scores, their maps, and close-ups in full resolution.

A map is a small transparent picture of its own, which the page lays over the photograph.
"""

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from threading import BoundedSemaphore
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from csflow import maps
from csflow.images import decode
from csflow.inputs.reading import ImageReader
from csflow.maps import ColourRange, colour_range, map_of
from csflow.output.reading import latest_per_image
from csflow.overlays import READ_DEADLINE_S, READ_THREADS, reduced
from csflow.preprocessing import Box, whole
from csflow.report.archive import Archive
from csflow.report.config import ReportConfig
from csflow.report.links import links
from csflow.storage import to_parquet

LARGEST_SIDE, SMALLEST_SIDE = 384, 96
"""Longest side of a picture in pixels: its largest and smallest value."""
LARGE_PICTURES = 120
"""Up to this many images have large pictures; more share about the same total size."""
LAYER_SIDE = 96
"""Longest side of a map's picture in pixels. Browsers enlarge it smoothly, as `csflow.maps` does."""
REDUCED_FROM = 1.5
"""An image whose longest side is more than this times that of its picture has a close-up, too."""
FULL_SIZE_AT_ONCE = 2
"""Largest number of images in memory at full size: one of 175 megapixels takes a gigabyte."""
REGIONS_SHOWN = 20
"""Largest number of regions whose boxes are drawn on a picture: those of the highest peaks."""
RAY_FROM = 600
"""From this many images on, the whole cluster makes the pictures, since joining it takes seconds."""
SHARD_IMAGES = 50


@dataclass(frozen=True)
class Pictures:
    """The WebP files of one image; `problem` says why there are none."""

    width: int = 0
    height: int = 0
    original: bytes | None = None
    layer: bytes | None = None
    """The anomaly map in colours, transparent where it is usual."""
    close_up: bytes | None = None
    """The surroundings of the hottest place, pixel by pixel; None if `original` shows as much."""
    close_up_edges: list[int] | None = None
    """Its top, left, bottom and right edge in pixels of the original."""
    problem: str | None = None


PICTURES = pa.schema(
    [
        pa.field("width", pa.int64()),
        pa.field("height", pa.int64()),
        pa.field("original", pa.binary()),
        pa.field("layer", pa.binary()),
        pa.field("close_up", pa.binary()),
        pa.field("close_up_edges", pa.list_(pa.int64())),
        pa.field("problem", pa.string()),
    ]
)


@dataclass(frozen=True)
class Card:
    """One image of the gallery."""

    row: dict[str, Any]
    is_listed: bool
    link: str | None
    """Address that opens the image elsewhere."""
    pictures: Pictures

    @property
    def peak_left(self) -> float:
        """Horizontal position of the hottest map cell, in percent of the width."""
        return float(100 * self.row["peak_x"] / self.row["image_width"])

    @property
    def peak_top(self) -> float:
        """Vertical position of the hottest map cell, in percent of the height."""
        return float(100 * self.row["peak_y"] / self.row["image_height"])

    @property
    def regions(self) -> list[Box]:
        """Boxes around the worst regions, in percent of height and width; none if none are known."""
        down, across = 100 / self.row["image_height"], 100 / self.row["image_width"]
        return [
            Box(
                region["y"] * down,
                region["x"] * across,
                (region["y"] + region["height"]) * down,
                (region["x"] + region["width"]) * across,
            )
            for region in (self.row["regions"] or [])[:REGIONS_SHOWN]
        ]

    @property
    def close_up_place(self) -> Box:
        """Where the close-up lies on the image, in percent of its height and width."""
        top, left, bottom, right = self.pictures.close_up_edges or [0, 0, 0, 0]
        down, across = 100 / self.row["image_height"], 100 / self.row["image_width"]
        return Box(top * down, left * across, bottom * down, right * across)


def make_gallery(
    archive: Archive, is_listed: NDArray[np.bool_], config: ReportConfig
) -> tuple[list[Card], ColourRange | None]:
    """Cards of the highest anomaly scores, highest first, and the colour range of their maps."""
    # A score that is no number is the most anomalous there is.
    sort_keys = [("anomaly_score", "descending", "at_start")]
    order = pc.sort_indices(archive.images, sort_keys=sort_keys)[: config.top]
    rows = _full_rows(archive.scores, archive.images.take(order))
    listed = is_listed[order.to_numpy()].tolist()
    addresses = links(
        rows["image_uri"].to_pylist(), config.link, config.presign_hours, config.storage_options
    )
    found = [anomaly_map for row in rows.to_pylist() if (anomaly_map := map_of(row)) is not None]
    colours = colour_range(found)
    maker = PictureMaker(config.storage_options, colours, picture_side(len(rows)))
    pictures = _with_ray(rows, maker) if len(rows) >= RAY_FROM else maker.make(rows.to_pylist())
    columns = zip(rows.to_pylist(), listed, addresses, pictures, strict=True)
    return [Card(*values) for values in columns], colours


def _full_rows(scores: ds.Dataset, chosen: pa.Table) -> pa.Table:
    """All columns of the chosen images, in their order."""
    wanted = pc.field("image_uri").isin(chosen["image_uri"].combine_chunks())
    on_dates = pc.field("date").isin(chosen["date"].unique())
    # Small batches, few ahead: the filter is applied to rows with their maps.
    ahead = {"batch_size": 1024, "batch_readahead": 2, "fragment_readahead": 2}
    found = latest_per_image(scores.to_table(filter=on_dates & wanted, **ahead), "scored_at")
    return found.take(pc.index_in(chosen["image_uri"], found["image_uri"].combine_chunks()))


def picture_side(images: int) -> int:
    """Longest side of a picture in pixels, small enough to send a page of many images by mail."""
    side = LARGEST_SIDE * math.sqrt(LARGE_PICTURES / max(1, images))
    return round(min(LARGEST_SIDE, max(SMALLEST_SIDE, side)))


def close_up_edges(row: Mapping[str, Any], side: int) -> list[int] | None:
    """Top, left, bottom and right edge of the close-up around the hottest place, in pixels of the image.

    The close-up is as large as a picture, `side`; or as large as the hottest map cell, whose defect may lie
    anywhere in it, but at most twice as large. None if the picture of the whole image is nearly as sharp.
    """
    height, width = row["image_height"], row["image_width"]
    if max(height, width) <= REDUCED_FROM * side:
        return None
    cell_height, cell_width = _cell_size(row)
    top, bottom = _span(row["peak_y"], min(max(side, cell_height), 2 * side), height)
    left, right = _span(row["peak_x"], min(max(side, cell_width), 2 * side), width)
    return [top, left, bottom, right]


def _cell_size(row: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of a map cell in pixels of the image; zeros if there is no map."""
    if not row["map_height"] or not row["map_width"]:
        return 0, 0
    box = maps.box_of(row, row["image_height"], row["image_width"])
    top, left, bottom, right = box or whole(row["image_height"], row["image_width"])
    return math.ceil((bottom - top) / row["map_height"]), math.ceil((right - left) / row["map_width"])


def _span(centre: float, length: int, available: int) -> tuple[int, int]:
    """Start and end of so many pixels around the centre, moved and cut to lie in what is available."""
    length = min(length, available)
    start = min(max(0, round(centre - length / 2)), available - length)
    return start, start + length


class PictureMaker:
    """Reads images and makes their pictures, in threads. An instance can also be a Ray actor."""

    def __init__(self, storage_options: Mapping[str, Any], colours: ColourRange | None, side: int) -> None:
        self.arguments = (storage_options, colours, side)
        self._reader = ImageReader(storage_options, deadline_s=READ_DEADLINE_S)
        self._colours = colours
        self._side = side
        self._at_full_size = BoundedSemaphore(FULL_SIZE_AT_ONCE)

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        """The pictures of the one shard in the batch."""
        rows = pq.read_table(io.BytesIO(batch["rows"][0])).to_pylist()
        pictures = pa.Table.from_pylist([asdict(made) for made in self.make(rows)], schema=PICTURES)
        return pa.table({"shard": [int(batch["shard"][0])], "pictures": [to_parquet(pictures)]})

    def make(self, rows: Iterable[Mapping[str, Any]]) -> list[Pictures]:
        """The pictures of these rows of `scores`, in order."""
        with ThreadPoolExecutor(READ_THREADS) as pool:
            return list(pool.map(self._make_one, rows))

    def _make_one(self, row: Mapping[str, Any]) -> Pictures:
        edges = close_up_edges(row, self._side)
        try:
            data = self._reader.read(row["image_uri"], row["image_version"])
            image = reduced(data, row, self._side)
            close_up = self._cut_out(data, row, edges) if edges else None
        except Exception as error:  # a page with a gap is better than none
            return Pictures(problem=str(error) or type(error).__name__)
        return Pictures(image.width, image.height, _webp(image), self._layer(row, image), close_up, edges)

    def _cut_out(self, data: bytes, row: Mapping[str, Any], edges: Sequence[int]) -> bytes:
        top, left, bottom, right = edges
        max_pixels = row["image_height"] * row["image_width"]
        with self._at_full_size:
            pixels_HWC = decode(data, max_pixels=max_pixels).pixels_HWC[top:bottom, left:right].copy()
        return _webp(Image.fromarray(pixels_HWC))

    def _layer(self, row: Mapping[str, Any], image: Image.Image) -> bytes | None:
        anomaly_map = map_of(row)
        if self._colours is None or anomaly_map is None:
            return None
        scale = min(1.0, LAYER_SIDE / max(image.size))
        height, width = max(1, round(image.height * scale)), max(1, round(image.width * scale))
        colours, box = self._colours, maps.box_of(row, height, width)
        return _webp(maps.layer(anomaly_map, height, width, vmin=colours.vmin, vmax=colours.vmax, box=box))


def _with_ray(rows: pa.Table, maker: PictureMaker) -> list[Pictures]:
    from csflow.cluster import connect, map_shards, share_out

    connect()
    starts = range(0, len(rows), SHARD_IMAGES)
    shards = [
        {"shard": i, "rows": to_parquet(rows.slice(start, SHARD_IMAGES))} for i, start in enumerate(starts)
    ]
    made = {
        result["shard"]: pq.read_table(io.BytesIO(result["pictures"])).to_pylist()
        for result in map_shards(shards, PictureMaker, maker.arguments, share_out(None, device="cpu"))
    }
    return list(_in_order(made, rows, starts))


def _in_order(
    made: Mapping[int, list[dict[str, Any]]], rows: pa.Table, starts: Sequence[int]
) -> Iterator[Pictures]:
    for i, start in enumerate(starts):
        lost = [{"problem": "the worker that was to make its picture died"}]
        shard = made.get(i, lost * len(rows.slice(start, SHARD_IMAGES)))
        yield from (Pictures(**pictures) for pictures in shard)


def _webp(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "WEBP", quality=80, alpha_quality=60)
    return data.getvalue()
