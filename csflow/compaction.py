"""The compact job: merges the many files of finished days into a few large ones, in another folder.

A shard's file is what keeps its images to one row, so the files of an output must stay where they are
(docs/exactly-once.md). Readers of long histories open the compacted folder instead: it has the same layout.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime

import pyarrow as pa
from pydantic import Field

from csflow.config import JobConfig
from csflow.console import Progress, warn
from csflow.errors import ExitStatus, Failed, WrongUse
from csflow.output.layout import COMPACTED, Kind, Output, ShardFile, scored_models
from csflow.output.reading import dataset
from csflow.output.schemas import SCHEMAS
from csflow.scoring.plan_log import PlanLog
from csflow.storage import Location, to_parquet


class CompactConfig(JobConfig):
    """Settings of `csflow compact`."""

    scores: str
    """Location of the scores: the `--output` of scoring jobs. It is only read."""
    output: str
    """Folder to write the large files to. Files of an earlier compaction stay if nothing has changed."""
    before: date | None = None
    """Compact the days before this one, such as 2026-11-01. [default: today, by UTC]"""
    file_size: int = Field(128, ge=1, le=4096)
    """Megabytes of small files that are merged into one. A file is sorted in memory, which takes some six
    times as much."""
    model_id: str | None = None
    """Compact only what this model scored. [default: all models]"""


@dataclass(frozen=True)
class _Day:
    """The files of one day of a model, in the order of plans and shards."""

    output: Output
    date: str
    files: Mapping[Kind, Sequence[ShardFile]]
    unfinished: int
    """Number of planned shards that have no scores yet."""


@dataclass
class _Counts:
    read: int = 0
    written: int = 0
    kept: int = 0


def compact(config: CompactConfig) -> ExitStatus:
    """Writes what is not yet in the compacted folder, or not as it is now.

    Returns:
        INCOMPLETE if a day is left out because a shard of it has no scores yet.

    Raises:
        WrongUse: there are no scores before that day, or the folder is one that scoring jobs write to.
    """
    source, target = (Location(url, config.storage_options) for url in (config.scores, config.output))
    _check_target(source, target)
    before = (config.before or datetime.now(UTC).date()).isoformat()
    days = [day for output in _outputs(source, config.model_id) for day in _days(output, before)]
    if not days:
        raise WrongUse(f"{source} holds no scores of a day before {before}")
    target.check_writable()
    (target / COMPACTED).write(f"{source.url}\n".encode())
    finished = [day for day in days if not day.unfinished]
    counts, progress = _Counts(), Progress(len(finished), "days")
    for done, day in enumerate(finished, start=1):
        _compact_day(day, target, config.file_size * 1_000_000, counts)
        progress.update(done, f"{counts.written} files written")
    progress.close()
    for day in days:
        if day.unfinished:
            warn(
                f"{day.date} of model {day.output.model_id} is left out: {day.unfinished} planned shards "
                "have no scores yet; run csflow score over its images, then this command again"
            )
    print(
        f"{len(finished):,} days in {target}: {counts.read:,} files merged into {counts.written:,}; "
        f"{counts.kept:,} files were up to date"
    )
    return ExitStatus.DONE if len(finished) == len(days) else ExitStatus.INCOMPLETE


def _check_target(source: Location, target: Location) -> None:
    """Refuses folders in which files may be that are not of this source's compaction."""
    below = target.path.removeprefix(f"{source.path.rstrip('/')}/")
    if below != target.path and below.split("/")[0].startswith(("scores", "errors", "_")):
        raise WrongUse(f"--output {target} is where scoring jobs write; choose another folder")
    try:
        origin = (target / COMPACTED).read().decode().strip()
    except FileNotFoundError:
        if (target / "scores").find(".parquet") or (target / "_plans").find(".json"):
            raise WrongUse(
                f"--output {target} holds scores that were not compacted, and must stay as they are; choose "
                "another folder"
            ) from None
    else:
        if origin != source.url:
            raise WrongUse(f"--output {target} holds the compacted scores of {origin}; choose another folder")


def _outputs(source: Location, model_id: str | None) -> Iterator[Output]:
    """The output of each model, or of the one that is asked for."""
    models = scored_models(source)
    if model_id is not None and model_id not in models:
        raise WrongUse(f"{source} has no scores of model {model_id}; it has {', '.join(models)}")
    return (Output(source, each) for each in models if model_id in (None, each))


def _days(output: Output, before: str) -> Iterator[_Day]:
    planned: dict[str, set[str]] = defaultdict(set)
    for plan in PlanLog(output).read():
        planned[plan.date] |= {plan.shard_name(number) for number in range(plan.shards)}
    every_file: dict[str, dict[Kind, list[ShardFile]]] = defaultdict(lambda: {"scores": [], "errors": []})
    for kind in SCHEMAS:
        for file in output.files(kind):
            every_file[file.date][kind].append(file)
    for day in sorted(every_file.keys() | planned.keys()):
        if day < before:
            files = every_file[day]
            scored = {file.shard for file in files["scores"]}
            yield _Day(output, day, files, len(planned[day] - scored))


def _compact_day(day: _Day, target: Location, size: int, counts: _Counts) -> None:
    for kind, files in day.files.items():
        folder = Output(target, day.output.model_id).day_folder(kind, day.date)
        groups = {_name(number, group): group for number, group in enumerate(_groups(files, size))}
        present = {file.name for file in folder.find(".parquet")}
        # Removed first: a reader may miss rows for a moment, but never sees a row twice.
        for name in present - groups.keys():
            (folder / name).remove()
        for name in groups.keys() - present:
            counts.read += len(groups[name])
            counts.written += 1
            with suppress(FileExistsError):  # another compaction of the same files was first
                (folder / name).create(_merged(groups[name], SCHEMAS[kind]))
        counts.kept += len(groups.keys() & present)


def _groups(files: Sequence[ShardFile], size: int) -> Iterator[list[ShardFile]]:
    """Neighbouring files that have this many bytes together, or more by at most one file."""
    group: list[ShardFile] = []
    missing = size
    for file in files:
        group.append(file)
        missing -= file.size
        if missing <= 0:
            yield group
            group, missing = [], size
    if group:
        yield group


def _name(number: int, group: Sequence[ShardFile]) -> str:
    """The name of the file that stands for these, which other files, or other versions, do not have."""
    content = "\n".join(f"{file.location.name} {file.version or file.size}" for file in group)
    return f"part-{number:06d}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.parquet"


def _merged(files: Sequence[ShardFile], schema: pa.Schema) -> bytes:
    """The rows of these files, sorted by URI, so that readers skip the row groups of other images."""
    try:
        table = dataset(files, schema).to_table()
    except pa.ArrowInvalid as error:
        reason = str(error).partition("\n")[0]
        raise Failed(f"a file of {files[0].location.parent} cannot be read: {reason}; restore it") from None
    return to_parquet(table.sort_by("image_uri"))
