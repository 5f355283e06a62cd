"""The evaluation job: measures how well anomaly scores and maps find known defects."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import pyarrow.dataset as ds
from pydantic import Field

from csflow.calibration import why_none_is_flagged
from csflow.config import JobConfig, Schemes, Seed
from csflow.errors import ExitStatus, WrongUse
from csflow.evaluation.labels import (
    Label,
    LabelledScore,
    among,
    check_mask_schemes,
    mvtec_labels,
    read_labels,
)
from csflow.evaluation.pixel_metrics import PixelHistograms
from csflow.evaluation.pixel_pass import Masks, pixel_metrics
from csflow.evaluation.ranking import Ranking, bootstrap_intervals, share
from csflow.evaluation.region_metrics import RegionCounts
from csflow.evaluation.summary import plots, print_evaluation
from csflow.model_directory import find_calibration
from csflow.output.reading import ScoringOutput, last_records, latest_per_image, open_scores
from csflow.storage import Location


class EvaluateConfig(JobConfig):
    """Settings of the evaluation job."""

    scores: str
    """Location of the scores: the `--output` of scoring jobs."""
    labels: str | None = None
    """Give either --labels or --layout. CSV or Parquet file with the columns image_uri and label (0 normal,
    1 defective), and optionally mask_uri (an image whose nonzero pixels are defective) and defect_class.
    URIs may be relative to the file's folder."""
    layout: Literal["mvtec"] | None = None
    """Give either --labels or --layout. Takes the labels from the image URIs. In `mvtec`, `test/good/` holds
    the normal test images, every other `test/<class>/` defective ones, and
    `ground_truth/<class>/<image>_mask.png` their masks."""
    output: str | None = None
    """Folder for metrics.json and the plots; or a .json file, for the metrics alone."""
    model_id: str | None = None
    """Model whose scores are measured, needed if --scores holds several models."""
    pixel_metrics: bool = True
    """Compute pixel AUROC and AUPRO of the anomaly maps, and recall of the regions, if there are masks."""
    allow_schemes: Schemes = Field([])
    """Schemes of the masks that --labels may name beside those of the table itself and of the masks' images,
    such as `s3` or `https`; `file` for local paths. [default: no others]"""
    bootstrap: int = Field(1000, ge=100)
    """Number of bootstrap resamples for the 95 % intervals."""
    seed: Seed = 0
    """Seed (0 to 4294967295) of the bootstrap resamples."""


def evaluate(config: EvaluateConfig) -> ExitStatus:
    """Runs the job; raises as `measure`."""
    measure(config)
    return ExitStatus.DONE


def measure(config: EvaluateConfig) -> dict[str, Any]:
    """Compares scores with labels, prints the metrics and writes them to `--output`.

    Returns:
        The content of metrics.json.

    Raises:
        WrongUse: a setting or an input is wrong.
    """
    result = Location(config.output, config.storage_options) if config.output else None
    if result:
        (result.parent if _is_json(result) else result).check_writable()
    output = open_scores(Location(config.scores, config.storage_options), config.model_id)
    labels, scored = _labels_and_scores(config, output.scores)
    _check_both_classes(list(scored.values()))
    normal = [image for image in scored.values() if not image.label.is_defective]
    defective = [image for image in scored.values() if image.label.is_defective]
    ranking = _ranking(normal, defective)
    metrics, intervals = _metrics_and_intervals(normal, defective, config)
    evaluation: dict[str, Any] = {
        "model_id": output.model_id,
        "scores": config.scores,
        "labels": config.labels or config.layout,
        "images": {
            "labelled": len(labels),
            "missing": len(labels) - len(scored),
            "normal": len(normal),
            "defective": len(defective),
        },
        "metrics": metrics | {"best_f1_threshold": ranking.best_f1_threshold()},
        "intervals": intervals,
        "defect_classes": _by_class(normal, defective, config),
        "why_none_is_flagged": _why_none_is_flagged(output, normal, defective, config),
        "bootstrap": {"resamples": config.bootstrap, "seed": config.seed, "confidence": 0.95},
    }
    histograms: PixelHistograms | None = None
    if config.pixel_metrics:
        masks = Masks(config.storage_options, must_exist=config.layout is None)
        regions = RegionCounts()
        histograms, evaluation["pixels"] = pixel_metrics(output.scores, scored, masks, regions)
        evaluation["regions"] = regions.metrics(config.bootstrap, config.seed)
    print_evaluation(evaluation)
    if result:
        _write(result, evaluation, plots(normal, defective, ranking, histograms))
    return evaluation


def _labels_and_scores(
    config: EvaluateConfig, dataset: ds.Dataset
) -> tuple[dict[str, Label], dict[str, LabelledScore]]:
    """All labels, and the images that have both label and score, by image URI; the latter are never empty."""
    if (config.labels is None) == (config.layout is None):
        raise WrongUse("evaluation needs either --labels (a table) or --layout mvtec")
    if config.labels is not None:
        location = Location(config.labels, config.storage_options)
        labels = read_labels(location)
        check_mask_schemes(labels, location, config.allow_schemes)
    else:
        labels = mvtec_labels(_image_uris(dataset))
        if not labels:
            raise WrongUse(f"--layout mvtec: {config.scores} holds no image below a test/<class>/ folder")
    table = dataset.to_table(
        columns=["image_uri", "anomaly_score", "is_anomalous", "scored_at"], filter=among(labels)
    )
    rows = latest_per_image(table, "scored_at").to_pylist()
    if not rows:
        scored = dataset.head(1, columns=["image_uri"])["image_uri"].to_pylist()
        raise WrongUse(
            f"no image labelled in {config.labels} has a score in {config.scores}; "
            "write the image URIs as in the scores: "
            f"labelled {next(iter(labels), 'none')}, scored {next(iter(scored), 'none')}"
        )
    return labels, {
        row["image_uri"]: LabelledScore(
            labels[row["image_uri"]], row["anomaly_score"], row["is_anomalous"], row["scored_at"]
        )
        for row in rows
    }


def _image_uris(dataset: ds.Dataset) -> Iterator[str]:
    for batch in dataset.to_batches(columns=["image_uri"]):
        yield from batch["image_uri"].to_pylist()


def _check_both_classes(images: Sequence[LabelledScore]) -> None:
    if len({image.label.is_defective for image in images}) == 1:
        is_defective = next(iter(images)).label.is_defective
        only, other = ("defective", "normal") if is_defective else ("normal", "defective")
        raise WrongUse(
            f"all {len(images)} labelled images with a score are {only}; score and label {other} ones too"
        )


def _ranking(normal: Sequence[LabelledScore], defective: Sequence[LabelledScore]) -> Ranking:
    images = [*normal, *defective]
    return Ranking.of(
        [image.label.is_defective for image in images], [image.anomaly_score for image in images]
    )


def _metrics_and_intervals(
    normal: Sequence[LabelledScore], defective: Sequence[LabelledScore], config: EvaluateConfig
) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics of the ranking with bootstrap intervals, and rates of `is_anomalous` with exact ones."""
    ranking = _ranking(normal, defective)
    metrics: dict[str, float] = ranking.metrics()
    intervals: dict[str, Any] = bootstrap_intervals(ranking, config.bootstrap, config.seed)
    for name, images in (("flag_fpr", normal), ("flag_recall", defective)):
        metrics[name], intervals[name] = share([image.is_anomalous for image in images])
    return metrics, intervals


def _by_class(
    normal: Sequence[LabelledScore], defective: Sequence[LabelledScore], config: EvaluateConfig
) -> dict[str, Any]:
    """The metrics of each defect class alone against all normal images."""
    names = sorted({image.label.defect_class for image in defective if image.label.defect_class})
    found = {}
    for name in names:
        members = [image for image in defective if image.label.defect_class == name]
        metrics, intervals = _metrics_and_intervals(normal, members, config)
        found[name] = {"images": len(members), "metrics": metrics, "intervals": intervals}
    return found


def _why_none_is_flagged(
    output: ScoringOutput,
    normal: Sequence[LabelledScore],
    defective: Sequence[LabelledScore],
    config: EvaluateConfig,
) -> str | None:
    """Why the runs could flag none of these images; None if they could, or if their model is not found."""
    if any(image.is_anomalous for image in [*normal, *defective]):
        return None
    records = last_records(output)
    rate = max((record.configuration["false_positive_rate"] for record in records), default=None)
    locations = dict.fromkeys(record.model.location for record in records)
    places = (Location(url, config.storage_options) for url in locations)
    heldout = find_calibration(places, output.model_id)
    if heldout is None or rate is None:
        return None
    return why_none_is_flagged(heldout.size, rate, heldout.unit)


def _is_json(location: Location) -> bool:
    return location.name.endswith(".json")


def _write(result: Location, evaluation: Mapping[str, Any], plots: Mapping[str, bytes]) -> None:
    data = (json.dumps(evaluation, indent=2) + "\n").encode()
    if _is_json(result):
        result.write(data)
        return
    (result / "metrics.json").write(data)
    for name, content in plots.items():
        (result / name).write(content)
