"""Makes the gallery: small pictures of the highest anomaly scores, with their maps over them."""

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from csflow import maps
from csflow.inputs.reading import ImageReader
from csflow.maps import ColourRange, colour_range, map_of
from csflow.output.reading import latest_per_image
from csflow.overlays import READ_DEADLINE_S, READ_THREADS, read_image
from csflow.report.archive import Archive
from csflow.storage import to_parquet

LARGEST_SIDE, SMALLEST_SIDE = 384, 96
"""Longest side of a picture in pixels: its largest and smallest value."""
LARGE_PICTURES = 120
"""Up to this many images have large pictures; more share about the same total size."""
RAY_FROM = 600
"""From this many images on, the whole cluster makes the pictures, since joining it takes seconds."""
SHARD_IMAGES = 50


@dataclass(frozen=True)
class Pictures:
    """The WebP files of one image; `problem` says why there are none."""

    width: int = 0
    height: int = 0
    original: bytes | None = None
    overlay: bytes | None = None
    problem: str | None = None


PICTURES = pa.schema(
    [
        pa.field("width", pa.int64()),
        pa.field("height", pa.int64()),
        pa.field("original", pa.binary()),
        pa.field("overlay", pa.binary()),
        pa.field("problem", pa.string()),
    ]
)


@dataclass(frozen=True)
class Card:
    """One image of the gallery."""

    row: dict[str, Any]
    is_listed: bool
    pictures: Pictures

    @property
    def peak_left(self) -> float:
        """Horizontal position of the hottest map cell, in percent of the width."""
        return float(100 * self.row["peak_x"] / self.row["image_width"])

    @property
    def peak_top(self) -> float:
        """Vertical position of the hottest map cell, in percent of the height."""
        return float(100 * self.row["peak_y"] / self.row["image_height"])


def make_gallery(
    archive: Archive, is_listed: NDArray[np.bool_], top: int, storage_options: Mapping[str, Any]
) -> tuple[list[Card], ColourRange | None]:
    """Cards of the highest anomaly scores, highest first, and the colour range of their maps."""
    # A score that is no number is the most anomalous there is.
    order = pc.sort_indices(archive.images, sort_keys=[("anomaly_score", "descending", "at_start")])[:top]
    rows = _full_rows(archive.scores, archive.images.take(order))
    listed = is_listed[order.to_numpy()].tolist()
    found = [anomaly_map for row in rows.to_pylist() if (anomaly_map := map_of(row)) is not None]
    colours = colour_range(found)
    maker = PictureMaker(storage_options, colours, picture_side(len(rows)))
    pictures = _with_ray(rows, maker) if len(rows) >= RAY_FROM else maker.make(rows.to_pylist())
    columns = zip(rows.to_pylist(), listed, pictures, strict=True)
    return [Card(row, on_list, shown) for row, on_list, shown in columns], colours


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


class PictureMaker:
    """Reads images and makes their pictures, in threads. An instance can also be a Ray actor."""

    def __init__(self, storage_options: Mapping[str, Any], colours: ColourRange | None, side: int) -> None:
        self.arguments = (storage_options, colours, side)
        self._reader = ImageReader(storage_options, deadline_s=READ_DEADLINE_S)
        self._colours = colours
        self._side = side

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
        try:
            image = read_image(row, self._reader, self._side)
        except Exception as error:  # a page with a gap is better than none
            return Pictures(problem=str(error) or type(error).__name__)
        anomaly_map = map_of(row)
        overlay = None
        if self._colours is not None and anomaly_map is not None:
            box = maps.box_of(row, image.height, image.width)
            drawn = maps.overlay(
                image, anomaly_map, vmin=self._colours.vmin, vmax=self._colours.vmax, box=box
            )
            overlay = _webp(drawn)
        return Pictures(image.width, image.height, _webp(image), overlay)


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
    image.save(data, "WEBP", quality=80)
    return data.getvalue()
