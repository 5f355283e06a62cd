"""The Parquet schemas of a scoring run's output, and how its files below `--output` are found and read."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from csflow.errors import WrongUse
from csflow.storage import Location

# Parquet's own name for the items of a list, so that a file's schema reads back as this one.
FLOATS = pa.list_(pa.field("element", pa.float32()))

SCORES = pa.schema(
    [
        pa.field("image_uri", pa.string(), nullable=False),
        pa.field("image_version", pa.string(), nullable=False),
        pa.field("image_height", pa.int32(), nullable=False),
        pa.field("image_width", pa.int32(), nullable=False),
        pa.field("anomaly_score", pa.float64(), nullable=False),
        pa.field("scale_scores", FLOATS, nullable=False),
        pa.field("p_value", pa.float64(), nullable=False),
        pa.field("is_anomalous", pa.bool_(), nullable=False),
        pa.field("anomaly_map", FLOATS),
        pa.field("map_height", pa.int32(), nullable=False),
        pa.field("map_width", pa.int32(), nullable=False),
        pa.field("peak_y", pa.float32(), nullable=False),
        pa.field("peak_x", pa.float32(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("scored_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("map_box", FLOATS),  # null if the map covers the whole image
        pa.field("global_score", pa.float64()),
        pa.field("global_p_value", pa.float64()),
        pa.field("local_score", pa.float64()),  # null, with the next two, from models without whitening
        pa.field("local_p_value", pa.float64()),
        pa.field("map_threshold", pa.float64()),  # null too if the held-out images are too few to tell
    ]
)

ERRORS = pa.schema(
    [
        pa.field("image_uri", pa.string(), nullable=False),
        pa.field("image_version", pa.string(), nullable=False),
        pa.field("error_code", pa.string(), nullable=False),
        pa.field("error_message", pa.string(), nullable=False),
        pa.field("is_transient", pa.bool_(), nullable=False),
        pa.field("run_id", pa.string(), nullable=False),
        pa.field("failed_at", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)

_PARTITION = re.compile(r"/model_id=([^/]+)/date=(\d{4}-\d{2}-\d{2})/[^/]+$")


@dataclass(frozen=True)
class ScoringOutput:
    """What one model has written below the `--output` of scoring jobs, with a `date` column (date32) each."""

    model_id: str
    root: Location
    """The `--output` itself."""
    scores: ds.Dataset
    errors: ds.Dataset | None
    """None if no image ever failed."""


@dataclass(frozen=True)
class OutputFile:
    """A Parquet file of `scores` or `errors`, with the partition that its path names."""

    location: Location
    model_id: str
    date: date


def output_files(folder: Location) -> list[OutputFile]:
    """All files below `scores` or `errors`, by path; none if there is no such folder."""
    matches = ((file, _PARTITION.search(file.path)) for file in folder.find(".parquet"))
    return [OutputFile(file, match[1], date.fromisoformat(match[2])) for file, match in matches if match]


def open_scores(location: Location, model_id: str | None = None) -> ScoringOutput:
    """Opens the output of scoring jobs, or the `scores` folder in it, for one model.

    Raises:
        WrongUse: there are no scores, or of several models and `model_id` names none of them.
    """
    root, models = _find_models(location)
    if model_id is None and len(models) == 1:
        model_id = next(iter(models))
    if model_id not in models:
        what = "holds scores of several models" if model_id is None else f"has no scores of model {model_id}"
        raise WrongUse(f"{location} {what}; choose with --model_id: {', '.join(models)}")
    failed = _files_by_model(root / "errors").get(model_id)
    return ScoringOutput(
        model_id,
        root,
        scores=_open_dataset(root, models[model_id], SCORES),
        errors=_open_dataset(root, failed, ERRORS) if failed else None,
    )


def latest_per_image(table: pa.Table, time: str) -> pa.Table:
    """The rows with the latest `time` of each image URI, in order of time."""
    table = table.sort_by(time)
    rows = table.select(["image_uri"]).append_column("row", pa.array(np.arange(len(table))))
    last = rows.group_by("image_uri").aggregate([("row", "max")])["row_max"]
    return table.take(np.sort(last.to_numpy()))


def _find_models(location: Location) -> tuple[Location, dict[str, list[str]]]:
    for root in _possible_roots(location):
        try:
            models = _files_by_model(root / "scores")
        except Exception as error:  # object stores' errors have no common base
            reason = f"{type(error).__name__}: {error}"
            raise WrongUse(f"{location} cannot be listed ({reason}); check address and access") from None
        if models:
            return root, models
    raise WrongUse(
        f"{location} holds no scores (scores/model_id=<id>/date=<date>/*.parquet); "
        "--scores takes the --output of a scoring job"
    )


def _possible_roots(location: Location) -> Iterator[Location]:
    url = location.fs.unstrip_protocol(location.path).rstrip("/")
    yield Location(url, location.storage_options)
    if url.endswith("/scores"):
        yield Location(url.removesuffix("/scores"), location.storage_options)


def _files_by_model(folder: Location) -> dict[str, list[str]]:
    """Paths of the Parquet files in `model_id=<id>/date=<date>/`, by model id."""
    files = defaultdict(list)
    for file in output_files(folder):
        files[file.model_id].append(file.location.path)
    return dict(sorted(files.items()))


def _open_dataset(root: Location, paths: list[str], schema: pa.Schema) -> ds.Dataset:
    partitioning = ds.partitioning(pa.schema([("date", pa.date32())]), flavor="hive")
    try:
        found = ds.dataset(paths, filesystem=root.fs, format="parquet", partitioning=partitioning)
    except pa.ArrowInvalid as error:
        raise WrongUse(f"{root} holds a file that is no Parquet: {error}") from None
    required = [name for name in schema.names if not schema.field(name).nullable]
    missing = [name for name in required if name not in found.schema.names]
    if missing:
        raise WrongUse(f"{paths[0]} lacks the columns {', '.join(missing)}; was it written by a scoring job?")
    # A nullable column that an older csflow did not write reads as null.
    return found.replace_schema(pa.unify_schemas([schema, found.schema]))
