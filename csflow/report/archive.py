"""Reads what the report needs from an output: scores, errors, run records, held-out scores."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from csflow.calibration import Drift, drift
from csflow.errors import WrongUse
from csflow.model_directory import Calibration, find_calibration
from csflow.output.reading import (
    ErrorGroup,
    last_records,
    latest_per_image,
    of_run,
    open_errors,
    open_scores,
)
from csflow.output.runs import RecordOfModel
from csflow.report.config import ReportConfig
from csflow.storage import Location

RUNS_SHOWN = 10

# Maps are most of the data: everything but the gallery and the heat map is made without them.
COLUMNS = ["image_uri", "date", "run_id", "scored_at", "anomaly_score", "p_value", "is_anomalous"]


@dataclass(frozen=True)
class Archive:
    """The images that a report is about, and their runs."""

    model_id: str
    scores: ds.Dataset
    """All rows of the images' runs, including maps."""
    images: pa.Table
    """The latest score of each image, with the columns `COLUMNS`."""
    errors: list[ErrorGroup]
    runs: list[RecordOfModel]
    """Records of the last runs, latest first."""
    calibration: Calibration | None
    """None if the model directory was not found."""

    @cached_property
    def share_below_5_percent(self) -> float | None:
        """Share of images with a p-value below 0.05; None if there are no images."""
        share: float | None = pc.mean(pc.less(self.images["p_value"], 0.05)).as_py()
        return share

    @cached_property
    def drift(self) -> Drift | None:
        """How the images differ from the held-out ones; None without either."""
        if self.calibration is None or self.share_below_5_percent is None:
            return None
        scores = self.images["anomaly_score"].to_numpy()
        scores, heldout = scores[np.isfinite(scores)], self.calibration
        return drift(scores, self.share_below_5_percent, heldout.anomaly_score, weights=heldout.weights)


def open_archive(config: ReportConfig) -> Archive:
    """Opens an archive. Raises WrongUse if there are no scores, or no such run or model."""
    output = open_scores(Location(config.scores, config.storage_options), config.model_id)
    scores, run_id = of_run(output, config.run_id)
    runs = [record for record in last_records(output) if run_id in (None, record.run_id)]
    return Archive(
        output.model_id,
        scores,
        latest_per_image(scores.to_table(columns=COLUMNS), "scored_at"),
        open_errors(output, run_id),
        runs[:RUNS_SHOWN],
        _calibration(config, output.model_id, runs),
    )


def _calibration(config: ReportConfig, model_id: str, runs: list[RecordOfModel]) -> Calibration | None:
    if config.model is not None:
        calibration = find_calibration([Location(config.model, config.storage_options)], model_id)
        if calibration is None:
            raise WrongUse(f"--model {config.model} does not hold model {model_id}, whose scores these are")
        return calibration
    locations = dict.fromkeys(record.model.location for record in runs)
    return find_calibration((Location(url, config.storage_options) for url in locations), model_id)
