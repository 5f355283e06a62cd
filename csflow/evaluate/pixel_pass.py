"""The pass over anomaly maps and masks: every labelled image once, in bounded memory."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow.dataset as ds
from numpy.typing import NDArray

from csflow.errors import ErrorCode, ImageError, WrongUse
from csflow.evaluate.labels import Label, LabelledScore, among
from csflow.evaluate.masks import MaskReader
from csflow.evaluate.pixel_metrics import FPR_LIMIT, PixelHistograms

MASK_THREADS = 8
MAP_BATCH_ROWS = 64


def pixel_metrics(
    dataset: ds.Dataset, scored: Mapping[str, LabelledScore], masks: "Masks"
) -> tuple[PixelHistograms | None, dict[str, Any]]:
    """Histograms and metrics of all images whose defective pixels are known; None if there is no mask.

    Raises:
        WrongUse: maps are missing, or a mask is missing, unreadable, empty or of another size.
    """
    histograms, images = PixelHistograms(), {"normal": 0, "with_mask": 0, "without_mask": 0}
    if not any(image.label.mask_uri for image in scored.values()):
        return None, {"images": images}
    without_map: list[str] = []
    for row, mask in masks.read(_latest_maps(dataset, scored), scored):
        is_defective = scored[row["image_uri"]].label.is_defective
        if mask is None and is_defective:
            images["without_mask"] += 1
            continue
        images["with_mask" if is_defective else "normal"] += 1
        if row["anomaly_map"] is None:
            without_map.append(row["image_uri"])
            continue
        map_HW = np.asarray(row["anomaly_map"]).reshape(row["map_height"], row["map_width"])
        if mask is None:
            mask = np.zeros((row["image_height"], row["image_width"]), bool)
        histograms.add(map_HW, mask, row["map_box"])
    if not images["with_mask"]:
        return None, {"images": images}
    if without_map:
        raise WrongUse(
            f"{len(without_map)} images, {without_map[0]} first, were scored without an anomaly map; score "
            "them into another --output with --maps native, or pass --no-pixel_metrics"
        )
    auroc, aupro = histograms.auroc(), histograms.aupro()
    return histograms, {
        "images": images,
        "regions": histograms.regions,
        "normal_pixels": histograms.normal_pixels,
        "defective_pixels": histograms.defective_pixels,
        "metrics": {"pixel_auroc": auroc.value, "aupro": aupro.value},
        "binning_error": {"pixel_auroc": auroc.binning_error, "aupro": aupro.binning_error},
        "aupro_fpr_limit": FPR_LIMIT,
    }


def _latest_maps(dataset: ds.Dataset, scored: Mapping[str, LabelledScore]) -> Iterator[list[dict[str, Any]]]:
    """The labelled images' latest rows, in batches: all maps of an archive need not fit into memory."""
    columns = ["image_uri", "scored_at", "image_height", "image_width"]
    columns += ["anomaly_map", "map_height", "map_width", "map_box"]
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
    """Reads the masks of batches of rows in threads, and checks them."""

    def __init__(self, storage_options: Mapping[str, Any], must_exist: bool) -> None:
        """`must_exist`: a label table has named them; a folder layout only says where they may be."""
        self._reader = MaskReader(storage_options)
        self._must_exist = must_exist

    def read(
        self, batches: Iterator[list[dict[str, Any]]], scored: Mapping[str, LabelledScore]
    ) -> Iterator[tuple[dict[str, Any], NDArray[np.bool_] | None]]:
        """Yields rows with their masks, None where there is none."""
        with ThreadPoolExecutor(MASK_THREADS, thread_name_prefix="masks") as pool:
            for rows in batches:
                labels = [scored[row["image_uri"]].label for row in rows]
                yield from zip(rows, pool.map(self._read, rows, labels), strict=True)

    def _read(self, row: Mapping[str, Any], label: Label) -> NDArray[np.bool_] | None:
        if label.mask_uri is None:
            return None
        try:
            mask_HW = self._reader.read(label.mask_uri)
        except ImageError as error:
            if error.code == ErrorCode.NOT_FOUND and not self._must_exist:
                return None
            raise WrongUse(
                f"mask {label.mask_uri} cannot be read ({error}); correct it or leave it out"
            ) from None
        size = (row["image_height"], row["image_width"])
        if mask_HW.shape != size:
            sizes = [f"{height} x {width}" for height, width in (mask_HW.shape, size)]
            raise WrongUse(
                f"mask {label.mask_uri} has {sizes[0]} pixels, its image {row['image_uri']} has {sizes[1]}; "
                "a mask must have the size of its image"
            )
        if mask_HW.any() != label.is_defective:
            what = "marks no pixel of a defective" if label.is_defective else "marks pixels of a normal"
            raise WrongUse(f"mask {label.mask_uri} {what} image, {row['image_uri']}; correct mask or label")
        return mask_HW
