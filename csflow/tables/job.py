"""The registration job: finished Parquet files become an Iceberg or Delta table, without rewriting."""

from collections.abc import Callable
from typing import Literal

import pyarrow as pa

from csflow.config import JobConfig
from csflow.errors import ExitStatus, WrongUse
from csflow.output.layout import COMPACTED, Kind, OutputFile
from csflow.output.schemas import SCHEMAS
from csflow.storage import Location
from csflow.tables.files import final_files


class RegisterConfig(JobConfig):
    """Settings of `csflow register`."""

    scores: str
    """Location of the scores: the `--output` of scoring jobs."""
    format: Literal["iceberg", "delta"]
    """Table format. Delta keeps its log in the folders `scores` and `errors` themselves."""
    catalog: str | None = None
    """Required for Iceberg, and only for it: the catalogue, as the URL of an SQL database such as
    sqlite:///catalog.db, or by its name in PyIceberg's configuration."""
    warehouse: str | None = None
    """Iceberg with an SQL catalogue only: folder for the tables' metadata. [default: <scores>/_iceberg]"""
    namespace: str = "csflow"
    """Iceberg only: namespace of the tables `scores` and `errors`."""


def register(config: RegisterConfig) -> ExitStatus:
    """Adds new files of an output to its tables; a second call adds nothing.

    Raises:
        WrongUse: there are no scores, the library is not installed, or a setting is missing.
    """
    if (config.format == "iceberg") != (config.catalog is not None):
        raise WrongUse("--catalog is needed for Iceberg, and for Iceberg only")
    output = Location(config.scores, config.storage_options)
    if (output / COMPACTED).exists():
        raise WrongUse(
            f"{output} holds compacted scores, of which files may be replaced; register their origin"
        )
    files = final_files(output)
    if not files["scores"]:
        raise WrongUse(f"{output} holds no scores; scores are in the --output of `csflow score`")
    try:
        add = _adder(config, output)
    except ModuleNotFoundError as error:
        raise WrongUse(f"{error.name} is not installed; pip install 'csflow[{config.format}]'") from None
    for kind, schema in SCHEMAS.items():
        if files[kind]:
            added = add(kind, files[kind], schema)
            print(f"{kind}: {added} files added, {len(files[kind]) - added} were registered before")
    return ExitStatus.DONE


def _adder(config: RegisterConfig, output: Location) -> Callable[[Kind, list[OutputFile], pa.Schema], int]:
    """The function that adds files to the table of a kind. Imports only the library that it needs."""
    if config.catalog is None:
        from csflow.tables.delta import add_to_delta

        return lambda kind, files, schema: add_to_delta(output / kind, files, schema)
    from csflow.tables.iceberg import add_to_iceberg, open_catalog

    warehouse = Location(config.warehouse or f"{config.scores}/_iceberg", config.storage_options)
    catalog = open_catalog(config.catalog, warehouse)
    return lambda kind, files, schema: add_to_iceberg(catalog, (config.namespace, kind), files, schema)
