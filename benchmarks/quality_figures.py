"""What the quality benchmark reports of a detector: the same figures from the scores and maps of any."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from quality_data import TestImage
from scipy.stats import betabinom, ks_2samp
from sklearn.metrics import roc_auc_score, roc_curve

from csflow.calibration import p_values
from csflow.evaluation.pixel_metrics import PixelHistograms

FALSE_POSITIVE_RATE = 0.01
CHECKED_RATE = 0.05
"""At which the realised false-positive rate is checked: one that few held-out images allow, too."""


def image_figures(
    scores: NDArray[Any], heldout_scores: NDArray[Any], tested: Sequence[TestImage]
) -> dict[str, float | None]:
    """How well scores part defective from normal images.

    `detected` and `false_positives` are the shares of defective and normal images with a conformal p-value of
    at most 1 %, as users flag them; None with fewer than 99 held-out images, whose p-values are never that
    low. `found_at_1_percent` takes the threshold from the normal test images instead.
    """
    labels = np.array([image.defect_class != "good" for image in tested])
    fpr, recall, _ = roc_curve(labels, scores)
    flagged = p_values(scores, heldout_scores) <= FALSE_POSITIVE_RATE
    calibrated = len(heldout_scores) + 1 >= 1 / FALSE_POSITIVE_RATE
    return {
        "auroc": float(roc_auc_score(labels, scores)),
        "detected": float(flagged[labels].mean()) if calibrated else None,
        "false_positives": float(flagged[~labels].mean()) if calibrated else None,
        "found_at_1_percent": float(recall[fpr <= FALSE_POSITIVE_RATE].max()),
        "fpr_at_95_recall": float(fpr[np.argmax(recall >= 0.95)]),
    }


def validity(
    scores: NDArray[Any], heldout_scores: NDArray[Any], tested: Sequence[TestImage]
) -> dict[str, float]:
    """Whether p-values of normal images that training never saw are what they promise.

    `flagged` of `normals` have a p-value of at most `CHECKED_RATE`; `flagged_low` and `flagged_high` are the
    95 % interval of that number. `uniform` is the p-value of a Kolmogorov-Smirnov test of their scores
    against the held-out ones.
    """
    normal = scores[[image.defect_class == "good" for image in tested]]
    # Over draws of the held-out images too, not only of the new ones: beta-binomial, docs/calibration.md.
    k = int(CHECKED_RATE * (len(heldout_scores) + 1))
    low, high = betabinom.interval(0.95, len(normal), k, len(heldout_scores) + 1 - k)
    return {
        "normals": len(normal),
        "flagged": int((p_values(normal, heldout_scores) <= CHECKED_RATE).sum()),
        "flagged_low": int(low),
        "flagged_high": int(high),
        "uniform": float(ks_2samp(normal, heldout_scores).pvalue),
    }


def pixel_figures(
    maps: Iterable[NDArray[np.float32]], tested: Sequence[TestImage]
) -> dict[str, float | None]:
    """How well maps, one for each test image, find the pixels of known defects; None without masks.

    Normal images count with all their pixels, as the evaluation job counts them.
    """
    if not any(image.mask for image in tested):
        return {"aupro": None, "pixel_auroc": None}
    pixels = PixelHistograms()
    for anomaly_map, image in zip(maps, tested, strict=True):
        pixels.add(anomaly_map, _mask(image))
    return {"aupro": pixels.aupro().value, "pixel_auroc": pixels.auroc().value}


def _mask(image: TestImage) -> NDArray[np.bool_]:
    if image.mask:
        return np.asarray(Image.open(image.mask)) > 0
    width, height = Image.open(image.path).size
    return np.zeros((height, width), np.bool_)
