"""Registers `scores` or `errors` as a Delta table: a log beside the files, which do not change."""

import json
import os
import time
from collections.abc import Sequence

import pyarrow as pa
from deltalake import DeltaTable, PostCommitHookProperties, Schema
from deltalake.transaction import AddAction

from csflow.output.layout import OutputFile
from csflow.storage import Location
from csflow.tables.files import Footer, not_among, read_footers, table_schema

PARTITION_COLUMNS = ["model_id", "date"]


def add_to_delta(folder: Location, files: Sequence[OutputFile], schema: pa.Schema) -> int:
    """Adds the files that the table at `folder` does not hold yet; returns their number.

    Two registrations at once do no harm: in Delta's log a path that is added twice is one file.
    """
    columns = table_schema(schema)
    table = DeltaTable.create(
        folder.url, columns, mode="ignore", partition_by=PARTITION_COLUMNS, storage_options=_options(folder)
    )
    known = set(pa.table(table.get_add_actions())["path"].to_pylist())
    new = not_among(files, known, lambda file: file.path)
    if new:
        _add_columns(table, columns)
        table.create_write_transaction(
            [_add(footer) for footer in read_footers(new)],
            mode="append",
            schema=columns,
            partition_by=PARTITION_COLUMNS,
            # A checkpoint would be a Parquet file among the scores.
            post_commithook_properties=PostCommitHookProperties(create_checkpoint=False),
        )
    return len(new)


def _add_columns(table: DeltaTable, columns: pa.Schema) -> None:
    """Adds columns that the table lacks because an older csflow made it."""
    present = {field.name for field in table.schema().fields}
    missing = [field for field in Schema.from_arrow(columns).fields if field.name not in present]
    if missing:
        table.alter.add_columns(missing)


def _add(footer: Footer) -> AddAction:
    return AddAction(
        path=footer.file.path,
        size=footer.file.size,
        partition_values={"model_id": footer.file.model_id, "date": footer.file.date.isoformat()},
        modification_time=int(time.time() * 1000),
        data_change=True,
        stats=json.dumps({"numRecords": footer.metadata.num_rows}),
    )


def _options(folder: Location) -> dict[str, str]:
    """Storage options of the library. It reads the AWS_* variables itself, but must be told to allow HTTP."""
    options = {name: str(value) for name, value in folder.storage_options.items()}
    if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        options.setdefault("AWS_ALLOW_HTTP", "true")
    return options
