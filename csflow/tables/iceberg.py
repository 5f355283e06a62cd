"""Registers `scores` or `errors` as an Iceberg table: metadata in a warehouse, files where they are."""

from collections.abc import Sequence
from datetime import date

import pyarrow as pa
from pyiceberg.catalog import Catalog, load_catalog
from pyiceberg.exceptions import CommitFailedException, TableAlreadyExistsError
from pyiceberg.io import PY_IO_IMPL
from pyiceberg.io.pyarrow import (
    compute_statistics_plan,
    data_file_statistics_from_parquet_metadata,
    parquet_path_to_id_mapping,
)
from pyiceberg.manifest import DataFile, DataFileContent, FileFormat
from pyiceberg.table import Table, TableProperties
from pyiceberg.typedef import Record

from csflow.output.layout import OutputFile
from csflow.storage import Location
from csflow.tables.files import Footer, not_among, read_footers, table_schema

COMMIT_ATTEMPTS = 5
FILE_IO = "pyiceberg.io.fsspec.FsspecFileIO"
"""The file reader, which takes credentials and endpoint from the AWS_* variables, as the jobs do."""
EPOCH = date(1970, 1, 1)


def open_catalog(catalog: str, warehouse: Location) -> Catalog:
    """The catalogue in an SQL database, or the one of this name in PyIceberg's own configuration."""
    if "://" not in catalog:
        return load_catalog(catalog)
    return load_catalog("csflow", type="sql", uri=catalog, warehouse=_uri(warehouse), **{PY_IO_IMPL: FILE_IO})


def add_to_iceberg(
    catalog: Catalog, identifier: tuple[str, str], files: Sequence[OutputFile], schema: pa.Schema
) -> int:
    """Adds the files that the table does not hold yet; returns their number.

    Raises:
        CommitFailedException: other writers were first every time.
    """
    _create(catalog, identifier, table_schema(schema))
    for attempt in range(1, COMMIT_ATTEMPTS + 1):
        table = catalog.load_table(identifier)
        known = set(table.inspect.files()["file_path"].to_pylist())
        new = not_among(files, known, lambda file: _uri(file.location))
        try:
            if new:
                _add_columns(table, schema)
                _append(table, read_footers(new))
            return len(new)
        except CommitFailedException:
            if attempt == COMMIT_ATTEMPTS:
                raise
    raise AssertionError


def _create(catalog: Catalog, identifier: tuple[str, str], schema: pa.Schema) -> None:
    catalog.create_namespace_if_not_exists(identifier[0])
    if catalog.table_exists(identifier):
        return
    try:
        with catalog.create_table_transaction(identifier, schema) as transaction:
            with transaction.update_spec() as spec:
                spec.add_identity("model_id")
                spec.add_identity("date")
            # The files carry no field ids: columns are found by name.
            mapping = transaction.table_metadata.schema().name_mapping.model_dump_json()
            transaction.set_properties({TableProperties.DEFAULT_NAME_MAPPING: mapping})
    except TableAlreadyExistsError:
        pass  # another registration was first


def _add_columns(table: Table, schema: pa.Schema) -> None:
    """Adds columns that an older csflow's table lacks, to its schema and its name mapping."""
    if set(schema.names) - set(table.schema().column_names):
        with table.update_schema() as update:
            update.union_by_name(table_schema(schema))


def _append(table: Table, footers: Sequence[Footer]) -> None:
    # In this process only: a commit that lost to another one is not to be repeated as it is, since the other
    # may have added the same files.
    table.metadata.properties[TableProperties.COMMIT_NUM_RETRIES] = "0"
    with table.transaction() as transaction, transaction.update_snapshot().fast_append() as append:
        for footer in footers:
            append.append_data_file(_data_file(table, footer))


def _data_file(table: Table, footer: Footer) -> DataFile:
    # `Table.add_files` wants the partition columns in the file. By the specification a reader takes the
    # values of identity partitions from here if the file lacks them (specification, "Column Projection").
    statistics = data_file_statistics_from_parquet_metadata(
        footer.metadata,
        compute_statistics_plan(table.schema(), table.metadata.properties),
        parquet_path_to_id_mapping(table.schema()),
    )
    return DataFile.from_args(
        content=DataFileContent.DATA,
        file_path=_uri(footer.file.location),
        file_format=FileFormat.PARQUET,
        partition=Record(footer.file.model_id, (footer.file.date - EPOCH).days),
        file_size_in_bytes=footer.file.size,
        sort_order_id=None,
        spec_id=table.spec().spec_id,
        equality_ids=None,
        key_metadata=None,
        **statistics.to_serialized_dict(),
    )


def _uri(location: Location) -> str:
    return str(location.fs.unstrip_protocol(location.path)) if location.is_local else location.url
