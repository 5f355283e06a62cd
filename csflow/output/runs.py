"""What a scoring run leaves of itself: the record `run.json` at its end, and its progress until then."""

import json
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from csflow.calibration import Drift
from csflow.errors import WrongUse
from csflow.inputs.unlisted import Skipped
from csflow.output.layout import run_folder
from csflow.storage import Location

FORMAT_VERSION = 1
"""Grows when a key is renamed, removed or changes its meaning. Readers ignore keys that they do not know."""


class Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class ScoredWith(Record):
    """The model that a run scored with."""

    location: str
    model_id: str
    model_name: str | None = None
    """The model's name, if it has one."""

    @property
    def label(self) -> str:
        """The model id, with the name or place by which people know the model."""
        return f"{self.model_id} ({self.model_name or self.location})"


class Counts(Record):
    """Number of images in each state at the end of the run, and what the run itself did."""

    listed: int
    scored: int
    permanent_errors: int
    missing: int
    scored_in_this_run: int
    anomalous_in_this_run: int
    errors_in_this_run: dict[str, int]
    """Number of errors of this run, by error code."""
    failed_shards_in_this_run: int = 0
    unrouted: int = 0
    """Number of images that no rule of `--routes` matches; they are not in `listed`."""
    not_listed: int = 0
    """Number of files and folders of the input that cannot be listed; images in them are not in `listed`."""


class OfModel(Record):
    """What a run did with one of its models."""

    location: str
    model_id: str
    model_name: str | None = None
    rules: list[str] = []
    """Names of the rules of `--routes` that name the model."""
    counts: Counts
    drift: Drift | None
    drift_by_group: dict[str, Drift] = {}

    @property
    def has_drifted(self) -> bool:
        """Whether the model's scores have, all of them or those of a group."""
        return any(one.has_drifted for one in (self.drift, *self.drift_by_group.values()) if one)

    def as_alone(self) -> dict[str, Any]:
        """The fields of a `RunRecord` that this model had if it were the only one of the run."""
        model = ScoredWith(location=self.location, model_id=self.model_id, model_name=self.model_name)
        shared = type(self).model_fields.keys() & RunRecord.model_fields.keys()
        return {"model": model, **{name: getattr(self, name) for name in shared}}


class RunRecord(Record):
    """The content of `run.json`. Fields that the first version of csflow did not write have defaults."""

    format_version: int = FORMAT_VERSION
    run_id: str
    status: str
    """The name of the exit status."""
    exit_status: int
    started_at: datetime
    ended_at: datetime
    model: ScoredWith | None
    """The model of the run; null if it had several, or could have."""
    configuration: dict[str, Any]
    """The settings, without storage options, which may hold secrets."""
    counts: Counts
    not_listed: dict[str, str] = {}
    """Why files and folders (which end in /) of the input cannot be listed, by URI; at most 1,000 of them."""
    skipped: list[Skipped] = []
    """What lies below the input and is not taken, the most frequent first: `reason`, `kind` (the suffix of
    files, or the name of a folder, which ends in /) and `number`."""
    precisions: list[str] = []
    """The precisions that workers computed in."""
    forms: list[dict[str, Any]] = []
    """How workers computed the model: `device`, `precision`, `batch_size` (images in a pass), and
    `fallbacks`, which say what ran more slowly than it could and why."""
    drift: Drift | None
    """Null if the run had several models, or could have; then each has its own."""
    drift_by_group: dict[str, Drift] = {}
    """The drift of each group, such as `camera=top`, that the model calibrates apart (`--calibrate_by`). A
    camera with few of the images may drift without the whole doing so."""
    peak_memory_bytes: dict[str, int]
    """Peak memory of the `driver` and of the largest `worker`."""
    images_per_second: float
    """Rate while images were scored."""
    seconds: dict[str, float]
    """Seconds of each step of the job."""
    seconds_to_first_image: float | None = None
    """Seconds from the start of the driver's process to the first scores."""
    seconds_in_workers: dict[str, float]
    """Seconds of each stage, summed over workers: `read` and `decode` over their threads, too, and likewise
    `helped_read` and `helped_decode` of other CPUs; `score`; `wait`, when a model had no image to score."""
    images_helped: int = 0
    """Number of images that helpers on other CPUs read and decoded."""
    spilled_bytes: int = 0
    """Bytes that Ray's object stores moved to disk while images were scored, those of other jobs included."""
    cpu_seconds_in_workers: dict[str, float] = {}
    libraries: dict[str, str]
    """Versions of libraries, by name."""
    models: list[OfModel] = []
    """Every model of the run, with its own counts and drift."""
    not_loaded: dict[str, str] = {}
    """Why models cannot be loaded, by their addresses. Their images are counted as missing."""
    unrouted: list[str] = []
    """Some of the images that no rule matches."""
    models_loaded: int = 0
    """How often a worker loaded a model."""

    def by_model(self) -> "list[RecordOfModel]":
        """The record as each of its models sees it, with its own counts and drift in place of all."""
        shared = {name: getattr(self, name) for name in type(self).model_fields}
        if self.model is not None:
            return [RecordOfModel(**shared)]
        return [RecordOfModel(**shared | some.as_alone()) for some in self.models]

    def drift_in_words(self) -> list[str]:
        """A sentence on all scores, one on each group whose scores have drifted, and one on the others."""
        if self.drift is None:
            return []
        drifted = [f"{group}: {one.words}" for group, one in self.drift_by_group.items() if one.has_drifted]
        like = sum(one.verdict == "like" for one in self.drift_by_group.values())
        others = [f"no drift in {like} of {len(self.drift_by_group)} groups"] if like else []
        return [self.drift.words, *drifted, *others]

    def write(self, output: Location) -> None:
        text = json.dumps(self.model_dump(), indent=2, default=datetime.isoformat)
        (run_folder(output, self.run_id) / "run.json").write(f"{text}\n".encode())


class RecordOfModel(RunRecord):
    """A record as one model sees it."""

    model: ScoredWith


class Progress(Record):
    """The content of `progress.json`: what a run was doing when something was last done."""

    run_id: str
    started_at: datetime
    updated_at: datetime
    step: str
    """`list`, `plan`, `score` or `account`."""
    done: int = 0
    """Number of shards that were scored, in the step `score`."""
    of: int = 0
    """Number of shards that are to be scored."""

    def write(self, output: Location) -> None:
        """Replaces the progress that was written before. Raises StorageFailed if that fails."""
        _progress_file(output, self.run_id).write(f"{self.model_dump_json(indent=2)}\n".encode())


def _progress_file(output: Location, run_id: str) -> Location:
    return run_folder(output, run_id) / "progress.json"


def read_progress(output: Location, run_id: str) -> Progress | None:
    """The progress of a run; None if it wrote none, as versions before 0.3, or none that can be read."""
    try:
        return Progress.model_validate_json(_progress_file(output, run_id).read())
    except (FileNotFoundError, ValueError):
        return None


def read_record(output: Location, run_id: str) -> RunRecord | None:
    """The record of a run; None for a run at work or cut off. Raises WrongUse if it is damaged or newer."""
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
