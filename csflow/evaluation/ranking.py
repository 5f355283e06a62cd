"""Image-level metrics: how well anomaly scores rank defective images above normal ones.

Dimension letters: T distinct scores, highest first; N images.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
RECALL = 0.95
"""The recall at which the metric `fpr_at_95_recall` is taken."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Ranking:
    """The number of images of each class at each score, which is all that a metric of a ranking needs."""

    score_T: NDArray[np.float64]
    defective_T: NDArray[np.int64]
    normal_T: NDArray[np.int64]

    @classmethod
    def of(cls, labels: ArrayLike, anomaly_scores: ArrayLike) -> "Ranking":
        """Ranks n images of both classes (label 1 defective, 0 normal). A score that is not finite ranks
        highest."""
        is_defective_N = np.asarray(labels, dtype=bool)
        score_T, place_N = np.unique(_finite(anomaly_scores), return_inverse=True)
        counts = [np.bincount(place_N[chosen], minlength=len(score_T)) for chosen in _classes(is_defective_N)]
        return cls(score_T[::-1], counts[0][::-1], counts[1][::-1])

    def roc(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """False positive rate and recall at each threshold, from (0, 0) to (1, 1)."""
        rates = [np.append(0, counts_T).cumsum() for counts_T in (self.normal_T, self.defective_T)]
        return rates[0] / rates[0][-1], rates[1] / rates[1][-1]

    def precision_recall(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Precision and recall at each threshold, highest first."""
        found_T = self.defective_T.cumsum()
        return found_T / (found_T + self.normal_T.cumsum()), found_T / found_T[-1]

    def metrics(self) -> dict[str, float]:
        """The metrics by name. A pair of images with equal scores counts half in the AUROC."""
        # No np.dot: BLAS starts threads for vectors of this length, and waits for them longer than it adds.
        found_T, false_T = self.defective_T.cumsum(), self.normal_T.cumsum()
        defective, normal = found_T[-1], false_T[-1]
        pairs_in_order = (self.normal_T * (found_T - self.defective_T / 2)).sum()
        precision_T = found_T / np.maximum(found_T + false_T, 1)
        f1_T = 2 * found_T / (found_T + false_T + defective)
        return {
            "image_auroc": float(pairs_in_order / (defective * normal)),
            "average_precision": float((precision_T * self.defective_T).sum() / defective),
            "fpr_at_95_recall": float(false_T[np.argmax(found_T / defective >= RECALL)] / normal),
            "best_f1": float(f1_T.max()),
        }

    def best_f1_threshold(self) -> float:
        """The score with the best F1. The choice is optimistic, since F1 is measured on the same labels."""
        found_T = self.defective_T.cumsum()
        return float(self.score_T[np.argmax(found_T / (found_T + self.normal_T.cumsum() + found_T[-1]))])

    def resampled(self, random: np.random.Generator) -> "Ranking":
        """A resample of as many images of each class, drawn with replacement."""
        return Ranking(self.score_T, _redraw(self.defective_T, random), _redraw(self.normal_T, random))


def image_metrics(labels: ArrayLike, anomaly_scores: ArrayLike) -> dict[str, float]:
    """AUROC, average precision, FPR at 95 % recall, best F1 and its threshold; see `Ranking.of`."""
    ranking = Ranking.of(labels, anomaly_scores)
    return ranking.metrics() | {"best_f1_threshold": ranking.best_f1_threshold()}


def bootstrap_intervals(ranking: Ranking, resamples: int, seed: int = 0) -> dict[str, Interval]:
    """95 % percentile intervals of `Ranking.metrics`, over resamples stratified by class (Efron 1979)."""
    random = np.random.default_rng(seed)
    drawn = [ranking.resampled(random).metrics() for _ in range(resamples)]
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    intervals = {name: np.quantile([metrics[name] for metrics in drawn], tails) for name in drawn[0]}
    return {name: (float(low), float(high)) for name, (low, high) in intervals.items()}


def auroc_loss(
    labels: ArrayLike, before: ArrayLike, after: ArrayLike, resamples: int, seed: int = 0
) -> tuple[float, Interval]:
    """By how much the AUROC of images falls from one score of each to another, and its 95 % interval.

    The interval is that of `bootstrap_intervals`. Both scores are those of the same resampled images, since
    what makes an image hard is hard for both.
    """
    is_defective_N, random = np.asarray(labels, dtype=bool), np.random.default_rng(seed)
    scores = [np.asarray(score_N, dtype=np.float64) for score_N in (before, after)]
    places = [np.flatnonzero(chosen_N) for chosen_N in _classes(is_defective_N)]

    def loss(place_N: NDArray[np.int64]) -> float:
        rankings = [Ranking.of(is_defective_N[place_N], score_N[place_N]) for score_N in scores]
        higher, lower = (ranking.metrics()["image_auroc"] for ranking in rankings)
        return higher - lower

    drawn = [
        loss(np.concatenate([random.choice(of_class, len(of_class)) for of_class in places]))
        for _ in range(resamples)
    ]
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return loss(np.arange(len(is_defective_N))), (float(low), float(high))


def mean_interval(values: ArrayLike, resamples: int, seed: int = 0) -> tuple[float, Interval]:
    """The mean of numbers of images, and its 95 % percentile interval over bootstrap resamples."""
    values_N = np.asarray(values, dtype=np.float64)
    random = np.random.default_rng(seed)
    means = [random.choice(values_N, len(values_N)).mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(values_N.mean()), (float(low), float(high))


def share(chosen: ArrayLike) -> tuple[float, Interval]:
    """The share of true values, and the share's exact 95 % interval (Clopper and Pearson 1934)."""
    from scipy.stats import binomtest  # a second to import, which training without --evaluate does without

    chosen_N = np.asarray(chosen, dtype=bool)
    result = binomtest(int(chosen_N.sum()), len(chosen_N))
    interval = result.proportion_ci(CONFIDENCE, method="exact")
    return float(result.statistic), (float(interval.low), float(interval.high))


def _classes(is_defective_N: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    return is_defective_N, ~is_defective_N


def _redraw(counts_T: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
    place_N = np.repeat(np.arange(len(counts_T)), counts_T)
    return np.bincount(place_N[random.integers(len(place_N), size=len(place_N))], minlength=len(counts_T))


def _finite(anomaly_scores: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(anomaly_scores, dtype=np.float64)
    finite = np.isfinite(values)
    return np.where(finite, values, np.nextafter(values[finite].max(initial=0.0), np.inf))
