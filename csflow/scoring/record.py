"""How a run ends: its exit status, its record in `run.json`, and its summary in the terminal."""

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version

import csflow
from csflow.calibration import Drift, flaggable
from csflow.errors import ExitStatus
from csflow.inputs.unlisted import Unlisted, failures_in_words, in_words
from csflow.output.layout import Output
from csflow.output.runs import Counts, RunRecord, ScoredWith
from csflow.process import peak_memory_bytes, process_started_at
from csflow.scoring.config import ScoreConfig
from csflow.scoring.plan import Account
from csflow.scoring.tally import Tally
from csflow.storage import Location

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


def exit_status(account: Account, unlisted: Unlisted, drift: Drift | None, config: ScoreConfig) -> ExitStatus:
    """The exit status of a run, given the content of its output and what of its input is not listed."""
    # Judged on the whole listing: one bad image may be all that is new tonight.
    failed = account.permanent_errors + account.missing
    if unlisted.failed or account.missing or failed > config.max_error_rate * account.listed:
        return ExitStatus.INCOMPLETE
    if config.exit_on_drift and drift and drift.has_drifted:
        return ExitStatus.DRIFT
    return ExitStatus.DONE


def run_record(
    run_id: str,
    status: ExitStatus,
    config: ScoreConfig,
    model: Location,
    output: Output,
    model_name: str | None,
    account: Account,
    unlisted: Unlisted,
    tally: Tally,
    drift: Drift | None,
    clock: Clock,
) -> RunRecord:
    forms = [json.loads(form) for form in sorted(tally.forms)]
    return RunRecord(
        run_id=run_id,
        status=status.name.lower(),
        exit_status=status,
        started_at=clock.started_at,
        ended_at=datetime.now(UTC),
        model=ScoredWith(location=model.url, model_id=output.model_id, model_name=model_name),
        configuration=config.model_dump(mode="json", exclude={"storage_options"}),
        counts=Counts(
            **asdict(account),
            scored_in_this_run=tally.scored,
            anomalous_in_this_run=tally.anomalous,
            errors_in_this_run=dict(tally.error_codes),
            failed_shards_in_this_run=tally.failed_shards,
            not_listed=unlisted.failed,
        ),
        not_listed=unlisted.failures,
        skipped=unlisted.skipped,
        precisions=sorted({form["precision"] for form in forms}),
        forms=forms,
        drift=drift,
        peak_memory_bytes={"driver": peak_memory_bytes(), "worker": tally.peak_worker_bytes},
        images_per_second=round(tally.images / clock.seconds["score"], 3),
        seconds=_rounded(clock.seconds),
        seconds_to_first_image=_seconds_to_first_image(tally),
        seconds_in_workers=_rounded(tally.seconds),
        images_helped=tally.helped,
        cpu_seconds_in_workers=_rounded(tally.cpu_seconds),
        libraries={"csflow": csflow.__version__, "python": platform.python_version()}
        | {name: version(name) for name in LIBRARIES},
    )


def summary(record: RunRecord, output: Output) -> str:
    """A few lines for the terminal."""
    counts, first = record.counts, record.seconds_to_first_image
    before = counts.scored - counts.scored_in_this_run
    codes = ", ".join(f"{code} {n}" for code, n in sorted(counts.errors_in_this_run.items()))
    lines = [
        f"scored    {counts.scored_in_this_run} images, {counts.anomalous_in_this_run} anomalous "
        f"({before} were scored before)",
        f"errors    {codes or 'none'}",
        f"rate      {record.images_per_second:.1f} images/s"
        + (f"; first image scored {first:.0f} s after the start" if first is not None else ""),
    ]
    if record.seconds_in_workers.get("score"):
        lines.append(f"loading   {_where_time_went(record)}")
    if drift := record.drift:
        lines += [f"drift     {drift.words}", f"distance  {_distance(drift)}"]
    for form in record.forms:
        lines += [f"slower    on {form['device']}: {fallback}" for fallback in form["fallbacks"]]
    if record.skipped:
        lines.append(f"skipped   {in_words(record.skipped)}")
    lines.append(f"output    {output.folder('scores')}")
    if counts.not_listed:
        lines.append(f"INCOMPLETE: {failures_in_words(counts.not_listed, record.not_listed)}")
    if counts.missing:
        lines.append(f"INCOMPLETE: {counts.missing} images are missing; the same command continues")
    elif record.exit_status == ExitStatus.INCOMPLETE and not counts.not_listed:
        lines.append(
            f"INCOMPLETE: {counts.permanent_errors} of {counts.listed} images have a permanent error"
        )
    return "\n".join(lines)


def _distance(drift: Drift) -> str:
    """The figures behind the verdict on drift."""
    scores = f"{drift.ks_statistic:.3f} of scores (Kolmogorov-Smirnov, p = {drift.ks_p_value:.2g})"
    if drift.global_ks_statistic is not None:
        scores += f", {drift.global_ks_statistic:.3f} of global scores (p = {drift.global_ks_p_value:.2g})"
    # With fewer held-out images no p-value is so small, and a share of 0 would look like a good night.
    if drift.heldout is not None and flaggable(drift.heldout, 0.0499):
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
