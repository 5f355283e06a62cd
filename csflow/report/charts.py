"""Turns columns of scores into what the page draws: histogram, time line, folders, and where anomalies occur.

A position is a fraction of the plot's width or height.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from numpy.typing import ArrayLike, NDArray

from csflow.maps import box_of, map_of, resample
from csflow.preprocessing import Box

HISTOGRAM_BINS = 60
TIMES_SHOWN = 90
"""Number of days, or runs, in the time line: about a quarter of a year of nights."""
FOLDERS_SHOWN = 8
LARGEST_GRID = 96
"""Largest side of a heat map in cells. Larger maps, and maps of several sizes, get the `COMMON_GRID`."""
COMMON_GRID = (32, 32)
MAPS_READ = 50_000
"""Largest number of rows in the heat map: the latest days of a large archive."""
REFERENCE_MAPS = 4_000
"""Number of unflagged images' maps that define what is hot; with 24 by 24 cells, they take 9 MB."""


@dataclass(frozen=True)
class Bar:
    """Images with an anomaly score in [low, high)."""

    low: float
    high: float
    unflagged: int
    flagged: int
    expected: float
    """Number of images in this bar if all scored as the held-out images did."""


@dataclass(frozen=True)
class Histogram:
    """Histogram of images by anomaly score, on a logarithmic scale."""

    bars: list[Bar]
    tallest: float
    """Height of the plot, as a number of images."""
    score_ticks: list[tuple[float, float]]
    """A (score, position) for each tick."""
    count_ticks: list[float]
    threshold: tuple[float, float] | None
    """The lowest score that was flagged, and its position; None if no image was flagged."""
    is_calibrated: bool
    """Whether bars have an `expected` number."""


def histogram(
    anomaly_scores: NDArray[np.float64],
    is_anomalous: NDArray[np.bool_],
    calibration_scores: ArrayLike | None = None,
) -> Histogram | None:
    """Counts images by score, on a logarithmic scale, since defects score many times what normal images do.

    None if no score is positive and finite, since only such scores have a position on the scale.
    """
    scores, flagged = _positive(anomaly_scores), is_anomalous[_is_positive(anomaly_scores)]
    if not len(scores):
        return None
    held_out = _positive(np.asarray([] if calibration_scores is None else calibration_scores))
    lowest = min(scores.min(), held_out.min(initial=np.inf)) * 0.98
    highest = max(scores.max(), held_out.max(initial=0.0)) * 1.02
    edges = np.geomspace(lowest, highest, HISTOGRAM_BINS + 1)
    unflagged_counts, flagged_counts, held_out_counts = (
        np.histogram(part, edges)[0] for part in (scores[~flagged], scores[flagged], held_out)
    )
    expected = held_out_counts * (len(scores) / max(1, len(held_out)))

    def placed(score: float) -> tuple[float, float]:
        return score, float(np.log(score / lowest) / np.log(highest / lowest))

    tallest = float(max((unflagged_counts + flagged_counts).max(), expected.max()))
    columns = zip(pairwise(edges.tolist()), unflagged_counts, flagged_counts, expected, strict=True)
    return Histogram(
        bars=[
            Bar(*ends, int(rest), int(flag), float(of_normals)) for ends, rest, flag, of_normals in columns
        ],
        score_ticks=[placed(score) for score in _score_ticks(lowest, highest)],
        tallest=tallest,
        count_ticks=[tick for tick in _round_numbers(0, tallest, at_most=4) if tick.is_integer()],
        threshold=placed(float(scores[flagged].min())) if flagged.any() else None,
        is_calibrated=len(held_out) > 0,
    )


def _is_positive(scores: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.isfinite(scores) & (scores > 0)


def _positive(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    return scores[_is_positive(scores)]


def _score_ticks(low: float, high: float) -> list[float]:
    """Ticks at 1, 2, 5, 10 and so on, or at evenly spaced round numbers if the range is narrow."""
    exponents = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))))
    ticks = [digit * 10.0**exponent for exponent in exponents for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    return ticks if len(ticks) >= 4 else _round_numbers(low, high, at_most=6)


def _round_numbers(low: float, high: float, at_most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from low to high."""
    power = 10.0 ** np.floor(np.log10((high - low) / at_most))
    step = next(power * digit for digit in (1, 2, 5, 10, 20) if (high - low) / (power * digit) <= at_most)
    return [float(tick) for tick in np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step]


@dataclass(frozen=True)
class Period:
    """The images of one day or one run."""

    name: str
    images: int
    flagged: int
    low: float
    median: float
    high: float
    """5th, 50th and 95th percentile of the anomaly scores."""

    @property
    def flagged_share(self) -> float:
        return self.flagged / self.images


@dataclass(frozen=True)
class TimeLine:
    """Scores and flags over the last `TIMES_SHOWN` days, or runs if there is one day."""

    by: str
    """The period: `day` or `run`."""
    periods: list[Period]
    share_ticks: list[float]
    score_ticks: list[float]
    score_range: tuple[float, float]
    """Ends of the logarithmic scale of scores."""

    @property
    def highest_share(self) -> float:
        """Upper end of the scale of shares."""
        return self.share_ticks[-1]

    def score_position(self, score: float) -> float:
        """Position of a score: 0 is the bottom, 1 the top."""
        low, high = self.score_range
        return float(np.log(score / low) / np.log(high / low))


def time_line(images: pa.Table) -> TimeLine | None:
    """The time line; None if there is only one run, or no image."""
    by = "day" if pc.count_distinct(images["date"]).as_py() > 1 else "run"
    column = images["date"].cast(pa.string()) if by == "day" else images["run_id"]
    periods = list(_periods(images, column))
    if len(periods) < 2:
        return None
    low, high = min(m.low for m in periods) * 0.95, max(m.high for m in periods) * 1.05
    highest = max(period.flagged_share for period in periods) or 0.01
    ticks = _round_numbers(0, highest, at_most=3)
    if ticks[-1] < highest:
        ticks.append(2 * ticks[-1] - ticks[-2])
    return TimeLine(by, periods, ticks, _score_ticks(low, high), (low, high))


def _periods(images: pa.Table, column: pa.ChunkedArray) -> Iterator[Period]:
    scores, flagged = images["anomaly_score"].to_numpy(), images["is_anomalous"].to_numpy()
    coded = column.combine_chunks().dictionary_encode()
    names, codes = coded.dictionary.to_pylist(), coded.indices.to_numpy()
    for name in sorted(names)[-TIMES_SHOWN:]:
        here = codes == names.index(name)
        shown = _positive(scores[here])
        if len(shown):
            low, median, high = np.percentile(shown, [5, 50, 95]).tolist()
            yield Period(name, int(here.sum()), int(flagged[here].sum()), low, median, high)


@dataclass(frozen=True)
class Folder:
    """The images directly in one folder, in one folder of an archive, or in one Parquet file."""

    path: str
    """As `parents` gives it."""
    name: str
    """The path without the part that all folders share."""
    images: int
    flagged: int
    listed: int
    median: float | None
    """Median of the anomaly scores that are numbers."""

    @property
    def flagged_share(self) -> float:
        return self.flagged / self.images


def folders(images: pa.Table, is_listed: NDArray[np.bool_]) -> tuple[list[Folder], int]:
    """The folders with the most flagged images, sorted, and the number of all; empty if there is one."""
    columns = {"parent": parents(images["image_uri"]), "flagged": images["is_anomalous"].cast(pa.int64())}
    columns |= {"listed": pa.array(is_listed).cast(pa.int64()), "score": images["anomaly_score"]}
    sums = [("flagged", "sum"), ("listed", "sum"), ("score", "count"), ("score", "approximate_median")]
    table = pa.table(columns).group_by("parent").aggregate(sums)
    if len(table) < 2:
        return [], len(table)
    common = len(_common_folder(table["parent"].to_pylist()))
    order = [("flagged_sum", "descending"), ("score_count", "descending"), ("parent", "ascending")]
    shown = [
        Folder(
            row["parent"],
            row["parent"][common:].rstrip("/") or ".",
            row["score_count"],
            row["flagged_sum"],
            row["listed_sum"],
            row["score_approximate_median"],
        )
        for row in table.sort_by(order).slice(0, FOLDERS_SHOWN).to_pylist()
    ]
    return shown, len(table)


def parents(image_uris: pa.ChunkedArray) -> pa.ChunkedArray:
    """The path of the folder that each image lies directly in, or in an archive; or of the Parquet file."""
    is_row = pc.match_substring_regex(image_uris, r"#\d+$")
    folder = pc.replace_substring_regex(image_uris, r"[^/]*$", "")
    return pc.if_else(is_row, pc.replace_substring_regex(image_uris, r"#\d+$", ""), folder)


def _common_folder(paths: Sequence[str]) -> str:
    lowest, highest = min(paths), max(paths)
    same = next((i for i, (a, b) in enumerate(zip(lowest, highest, strict=False)) if a != b), len(lowest))
    return lowest[: lowest.rfind("/", 0, same) + 1]


@dataclass(frozen=True)
class HeatMap:
    """Where on the images anomalies occur."""

    hot_share_HW: NDArray[np.float32]
    """Share of the flagged images whose map is hot in the cell; of shape (map_height, map_width) if
    all maps have the same and none is large, else of `COMMON_GRID`."""
    flagged: int
    """Number of flagged images in the heat map."""
    hot_from: float
    """The map value that one in a hundred cells of unflagged images reaches."""

    @property
    def hottest(self) -> tuple[float, float, float]:
        """Centre (y, x) of the hottest cell, in fractions of the image, and its share."""
        height, width = self.hot_share_HW.shape
        row, column = divmod(int(self.hot_share_HW.argmax()), width)
        return (row + 0.5) / height, (column + 0.5) / width, float(self.hot_share_HW.max())

    @property
    def hot_images(self) -> list[int]:
        """Number of flagged images that are hot in each cell, row by row."""
        return (self.hot_share_HW * self.flagged).round().astype(int).ravel().tolist()

    def hot_cells(self, row: Mapping[str, Any]) -> NDArray[np.bool_]:
        """In which cells a row of `scores` is hot, row by row; none without a map."""
        anomaly_map = map_of(row)
        if anomaly_map is None:
            return np.zeros(self.hot_share_HW.size, dtype=bool)
        anomaly_map = _not_large(anomaly_map)
        hot_HW = _on_image(~(anomaly_map < self.hot_from), box_of(row, *anomaly_map.shape))
        return _on_grid(hot_HW, self.hot_share_HW.shape).ravel()


def heat_map(scores: ds.Dataset) -> HeatMap | None:
    """The heat map of these rows, at most `MAPS_READ`; None without flagged images or without maps."""
    flagged_maps: list[NDArray[np.float32]] = []
    flagged_boxes: list[Box | None] = []
    unflagged_maps: list[NDArray[np.float32]] = []
    rows = unflagged = 0
    # Small batches, few ahead: all of a row group's maps are held as often as there are.
    ahead = {"batch_size": 1024, "batch_readahead": 2, "fragment_readahead": 2}
    columns = ["is_anomalous", "anomaly_map", "map_height", "map_width"]
    columns += ["image_height", "image_width", "map_box"]
    for batch in scores.to_batches(columns=columns, filter=pc.field("anomaly_map").is_valid(), **ahead):
        rows += len(batch)
        flagged = batch.filter(batch["is_anomalous"])
        of_batch = _maps(flagged)
        flagged_maps += of_batch
        flagged_boxes += _boxes(flagged, [anomaly_map.shape for anomaly_map in of_batch])
        if unflagged < REFERENCE_MAPS:
            reference = _maps(batch.filter(pc.invert(batch["is_anomalous"])))
            unflagged_maps += reference
            unflagged += len(reference)
        if rows >= MAPS_READ:
            break
    if not flagged_maps or not unflagged_maps:
        return None
    cells = np.concatenate([anomaly_map.ravel() for anomaly_map in unflagged_maps])
    hot_from = float(np.percentile(cells[np.isfinite(cells)], 99))
    # A cell that is no number is as hot as can be.
    hot = [
        _on_image(~(anomaly_map < hot_from), box)
        for anomaly_map, box in zip(flagged_maps, flagged_boxes, strict=True)
    ]
    if len({hot_HW.shape for hot_HW in hot}) > 1:
        hot = [_on_grid(hot_HW, COMMON_GRID) for hot_HW in hot]
    hot_share_HW = np.mean(hot, axis=0)
    return HeatMap(hot_share_HW.astype(np.float32), len(flagged_maps), hot_from)


def _maps(rows: pa.RecordBatch) -> list[NDArray[np.float32]]:
    """The maps, one per row."""
    shapes = zip(rows["map_height"].to_pylist(), rows["map_width"].to_pylist(), strict=True)
    return [
        _not_large(cells.values.to_numpy(zero_copy_only=False).reshape(shape))
        for cells, shape in zip(rows["anomaly_map"], shapes, strict=True)
    ]


def _boxes(rows: pa.RecordBatch, shapes: Sequence[tuple[int, ...]]) -> list[Box | None]:
    """The box of the image that each map covers, in cells of a map that would cover the whole image."""
    columns = ["image_height", "image_width", "map_box"]
    return [box_of(row, *shape) for row, shape in zip(rows.select(columns).to_pylist(), shapes, strict=True)]


def _not_large(anomaly_map: NDArray[np.float32]) -> NDArray[np.float32]:
    """The map, on the common grid if it is larger than a heat map may be."""
    return _on_grid(anomaly_map, COMMON_GRID) if max(anomaly_map.shape) > LARGEST_GRID else anomaly_map


def _on_grid(map_HW: NDArray[Any], grid: tuple[int, ...]) -> NDArray[Any]:
    """The largest value of the map's cells that lie in each cell of a grid."""
    for axis, (cells, wanted) in enumerate(zip(map_HW.shape, grid, strict=True)):
        if cells != wanted:
            edges = [(i * cells // wanted, -(-(i + 1) * cells // wanted)) for i in range(wanted)]
            parts = [map_HW.take(range(start, end), axis).max(axis) for start, end in edges]
            map_HW = np.stack(parts, axis)
    return map_HW


def _on_image(hot_HW: NDArray[np.bool_], box: Box | None) -> NDArray[np.bool_]:
    """The map's cells moved to where they lie on the image, on a grid as fine as the map."""
    if box is None:
        return hot_HW
    height, width = hot_HW.shape
    # A cell of the grid may be made of two of the map, one of them hot.
    return resample(hot_HW.astype(np.float32), height, width, box) > 0.3
