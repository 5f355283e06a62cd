"""Opens the output of scoring jobs for one model: its scores, errors and runs."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from csflow.errors import WrongUse
from csflow.literal_paths import arrow_filesystem
from csflow.output.layout import SCORES_FILES, Kind, OutputFile, ShardFile, output_files, run_ids
from csflow.output.runs import RecordOfModel, RunRecord, read_record
from csflow.output.schemas import ERRORS, KEY_COLUMNS, SCORES
from csflow.storage import Location

RUNS_LOOKED_AT = 50
"""Largest number of run records to read, since some runs are of other models or were cut off."""


@dataclass(frozen=True)
class ScoringOutput:
    """The scores and errors of one model below an `--output`, each with a `date` column (date32)."""

    model_id: str
    root: Location
    """The location of the `--output`."""
    scores: ds.Dataset
    errors: ds.Dataset | None
    """The log of errors; None if no image ever failed."""


def open_scores(location: Location, model_id: str | None = None) -> ScoringOutput:
    """Opens the output of scoring jobs, or the `scores` folder in it, for one model.

    Raises:
        WrongUse: there are no scores, or scores of several models but not of `model_id`.
    """
    root, models = _find_models(location)
    if model_id is None and len(models) == 1:
        model_id = next(iter(models))
    if model_id not in models:
        what = "holds scores of several models" if model_id is None else f"has no scores of model {model_id}"
        raise WrongUse(f"{location} {what}; choose with --model_id: {_labels(root, models)}")
    failed = _files_by_model(root, "errors").get(model_id)
    return ScoringOutput(
        model_id,
        root,
        scores=_open_dataset(root, models[model_id], SCORES),
        errors=_open_dataset(root, failed, ERRORS) if failed else None,
    )


def of_run(output: ScoringOutput, run_id: str | None) -> tuple[ds.Dataset, str | None]:
    """The scores of one run, and its id; those of all runs and None if the id is None.

    Args:
        run_id: what a setting `--run_id` says; `latest` is the last run.

    Raises:
        WrongUse: this run has scored no image.
    """
    if run_id == "latest":
        run_id = _latest_run(output.scores)
    if run_id is None:
        return output.scores, None
    scores = output.scores.filter(pc.field("run_id") == run_id)
    if not scores.head(1, columns=["run_id"]).num_rows:
        raise WrongUse(f"--run_id {run_id} scored no image of model {output.model_id} in {output.root}")
    return scores, run_id


def _latest_run(scores: ds.Dataset) -> str | None:
    """The id of the last run. Run ids begin with the time of the run's start."""
    latest = (pc.max(batch["run_id"]).as_py() for batch in scores.to_batches(columns=["run_id"]))
    return max((run_id for run_id in latest if run_id is not None), default=None)


def latest_per_image(table: pa.Table, time: str) -> pa.Table:
    """The rows with the latest `time` of each image URI, in order of time."""
    table = table.sort_by(time)
    rows = table.select(["image_uri"]).append_column("row", pa.array(np.arange(len(table))))
    last = rows.group_by("image_uri").aggregate([("row", "max")])["row_max"]
    return table.take(np.sort(last.to_numpy()))


@dataclass(frozen=True)
class ErrorGroup:
    """Images that have no score because of the same error code."""

    code: str
    images: int
    is_transient: bool
    latest: dict[str, Any]
    """The latest of their rows in `errors`."""


def open_errors(output: ScoringOutput, run_id: str | None = None) -> list[ErrorGroup]:
    """Images that have an error and no score, grouped by code, the most frequent code first."""
    if output.errors is None:
        return []
    of_run = pc.field("run_id") == run_id if run_id is not None else None
    failed = latest_per_image(output.errors.to_table(filter=of_run), "failed_at")
    scored = output.scores.to_table(
        columns=["image_uri", "image_version", "scored_at"],
        filter=pc.field("image_uri").isin(failed["image_uri"].combine_chunks()),
    )
    # Arrow joins no maps, which `tags` are.
    attempts = failed.select(["image_uri", "image_version", "failed_at"])
    both = attempts.join(scored, "image_uri", join_type="inner", right_suffix="_scored")
    is_same = pc.equal(both["image_version"], both["image_version_scored"])
    recovered = both.filter(pc.or_(is_same, pc.greater(both["scored_at"], both["failed_at"])))
    is_open = pc.invert(pc.is_in(failed["image_uri"], recovered["image_uri"].combine_chunks()))
    failed = failed.filter(is_open).sort_by([("failed_at", "descending")])
    groups = []
    for count in failed["error_code"].value_counts().to_pylist():
        (latest,) = failed.filter(pc.equal(failed["error_code"], count["values"])).slice(0, 1).to_pylist()
        groups.append(ErrorGroup(latest["error_code"], count["counts"], latest["is_transient"], latest))
    return sorted(groups, key=lambda group: -group.images)


def last_records(output: ScoringOutput) -> list[RecordOfModel]:
    """Records of this model among the last `RUNS_LOOKED_AT` runs, latest first; runs cut off have none."""
    return [record for record in _of_models(output.root) if record.model.model_id == output.model_id]


def _of_models(root: Location) -> Iterator[RecordOfModel]:
    """The records, of runs with several models one for each."""
    for record in _records(root):
        yield from record.by_model()


def _records(root: Location) -> Iterator[RunRecord]:
    """Records of the last `RUNS_LOOKED_AT` runs, latest first; runs cut off have none."""
    for run_id in reversed(run_ids(root)[-RUNS_LOOKED_AT:]):
        if record := read_record(root, run_id):
            yield record


def _labels(root: Location, model_ids: Iterable[str]) -> str:
    """The models as people know them, as far as run records tell."""
    known: dict[str, str] = {}
    for record in _of_models(root):
        known.setdefault(record.model.model_id, record.model.label)
    return ", ".join(known.get(model_id, model_id) for model_id in model_ids)


def scored_images(files: Sequence[ShardFile]) -> Iterator[pa.RecordBatch]:
    """The images in these scores files, without reading the maps."""
    return _read(files, KEY_COLUMNS, SCORES)


def permanent_errors(files: Sequence[ShardFile]) -> Iterator[pa.RecordBatch]:
    """The images in these errors files whose error is permanent."""
    for batch in _read(files, [*KEY_COLUMNS, "is_transient"], ERRORS):
        yield batch.filter(pc.invert(batch["is_transient"]))


def dataset(files: Sequence[ShardFile] | Sequence[OutputFile], schema: pa.Schema) -> ds.Dataset:
    """At least one file, opened as one dataset of this schema."""
    sizes = {file.location.path: file.size for file in files}
    fs = arrow_filesystem(files[0].location.fs, sizes)
    return ds.dataset(list(sizes), schema, format="parquet", filesystem=fs)


def _read(files: Sequence[ShardFile], columns: Sequence[str], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    if files:
        # Read-ahead is bounded, so that memory does not grow with the number of files.
        ahead = {"batch_readahead": 4, "fragment_readahead": 4}
        yield from dataset(files, schema).to_batches(columns=list(columns), **ahead)


def _find_models(location: Location) -> tuple[Location, dict[str, list[OutputFile]]]:
    for root in _possible_roots(location):
        try:
            models = _files_by_model(root, "scores")
        except Exception as error:  # object stores' errors have no common base
            reason = f"{type(error).__name__}: {error}"
            raise WrongUse(f"{location} cannot be listed ({reason}); check address and access") from None
        if models:
            return root, models
    raise WrongUse(
        f"{location} holds no scores ({SCORES_FILES}); scores are in the --output of `csflow score`"
    )


def _possible_roots(location: Location) -> Iterator[Location]:
    # Not `unstrip_protocol`, which forgets the host of some stores.
    url = location.url.rstrip("/")
    yield Location(url, location.storage_options)
    if url.endswith("/scores"):
        yield Location(url.removesuffix("/scores"), location.storage_options)


def _files_by_model(root: Location, kind: Kind) -> dict[str, list[OutputFile]]:
    """The files of `scores` or `errors`, by model id, sorted."""
    files = defaultdict(list)
    for file in output_files(root, kind):
        files[file.model_id].append(file)
    return dict(files)


def _open_dataset(root: Location, files: Sequence[OutputFile], schema: pa.Schema) -> ds.Dataset:
    sizes = {file.location.path: file.size for file in files}
    # Arrow's own access to local files is faster, and asks no store for sizes.
    fs = root.fs if root.is_local else arrow_filesystem(root.fs, sizes)
    partitioning = ds.partitioning(pa.schema([("date", pa.date32())]), flavor="hive")
    try:
        found = ds.dataset(list(sizes), filesystem=fs, format="parquet", partitioning=partitioning)
    except pa.ArrowInvalid as error:
        raise WrongUse(f"{root} holds a file that is no Parquet: {error}") from None
    required = [name for name in schema.names if not schema.field(name).nullable]
    missing = [name for name in required if name not in found.schema.names]
    if missing:
        raise WrongUse(
            f"{files[0].location} lacks the columns {', '.join(missing)}; was it written by a scoring job?"
        )
    # A nullable column that an older csflow did not write reads as null.
    return found.replace_schema(pa.unify_schemas([schema, found.schema]))
