"""The plots of an evaluation, and its table in the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from csflow.charts import Curve, chart, steps
from csflow.evaluation.labels import LabelledScore
from csflow.evaluation.pixel_metrics import FPR_LIMIT, PixelHistograms
from csflow.evaluation.ranking import Ranking

HISTOGRAM_BINS = 60
FEW_IMAGES = 20
"""With fewer images of a class, a warning says that they cannot tell a rate."""
RATE = (0.0, 1.0)


def plots(
    normal: Sequence[LabelledScore],
    defective: Sequence[LabelledScore],
    ranking: Ranking,
    histograms: PixelHistograms | None,
) -> dict[str, bytes]:
    """The plots as SVG files, by name."""
    precision, recall = ranking.precision_recall()
    metrics = ranking.metrics()
    roc = Curve(f"ROC, area {metrics['image_auroc']:.4f}", *ranking.roc())
    average = Curve(f"average precision {metrics['average_precision']:.4f}", recall, precision)
    files = {
        "roc.svg": chart([roc], "false positive rate", "recall", RATE, RATE),
        "precision_recall.svg": chart([average], "recall", "precision", RATE, RATE),
        "score_histogram.svg": _score_histogram(normal, defective),
    }
    if histograms:
        fpr, pro = histograms.pro_curve()
        below = fpr <= FPR_LIMIT
        curve = Curve(f"PRO, area {histograms.aupro().value:.4f}", fpr[below], pro[below])
        files["pro.svg"] = chart(
            [curve], "false positive rate of pixels", "per-region overlap", (0, FPR_LIMIT), RATE
        )
    return files


def _score_histogram(normal: Sequence[LabelledScore], defective: Sequence[LabelledScore]) -> bytes:
    scores = [np.array([image.anomaly_score for image in images]) for images in (normal, defective)]
    finite = [values[np.isfinite(values)] for values in scores]
    edges = np.histogram_bin_edges(np.concatenate(finite), HISTOGRAM_BINS)
    shares = [
        np.histogram(values, edges)[0] / len(images) for values, images in zip(finite, scores, strict=True)
    ]
    curves = [
        Curve(name, *steps(values, edges), is_filled=True)
        for name, values in zip(("normal", "defective"), shares, strict=True)
    ]
    return chart(curves, "anomaly score", "share of images")


def print_evaluation(evaluation: Mapping[str, Any]) -> None:
    images, metrics = evaluation["images"], evaluation["metrics"]
    print(f"{'model':<20}{evaluation['model_id']}")
    print(f"{'images':<20}{images['normal']:,} normal, {images['defective']:,} defective")
    if images["missing"]:
        print(f"{'missing':<20}{images['missing']:,} of {images['labelled']:,} labelled images have no score")
    if few := [f"{images[kind]:,} {kind}" for kind in ("normal", "defective") if images[kind] < FEW_IMAGES]:
        print(
            f"{'warning':<20}{' and '.join(few)} images are too few to tell a rate; the bootstrap's "
            f"intervals, such as that of image_auroc, are then too narrow; label {FEW_IMAGES} of each"
        )
    notes = {
        "best_f1": f"threshold {metrics['best_f1_threshold']:.4f}, chosen on these labels",
        "flag_fpr": "share of normal images that are flagged (is_anomalous)",
        "flag_recall": "share of defective images that are flagged",
    }
    print(f"{'':<20}{'':<9}95 % interval")
    for name, interval in evaluation["intervals"].items():
        print(f"{name:<20}{metrics[name]:.4f}   {_shown(interval)}   {notes.get(name, '')}".rstrip())
    if evaluation["why_none_is_flagged"]:
        print(f"{'no flags':<20}{evaluation['why_none_is_flagged']}")
    _print_pixels(evaluation.get("pixels"))
    _print_regions(evaluation.get("regions"))
    _print_classes(evaluation["defect_classes"])


def _print_pixels(pixels: Mapping[str, Any] | None) -> None:
    if pixels is None:
        return
    images, empty = pixels["images"], pixels["empty_masks"]
    if "metrics" in pixels:
        for name, value in pixels["metrics"].items():
            print(f"{name:<20}{value:.4f}   ± {pixels['binning_error'][name]:.1g} by binning")
        print(f"{'masks':<20}{images['with_mask']:,} images, {pixels['regions']:,} defective regions")
    elif images["without_mask"]:
        print(f"{'masks':<20}none {'marks a pixel' if empty else 'found'}, so no pixel metrics")
    if images["thresholded_mask"]:
        print(
            f"{'thresholded masks':<20}{images['thresholded_mask']:,} with grey beside black and white, as "
            "JPEG leaves it: defective from half of their maximum"
        )
    if images["without_mask"] and "metrics" in pixels:
        print(f"{'without mask':<20}{images['without_mask']:,} defective images, left out of pixel metrics")
    if empty:
        print(
            f"{'warning':<20}{len(empty):,} masks of defective images mark no pixel and count as none, "
            f"{empty[0]} first"
        )


def _print_regions(regions: Mapping[str, Any] | None) -> None:
    if regions is None:
        return
    false, of = (
        regions["false_regions_per_normal_image"],
        f"per normal image, of {regions['normal_images']:,}",
    )
    print(f"{'false regions':<20}{false['mean']:.4f}   {_shown(false['interval'])}   {of}")
    if precision := regions["precision_on_defective_images"]:
        of = f"of {regions['regions_on_defective_images']:,} regions on defective images"
        print(f"{'region precision':<20}{precision['share']:.4f}   {_shown(precision['interval'])}   {of}")
    print(_recall_line("defects found", regions["defects"]))
    for size in regions["defects_by_side"]:
        low, high = size["from_side"], size["to_side"]
        print(_recall_line(f"  {low} to {high} px" if high else f"  {low} px and more", size))


def _recall_line(name: str, found: Mapping[str, Any]) -> str:
    recall = found["recall"]
    return f"{name:<20}{recall['share']:.4f}   {_shown(recall['interval'])}   of {found['defects']:,}"


def _print_classes(classes: Mapping[str, Any]) -> None:
    if not classes:
        return
    width = max(20, 2 + max(map(len, classes)))
    columns = ("average_precision", "fpr_at_95_recall", "flag_recall")
    print(f"\n{'defect class':<{width}}images  image_auroc  95 % interval     {'  '.join(columns)}")
    for name, found in classes.items():
        metrics = found["metrics"]
        values = "  ".join(f"{metrics[column]:<{len(column)}.4f}" for column in columns)
        interval = _shown(found["intervals"]["image_auroc"])
        images, auroc = f"{found['images']:>6,}", f"{metrics['image_auroc']:<11.4f}"
        print(f"{name:<{width}}{images}  {auroc}  {interval}   {values}".rstrip())


def _shown(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.4f} - {interval[1]:.4f}"
