"""The model directory: a trained detector with its calibration as safetensors, JSON and Parquet files."""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
from numpy.typing import NDArray

import csflow
from csflow.calibration import part_maxima, part_weights, region_threshold, value_exceeded
from csflow.errors import StorageFailed, WrongUse
from csflow.preprocessing import DECODING_VERSION, DECODING_VERSIONS, Preprocessing, Tiling
from csflow.storage import Location, to_parquet

if TYPE_CHECKING:  # the driver of a scoring run needs no torch, which takes seconds and 500 MB
    from csflow.model import Detector, Head

FORMAT_WITHOUT_TILES, FORMAT_WITH_TILES, FORMAT_NEWEST = 4, 5, 6
"""What models are written as: an older csflow reads those whose parts it knows."""
READABLE_VERSIONS = (1, 2, 3, FORMAT_WITHOUT_TILES, FORMAT_WITH_TILES, FORMAT_NEWEST)
"""Version 1 has no rounding shifts; models before version 3 have no whitening and only one score, before
version 4 one average of energies and no windows, before version 5 no tiles, and before version 6 no mask and
no features of other code."""
PROCESS_BYTES = 1 << 30
"""What a worker takes without a model: libraries and activations."""
ROUNDING = "rounding."
"""Prefix of the names of `rounding_shifts` among the detector's tensors."""
BACKBONE = "backbone."
"""Prefix of the names of the backbone's own."""
CARD_FILES = ("README.md", "curves.svg", "calibration.svg", "mask.png", "outliers.csv")
PICTURES = "outliers"
"""Folder of the card's pictures."""
LIBRARIES = ("torch", "timm", "safetensors", "pillow", "tifffile", "pyarrow", "ray")

CALIBRATION = pa.schema(
    [
        pa.field("image_uri", pa.string(), nullable=False),
        pa.field("image_version", pa.string(), nullable=False),
        pa.field("anomaly_score", pa.float64(), nullable=False),
        pa.field("global_score", pa.float64()),
        pa.field("local_score", pa.float64()),
        pa.field("map_maximum", pa.float64()),
        # Levels below which the map has at least 1, 2, … regions, as many as were kept.
        pa.field("region_levels", pa.list_(pa.field("element", pa.float64()))),
        pa.field("part", pa.string()),  # that the image shows; null if parts are not known
        pa.field("group", pa.string()),  # that is calibrated apart, as `camera=top`; null if with the whole
    ]
)


@dataclass(frozen=True)
class Calibration:
    """Scores (n,) of the held-out normal images, from which p-values are computed."""

    anomaly_score: NDArray[np.float64]
    global_score: NDArray[np.float64] | None
    """None in models of older versions, as are all fields below."""
    local_score: NDArray[np.float64] | None
    map_maximum: NDArray[np.float64] | None
    """Maximum of each image's anomaly map."""
    region_levels: NDArray[np.float64] | None
    """Levels of each image's regions (n, levels), in falling order and −∞ where there are fewer."""
    weights: NDArray[np.float64] | None
    """What each image counts in p-values, one for each part; None, as is the next, if parts are not known."""
    part_maximum: NDArray[np.float64] | None
    """Highest anomaly score (m,) of each part."""
    groups: Mapping[str, "Calibration"]
    """Of each group that is calibrated apart, such as `camera=top`; empty in most models."""
    table: pa.Table
    """The scores with their images, in the `CALIBRATION` schema."""

    @classmethod
    def of(cls, table: pa.Table) -> "Calibration":
        """The calibration in a table. Raises KeyError or ArrowException if a required column is missing."""
        for column in CALIBRATION:
            if column.name not in table.schema.names and column.nullable:
                table = table.append_column(column, pa.nulls(table.num_rows, column.type))
        table = table.select(CALIBRATION.names).cast(CALIBRATION)

        def values(name: str) -> NDArray[np.float64] | None:
            return None if table[name].null_count else table[name].to_numpy()

        anomaly_score = table["anomaly_score"].to_numpy()
        parts = None if table["part"].null_count else table["part"].to_pylist()
        return cls(
            anomaly_score,
            values("global_score"),
            values("local_score"),
            values("map_maximum"),
            _padded(table["region_levels"]),
            None if parts is None else part_weights(parts),
            None if parts is None else part_maxima(anomaly_score, parts),
            {group: cls.of(own.drop_columns("group")) for group, own in by_group(table).items()},
            table,
        )

    def group_of(self, tags: Mapping[str, str]) -> str | None:
        """The group that these tags tell, such as `camera=top`, if it has a calibration of its own."""
        name = next(iter(self.groups), "").partition("=")[0]
        group = f"{name}={tags.get(name)}"
        return group if group in self.groups else None

    def of_tags(self, tags: Mapping[str, str]) -> "Calibration":
        """The calibration of the group that these tags tell, if it has its own, and else the whole."""
        group = self.group_of(tags)
        return self if group is None else self.groups[group]

    @property
    def size(self) -> int:
        """The number of held-out parts, or of images if parts are not known: the n of p-values."""
        return len(self.anomaly_score) if self.weights is None else round(float(self.weights.sum()))

    @property
    def unit(self) -> str:
        """What `size` counts."""
        return "images" if self.weights is None else "parts"

    def map_threshold(self, false_positive_rate: float) -> float | None:
        """Value that no cell of an anomaly map exceeds in more than this share of normal images.

        None if too few images are held out for this share, or if their map maxima are not known.
        """
        if self.map_maximum is None:
            return None
        return value_exceeded(self.map_maximum, false_positive_rate, self.weights)

    def region_threshold(self, false_regions: float) -> float | None:
        """Value of map cells above which a normal image has at most this many regions, on average.

        Of models that know only map maxima, each image counts with one region at most: then at most this
        share of normal images has regions. None if too few images are held out, or without map maxima.
        """
        if self.region_levels is not None:
            return region_threshold(self.region_levels, false_regions, self.weights)
        if self.map_maximum is not None:
            return region_threshold(self.map_maximum[:, None], false_regions, self.weights)
        return None


def by_group(table: pa.Table) -> dict[str, pa.Table]:
    """The rows of each group in the column `group`, in the order in which groups come first."""
    rows: dict[str, list[int]] = {}
    for row, group in enumerate(table["group"].to_pylist()):
        if group is not None:
            rows.setdefault(group, []).append(row)
    return {group: table.take(pa.array(of_group)) for group, of_group in rows.items()}


def _padded(lists: pa.ChunkedArray) -> NDArray[np.float64] | None:
    """A row per list (n, longest list), −∞ behind its end; None if a list is null."""
    if lists.null_count:
        return None
    rows = lists.to_pylist()
    padded = np.full((len(rows), max([1, *map(len, rows)])), -np.inf)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded


@dataclass(frozen=True)
class ModelFiles:
    """The content of a model directory, proved whole."""

    location: Location
    model_id: str
    name: str | None
    """What its users call the model, or the product that it is for. It does not change the model id."""
    architecture: dict[str, Any]
    feature_shapes: list[list[int]]
    state: Mapping[str, NDArray[Any]] = field(repr=False)
    """The detector's tensors, by name."""
    calibration: Calibration = field(repr=False)

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become the model's pixels."""
        # Models of older versions do not say.
        fit = self.architecture.get("fit", "stretch")
        interpolation = self.architecture.get("interpolation", "bilinear")
        decoding = self.architecture.get("decoding_version", DECODING_VERSIONS[0])
        height, width = self.architecture["image_size"]
        tiling = self.architecture.get("tiling")
        return Preprocessing(
            (height, width),
            fit,
            interpolation,
            decoding,
            Tiling(**tiling) if tiling else None,
            self.architecture.get("mask"),
        )

    @property
    def worker_bytes(self) -> int:
        """Memory that a process needs for this detector."""
        return worker_bytes(self.state)

    def detector(self) -> "Detector":
        """Builds the detector. Raises WrongUse if the files do not make one."""
        import torch

        from csflow.model import Architecture, Detector

        with _proving(self.location):
            # Without memory and random numbers for a flow whose weights are about to be replaced.
            with torch.device("meta"):
                detector = Detector(Architecture.from_json(self.architecture), self.feature_shapes)
            state = {name: torch.from_numpy(value) for name, value in self.state.items()}
            shifts = [name for name in state if name.startswith(ROUNDING)]
            detector.rounding_shifts = {name.removeprefix(ROUNDING): state.pop(name) for name in shifts}
            detector.load_state_dict(state, assign=True)
        return detector.eval().requires_grad_(False)

    def head(self) -> "Head":
        """Builds the detector without its backbone, for which no timm is needed. Raises as `detector`."""
        import torch

        from csflow.model import Architecture, Head

        with _proving(self.location):
            with torch.device("meta"):
                head = Head(Architecture.from_json(self.architecture), self.feature_shapes)
            state = {
                name: torch.from_numpy(value)
                for name, value in self.state.items()
                if not name.startswith((BACKBONE, ROUNDING))
            }
            head.load_state_dict(state, assign=True)
        return head.eval().requires_grad_(False)


@dataclass(frozen=True)
class Model:
    """A loaded model directory."""

    model_id: str
    name: str | None
    detector: "Detector" = field(repr=False)
    calibration: Calibration = field(repr=False)


def save_model(
    location: Location,
    detector: "Detector",
    calibration: pa.Table,
    *,
    name: str | None = None,
    training: Mapping[str, Any],
    data: Mapping[str, Any],
    metrics: Mapping[str, Any],
    card: Mapping[str, bytes],
) -> str:
    """Writes a model directory and returns its model id; nothing stays of a model that was there before.

    Args:
        calibration: held-out normal images in the `CALIBRATION` schema.
        name: what users call the model.
        training: settings of the training job.
        data: fingerprint of the training images.
        metrics: loss curves and final figures.
        card: further files by name, including the model card `README.md`.
    """
    architecture = detector.architecture.to_json() | {"cut_after": detector.backbone.cut_after}
    decoding = architecture.get("decoding_version", DECODING_VERSIONS[0])
    shifts = {ROUNDING + name: value for name, value in detector.rounding_shifts.items()}
    tensors = detector.state_dict() | shifts
    state = {name: value.contiguous().numpy() for name, value in tensors.items()}
    scores = Calibration.of(calibration)
    config = {
        "format_version": format_version(
            detector.architecture.tiling is not None,
            detector.architecture.mask is not None or detector.architecture.has_foreign_features,
        ),
        "model_id": _model_id(architecture, decoding, state, scores),
        "model_name": name,
        "architecture": architecture,
        "preprocessing": {
            "decoding_version": decoding,
            "mean": detector.get_buffer("mean").tolist(),
            "std": detector.get_buffer("std").tolist(),
        },
        "feature_shapes": [list(shape) for shape in detector.feature_shapes],
        "libraries": {"csflow": csflow.__version__} | {name: version(name) for name in LIBRARIES},
        "training": dict(training),
        "data": dict(data),
    }
    (location / "model.safetensors").write(safetensors.numpy.save(state))
    (location / "calibration.parquet").write(to_parquet(scores.table))
    (location / "metrics.json").write(_to_json(metrics))
    for name, content in card.items():
        (location / name).write(content)
    # Last, since its presence makes the directory a model.
    (location / "config.json").write(_to_json(config))
    _remove_leftovers(location, card.keys())
    return str(config["model_id"])


def _remove_leftovers(location: Location, card: Set[str]) -> None:
    """Removes the files of an earlier model's card, except those of these names; others are the user's."""
    pictures = [f"{PICTURES}/{picture.name}" for picture in (location / PICTURES).find(".jpg")]
    for name in [*CARD_FILES, *pictures]:
        if name not in card and (location / name).exists():
            (location / name).remove()


def read_model(location: Location | str) -> ModelFiles:
    """Reads a model directory and proves that it is whole; needs no torch, no network and no download.

    Args:
        location: the directory; a URL or path needs no `Location` where the AWS_* variables are enough.

    Raises:
        WrongUse: there is no model, its format has another version, or its files are damaged.
    """
    location = location if isinstance(location, Location) else Location(location)
    config = read_config(location)
    with _proving(location):
        architecture, feature_shapes = config["architecture"], config["feature_shapes"]
        decoding = config["preprocessing"]["decoding_version"]
        state = safetensors.numpy.load(_read(location / "model.safetensors"))
        calibration = _calibration(location)
        is_whole = _model_id(architecture, decoding, state, calibration) == config["model_id"]
    if not is_whole:
        raise _damaged(location, "its content does not give the model_id in config.json")
    if decoding not in DECODING_VERSIONS:
        raise WrongUse(
            f"model {location} was trained with image decoding version {decoding}, this csflow has "
            f"{DECODING_VERSION}; use the csflow that trained it or train anew"
        )
    name = config.get("model_name")  # older models have none
    return ModelFiles(location, config["model_id"], name, architecture, feature_shapes, state, calibration)


def load_model(location: Location | str) -> Model:
    """Reads a model directory and builds its detector; takes and raises what `read_model` does."""
    files = read_model(location)
    return Model(files.model_id, files.name, files.detector(), files.calibration)


def worker_bytes(state: Mapping[str, Any]) -> int:
    """Memory that a process needs for a detector: libraries, its tensors twice, and activations."""
    return PROCESS_BYTES + 2 * sum(int(value.nbytes) for value in state.values())


def format_version(is_tiled: bool, is_newest: bool) -> int:
    """The format version as which a model is written.

    Args:
        is_newest: whether it has a mask or features of other code.
    """
    return FORMAT_NEWEST if is_newest else FORMAT_WITH_TILES if is_tiled else FORMAT_WITHOUT_TILES


def holds_model(location: Location) -> bool:
    return (location / "config.json").exists()


def check_free(output: Location, may_replace: bool) -> None:
    """Raises WrongUse if `--output` holds a model that may not be replaced."""
    if not may_replace and holds_model(output):
        raise WrongUse(f"--output {output} already holds a model; choose another, or pass --overwrite")


def read_calibration(location: Location) -> Calibration:
    """A model's calibration, read without the weights; raises as `read_model`."""
    with _proving(location):
        return _calibration(location)


def find_calibration(locations: Iterable[Location], model_id: str) -> Calibration | None:
    """The calibration of this model, from the first of these directories that can be read and holds it."""
    for location in locations:
        try:
            if read_config(location).get("model_id") == model_id:
                return read_calibration(location)
        except WrongUse:
            continue
    return None


def read_config(location: Location) -> dict[str, Any]:
    """The content of `config.json`. Raises WrongUse as `read_model`."""
    with _proving(location, "config.json: "):
        config = json.loads(_read(location / "config.json"))
        format_version = config["format_version"]
    if format_version not in READABLE_VERSIONS:
        raise WrongUse(
            f"model {location} has format version {format_version!r}, this csflow reads {FORMAT_NEWEST}; "
            "use the csflow version named in its config.json, or train it anew"
        )
    return dict(config)


def _read(location: Location) -> bytes:
    try:
        return location.read()
    except (FileNotFoundError, NotADirectoryError):
        raise WrongUse(
            f"model file {location} does not exist; a model is the --output of `csflow train`"
        ) from None
    except Exception as error:
        raise WrongUse(f"model file {location} cannot be read: {type(error).__name__}: {error}") from None


def _calibration(location: Location) -> Calibration:
    return Calibration.of(pq.read_table(io.BytesIO(_read(location / "calibration.parquet"))))


@contextmanager
def _proving(location: Location, file: str = "") -> Iterator[None]:
    """Turns whatever parsers raise on damaged files of a model into one line."""
    try:
        yield
    except (WrongUse, StorageFailed, MemoryError):
        raise
    except Exception as error:
        detail = " ".join(f"{type(error).__name__}: {error}".split())
        raise _damaged(location, f"{file}{detail[:300]}") from None


def _damaged(location: Location, reason: str) -> WrongUse:
    return WrongUse(f"model {location} is damaged ({reason}); copy it again or train it anew")


def _model_id(
    architecture: Mapping[str, Any],
    decoding_version: object,
    state: Mapping[str, NDArray[Any]],
    calibration: Calibration,
) -> str:
    """Hash of what decides scores and p-values; the same on every machine and for every copy."""
    digest = hashlib.sha256()
    for part in _parts(architecture, decoding_version, state, calibration):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]


def tensor_parts(state: Mapping[str, NDArray[Any]]) -> Iterator[bytes]:
    """What of tensors a hash is made of."""
    for name, value in sorted(state.items()):
        yield f"{name} torch.{value.dtype} {list(value.shape)}".encode()
        yield value.tobytes()


def _parts(
    architecture: Mapping[str, Any],
    decoding_version: object,
    state: Mapping[str, NDArray[Any]],
    calibration: Calibration,
) -> Iterator[bytes]:
    yield json.dumps([architecture, decoding_version], sort_keys=True).encode()
    yield from tensor_parts(state)
    yield calibration.anomaly_score.astype("<f8").tobytes()
    for values in (
        *(calibration.global_score, calibration.local_score),
        *(calibration.map_maximum, calibration.region_levels),
    ):
        if values is not None:
            yield values.astype("<f8").tobytes()
    if calibration.weights is not None:
        numbers: dict[str, int] = {}
        parts = [numbers.setdefault(part, len(numbers)) for part in calibration.table["part"].to_pylist()]
        yield np.array(parts, "<i8").tobytes()
    if calibration.groups:
        yield json.dumps(calibration.table["group"].to_pylist()).encode()


def _to_json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()
