"""Finds the files of an output that a table may hold, and reads their footers."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from csflow.literal_paths import arrow_filesystem
from csflow.output.layout import Kind, OutputFile, output_files
from csflow.storage import Location

FOOTERS_AT_ONCE = 16


@dataclass(frozen=True)
class Footer:
    """The metadata that a table keeps about one file."""

    file: OutputFile
    metadata: pq.FileMetaData


def table_schema(schema: pa.Schema) -> pa.Schema:
    """The columns of `scores` or `errors`, including those that only paths hold."""
    return pa.schema([*schema, pa.field("model_id", pa.string()), pa.field("date", pa.date32())])


def final_files(output: Location) -> dict[Kind, list[OutputFile]]:
    """The files of `scores` and `errors` that no run will write again.

    A scores file is created once. The errors of a shard may be written again until its scores file exists.
    """
    scores, errors = output_files(output, "scores"), output_files(output, "errors")
    finished = {(file.model_id, file.shard) for file in scores}
    return {"scores": scores, "errors": [file for file in errors if (file.model_id, file.shard) in finished]}


def read_footers(files: Sequence[OutputFile]) -> list[Footer]:
    """Reads the footers of these files, several at a time."""

    def read(file: OutputFile) -> Footer:
        path = file.location.path
        fs = arrow_filesystem(file.location.fs, {path: file.size})
        return Footer(file, pq.read_metadata(path, filesystem=fs))

    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        return list(pool.map(read, files))


def not_among(
    files: Iterable[OutputFile], known: set[str], name: Callable[[OutputFile], str]
) -> list[OutputFile]:
    """The files that a table does not hold yet, by their name in the table."""
    return [file for file in files if name(file) not in known]
