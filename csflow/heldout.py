"""Scores held-out normal images, from which a model computes p-values, in this process."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from csflow.config import ListingConfig
from csflow.console import Progress, warn
from csflow.errors import ImageError, WrongUse
from csflow.images import DecodedImage
from csflow.inputs.listing import LISTING, list_images
from csflow.inputs.loaded import LoadedImage
from csflow.inputs.loading import ImageLoader, batches
from csflow.inputs.reading import ImageReader
from csflow.inputs.selection import Selection
from csflow.inputs.unlisted import Unlisted
from csflow.model import Detector
from csflow.model_directory import CALIBRATION
from csflow.training.closing import CALIBRATED, calibration_columns

READ_THREADS = 8
BATCH_SIZE = 8


def heldout_calibration(
    detector: Detector, inputs: Sequence[str], config: ListingConfig, setting: str
) -> tuple[pa.Table, int] | None:
    """Scores of normal images in the `CALIBRATION` schema, and the number of images that cannot be read.

    Prints the images that are left out, each with its reason. A calibration has only some hundred images, so
    they are scored in this process. If the detector has no rounding shifts yet, it measures them.

    Args:
        inputs: folders, files, archives or manifests of images.
        config: how they are listed and read.
        setting: the flag that names them, for messages.

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
    calibration, failed = _scored(detector, images, config.storage_options)
    for image in failed:
        print(f"left out: {image.image_uri}: {image.content}")
    if any(isinstance(image.content, ImageError) and image.content.is_transient for image in failed):
        print("INCOMPLETE: some images could not be read this time; the same command tries them again")
        return None
    if not calibration.num_rows:
        raise WrongUse(f"{setting}: none of the images can be read; name readable normal images")
    return calibration, len(failed)


def _scored(
    detector: Detector, images: pa.Table, storage_options: Mapping[str, Any]
) -> tuple[pa.Table, list[LoadedImage]]:
    """Scores of the listed images, and the images that could not be read."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    detector.to(device)
    columns = CALIBRATED if detector.architecture.whitening else CALIBRATED[:1]
    loader = ImageLoader(ImageReader(storage_options), detector.architecture.preprocessing, READ_THREADS)
    loaded = loader.load(images["image_uri"].to_pylist(), images["image_version"].to_pylist())
    rows: list[dict[str, Any]] = []
    failed: list[LoadedImage] = []
    with closing(Progress(images.num_rows, "images")) as progress:
        for group in batches(loaded, BATCH_SIZE):
            good = [(i, i.content.pixels_HWC) for i in group if isinstance(i.content, DecodedImage)]
            failed += [image for image in group if isinstance(image.content, ImageError)]
            if good:
                image_BHWC = torch.from_numpy(np.stack([pixels_HWC for _, pixels_HWC in good])).to(device)
                if not detector.rounding_shifts:
                    detector.measure_rounding(image_BHWC)
                with torch.inference_mode():
                    scores = calibration_columns(detector(image_BHWC))
                values = zip(*(scores[name].tolist() for name in columns), strict=True)
                rows += [
                    {"image_uri": image.image_uri, "image_version": image.image_version}
                    | dict(zip(columns, row, strict=True))
                    for (image, _), row in zip(good, values, strict=True)
                ]
            done = len(rows) + len(failed)
            progress.update(done, f"{done / progress.seconds:.1f} images/s")
    detector.to("cpu")
    return pa.Table.from_pylist(rows, schema=CALIBRATION), failed
