"""Anomaly maps drawn over their images, on a colour scale that is the same for every image."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Inferno at eight even steps (Smith & van der Walt, https://bids.github.io/colormap): perceptually uniform,
# readable in grey and with colour-blind eyes.
ANCHORS = (
    (0, 0, 4),
    (40, 11, 84),
    (101, 21, 110),
    (159, 42, 99),
    (212, 72, 66),
    (245, 125, 21),
    (250, 193, 39),
    (252, 255, 164),
)


def _colour_table() -> NDArray[np.uint8]:
    """Inferno's 256 colours, shape (256, 3)."""
    anchors = np.array(ANCHORS, dtype=np.float64)
    steps = np.linspace(0, len(anchors) - 1, 256)
    channels = [np.interp(steps, np.arange(len(anchors)), channel) for channel in anchors.T]
    return np.stack(channels, axis=1).round().astype(np.uint8)


COLOUR_TABLE = _colour_table()


def overlay(
    image: Image.Image, anomaly_map: NDArray[np.float32], *, vmin: float, vmax: float, opacity: float = 0.8
) -> Image.Image:
    """The RGB image with its anomaly map over it.

    Args:
        image: RGB, any size.
        anomaly_map: shape (map_height, map_width); upsampled bilinearly to the image's size.
        vmin: value, and everything below it, that leaves the image as it is.
        vmax: value, and everything above it, that is brightest; cells that are no number count as such.
        opacity: of the brightest cells; it grows linearly with the value.

    Raises:
        ValueError: vmin is not below vmax.
    """
    if not vmin < vmax:
        raise ValueError(f"vmin {vmin} must be below vmax {vmax}")
    level = np.nan_to_num((anomaly_map.astype(np.float32) - vmin) / (vmax - vmin), nan=1.0)
    # Clipped before upsampling too: a cell far above vmax would bleed its colour over its neighbours.
    small = Image.fromarray(level.clip(0, 1))
    level_HW = np.asarray(small.resize(image.size, Image.Resampling.BILINEAR)).clip(0, 1)
    colours = Image.fromarray(COLOUR_TABLE[(level_HW * 255).round().astype(np.uint8)])
    alpha = Image.fromarray((level_HW * opacity * 255).round().astype(np.uint8))
    return Image.composite(colours, image, alpha)
