"""What scoring jobs have left behind, as the report sees it: scores, errors, run records, held-out scores."""

import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray

from csflow.errors import WrongUse
from csflow.report.config import ReportConfig
from csflow.scores import ScoringOutput, latest_per_image, open_scores
from csflow.storage import Location

RUNS_SHOWN = 10
RUNS_LOOKED_AT = 50
"""Records read at most: an output may have runs of other models, and runs that were cut off."""

# Maps are most of the data: everything but the gallery and the heat map is made without them.
COLUMNS = ["image_uri", "date", "run_id", "scored_at", "anomaly_score", "p_value", "is_anomalous"]


@dataclass(frozen=True)
class ErrorGroup:
    """Images that have no score for one reason."""

    code: str
    images: int
    is_transient: bool
    latest: dict[str, Any]
    """The last row of `errors` among them."""


@dataclass(frozen=True)
class Archive:
    """The images that a report is about, one row each."""

    model_id: str
    scores: ds.Dataset
    """All rows of the images' runs, maps included."""
    images: pa.Table
    """The latest score of each image, `COLUMNS`."""
    errors: list[ErrorGroup]
    runs: list[dict[str, Any]]
    """Records of the last runs, the latest first."""
    calibration_scores: NDArray[np.float64] | None
    """Of the held-out images; None if the model directory is not at hand."""


def open_archive(config: ReportConfig) -> Archive:
    """Raises WrongUse if there are no scores, or no such run or model."""
    output = open_scores(Location(config.scores, config.storage_options), config.model_id)
    scores = output.scores
    run_id = _latest_run(scores) if config.run_id == "latest" else config.run_id
    if run_id is not None:
        scores = scores.filter(pc.field("run_id") == run_id)
        if not scores.head(1, columns=["run_id"]).num_rows:
            raise WrongUse(f"--run_id {run_id} scored no image of model {output.model_id} in {config.scores}")
    runs = [record for record in _read_runs(output) if run_id in (None, record["run_id"])]
    return Archive(
        output.model_id,
        scores,
        latest_per_image(scores.to_table(columns=COLUMNS), "scored_at"),
        open_errors(output, run_id),
        runs[:RUNS_SHOWN],
        _calibration_scores(config, output.model_id, runs),
    )


def _latest_run(scores: ds.Dataset) -> str | None:
    """Run ids begin with the time of the run's start."""
    latest = (pc.max(batch["run_id"]).as_py() for batch in scores.to_batches(columns=["run_id"]))
    return max((run_id for run_id in latest if run_id is not None), default=None)


def open_errors(output: ScoringOutput, run_id: str | None = None) -> list[ErrorGroup]:
    """Images that have no score for an error, by code, the most frequent code first."""
    if output.errors is None:
        return []
    of_run = pc.field("run_id") == run_id if run_id is not None else None
    failed = latest_per_image(output.errors.to_table(filter=of_run), "failed_at")
    scored = output.scores.to_table(
        columns=["image_uri", "image_version", "scored_at"],
        filter=pc.field("image_uri").isin(failed["image_uri"].combine_chunks()),
    )
    both = failed.join(scored, "image_uri", join_type="inner", right_suffix="_scored")
    is_same = pc.equal(both["image_version"], both["image_version_scored"])
    recovered = both.filter(pc.or_(is_same, pc.greater(both["scored_at"], both["failed_at"])))
    is_open = pc.invert(pc.is_in(failed["image_uri"], recovered["image_uri"].combine_chunks()))
    failed = failed.filter(is_open).sort_by([("failed_at", "descending")])
    groups = []
    for count in failed["error_code"].value_counts().to_pylist():
        (latest,) = failed.filter(pc.equal(failed["error_code"], count["values"])).slice(0, 1).to_pylist()
        groups.append(ErrorGroup(latest["error_code"], count["counts"], latest["is_transient"], latest))
    return sorted(groups, key=lambda group: -group.images)


def _read_runs(output: ScoringOutput) -> list[dict[str, Any]]:
    """Records of this model's runs, the latest first. A run that was cut off has none."""
    folder = output.root / "_runs"
    try:
        names = sorted(
            path.rstrip("/").rsplit("/", 1)[-1] for path in folder.fs.ls(folder.path, detail=False)
        )
    except FileNotFoundError:
        return []
    records = []
    for name in reversed(names[-RUNS_LOOKED_AT:]):
        try:
            record = json.loads((folder / name / "run.json").read())
        except FileNotFoundError:
            continue
        if record["model"]["model_id"] == output.model_id:
            records.append(record)
    return records


def _calibration_scores(
    config: ReportConfig, model_id: str, runs: list[dict[str, Any]]
) -> NDArray[np.float64] | None:
    if config.model is not None:
        scores = read_calibration(Location(config.model, config.storage_options), model_id)
        if scores is None:
            raise WrongUse(f"--model {config.model} does not hold model {model_id}, whose scores these are")
        return scores
    places = dict.fromkeys(record["model"]["location"] for record in runs)
    found = (read_calibration(Location(place, config.storage_options), model_id) for place in places)
    return next((scores for scores in found if scores is not None), None)


def read_calibration(model: Location, model_id: str) -> NDArray[np.float64] | None:
    """Held-out scores of a model directory; None if it cannot be read or holds another model.

    A report needs neither PyTorch nor the model's weights, which `load_model` reads.
    """
    try:
        if json.loads((model / "config.json").read())["model_id"] != model_id:
            return None
        table = pq.read_table(io.BytesIO((model / "calibration.parquet").read()), columns=["anomaly_score"])
    except (OSError, ValueError, KeyError):
        return None
    return np.asarray(table["anomaly_score"].to_numpy(), dtype=np.float64)
