"""Small SVG charts: curves over two labelled axes."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

COLOURS = ("#3366cc", "#dd7711", "#339966")
WIDTH, HEIGHT, MARGIN = 640, 320, 56
MAX_POINTS = 600
"""Largest number of points in a curve; more would be finer than a pixel."""

Range = tuple[float, float]


class Curve(NamedTuple):
    name: str
    x: ArrayLike
    y: ArrayLike
    is_filled: bool = False
    """Whether the area down to the axis is filled, as in a histogram."""


def chart(
    curves: Sequence[Curve],
    x_label: str,
    y_label: str,
    x_range: Range | None = None,
    y_range: Range | None = None,
) -> bytes:
    """Draws up to three curves as SVG. An axis without a range spans all points."""
    xs = [np.asarray(curve.x, np.float64) for curve in curves]
    ys = [np.asarray(curve.y, np.float64) for curve in curves]
    x_range, y_range = x_range or _range(xs), y_range or _range(ys)
    bottom, right = HEIGHT - MARGIN, WIDTH - MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<path d="M{MARGIN},{MARGIN}V{bottom}H{right}" fill="none" stroke="#999"/>',
    ]
    for number, (curve, x, y, colour) in enumerate(zip(curves, xs, ys, COLOURS, strict=False)):
        points = _points(*_thinned(x, y), x_range, y_range)
        if curve.is_filled:
            points = f"{points.split(',')[0]},{bottom} {points} {points.split()[-1].split(',')[0]},{bottom}"
        fill = f'"{colour}" fill-opacity="0.25"' if curve.is_filled else '"none"'
        parts.append(f'<polyline points="{points}" fill={fill} stroke="{colour}" stroke-width="2"/>')
        parts.append(_text(MARGIN + 190 * number, 24, curve.name, colour))
    parts += [
        _text(MARGIN, MARGIN - 12, y_label),
        _text(MARGIN - 6, MARGIN + 4, f"{y_range[1]:.3g}", anchor="end"),
        _text(MARGIN - 6, bottom, f"{y_range[0]:.3g}", anchor="end"),
        _text(MARGIN, bottom + 18, f"{x_range[0]:.3g}"),
        _text(right, bottom + 18, f"{x_range[1]:.3g}", anchor="end"),
        _text(WIDTH / 2, bottom + 36, x_label, anchor="middle"),
        "</svg>\n",
    ]
    return "\n".join(parts).encode()


def steps(values: ArrayLike, edges: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The outline of a histogram that has these values between these edges."""
    return np.repeat(np.asarray(edges, np.float64), 2)[1:-1], np.repeat(np.asarray(values, np.float64), 2)


def _range(arrays: Sequence[NDArray[np.float64]]) -> Range:
    low = min(float(values.min()) for values in arrays)
    high = max(float(values.max()) for values in arrays)
    return low, high if high > low else low + 1


def _thinned(
    x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points spread evenly along the curve, including both ends."""
    if len(x) <= MAX_POINTS:
        return x, y
    spans = [max(float(np.ptp(values)), np.finfo(float).tiny) for values in (x, y)]
    way = np.append(0, np.cumsum(np.abs(np.diff(x)) / spans[0] + np.abs(np.diff(y)) / spans[1]))
    kept = np.unique(np.searchsorted(way, np.linspace(0, way[-1], MAX_POINTS)).clip(0, len(x) - 1))
    return x[kept], y[kept]


def _points(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    x_range: Range,
    y_range: Range,
) -> str:
    right = MARGIN + (WIDTH - 2 * MARGIN) * (x - x_range[0]) / (x_range[1] - x_range[0])
    down = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (y - y_range[0]) / (y_range[1] - y_range[0])
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(right, down, strict=True))


def _text(x: float, y: float, content: str, colour: str = "#555", anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" fill="{colour}" text-anchor="{anchor}">{escape(content)}</text>'
