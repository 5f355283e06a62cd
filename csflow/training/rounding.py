"""Whether rounding to bfloat16, as CPUs score by default, would move the p-values of a model."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from csflow.decode_limits import DEFAULT_LIMITS, DecodeLimits
from csflow.errors import ImageError
from csflow.images import DecodedImage
from csflow.inputs.loading import ImageLoader
from csflow.inputs.reading import ImageReader
from csflow.model import Detector, InferenceDetector
from csflow.model.tiles import cut
from csflow.preprocessing import Preprocessing

ROUNDING_IMAGES = 8
"""Number of images on which the effects of rounding are measured."""
LARGEST_SHIFT = 0.1
"""Largest mean shift of scores, in standard deviations of the held-out ones. P-values then shift by 0.03."""
ALL_THE_SAME = (
    "warning: the held-out images all have the same score, so p-values mean nothing; --input should be "
    "photographs of many different parts, and not copies or empty images"
)
TOO_ALIKE = (
    "warning: these images are so alike that rounding to bfloat16 would move their scores; so --precision "
    "auto scores this model in float32, which takes up to twice as long on CPUs, and longer on GPUs"
)


def moves_p_values(
    detector: Detector,
    heldout: pa.Table,
    calibration: pa.Table,
    storage_options: Mapping[str, Any],
    limits: DecodeLimits = DEFAULT_LIMITS,
) -> bool:
    """Whether rounding shifts the scores of some images, compared with the spread of the calibration.

    Scores are calibrated in float32. Images of an aligned part that hardly differ have features that hardly
    differ; the whitening magnifies what differences there are, and rounding with them.

    Args:
        heldout: some images; of those of the calibration, the model may have seen none or all.
        calibration: scores of held-out images.
    """
    pixels = some_pixels(detector, heldout, storage_options, limits)
    if not pixels:
        return False
    image_BHWC = torch.from_numpy(np.stack(list(pixels.values())))
    scorer = InferenceDetector(detector, "mixed", ROUNDING_IMAGES)
    with torch.inference_mode():
        shift_B = scorer(image_BHWC).anomaly_score_B.double() - detector(image_BHWC).anomaly_score_B.double()
    spread = calibration["anomaly_score"].to_numpy().std()
    return bool(abs(shift_B.mean().item()) > LARGEST_SHIFT * spread)


def some_pixels(
    detector: Detector,
    images: pa.Table,
    storage_options: Mapping[str, Any],
    limits: DecodeLimits = DEFAULT_LIMITS,
) -> dict[int, NDArray[np.uint8]]:
    """Pixels (H, W, 3) of the first images, or of a tile in their middle, by the image's row.

    Images that cannot be read are left out.
    """
    images = images.slice(0, ROUNDING_IMAGES)
    preprocessing = detector.architecture.preprocessing
    loader = ImageLoader(ImageReader(storage_options), preprocessing, ROUNDING_IMAGES, limits=limits)
    loaded = loader.load(images["image_uri"].to_pylist(), images["image_version"].to_pylist())
    return {
        row: _middle_tile(image.content, preprocessing) if preprocessing.tiling else image.content.pixels_HWC
        for row, image in enumerate(loaded)
        if not isinstance(image.content, ImageError)
    }


def _middle_tile(image: DecodedImage, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    corners = preprocessing.tile_corners(image.height, image.width)
    return cut(image.pixels_HWC, corners[len(corners) // 2], preprocessing.image_size).copy()
