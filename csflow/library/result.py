"""The score of one image, as `Model.score` returns it."""

import base64
import html
import io
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from csflow.images import decode
from csflow.library.sources import Source
from csflow.maps import ColourRange, colour_range, overlay
from csflow.preprocessing import Box

SHOWN_SIDE = 360
"""Longest side in pixels of the picture in a notebook."""


class Region(NamedTuple):
    """Connected cells of an anomaly map that may be a defect; lengths are in pixels of the original."""

    x: float
    """Left edge of the box around it; `y` is the upper edge, `width` and `height` are the box's."""
    y: float
    width: float
    height: float
    area: float
    """Area of its cells, in square pixels."""
    peak: float
    """Its hottest cell; `mean` is the mean of its cells."""
    mean: float
    p_value: float
    """Share of held-out normal images with a cell as hot as its peak, the image itself counted among them."""


@dataclass(frozen=True)
class Result:
    """Score, p-value, verdict and anomaly map of one image; fields mean what columns of `scores` mean."""

    image_uri: str | None
    """None for an image that was given in memory."""
    anomaly_score: float
    p_value: float
    """Share of held-out normal images that score at least this, the image itself counted among them."""
    is_anomalous: bool
    """Whether the p-value is at most the model's false-positive rate."""
    anomaly_map: NDArray[np.float32] = field(repr=False)
    """How unusual each place is, (map_height, map_width), row-major."""
    image_height: int
    """Height of the upright original in pixels; `image_width` likewise."""
    image_width: int
    peak_y: float
    """Centre of the hottest map cell, in pixels of the original; `peak_x` likewise."""
    peak_x: float
    global_score: float
    global_p_value: float
    local_score: float | None
    """None, with its p-value, from models without whitening."""
    local_p_value: float | None
    map_box: Box = field(repr=False)
    """The part of the original that the map covers."""
    map_threshold: float | None
    """At most the false-positive rate of normal images has a map cell above this; None if it is not known."""
    regions: list[Region] | None
    """What may be a defect, the highest peak first; None if the model does not know which are usual."""
    model_id: str
    _source: Source = field(repr=False, compare=False)

    def image(self, side: int | None = None) -> Image.Image:
        """The image, RGB, read again from where it was given.

        Args:
            side: longest side of the result in pixels, at most the image's own, which is the default.

        Raises:
            ImageError: the image can no longer be read.
        """
        longest = max(self.image_height, self.image_width)
        small = min(1.0, (side or longest) / longest)
        height, width = (max(1, round(s * small)) for s in (self.image_height, self.image_width))
        return Image.fromarray(decode(self._source.read(), (height, width)).pixels_HWC)

    def overlay(
        self, side: int | None = None, *, colours: ColourRange | None = None, opacity: float = 0.8
    ) -> Image.Image:
        """The image with its anomaly map over it.

        Args:
            side: as for `image`.
            colours: ends of the colour scale. By default it begins at half of the map threshold, and ends at
                twice, and so is the same for all images of a model; without a threshold it suits this map.

        Raises:
            ImageError: the image can no longer be read.
        """
        picture = self.image(side)
        chosen = colours or self._colours()
        down, across = picture.height / self.image_height, picture.width / self.image_width
        top, left, bottom, right = self.map_box
        box = top * down, left * across, bottom * down, right * across
        return overlay(
            picture, self.anomaly_map, vmin=chosen.vmin, vmax=chosen.vmax, opacity=opacity, box=box
        )

    def _colours(self) -> ColourRange:
        if self.map_threshold is not None and self.map_threshold > 0:
            return ColourRange(self.map_threshold / 2, self.map_threshold * 2)
        found = colour_range([self.anomaly_map])
        assert found is not None  # there is a map
        return found

    def _repr_html_(self) -> str:
        """What a notebook shows: the picture beside score, p-value and verdict."""
        picture = io.BytesIO()
        self.overlay(SHOWN_SIDE).save(picture, "PNG")
        encoded = base64.b64encode(picture.getvalue()).decode()
        verdict = "anomalous" if self.is_anomalous else "normal"
        rows = {
            "verdict": verdict,
            "anomaly score": f"{self.anomaly_score:.4g}",
            "p-value": f"{self.p_value:.3g}",
            "hottest at": f"y {self.peak_y:.0f}, x {self.peak_x:.0f}",
            "image": f"{self.image_height} x {self.image_width}, {self.image_uri or 'in memory'}",
            "model": self.model_id,
        }
        lines = (f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in rows.items())
        table = f"<table>{''.join(lines)}</table>"
        image = f'<img alt="anomaly map over the image: {verdict}" src="data:image/png;base64,{encoded}">'
        return f'<div style="display:flex;gap:1em;align-items:flex-start">{image}{table}</div>'
