"""The scoring job: freezes a listing, plans and scores what is left, and accounts for every image."""

from itertools import islice

import pyarrow as pa

from csflow.calibration import lowest_rate, why_none_is_flagged
from csflow.cluster import WorkerResources, connect, described, share_out, spilled_bytes
from csflow.console import say, warn
from csflow.decode_limits import DecodeLimits
from csflow.duration import in_words, is_measured, scoring_seconds
from csflow.errors import ExitStatus, WrongUse
from csflow.inputs.listing import list_images
from csflow.inputs.selection import Selection
from csflow.inputs.unlisted import Unlisted
from csflow.output.layout import COMPACTED, Output, new_run_id
from csflow.output.runs import RunRecord
from csflow.preflight import describe_images, some_sizes
from csflow.scoring.config import ScoreConfig, ScoringSettings
from csflow.scoring.grouping import worker_bytes
from csflow.scoring.heartbeat import Heartbeat
from csflow.scoring.models import Models
from csflow.scoring.plan import account, make_plan
from csflow.scoring.plan_log import MAX_SHARD_SIZE, SHARD_SIZE_WITH_TILES, SHARD_STEP
from csflow.scoring.pool import ScoringPool
from csflow.scoring.record import Clock, run_record, summary
from csflow.scoring.tally import Sample, Tally
from csflow.storage import Location


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
    output = Location(config.output, config.storage_options)
    models = Models.find(config)
    for broken in models.broken:
        warn(broken.line())
    if any(one.directory.url == output.url for one in models.runs):
        raise WrongUse(f"--output {output} is the model directory; choose another folder for the scores")
    output.check_writable(exclusively=True)
    if (output / COMPACTED).exists():
        raise WrongUse(f"--output {output} holds compacted scores; choose the output that they are from")
    heartbeat = Heartbeat(output, run_id, clock.started_at)
    clock.lap("start")
    heartbeat.begin("list")
    selection = Selection.of(config, include=config.include, exclude=config.exclude, since=config.since)
    unlisted = Unlisted(selection.leaves_out)
    found = list_images(config.input, config.storage_options, selection, unlisted)
    try:
        models.freeze(output, run_id, heartbeat.over(found), config.limit)
    except WrongUse:
        heartbeat.forget()
        raise
    for line in unlisted.lines():
        warn(line)
    clock.lap("list")
    heartbeat.begin("plan")
    for one in models.runs:
        shard_size = SHARD_SIZE_WITH_TILES if one.is_tiled else None
        one.shards = make_plan(one.listing, one.outcomes, run_id, config.retry_errors, shard_size)
    clock.lap("plan")
    shards = [shard for one in models.runs for shard in one.shards]
    _say_what_is_planned(run_id, models)
    tally = Tally(sample=Sample(0))
    heartbeat.begin("score", len(shards))
    if shards:
        _say_what_is_to_come(config, models)
        connect()
        needed = worker_bytes([one.worker_bytes for one in models.runs], config.models_kept)
        resources = share_out(config.workers, needed, config.device, config.decode)
        say(f"scoring with {described(resources)}{_expected_duration(models, resources)}")
        settings = [_settings(config, one.directory, one.output, run_id, one.is_tiled) for one in models.runs]
        tallies = {one.model.model_id: one.tally for one in models.runs}
        spilled_before = spilled_bytes()
        ScoringPool(config, settings, shards, resources, tally, tallies, heartbeat).score()
        tally.spilled_bytes = max(0, spilled_bytes() - spilled_before)
    if dark := tally.range_use.warning(are_all=True):
        warn(dark)
    clock.lap("score")
    heartbeat.begin("account")
    for one in models.runs:
        one.account = account(one.listing, one.outcomes)
    clock.lap("account")
    record = run_record(run_id, config, models, unlisted, tally, clock)
    record.write(output)
    print(summary(record, output))
    return record


def _settings(
    config: ScoreConfig, model: Location, output: Output, run_id: str, is_tiled: bool
) -> ScoringSettings:
    return ScoringSettings(
        model=model,
        output=output,
        run_id=run_id,
        keep_maps=config.maps == "native",
        false_positive_rate=config.false_positive_rate,
        false_regions=config.false_regions,
        batch_size=config.batch_size,
        precision=config.precision,
        limits=DecodeLimits(config.max_pixels, is_strict=config.strict),
        is_tiled=is_tiled,
    )


def _say_what_is_planned(run_id: str, models: Models) -> None:
    if models.routes is None:
        (one,) = models.runs
        say(f"run {run_id} with model {one.label}")
        say(f"{one.listing.images} images listed, {len(one.shards)} shards to score")
        if models.tags and one.listing.untagged:
            warn(f"--tags {models.tags} does not match {one.listing.untagged} of {one.listing.images} images")
        return
    say(f"run {run_id}, models: {len(models.runs)}")
    for one in models.runs:
        say(
            f"{one.label}: {one.listing.images} images listed, {len(one.shards)} shards to score "
            f"(rule {', '.join(one.rules)})"
        )


def _say_what_is_to_come(config: ScoreConfig, models: Models) -> None:
    """Describes the images as the first model with work sees them; warns of models that can flag none."""
    busy = [one for one in models.runs if one.shards]
    first = pa.Table.from_batches(islice(busy[0].listing.batches(), 1))
    model = busy[0].model
    _, *map_shape = model.feature_shapes[0]
    images = sum(one.listing.images for one in busy)
    sizes = some_sizes(first, config.storage_options)
    say(describe_images(images, sizes, model.preprocessing, map_shape))
    for one in busy:
        heldout, unit = one.model.calibration.size, one.model.calibration.unit
        if why := why_none_is_flagged(heldout, config.false_positive_rate, unit):
            whose = f"{one.label}: " if len(models.runs) > 1 else ""
            rate = f"--false_positive_rate {lowest_rate(heldout):g}"
            warn(f"{whose}{why}; {rate} can, or a model trained on more {unit}")


def _expected_duration(models: Models, resources: WorkerResources) -> str:
    """For how long the shards are scored; nothing if only the run's own rate can tell."""
    one, *others = (one for one in models.runs if one.shards)
    if others or resources.gpus or not is_measured(one.model.architecture):
        return ""
    # What a shard holds is not read for this.
    counts = [min(one.listing.images, len(one.shards) * size) for size in (SHARD_STEP, MAX_SHARD_SIZE)]
    size, cpus = one.model.preprocessing.image_size, resources.workers * resources.cpus
    return f", no GPU: {in_words(*(scoring_seconds(size, images, cpus) for images in counts))}"
