"""The model card: a README of a model directory, with its loss curves and calibration scores drawn."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import csflow

WIDTH, HEIGHT, MARGIN = 640, 280, 48
BINS = 40

CARD = """\
# {backbone}, {blocks} coupling block{plural}, {height} × {width} px

A CS-Flow defect detector trained by csflow {csflow_version} on images of good parts. Score images with
it: `python jobs/score.py --model <this folder> --input <images> --output <folder>`.

![Loss per epoch](curves.svg)

| | |
|---|---|
| training images | {training_images} |
| validation images (choose the epoch) | {validation_images} |
| held-out images (calibration) | {heldout_images} |
| unreadable images left out | {unreadable_images} |
| copies of other images left out | {copies} |
| fingerprint of the images | `{fingerprint}` |
| epochs, and the one kept | {epochs}, {best_epoch} |
| training loss of that epoch | {loss:.4f} |
| validation loss of that epoch | {validation_loss} |
| held-out loss | {heldout_loss:.4f} |

The loss is (½‖z‖² − log|det J|) / dim(z) per image. The epoch with the lowest validation loss is kept;
without validation images it is the last one. No label of a defect was ever seen.

## Calibration

![Anomaly scores of the held-out images](calibration.svg)

| | |
|---|---|
| held-out anomaly score, median | {score_median:.4f} |
| held-out anomaly score, 95 % | {score_95:.4f} |
| smallest possible p-value | {smallest_p_value:.4g} |

P-values compare an image's anomaly score with those of the held-out images in `calibration.parquet`, which
took part neither in training nor in the choice of the epoch.

## Settings

```json
{settings}
```
"""


def model_card(
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    metrics: Mapping[str, Any],
    calibration_scores: NDArray[np.float64],
) -> dict[str, bytes]:
    """Files of the card by name.

    Args:
        data: counts of images and their fingerprint.
        metrics: `history`, the loss curves, `best_epoch` and `heldout_loss`.
    """
    history, best_epoch = metrics["history"], metrics["best_epoch"]
    best = history[best_epoch - 1]
    validation_loss = best["validation_loss"]
    text = CARD.format(
        **data,
        backbone=settings["backbone"],
        blocks=settings["coupling_blocks"],
        plural="" if settings["coupling_blocks"] == 1 else "s",
        height=settings["image_size"][0],
        width=settings["image_size"][-1],
        csflow_version=csflow.__version__,
        epochs=len(history),
        best_epoch=best_epoch,
        loss=best["loss"],
        validation_loss="none" if validation_loss is None else f"{validation_loss:.4f}",
        heldout_loss=metrics["heldout_loss"],
        score_median=np.median(calibration_scores),
        score_95=np.quantile(calibration_scores, 0.95),
        smallest_p_value=1 / (len(calibration_scores) + 1),
        settings=json.dumps(settings, indent=2),
    )
    return {
        "README.md": text.encode(),
        "curves.svg": curves_svg(history, best_epoch),
        "calibration.svg": histogram_svg(calibration_scores),
    }


def curves_svg(history: Sequence[Mapping[str, Any]], best_epoch: int) -> bytes:
    """Training and validation loss against epochs, the kept epoch marked."""
    curves = {name: [line[name] for line in history] for name in ("loss", "validation_loss")}
    curves = {name: values for name, values in curves.items() if None not in values}
    low = min(min(values) for values in curves.values())
    high = max(max(values) for values in curves.values())
    step = (WIDTH - 2 * MARGIN) / max(len(history) - 1, 1)
    scale = (HEIGHT - 2 * MARGIN) / ((high - low) or 1.0)

    def polyline(values: Sequence[float], color: str) -> str:
        points = (
            f"{MARGIN + step * i:.1f},{HEIGHT - MARGIN - scale * (v - low):.1f}" for i, v in enumerate(values)
        )
        return f'<polyline points="{" ".join(points)}" fill="none" stroke="{color}" stroke-width="2"/>'

    kept = MARGIN + step * (best_epoch - 1)
    parts = [
        f'<path d="M{kept:.1f},{MARGIN}V{HEIGHT - MARGIN}" stroke="#999" stroke-dasharray="3"/>',
        polyline(curves["loss"], "#3366cc"),
        _text(MARGIN, 24, "training loss", "#3366cc"),
    ]
    if "validation_loss" in curves:
        parts += [
            polyline(curves["validation_loss"], "#dd7711"),
            _text(MARGIN + 110, 24, "validation loss", "#dd7711"),
        ]
    return _drawing(parts, high, low, "epoch 1", f"epoch {len(history)}")


def histogram_svg(scores: NDArray[np.float64]) -> bytes:
    """How many held-out images have which anomaly score."""
    counts, edges = np.histogram(scores, bins=BINS)
    width = (WIDTH - 2 * MARGIN) / BINS
    scale = (HEIGHT - 2 * MARGIN) / max(counts.max(), 1)
    bars = [
        f'<rect x="{MARGIN + width * i:.1f}" y="{HEIGHT - MARGIN - scale * count:.1f}" '
        f'width="{width - 1:.1f}" height="{scale * count:.1f}" fill="#3366cc"/>'
        for i, count in enumerate(counts.tolist())
    ]
    title = _text(MARGIN, 24, f"held-out images by anomaly score ({len(scores)})", "#3366cc")
    return _drawing([title, *bars], counts.max(), 0, f"{edges[0]:.3f}", f"{edges[-1]:.3f}")


def _drawing(parts: Sequence[str], high: float, low: float, first: str, last: str) -> bytes:
    """Axes with their ends named, and what is between them."""
    bottom = HEIGHT - MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<path d="M{MARGIN},{MARGIN}V{bottom}H{WIDTH - MARGIN}" fill="none" stroke="#999"/>',
        *parts,
        _text(MARGIN - 6, MARGIN + 4, f"{high:.4g}", anchor="end"),
        _text(MARGIN - 6, bottom, f"{low:.4g}", anchor="end"),
        _text(MARGIN, bottom + 18, first),
        _text(WIDTH - MARGIN, bottom + 18, last, anchor="end"),
        "</svg>\n",
    ]
    return "\n".join(lines).encode()


def _text(x: float, y: float, content: str, color: str = "#555", anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" fill="{color}" text-anchor="{anchor}">{content}</text>'
