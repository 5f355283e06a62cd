"""Scores held-out normal images, from which a model computes p-values, in this process."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from csflow.config import ListingConfig
from csflow.console import Progress, warn
from csflow.decode_limits import DEFAULT_LIMITS, DecodeLimits
from csflow.errors import ImageError, WrongUse
from csflow.images import DecodedImage
from csflow.inputs.listing import LISTING, list_images
from csflow.inputs.loaded import LoadedImage
from csflow.inputs.loading import ImageLoader, batches
from csflow.inputs.reading import ImageReader
from csflow.inputs.selection import Selection
from csflow.inputs.unlisted import Unlisted
from csflow.model import Architecture, Detector, InferenceDetector, Scores, TiledDetector
from csflow.model_directory import CALIBRATION
from csflow.training.closing import CALIBRATED, calibration_columns

READ_THREADS = 8
BATCH_SIZE = 8
"""Number of images, or of tiles, in a pass."""


def heldout_calibration(
    detector: Detector,
    inputs: Sequence[str],
    config: ListingConfig,
    setting: str,
    limits: DecodeLimits = DEFAULT_LIMITS,
) -> tuple[pa.Table, int] | None:
    """Scores of normal images in the `CALIBRATION` schema, and the number of images that cannot be read.

    Prints the images that are left out, each with its reason. A calibration has only some hundred images, so
    they are scored in this process. If the detector has no rounding shifts yet, it measures them.

    Args:
        inputs: folders, files, archives or manifests of images.
        config: how they are listed and read.
        setting: the flag that names them, for messages.
        limits: of each image.

    Returns:
        None if some images could not be read this time.

    Raises:
        WrongUse: there are no images, or none that can be read.
    """
    unlisted = Unlisted()
    selection = Selection.of(config)
    listed = list_images(inputs, config.storage_options, selection, unlisted)
    images = pa.Table.from_batches(listed, LISTING)
    for line in unlisted.lines():
        warn(line)
    unlisted.check()
    detector.to("cuda" if torch.cuda.is_available() else "cpu")
    with closing(Progress(images.num_rows, "images")) as progress:
        calibration, failed = scored(
            detector,
            images,
            config.storage_options,
            lambda done: progress.update(done, f"{done / progress.seconds:.1f} images/s"),
            limits,
        )
    detector.to("cpu")
    for image in failed:
        print(f"left out: {image.image_uri}: {image.content}")
    if any(isinstance(image.content, ImageError) and image.content.is_transient for image in failed):
        print("INCOMPLETE: some images could not be read this time; the same command tries them again")
        return None
    if not calibration.num_rows:
        raise WrongUse(f"{setting}: none of the images can be read; name readable normal images")
    return calibration, len(failed)


def score_heldout(
    device: torch.device,
    detector: Detector,
    images: pa.Table,
    storage_options: Mapping[str, Any],
    limits: DecodeLimits,
) -> tuple[pa.Table, list[LoadedImage]]:
    """`scored` in a worker of a cluster."""
    return scored(detector.eval().to(device), images, storage_options, limits=limits)


def scored(
    detector: Detector,
    images: pa.Table,
    storage_options: Mapping[str, Any],
    report: Callable[[int], object] = lambda done: None,
    limits: DecodeLimits = DEFAULT_LIMITS,
) -> tuple[pa.Table, list[LoadedImage]]:
    """`score_images` by a detector, on its device."""
    score = _tiled(detector) if detector.architecture.tiling else _whole(detector)
    return score_images(score, detector.architecture, images, storage_options, report, limits)


def score_images(
    score: Callable[[Sequence[DecodedImage]], Scores],
    architecture: Architecture,
    images: pa.Table,
    storage_options: Mapping[str, Any],
    report: Callable[[int], object] = lambda done: None,
    limits: DecodeLimits = DEFAULT_LIMITS,
) -> tuple[pa.Table, list[LoadedImage]]:
    """Scores of the listed images in the `CALIBRATION` schema, and the images that could not be read.

    Args:
        score: scores a batch of images, with tiles a single one.
        report: called with the number of images that are done.
    """
    columns = CALIBRATED if architecture.whitening else CALIBRATED[:1]
    preprocessing = architecture.preprocessing
    loader = ImageLoader(ImageReader(storage_options), preprocessing, READ_THREADS, limits=limits)
    loaded = loader.load(images["image_uri"].to_pylist(), images["image_version"].to_pylist())
    rows: list[dict[str, Any]] = []
    failed: list[LoadedImage] = []
    for group in batches(loaded, 1 if preprocessing.tiling else BATCH_SIZE):
        good = [(i, i.content) for i in group if isinstance(i.content, DecodedImage)]
        failed += [image for image in group if isinstance(image.content, ImageError)]
        if good:
            scores = calibration_columns(score([content for _, content in good]))
            values = zip(*(scores[name].tolist() for name in columns), strict=True)
            rows += [
                {"image_uri": image.image_uri, "image_version": image.image_version}
                | dict(zip(columns, row, strict=True))
                for (image, _), row in zip(good, values, strict=True)
            ]
        report(len(rows) + len(failed))
    return pa.Table.from_pylist(rows, schema=CALIBRATION), failed


def _whole(detector: Detector) -> Callable[[Sequence[DecodedImage]], Scores]:
    """Scores a batch of images that the detector sees as a whole."""
    device = detector.get_buffer("mean").device

    @torch.inference_mode()
    def score(images: Sequence[DecodedImage]) -> Scores:
        image_BHWC = torch.from_numpy(np.stack([image.pixels_HWC for image in images])).to(device)
        if not detector.rounding_shifts:
            detector.measure_rounding(image_BHWC)
        scores: Scores = detector(image_BHWC)
        return scores

    return score


def _tiled(detector: Detector) -> Callable[[Sequence[DecodedImage]], Scores]:
    """Scores one image, tile by tile."""
    form = TiledDetector(InferenceDetector(detector, "float32", BATCH_SIZE))

    def score(images: Sequence[DecodedImage]) -> Scores:
        (image,) = images
        return form(image.pixels_HWC, image.height, image.width)

    return score
