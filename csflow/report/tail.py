"""An estimated defect list, for archives that are too large for their held-out images.

With n held-out images no p-value is below 1 / (n + 1), so of a million images a hundred defects are on no
list that can promise a rate. But so many images tell by themselves how the scores of normal ones fall off.
Beyond a high threshold, what exceeds it follows nearly a generalised Pareto distribution, whatever the scores
are (Pickands, Annals of Statistics 3, 1975). It is fitted to the images in a window: above its start are few
enough of them, and above its end may be defects, which the fit does not look at.

What is assumed: the scores of normal images fall off beyond the window as they do inside, and no faster than
exponentially. The latter makes lists shorter where scores fall off faster, as normally distributed ones do.
And the window has few defects: with more of them than there are images above it, the fit is bad, and there is
no list.

Dimension letters: M images, B bins of the window.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from csflow.calibration import choose_defects

FEWEST_IMAGES = 10_000
START_SHARE, FEWEST_IN_WINDOW = 0.005, 1000
"""The window starts where this share of the images is above, or so many if that is more."""
END_SHARE = 1 / 25
"""The share of those above its start that are above its end: the most defects that there may be."""
BINS = 50
RESAMPLES = 200
LEAST_FIT = 0.001
"""If the chance of a fit as bad as this is smaller, nothing is estimated."""


class Tail(NamedTuple):
    """How the highest scores of normal images fall off."""

    start: float
    share: float
    """Of the images that are above the start."""
    scale: float
    shape: float
    """0 for an exponential tail, more for a heavier one."""

    def beyond(self, score: NDArray[np.float64]) -> NDArray[np.float64]:
        """The share of normal images at or above these scores; 1 below the start."""
        excess = np.maximum(score - self.start, 0)
        return np.where(score < self.start, 1.0, self.share * _survival(excess, self.scale, self.shape))


class EstimatedList(NamedTuple):
    """The images that are worse than normal ones are estimated to be, at a wanted rate."""

    is_chosen_M: NDArray[np.bool_]
    normal_share: float
    """The estimated share of normal images on the list; 0 if it is empty."""
    interval: tuple[float, float]
    """95 % interval of this share, over resamples of the window and of how many normal images are listed."""

    def in_words(self) -> str:
        low, high = (100 * limit for limit in self.interval)
        return (
            f"{100 * self.normal_share:.2g} % of it are normal images (95 % interval {low:.2g} to "
            f"{high:.2g} %), if their scores fall off as they do below"
        )


def estimated_list(score_M: NDArray[np.float64], rate: float, seed: int = 0) -> EstimatedList | str:
    """Chooses as many images as an estimate allows of which at most this share is normal; or says why not."""
    images = len(score_M)
    if images < FEWEST_IMAGES:
        return f"an estimate takes {FEWEST_IMAGES:,} images, and these are {images:,}"
    window = _Window.of(score_M)
    if window is None:
        return "too many of the highest scores are equal, or no numbers, to tell how scores fall off"
    tail = window.tail(window.count_B)
    if not window.chance_of_fit(tail) >= LEAST_FIT:
        return (
            f"the highest scores do not fall off smoothly (more than {window.above:,} defects, or several "
            "kinds of images?)"
        )
    is_chosen_M = choose_defects(tail.beyond(score_M), rate)
    listed = int(is_chosen_M.sum())
    if not listed:
        return EstimatedList(is_chosen_M, 0.0, (0.0, 0.0))
    lowest = score_M[is_chosen_M].min(keepdims=True)
    random = np.random.default_rng(seed)
    tails = [window.tail(random.poisson(window.count_B), near=tail) for _ in range(RESAMPLES)]
    normal = [random.poisson(images * float(one.beyond(lowest)[0])) / listed for one in tails]
    low, high = np.quantile(np.minimum(normal, 1), [0.025, 0.975])
    expected = images * float(tail.beyond(lowest)[0]) / listed
    return EstimatedList(is_chosen_M, expected, (float(low), float(high)))


class _Window(NamedTuple):
    """The images to which a tail is fitted, counted in bins."""

    images: int
    edge_B1: NDArray[np.float64]
    """Borders of the bins: the start of the window first, its end last."""
    count_B: NDArray[np.int64]

    @classmethod
    def of(cls, score_M: NDArray[np.float64]) -> "_Window | None":
        """None if bins would be empty, since scores are equal."""
        above_start = _above_start(len(score_M))
        ranks = np.linspace(above_start, END_SHARE * above_start, BINS + 1).astype(int)
        edge_B1 = -np.partition(-score_M, ranks)[ranks]
        if not (np.isfinite(edge_B1).all() and (np.diff(edge_B1) > 0).all()):
            return None
        return cls(len(score_M), edge_B1, np.histogram(score_M, edge_B1)[0])

    @property
    def above(self) -> int:
        """The number of images above the window."""
        return round(END_SHARE * _above_start(self.images))

    def tail(self, count_B: NDArray[np.int64], near: Tail | None = None) -> Tail:
        """The most likely tail, if so many images were in the bins; `near` is where to begin the search."""
        from scipy.optimize import minimize  # half a second to import

        length = self.edge_B1[-1] - self.edge_B1[0]

        def loss(parameters: NDArray[np.float64]) -> float:
            # Of the images inside the window alone, so that it does not matter how many are beyond.
            share_B = self._shares(*self._scale_and_shape(parameters))
            return -float((count_B * np.log(np.maximum(share_B, 1e-300))).sum())

        # From a shape of 0 the search would not get away: its steps are a share of where it begins.
        scale, shape = (length / 3, 0.04) if near is None else (near.scale, max(near.shape, 0.01))
        start = [np.log(scale), shape**0.5]
        found = minimize(loss, start, method="Nelder-Mead", options={"xatol": 1e-3, "fatol": 1e-3}).x
        scale, shape = self._scale_and_shape(found)
        inside = 1 - float(_survival(np.array(length), scale, shape))
        return Tail(float(self.edge_B1[0]), count_B.sum() / self.images / inside, scale, shape)

    def chance_of_fit(self, tail: Tail) -> float:
        """The p-value of the counts if this tail were true (G-test)."""
        from scipy.stats import chi2

        expected_B = self.count_B.sum() * self._shares(tail.scale, tail.shape)
        distance = 2 * (self.count_B * np.log(self.count_B / expected_B)).sum()
        return float(chi2.sf(distance, BINS - 3))

    def _shares(self, scale: float, shape: float) -> NDArray[np.float64]:
        """The share of the images in the window that each bin holds."""
        survival_B1 = _survival(self.edge_B1 - self.edge_B1[0], scale, shape)
        return -np.diff(survival_B1) / (1 - survival_B1[-1])

    @staticmethod
    def _scale_and_shape(parameters: NDArray[np.float64]) -> tuple[float, float]:
        return float(np.exp(parameters[0])), float(parameters[1] ** 2)


def _above_start(images: int) -> float:
    """The number of images above the start of the window."""
    return max(START_SHARE * images, FEWEST_IN_WINDOW)


def _survival(excess: NDArray[np.float64], scale: float, shape: float) -> NDArray[np.float64]:
    """The share of a generalised Pareto distribution that is above."""
    if shape < 1e-6:
        return np.exp(-excess / scale)
    return np.asarray((1 + shape * excess / scale) ** (-1 / shape))
