"""Estimated defect lists: what share of normal images they say and have, and when there is none."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from csflow.calibration import choose_defects, p_values
from csflow.report.tail import FEWEST_IMAGES, EstimatedList, estimated_list

NORMAL, DEFECTS = 300_000, 60


def night(tail: str, seed: int, normal: int = NORMAL, defects: int = DEFECTS) -> NDArray[np.float64]:
    """Scores of normal images, and behind them those of defects, around the highest of the normal ones."""
    distribution = {"normal": stats.norm(), "exponential": stats.expon(), "heavy": stats.t(8)}[tail]
    random = np.random.default_rng(seed)
    median, high = distribution.isf([0.5, 0.3 / normal])
    bad = median + (high - median) * random.uniform(0.6, 1.6, defects)
    return np.concatenate([distribution.rvs(normal, random_state=random), bad])


def normal_share(listed: EstimatedList, normal: int = NORMAL) -> float:
    return float(listed.is_chosen_M[:normal].sum() / listed.is_chosen_M.sum())


@pytest.mark.parametrize(("tail", "most"), [("normal", 0.1), ("exponential", 0.1), ("heavy", 0.2)])
def test_the_estimated_share_of_normal_images_is_about_the_real_one(tail: str, most: float) -> None:
    shares, found, above = [], [], 0
    for seed in range(10):
        scores = night(tail, seed)
        listed = estimated_list(scores, 0.1)
        assert isinstance(listed, EstimatedList)
        assert listed.interval[0] < listed.normal_share <= 0.1 < listed.interval[1]
        shares.append(normal_share(listed))
        found.append(listed.is_chosen_M[NORMAL:].mean())
        above += shares[-1] > listed.interval[1]
    assert np.mean(shares) < most  # of tails that fall off faster than exponentially, less than is said
    assert above <= 1
    assert np.mean(found) > 0.4
    # Held-out images that tell as much would be 10 / 0.1 times as many as the images on such a list.
    heldout = night(tail, 99, 2000, 0)
    assert not choose_defects(p_values(scores, heldout), 0.1).any()


def test_a_night_without_defects_has_a_list_of_a_few_images_at_most() -> None:
    for seed in range(5):
        listed = estimated_list(night("exponential", seed, defects=0), 0.1)
        assert isinstance(listed, EstimatedList)
        assert listed.is_chosen_M.sum() <= 3


def test_scores_that_are_no_numbers_are_the_worst_and_change_nothing_else() -> None:
    scores = night("exponential", 3)
    whole = estimated_list(scores, 0.1)
    scores[np.argmax(scores)] = np.inf
    infinite = estimated_list(scores, 0.1)
    assert isinstance(whole, EstimatedList) and isinstance(infinite, EstimatedList)
    assert (whole.is_chosen_M == infinite.is_chosen_M).all()


@pytest.mark.parametrize(
    ("scores", "why"),
    [
        (np.arange(FEWEST_IMAGES - 1.0), "an estimate takes 10,000 images, and these are 9,999"),
        (np.ones(20_000), "too many of the highest scores are equal"),
        (np.append(-np.log(np.linspace(1e-6, 1, 10_000)), np.full(50, np.inf)), "or no numbers"),
        # A second kind of images, as many as are in the window, all alike.
        (
            np.concatenate([-np.log(np.linspace(1e-6, 1, 50_000)), np.linspace(5, 5.02, 300)]),
            "do not fall off smoothly (more than 40",
        ),
    ],
)
def test_where_nothing_can_be_estimated_it_says_why(scores: NDArray[np.float64], why: str) -> None:
    found = estimated_list(scores, 0.1)
    assert isinstance(found, str)
    assert why in found
