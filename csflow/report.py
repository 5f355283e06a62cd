"""The report job: one self-contained HTML page about an archive's scores, with its most anomalous images."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from csflow import maps
from csflow.config import JobConfig
from csflow.errors import ExitStatus, ImageError
from csflow.images import decode
from csflow.inputs.reading import ImageReader
from csflow.scores import ScoringOutput, latest_per_image, open_scores
from csflow.storage import Location

THUMBNAIL_SIDE = 384
HISTOGRAM_BINS = 60
READ_DEADLINE_S = 10.0
"""Per image: a store that is down should cost a report minutes, not hours."""


class ReportConfig(JobConfig):
    """Settings of the report job."""

    scores: str
    """Location of the scores: the `--output` of scoring jobs."""
    output: str = "report.html"
    """HTML file that the report is written to."""
    top: Annotated[int, Field(ge=1)] = 24
    """Images shown, those with the highest anomaly scores."""
    model_id: str | None = None
    """Model whose scores are shown, where the location holds scores of several."""


@dataclass(frozen=True)
class ColourRange:
    """Map values at the ends of the colour scale, the same for all images of a report."""

    vmin: float
    vmax: float


@dataclass(frozen=True)
class Card:
    """One image of the gallery. Pictures are data URIs; `problem` says why there are none."""

    row: dict[str, Any]
    original: str | None = None
    overlay: str | None = None
    aspect_ratio: float = 1.0
    problem: str | None = None

    @property
    def peak_left(self) -> float:
        """Place of the hottest map cell, in percent of the width."""
        return float(100 * self.row["peak_x"] / self.row["image_width"])

    @property
    def peak_top(self) -> float:
        """Place of the hottest map cell, in percent of the height."""
        return float(100 * self.row["peak_y"] / self.row["image_height"])


@dataclass(frozen=True)
class Bar:
    """Images with an anomaly score in [low, high)."""

    low: float
    high: float
    unflagged: int
    flagged: int


@dataclass(frozen=True)
class Histogram:
    """Images by anomaly score, on a logarithmic scale. A place is a fraction of the plot's width."""

    bars: list[Bar]
    tallest: int
    """Images in the tallest bar."""
    score_ticks: list[tuple[float, float]]
    """(score, place) each."""
    count_ticks: list[float]
    threshold: tuple[float, float] | None
    """Lowest score that was flagged, and its place; None if no image was flagged."""


def report(config: ReportConfig) -> ExitStatus:
    """Writes the report to `--output`."""
    page = Location(config.output, config.storage_options)
    page.parent.check_writable()
    output = open_scores(Location(config.scores, config.storage_options), config.model_id)
    # Maps are most of the data: everything but the gallery is made without them.
    columns = ["image_uri", "date", "scored_at", "anomaly_score", "is_anomalous"]
    scored = latest_per_image(output.scores.to_table(columns=columns), "scored_at")
    gallery = _read_gallery(output.scores, scored, config.top)
    colours = colour_range([row["anomaly_map"] for row in gallery if row["anomaly_map"] is not None])
    reader = ImageReader(config.storage_options, deadline_s=READ_DEADLINE_S)
    html = _template().render(
        model_id=output.model_id,
        images=len(scored),
        flagged=pc.sum(scored["is_anomalous"]).as_py() or 0,
        dates=pc.min_max(scored["date"]).as_py(),
        errors=count_errors(output),
        histogram=histogram(scored["anomaly_score"].to_numpy(), scored["is_anomalous"].to_numpy()),
        cards=[_card(row, colours, reader) for row in gallery],
        colours=colours,
        anchors=maps.ANCHORS,
    )
    page.write(html.encode())
    print(f"{config.output}: {len(scored):,} images scored, the {len(gallery)} most anomalous shown")
    return ExitStatus.DONE


def count_errors(output: ScoringOutput) -> dict[str, int]:
    """Images that have no score for an error, by code, the most frequent code first."""
    if output.errors is None:
        return {}
    failed = output.errors.to_table(columns=["image_uri", "image_version", "error_code", "failed_at"])
    failed = latest_per_image(failed, "failed_at")
    scored = output.scores.to_table(
        columns=["image_uri", "image_version", "scored_at"],
        filter=pc.field("image_uri").isin(failed["image_uri"].combine_chunks()),
    )
    both = failed.join(scored, "image_uri", join_type="inner", right_suffix="_scored")
    is_same = pc.equal(both["image_version"], both["image_version_scored"])
    recovered = both.filter(pc.or_(is_same, pc.greater(both["scored_at"], both["failed_at"])))
    is_open = pc.invert(pc.is_in(failed["image_uri"], recovered["image_uri"].combine_chunks()))
    counts = failed.filter(is_open)["error_code"].value_counts().to_pylist()
    return {count["values"]: count["counts"] for count in sorted(counts, key=lambda count: -count["counts"])}


def _read_gallery(scores: ds.Dataset, scored: pa.Table, top: int) -> list[dict[str, Any]]:
    """Full rows of the highest anomaly scores, highest first, each map as an array or None."""
    # A score that is no number is the most anomalous there is.
    order = pc.sort_indices(scored, sort_keys=[("anomaly_score", "descending", "at_start")])
    chosen = scored.take(order[:top])
    wanted = pc.field("image_uri").isin(chosen["image_uri"].unique())
    on_dates = pc.field("date").isin(chosen["date"].unique())
    # Small batches, few ahead: the filter is applied to rows with their maps.
    ahead = {"batch_size": 1024, "batch_readahead": 2, "fragment_readahead": 2}
    found = scores.to_table(filter=on_dates & wanted, **ahead)
    row_of = {row["image_uri"]: row for row in latest_per_image(found, "scored_at").to_pylist()}
    gallery = [row_of[uri] for uri in chosen["image_uri"].to_pylist()]
    for row in gallery:
        if row["anomaly_map"] is not None:
            values = np.array(row["anomaly_map"], dtype=np.float32)
            row["anomaly_map"] = values.reshape(row["map_height"], row["map_width"])
    return gallery


def colour_range(anomaly_maps: Sequence[NDArray[np.float32]]) -> ColourRange | None:
    """A range from what most cells of these maps hold up to the hottest few; None without maps."""
    if not anomaly_maps:
        return None
    values = np.concatenate([anomaly_map.ravel() for anomaly_map in anomaly_maps])
    finite = values[np.isfinite(values)]
    vmin, vmax = np.percentile(finite, [50, 99.5]) if len(finite) else (0.0, 1.0)
    return ColourRange(float(vmin), float(vmax) if vmin < vmax else float(vmin) + 1)


def _card(row: dict[str, Any], colours: ColourRange | None, reader: ImageReader) -> Card:
    try:
        image = _read_thumbnail(row, reader)
    except ImageError as error:
        return Card(row, problem=str(error))
    overlay = None
    if colours is not None and row["anomaly_map"] is not None:
        overlay = _data_uri(maps.overlay(image, row["anomaly_map"], vmin=colours.vmin, vmax=colours.vmax))
    return Card(row, _data_uri(image), overlay, aspect_ratio=image.width / image.height)


def _read_thumbnail(row: dict[str, Any], reader: ImageReader) -> Image.Image:
    """The image version that was scored, small. Raises ImageError if it can no longer be read."""
    sides = np.array([row["image_height"], row["image_width"]])
    height, width = np.maximum(1, sides * min(1.0, THUMBNAIL_SIDE / sides.max())).round().astype(int).tolist()
    data = reader.read(row["image_uri"], row["image_version"])
    return Image.fromarray(decode(data, (height, width)).pixels_HWC)


def _data_uri(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()


def histogram(anomaly_scores: NDArray[np.float64], is_anomalous: NDArray[np.bool_]) -> Histogram | None:
    """Counts images by score; a logarithmic scale, as defects score many times what normal images do.

    None if there is nothing to show: only positive, finite scores have a place on the scale.
    """
    shown = np.isfinite(anomaly_scores) & (anomaly_scores > 0)
    scores, flagged = anomaly_scores[shown], is_anomalous[shown]
    if not len(scores):
        return None
    lowest, highest = scores.min() * 0.98, scores.max() * 1.02
    edges = np.geomspace(lowest, highest, HISTOGRAM_BINS + 1)
    unflagged_counts, flagged_counts = (np.histogram(scores[part], edges)[0] for part in (~flagged, flagged))
    columns = zip(edges[:-1], edges[1:], unflagged_counts, flagged_counts, strict=True)

    def placed(score: float) -> tuple[float, float]:
        return score, float(np.log(score / lowest) / np.log(highest / lowest))

    tallest = int((unflagged_counts + flagged_counts).max())
    return Histogram(
        bars=[Bar(float(low), float(high), int(rest), int(flag)) for low, high, rest, flag in columns],
        score_ticks=[placed(score) for score in _score_ticks(lowest, highest)],
        tallest=tallest,
        count_ticks=[tick for tick in _round_numbers(0, tallest, at_most=4) if tick.is_integer()],
        threshold=placed(float(scores[flagged].min())) if flagged.any() else None,
    )


def _score_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10 and so on, or evenly spaced round numbers where the range is narrow."""
    exponents = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))))
    ticks = [digit * 10.0**exponent for exponent in exponents for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    return ticks if len(ticks) >= 3 else _round_numbers(low, high, at_most=6)


def _round_numbers(low: float, high: float, at_most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from low to high."""
    power = 10.0 ** np.floor(np.log10((high - low) / at_most))
    step = next(power * digit for digit in (1, 2, 5, 10, 20) if (high - low) / (power * digit) <= at_most)
    return [float(tick) for tick in np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step]


def _template() -> jinja2.Template:
    # Image URIs and error messages come from outside: everything is escaped.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")
