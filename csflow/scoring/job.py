"""The scoring job: freezes a listing, plans and scores what is left, and accounts for every image."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import pyarrow as pa

from csflow.calibration import Drift, drift, lowest_rate, why_none_is_flagged
from csflow.cluster import (
    SHARD_RETRIES,
    WorkerResources,
    connect,
    described,
    has_room,
    map_shards,
    share_out,
    with_timeout,
)
from csflow.console import Progress, say, warn
from csflow.decode_limits import DecodeLimits
from csflow.duration import in_words, is_measured, scoring_seconds
from csflow.errors import ExitStatus, WrongUse
from csflow.inputs.listing import list_images
from csflow.inputs.selection import Selection
from csflow.inputs.unlisted import Unlisted
from csflow.model_directory import Calibration, ModelFiles, read_model
from csflow.output.layout import COMPACTED, Output, new_run_id
from csflow.output.runs import RunRecord
from csflow.preflight import describe_images, spread
from csflow.promotion import resolve
from csflow.scoring.actor import ScoringActor, calls_per_scorer
from csflow.scoring.config import ScoreConfig, ScoringSettings
from csflow.scoring.frozen_listing import Listing
from csflow.scoring.heartbeat import Heartbeat
from csflow.scoring.outcomes import OutcomeReader
from csflow.scoring.plan import account, make_plan
from csflow.scoring.plan_log import MAX_SHARD_SIZE, SHARD_SIZE_WITH_TILES, SHARD_STEP, PlannedShard
from csflow.scoring.record import Clock, exit_status, run_record, summary
from csflow.scoring.stopping import StopRules
from csflow.scoring.tally import LiveMetrics, Tally
from csflow.storage import Location
from csflow.uri_patterns import UriPattern


def score(config: ScoreConfig) -> ExitStatus:
    """Runs the job; raises as `run`."""
    return ExitStatus(run(config).exit_status)


def run(config: ScoreConfig) -> RunRecord:
    """Runs the job; returns its record.

    Raises:
        WrongUse: a setting or input is wrong, before any cluster work starts.
    """
    clock = Clock()
    run_id = new_run_id(clock.started_at)
    directory = resolve(Location(config.model, config.storage_options))
    model = read_model(directory)
    output = Output(Location(config.output, config.storage_options), model.model_id)
    if (output.location / COMPACTED).exists():
        raise WrongUse(
            f"--output {output.location} holds compacted scores; choose the output that they are from"
        )
    pattern = None if config.tags is None else UriPattern(config.tags)
    output.location.check_writable(exclusively=True)
    heartbeat = Heartbeat(output.location, run_id, clock.started_at)
    clock.lap("start")
    heartbeat.begin("list")
    selection = Selection.of(config, include=config.include, exclude=config.exclude, since=config.since)
    unlisted = Unlisted(selection.leaves_out)
    found = list_images(config.input, config.storage_options, selection, unlisted)
    folder = output.listing_folder(run_id)
    tags_of = pattern.tags if pattern else None
    listing = Listing.freeze(folder, heartbeat.over(found), config.limit, tags_of)
    if pattern and listing.untagged:
        warn(f"--tags {pattern} does not match {listing.untagged} of {listing.images} images")
    for line in unlisted.lines():
        warn(line)
    clock.lap("list")
    heartbeat.begin("plan")
    outcomes = OutcomeReader(output)
    shard_size = SHARD_SIZE_WITH_TILES if model.preprocessing.tiling else None
    shards = make_plan(listing, outcomes, run_id, config.retry_errors, shard_size)
    clock.lap("plan")
    say(f"run {run_id} with model {model.model_id}" + (f" ({model.name})" if model.name else ""))
    say(f"{listing.images} images listed, {len(shards)} shards to score")
    tally = Tally()
    heartbeat.begin("score", len(shards))
    if shards:
        _say_what_is_to_come(config, model, listing)
        connect()
        resources = share_out(config.workers, model.worker_bytes, config.device, config.decode)
        say(f"scoring with {described(resources)}{_expected_duration(model, shards, listing, resources)}")
        settings = _settings(config, directory, model, output, run_id)
        _score_shards(shards, settings, resources, config, tally, heartbeat)
    if dark := tally.range_use.warning(are_all=True):
        warn(dark)
    clock.lap("score")
    heartbeat.begin("account")
    accounted = account(listing, outcomes)
    clock.lap("account")
    drifted = _drift(tally, model.calibration)
    status = exit_status(accounted, unlisted, drifted, config)
    record = run_record(
        run_id, status, config, directory, output, model.name, accounted, unlisted, tally, drifted, clock
    )
    record.write(output.location)
    print(summary(record, output))
    return record


def _settings(
    config: ScoreConfig, directory: Location, model: ModelFiles, output: Output, run_id: str
) -> ScoringSettings:
    return ScoringSettings(
        model=directory,
        output=output,
        run_id=run_id,
        keep_maps=config.maps == "native",
        false_positive_rate=config.false_positive_rate,
        false_regions=config.false_regions,
        batch_size=config.batch_size,
        precision=config.precision,
        limits=DecodeLimits(config.max_pixels, is_strict=config.strict),
        is_tiled=model.preprocessing.tiling is not None,
    )


def _say_what_is_to_come(config: ScoreConfig, model: ModelFiles, listing: Listing) -> None:
    """Describes the images, and warns if none of them can be flagged."""
    first = pa.Table.from_batches(islice(listing.batches(), 1))
    _, *map_shape = model.feature_shapes[0]
    say(
        describe_images(listing.images, spread(first), model.preprocessing, map_shape, config.storage_options)
    )
    heldout = len(model.calibration.anomaly_score)
    if why := why_none_is_flagged(heldout, config.false_positive_rate):
        warn(f"{why}; --false_positive_rate {lowest_rate(heldout):g} can, or a model trained on more images")


def _expected_duration(
    model: ModelFiles, shards: Sequence[PlannedShard], listing: Listing, resources: WorkerResources
) -> str:
    """For how long the shards are scored; nothing if only the run's own rate can tell."""
    if resources.gpus or not is_measured(model.architecture):
        return ""
    # What a shard holds is not read for this.
    counts = [min(listing.images, len(shards) * size) for size in (SHARD_STEP, MAX_SHARD_SIZE)]
    size, cpus = model.preprocessing.image_size, resources.workers * resources.cpus
    return f", no GPU: {in_words(*(scoring_seconds(size, images, cpus) for images in counts))}"


def _drift(tally: Tally, calibration: Calibration) -> Drift | None:
    """How the scores of this run differ from those of the held-out images."""
    anomaly_scores, global_scores = zip(*tally.sample, strict=True) if tally.sample else ((), ())
    low_share = tally.p_values_below_5_percent / max(1, tally.scored)
    # Without whitening there is but one score.
    heldout = None if calibration.local_score is None else calibration.global_score
    both = None if heldout is None else (global_scores, heldout)
    return drift(anomaly_scores, low_share, calibration.anomaly_score, both)


def _score_shards(
    shards: list[PlannedShard],
    settings: ScoringSettings,
    resources: WorkerResources,
    config: ScoreConfig,
    tally: Tally,
    heartbeat: Heartbeat,
) -> None:
    """Scores the shards; then those again that were lost with their workers: once as before, since a node may
    have gone, and then image by image in a child process, since an image may take its process down."""

    def score(
        some: Sequence[PlannedShard],
        settings: ScoringSettings,
        calls: int = 1,
        retries: int = SHARD_RETRIES,
        awaited: WorkerResources | None = None,
    ) -> bool:
        work = [shard.to_row() for shard in some]
        rows = map_shards(work, ScoringActor, [settings, resources], resources, calls, retries)
        return _follow(heartbeat.over(rows), len(shards), tally, settings.output.model_id, config, awaited)

    def lost() -> list[PlannedShard]:
        return [shard for shard in shards if shard.name not in tally.shards]

    calls = calls_per_scorer(resources, settings.is_tiled)
    is_to_go_on = score(shards, settings, calls, awaited=None if has_room(resources) else resources)
    if is_to_go_on and (again := lost()):
        warn(f"{len(again)} shards were lost with their workers; they are tried again")
        is_to_go_on = score(again, settings, retries=0)
    if is_to_go_on and (again := lost()):
        warn(f"{len(again)} shards took their workers down again; their images are now tried one by one")
        score(again, replace(settings, is_isolated=True))


def _follow(
    rows: Iterator[dict[str, Any]],
    shards: int,
    tally: Tally,
    model_id: str,
    config: ScoreConfig,
    awaited: WorkerResources | None = None,
) -> bool:
    """Counts results as they arrive, shows progress; returns whether all arrived. Raises as `StopRules`.

    Args:
        awaited: what the first worker is to have, if the cluster has no room for it yet.
    """
    metrics, rules = LiveMetrics(model_id), StopRules(shards, config.max_error_rate)
    progress = Progress(shards, "shards")
    try:
        for row in with_timeout(rows, config.stall_timeout, config.start_timeout if awaited else None):
            tally.add(row)
            if row["began_at"]:
                progress.work_began(row["began_at"])
            metrics.add(row)
            if line := tally.range_use.warning():
                warn(line)
            if row["failure"]:
                warn(f"shard {row['shard']} failed: {row['failure']}")
            if reason := rules.reason(tally, row["failure"]):
                warn(f"stopped: {reason}")
                return False
            rate = tally.images / progress.seconds
            progress.update(
                len(tally.shards), f"{tally.scored} scored  {tally.errors} errors  {rate:.1f} images/s"
            )
    except TimeoutError:
        waiting = shards - len(tally.shards)
        if awaited and not tally.shards:
            warn(
                f"no worker came within {config.start_timeout:.0f} s: the cluster had no node with "
                f"{awaited.cpus} CPUs and {awaited.gpus} GPUs; `ray status` shows what its autoscaler does"
            )
        else:
            warn(
                f"stalled: no shard finished for {config.stall_timeout:.0f} s, {waiting} are still waited for"
            )
        return False
    finally:
        progress.close()
    return True
