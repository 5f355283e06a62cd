"""Compares scores with those of held-out normal images: p-values, defect lists, the drift of a run."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


def p_values(scores: ArrayLike, calibration_scores: ArrayLike) -> NDArray[np.float64]:
    """Conformal p-value of each score: (1 + held-out normals scoring at least this) / (n + 1).

    For a normal image that is exchangeable with the n held-out ones, P(p ≤ α) ≤ α for every α
    (Vovk, Gammerman, Shafer: Algorithmic Learning in a Random World, 2005).
    """
    reference = np.sort(np.asarray(calibration_scores, dtype=np.float64))
    scores = np.asarray(scores, dtype=np.float64)
    # NumPy sorts what is no number behind all numbers: such a score is the most anomalous there is.
    at_least = len(reference) - np.searchsorted(reference, scores, side="left")
    p: NDArray[np.float64] = (1 + at_least) / (len(reference) + 1)
    return p


def region_threshold(region_levels_NJ: ArrayLike, false_regions: float) -> float | None:
    """Value of map cells above which a normal image has at most this many regions, on average.

    Conformal risk control (Angelopoulos, Bates, Fisch, Lei, Schuster, ICLR 2024): with the lowest threshold t
    for which (Σᵢ Lᵢ(t) + b(t)) / (n + 1) ≤ `false_regions`, a new image that is exchangeable with the n
    held-out ones has at most this many regions in expectation. Lᵢ(t) is the number of levels of image i
    above t (`csflow.regions.region_levels`), at least the number of its regions. b(t) stands for the new
    image: no finite sample bounds what one image may have, so it counts with at most
    b(t) = max(1, maxᵢ Lᵢ(t)) regions, as many as the worst held-out image. The bound may follow t, since each
    of the n + 1 images then counts with no more than the second largest number of all (or 1), which is
    symmetric in them and can only grow when t falls.

    Args:
        region_levels_NJ: levels of the n held-out images in falling order, −∞ where there are fewer.

    Returns:
        None if so few images are held out that no threshold is high enough.
    """
    levels_NJ = np.asarray(region_levels_NJ, dtype=np.float64)
    order = np.argsort(-levels_NJ, axis=None, kind="stable")
    levels = levels_NJ.ravel()[order]
    levels, order = levels[np.isfinite(levels)], order[np.isfinite(levels)]
    # k levels lie above the one at place k = 0, 1, …; the worst image has `worst[k]` of them.
    worst = np.maximum.accumulate(np.append(1, order % levels_NJ.shape[1] + 1))[:-1]
    allowed = false_regions * (len(levels_NJ) + 1) + 1e-9
    passing = int(np.searchsorted(np.arange(len(levels)) + worst, allowed, side="right"))
    return float(levels[passing - 1]) if passing else None


def choose_defects(p_values: ArrayLike, false_discovery_rate: float) -> NDArray[np.bool_]:
    """Chooses a defect list on which at most this share of images are normal, on average.

    Benjamini and Hochberg (1995): the k images with the smallest p-values, for the largest k whose k-th
    p-value is at most k · rate / m. Conformal p-values that share one calibration depend on each other only
    in a way that keeps the promise (PRDS; Bates, Candès, Lei, Romano, Sesia, Annals of Statistics 51, 2023).

    Args:
        p_values: those of the m images that are decided on together.

    Raises:
        ValueError: the rate is not between 0 and 1.
    """
    if not 0 < false_discovery_rate < 1:
        raise ValueError(f"false discovery rate {false_discovery_rate} must be between 0 and 1")
    p = np.asarray(p_values, dtype=np.float64)
    ordered = np.sort(p)
    allowed = np.arange(1, len(p) + 1) * (false_discovery_rate / max(1, len(p)))
    # A p-value of exactly k · rate / m counts, however the two fractions were rounded.
    (passing,) = np.nonzero(ordered <= allowed * (1 + 1e-9))
    return p <= ordered[passing[-1]] if len(passing) else np.zeros(len(p), dtype=np.bool_)


def heldout_needed(images: int, above_all: int, false_discovery_rate: float) -> int:
    """Smallest number of held-out images with which a list can hold `above_all` (at least 1) of `images`.

    The `above_all` images score above every held-out one. They share the smallest possible p-value,
    1 / (n + 1), which must be at most above_all · rate / images.
    """
    return math.ceil(images / (false_discovery_rate * above_all) * (1 - 1e-9)) - 1


@dataclass(frozen=True)
class Drift:
    """How the scores of a run differ from those of the held-out images."""

    ks_statistic: float
    """Largest distance between the two distribution functions, 0 to 1 (Kolmogorov-Smirnov statistic)."""
    ks_p_value: float
    """Probability of a distance at least as large if all scores came from one distribution."""
    share_below_5_percent: float
    """Share of images with a p-value below 0.05; about 0.05 if nothing changed and all parts are good."""
    sample: int
    """Number of scores that the test compared."""


def drift(scores: ArrayLike, share_below_5_percent: float, calibration_scores: ArrayLike) -> Drift | None:
    """The drift of a run's scores from the calibration; None if there are no scores."""
    from scipy.stats import ks_2samp  # takes a second to import, which no scoring actor is to wait for

    sample = np.asarray(scores, dtype=np.float64)
    if not len(sample):
        return None
    test = ks_2samp(sample, np.asarray(calibration_scores))
    return Drift(float(test.statistic), float(test.pvalue), share_below_5_percent, len(sample))
