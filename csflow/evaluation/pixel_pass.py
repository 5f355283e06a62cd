"""The pass over anomaly maps and masks, which reads every labelled image once, in bounded memory."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow.dataset as ds

from csflow.errors import ErrorCode, ImageError, WrongUse
from csflow.evaluation.labels import Label, LabelledScore, among
from csflow.evaluation.masks import Mask, MaskReader
from csflow.evaluation.pixel_metrics import FPR_LIMIT, PixelHistograms
from csflow.evaluation.region_metrics import RegionCounts

MASK_THREADS = 8
MAP_BATCH_ROWS = 64
IMAGE_COUNTS = ("normal", "with_mask", "without_mask", "empty_mask", "thresholded_mask")
"""Counts of images in the result. Images of `empty_mask` are also in `without_mask`."""


def pixel_metrics(
    dataset: ds.Dataset, scored: Mapping[str, LabelledScore], masks: "Masks", regions: RegionCounts
) -> tuple[PixelHistograms | None, dict[str, Any]]:
    """Histograms and metrics of all images whose defective pixels are known; None if there is no mask.

    Args:
        regions: counts the regions of these images, too.

    Raises:
        WrongUse: maps are missing, or a mask is missing, unreadable or of another size, or marks pixels of a
            normal image.
    """
    histograms, images = PixelHistograms(), dict.fromkeys(IMAGE_COUNTS, 0)
    empty_masks: list[str] = []
    if not any(image.label.mask_uri for image in scored.values()):
        return None, {"images": images, "empty_masks": empty_masks}
    without_map: list[str] = []
    for row, mask in masks.read(_latest_maps(dataset, scored), scored):
        label = scored[row["image_uri"]].label
        images["thresholded_mask"] += mask is not None and mask.is_thresholded
        if label.is_defective and not (mask and mask.is_defective_HW.any()):
            images["without_mask"] += 1
            if mask and label.mask_uri:
                images["empty_mask"] += 1
                empty_masks.append(label.mask_uri)
            continue
        images["with_mask" if label.is_defective else "normal"] += 1
        if row["anomaly_map"] is None:
            without_map.append(row["image_uri"])
            continue
        map_HW = np.asarray(row["anomaly_map"]).reshape(row["map_height"], row["map_width"])
        size = (row["image_height"], row["image_width"])
        histograms.add(map_HW, mask.is_defective_HW if mask else np.zeros(size, bool), row["map_box"])
        regions.add(row, map_HW, mask.is_defective_HW if mask and label.is_defective else None)
    if not images["with_mask"]:
        return None, {"images": images, "empty_masks": empty_masks}
    if without_map:
        raise WrongUse(
            f"{len(without_map)} images, {without_map[0]} first, were scored without an anomaly map; score "
            "them into another --output with --maps native, or pass --no-pixel_metrics"
        )
    auroc, aupro = histograms.auroc(), histograms.aupro()
    return histograms, {
        "images": images,
        "empty_masks": empty_masks,
        "regions": histograms.regions,
        "normal_pixels": histograms.normal_pixels,
        "defective_pixels": histograms.defective_pixels,
        "metrics": {"pixel_auroc": auroc.value, "aupro": aupro.value},
        "binning_error": {"pixel_auroc": auroc.binning_error, "aupro": aupro.binning_error},
        "aupro_fpr_limit": FPR_LIMIT,
    }


def _latest_maps(dataset: ds.Dataset, scored: Mapping[str, LabelledScore]) -> Iterator[list[dict[str, Any]]]:
    """The latest rows of the labelled images, in batches, since all maps of an archive may exceed memory."""
    columns = ["image_uri", "scored_at", "image_height", "image_width"]
    columns += ["anomaly_map", "map_height", "map_width", "map_box"]
    columns += ["region_threshold", "regions"]
    left = {uri: image.scored_at for uri, image in scored.items()}
    batches = dataset.to_batches(
        columns=columns,
        filter=among(scored),
        batch_size=MAP_BATCH_ROWS,
        batch_readahead=2,
        fragment_readahead=1,
    )
    for batch in batches:
        rows = []
        for row, anomaly_map in zip(
            batch.drop_columns(["anomaly_map"]).to_pylist(), batch["anomaly_map"], strict=True
        ):
            if left.get(row["image_uri"]) == row["scored_at"]:
                del left[row["image_uri"]]
                values = anomaly_map.values.to_numpy() if anomaly_map.is_valid else None
                rows.append(row | {"anomaly_map": values})
        yield rows


class Masks:
    """Reads and checks the masks of batches of rows, in threads."""

    def __init__(self, storage_options: Mapping[str, Any], must_exist: bool) -> None:
        """`must_exist`: whether a missing mask is an error, as with label tables but not with layouts."""
        self._reader = MaskReader(storage_options)
        self._must_exist = must_exist

    def read(
        self, batches: Iterator[list[dict[str, Any]]], scored: Mapping[str, LabelledScore]
    ) -> Iterator[tuple[dict[str, Any], Mask | None]]:
        """Yields each row with its mask, or with None if the image has none."""
        with ThreadPoolExecutor(MASK_THREADS, thread_name_prefix="masks") as pool:
            for rows in batches:
                labels = [scored[row["image_uri"]].label for row in rows]
                yield from zip(rows, pool.map(self._read, rows, labels), strict=True)

    def _read(self, row: Mapping[str, Any], label: Label) -> Mask | None:
        if label.mask_uri is None:
            return None
        try:
            mask = self._reader.read(label.mask_uri)
        except ImageError as error:
            if error.code == ErrorCode.NOT_FOUND and not self._must_exist:
                return None
            raise WrongUse(
                f"mask {label.mask_uri} cannot be read ({error}); correct it or leave it out"
            ) from None
        size = (row["image_height"], row["image_width"])
        if mask.is_defective_HW.shape != size:
            sizes = [f"{height} x {width}" for height, width in (mask.is_defective_HW.shape, size)]
            raise WrongUse(
                f"mask {label.mask_uri} has {sizes[0]} pixels, its image {row['image_uri']} has {sizes[1]}; "
                "a mask must have the size of its image"
            )
        if not label.is_defective and mask.is_defective_HW.any():
            raise WrongUse(
                f"mask {label.mask_uri} marks pixels of a normal image, {row['image_uri']}; correct mask or "
                "label"
            )
        return mask
