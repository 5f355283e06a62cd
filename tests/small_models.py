"""Models that have learned nothing, made in a second."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from csflow.model import Architecture, Detector
from csflow.model_directory import CALIBRATION, save_model
from csflow.preprocessing import Fit
from csflow.storage import Location


def save_small(
    folder: Path | Location,
    fit: Fit = "stretch",
    heldout: tuple[float, ...] = (0.5,),
    name: str | None = None,
    parts: Sequence[str] | None = None,
    groups: Sequence[str | None] | None = None,
) -> Location:
    """Writes a model directory with these held-out scores; the same weights every time.

    Args:
        parts: those of the held-out images; `groups` likewise.
    """
    location = Location(str(folder)) if isinstance(folder, Path) else folder
    torch.manual_seed(0)
    architecture = Architecture(
        "tf_efficientnet_lite0", (128, 128), hidden_channels=8, kernel_sizes=(1,), fit=fit
    )
    rows = [
        {"image_uri": "good.png", "image_version": "1", "anomaly_score": score, "part": part, "group": group}
        for score, part, group in zip(
            heldout, parts or [None] * len(heldout), groups or [None] * len(heldout), strict=True
        )
    ]
    calibration = pa.Table.from_pylist(rows, schema=CALIBRATION)
    empty: dict[str, Any] = {part: {} for part in ("training", "data", "metrics", "card")}
    save_model(location, Detector(architecture), calibration, name=name, **empty)
    return location
