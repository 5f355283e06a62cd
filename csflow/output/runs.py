"""`run.json`: the record that a scoring run leaves of itself, typed and versioned."""

import json
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from csflow.calibration import Drift
from csflow.errors import WrongUse
from csflow.output.layout import run_folder
from csflow.storage import Location

FORMAT_VERSION = 1
"""Grows when a key is renamed, removed or means something else. Readers pass over keys they do not know."""


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, protected_namespaces=())


class ScoredWith(Record):
    """The model of a run."""

    location: str
    model_id: str


class Counts(Record):
    """Images by state at the end of the run, and what the run itself did."""

    listed: int
    scored: int
    permanent_errors: int
    missing: int
    scored_in_this_run: int
    anomalous_in_this_run: int
    errors_in_this_run: dict[str, int]
    """By error code."""
    failed_shards_in_this_run: int = 0


class RunRecord(Record):
    """The content of `run.json`. What the first version of csflow did not write has a default."""

    format_version: int = FORMAT_VERSION
    run_id: str
    status: str
    """The name of the exit status."""
    exit_status: int
    started_at: datetime
    ended_at: datetime
    model: ScoredWith
    configuration: dict[str, Any]
    """Settings without storage options, which may hold secrets."""
    counts: Counts
    precisions: list[str] = []
    """What workers computed in."""
    drift: Drift | None
    peak_memory_bytes: dict[str, int]
    """Of the `driver`, and of the largest `worker`."""
    images_per_second: float
    """While scoring."""
    seconds: dict[str, float]
    """By step of the job."""
    seconds_to_first_image: float | None = None
    """From the start of the driver's process to the first scores."""
    seconds_in_workers: dict[str, float]
    """By stage, summed over workers."""
    cpu_seconds_in_workers: dict[str, float] = {}
    libraries: dict[str, str]
    """Version by name."""

    def write(self, output: Location) -> None:
        text = json.dumps(self.model_dump(), indent=2, default=datetime.isoformat)
        (run_folder(output, self.run_id) / "run.json").write(f"{text}\n".encode())


def read_record(output: Location, run_id: str) -> RunRecord | None:
    """The record of a run; None if it is still at work, or was cut off.

    Raises:
        WrongUse: it is damaged, or of a newer format.
    """
    file = run_folder(output, run_id) / "run.json"
    try:
        record = RunRecord.model_validate(json.loads(file.read()))
    except FileNotFoundError:
        return None
    except ValueError as error:  # of JSON, or pydantic's
        raise WrongUse(f"{file} is no record of a run ({error}); delete it, or restore it") from None
    if record.format_version > FORMAT_VERSION:
        raise WrongUse(
            f"{file} has format version {record.format_version}, this csflow reads {FORMAT_VERSION}; use a "
            "newer csflow"
        )
    return record
