"""Puts a report into one HTML file that needs nothing else, neither files nor a network."""

import base64
import hashlib
import io
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

import csflow
from csflow import calibration, maps
from csflow.maps import ColourRange
from csflow.report import charts
from csflow.report.archive import Archive
from csflow.report.charts import Folder, HeatMap, Histogram, TimeLine
from csflow.report.defects import DefectList
from csflow.report.gallery import Card

FOLDER = Path(__file__).parent
SCRIPTS = ("page.theme.js", "page.gallery.js", "page.verdicts.js", "page.charts.js", "page.js")
"""Joined in this order; the last one starts the page."""


@dataclass(frozen=True)
class Page:
    """Everything that is on the page."""

    archive: Archive
    defects: DefectList
    cards: list[Card]
    colours: ColourRange | None
    histogram: Histogram | None
    time_line: TimeLine | None
    folders: list[Folder]
    folder_count: int
    heat_map: HeatMap | None


def render(page: Page) -> str:
    """The whole page as HTML."""
    images = page.archive.images
    heldout, rate = page.defects.heldout, _false_positive_rate(page.archive)
    script, style = _text(*SCRIPTS), _text("page.css")
    return _template().render(
        page=page,
        archive=page.archive,
        defects=page.defects,
        images=len(images),
        flagged=pc.sum(images["is_anomalous"]).as_py() or 0,
        dates=pc.min_max(images["date"]).as_py(),
        false_positive_rate=rate,
        none_can_be_flagged=calibration.why_none_is_flagged(heldout, rate, page.defects.unit)
        if heldout and rate
        else None,
        drift=_drift(page.archive),
        anchors=maps.ANCHORS,
        heat=data_uri("png", _cells(page.heat_map)) if page.heat_map else None,
        shown={
            "listed": sum(card.is_listed for card in page.cards),
            "flagged": sum(card.row["is_anomalous"] for card in page.cards),
        },
        folders=charts.parents(pa.chunked_array([[c.row["image_uri"] for c in page.cards]], pa.string())),
        bits=bits,
        data_uri=data_uri,
        style=Markup(style),
        script=Markup(script),
        # The only script that a browser will run: none can be smuggled in by the name of an image.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        made_at=datetime.now(UTC),
        version=csflow.__version__,
    )


def _false_positive_rate(archive: Archive) -> float | None:
    """The runs' false-positive rate; None if it differs among them or no run has a record."""
    rates = {record.configuration["false_positive_rate"] for record in archive.runs}
    return rates.pop() if len(rates) == 1 else None


def _drift(archive: Archive) -> dict[str, Any] | None:
    """How these images differ from the held-out ones; None if there are no images."""
    if archive.share_below_5_percent is None:
        return None
    test = archive.drift
    # With so few held-out images no p-value can be below 0.05.
    is_blind = test is not None and not calibration.flaggable(test.units or 0, 0.0499)
    return {"share": archive.share_below_5_percent, "test": test, "is_blind": is_blind}


def _cells(heat_map: HeatMap) -> bytes:
    """A PNG of the heat map with one pixel per cell: black is 0, the brightest is the largest share."""
    share_HW = heat_map.hot_share_HW / max(heat_map.hottest[2], 1e-9)
    data = io.BytesIO()
    Image.fromarray(maps.COLOUR_TABLE[(share_HW * 255).round().astype(np.uint8)]).save(data, "PNG")
    return data.getvalue()


def _text(*files: str) -> str:
    return "".join((FOLDER / name).read_text() for name in files)


def bits(are_set: NDArray[np.bool_]) -> str:
    """Booleans in Base64, eight to a byte, the first in the highest bit."""
    return base64.b64encode(np.packbits(are_set).tobytes()).decode()


def data_uri(kind: str, picture: bytes) -> str:
    """A data URI that holds a picture."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def _template() -> jinja2.Template:
    # Image URIs and error messages come from outside: everything is escaped.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja")
