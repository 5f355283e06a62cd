"""How scores, errors and calibrations are written as Parquet, by the jobs and at the edge."""

from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq


def write_parquet(table: pa.Table, file: IO[bytes]) -> None:
    """Writes a table, compressed."""
    # Cells of a map hardly repeat a value: with a dictionary they took half as much again.
    flat = [field.name for field in table.schema if not pa.types.is_nested(field.type)]
    pq.write_table(table, file, compression="zstd", use_dictionary=flat)
