"""What a model's part of the output holds: scored images, errors, finished shards, plans."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow.fs import FSSpecHandler, PyFileSystem

from csflow.scores import ERRORS, SCORES
from csflow.scoring.keys import KEY_COLUMNS
from csflow.storage import Location


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

    def finished_shards(self, dates: Iterable[str]) -> dict[str, Location]:
        """Scores files of these dates by the name of their shard."""
        files = (file for date in dates for file in (self.folder("scores") / f"date={date}").find(".parquet"))
        return {file.name.removeprefix("part-").removesuffix(".parquet"): file for file in files}

    def permanent_errors(self, dates: Iterable[str]) -> Iterator[pa.RecordBatch]:
        """Images that failed on these dates for a reason that stays."""
        files = [file for date in dates for file in (self.folder("errors") / f"date={date}").find(".parquet")]
        for batch in _read(files, [*KEY_COLUMNS, "is_transient"], ERRORS):
            yield batch.filter(pc.invert(batch["is_transient"]))


def scored_images(files: Sequence[Location]) -> Iterator[pa.RecordBatch]:
    """The images in these scores files. Reads no maps."""
    return _read(files, KEY_COLUMNS, SCORES)


def _read(files: Sequence[Location], columns: Sequence[str], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    if files:
        fs = PyFileSystem(FSSpecHandler(files[0].fs))
        dataset = ds.dataset([file.path for file in files], schema, format="parquet", filesystem=fs)
        # Read-ahead is bounded, so that memory does not grow with the number of files.
        yield from dataset.to_batches(columns=list(columns), batch_readahead=4, fragment_readahead=4)
