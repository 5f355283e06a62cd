"""Scratches, spots and smears planted in photographs, with exact masks; the same seed, the same defect.

A defect is an opacity between 0 and 1 for every pixel, drawn four times as fine as the photograph and then
averaged and softened. It moves the photograph towards darker or brighter by a share of the brightness around
it, so that the grain of the surface shows through, as it does in real ones.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

# H, W: rows and columns of the photograph; Z: points of a path, each (x, y).

AREA = (0.0005, 0.005)
"""Least and largest share of the image that a defect covers, unless told otherwise."""
VISIBLE = 1 / 3
"""A pixel belongs to a defect where its opacity is at least this share of the highest."""
FINER = 4
"""How much finer defects are drawn than stored."""

Image_HW = NDArray[np.uint8]


class Planted(NamedTuple):
    """A photograph with a defect."""

    image_HW: Image_HW
    mask_HW: NDArray[np.bool_]


class Kind(NamedTuple):
    """How a class of defects looks."""

    draw: Callable[[ImageDraw.ImageDraw, Generator, float, float], None]
    """Draws one of about the given area in pixels into a square canvas of the given side, at its centre."""
    contrast: tuple[float, float]
    """Least and largest change, as a share of the brightness around."""
    softness: tuple[float, float]
    """Least and largest standard deviation of the blur of the edges, in pixels."""
    wipes: float
    """How much of the grain under it is lost."""


def plant(
    image_HW: Image_HW,
    kind: str,
    seed: int,
    blur: float = 0.0,
    area: tuple[float, float] = AREA,
    strength: float = 1.0,
) -> Planted:
    """The photograph with one defect of a kind, where the surface is neither frame nor background.

    Args:
        blur: standard deviation in pixels of the photograph's own blur; the defect is as blurred.
        area: least and largest share of the image that the defect covers.
        strength: multiplies the contrast.
    """
    how = KINDS[kind]
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    height, width = image_HW.shape
    # Within the limits even where a shape is drawn 10 % larger or smaller than wanted.
    share = math.exp(rng.uniform(math.log(1.1 * area[0]), math.log(area[1] / 1.1)))
    softness = math.hypot(rng.uniform(*how.softness), blur)
    shape = _drawn(how, int(rng.integers(1 << 31)), share * height * width, min(height, width), softness)
    alpha_HW = _placed(shape, image_HW, rng)
    return Planted(_blended(image_HW, alpha_HW, how, strength, rng), alpha_HW >= VISIBLE)


def _drawn(how: Kind, seed: int, area: float, side: int, softness: float) -> NDArray[np.float32]:
    """Opacity around a defect whose visible part has the wanted area in pixels, cut to where it is not 0."""
    wanted, drawn = area, area
    for _ in range(8):
        canvas = Image.new("L", (side * FINER, side * FINER))
        how.draw(ImageDraw.Draw(canvas), np.random.default_rng(seed), drawn * FINER**2, side * FINER)
        fine = np.asarray(canvas, np.float32).reshape(side, FINER, side, FINER)
        alpha = ndimage.gaussian_filter(fine.mean((1, 3)), softness)
        alpha /= alpha.max()
        visible = int((alpha >= VISIBLE).sum())
        if abs(visible / wanted - 1) < 0.1:
            break
        drawn *= (wanted / visible) ** 0.8
    alpha[alpha < 0.02] = 0
    rows, columns = (np.flatnonzero(alpha.any(axis)) for axis in (1, 0))
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _placed(shape: NDArray[np.float32], image_HW: Image_HW, rng: Generator) -> NDArray[np.float32]:
    """The shape at a random place inside of the image's margins, on what is not dark as a whole."""
    height, width = image_HW.shape
    rows, columns = shape.shape
    surface = 0.5 * np.median(image_HW)
    alpha_HW = np.zeros(image_HW.shape, np.float32)
    for _ in range(100):
        top = int(rng.integers(round(0.04 * height), max(1, round(0.96 * height) - rows)))
        left = int(rng.integers(round(0.04 * width), max(1, round(0.96 * width) - columns)))
        under = image_HW[top : top + rows, left : left + columns]
        if np.median(under[shape >= VISIBLE]) >= surface:
            break
    alpha_HW[top : top + rows, left : left + columns] = shape
    return alpha_HW


def _blended(
    image_HW: Image_HW, alpha_HW: NDArray[np.float32], how: Kind, strength: float, rng: Generator
) -> Image_HW:
    plain_HW = image_HW.astype(np.float32)
    around_HW = ndimage.gaussian_filter(plain_HW, 3)
    contrast = strength * rng.uniform(*how.contrast)
    level = float(around_HW[alpha_HW >= VISIBLE].mean())
    # Nothing is brighter than white: there a defect is dark.
    brighter = rng.random() < 0.4 and level * (1 + contrast) < 250
    smooth_HW = plain_HW + how.wipes * alpha_HW * (around_HW - plain_HW)
    grain_HW = 1 + 0.1 * ndimage.gaussian_filter(rng.standard_normal(image_HW.shape), 0.7)
    change_HW = (contrast if brighter else -contrast) * around_HW * alpha_HW * grain_HW
    return np.clip(np.rint(smooth_HW + change_HW), 0, 255).astype(np.uint8)


def _path(rng: Generator, length: float, centre: float, bend: float) -> NDArray[np.float64]:
    """Points of a curve of this length around the centre, turning by up to `bend` radians in all."""
    points = 64
    turn = rng.uniform(-bend, bend) * np.linspace(0, 1, points) + rng.uniform(-bend, bend) / 2 * np.sin(
        np.linspace(0, rng.uniform(1, 4), points)
    )
    heading = rng.uniform(0, 2 * math.pi) + turn
    path_Z = np.cumsum(np.stack([np.cos(heading), np.sin(heading)], 1), 0) * length / points
    return path_Z - (path_Z.max(0) + path_Z.min(0)) / 2 + centre


def _wave(rng: Generator, points: int, low: float) -> NDArray[np.float64]:
    """Smooth random values between `low` and 1."""
    noise = ndimage.gaussian_filter1d(rng.standard_normal(points), points / 12, mode="wrap")
    return low + (1 - low) * (noise - noise.min()) / np.ptp(noise)


def _stroke(
    draw: ImageDraw.ImageDraw,
    path_Z: NDArray[np.float64],
    width: NDArray[np.float64],
    ink: NDArray[np.float64],
) -> None:
    for a, b, wide, dark in zip(path_Z[:-1], path_Z[1:], width, ink, strict=False):
        draw.line([*a, *b], fill=int(255 * dark), width=max(1, round(wide)))
        draw.ellipse([*(b - wide / 2), *(b + wide / 2)], fill=int(255 * dark))


def _scratch(draw: ImageDraw.ImageDraw, rng: Generator, area: float, side: float) -> None:
    width = rng.uniform(1.0, 2.2) * FINER
    length = area / width
    # What would be longer than the part, or a dot, is wider or narrower instead.
    wanted = np.clip(length, 10 * FINER, rng.uniform(0.4, 0.75) * side)
    width *= length / wanted
    path_Z = _path(rng, wanted, side / 2, bend=0.7)
    taper = np.sin(np.linspace(0.15, math.pi - 0.15, len(path_Z))) ** 0.5
    _stroke(draw, path_Z, width * taper * _wave(rng, len(path_Z), 0.6), _wave(rng, len(path_Z), 0.5))


def _spot(draw: ImageDraw.ImageDraw, rng: Generator, area: float, side: float) -> None:
    angle = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    radius = np.ones_like(angle)
    for k in (2, 3, 4, 5):
        radius += rng.normal(0, 0.22 / k) * np.cos(k * angle + rng.uniform(0, 2 * math.pi))
    stretch, turned = rng.uniform(1, 1.7), rng.uniform(0, math.pi)
    x, y = radius * np.cos(angle) * stretch, radius * np.sin(angle) / stretch
    scale = math.sqrt(area / math.pi)
    x, y = x * math.cos(turned) - y * math.sin(turned), x * math.sin(turned) + y * math.cos(turned)
    draw.polygon([(side / 2 + scale * a, side / 2 + scale * b) for a, b in zip(x, y, strict=True)], fill=255)


def _smear(draw: ImageDraw.ImageDraw, rng: Generator, area: float, side: float) -> None:
    elongation = rng.uniform(3, 7)
    width = math.sqrt(area / elongation)
    path_Z = _path(rng, width * elongation, side / 2, bend=0.5)
    across = (path_Z[-1] - path_Z[0])[::-1] * (-1, 1)
    across = across / (np.linalg.norm(across) + 1e-9)
    for _ in range(9):
        first = int(rng.integers(0, 20))
        part = path_Z[first : first + int(rng.integers(30, 44))]
        ink = rng.uniform(0.4, 1) * _wave(rng, len(part), 0.5)
        _stroke(draw, part + across * rng.normal(0, width / 4), np.full(len(part), width / 5), ink)


KINDS = {
    "scratch": Kind(_scratch, contrast=(0.2, 0.55), softness=(0.4, 0.8), wipes=0.0),
    "spot": Kind(_spot, contrast=(0.15, 0.45), softness=(0.7, 1.6), wipes=0.2),
    "smear": Kind(_smear, contrast=(0.12, 0.35), softness=(1.2, 2.2), wipes=0.6),
}
