"""Labels of images: normal or defective, the class of the defect, and the mask that marks the defect."""

import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset as ds

from csflow.errors import WrongUse
from csflow.inputs.manifests import canonical_uri
from csflow.inputs.uris import scheme_of
from csflow.storage import Location

REQUIRED = {"image_uri": pa.string(), "label": pa.string()}
OPTIONAL = {"mask_uri": pa.string(), "defect_class": pa.string()}

_MVTEC_TEST_IMAGE = re.compile(r"(?P<root>|.*/)test/(?P<defect_class>[^/]+)/(?P<stem>[^/]+)\.[^./]+")


@dataclass(frozen=True)
class Label:
    """The label of one image, with class and mask of its defect."""

    is_defective: bool
    defect_class: str | None = None
    """The class of the defect; None for normal images and if the table does not say."""
    mask_uri: str | None = None
    """Image whose nonzero pixels are defective."""


@dataclass(frozen=True)
class LabelledScore:
    """A labelled image and its latest row in `scores`."""

    label: Label
    anomaly_score: float
    is_anomalous: bool
    scored_at: datetime


def read_labels(location: Location, flag: str = "--labels") -> dict[str, Label]:
    """Labels by image URI, from the file that `EvaluateConfig.labels` describes.

    Args:
        flag: the setting that names the file, for messages.

    Raises:
        WrongUse: the file is missing, lacks a column, or holds an unknown label or two labels for one image.
    """
    table = _read_table(location, flag)
    folder = canonical_uri(location.url).rpartition("/")[0] or "/"
    labels: dict[str, Label] = {}
    for row in table.to_pylist():
        uri, value = row["image_uri"], _number(row["label"])
        if uri is None or value not in (0, 1):
            raise WrongUse(
                f"{flag} {location}: image {uri} has {row['label']!r} in the column label; a label must be 0 "
                "(normal) or 1 (defective)"
            )
        uri = canonical_uri(uri, folder)
        # In CSV an empty field is an empty string.
        mask, defect_class = row.get("mask_uri") or None, row.get("defect_class") or None
        label = Label(
            is_defective=value == 1,
            defect_class=defect_class if value == 1 else None,
            mask_uri=canonical_uri(mask, folder) if mask else None,
        )
        known = labels.setdefault(uri, label)
        if known.is_defective != label.is_defective:
            raise WrongUse(f"{flag} {location}: image {uri} has both labels; keep one of them")
        if known != label:
            raise WrongUse(f"{flag} {location}: image {uri} has two rows that differ; keep one of them")
    return labels


def check_mask_schemes(labels: Mapping[str, Label], location: Location, allow_schemes: Sequence[str]) -> None:
    """Raises WrongUse if a table names a mask that it may not: its author decides what the job reads.

    Args:
        location: of the table, whose scheme is allowed, as is that of a mask's image.
        allow_schemes: further ones.
    """
    allowed = {scheme_of(location.url), *(scheme_of(f"{name}://") for name in allow_schemes)}
    for uri, label in labels.items():
        mask = label.mask_uri
        if mask and (scheme := scheme_of(mask)) not in {*allowed, scheme_of(uri)}:
            raise WrongUse(
                f"--labels {location} names the mask {mask}, whose scheme {scheme} is neither that of the "
                f"table nor of the image; if the table may, pass --allow_schemes {scheme}"
            )


def mvtec_labels(image_uris: Iterable[str]) -> dict[str, Label]:
    """Labels by image URI of the test images among these, from the folders of `EvaluateConfig.layout`."""
    labels = {}
    for uri in image_uris:
        match = _MVTEC_TEST_IMAGE.fullmatch(uri)
        if match and match["defect_class"] == "good":
            labels[uri] = Label(is_defective=False)
        elif match:
            mask_uri = f"{match['root']}ground_truth/{match['defect_class']}/{match['stem']}_mask.png"
            labels[uri] = Label(True, match["defect_class"], mask_uri)
    return labels


def among(image_uris: Mapping[str, object]) -> pc.Expression:
    """A filter that selects these images in `scores`, so that only their rows are held in memory."""
    return pc.field("image_uri").isin(pa.array(image_uris, pa.string()))


def _number(label: str | bool | None) -> float | None:
    """The number that a label is; None if it is no number."""
    try:
        return float("" if label is None else label)
    except ValueError:
        return None


def _read_table(location: Location, flag: str) -> pa.Table:
    types = REQUIRED | OPTIONAL
    formats = {
        ".csv": ds.CsvFileFormat(convert_options=pyarrow.csv.ConvertOptions(column_types=types)),
        ".parquet": ds.ParquetFileFormat(),
    }
    suffix = posixpath.splitext(location.path)[1].lower()
    if suffix not in formats:
        raise WrongUse(f"{flag} {location} must be a .csv or .parquet file")
    if not location.exists():
        raise WrongUse(f"{flag} {location} does not exist")
    try:
        dataset = ds.dataset([location.path], filesystem=location.fs, format=formats[suffix])
        missing = [name for name in REQUIRED if name not in dataset.schema.names]
        if missing:
            raise WrongUse(f"{flag} {location} lacks the column {' and '.join(missing)}")
        found = {name: type_ for name, type_ in types.items() if name in dataset.schema.names}
        if pa.types.is_boolean(dataset.schema.field("label").type):
            found["label"] = pa.bool_()
        return dataset.to_table(columns=list(found)).cast(pa.schema(found))
    except (pa.ArrowException, OSError) as error:
        raise WrongUse(f"{flag} {location} cannot be read: {error}") from None
