"""Recalibration: the same weights get new held-out images, and so new p-values and thresholds."""

import numpy as np
from pydantic import Field

import csflow
from csflow.calibration import lowest_rate, p_values
from csflow.config import ListingConfig, Locations, Patterns
from csflow.console import warn
from csflow.decode_limits import MAX_PIXELS, DecodeLimits
from csflow.errors import ExitStatus
from csflow.heldout import heldout_calibration
from csflow.model import Architecture
from csflow.model_directory import Calibration, check_free, load_model, read_config, save_model
from csflow.storage import Location
from csflow.training.card import calibration_rows, histogram_svg
from csflow.training.parts import pattern_of, with_own_calibration, with_tags

LOW_P_VALUE = 0.05

CARD = """\
# Recalibrated: {backbone}, {height} × {width} px

The weights are those of model `{model_id}` ({model}), whose card says how it was trained. The
images from which p-values and thresholds come are others; csflow {version} scored them. Both models give an
image the same scores, so the scores of one can be compared with those of the other; their p-values cannot.

![Anomaly scores of the held-out images](calibration.svg)

| | |
|---|---|
| held-out images (calibration) | {images} |
{rows}
"""


class RecalibrateConfig(ListingConfig):
    """Settings of `csflow recalibrate`."""

    model: str
    """Model directory whose weights stay as they are."""
    input: Locations
    """Recent images of good parts, on which the model was not trained: folders, files, archives or
    manifests."""
    output: str
    """Model directory to write; its model_id is a new one."""
    max_pixels: int = Field(MAX_PIXELS, ge=1)
    """Images of more pixels than this are left out as `too_large`."""
    tags: str | None = Field(None, min_length=1)
    """Pattern of image URIs that gives the tags for --part and --calibrate_by, as in training. [default: no
    tags]"""
    part: Patterns = Field([])
    """Tags that together tell which part an image shows. Images of one part count as one in p-values.
    [default: each image shows another part]"""
    calibrate_by: str | None = Field(None, min_length=1)
    """Tag whose values have p-values of their own, as in training. [default: all images are compared with
    all]"""
    overwrite: bool = False
    """Replace a model that --output already holds."""


def recalibrate(config: RecalibrateConfig) -> ExitStatus:
    """Scores the images and saves. Raises WrongUse if a setting is wrong or no image can be read."""
    source, output = (Location(url, config.storage_options) for url in (config.model, config.output))
    pattern = pattern_of(config.tags, config.part, config.calibrate_by)
    check_free(output, config.overwrite)
    output.check_writable()
    old, limits = load_model(source), DecodeLimits(config.max_pixels)
    if old.calibration.weights is not None and not config.part:
        warn("the p-values of this model count parts, and these images will count one each; see --part")
    if old.calibration.groups and not config.calibrate_by:
        warn("this model has p-values by group, and the new one will have none; see --calibrate_by")
    result = heldout_calibration(old.detector, config.input, config, "--input", limits)
    if result is None:
        return ExitStatus.INCOMPLETE
    table, unreadable = result
    if pattern:
        columns = table.drop_columns(["part", "group"])
        table = with_tags(columns, pattern.tags, config.part, config.calibrate_by)
    if config.calibrate_by:
        table, line = with_own_calibration(table)
        print(line)
    calibration = Calibration.of(table)
    model_id = save_model(
        output,
        old.detector,
        table,
        name=old.name,
        training=read_config(source)["training"],
        data={
            "recalibrated_from": old.model_id,
            "calibration_images": table.num_rows,
            "unreadable_images": unreadable,
        },
        metrics={},
        card={
            "README.md": _card(source, old.model_id, old.detector.architecture, calibration).encode(),
            "calibration.svg": histogram_svg(calibration.anomaly_score),
        },
    )
    print(comparison(old.calibration, calibration))
    print(f"model {model_id} written to {output}, with the weights of {old.model_id}")
    return ExitStatus.DONE


def comparison(old: Calibration, new: Calibration) -> str:
    """Lines that say how far the new held-out images are from what the old ones let expect."""
    before, after = old.anomaly_score, new.anomaly_score
    rows = [
        ("held-out images", f"{len(before):,}", f"{len(after):,}"),
        ("median anomaly score", f"{np.median(before):.4f}", f"{np.median(after):.4f}"),
        ("smallest possible p-value", f"{lowest_rate(old.size):g}", f"{lowest_rate(new.size):g}"),
    ]
    if "parts" in (old.unit, new.unit):
        rows.insert(1, ("parts, or images", f"{old.size:,}", f"{new.size:,}"))
    lines = [f"{name:26} {was} before, {now} now" for name, was, now in rows]
    low = (p_values(after, before, old.weights) <= LOW_P_VALUE).mean()
    lines.append(f"{low:.1%} of the new images had a p-value of at most {LOW_P_VALUE} before")
    return "\n".join(lines)


def _card(source: Location, model_id: str, architecture: Architecture, calibration: Calibration) -> str:
    return CARD.format(
        backbone=architecture.backbone,
        height=architecture.image_size[0],
        width=architecture.image_size[1],
        model=source,
        model_id=model_id,
        version=csflow.__version__,
        images=len(calibration.anomaly_score),
        rows=calibration_rows(calibration),
    )
