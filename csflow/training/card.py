"""The model card: a README and the loss curves of a model directory."""

from collections.abc import Mapping, Sequence
from typing import Any

CARD = """\
# {backbone}, {blocks} coupling block{plural}, {height} × {width} px

A CS-Flow defect detector trained by csflow {csflow_version} on images of good parts. Score images with
it: `python jobs/score.py --model <this folder> --input <images> --output <folder>`.

![Loss per epoch](curves.svg)

| | |
|---|---|
| training images | {training_images} |
| held-out images (calibration) | {heldout_images} |
| unreadable images left out | {unreadable_images} |
| epochs | {epochs} |
| final training loss | {loss:.4f} |
| final held-out loss | {heldout_loss:.4f} |
| held-out anomaly score, median | {score_median:.4f} |
| held-out anomaly score, 95 % | {score_95:.4f} |
| smallest possible p-value | {smallest_p_value:.4g} |

The loss is (½‖z‖² − log|det J|) / dim(z) per image. P-values compare an image's anomaly score with
those of the held-out images in `calibration.parquet`, which took no part in training. The final epoch's
weights are kept; no choice was made on the held-out images.

## Settings

```json
{settings}
```
"""


def curves_svg(history: Sequence[Mapping[str, Any]]) -> bytes:
    """Training and held-out loss against epochs as a small SVG drawing."""
    width, height, margin = 640, 280, 48
    values = [line[name] for line in history for name in ("loss", "heldout_loss")]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    steps = max(len(history) - 1, 1)

    def polyline(name: str, color: str) -> str:
        points = " ".join(
            f"{margin + (width - 2 * margin) * i / steps:.1f},"
            f"{height - margin - (height - 2 * margin) * (line[name] - low) / span:.1f}"
            for i, line in enumerate(history)
        )
        return f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>'

    def text(x: float, y: float, content: str, color: str = "#555", anchor: str = "start") -> str:
        return f'<text x="{x}" y="{y}" fill="{color}" text-anchor="{anchor}">{content}</text>'

    bottom = height - margin
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M{margin},{margin}V{bottom}H{width - margin}" fill="none" stroke="#999"/>',
        polyline("loss", "#3366cc"),
        polyline("heldout_loss", "#dd7711"),
        text(margin, 24, "training loss", "#3366cc"),
        text(margin + 110, 24, "held-out loss", "#dd7711"),
        text(margin - 6, margin + 4, f"{high:.2f}", anchor="end"),
        text(margin - 6, bottom, f"{low:.2f}", anchor="end"),
        text(margin, bottom + 18, "epoch 1"),
        text(width - margin, bottom + 18, f"epoch {len(history)}", anchor="end"),
        "</svg>\n",
    ]
    return "\n".join(parts).encode()
