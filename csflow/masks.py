"""The masks job: writes the regions of scored images as masks, for labelling tools."""

import io
import json
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as ds
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from csflow.config import JobConfig
from csflow.errors import ExitStatus, WrongUse
from csflow.maps import map_of
from csflow.output.reading import latest_per_image, of_run, open_scores
from csflow.regions import region_pixels
from csflow.storage import Location

WRITE_THREADS = 8
BATCH_ROWS = 64
COCO_FILE = "coco.json"


class MasksConfig(JobConfig):
    """Settings of `csflow masks`."""

    scores: str
    """Location of the scores: the `--output` of scoring jobs."""
    output: str
    """Folder to write the masks to."""
    format: Literal["coco", "png"] = "coco"
    """`coco`: one file coco.json with a mask (run-length encoded) and a box for each region. `png`: for each
    image a file `<image>_mask.png` of its size, 255 where a region is and 0 elsewhere."""
    run_id: str | None = None
    """Only images that this run scored; `latest` is the last run. [default: all images]"""
    model_id: str | None = None
    """Model whose regions are written, needed if --scores holds several models."""


def write_masks(config: MasksConfig) -> ExitStatus:
    """Writes masks of all images that have a region, each with its latest score.

    Raises:
        WrongUse: there are no scores, no such run or model, no regions, or no maps to take their shape from.
    """
    target = Location(config.output, config.storage_options)
    target.check_writable()
    output = open_scores(Location(config.scores, config.storage_options), config.model_id)
    scores, _ = of_run(output, config.run_id)
    keys = scores.to_table(columns=["image_uri", "scored_at"], filter=pc.field("region_threshold").is_valid())
    if not keys.num_rows:
        raise WrongUse(
            f"{config.scores} holds no regions: the model has too few held-out images or no whitening, or an "
            "older csflow scored; score anew with a model that this csflow trained"
        )
    keys = latest_per_image(keys, "scored_at")
    latest = dict(zip(keys["image_uri"].to_pylist(), keys["scored_at"].to_pylist(), strict=True))
    rows = _rows_with_regions(scores, latest)
    written = _write_coco(rows, target) if config.format == "coco" else _write_pngs(rows, target, latest)
    print(f"{written:,} of {len(latest):,} images have regions; their masks are in {target}")
    return ExitStatus.DONE


def _rows_with_regions(scores: ds.Dataset, latest: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The latest row of each image, if it has a region."""
    columns = ["image_uri", "image_height", "image_width", "scored_at", "region_threshold", "regions"]
    columns += ["anomaly_map", "map_height", "map_width", "map_box"]
    has_region = pc.list_value_length(pc.field("regions")) > 0
    ahead = {"batch_size": BATCH_ROWS, "batch_readahead": 2, "fragment_readahead": 1}
    for batch in scores.to_batches(columns=columns, filter=has_region, **ahead):
        for row in batch.to_pylist():
            if latest.get(row["image_uri"]) == row["scored_at"]:
                yield row


def _region_pixels(row: Mapping[str, Any]) -> NDArray[np.int64]:
    anomaly_map = map_of(row)
    if anomaly_map is None:
        raise WrongUse(
            f"{row['image_uri']} was scored without an anomaly map, which has the shape of its regions; "
            "score into another --output with --maps native"
        )
    height, width = row["image_height"], row["image_width"]
    return region_pixels(anomaly_map, row["region_threshold"], height, width, row["map_box"])


def _write_pngs(rows: Iterator[dict[str, Any]], target: Location, uris: Mapping[str, Any]) -> int:
    """Writes a PNG per row; returns their number."""
    names = _names(uris)
    stems = {uri: posixpath.splitext(name)[0] for uri, name in names.items()}
    uses = Counter(stems.values())

    def write(row: Mapping[str, Any]) -> None:
        uri = row["image_uri"]
        # Of a.png and a.jpg in one folder both keep their suffix.
        stem = stems[uri] if uses[stems[uri]] == 1 else names[uri]
        data = io.BytesIO()
        Image.fromarray((_region_pixels(row) > 0).astype(np.uint8) * 255).save(data, "PNG")
        (target / f"{stem}_mask.png").write(data.getvalue())

    with ThreadPoolExecutor(WRITE_THREADS) as pool:
        return sum(1 for _ in pool.map(write, rows))


def _write_coco(rows: Iterator[dict[str, Any]], target: Location) -> int:
    """Writes the COCO file; returns the number of its images."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for row in rows:
        size = {"height": row["image_height"], "width": row["image_width"]}
        images.append({"id": len(images) + 1, "file_name": "", "coco_url": row["image_uri"], **size})
        for found in _annotations(row):
            of_image = {"id": len(annotations) + 1, "image_id": len(images), "category_id": 1, "iscrowd": 0}
            annotations.append(of_image | found)
    names = _names({image["coco_url"]: None for image in images})
    for image in images:
        image["file_name"] = names[image["coco_url"]]
    content = {
        "info": {"description": "regions of csflow"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "defect"}],
    }
    (target / COCO_FILE).write(json.dumps(content).encode())
    return len(images)


def _annotations(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What COCO says of each region that covers the centre of a pixel."""
    region_HW = _region_pixels(row)
    counts = _run_lengths(region_HW)
    for number, place in enumerate(ndimage.find_objects(region_HW), start=1):
        if place is None:
            continue
        rows, columns = place
        region = row["regions"][number - 1]
        yield {
            "segmentation": {"size": list(region_HW.shape), "counts": counts[number]},
            "area": sum(counts[number][1::2]),
            "bbox": [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start],
            **{name: region[name] for name in ("peak", "mean", "p_value")},
        }


def _run_lengths(region_HW: NDArray[np.int64]) -> dict[int, list[int]]:
    """COCO's run lengths of each region: of pixels outside and inside in turn, column by column."""
    region_P = region_HW.ravel(order="F")
    starts = np.flatnonzero(np.diff(region_P, prepend=-1))
    ends = np.append(starts[1:], len(region_P))
    counts = {}
    for number in np.unique(region_P[starts]).tolist():
        if number:
            is_own = region_P[starts] == number
            edges = np.stack([starts[is_own], ends[is_own]], axis=1).ravel()
            counts[number] = np.diff(edges, prepend=0, append=len(region_P)).tolist()
    return counts


def _names(uris: Mapping[str, Any]) -> dict[str, str]:
    """A file name for each image: what its URI has behind the folder that all have in common."""
    paths = {uri: uri.replace("!/", "/").replace("#", "-") for uri in uris}
    folders = posixpath.commonprefix([path.split("/")[:-1] for path in paths.values()])
    return {uri: "/".join(path.split("/")[len(folders) :]) for uri, path in paths.items()}
