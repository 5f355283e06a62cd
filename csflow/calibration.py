"""Anomaly scores against those of held-out normal images: p-values, and the drift of a whole run."""

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
    at_least = len(reference) - np.searchsorted(reference, scores, side="left")
    p: NDArray[np.float64] = (1 + at_least) / (len(reference) + 1)
    # A score that is no number is the most anomalous there is, not the least.
    return np.where(np.isnan(scores), 1 / (len(reference) + 1), p)


@dataclass(frozen=True)
class Drift:
    """How the scores of a run differ from those of the held-out images."""

    ks_statistic: float
    """Largest distance between the two distribution functions, 0 to 1 (Kolmogorov-Smirnov)."""
    ks_p_value: float
    """Probability of a distance as large if both came from one distribution."""
    share_below_5_percent: float
    """Share of images with a p-value below 0.05: about 0.05 if nothing changed and all parts are good."""
    sample: int
    """Scores that the test saw."""


def drift(scores: ArrayLike, share_below_5_percent: float, calibration_scores: ArrayLike) -> Drift | None:
    """Compares a run's scores with the calibration; None if there are no scores."""
    from scipy.stats import ks_2samp  # takes a second to import, which no scoring actor is to wait for

    sample = np.asarray(scores, dtype=np.float64)
    if not len(sample):
        return None
    test = ks_2samp(sample, np.asarray(calibration_scores))
    return Drift(float(test.statistic), float(test.pvalue), share_below_5_percent, len(sample))
