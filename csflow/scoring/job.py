"""The scoring job: freezes a listing, plans what is left of it, scores it, and accounts for every image."""

import json
import platform
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Literal

from pydantic import Field

from csflow.calibration import drift
from csflow.cluster import WorkerResources, connect, map_shards, share_out, with_timeout
from csflow.config import JobConfig, Locations
from csflow.device import peak_memory_bytes
from csflow.errors import ExitStatus
from csflow.inputs.listing import list_images
from csflow.model_directory import Model, load_model, worker_bytes
from csflow.scoring.listing import Listing
from csflow.scoring.output import Output
from csflow.scoring.plan import PlannedShard, account, make_plan
from csflow.scoring.shard import ScoringSettings, ShardScorer
from csflow.scoring.tally import LiveMetrics, Tally
from csflow.storage import Location

LIBRARIES = ("csflow", "ray", "torch", "timm", "pyarrow", "pillow", "fsspec", "s3fs")
PROGRESS_SECONDS = 10.0
DRIFT_P_VALUE = 0.001
"""With --exit_on_drift, scores have drifted if the two-sample test's p-value is below this."""
FAILED_SHARDS_TO_STOP = 4
"""A run whose first shards all fail as a whole is stopped."""


class ScoreConfig(JobConfig):
    """Settings of `jobs/score.py`."""

    model: str
    """Model directory, the --output of jobs/train.py."""
    input: Locations
    """Folders, files, globs, archives or manifests of images; one or more."""
    output: str
    """Folder of the scores; many models, inputs and nights may share one."""
    maps: Literal["native", "none"] = "native"
    """Keep anomaly maps in their native resolution, or not at all."""
    false_positive_rate: float = Field(0.01, gt=0, lt=1)
    """Share of normal images that may be flagged: an image is anomalous if its p-value is at most this."""
    limit: int | None = Field(None, ge=1)
    """Take only the first so many images of the listing."""
    retry_errors: bool = False
    """Try images with a permanent error again."""
    max_error_rate: float = Field(0.5, gt=0, le=1)
    """Stop, or end, with exit status 3 when more than this share of the images fails."""
    batch_size: int | None = Field(None, ge=1)
    """Images per forward pass [default: 8 on CPUs, 32 on GPUs]."""
    workers: int | None = Field(None, ge=1)
    """Scoring actors [default: one per GPU, or one per CPU]."""
    stall_timeout: float = Field(1800.0, gt=0)
    """Seconds without a finished shard after which the run ends with exit status 3 instead of hanging."""
    exit_on_drift: bool = False
    """End with exit status 4, in place of 0, when the scores have drifted from calibration."""


def score(config: ScoreConfig) -> ExitStatus:
    """Runs the job. Raises WrongUse before any cluster work starts if a setting or input is wrong."""
    clock = _Clock()
    started_at = datetime.now(UTC)
    run_id = f"{started_at:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
    model_location = Location(config.model, config.storage_options)
    model = load_model(model_location)
    output = Output(Location(config.output, config.storage_options), model.model_id)
    output.location.check_writable()
    run_folder = output.location / "_runs" / run_id
    clock.lap("start")
    found = list_images(config.input, config.storage_options)
    listing = Listing.freeze(run_folder / "listing", found, config.limit)
    clock.lap("list")
    shards = make_plan(listing, output, run_id, config.retry_errors)
    clock.lap("plan")
    print(f"run {run_id} with model {model.model_id}")
    print(f"{listing.images} images listed, {len(shards)} shards to score")
    _warn_if_nothing_can_be_flagged(model, config.false_positive_rate)
    settings = ScoringSettings(
        model=model_location,
        output=output,
        run_id=run_id,
        keep_maps=config.maps == "native",
        false_positive_rate=config.false_positive_rate,
        batch_size=config.batch_size,
    )
    tally = Tally()
    if shards:
        connect()
        resources = share_out(config.workers, worker_bytes(model.detector))
        _score_shards(shards, settings, resources, config, tally)
    clock.lap("score")
    scored, failed, missing = account(listing, output)
    clock.lap("account")
    # Judged on the whole listing: one bad image may be all that is new tonight.
    passes_error_rate = failed + missing > config.max_error_rate * listing.images
    low_share = tally.p_values_below_5_percent / max(1, tally.scored)
    drifted = drift(tally.sample, low_share, model.calibration_scores)
    status = ExitStatus.DONE
    if missing or passes_error_rate:
        status = ExitStatus.INCOMPLETE
    elif config.exit_on_drift and drifted and drifted.ks_p_value < DRIFT_P_VALUE:
        status = ExitStatus.DRIFT
    record = {
        "run_id": run_id,
        "status": status.name.lower(),
        "exit_status": int(status),
        "started_at": started_at.isoformat(),
        "ended_at": datetime.now(UTC).isoformat(),
        "model": {"location": config.model, "model_id": model.model_id},
        "configuration": config.model_dump(mode="json", exclude={"storage_options"}),
        "counts": {
            "listed": listing.images,
            "scored": scored,
            "permanent_errors": failed,
            "missing": missing,
            "scored_in_this_run": tally.scored,
            "anomalous_in_this_run": tally.anomalous,
            "errors_in_this_run": dict(tally.error_codes),
            "failed_shards_in_this_run": tally.failed_shards,
        },
        "drift": asdict(drifted) if drifted else None,
        "peak_memory_bytes": {"driver": peak_memory_bytes(), "worker": tally.peak_worker_bytes},
        "images_per_second": round(tally.images / clock.seconds["score"], 3),
        "seconds": _rounded(clock.seconds),
        "seconds_in_workers": _rounded(tally.seconds),
        "libraries": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
    }
    (run_folder / "run.json").write((json.dumps(record, indent=2) + "\n").encode())
    _print_summary(record, output)
    return status


def _warn_if_nothing_can_be_flagged(model: Model, false_positive_rate: float) -> None:
    heldout = len(model.calibration_scores)
    if 1 / (heldout + 1) > false_positive_rate:
        print(
            f"warning: no image can be flagged at --false_positive_rate {false_positive_rate}: with "
            f"{heldout} held-out images the smallest p-value is {1 / (heldout + 1):.3g}"
        )


def _score_shards(
    shards: list[PlannedShard],
    settings: ScoringSettings,
    resources: WorkerResources,
    config: ScoreConfig,
    tally: Tally,
) -> None:
    """Scores the shards; then those again that took their workers down, image by image in a child process."""
    rows = map_shards([shard.to_row() for shard in shards], ShardScorer, [settings, resources], resources)
    if not _follow(rows, len(shards), tally, settings.output.model_id, config):
        return
    lost = [shard.to_row() for shard in shards if shard.name not in tally.shards]
    if lost:
        print(
            f"{len(lost)} shards took their workers down; their images are now tried one by one", flush=True
        )
        isolated = replace(settings, is_isolated=True)
        rows = map_shards(lost, ShardScorer, [isolated, resources], resources)
        _follow(rows, len(shards), tally, settings.output.model_id, config)


def _follow(
    rows: Iterator[dict[str, Any]], shards: int, tally: Tally, model_id: str, config: ScoreConfig
) -> bool:
    """Counts the results as they come, with a line of progress now and then; returns whether all came.

    Raises:
        RuntimeError: the first shards all failed as a whole; the rest would too.
    """
    metrics = LiveMetrics(model_id)
    started = last_line = time.monotonic()
    try:
        for row in with_timeout(rows, config.stall_timeout):
            tally.add(row)
            metrics.add(row)
            done = len(tally.shards)
            if row["failure"]:
                print(f"shard {row['shard']} failed: {row['failure']}", flush=True)
            if tally.failed_shards == done == min(shards, FAILED_SHARDS_TO_STOP):
                raise RuntimeError(f"the first {done} shards failed, see above; nothing of them was written")
            now = time.monotonic()
            if now - last_line >= PROGRESS_SECONDS:
                last_line = now
                left = (now - started) / done * (shards - done)
                print(
                    f"{done}/{shards} shards  {tally.scored} scored  {tally.errors} errors  "
                    f"{tally.images / (now - started):.1f} images/s  {left:.0f} s left",
                    flush=True,
                )
            if tally.fails_everywhere(config.max_error_rate):
                print(f"stopped: {tally.errors} of {tally.images} images failed: {dict(tally.error_codes)}")
                return False
    except TimeoutError:
        waiting = shards - len(tally.shards)
        print(f"stalled: no shard finished for {config.stall_timeout:.0f} s, {waiting} are still waited for")
        return False
    return True


def _print_summary(record: dict[str, Any], output: Output) -> None:
    counts = record["counts"]
    skipped = counts["scored"] - counts["scored_in_this_run"]
    codes = ", ".join(f"{code} {n}" for code, n in sorted(counts["errors_in_this_run"].items())) or "none"
    drifted = record["drift"]
    drift_line = (
        "no scores"
        if drifted is None
        else (
            f"{drifted['share_below_5_percent']:.1%} of p-values below 0.05; "
            f"distance from calibration {drifted['ks_statistic']:.3f} (p = {drifted['ks_p_value']:.2g})"
        )
    )
    print(
        f"scored    {counts['scored_in_this_run']} images, {counts['anomalous_in_this_run']} anomalous "
        f"({skipped} were scored before)\n"
        f"errors    {codes}\n"
        f"rate      {record['images_per_second']:.1f} images/s\n"
        f"drift     {drift_line}\n"
        f"output    {output.folder('scores')}"
    )
    if counts["missing"]:
        print(f"INCOMPLETE: {counts['missing']} images are missing; the same command continues")
    elif record["exit_status"] == ExitStatus.INCOMPLETE:
        print(f"INCOMPLETE: {counts['permanent_errors']} of {counts['listed']} images have a permanent error")


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()}


class _Clock:
    """Seconds by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = now - self._last
        self._last = now
