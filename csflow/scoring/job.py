"""The scoring job: freezes a listing, plans what is left of it, scores it, and accounts for every image."""

import json
import platform
import secrets
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Literal

from pydantic import Field

from csflow.cluster import connect, map_shards, share_out
from csflow.config import JobConfig, Locations
from csflow.errors import ExitStatus
from csflow.inputs.listing import list_images
from csflow.model_directory import Model, load_model, worker_bytes
from csflow.scoring.listing import Listing
from csflow.scoring.output import Output
from csflow.scoring.plan import account, make_plan
from csflow.scoring.shard import ScoringSettings, ShardScorer
from csflow.storage import Location

LIBRARIES = ("csflow", "ray", "torch", "timm", "pyarrow", "pillow", "fsspec", "s3fs")
PROGRESS_SECONDS = 10.0
ERROR_RATE_MINIMUM_IMAGES = 100
"""A run is not stopped for its error rate before so many images are through."""
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


@dataclass
class Tally:
    """What has happened in this run so far."""

    images: int = 0
    scored: int = 0
    anomalous: int = 0
    error_codes: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By stage; read and decode are summed over threads."""

    failed_shards: int = 0
    """Shards that failed as a whole, for no fault of an image."""

    def add(self, row: dict[str, Any]) -> None:
        self.failed_shards += bool(row["failure"])
        if not row["is_published"]:
            return
        self.images += row["images"]
        self.scored += row["scored"]
        self.anomalous += row["anomalous"]
        self.error_codes.update(dict(row["error_codes"]))
        for stage, seconds in row["seconds"]:
            self.seconds[stage] += seconds

    @property
    def errors(self) -> int:
        return self.error_codes.total()

    def fails_everywhere(self, max_error_rate: float) -> bool:
        """Whether going on is useless: more than this share failed of enough images."""
        return self.images >= ERROR_RATE_MINIMUM_IMAGES and self.errors > max_error_rate * self.images


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
    tally = Tally()
    if shards:
        connect()
        settings = ScoringSettings(
            model=model_location,
            output=output,
            run_id=run_id,
            keep_maps=config.maps == "native",
            false_positive_rate=config.false_positive_rate,
            batch_size=config.batch_size,
            resources=share_out(config.workers, worker_bytes(model.detector)),
        )
        rows = map_shards([shard.to_row() for shard in shards], ShardScorer, [settings], settings.resources)
        _follow(rows, len(shards), tally, config.max_error_rate)
    clock.lap("score")
    scored, failed, missing = account(listing, output)
    clock.lap("account")
    # Judged on the whole listing: one bad image may be all that is new tonight.
    passes_error_rate = failed + missing > config.max_error_rate * listing.images
    status = ExitStatus.INCOMPLETE if missing or passes_error_rate else ExitStatus.DONE
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


def _follow(rows: Iterator[dict[str, Any]], shards: int, tally: Tally, max_error_rate: float) -> None:
    """Counts the results as they come, with a line of progress now and then.

    Raises:
        RuntimeError: the first shards all failed as a whole; the rest would too.
    """
    started = last_line = time.monotonic()
    for done, row in enumerate(rows, start=1):
        tally.add(row)
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
        if tally.fails_everywhere(max_error_rate):
            print(f"stopped: {tally.errors} of {tally.images} images failed: {dict(tally.error_codes)}")
            return


def _print_summary(record: dict[str, Any], output: Output) -> None:
    counts = record["counts"]
    skipped = counts["scored"] - counts["scored_in_this_run"]
    codes = ", ".join(f"{code} {n}" for code, n in sorted(counts["errors_in_this_run"].items())) or "none"
    print(
        f"scored    {counts['scored_in_this_run']} images, {counts['anomalous_in_this_run']} anomalous "
        f"({skipped} were scored before)\n"
        f"errors    {codes}\n"
        f"rate      {record['images_per_second']:.1f} images/s\n"
        f"output    {output.folder('scores')}"
    )
    if counts["missing"]:
        print(f"INCOMPLETE: {counts['missing']} images are missing; the same command continues")
    elif record["exit_status"]:
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
