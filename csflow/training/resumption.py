"""Tells whether `--resume` may replace a model: it has to continue a training, or be the model's own."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from csflow.errors import WrongUse
from csflow.model import Detector
from csflow.model_directory import format_version, read_config
from csflow.preprocessing import DECODING_VERSION
from csflow.storage import Location
from csflow.training.cache import FeatureCache, find_images
from csflow.training.config import AUTO, TrainConfig
from csflow.training.loop import LoopSettings
from csflow.training.outliers import ClosedForm, trimmed_images
from csflow.training.parts import divided
from csflow.training.run import Run
from csflow.training.shards import listing_fingerprint


def check_replacement(
    output: Location,
    config: TrainConfig,
    detector: Detector,
    images: pa.Table,
    cache: FeatureCache,
    work_dir: Location,
) -> None:
    """Proves that this training may replace the model in `output`; reads files only.

    Args:
        images: the input, in the `LISTING` schema, and the part that each shows if parts are known.

    Raises:
        WrongUse: the model is of another training, and this one has no checkpoint yet.
    """
    stored = read_config(output)
    if repeats(stored, config, listing_fingerprint(images), detector.architecture.mask):
        return
    if not has_checkpoint(config, detector, images, cache, work_dir):
        raise WrongUse(
            f"--output {output} holds the model of another training, and {work_dir} has no checkpoint of "
            "this one for --resume to continue; choose another --output, or pass --overwrite"
        )


def repeats(stored: Mapping[str, Any], config: TrainConfig, images: str, mask: str | None) -> bool:
    """Whether the model with this `config.json` is what these settings and images give.

    Args:
        images: the fingerprint of the listed images.
        mask: the text of the model's mask; `AUTO` if it follows from the images.
    """
    try:
        earlier = TrainConfig.model_validate(stored["training"])
        data, decoding = stored["data"], stored["preprocessing"]["decoding_version"]
        training_images, stored_images = data["training_images"], data["fingerprint"]
        stored_mask = stored["architecture"].get("mask")
        if mask == AUTO and earlier.mask == AUTO:
            mask = stored_mask
    except (ValueError, KeyError):  # imported, or of a csflow with other settings
        return False
    one, other = (
        (
            LoopSettings.of(settings, training_images),
            *(settings.weights, settings.augment, settings.trim, settings.holdout, settings.validation),
            settings.calibration == "cross",  # models of older versions do not say, and had no other
        )
        for settings in (earlier, config)
    )
    found = (stored_images, stored_mask, stored["format_version"], decoding)
    expected = (images, mask, format_version(config.tile is not None, mask is not None), DECODING_VERSION)
    return one == other and found == expected


def has_checkpoint(
    config: TrainConfig, detector: Detector, images: pa.Table, cache: FeatureCache, work_dir: Location
) -> bool:
    """Whether this very training has been here before and left a checkpoint."""
    cached, missing = find_images(images, cache.index())
    if missing.num_rows:
        return False  # a training begins when all images are in the cache
    data = divided(cached, images, config)
    if config.trim:
        ranking = ClosedForm(work_dir / "splits", cache, data.subset("training"), config.trim).found()
        if ranking is None:
            return False
        data = data.trimmed(trimmed_images(ranking, config.trim))
    return Run(config, detector.architecture, cache, data, work_dir, None).has_checkpoint()
