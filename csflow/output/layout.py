"""The paths below the `--output` of scoring jobs: builds and parses all of them."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

if TYPE_CHECKING:  # the edge runtime has no object stores
    from csflow.storage import Location

SCORES_FILES = "scores/model_id=<id>/date=<date>/*.parquet"
"""The layout of scores files, as error messages show it."""
COMPACTED = "_compacted"
"""A file in folders of compacted scores, to which no job must score. It says which output they are from."""
_RUN_TIME = "%Y%m%dT%H%M%S%fZ"
_PARTITION = re.compile(r"/model_id=([^/]+)/date=(\d{4}-\d{2}-\d{2})/[^/]+$")

Kind = Literal["scores", "errors"]


def scores_folder(output: Location, model_id: str | None = None) -> Location:
    """The folder of the scores of one model, or of all."""
    scores = output / "scores"
    return scores / f"model_id={model_id}" if model_id else scores


def scores_path(model_id: str, date: str, shard: str) -> str:
    """The scores file of a shard, below the output."""
    return f"scores/model_id={model_id}/date={date}/part-{shard}.parquet"


def errors_path(model_id: str, date: str, shard: str, digest: str) -> str:
    """An errors file of a shard, below the output."""
    return f"errors/model_id={model_id}/date={date}/part-{shard}-{digest}.parquet"


@dataclass(frozen=True)
class Output:
    """The output of one model below `--output`."""

    location: Location
    model_id: str

    def folder(self, kind: Literal["scores", "errors", "_plans"]) -> Location:
        return self.location / kind / f"model_id={self.model_id}"

    def day_folder(self, kind: Kind, day: str) -> Location:
        return self.folder(kind) / f"date={day}"

    def scores_file(self, shard: str, date: str) -> Location:
        return self.location / scores_path(self.model_id, date, shard)

    def errors_file(self, shard: str, date: str, errors: pa.Table) -> Location:
        """The errors file of a shard, named by a digest of the errors: equal attempts log them once."""
        outcome = "\n".join(f"{row['image_uri']} {row['error_code']}" for row in errors.to_pylist())
        digest = hashlib.sha256(outcome.encode()).hexdigest()[:8]
        return self.location / errors_path(self.model_id, date, shard, digest)

    def files(self, kind: Kind, dates: Set[str] | None = None, in_one_go: bool = True) -> list[ShardFile]:
        """The files of these dates, or of all.

        Args:
            in_one_go: whether to list the files of all dates, which takes fewer requests if most are wanted.
        """
        days = sorted(dates or ())
        folders = [self.folder(kind)] if in_one_go else [self.day_folder(kind, day) for day in days]
        found = [
            ShardFile(file.location, file.version, file.size, _shard(file.location, kind))
            for folder in folders
            for file in folder.find_details(".parquet")
        ]
        return [file for file in found if dates is None or file.date in dates]

    def plan_entry(self, number: int) -> Location:
        """The file of a plan's entry in the log of plans."""
        return self.folder("_plans") / f"{number:06d}.json"

    def plan_part(self, plan_folder: str, number: int) -> Location:
        """One of the files that hold a plan's images."""
        return self.folder("_plans") / plan_folder / f"part-{number:06d}.parquet"

    def log_copy(self, last: int) -> Location:
        """A copy of all entries of the log up to this one, in one file."""
        return self.folder("_plans") / f"000001-{last:06d}.jsonl"

    def outcome_file(self, plan_folder: str, first_shard: int, digest: str) -> Location:
        """The outcome of finished shards of a plan: see `csflow/scoring/outcomes.py`."""
        return self.folder("_plans") / plan_folder / f"outcome-{first_shard:06d}-{digest}.parquet"


@dataclass(frozen=True)
class ShardFile:
    """A file of `scores` or `errors` with the rows of one shard."""

    location: Location
    version: str | None
    """Differs for another content; None if the store does not tell."""
    size: int
    """In bytes."""
    shard: str

    @property
    def date(self) -> str:
        """The day of the shard's plan, by the file's folder."""
        return self.location.parent.name.removeprefix("date=")


@dataclass(frozen=True)
class OutputFile:
    """A Parquet file of `scores` or `errors`, and the parts of its path."""

    location: Location
    size: int
    """In bytes."""
    model_id: str
    date: date
    shard: str

    @property
    def path(self) -> str:
        """Path relative to the folder `scores` or `errors`."""
        return f"model_id={self.model_id}/date={self.date}/{self.location.name}"


def output_files(output: Location, kind: Kind) -> list[OutputFile]:
    """All files of `scores` or `errors`, sorted by path; none if there is no such folder."""
    found = (output / kind).find_details(".parquet")
    files = []
    for file in found:
        if match := _PARTITION.search(file.location.path):
            with suppress(ValueError):  # a folder that somebody named like a day that there is not
                day = date.fromisoformat(match[2])
                shard = _shard(file.location, kind)
                files.append(OutputFile(file.location, file.size, match[1], day, shard))
    return files


def scored_models(output: Location) -> list[str]:
    """The ids of the models that have scores, sorted."""
    return sorted({file.model_id for file in output_files(output, "scores")})


def run_folder(output: Location, run_id: str) -> Location:
    """The folder in which a run keeps its record and its listing."""
    return output / "_runs" / run_id


def listing_folder(output: Location, run_id: str) -> Location:
    """The folder of a run's frozen listing, or, if there are routes, of one such folder for each model."""
    return run_folder(output, run_id) / "listing"


def new_run_id(started_at: datetime) -> str:
    """An id for a run, which begins with its time, in UTC."""
    return f"{started_at:{_RUN_TIME}}-{secrets.token_hex(4)}"


def run_started_at(run_id: str) -> datetime | None:
    """When a run began, by its id; None if it has an id of another form."""
    try:
        return datetime.strptime(run_id.partition("-")[0], _RUN_TIME).replace(tzinfo=UTC)
    except ValueError:
        return None


def run_ids(output: Location) -> list[str]:
    """The runs over an output, in the order of their start, since an id begins with the time."""
    folder = output / "_runs"
    try:
        return sorted(path.rstrip("/").rpartition("/")[2] for path in folder.fs.ls(folder.path, detail=False))
    except FileNotFoundError:
        return []


def _shard(file: Location, kind: Kind) -> str:
    """The shard that a file belongs to. In the name of an errors file, a digest follows the shard."""
    name = file.name.removeprefix("part-").removesuffix(".parquet")
    return name if kind == "scores" else name.rsplit("-", 1)[0]
