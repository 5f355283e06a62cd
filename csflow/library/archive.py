"""Opens the scores of an archive for Arrow, pandas, Polars or DuckDB."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date as Date
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from csflow.errors import WrongUse
from csflow.output.reading import open_scores
from csflow.storage import Location

if TYPE_CHECKING:
    import duckdb
    import pandas as pd  # type: ignore[import-untyped]
    import polars as pl

Day = str | Date


@dataclass(frozen=True)
class ScoresTable:
    """Scores of one model, not read yet; the columns are those of `scores`, and `date`."""

    address: str
    model_id: str
    columns: tuple[str, ...]
    dataset: ds.Dataset = field(repr=False)

    def __len__(self) -> int:
        """Number of rows, told from file footers where no date has to be looked at."""
        return int(self.dataset.count_rows())

    def to_arrow(self) -> pa.Table:
        return self.dataset.to_table(columns=list(self.columns))

    def to_pandas(self) -> "pd.DataFrame":
        return self.to_arrow().to_pandas()

    def to_polars(self) -> "pl.DataFrame":
        import polars as pl

        frame = pl.from_arrow(self.to_arrow())
        assert isinstance(frame, pl.DataFrame)
        return frame

    def to_duckdb(self) -> "duckdb.DuckDBPyRelation":
        """A relation that reads, when asked, only the columns and files that a query needs."""
        import duckdb

        relation = duckdb.from_arrow(self.dataset)
        return relation.project(", ".join(f'"{name}"' for name in self.columns))


def read_scores(
    output: str | os.PathLike[str],
    *,
    date: Day | tuple[Day, Day] | None = None,
    model_id: str | None = None,
    columns: Sequence[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> ScoresTable:
    """Opens the scores below the `--output` of scoring jobs.

    Args:
        output: path or URL.
        date: a day such as `"2026-11-27"`, or the first and the last of several days; by default all.
        model_id: needed if the output holds scores of several models.
        columns: names of those to read; by default all, with the anomaly maps, which are most of the bytes.

    Raises:
        WrongUse: there are no such scores, no such column, or a date is none.
    """
    opened = open_scores(Location(os.fspath(output), storage_options or {}), model_id)
    known = opened.scores.schema.names
    unknown = [name for name in columns or () if name not in known]
    if unknown:
        raise WrongUse(f"scores have no column {', '.join(unknown)}; their columns are {', '.join(known)}")
    dataset = opened.scores
    if date is not None:
        first, last = (date, date) if isinstance(date, str | Date) else date
        dataset = dataset.filter((pc.field("date") >= _day(first)) & (pc.field("date") <= _day(last)))
    return ScoresTable(str(output), opened.model_id, tuple(columns or known), dataset)


def _day(value: Day) -> Date:
    try:
        return Date.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        raise WrongUse(f"date {value!r} is none; write it as 2026-11-27") from None
