"""Region-level metrics: how many defects are found by regions, and how many regions are false."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from csflow.evaluation.ranking import Interval, mean_interval, share
from csflow.regions import EIGHT_NEIGHBOURS, region_pixels

SIDES = (8, 16, 32, 64)
"""Classes of size: sides in pixels of a square with the area of a defect."""


class RegionCounts:
    """Counts of defects, which are connected pixels of a mask, and of regions (column `regions`).

    A defect is found if a region covers a pixel of it, and a region is right if it covers one of a defect.
    """

    def __init__(self) -> None:
        self._areas: list[int] = []
        self._is_found: list[bool] = []
        self._is_right: list[bool] = []
        self._on_normal: list[int] = []

    def add(
        self,
        row: Mapping[str, Any],
        anomaly_map: NDArray[np.float32],
        is_defective_HW: NDArray[np.bool_] | None,
    ) -> None:
        """Counts one row of `scores`. One without regions, of an older csflow or model, is passed over.

        Args:
            anomaly_map: its map, shape (map_height, map_width).
            is_defective_HW: its mask; None if the image is normal.
        """
        if row["region_threshold"] is None:
            return
        if is_defective_HW is None:
            self._on_normal.append(len(row["regions"]))
            return
        height, width = is_defective_HW.shape
        region_HW = region_pixels(anomaly_map, row["region_threshold"], height, width, row["map_box"])
        defect_HW, defects = ndimage.label(is_defective_HW, EIGHT_NEIGHBOURS)
        of_defect = np.arange(1, defects + 1)
        self._areas += np.bincount(defect_HW.ravel())[1:].tolist()
        self._is_found += np.isin(of_defect, defect_HW[region_HW > 0]).tolist()
        of_region = np.arange(1, len(row["regions"]) + 1)
        self._is_right += np.isin(of_region, region_HW[is_defective_HW]).tolist()

    def metrics(self, resamples: int, seed: int) -> dict[str, Any] | None:
        """The metrics; None if no image of either kind was counted.

        Args:
            resamples: number of bootstrap resamples for the interval of a mean.
            seed: that of the resamples.
        """
        if not (self._areas and self._on_normal):
            return None
        is_found, side = np.array(self._is_found), np.sqrt(self._areas)
        edges = [0, *SIDES, np.inf]
        by_side = [
            {"from_side": low, "to_side": high if np.isfinite(high) else None} | _recall(is_found[chosen])
            for low, high in pairwise(edges)
            if (chosen := (side >= low) & (side < high)).any()
        ]
        on_normal = np.array(self._on_normal)
        mean, interval = mean_interval(on_normal, resamples, seed)
        any_region, any_interval = share(on_normal > 0)
        return {
            "defects": _recall(is_found),
            "defects_by_side": by_side,
            "regions_on_defective_images": len(self._is_right),
            "precision_on_defective_images": _rate(self._is_right),
            "normal_images": len(on_normal),
            "false_regions_per_normal_image": {"mean": mean, "interval": interval},
            "normal_images_with_regions": {"share": any_region, "interval": any_interval},
        }


def _recall(is_found: Sequence[bool] | NDArray[np.bool_]) -> dict[str, Any]:
    return {"defects": len(is_found), "recall": _rate(is_found)}


def _rate(chosen: Sequence[bool] | NDArray[np.bool_]) -> dict[str, float | Interval] | None:
    """The share of true values with its exact 95 % interval; None of nothing."""
    if not len(chosen):
        return None
    value, interval = share(chosen)
    return {"share": value, "interval": interval}
