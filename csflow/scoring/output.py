"""What a model's part of the output holds: scored images, errors, finished shards, plans."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from numpy.typing import NDArray
from pyarrow.fs import FSSpecHandler, PyFileSystem

from csflow.scores import ERRORS, SCORES
from csflow.storage import Location

KEY_COLUMNS = ["image_uri", "image_version"]

Keys = NDArray[np.bytes_]
"""128-bit hashes of image versions: 16 bytes an image, where URIs would take a hundred."""


def keys(table: pa.RecordBatch | pa.Table) -> Keys:
    """The key of each (image_uri, image_version), in order."""
    pairs = zip(*(table[name].to_pylist() for name in KEY_COLUMNS), strict=True)
    images = (f"{uri}\0{version}".encode() for uri, version in pairs)
    digests = (hashlib.blake2b(image, digest_size=16).digest() for image in images)
    return np.frombuffer(b"".join(digests), dtype="S16")


def sorted_keys(parts: Iterable[Keys]) -> Keys:
    """Several arrays of keys as one, sorted for `contained`; duplicates stay."""
    return np.sort(np.concatenate([np.empty(0, dtype="S16"), *parts]))


def contained(some: Keys, in_sorted: Keys) -> NDArray[np.bool_]:
    """For each of `some`, whether it is among `in_sorted`."""
    if not len(in_sorted):
        return np.zeros(len(some), dtype=bool)
    positions = np.searchsorted(in_sorted, some).clip(max=len(in_sorted) - 1)
    return in_sorted[positions] == some


@dataclass(frozen=True)
class Output:
    """The output of one model below `--output`."""

    location: Location
    model_id: str

    def folder(self, kind: Literal["scores", "errors", "_plans"]) -> Location:
        return self.location / kind / f"model_id={self.model_id}"

    def scores_file(self, shard: str, date: str) -> Location:
        return self.folder("scores") / f"date={date}" / f"part-{shard}.parquet"

    def errors_file(self, shard: str, date: str, errors: pa.Table) -> Location:
        """Named by what failed and how, so that a repeated attempt logs the same failures once."""
        outcome = "\n".join(f"{row['image_uri']} {row['error_code']}" for row in errors.to_pylist())
        digest = hashlib.sha256(outcome.encode()).hexdigest()[:8]
        return self.folder("errors") / f"date={date}" / f"part-{shard}-{digest}.parquet"

    def finished_shards(self) -> dict[str, Location]:
        """Scores files by the name of their shard."""
        files = self.folder("scores").find(".parquet")
        return {file.name.removeprefix("part-").removesuffix(".parquet"): file for file in files}

    def permanent_error_keys(self) -> Keys:
        """Keys of all images that failed for a reason that stays, sorted."""
        files = self.folder("errors").find(".parquet")
        batches = _read(files, [*KEY_COLUMNS, "is_transient"], ERRORS)
        return sorted_keys(keys(batch.filter(pc.invert(batch["is_transient"]))) for batch in batches)


def scored_keys(files: Iterable[Location]) -> Keys:
    """Keys of the images in these scores files, sorted. Reads no maps."""
    return sorted_keys(map(keys, _read(list(files), KEY_COLUMNS, SCORES)))


def _read(files: Sequence[Location], columns: Sequence[str], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    if files:
        fs = PyFileSystem(FSSpecHandler(files[0].fs))
        dataset = ds.dataset([file.path for file in files], schema, format="parquet", filesystem=fs)
        # Read-ahead is bounded, so that memory does not grow with the number of files.
        yield from dataset.to_batches(columns=list(columns), batch_readahead=4, fragment_readahead=4)
