"""Rows of `scores` and `errors`, for whatever scores images: the job, the library and the edge runtime.

Dimension letters: B batch, H height, W width, S levels of the pyramid.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from csflow.calibration import p_values
from csflow.errors import ImageError
from csflow.images import DecodedImage
from csflow.output.schemas import FLOATS, REGION, REGIONS, SCORES
from csflow.preprocessing import whole
from csflow.regions import find_regions

if TYPE_CHECKING:  # the edge runtime has neither torch nor what reads model directories
    from csflow.model import Scores
    from csflow.model_directory import Calibration


Tags = Mapping[str, str] | Sequence[tuple[str, str]]
"""What a plant calls an image, by the names that it chose, as Arrow takes and gives a map."""


class ScorableImage(NamedTuple):
    image_uri: str
    image_version: str
    decoded: DecodedImage
    modified_at: datetime | None = None
    """When the image was last changed; None if nothing says."""
    tags: Tags | None = None


class Judged(NamedTuple):
    """Scores of a batch, compared with those of the held-out images."""

    anomaly_score_B: NDArray[np.float64]
    p_value_B: NDArray[np.float64]
    is_anomalous_B: NDArray[np.bool_]
    global_score_B: NDArray[np.float64]
    global_p_value_B: NDArray[np.float64]
    local_score_B: NDArray[np.float64] | None
    """None, with the next, from models without whitening."""
    local_p_value_B: NDArray[np.float64] | None
    scale_scores_BS: NDArray[np.float32]
    anomaly_map_BHW: NDArray[np.float32]
    part_p_value_B: NDArray[np.float64] | None = None
    """p-values of the parts whose worst images these would be; None if parts are not known."""


class RegionRule(NamedTuple):
    """What makes cells of a map a region, and gives it a p-value."""

    threshold: float
    """A region is made of connected cells above it."""
    heldout_peak_N: NDArray[np.float64]
    """The hottest cell of each held-out map."""
    weights: NDArray[np.float64] | None = None
    """As `Calibration.weights`."""

    @classmethod
    def of(cls, calibration: "Calibration", false_regions: float) -> "RegionRule | None":
        """The rule at which a normal image has so many regions on average; None if the model knows none."""
        threshold = calibration.region_threshold(false_regions)
        if threshold is None or calibration.map_maximum is None:
            return None
        return cls(threshold, calibration.map_maximum, calibration.weights)


def judge(
    scores: "Scores",
    calibration: "Calibration",
    false_positive_rate: float,
    tags: Sequence[Tags | None] | None = None,
) -> Judged:
    """Compares scores, on the CPU, with the calibration.

    Args:
        tags: those of each image, which tell its group, if some groups are calibrated apart.
    """
    own = [calibration] * len(scores.anomaly_score_B)
    if calibration.groups and tags:
        own = [calibration.of_tags(dict(some or {})) for some in tags]
    different = {id(one): one for one in own}.values()
    apart = [(one, np.array([other is one for other in own])) for one in different]

    def compared(score_B: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        p_value_B = np.empty(len(score_B))
        for some, is_of_B in apart:
            p_value_B[is_of_B] = p_values(score_B[is_of_B], getattr(some, name), some.weights)
        return p_value_B

    anomaly_score_B = scores.anomaly_score_B.double().numpy()
    global_score_B = scores.global_score_B.double().numpy()
    local_score_B = scores.local_score_B.double().numpy()
    p_value_B = compared(anomaly_score_B, "anomaly_score")
    # Of models without whitening the anomaly score is the global one, and there is no other.
    has_global, has_local = calibration.global_score is not None, calibration.local_score is not None
    return Judged(
        anomaly_score_B,
        p_value_B,
        p_value_B <= false_positive_rate,
        global_score_B,
        compared(global_score_B, "global_score") if has_global else p_value_B,
        local_score_B if has_local else None,
        compared(local_score_B, "local_score") if has_local else None,
        scores.scale_scores_BS.float().numpy(),
        scores.anomaly_map_BHW.float().numpy(),
        None if calibration.part_maximum is None else p_values(anomaly_score_B, calibration.part_maximum),
    )


def require_scores(names: Sequence[str], judged: Judged, precision: str) -> None:
    """Raises FloatingPointError if an image has no score, since numbers left the range of the precision."""
    for name, score in zip(names, judged.anomaly_score_B, strict=True):
        if not np.isfinite(score):
            remedy = "train the model anew" if precision == "float32" else "choose --precision float32"
            raise FloatingPointError(f"{name} has the score {score} in {precision}; {remedy}")


def score_rows(
    images: Sequence[ScorableImage],
    judged: Judged,
    *,
    run_id: str,
    keeps_maps: bool,
    map_threshold: float | None,
    region_rule: RegionRule | None = None,
    model_name: str | None = None,
) -> pa.RecordBatch:
    """Rows in the `SCORES` schema. Without a rule they have no regions."""
    height_B = np.array([image.decoded.height for image in images], dtype=np.int32)
    width_B = np.array([image.decoded.width for image in images], dtype=np.int32)
    box_B4 = np.array([image.decoded.box for image in images])
    anomaly_map_BHW = judged.anomaly_map_BHW
    peak_y_B, peak_x_B = peak(anomaly_map_BHW, height_B, width_B, box_B4)
    columns: dict[str, Any] = {
        "image_uri": [image.image_uri for image in images],
        "image_version": [image.image_version for image in images],
        "image_height": height_B,
        "image_width": width_B,
        "anomaly_score": judged.anomaly_score_B,
        "scale_scores": _float_lists(judged.scale_scores_BS),
        "p_value": judged.p_value_B,
        "is_anomalous": judged.is_anomalous_B,
        "anomaly_map": _float_lists(anomaly_map_BHW) if keeps_maps else pa.nulls(len(images), FLOATS),
        "map_height": np.full(len(images), anomaly_map_BHW.shape[1], dtype=np.int32),
        "map_width": np.full(len(images), anomaly_map_BHW.shape[2], dtype=np.int32),
        "peak_y": peak_y_B.astype(np.float32),
        "peak_x": peak_x_B.astype(np.float32),
        "run_id": [run_id] * len(images),
        "scored_at": [datetime.now(UTC)] * len(images),
        "map_box": [_map_box(image.decoded) for image in images],
        "global_score": judged.global_score_B,
        "global_p_value": judged.global_p_value_B,
        "local_score": _or_nulls(judged.local_score_B, len(images)),
        "local_p_value": _or_nulls(judged.local_p_value_B, len(images)),
        "map_threshold": [map_threshold] * len(images),
        "region_threshold": [region_rule.threshold if region_rule else None] * len(images),
        "regions": pa.nulls(len(images), REGIONS),
        "image_modified_at": [image.modified_at for image in images],
        "model_name": [model_name] * len(images),
        "image_taken_at": [image.decoded.taken_at for image in images],
        "tags": [image.tags for image in images],
        "part_p_value": _or_nulls(judged.part_p_value_B, len(images)),
    }
    if region_rule:
        columns["regions"] = region_lists(anomaly_map_BHW, height_B, width_B, box_B4, region_rule)
    return pa.RecordBatch.from_pydict(columns, schema=SCORES)


def error_row(
    image_uri: str,
    image_version: str,
    error: ImageError,
    run_id: str,
    modified_at: datetime | None = None,
    model_name: str | None = None,
    tags: Tags | None = None,
) -> dict[str, Any]:
    """A row in the `ERRORS` schema."""
    return {
        "image_uri": image_uri,
        "image_version": image_version,
        "error_code": str(error.code),
        "error_message": error.message,
        "is_transient": error.is_transient,
        "run_id": run_id,
        "failed_at": datetime.now(UTC),
        "image_modified_at": modified_at,
        "model_name": model_name,
        "tags": tags,
    }


def _or_nulls(value_B: NDArray[np.float64] | None, images: int) -> NDArray[np.float64] | list[None]:
    return [None] * images if value_B is None else value_B


def _float_lists(values_BX: NDArray[np.float32]) -> pa.Array:
    """A row of numbers per image, flattened row-major, as a `FLOATS` column."""
    flat_BN = values_BX.reshape(len(values_BX), -1)
    offsets = np.arange(len(flat_BN) + 1, dtype=np.int32) * flat_BN.shape[1]
    return pa.ListArray.from_arrays(offsets, flat_BN.ravel(), type=FLOATS)


def region_lists(
    anomaly_map_BHW: NDArray[np.float32],
    image_height_B: NDArray[np.int32],
    image_width_B: NDArray[np.int32],
    box_B4: NDArray[np.float64],
    rule: RegionRule,
) -> pa.Array:
    """The regions of each image as a `REGIONS` column.

    The p-value of a region is that of its peak among the hottest cells of the held-out maps. So the smallest
    one of an image is a p-value of the image.

    Args:
        image_height_B: heights of the original images, in pixels; `image_width_B` likewise.
        box_B4: the part that each map covers: top, left, bottom and right edge.
    """
    regions = find_regions(anomaly_map_BHW, rule.threshold, image_height_B, image_width_B, box_B4)
    values = [
        *(regions.x_N, regions.y_N, regions.width_N, regions.height_N, regions.area_N),
        *(regions.peak_N, regions.mean_N, p_values(regions.peak_N, rule.heldout_peak_N, rule.weights)),
    ]
    offsets = np.searchsorted(regions.image_N, np.arange(len(anomaly_map_BHW) + 1)).astype(np.int32)
    structs = pa.StructArray.from_arrays(values, fields=list(REGION))
    return pa.ListArray.from_arrays(offsets, structs, type=REGIONS)


def _map_box(decoded: DecodedImage) -> list[float] | None:
    """The part of the original that the map covers, in pixels; None for all of it."""
    return None if decoded.box == whole(decoded.height, decoded.width) else list(decoded.box)


def peak(
    anomaly_map_BHW: NDArray[np.float32],
    image_height_B: NDArray[np.int32],
    image_width_B: NDArray[np.int32],
    box_B4: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centres (y, x) of the maps' hottest cells, in pixels of the original images.

    A cell in the padding of a letterbox gives the nearest pixel of the image.

    Args:
        box_B4: the part that each map covers: top, left, bottom and right edge.
    """
    map_height, map_width = anomaly_map_BHW.shape[1:]
    row_B, column_B = np.divmod(anomaly_map_BHW.reshape(len(anomaly_map_BHW), -1).argmax(1), map_width)
    top_B, left_B, bottom_B, right_B = box_B4.T
    y_B = top_B + (row_B + 0.5) * (bottom_B - top_B) / map_height
    x_B = left_B + (column_B + 0.5) * (right_B - left_B) / map_width
    return y_B.clip(0.5, image_height_B - 0.5), x_B.clip(0.5, image_width_B - 0.5)
