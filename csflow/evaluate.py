"""The evaluation job: how well anomaly scores separate images that are known to be normal or defective."""

import json
import posixpath
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset as ds
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from csflow.config import JobConfig
from csflow.errors import ExitStatus, WrongUse
from csflow.inputs.manifests import canonical_uri
from csflow.scores import latest_per_image, open_scores
from csflow.storage import Location


class EvaluateConfig(JobConfig):
    """Settings of the evaluation job."""

    scores: str
    """Location of the scores: the `--output` of scoring jobs."""
    labels: str | None = None
    """CSV or Parquet file with the columns image_uri and label (0 normal, 1 defective). Relative image URIs
    start at the file's own folder."""
    layout: Literal["mvtec"] | None = None
    """Take the labels from the image URIs instead: in `mvtec`, `test/good/` holds the normal test images and
    every other `test/<class>/` defective ones."""
    output: str | None = None
    """JSON file that the evaluation is written to."""
    model_id: str | None = None
    """Model whose scores count, where the location holds scores of several."""


def evaluate(config: EvaluateConfig) -> ExitStatus:
    """Compares scores with labels, prints the metrics and writes them to `--output`."""
    result = Location(config.output, config.storage_options) if config.output else None
    if result:
        result.parent.check_writable()
    output = open_scores(Location(config.scores, config.storage_options), config.model_id)
    labels, scores = _labels_and_scores(config, output.scores)
    scored_labels = {uri: label for uri, label in labels.items() if uri in scores}
    _check_both_classes(list(scored_labels.values()))
    defective = sum(scored_labels.values())
    evaluation = {
        "model_id": output.model_id,
        "scores": config.scores,
        "labels": config.labels or config.layout,
        "images": {
            "labelled": len(labels),
            "missing": len(labels) - len(scored_labels),
            "normal": len(scored_labels) - defective,
            "defective": defective,
        },
        "metrics": image_metrics(list(scored_labels.values()), [scores[uri] for uri in scored_labels]),
    }
    _print(evaluation)
    if result:
        result.write((json.dumps(evaluation, indent=2) + "\n").encode())
    return ExitStatus.DONE


def _labels_and_scores(
    config: EvaluateConfig, dataset: ds.Dataset
) -> tuple[dict[str, int], dict[str, float]]:
    """Label and anomaly score by image URI; at least one image has both."""
    if (config.labels is None) == (config.layout is None):
        raise WrongUse("evaluation needs either --labels (a table) or --layout mvtec")
    if config.labels is not None:
        labels = read_labels(Location(config.labels, config.storage_options))
        scores = _read_scores(dataset, among=labels)
    else:
        scores = _read_scores(dataset)
        labels = mvtec_labels(scores)
        if not labels:
            raise WrongUse(f"--layout mvtec: {config.scores} holds no image below a test/<class>/ folder")
    if labels.keys().isdisjoint(scores):
        scored = dataset.head(1, columns=["image_uri"])["image_uri"].to_pylist()
        raise WrongUse(
            f"no image labelled in {config.labels} has a score in {config.scores}; "
            "write the image URIs as in the scores: "
            f"labelled {next(iter(labels), 'none')}, scored {next(iter(scored), 'none')}"
        )
    return labels, scores


def _check_both_classes(labels: list[int]) -> None:
    if len(set(labels)) == 1:
        only, other = ("defective", "normal") if labels[0] else ("normal", "defective")
        raise WrongUse(
            f"all {len(labels)} labelled images with a score are {only}; score and label {other} ones too"
        )


def image_metrics(labels: ArrayLike, anomaly_scores: ArrayLike) -> dict[str, float]:
    """How well the scores of n images rank the defective ones (label 1) above the normal ones (label 0).

    Both classes must occur. An anomaly score that is no finite number ranks highest, as its p-value does.
    """
    is_defective = np.asarray(labels, dtype=bool)
    ranked = _finite(anomaly_scores)
    false_positive_rate, recall, thresholds = roc_curve(is_defective, ranked, drop_intermediate=False)
    positives, negatives = is_defective.sum(), (~is_defective).sum()
    # 2 TP / (2 TP + FP + FN) with TP + FN = positives.
    true_positives = recall * positives
    f1 = 2 * true_positives / (true_positives + false_positive_rate * negatives + positives)
    return {
        "image_auroc": float(roc_auc_score(is_defective, ranked)),
        "average_precision": float(average_precision_score(is_defective, ranked)),
        "fpr_at_95_recall": float(false_positive_rate[np.argmax(recall >= 0.95)]),
        "best_f1": float(f1.max()),
        "best_f1_threshold": float(thresholds[f1.argmax()]),
    }


def _finite(anomaly_scores: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(anomaly_scores, dtype=np.float64)
    finite = np.isfinite(values)
    return np.where(finite, values, np.nextafter(values[finite].max(initial=0.0), np.inf))


def read_labels(location: Location) -> dict[str, int]:
    """Label (0 normal, 1 defective) by image URI, from a CSV or Parquet file.

    Raises:
        WrongUse: the file is missing, lacks a column, or holds another label or two for one image.
    """
    table = _read_label_table(location)
    folder = canonical_uri(location.url).rpartition("/")[0] or "/"
    labels: dict[str, int] = {}
    for uri, label in zip(table["image_uri"].to_pylist(), table["label"].to_pylist(), strict=True):
        if uri is None or label not in (0, 1):
            raise WrongUse(f"{location}: image {uri} has the label {label}; label must be 0 or 1")
        uri = canonical_uri(uri, folder)
        if labels.setdefault(uri, int(label)) != label:
            raise WrongUse(f"{location}: image {uri} has both labels; keep one of them")
    return labels


def _read_label_table(location: Location) -> pa.Table:
    types = {"image_uri": pa.string(), "label": pa.float64()}
    formats = {
        ".csv": ds.CsvFileFormat(convert_options=pyarrow.csv.ConvertOptions(column_types=types)),
        ".parquet": ds.ParquetFileFormat(),
    }
    suffix = posixpath.splitext(location.path)[1].lower()
    if suffix not in formats:
        raise WrongUse(f"--labels {location} must be a .csv or .parquet file")
    if not location.exists():
        raise WrongUse(f"--labels {location} does not exist")
    try:
        dataset = ds.dataset([location.path], filesystem=location.fs, format=formats[suffix])
        missing = [name for name in types if name not in dataset.schema.names]
        if missing:
            raise WrongUse(f"--labels {location} lacks the column {' and '.join(missing)}")
        return dataset.to_table(columns=list(types)).cast(pa.schema(types))
    except pa.ArrowException as error:
        raise WrongUse(f"--labels {location} cannot be read: {error}") from None


def mvtec_labels(image_uris: Iterable[str]) -> dict[str, int]:
    """Label of each test image among these URIs, by MVTec AD's folders (`test/<class>/<image>`)."""
    classes = {uri: re.search(r"(?:^|/)test/([^/]+)/[^/]+$", uri) for uri in image_uris}
    return {uri: int(match[1] != "good") for uri, match in classes.items() if match}


def _read_scores(scores: ds.Dataset, among: Iterable[str] | None = None) -> dict[str, float]:
    """Latest anomaly score by image URI, of all images or `among` some: only those are held in memory."""
    wanted = None if among is None else pc.field("image_uri").isin(pa.array(among, pa.string()))
    table = scores.to_table(columns=["image_uri", "anomaly_score", "scored_at"], filter=wanted)
    table = latest_per_image(table, "scored_at")
    return dict(zip(table["image_uri"].to_pylist(), table["anomaly_score"].to_pylist(), strict=True))


def _print(evaluation: Mapping[str, Any]) -> None:
    images = evaluation["images"]
    print(f"{'model':<20}{evaluation['model_id']}")
    print(f"{'images':<20}{images['normal']:,} normal, {images['defective']:,} defective")
    if images["missing"]:
        print(f"{'missing':<20}{images['missing']:,} of {images['labelled']:,} labelled images have no score")
    for name, value in evaluation["metrics"].items():
        print(f"{name:<20}{value:.4f}")
