"""Chooses the defect list: the images that are reported as defective at a wanted false-discovery rate."""

import io
import posixpath
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import NDArray

from csflow.calibration import choose_defects, heldout_needed
from csflow.errors import WrongUse
from csflow.output.reading import latest_per_image
from csflow.report.archive import Archive
from csflow.report.tail import FEWEST_IMAGES, EstimatedList, estimated_list
from csflow.storage import Location, to_parquet

COLUMNS = [
    *("image_uri", "image_version", "anomaly_score", "p_value", "is_anomalous"),
    *("image_height", "image_width", "peak_y", "peak_x", "date", "run_id", "scored_at"),
]
SUFFIXES = (".csv", ".parquet")


@dataclass(frozen=True)
class DefectList:
    """The images of an archive that are on the list, and what to say if there are none."""

    false_discovery_rate: float
    is_chosen: NDArray[np.bool_]
    """Whether each image is on the list, shape (images,)."""
    above_all: int
    """Number of images that score above every held-out one: they have the smallest possible p-value."""
    heldout: int | None
    """Number of held-out images, or parts; None if the model directory was not found."""
    unit: str = "images"
    """What `heldout` counts."""
    doubt: str | None = None
    """Why the list need not keep its promise, in one or two sentences; None if no drift was seen."""
    estimate: EstimatedList | None = None
    """Set if the list was chosen by it."""
    no_estimate: str | None = None
    """Why it could not be."""

    @property
    def images(self) -> int:
        return int(self.is_chosen.sum())

    @property
    def heldout_needed(self) -> int | None:
        """Held-out images, or parts, with which the `above_all` could be listed; None if not the obstacle."""
        if self.images or not self.above_all or self.heldout is None:
            return None
        needed = heldout_needed(len(self.is_chosen), self.above_all, self.false_discovery_rate)
        return needed if needed > self.heldout else None

    @property
    def promise(self) -> str:
        """One or two sentences that say what the list promises."""
        rate = f"{self.false_discovery_rate:.3g}"
        if self.images:
            listed = f"{self.images:,} of {len(self.is_chosen):,} images are on the defect list"
            if self.estimate:
                return f"{listed}, by an estimate: {self.estimate_in_words}"
            if self.doubt:
                return f"{listed}, which was made for a false-discovery rate of {rate}"
            percent = f"{100 * self.false_discovery_rate:.3g} %"
            return f"{listed}; on average at most {percent} of such a list are normal images"
        empty = f"no image is on the defect list at a false-discovery rate of {rate}"
        if self.heldout_needed is not None:
            empty += (
                f": {self.above_all:,} of {len(self.is_chosen):,} images score above all of "
                f"{self.heldout:,} held-out {self.unit}, and it takes {self.heldout_needed:,} held-out "
                f"{self.unit} to list so few"
            )
        if self.estimate_in_words:
            return f"{empty}; {self.estimate_in_words}"
        can_be_estimated = self.heldout_needed is not None and len(self.is_chosen) >= FEWEST_IMAGES
        return f"{empty}; --estimate chooses some without a promise" if can_be_estimated else empty

    @property
    def estimate_in_words(self) -> str | None:
        """What became of the estimate; None if there was none."""
        if self.no_estimate:
            return f"there is no estimate either, since {self.no_estimate}"
        if self.estimate is None:
            return None
        return self.estimate.in_words() if self.images else "the estimate lists none, either"


def make_list(archive: Archive, false_discovery_rate: float, may_estimate: bool = False) -> DefectList:
    """Chooses among all images of the archive together.

    Args:
        may_estimate: whether an estimate is to choose, if too few images are held out for a promise.
    """
    p = archive.images["p_value"].to_numpy()
    calibration = archive.calibration
    heldout, unit = (calibration.size, calibration.unit) if calibration else (None, "images")
    # Rows may be older than the model directory: their p-values alone decide.
    smallest = p.min(initial=1.0) if heldout is None else 1 / (heldout + 1)
    above_all = int((p <= smallest * (1 + 1e-9)).sum())
    chosen = choose_defects(p, false_discovery_rate)
    promised = DefectList(false_discovery_rate, chosen, above_all, heldout, unit, _doubt(archive))
    # Without a model directory, nobody knows whether held-out images are what is missing.
    if not may_estimate or promised.images or (heldout and promised.heldout_needed is None):
        return promised
    # A score that is no number is the most anomalous there is.
    scores = np.nan_to_num(archive.images["anomaly_score"].to_numpy(), nan=np.inf, posinf=np.inf)
    estimate = estimated_list(scores, false_discovery_rate)
    if isinstance(estimate, str):
        return replace(promised, no_estimate=estimate)
    return replace(promised, is_chosen=estimate.is_chosen_M, estimate=estimate)


def _doubt(archive: Archive) -> str | None:
    """Says that scores are above the held-out ones, in all these images or in those of the last run."""
    last_run = archive.runs[0].drift if archive.runs else None
    for drift, where in ((archive.drift, ""), (last_run, " of the last run")):
        if drift and drift.verdict in ("unlike", "higher"):
            # Many defects alone give the latter, and do no harm to the list.
            condition = "" if drift.verdict == "unlike" else " if normal images have changed"
            return (
                f"the drift verdict{where} is {drift.verdict}: {drift.words} "
                f"The promise of the defect list does not hold{condition}"
            )
    return None


def check_target(location: Location | None) -> None:
    """Raises WrongUse, before any work, if the list cannot be written there."""
    if location is None:
        return
    if posixpath.splitext(location.path)[1].lower() not in SUFFIXES:
        raise WrongUse(f"--defects {location} must end with {' or '.join(SUFFIXES)}")
    location.parent.check_writable()


def without_formulas(rows: pa.Table) -> pa.Table:
    """The rows with an apostrophe before texts that a spreadsheet would compute (OWASP, "CSV Injection")."""
    for number, field in enumerate(rows.schema):
        if pa.types.is_string(field.type):
            column = pc.replace_substring_regex(rows[field.name], r"^([=+\-@\t\r])", r"'\1")
            rows = rows.set_column(number, field, column)
    return rows


def write_list(archive: Archive, defects: DefectList, location: Location) -> None:
    """Writes the chosen images, the highest anomaly score first; columns are those of the scores."""
    uris = archive.images["image_uri"].filter(pa.array(defects.is_chosen))
    wanted = pc.field("image_uri").isin(uris.combine_chunks())
    rows = latest_per_image(archive.scores.to_table(columns=COLUMNS, filter=wanted), "scored_at")
    # A score that is no number is the most anomalous there is.
    order = pc.sort_indices(rows, sort_keys=[("anomaly_score", "descending", "at_start")])
    rows = rows.take(order)
    if location.path.lower().endswith(".csv"):
        data = io.BytesIO()
        pyarrow.csv.write_csv(without_formulas(rows), data)
        location.write(data.getvalue())
    else:
        location.write(to_parquet(rows))
