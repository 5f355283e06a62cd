"""Shows what a model directory or an output holds, from file names, JSON and Parquet footers alone."""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import pyarrow as pa

from csflow.calibration import lowest_rate
from csflow.config import JobConfig
from csflow.errors import ExitStatus, WrongUse
from csflow.interest import from_text
from csflow.model_directory import holds_model, read_calibration, read_config
from csflow.output.layout import SCORES_FILES, OutputFile, output_files, run_ids
from csflow.output.reading import dataset
from csflow.output.runs import read_progress, read_record
from csflow.output.schemas import ERRORS, SCORES
from csflow.storage import Location


class InspectConfig(JobConfig):
    """Settings of `csflow inspect`."""

    positional: ClassVar[tuple[str, ...]] = ("location",)

    location: str
    """Model directory, or output of scoring jobs."""


def inspect(config: InspectConfig) -> ExitStatus:
    """Prints what a location holds. Raises WrongUse if it holds neither a model nor scores."""
    location = Location(config.location, config.storage_options)
    try:
        lines = list(_model(location) if holds_model(location) else _output(location))
    except WrongUse:
        raise
    except Exception as error:  # object stores' errors have no common base
        reason = f"{type(error).__name__}: {error}"
        raise WrongUse(f"{location} cannot be read ({reason}); check address and access") from None
    if not lines:
        raise WrongUse(f"{location} holds neither a model (config.json) nor scores ({SCORES_FILES})")
    print("\n".join(f"{name:<13}{value}".rstrip() for name, value in lines))
    return ExitStatus.DONE


Line = tuple[str, str]


def _model(location: Location) -> Iterator[Line]:
    config = read_config(location)
    architecture, training = config["architecture"], config["training"]
    calibration = read_calibration(location)
    height, width = architecture["image_size"]
    kernels = architecture["kernel_sizes"]
    yield "model", str(location)
    yield "model_id", config["model_id"]
    if config.get("model_name"):
        yield "name", config["model_name"]
    stages = architecture["cut_after"]
    shown = stages if isinstance(stages, str) else " + ".join(stages)
    yield "backbone", f"{architecture['backbone']}, maps of {shown}"
    # Models of older versions do not say.
    fit, interpolation = architecture.get("fit", "stretch"), architecture.get("interpolation", "bilinear")
    scales = _count(architecture["scales"], "scale")
    if tiling := architecture.get("tiling"):
        fit = f"tiles that share {tiling['overlap']} pixels, of images scaled by {tiling['scale']:g}"
    yield "images", f"{height} x {width} pixels ({fit}, {interpolation}), {scales}"
    if mask := architecture.get("mask"):
        yield "mask", f"{from_text(mask, height, width).mean():.0%} of the pixels are looked at"
    yield (
        "flow",
        f"{_count(len(kernels), 'coupling block')} of {architecture['hidden_channels']} hidden channels",
    )
    of_parts = "" if calibration.weights is None else f" of {_count(calibration.size, 'part')}"
    in_turn = " (in turn)" if config["data"].get("calibration_folds") else ""
    yield (
        "calibration",
        f"{_count(len(calibration.anomaly_score), 'held-out image')}{of_parts}{in_turn}, smallest p-value "
        f"{lowest_rate(calibration.size):g}",
    )
    if "epochs" in training:
        yield "training", f"{_count(training['epochs'], 'epoch')} on {', '.join(training['input'])}"
    yield "written by", ", ".join(f"{name} {number}" for name, number in config["libraries"].items())


def _output(location: Location) -> Iterator[Line]:
    scores, errors = output_files(location, "scores"), output_files(location, "errors")
    models = sorted({file.model_id for file in [*scores, *errors]})
    if not models and not run_ids(location):
        return
    yield "output", str(location)
    yield "models", str(len(models))
    for model_id in models:
        yield "", ""
        yield "model_id", model_id
        yield "scored", _rows([file for file in scores if file.model_id == model_id], SCORES, "image")
        logged = [file for file in errors if file.model_id == model_id]
        yield "errors", _rows(logged, ERRORS, "row") if logged else "none"
    yield "", ""
    yield from _last_run(location)


def _rows(files: Sequence[OutputFile], schema: pa.Schema, unit: str) -> str:
    if not files:
        return f"no {unit}s"
    # Counting reads nothing but footers, several at a time.
    rows = dataset(files, schema).count_rows()
    dates = sorted({file.date for file in files})
    when = str(dates[0]) if len(dates) == 1 else f"{len(dates)} dates, {dates[0]} to {dates[-1]}"
    return f"{_count(rows, unit)} in {_count(len(files), 'file')}; {when}"


def _last_run(location: Location) -> Iterator[Line]:
    runs = run_ids(location)
    if not runs:
        return
    yield "last run", runs[-1]
    record = read_record(location, runs[-1])
    if record is None:
        yield "", "has no record: it is at work or was cut off; the same command continues"
        if progress := read_progress(location, runs[-1]):
            shards = f", {progress.done:,} of {progress.of:,} shards" if progress.of else ""
            yield "progress", f"{progress.step}{shards}, last at {progress.updated_at.isoformat()[:19]}Z"
        return
    counts, ended_at = record.counts, record.ended_at.isoformat()
    yield "status", f"{record.status} (exit status {record.exit_status}), ended {ended_at[:19]}Z"
    yield (
        "counts",
        f"{counts.listed:,} listed, {counts.scored_in_this_run:,} scored by this run, "
        f"{counts.permanent_errors:,} permanent errors, {counts.missing:,} missing",
    )
    for one in record.by_model():
        for sentence in one.drift_in_words():
            yield "drift", f"{f'{one.model.label}: ' if record.model is None else ''}{sentence}"


def _count(number: int, unit: str) -> str:
    return f"{number:,} {unit}{'s' * (number != 1)}"
