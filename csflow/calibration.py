"""Compares scores with those of held-out normal images: p-values, defect lists, the drift of a run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

DIGITS = 9
"""Decimals of summed weights. Those of a part are fractions, and their sums are to be whole numbers again."""


def part_weights(parts: Sequence[str]) -> NDArray[np.float64]:
    """Weights (n,) of images that show these parts: one for each part, which its images share."""
    _, part_N, sizes = np.unique(np.asarray(parts), return_inverse=True, return_counts=True)
    weights_N: NDArray[np.float64] = 1 / sizes[part_N]
    return weights_N


def part_maxima(values: ArrayLike, parts: Sequence[str]) -> NDArray[np.float64]:
    """The highest value of each part's images, which the worst image of another part is compared with."""
    _, part_N = np.unique(np.asarray(parts), return_inverse=True)
    maxima = np.full(part_N.max(initial=-1) + 1, -np.inf)
    np.maximum.at(maxima, part_N, np.asarray(values, np.float64))
    return maxima


def p_values(
    scores: ArrayLike, calibration_scores: ArrayLike, weights: ArrayLike | None = None
) -> NDArray[np.float64]:
    """Conformal p-value of each score: (1 + held-out normals scoring at least this) / (n + 1).

    For a normal image that is exchangeable with the n held-out ones, P(p ≤ α) ≤ α for every α
    (Vovk, Gammerman, Shafer: Algorithmic Learning in a Random World, 2005).

    Args:
        weights: of the held-out images (`part_weights`), if some show the same part. Then n is their sum, the
            number of parts, and images count by their weights. P(p ≤ α) ≤ α then holds for an image at random
            of a normal part that is exchangeable with the held-out ones (Lee, Barber, Willett:
            Distribution-free inference with hierarchical data, 2023).
    """
    reference = np.asarray(calibration_scores, dtype=np.float64)
    order = np.argsort(reference)
    above_N = weights_above(len(reference), weights, order)
    # NumPy sorts what is no number behind all numbers: such a score is the most anomalous there is.
    at_least = above_N[np.searchsorted(reference[order], np.asarray(scores, np.float64), side="left")]
    p: NDArray[np.float64] = (1 + at_least) / (above_N[0] + 1)
    return p


def weights_above(
    count: int, weights: ArrayLike | None = None, order: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """How much the images from place k of an order on weigh together, k = 0 … count; 1 each by default."""
    weights_N = np.ones(count) if weights is None else np.asarray(weights, np.float64)
    ordered = weights_N if order is None else weights_N[order]
    return np.append(ordered[::-1].cumsum().round(DIGITS)[::-1], 0)


def value_exceeded(values: ArrayLike, rate: float, weights: ArrayLike | None = None) -> float | None:
    """The lowest of held-out values that a new one exceeds with a probability of at most `rate`.

    What exceeds it has a p-value of at most `rate`. None if there are too few values.
    """
    reference = np.asarray(values, np.float64)
    order = np.argsort(reference)
    above_N = weights_above(len(reference), weights, order)
    # What lies between a value and the next higher one is exceeded by the latter and those above it.
    (low_enough,) = np.nonzero(1 + above_N[1:] <= rate * (above_N[0] + 1) + 1e-9)
    return float(reference[order[low_enough[0]]]) if len(low_enough) else None


def region_threshold(
    region_levels_NJ: ArrayLike, false_regions: float, weights: ArrayLike | None = None
) -> float | None:
    """Value of map cells above which a normal image has at most this many regions, on average.

    Conformal risk control (Angelopoulos, Bates, Fisch, Lei, Schuster, ICLR 2024): with the lowest threshold t
    for which (Σᵢ Lᵢ(t) + b(t)) / (n + 1) ≤ `false_regions`, a new image that is exchangeable with the n
    held-out ones has at most this many regions in expectation. Lᵢ(t) is the number of levels of image i
    above t (`csflow.regions.region_levels`), at least the number of its regions. b(t) stands for the new
    image: no finite sample bounds what one image may have, so it counts with at most
    b(t) = max(1, maxᵢ Lᵢ(t)) regions, as many as the worst held-out image. The bound may follow t, since each
    of the n + 1 images then counts with no more than the second largest number of all (or 1), which is
    symmetric in them and can only grow when t falls. If images show parts, the same holds with the mean of
    Lᵢ(t) over a part's images in place of Lᵢ(t), for the n parts.

    Args:
        region_levels_NJ: levels of the n held-out images in falling order, −∞ where there are fewer.
        weights: as those of `p_values`.

    Returns:
        None if so few images are held out that no threshold is high enough.
    """
    levels_NJ = np.asarray(region_levels_NJ, dtype=np.float64)
    order = np.argsort(-levels_NJ, axis=None, kind="stable")
    levels = levels_NJ.ravel()[order]
    levels, order = levels[np.isfinite(levels)], order[np.isfinite(levels)]
    image, number = np.divmod(order, levels_NJ.shape[1])
    weights_N = np.ones(len(levels_NJ)) if weights is None else np.asarray(weights, np.float64)
    # k levels lie above the one at place k = 0, 1, …; the worst image has `worst[k]` of them.
    above = np.append(0, weights_N[image].cumsum().round(DIGITS))[:-1]
    worst = np.maximum.accumulate(np.append(1, number + 1))[:-1]
    allowed = false_regions * (weights_N.sum().round(DIGITS) + 1) + 1e-9
    passing = int(np.searchsorted(above + worst, allowed, side="right"))
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


def why_none_is_flagged(heldout: int, false_positive_rate: float, unit: str = "images") -> str | None:
    """Why no image can be flagged, however bad, with so few held-out images or parts; None if some can.

    The smallest p-value is 1 / (n + 1), that of an image which scores above all n held-out ones.
    """
    if flaggable(heldout, false_positive_rate):
        return None
    return (
        f"{heldout} {unit} are held out, so the smallest p-value is {lowest_rate(heldout):g}, and "
        f"--false_positive_rate {false_positive_rate:g} can flag no image, however bad"
    )


def flaggable(heldout: int, false_positive_rate: float) -> bool:
    """Whether any image can be flagged at this rate: one that scores above all held-out ones."""
    return 1 / (heldout + 1) <= false_positive_rate


def lowest_rate(heldout: int) -> float:
    """The smallest p-value, so the lowest rate at which an image can be flagged, rounded up to two digits."""
    return _rounded_up(1 / (heldout + 1))


def heldout_for(false_positive_rate: float) -> int:
    """Smallest number of held-out images with which some image can be flagged at this rate."""
    needed = max(0, math.ceil(1 / false_positive_rate - 1e-6) - 1)
    return needed if flaggable(needed, false_positive_rate) else needed + 1


def _rounded_up(value: float) -> float:
    """The value with two significant digits, never less than it is."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / step * (1 - 1e-9)) * step:.2g}")


Verdict = Literal["like", "few", "unlike", "higher", "lower"]
"""What became of the images since the calibration, in one word; `Drift.words` says it in a sentence."""
DRIFT_P_VALUE = 0.001
"""Scores have drifted if a two-sample test's p-value is below this; of groups, below a share of it each."""
UNLIKE_SHARE = 0.9
"""Images as a whole are unlike the calibration if at least this share of them is above all held-out ones."""


@dataclass(frozen=True)
class Drift:
    """How the scores of a run differ from those of the held-out images."""

    ks_statistic: float
    """Largest distance between the two distribution functions, 0 to 1 (Kolmogorov-Smirnov statistic)."""
    ks_p_value: float
    """Probability of a distance at least as large if all scores came from one distribution."""
    share_below_5_percent: float
    """Share of images with a p-value below 0.05; about 0.05 if nothing changed and all parts are good. With
    fewer than 20 held-out images no p-value can be that small."""
    sample: int
    """Number of scores that the test compared."""
    heldout: int | None = None
    """Number of held-out images. None in records of older versions, as are all fields below."""
    global_ks_statistic: float | None = None
    """The distance between the global scores; None if the model has no other score than the global one."""
    global_ks_p_value: float | None = None
    share_above_all: float | None = None
    """Share of images with an anomaly or global score above that of every held-out image."""
    verdict: Verdict | None = None
    heldout_parts: int | None = None
    """Number of parts that the held-out images show; None if parts are not known."""

    @property
    def units(self) -> int | None:
        """Number of held-out parts, or of images if parts are not known: the n of p-values."""
        return self.heldout_parts or self.heldout

    @property
    def has_drifted(self) -> bool:
        return self.verdict in ("unlike", "higher", "lower")

    @property
    def words(self) -> str:
        """The verdict as a sentence. It asks, since scores alone cannot tell what has changed."""
        if self.verdict is None:
            return f"{self.share_below_5_percent:.1%} of p-values below 0.05; that csflow gave no verdict"
        held_out = f"the {self.heldout:,} held-out images"
        match self.verdict:
            case "like":
                return f"scores differ from those of {held_out} no more than by chance"
            case "few":
                return f"too few images to tell: {self.sample:,} scores, and {self.heldout:,} held-out images"
            case "unlike":
                return (
                    f"{self.share_above_all:.0%} of the images are unlike all of {held_out}: "
                    "another product or camera, or no part in the picture?"
                )
            case "higher":
                return f"scores are above those of {held_out}: other light, focus or parts, or many defects?"
            case "lower":
                return f"scores are below those of {held_out}: smoother pictures, or images of the training?"


def drift(
    scores: ArrayLike,
    share_below_5_percent: float,
    calibration_scores: ArrayLike,
    global_scores: tuple[ArrayLike, ArrayLike] | None = None,
    weights: NDArray[np.float64] | None = None,
    groups: int = 1,
) -> Drift | None:
    """The drift of a run's scores from those of the held-out images; None if there are no scores.

    The anomaly score looks most at the most unusual places, and the global score at the whole image, as a
    change of the camera does. So both are tested.

    Args:
        global_scores: those of the same images, and of the held-out ones; None if there is no such score, or
            it is the anomaly score.
        weights: as those of `p_values`. Photographs of a part say little more than one does, so the test then
            counts parts: the held-out ones, and as many in the run as it has if they have as many images.
        groups: how many groups of images are tested. Each then has its share of the false alarms.
    """
    both = [(scores, calibration_scores), *([global_scores] if global_scores else [])]
    pairs = [(np.asarray(run, np.float64), np.asarray(heldout, np.float64)) for run, heldout in both]
    sample, heldout = map(len, pairs[0])
    if not sample:
        return None
    parts = None if weights is None else round(float(weights.sum()))
    tests = [_two_sample_test(*pair, weights) for pair in pairs]
    above_all = np.any([run > heldout.max() for run, heldout in pairs], axis=0)
    share_above_all = float(above_all.mean())
    least = min(tests, key=lambda test: test.p_value)
    return Drift(
        ks_statistic=tests[0].statistic,
        ks_p_value=tests[0].p_value,
        share_below_5_percent=share_below_5_percent,
        sample=sample,
        heldout=heldout,
        global_ks_statistic=tests[1].statistic if len(tests) > 1 else None,
        global_ks_p_value=tests[1].p_value if len(tests) > 1 else None,
        share_above_all=share_above_all,
        verdict=_verdict(
            least,
            share_above_all,
            _least_p_value(*_independent(sample, heldout, parts)),
            DRIFT_P_VALUE / groups,
        ),
        heldout_parts=parts,
    )


class _Test(NamedTuple):
    """A two-sample Kolmogorov-Smirnov test."""

    statistic: float
    p_value: float
    is_higher: bool
    """Whether a score of the run is more often above a held-out one than below."""


def _independent(sample: int, heldout: int, parts: int | None) -> tuple[int, int]:
    """How many images of a run and of the held-out ones count as independent."""
    return (sample, heldout) if parts is None else (max(1, round(sample * parts / heldout)), parts)


def _two_sample_test(
    run: NDArray[np.float64], heldout: NDArray[np.float64], weights: NDArray[np.float64] | None
) -> _Test:
    from scipy.stats import ks_2samp, kstwo  # a second to import, which no scoring actor is to wait for

    order = np.argsort(heldout)
    above_N, ordered = weights_above(len(heldout), weights, order), heldout[order]
    left, right = (above_N[np.searchsorted(ordered, run, side)].mean() for side in ("left", "right"))
    is_higher = bool(left + right < above_N[0])
    if weights is None:
        test = ks_2samp(run, heldout)
        return _Test(float(test.statistic), float(test.pvalue), is_higher)
    values = np.concatenate([run, heldout])
    of_run = np.searchsorted(np.sort(run), values, "right") / len(run)
    of_heldout = 1 - above_N[np.searchsorted(ordered, values, "right")] / above_N[0]
    statistic = float(np.abs(of_run - of_heldout).max())
    one, other = _independent(len(run), len(heldout), round(above_N[0]))
    return _Test(statistic, float(kstwo.sf(statistic, max(1, round(one * other / (one + other))))), is_higher)


def _verdict(test: _Test, share_above_all: float, least_p_value: float, small: float) -> Verdict:
    """The verdict.

    Args:
        test: the one with the smallest p-value.
        least_p_value: the smallest p-value that this number of images allows.
        small: the p-value from which on scores have not drifted.
    """
    if least_p_value >= small:
        return "few"
    if test.p_value >= small:
        return "like"
    if share_above_all >= UNLIKE_SHARE:
        return "unlike"
    return "higher" if test.is_higher else "lower"


def _least_p_value(one: int, other: int) -> float:
    """The p-value of two samples that do not overlap: two of all ways to merge them look like that."""
    ways = math.lgamma(one + other + 1) - math.lgamma(one + 1) - math.lgamma(other + 1)
    return 2 * math.exp(-ways)
