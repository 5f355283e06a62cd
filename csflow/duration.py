"""How long a job takes on CPUs, roughly: told before it begins, until its own rate is known."""

from collections.abc import Mapping, Sequence
from typing import Any

MEASURED = {"backbone": "tf_efficientnet_lite0", "scales": 2, "hidden_channels": 192, "whitening": True}
"""What an architecture has in common with the one that was measured: the default."""
PIXELS = 256 * 256
SHOWN_S = 0.043
"""CPU seconds to show the default flow one image in training, at 256 x 256 pixels. This and the next are seen
in the README's demo, on two cores of an AMD EPYC with AVX512-BF16."""
SCORED_S = 0.035
"""CPU seconds to read, decode and score a photograph of 300 x 300 pixels with the default model."""
START_S = 20
"""Seconds until Ray and its workers have started."""
FASTEST, SLOWEST = 0.6, 2.5
"""What the figures are multiplied with: processors differ, and large photographs take longer to decode."""


def is_measured(architecture: Mapping[str, Any]) -> bool:
    """Whether anything is known about the speed of such a model."""
    blocks = len(architecture.get("kernel_sizes", ()))
    is_like = all(architecture.get(name) == value for name, value in MEASURED.items())
    return blocks == 2 and is_like and architecture.get("tiling") is None


def training_seconds(image_size: Sequence[int], images: int, shown: int, cpus: int) -> float:
    """Seconds of a training with default network and flow.

    Args:
        images: number of images whose features are extracted.
        shown: how often an image is shown to a flow, summed over epochs and trainings; early stopping makes
            them fewer.
        cpus: number of CPUs that work.
    """
    return START_S + _scale(image_size) * (SCORED_S * images + SHOWN_S * shown) / cpus


def scoring_seconds(image_size: Sequence[int], images: int, cpus: int) -> float:
    """Seconds of a scoring run with default network and flow."""
    return START_S + _scale(image_size) * SCORED_S * images / cpus


def in_words(least: float, most: float | None = None) -> str:
    """The range in which the duration probably is.

    Args:
        least: expected seconds; if `most` is given, those of the least that there may be to do.
    """
    low, high = least * FASTEST, (most or least) * SLOWEST
    if high < 120:
        return "under 2 minutes"
    unit, size = ("hours", 3600) if low > 7200 else ("minutes", 60)
    return f"about {max(1, round(low / size))} to {round(high / size)} {unit}"


def _scale(image_size: Sequence[int]) -> float:
    # Small maps cost more a pixel: 2.6 times as much at 448 x 512, 14 times at 1024 x 1216.
    return (image_size[0] * image_size[-1] / PIXELS) ** 0.9
