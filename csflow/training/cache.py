"""The feature cache: features of single images, by the image's content and everything that decides them.

A hash of backbone, weights, preprocessing and decoding names a cache folder. Each file in it holds features
of some images, in the order of extraction; index files tell the file of each image. A file is written whole
and never changed, so an interrupted extraction leaves nothing wrong. If the model sees tiles, a file has the
features of the drawn tiles of an image one after the other.

Dimension letters: N images or tiles, D numbers of one of them (all levels, one after the other).
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from torch import Tensor

from csflow.console import warn
from csflow.decode_limits import DEFAULT_LIMITS, DecodeLimits
from csflow.model import Detector
from csflow.storage import Location, read_parquet, to_parquet
from csflow.training.tiles import TileSample

SUFFIX = ".features.safetensors"
INDEX_SUFFIX = ".index.parquet"
BACKBONE_FILE = "backbone.safetensors"
FEATURES = ("backbone.", "mean", "std")
"""Prefixes of the names of a detector's tensors that its features depend on."""
LAYOUT_VERSION = 3
"""Version of the files' layout. It is part of the folder's name, so other layouts are not read."""
READ_THREADS = 16
HEADER_BYTES = 1 << 16
"""Number of bytes to read first of a file; more follow if its header is longer."""

DTYPES = {"F16": torch.float16, "F32": torch.float32}

INDEX = pa.schema(
    [
        pa.field("image_uri", pa.string(), nullable=False),
        pa.field("image_version", pa.string(), nullable=False),
        pa.field("content_digest", pa.string()),  # null for an image that cannot be read
        pa.field("error_message", pa.string()),  # why it cannot
        pa.field("image_height", pa.int32()),  # of the original, in pixels; null likewise
        pa.field("image_width", pa.int32()),
        pa.field("file", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),  # of the image's features in the file, bytes
        pa.field("dtype", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class FeatureFile:
    """The content of a file of the cache."""

    image_uris: list[str]
    image_versions: list[str]
    content_digests: list[str]
    """SHA-256 of each image's bytes, in hexadecimal."""
    image_sizes: list[tuple[int, int]]
    """Height and width of each original, in pixels."""
    features_ND: Tensor
    """Of the images, or of the tiles of each, one after the other."""
    failed: list[tuple[str, str, str]]
    """URI, version and message of each image with a permanent error."""

    def to_bytes(self) -> bytes:
        """The file, in half precision if that holds the numbers; scores then change by less than 0.02 %."""
        half_ND = self.features_ND.half()
        stored_ND = half_ND if bool(half_ND.isfinite().all()) else self.features_ND.float()
        images = {
            "image_uris": self.image_uris,
            "image_versions": self.image_versions,
            "content_digests": self.content_digests,
            "image_sizes": self.image_sizes,
            "failed": self.failed,
        }
        return safetensors.torch.save({"features": stored_ND}, metadata={"images": json.dumps(images)})


class FeatureCache:
    """The features of one backbone with one set of weights, one preprocessing and one set of limits."""

    def __init__(
        self,
        folder: Location,
        feature_shapes: Sequence[tuple[int, int, int]],
        limits: DecodeLimits = DEFAULT_LIMITS,
        tiles: TileSample | None = None,
        inside: Sequence[Tensor] | None = None,
    ) -> None:
        """
        Args:
            tiles: which tiles of an image have features; None if the model sees whole images.
            inside: the places in the region of interest, as from `Architecture.inside`.
        """
        self.folder = folder
        self.limits = limits
        self.tiles = tiles
        self.feature_shapes = tuple(feature_shapes)
        self.inside = inside

    @classmethod
    def of(
        cls,
        root: Location,
        detector: Detector,
        limits: DecodeLimits = DEFAULT_LIMITS,
        tiles_per_image: int = 1,
    ) -> "FeatureCache":
        """The cache below `root` of everything that decides this detector's features."""
        architecture = detector.architecture
        preprocessing = asdict(architecture.preprocessing)
        tiles = None
        if architecture.tiling:
            tiles = TileSample(architecture.preprocessing, tiles_per_image)
            preprocessing["tiles_per_image"] = tiles_per_image
        else:
            del preprocessing["tiling"]  # as in caches of older versions
        if architecture.mask is None:
            del preprocessing["mask"]
        decides = {
            "backbone": architecture.backbone,
            "cut_after": detector.backbone.cut_after,
            "preprocessing": preprocessing,
            "scales": architecture.scales,
            "layout_version": LAYOUT_VERSION,
            "limits": asdict(limits),  # which decide what cannot be read
        }
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
        digest.update(backbone_bytes(detector))
        inside = architecture.inside(detector.feature_shapes)
        return cls(root / digest.hexdigest()[:16], detector.feature_shapes, limits, tiles, inside)

    def tile_counts(self, images: pa.Table) -> list[int] | None:
        """The number of tiles of each image that have features; None if the model sees whole images.

        Args:
            images: rows of readable images in the `INDEX` schema.
        """
        if self.tiles is None:
            return None
        sides = (images[name].to_pylist() for name in ("image_height", "image_width"))
        return [self.tiles.count(height, width) for height, width in zip(*sides, strict=True)]

    def samples(self, images: pa.Table) -> pa.Table:
        """What the flow learns from: these images, or a row with its own offset for each of their tiles."""
        counts = self.tile_counts(images)
        if counts is None:
            return images
        rows = np.repeat(np.arange(len(counts)), counts)
        tile = np.concatenate([np.arange(count) for count in counts]) if counts else rows
        table = images.take(pa.array(rows))
        step = [self._sample_bytes(dtype) for dtype in table["dtype"].to_pylist()]
        offsets = pa.array(table["offset"].to_numpy() + tile * np.array(step, np.int64), pa.int64())
        place = table.schema.get_field_index("offset")
        return table.set_column(place, table.schema.field(place), offsets)

    def sample_count(self, images: pa.Table) -> int:
        """The number of rows that `samples` returns."""
        counts = self.tile_counts(images)
        return int(images.num_rows) if counts is None else sum(counts)

    @property
    def sizes(self) -> list[int]:
        """Number of values of an image, or of a tile, in each level."""
        return [channels * height * width for channels, height, width in self.feature_shapes]

    def index(self) -> pa.Table:
        """A row in the `INDEX` schema for each cached image, and for each that cannot be read.

        Files that are in no index file yet are read and indexed for the next time. Files that are damaged, as
        far as their beginning and their length tell, are removed with a warning, and so made again.
        """
        present = self.folder.sizes(SUFFIX)
        tables = [self._read_index(location) for location in self.folder.find(INDEX_SUFFIX)]
        table = pa.concat_tables([INDEX.empty_table(), *tables])
        missing = sorted(present.keys() - set(table["file"].to_pylist()))
        if missing:
            with ThreadPoolExecutor(READ_THREADS) as pool:
                rows = [row for part in pool.map(self._read_rows, missing) for row in part]
            new = pa.Table.from_pylist(rows, schema=INDEX)
            name = hashlib.sha256("\n".join(missing).encode()).hexdigest()[:32]
            (self.folder / (name + INDEX_SUFFIX)).write(to_parquet(new))
            table = pa.concat_tables([table, new])
        return self._without_short_files(table, present)

    def _read_index(self, location: Location) -> pa.Table:
        try:
            return read_parquet(location, INDEX)
        except pa.ArrowException:
            self._discard(location)
            return INDEX.empty_table()

    def _without_short_files(self, table: pa.Table, present: Mapping[str, int]) -> pa.Table:
        """The rows of files that are as long as their last image needs, or are gone; others are removed."""
        needed: dict[str, int] = {}
        columns = ("file", "offset", "dtype", "content_digest", "image_height", "image_width")
        for file, offset, dtype, digest, *size in zip(*(table[n].to_pylist() for n in columns), strict=True):
            end = offset + (self._image_bytes(dtype, *size) if digest is not None else 0)
            needed[file] = max(end, needed.get(file, 0))
        short = {file for file, end in needed.items() if file in present and present[file] < end}
        for file in sorted(short):
            self._discard(self.folder / file)
        lost = short | (needed.keys() - present.keys())
        return table.filter(pa.array((file not in lost for file in table["file"].to_pylist()), pa.bool_()))

    def _image_bytes(self, dtype: str, height: int, width: int) -> int:
        """Bytes of one image's features in a file: of the image itself, or of its tiles."""
        return self._sample_bytes(dtype) * (self.tiles.count(height, width) if self.tiles else 1)

    def _sample_bytes(self, dtype: str) -> int:
        """Bytes of the features of an image or a tile."""
        return sum(self.sizes) * DTYPES[dtype].itemsize

    def _discard(self, location: Location) -> None:
        warn(f"{location} of the feature cache is damaged; it is removed, and what it held is made again")
        location.remove()

    def write(self, name: str, file: FeatureFile) -> None:
        (self.folder / (name + SUFFIX)).write(file.to_bytes())

    def read_files(self, names: Iterable[str]) -> Iterator[bytes]:
        """Reads whole files, a few at a time."""
        with ThreadPoolExecutor(4) as pool:
            yield from pool.map(lambda name: (self.folder / name).read(), names)

    def read_images(self, files: Sequence[str], offsets: Sequence[int], dtype: str) -> Tensor:
        """Features of single images or tiles, (N, D), by one ranged read each; blocks until all are there."""
        size = self._sample_bytes(dtype)
        paths = [(self.folder / name).path for name in files]
        ends = [offset + size for offset in offsets]
        parts = self.folder.fs.cat_ranges(paths, list(offsets), ends)
        return torch.frombuffer(bytearray(b"".join(parts)), dtype=DTYPES[dtype]).view(len(files), -1)

    def split_scales(self, features_ND: Tensor) -> list[Tensor]:
        """The features per level, (N, C, H, W)."""
        parts = features_ND.split(self.sizes, dim=1)
        return [y.unflatten(1, shape) for y, shape in zip(parts, self.feature_shapes, strict=True)]

    def _read_rows(self, name: str) -> list[dict[str, Any]]:
        """The index rows of one file, from its header; none if it is damaged."""
        try:
            return self._parse_rows(name)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._discard(self.folder / name)
            return []

    def _parse_rows(self, name: str) -> list[dict[str, Any]]:
        location = self.folder / name
        head = bytes(location.fs.cat_file(location.path, start=0, end=HEADER_BYTES))
        start = 8 + int.from_bytes(head[:8], "little")
        if start > len(head):
            head = bytes(location.fs.cat_file(location.path, start=0, end=start))
        header = json.loads(head[8:start])
        images, tensor = json.loads(header["__metadata__"]["images"]), header["features"]
        dtype = tensor["dtype"]
        stored = {"file": name, "dtype": dtype}
        columns = ("image_uris", "image_versions", "content_digests", "image_sizes")
        good = list(zip(*(images[column] for column in columns), strict=True))
        ends = itertools.accumulate((self._image_bytes(dtype, *size) for *_, size in good), initial=start)
        rows: list[dict[str, Any]] = [
            {"image_uri": uri, "image_version": version, "content_digest": digest}
            | {"image_height": height, "image_width": width, "offset": offset}
            | stored
            for offset, (uri, version, digest, (height, width)) in zip(ends, good, strict=False)
        ]
        return rows + [
            {"image_uri": u, "image_version": v, "error_message": message, "offset": 0} | stored
            for u, v, message in images["failed"]
        ]


def find_images(images: pa.Table, index: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The index rows of the listed images, in order, and the images without an index row."""
    found: dict[tuple[str, str], int] = {}
    for row, key in enumerate(
        zip(index["image_uri"].to_pylist(), index["image_version"].to_pylist(), strict=True)
    ):
        found.setdefault(key, row)
    keys = zip(images["image_uri"].to_pylist(), images["image_version"].to_pylist(), strict=True)
    rows = [found.get(key) for key in keys]
    known = index.take(pa.array([row for row in rows if row is not None], pa.int64()))
    return known, images.filter(pa.array([row is None for row in rows], pa.bool_()))


def backbone_bytes(detector: Detector) -> bytes:
    """The tensors that features depend on, as a safetensors file; the same weights give the same bytes."""
    state: Mapping[str, Tensor] = detector.state_dict()
    kept = {name: state[name].contiguous() for name in sorted(state) if name.startswith(FEATURES)}
    return safetensors.torch.save(kept)
