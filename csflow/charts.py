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
TICK_INTERVALS = 4
"""Largest number of intervals between the ticks of an axis: a rate has ticks at 0, 0.25, … 1."""

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
    bottom = HEIGHT - MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        *_axes(_ticks(x_range, xs), x_range, _ticks(y_range, ys), y_range),
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
        _text(WIDTH / 2, bottom + 36, x_label, anchor="middle"),
        "</svg>\n",
    ]
    return "\n".join(parts).encode()


def steps(values: ArrayLike, edges: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The outline of a histogram that has these values between these edges."""
    return np.repeat(np.asarray(edges, np.float64), 2)[1:-1], np.repeat(np.asarray(values, np.float64), 2)


def _ticks(ends: Range, arrays: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Round numbers within a range; whole ones where all values are, as epochs and counts are."""
    low, high = ends
    power = 10 ** np.floor(np.log10((high - low) / TICK_INTERVALS))
    step = next(n * power for n in (1, 2, 2.5, 5, 10) if (high - low) / (n * power) <= TICK_INTERVALS + 1e-9)
    if high > 1 and all((values == np.round(values)).all() for values in arrays):
        step = max(1.0, np.ceil(step))
    # Plus zero, since a negative zero would be shown as one.
    return np.arange(np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9) + 1) * step + 0.0


def _axes(
    x_ticks: NDArray[np.float64], x_range: Range, y_ticks: NDArray[np.float64], y_range: Range
) -> list[str]:
    """Both axes with their ticks, and a line across at each tick of the vertical one."""
    bottom, right = HEIGHT - MARGIN, WIDTH - MARGIN
    parts = []
    for tick, y in zip(y_ticks, _down(y_ticks, y_range), strict=True):
        parts.append(f'<path d="M{MARGIN},{y:.1f}H{right}" stroke="#eee"/>')
        parts.append(_text(MARGIN - 6, round(y + 4, 1), f"{tick:.4g}", anchor="end"))
    for tick, x in zip(x_ticks, _right(x_ticks, x_range), strict=True):
        parts.append(f'<path d="M{x:.1f},{bottom}v4" stroke="#999"/>')
        parts.append(_text(round(x, 1), bottom + 18, f"{tick:.4g}", anchor="middle"))
    return [*parts, f'<path d="M{MARGIN},{MARGIN}V{bottom}H{right}" fill="none" stroke="#999"/>']


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
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(_right(x, x_range), _down(y, y_range), strict=True))


def _right(x: NDArray[np.float64], x_range: Range) -> NDArray[np.float64]:
    return MARGIN + (WIDTH - 2 * MARGIN) * (x - x_range[0]) / (x_range[1] - x_range[0])


def _down(y: NDArray[np.float64], y_range: Range) -> NDArray[np.float64]:
    return HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (y - y_range[0]) / (y_range[1] - y_range[0])


def _text(x: float, y: float, content: str, colour: str = "#555", anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" fill="{colour}" text-anchor="{anchor}">{escape(content)}</text>'
