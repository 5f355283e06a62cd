"""From anomaly scores to p-values, with the scores of held-out normal images as reference."""

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
