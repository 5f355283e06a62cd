"""How a run ends: its exit status, its record in `run.json`, and its summary in the terminal."""

import json
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version

import csflow
from csflow.calibration import Drift, flaggable
from csflow.errors import ExitStatus
from csflow.inputs.unlisted import Unlisted, failures_in_words, in_words
from csflow.output.layout import scores_folder
from csflow.output.runs import Counts, OfModel, RunRecord
from csflow.process import peak_memory_bytes, process_started_at
from csflow.scoring.config import ScoreConfig
from csflow.scoring.models import ModelRun, Models
from csflow.scoring.plan import Account
from csflow.scoring.tally import Tally
from csflow.storage import Location

UNROUTED_NAMED = 10
"""Largest number of images to name that no rule matches."""
LIBRARIES = ("ray", "torch", "timm", "pyarrow", "pillow", "tifffile", "fsspec", "s3fs", "obstore")


@dataclass
class Clock:
    """Start of the run, and seconds by step."""

    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    seconds: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.monotonic)

    def lap(self, step: str) -> None:
        """Ends a step."""
        now = time.monotonic()
        self.seconds[step] = now - self.last
        self.last = now


def exit_status(counts: Counts, has_drifted: bool, config: ScoreConfig) -> ExitStatus:
    """The exit status of a run, given the content of its output and what of its input is not listed."""
    # Judged on the whole listing: one bad image may be all that is new tonight.
    failed = counts.permanent_errors + counts.missing
    is_left = counts.missing or counts.not_listed or (counts.unrouted and config.unrouted == "error")
    if is_left or failed > config.max_error_rate * counts.listed:
        return ExitStatus.INCOMPLETE
    if config.exit_on_drift and has_drifted:
        return ExitStatus.DRIFT
    return ExitStatus.DONE


def run_record(
    run_id: str, config: ScoreConfig, models: Models, unlisted: Unlisted, tally: Tally, clock: Clock
) -> RunRecord:
    of_models = [_of_model(one) for one in models.runs]
    alone = of_models[0] if models.routes is None else None
    unrouted = models.unrouted.images if models.unrouted else 0
    counts = _counts(_account(models), tally, unrouted=unrouted, not_listed=unlisted.failed)
    status = exit_status(counts, any(one.has_drifted for one in of_models), config)
    forms = [json.loads(form) for form in sorted(tally.forms)]
    return RunRecord(
        run_id=run_id,
        status=status.name.lower(),
        exit_status=status,
        started_at=clock.started_at,
        ended_at=datetime.now(UTC),
        model=alone.as_alone()["model"] if alone else None,
        models=of_models,
        not_loaded=_not_loaded(models),
        unrouted=models.unrouted.first_uris(UNROUTED_NAMED) if models.unrouted else [],
        models_loaded=tally.models_loaded,
        configuration=config.model_dump(mode="json", exclude={"storage_options"}),
        counts=counts,
        not_listed=unlisted.failures,
        skipped=unlisted.skipped,
        precisions=sorted({form["precision"] for form in forms}),
        forms=forms,
        drift=alone.drift if alone else None,
        drift_by_group=alone.drift_by_group if alone else {},
        peak_memory_bytes={"driver": peak_memory_bytes(), "worker": tally.peak_worker_bytes},
        images_per_second=round(tally.images / clock.seconds["score"], 3),
        seconds=_rounded(clock.seconds),
        seconds_to_first_image=_seconds_to_first_image(tally),
        seconds_in_workers=_rounded(tally.seconds),
        images_helped=tally.helped,
        spilled_bytes=tally.spilled_bytes,
        cpu_seconds_in_workers=_rounded(tally.cpu_seconds),
        libraries={"csflow": csflow.__version__, "python": platform.python_version()}
        | {name: version(name) for name in LIBRARIES},
    )


def _of_model(one: ModelRun) -> OfModel:
    return OfModel(
        location=one.directory.url,
        model_id=one.model.model_id,
        model_name=one.model.name,
        rules=one.rules,
        counts=_counts(one.account, one.tally),
        drift=one.drift(),
        drift_by_group=one.drift_by_group(),
    )


def _account(models: Models) -> Account:
    """The accounts of all models together. Images of models that cannot be loaded are listed and missing."""
    left = sum(broken.listing.images for broken in models.broken)
    accounts = [*(one.account for one in models.runs), Account(left, 0, 0, left)]
    return Account(*(sum(numbers) for numbers in zip(*map(astuple, accounts), strict=True)))


def _counts(account: Account, tally: Tally, unrouted: int = 0, not_listed: int = 0) -> Counts:
    return Counts(
        **asdict(account),
        scored_in_this_run=tally.scored,
        anomalous_in_this_run=tally.anomalous,
        errors_in_this_run=dict(tally.error_codes),
        failed_shards_in_this_run=tally.failed_shards,
        unrouted=unrouted,
        not_listed=not_listed,
    )


def _not_loaded(models: Models) -> dict[str, str]:
    """Why models cannot be loaded, by their addresses: found out by the driver, or by a worker."""
    by_driver = {str(broken.address): broken.reason for broken in models.broken if broken.listing.images}
    by_worker = {one.directory.url: one.tally.not_loaded for one in models.runs if one.tally.not_loaded}
    return by_driver | by_worker


def summary(record: RunRecord, output: Location) -> str:
    """A few lines for the terminal."""
    counts, first = record.counts, record.seconds_to_first_image
    codes = ", ".join(f"{code} {n}" for code, n in sorted(counts.errors_in_this_run.items()))
    lines = [
        f"scored    {_scored(counts)}",
        f"errors    {codes or 'none'}",
        f"rate      {record.images_per_second:.1f} images/s"
        + (f"; first image scored {first:.0f} s after the start" if first is not None else ""),
    ]
    if record.seconds_in_workers.get("score"):
        lines.append(f"loading   {_where_time_went(record)}")
    if record.spilled_bytes:
        lines.append(
            f"spilled   {record.spilled_bytes / 1e6:.0f} MB went from Ray's object stores to disk and back; "
            "give nodes more --object-store-memory"
        )
    for one in record.by_model():
        of = "" if record.model else f"{one.model.label}: "
        if of:
            lines.append(f"model     {of}{_scored(one.counts)}")
        lines += [f"drift     {of}{sentence}" for sentence in one.drift_in_words()]
        if one.drift:
            lines.append(f"distance  {of}{_distance(one.drift)}")
    for form in record.forms:
        lines += [f"slower    on {form['device']}: {fallback}" for fallback in form["fallbacks"]]
    if record.skipped:
        lines.append(f"skipped   {in_words(record.skipped)}")
    if counts.unrouted:
        lines.append(f"unrouted  {counts.unrouted} images match no rule, such as {record.unrouted[0]}")
    model_id = record.model.model_id if record.model else None
    lines.append(f"output    {scores_folder(output, model_id)}")
    lines += [f"INCOMPLETE: {why}" for why in _why_incomplete(record)]
    return "\n".join(lines)


def _why_incomplete(record: RunRecord) -> Iterator[str]:
    counts = record.counts
    for address, reason in record.not_loaded.items():
        yield f"model {address} cannot be loaded: {reason}"
    if counts.not_listed:
        yield failures_in_words(counts.not_listed, record.not_listed)
    if is_unrouted := counts.unrouted and record.configuration["unrouted"] == "error":
        yield f"{counts.unrouted} images match no rule; add one to --routes, or pass --unrouted ignore"
    if counts.missing:
        yield f"{counts.missing} images are missing; the same command continues"
    elif record.exit_status == ExitStatus.INCOMPLETE and not counts.not_listed and not is_unrouted:
        yield f"{counts.permanent_errors} of {counts.listed} images have a permanent error"


def _scored(counts: Counts) -> str:
    before = counts.scored - counts.scored_in_this_run
    return (
        f"{counts.scored_in_this_run} images, {counts.anomalous_in_this_run} anomalous "
        f"({before} were scored before)"
    )


def _distance(drift: Drift) -> str:
    """The figures behind the verdict on drift."""
    scores = f"{drift.ks_statistic:.3f} of scores (Kolmogorov-Smirnov, p = {drift.ks_p_value:.2g})"
    if drift.global_ks_statistic is not None:
        scores += f", {drift.global_ks_statistic:.3f} of global scores (p = {drift.global_ks_p_value:.2g})"
    # With fewer held-out images no p-value is so small, and a share of 0 would look like a good night.
    if drift.units is not None and flaggable(drift.units, 0.0499):
        scores += f"; {drift.share_below_5_percent:.1%} of p-values are below 0.05"
    return scores


def _where_time_went(record: RunRecord) -> str:
    seconds, counts = record.seconds_in_workers, record.counts
    images = counts.scored_in_this_run + sum(counts.errors_in_this_run.values())
    waited = seconds.get("wait", 0.0) / (seconds.get("wait", 0.0) + seconds["score"])
    where = "beside the model"
    if record.images_helped:
        where = f"{record.images_helped / images:.0%} on other CPUs"
    return f"{where}; the model waited for images {waited:.0%} of the time"


def _seconds_to_first_image(tally: Tally) -> float | None:
    """Seconds from the start of the driver's process to the first scores in a worker."""
    if tally.first_scored_at is None:
        return None
    return round(tally.first_scored_at.timestamp() - process_started_at(), 3)


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()}
