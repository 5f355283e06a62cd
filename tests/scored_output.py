"""An output as scoring jobs leave it after three weeks with two models, made without scoring anything.

Four lines, a few photographs a night, most defects in one corner of the part. The second model begins in the
last week and scores that week's images again. Some images fail, some of them only at first.
"""

from dataclasses import fields
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from csflow.calibration import Drift, p_values
from csflow.output.runs import Counts, RunRecord, ScoredWith
from csflow.output.schemas import ERRORS, SCORES
from csflow.preprocessing import whole
from csflow.regions import find_regions
from csflow.storage import Location, to_parquet

OLD_MODEL, NEW_MODEL = "1234567890123456", "8c1f09e2a7b3d456"
"""An id of digits only is what readers that guess types take for a number."""
FIRST_NIGHT = date(2026, 11, 2)  # a Monday
NIGHTS = 21
LINES = ("line-1", "line-2", "line-3", "line-4")
PARTS_PER_LINE = 6
MAP_SIDE = 8
IMAGE_HEIGHT, IMAGE_WIDTH = 480, 640
HELD_OUT = np.sort(np.random.default_rng(0).gamma(512, 1 / 1024, 199))
"""Calibration scores of both models, but for the second one's offset."""
HELD_OUT_PARTS = np.random.default_rng(2).permutation(HELD_OUT)[1:].reshape(99, 2).max(1)
"""The worse image of each of 99 held-out parts."""
HELD_OUT_PEAKS = np.random.default_rng(1).gamma(8, 0.125, (199, MAP_SIDE**2)).max(1)
"""The hottest cell of each held-out map, but for that offset."""


def write_output(output: Path, nights: range = range(NIGHTS)) -> Path:
    """Writes the scores and errors of these nights below `output`."""
    for night in nights:
        for model_id, offset in models_of(night):
            rows = [scored(uri, night, model_id, offset) for uri in photographs(night)]
            write_rows(output, "scores", model_id, night, [row for row in rows if row is not None])
            write_rows(output, "errors", model_id, night, failures(night))
    return output


def models_of(night: int) -> list[tuple[str, float]]:
    """Each model that scores on this night, with what it adds to the logarithm of a score."""
    # The camera's lamp ages: scores creep up with the weeks until the new model replaces the old one.
    old = (OLD_MODEL, 0.01 * night)
    return [old, (NEW_MODEL, 0.5)] if night >= 14 else [old]


def photographs(night: int) -> list[str]:
    return [
        f"s3://plant/images/{day_of(night)}/{line}/part-{night:02}-{number:03}.png"
        for line in LINES
        for number in range(PARTS_PER_LINE)
    ]


def tags_of(uri: str) -> dict[str, str]:
    line, part = uri.split("/")[-2:]
    night, number = int(part[5:7]), int(part[-7:-4])
    return {"line": line, "camera": "top" if number % 2 else "side", "part": f"{night:02}-{number // 2}"}


def day_of(night: int) -> date:
    return FIRST_NIGHT + timedelta(days=night)


def scored(uri: str, night: int, model_id: str, offset: float) -> dict[str, Any] | None:
    """The row of one image; None if it could not be scored."""
    number = int(uri[-7:-4])
    if night % 5 == 3 and number == 5:
        return None
    part = np.random.default_rng([night, *uri.encode()])
    is_defective = part.random() < (0.25 if "line-3" in uri else 0.05)
    of_model = np.random.default_rng([night, *uri.encode(), *model_id.encode()])
    map_HW = of_model.gamma(8, 0.125, (MAP_SIDE, MAP_SIDE)).astype(np.float32)
    if is_defective:
        row, column = (1, 6) if part.random() < 0.8 else part.integers(0, MAP_SIDE, 2)
        map_HW[row, column] += of_model.uniform(20, 60)
    map_HW *= np.float32(np.exp(offset))
    score = float(map_HW.mean() / 2)
    peak_row, peak_column = np.unravel_index(map_HW.argmax(), map_HW.shape)
    own = float(np.exp(0.5 if model_id == NEW_MODEL else 0.0))
    p_value = p_value_of(score / own)
    region_threshold = own * float(np.quantile(HELD_OUT_PEAKS, 0.9))
    return {
        "image_uri": uri,
        "image_version": f"etag-{night}-{number}",
        "image_height": IMAGE_HEIGHT,
        "image_width": IMAGE_WIDTH,
        "anomaly_score": score,
        "scale_scores": [score, score, score],
        "p_value": p_value,
        "is_anomalous": p_value <= 0.01,
        "anomaly_map": map_HW.ravel(),
        "map_height": MAP_SIDE,
        "map_width": MAP_SIDE,
        "peak_y": (peak_row + 0.5) * IMAGE_HEIGHT / MAP_SIDE,
        "peak_x": (peak_column + 0.5) * IMAGE_WIDTH / MAP_SIDE,
        "run_id": f"{day_of(night):%Y%m%d}T020000Z-{model_id[:8]}",
        "image_modified_at": datetime(2026, 11, 2, 1, tzinfo=UTC) + timedelta(days=night),
        "scored_at": datetime(2026, 11, 2, 2 if model_id == OLD_MODEL else 3, number, tzinfo=UTC)
        + timedelta(days=night),
        "region_threshold": region_threshold,
        "regions": regions_of(map_HW, region_threshold, own),
        "tags": tags_of(uri),
        "part_p_value": float(p_values(score / own, HELD_OUT_PARTS)),
    }


def regions_of(map_HW: NDArray[np.float32], threshold: float, own: float) -> list[dict[str, float]]:
    """The regions of a map. `own`: the factor of its model."""
    box_14 = np.array([whole(IMAGE_HEIGHT, IMAGE_WIDTH)])
    found = find_regions(map_HW[None], threshold, [IMAGE_HEIGHT], [IMAGE_WIDTH], box_14)
    columns = {field.name.removesuffix("_N"): getattr(found, field.name) for field in fields(found)}
    columns["p_value"] = p_values(columns["peak"], own * HELD_OUT_PEAKS)
    return [
        {name: column[n] for name, column in columns.items() if name != "image"}
        for n in range(len(columns["x"]))
    ]


def p_value_of(score: float) -> float:
    return float((1 + (score <= HELD_OUT).sum()) / (len(HELD_OUT) + 1))


def failures(night: int) -> list[dict[str, Any]]:
    """The last part of each line fails every fifth night; that of line 1 was tried twice.

    On other nights one image times out first and is scored by a later run of the same night.
    """
    at = datetime(2026, 11, 2, 2, tzinfo=UTC) + timedelta(days=night)
    tonight = photographs(night)
    if night % 5 == 3:
        broken = [uri for uri in tonight if uri.endswith("005.png")]
        codes = ["corrupt", "corrupt", "truncated", "too_large"]
        rows = [failure(uri, night, code, at) for uri, code in zip(broken, codes, strict=True)]
        return [*rows, failure(broken[0], night, codes[0], at + timedelta(hours=1))]
    return [failure(tonight[0], night, "timeout", at)] if night % 5 == 1 else []


def failure(uri: str, night: int, code: str, at: datetime) -> dict[str, Any]:
    return {
        "image_uri": uri,
        "image_version": f"etag-{night}-{int(uri[-7:-4])}",
        "error_code": code,
        "error_message": "what happened",
        "is_transient": code == "timeout",
        "run_id": f"{at:%Y%m%dT%H%M%SZ}",
        "failed_at": at,
        "tags": tags_of(uri),
    }


def write_rows(output: Path, kind: str, model_id: str, night: int, rows: list[dict[str, Any]]) -> None:
    if rows:
        schema = SCORES if kind == "scores" else ERRORS
        folder = output / kind / f"model_id={model_id}" / f"date={day_of(night)}"
        folder.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(rows, schema)
        name = f"part-{night:06}-000" if kind == "scores" else f"part-{night:06}-000-0badc0de"
        (folder / f"{name}.parquet").write_bytes(to_parquet(table))


def write_record(output: Path, run_id: str, **changes: Any) -> None:
    """Leaves the record of a run that scored 3 images, one of them anomalous, but for these changes."""
    counts = {"listed": 3, "scored": 3, "permanent_errors": 0, "missing": 0}
    counts |= {"scored_in_this_run": 3, "anomalous_in_this_run": 1, "errors_in_this_run": {}}
    record = {
        "run_id": run_id,
        "status": "done",
        "exit_status": 0,
        "started_at": datetime(2026, 11, 2, 2, tzinfo=UTC),
        "ended_at": datetime(2026, 11, 2, 2, 10, 0, 123456, tzinfo=UTC),
        "model": ScoredWith(location="/models/cells", model_id=OLD_MODEL),
        "configuration": {"false_positive_rate": 0.05},
        "counts": Counts(**counts | changes.pop("counts", {})),
        "drift": Drift(ks_statistic=0.25, ks_p_value=1e-5, share_below_5_percent=0.125, sample=3),
        "peak_memory_bytes": {"driver": 300_000_000, "worker": 2_000_000_000},
        "images_per_second": 12.5,
        "seconds": {"start": 1.5, "score": 0.25},
        "seconds_in_workers": {"read": 0.5, "score": 0.125},
        "libraries": {"csflow": "0.1.0"},
    }
    RunRecord(**record | changes).write(Location(str(output)))
