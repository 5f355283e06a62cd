"""The training job: lists normal images, extracts their features once, trains, writes a model directory."""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from csflow import duration
from csflow.cluster import connect, described, run_task, share_out
from csflow.console import Progress, say, warn
from csflow.errors import ExitStatus, Failed, WrongUse
from csflow.heldout import score_heldout
from csflow.inputs.exclusion import read_exclusion
from csflow.inputs.listing import LISTING, list_table
from csflow.inputs.range_use import RangeUse
from csflow.inputs.selection import Selection
from csflow.inputs.unlisted import Unlisted, in_words
from csflow.interest import from_text
from csflow.model import BackboneError, Detector, load_weights
from csflow.model.whitening import one_thread
from csflow.model_directory import Calibration, check_free, holds_model, save_model, worker_bytes
from csflow.preflight import describe_images, some_sizes
from csflow.storage import Location
from csflow.training.advice import advice, calibration_warning, stretch_warning
from csflow.training.cache import FeatureCache, find_images
from csflow.training.card import model_card
from csflow.training.closing import CALIBRATED
from csflow.training.config import AUTO, TrainConfig, check_calibration
from csflow.training.features import extract
from csflow.training.labelled import LabelledImages
from csflow.training.mask import mask_for, read_mask
from csflow.training.outliers import ClosedForm, outlier_files, trimmed_images
from csflow.training.parts import by_uri, divided, pattern_of, with_own_calibration, with_tags
from csflow.training.plant import train_by_routes
from csflow.training.resumption import check_replacement
from csflow.training.rounding import ALL_THE_SAME, TOO_ALIKE, moves_p_values, some_pixels
from csflow.training.run import Run
from csflow.training.shards import listing_fingerprint
from csflow.training.split import (
    FOLDS,
    TRIMMED,
    TrainingData,
    check_enough,
    check_shares,
    count_units,
    split_sizes,
    unit_of,
)
from csflow.training.variation import Varying, find_varying
from csflow.weights import KNOWN_PACKAGE, find_weights

LINES_SHOWN = 10
"""Largest number of images that are named when they are left out; often all are damaged in the same way."""


def train(config: TrainConfig) -> ExitStatus:
    """Runs the job. Raises WrongUse before any cluster work starts if a setting or input is wrong."""
    if config.routes is not None:
        return train_by_routes(config, _list_images, _train)
    return _train(config)


def _train(config: TrainConfig, listed: pa.Table | None = None) -> ExitStatus:
    """Trains one model, on images that are listed already, or on those of `--input`."""
    output = Location(config.output, config.storage_options)
    check_free(output, config.overwrite or config.resume)
    replaces_unasked = config.resume and not config.overwrite and holds_model(output)
    if config.min_workers is not None and config.min_workers > config.workers:
        raise WrongUse(f"--min_workers {config.min_workers} is more than --workers {config.workers}")
    check_calibration(config)
    check_shares(config.validation, config.holdout)
    pattern = pattern_of(config.tags, config.part, config.calibrate_by) if listed is None else None
    output.check_writable()
    named_mask = read_mask(config)
    detector = build_detector(config)
    images = _list_images(config) if listed is None else listed
    check_enough(images.num_rows)
    if pattern:
        images = with_tags(images, pattern.tags, config.part, config.calibrate_by)
    config = config.with_calibration(count_units(images))
    is_cross = config.calibration == "cross"
    sizes = some_sizes(images, config.storage_options)
    mask = mask_for(named_mask, sizes) if named_mask else None
    _say_what_is_to_come(config, images, sizes, detector)
    labelled = LabelledImages.read(config, images)
    varying = _find_varying(config, images, detector)
    detector = _looking_at(detector, varying.text if varying else mask and mask.text)
    work_dir = Location(config.work_dir, config.storage_options) if config.work_dir else output / "_work"
    cache = FeatureCache.of(work_dir / "features", detector, config.limits, config.tiles_per_image)
    if replaces_unasked:
        check_replacement(output, config, detector, images, cache, work_dir)

    connect()
    if expected := _expected_duration(config, detector, images.num_rows):
        say(expected)
    all_images = pa.concat_tables([images.select(LISTING.names), labelled.listed]) if labelled else images
    all_cached = _extract_features(all_images, detector, cache, config)
    if all_cached is None:
        return ExitStatus.INCOMPLETE
    cached = find_images(images, all_cached)[0]
    if mask:
        mask.check_shapes(cached)
    warning = stretch_warning(cached, detector.architecture.preprocessing)
    if warning:
        print(warning)
    data = divided(cached, images, config)
    say(data.summary())
    closed_form = ClosedForm(work_dir / "splits", cache, data.subset("training"), config.trim)
    say("fitting a Gaussian to each position, to tell what is usual there")
    ranking = closed_form.fit(config.resume)
    data = _trim(data, ranking, config.trim)
    _measure_rounding(detector, data, config)
    gaussians = closed_form.gaussians if detector.architecture.whitening else None
    run = Run(config, detector.architecture, cache, data, work_dir, gaussians)
    say(f"training the flow with {described(share_out(config.workers, device=config.device))}")
    result = run.fit()
    detector.load_state_dict(detector.state_dict() | result.state)
    losses = result.validation_loss, result.gaussian_loss
    lines = advice(result.history, *losses, run.epochs, run.recommended_epochs, config.learning_rate)
    calibration = (
        _calibrated_on_whole_images(detector, data.subset("heldout"), config)
        if detector.architecture.tiling
        else result.calibration
    )
    if varying and varying.text is None:
        lines.append(f"warning: {varying.line}")
    if np.ptp(calibration["anomaly_score"].to_numpy()) == 0 and calibration.num_rows > 1:
        lines.append(ALL_THE_SAME)
    if moves_p_values(detector, data.calibrating, calibration, config.storage_options, config.limits):
        detector.architecture = replace(detector.architecture, precision="float32")
        lines.append(TOO_ALIKE)
    # Copies and damaged images are left out by now, so that it may be worse than the listing promised.
    different, heldout = count_units(data.split), count_units(data.calibrating)
    if few := calibration_warning(
        different, heldout, config.holdout, config.validation, is_cross, unit_of(images)
    ):
        lines.append(f"warning: {few}")
    calibration = _of_images(calibration, data, images)
    if "group" in calibration.schema.names:
        calibration, line = with_own_calibration(calibration)
        lines.append(line)
    for line in lines:
        print(line)
    metrics = {
        "history": result.history,
        "best_epoch": result.best_epoch,
        "heldout_loss": result.heldout_loss,
        "validation_loss": result.validation_loss,
        "gaussian_loss": result.gaussian_loss,
        "warnings": [warning, *lines] if warning else lines,
        "evaluation": labelled.measure(detector, cache, all_cached, data, config.device)
        if labelled
        else None,
    }
    # The model says how many epochs the recipe allowed.
    config = config.model_copy(update={"epochs": run.epochs})
    model_id = _save(config, output, detector, data, images, calibration, metrics, ranking)
    print(f"model {model_id} written to {output}")
    return ExitStatus.DONE


def _list_images(config: TrainConfig) -> pa.Table:
    """The images to learn from.

    Raises:
        WrongUse: `--exclude` is wrong or leaves none.
        StorageFailed: a part of the input cannot be listed.
    """
    exclusion = read_exclusion(config.exclude, config.storage_options)
    unlisted = Unlisted(exclusion.leaves_out)
    selection = Selection.of(config)
    listed = list_table(config.input, config.storage_options, selection, unlisted)
    for line in unlisted.lines():
        warn(line)
    unlisted.check()
    say(f"{listed.num_rows} images listed")
    if unlisted.skipped:
        say(f"skipped: {in_words(unlisted.skipped)}")
    if not config.exclude:
        return listed
    for line in exclusion.warnings(listed):
        warn(line)
    images = exclusion.leave_out(listed)
    say(f"{listed.num_rows - images.num_rows} images left out by --exclude")
    if not images.num_rows:
        raise WrongUse(f"--exclude leaves none of the {listed.num_rows} images of --input to learn from")
    return images


def _say_what_is_to_come(
    config: TrainConfig, images: pa.Table, sizes: Sequence[tuple[int, int]], detector: Detector
) -> None:
    """Describes images and calibration. Raises WrongUse if the shares leave a part with too few images.

    Args:
        sizes: height and width of some of the images.
    """
    is_cross = config.calibration == "cross"
    count, unit = count_units(images), unit_of(images)
    heldout = count
    if not is_cross:
        *_, heldout = split_sizes(count, config.validation, config.holdout, unit=unit)
    _, *map_shape = detector.feature_shapes[0]
    preprocessing = detector.architecture.preprocessing
    say(describe_images(images.num_rows, sizes, preprocessing, map_shape))
    if is_cross:
        say(
            f"--calibration cross: the model is trained on all {images.num_rows} images, and each is held "
            f"out in turn from one of {FOLDS} further trainings"
        )
    if unit == "parts":
        say(f"{count} parts by --part {' '.join(config.part)}: the photographs of each stay together")
    if warning := calibration_warning(count, heldout, config.holdout, config.validation, is_cross, unit):
        warn(warning)


def _expected_duration(config: TrainConfig, detector: Detector, images: int) -> str | None:
    """Where the training runs and for how long; None if only its own rate can tell."""
    resources = share_out(config.workers, device=config.device)
    architecture = detector.architecture
    if resources.gpus or config.augment or not duration.is_measured(architecture.to_json()):
        return None
    is_cross = config.calibration == "cross"
    training = images if is_cross else split_sizes(images, config.validation, config.holdout)[0]
    shown = training * (config.epochs or config.recommended_epochs(training)) * (FOLDS if is_cross else 1)
    cpus = resources.workers * resources.cpus
    seconds = duration.training_seconds(architecture.image_size, images, shown, cpus)
    return f"{described(resources)}, no GPU: {duration.in_words(seconds)}"


def build_detector(config: TrainConfig) -> Detector:
    """A detector with the backbone's weights and an untrained flow. Raises WrongUse if a setting is wrong."""
    try:
        detector = Detector(config.architecture())
        load_weights(detector.backbone, find_weights(config.weights, config.backbone, config.storage_options))
    except BackboneError as error:
        is_default = error.setting == "weights" and config.weights == KNOWN_PACKAGE
        own = f" (--weights timm downloads those of {config.backbone})" if is_default else ""
        raise WrongUse(f"--{error.setting}: {error}{own}") from None
    except ValueError as error:
        raise WrongUse(str(error)) from None
    # Images are resized as for the backbone's own training, which is known when it is built.
    detector.architecture = replace(detector.architecture, interpolation=detector.backbone.interpolation)
    return detector


def _find_varying(config: TrainConfig, images: pa.Table, detector: Detector) -> Varying | None:
    """The region of `--mask auto`, which it says; None with other settings."""
    if config.mask != AUTO:
        return None
    say("--mask auto: looking where the photographs vary")
    varying = find_varying(images, detector.architecture.preprocessing, config.storage_options, config.limits)
    (warn if varying.text is None else say)(varying.line)
    return varying


def _looking_at(detector: Detector, mask: str | None) -> Detector:
    """The detector, untrained as it is, with the region of interest in this text."""
    if mask is None:
        return detector
    masked = Detector(replace(detector.architecture, mask=mask), detector.feature_shapes)
    masked.backbone.load_state_dict(detector.backbone.state_dict())
    return masked


def _extract_features(
    images: pa.Table, detector: Detector, cache: FeatureCache, config: TrainConfig
) -> pa.Table | None:
    """Fills the feature cache; returns the images' rows of its index, or None if it is not complete."""
    started = time.monotonic()
    missing = find_images(images, cache.index())[1]
    extracted, failed_for_now, range_use = 0, [], RangeUse()
    resources = share_out(None, worker_bytes(detector.state_dict()), config.device, config.decode)
    if missing.num_rows:
        say(f"extracting features of {missing.num_rows} images with {described(resources)}")
    with closing(Progress(missing.num_rows, "images")) as progress:
        for row in extract(missing, detector, cache, resources):
            extracted += row["images"]
            progress.work_began(row["began_at"])
            failed_for_now += row["failed_for_now"]
            range_use.add(row["deep"], row["range_used"])
            progress.update(extracted, f"{extracted / progress.seconds:.1f} images/s")
    if line := range_use.warning(are_all=True):
        warn(line)
    cached, still_missing = find_images(images, cache.index())
    seconds = time.monotonic() - started
    say(
        f"features: {extracted} images extracted in {seconds:.0f} s, "
        f"{images.num_rows - missing.num_rows} in the cache"
    )
    unreadable = cached.filter(pc.is_valid(pc.field("error_message")))
    uris, messages = (unreadable[name].to_pylist() for name in ("image_uri", "error_message"))
    _print_some("left out", [f"{uri}: {message}" for uri, message in zip(uris, messages, strict=True)])
    _print_some("not read", failed_for_now)
    if unreadable.num_rows == images.num_rows:
        raise WrongUse(f"--input: none of the {images.num_rows} images can be read; see why above")
    if still_missing.num_rows:
        print(
            f"INCOMPLETE: {still_missing.num_rows} images could not be read this time; "
            "the same command tries them again"
        )
        return None
    return cached


def _print_some(what: str, images: list[str]) -> None:
    """Prints a line for each of the first images, and how many more there are."""
    for image in images[:LINES_SHOWN]:
        print(f"{what}: {image}")
    if len(images) > LINES_SHOWN:
        print(f"{what}: {len(images) - LINES_SHOWN} more, {len(images)} in all")


def _trim(data: TrainingData, ranking: pa.Table, share: float) -> TrainingData:
    """The data without the training images that are least like the others; prints how many those are."""
    trimmed = trimmed_images(ranking, share)
    if trimmed:
        say(f"{len(trimmed)} training images left out by --trim, the least like the others")
    return data.trimmed(trimmed)


def _measure_rounding(detector: Detector, data: TrainingData, config: TrainConfig) -> None:
    """Measures what scoring in bfloat16 corrects. If no image can be read, there is no correction."""
    pixels = some_pixels(detector, data.subset("training"), config.storage_options, config.limits)
    if pixels:
        # With as many threads as this process happens to have, sums would differ by roundings, and the same
        # training would give a model of another id elsewhere.
        with one_thread():
            detector.measure_rounding(torch.from_numpy(np.stack(list(pixels.values()))))


def _calibrated_on_whole_images(detector: Detector, heldout: pa.Table, config: TrainConfig) -> pa.Table:
    """The columns `closing.CALIBRATED` over the held-out images, each joined from its tiles.

    Raises:
        Failed: an image can no longer be read.
    """
    resources = share_out(1, device=config.device)
    say(f"scoring {heldout.num_rows} held-out images, tile by tile")
    table, failed = run_task(
        score_heldout,
        detector,
        heldout,
        config.storage_options,
        config.limits,
        resources=resources,
    )
    for image in failed:
        raise Failed(
            f"held-out image {image.image_uri} can no longer be read ({image.content}); the same command "
            "with --resume tries again"
        )
    return table.select(CALIBRATED)


def _of_images(calibration: pa.Table, data: TrainingData, images: pa.Table) -> pa.Table:
    """The columns over the held-out images with these images, their parts and groups."""
    heldout = data.calibrating
    names = ["image_uri", "image_version", *(["part"] if data.has_parts else [])]
    for name in names:
        calibration = calibration.append_column(name, heldout[name])
    if group_of := by_uri(images, "group"):
        groups = [group_of[uri] for uri in heldout["image_uri"].to_pylist()]
        calibration = calibration.append_column("group", pa.array(groups, pa.string()))
    return calibration


def _save(
    config: TrainConfig,
    output: Location,
    detector: Detector,
    data: TrainingData,
    images: pa.Table,
    calibration: pa.Table,
    metrics: dict[str, Any],
    ranking: pa.Table,
) -> str:
    """Writes the model directory; returns the model id."""
    settings = config.model_dump(mode="json", exclude={"storage_options"})
    fingerprints = {
        "images": images.num_rows,
        "fingerprint": listing_fingerprint(images),
        "training_images": data.subset("training").num_rows,
        "trimmed_images": data.subset(TRIMMED).num_rows,
        "validation_images": data.subset("validation").num_rows,
        "heldout_images": calibration.num_rows,
        "calibration_folds": FOLDS if data.is_cross else None,
        "unreadable_images": data.unreadable,
        "copies": data.copies,
    }
    outliers, files = outlier_files(ranking, data.subset(TRIMMED).num_rows, config.storage_options)
    mask = detector.architecture.mask
    mask_HW = from_text(mask, *detector.architecture.image_size) if mask else None
    card = model_card(settings, fingerprints, metrics, Calibration.of(calibration), outliers, mask_HW)
    return save_model(
        output,
        detector,
        calibration,
        name=config.name,
        training=settings,
        data=fingerprints,
        metrics=metrics,
        card=card | files,
    )
