"""From anomaly scores to p-values and defect lists."""

from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from csflow.calibration import Drift, Verdict, choose_defects, drift, heldout_needed, p_values


def test_the_p_value_counts_held_out_normals_that_score_at_least_this() -> None:
    assert p_values([0.5, 2.0, 9.0], [1.0, 2.0, 3.0]).tolist() == [1.0, 0.75, 0.25]
    assert p_values([np.nan], [1.0, 2.0, 3.0]).tolist() == [0.25]


def test_a_list_goes_to_the_last_p_value_below_the_line_even_if_earlier_ones_are_above_it() -> None:
    # The line is 0.05, 0.10, 0.15, 0.20: the first two lie above it, the third does not.
    assert choose_defects([0.9, 0.12, 0.13, 0.14], 0.2).tolist() == [False, True, True, True]


def test_a_p_value_on_the_line_counts_whatever_its_rounding() -> None:
    # 0.3 · 1/3 is a little less than 0.1 in floating point.
    assert choose_defects([0.1, 0.9, 0.9], 0.3).tolist() == [True, False, False]


def test_images_of_one_p_value_are_chosen_together() -> None:
    assert choose_defects([0.05, 0.05, 0.05, 1.0], 0.1).tolist() == [True, True, True, False]


def test_one_image_alone_is_chosen_at_a_p_value_up_to_the_rate() -> None:
    for p_value, expected in ((0.1, True), (0.11, False)):
        chosen = choose_defects([p_value], 0.1)
        assert (chosen.tolist(), chosen.dtype) == ([expected], np.bool_)


def test_nothing_is_chosen_from_nothing_and_no_rate_outside_0_to_1_is_taken() -> None:
    assert choose_defects([], 0.1).tolist() == []
    for rate in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            choose_defects([0.5], rate)


@pytest.mark.parametrize(("images", "above_all", "rate"), [(1000, 10, 0.1), (2624, 131, 0.1), (7, 3, 0.3)])
def test_a_list_is_possible_with_the_held_out_images_needed_and_with_none_fewer(
    images: int, above_all: int, rate: float
) -> None:
    def chosen(heldout: int) -> int:
        scores = np.concatenate([np.full(above_all, 2.0), np.zeros(images - above_all)])
        return int(choose_defects(p_values(scores, np.ones(heldout)), rate).sum())

    needed = heldout_needed(images, above_all, rate)
    assert (chosen(needed), chosen(needed - 1)) == (above_all, 0)


def false_discoveries(
    draws: int, heldout: int, normals: int, defects: int, rate: float, shift: float = 0.0
) -> tuple[float, float]:
    """Mean share of normal images on a list, over draws of everything, and half its 99 % interval.

    Scores of normal images are standard normal, those of defects lie 3 higher.
    """
    random = np.random.default_rng(7)

    def share() -> float:
        calibration = random.standard_normal(heldout)
        good, bad = random.standard_normal(normals) + shift, random.standard_normal(defects) + 3
        chosen = choose_defects(p_values(np.concatenate([good, bad]), calibration), rate)
        return float(chosen[:normals].sum() / max(1, chosen.sum()))

    shares: NDArray[np.float64] = np.array([share() for _ in range(draws)])
    return float(shares.mean()), float(2.576 * shares.std(ddof=1) / np.sqrt(draws))


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.2])
@pytest.mark.parametrize(("normals", "defects"), [(900, 100), (500, 500)])
def test_the_realised_false_discovery_rate_is_below_the_wanted_one(
    rate: float, normals: int, defects: int
) -> None:
    mean, half_width = false_discoveries(2000, 999, normals, defects, rate)
    assert mean + half_width < rate
    # Benjamini and Hochberg keep to the wanted rate times the share of normal images, and nearly spend it.
    assert mean + half_width > 0.9 * rate * normals / (normals + defects)


def test_without_any_defect_a_list_is_seldom_anything_but_empty() -> None:
    mean, half_width = false_discoveries(2000, 999, normals=200, defects=0, rate=0.1)
    assert mean + half_width < 0.1


def test_the_promise_does_not_outlive_a_drift_of_the_normal_images() -> None:
    mean, half_width = false_discoveries(300, 999, 900, 100, rate=0.1, shift=1.0)
    assert mean - half_width > 0.2


def test_drift_is_the_distance_of_two_distributions_with_its_probability() -> None:
    calibration = np.random.default_rng(0).standard_normal(400)
    found = drift([1.0, 2.0, 3.0, 4.0], 0.25, [3.0, 4.0, 5.0, 6.0])
    assert found is not None
    assert (found.ks_statistic, found.share_below_5_percent, found.sample) == (0.5, 0.25, 4)
    assert found.ks_p_value == pytest.approx(0.771, abs=1e-3)
    same = drift(np.random.default_rng(1).standard_normal(400), 0.05, calibration)
    other = drift(np.random.default_rng(1).standard_normal(400) + 0.5, 0.05, calibration)
    assert same is not None
    assert other is not None
    assert other.ks_p_value < 1e-6 < 0.05 < same.ks_p_value
    assert drift([], 0.0, calibration) is None


def judged(run: NDArray[np.float64], heldout: NDArray[np.float64]) -> str | None:
    found = drift(run, 0.0, heldout)
    assert found is not None
    return found.verdict


def test_another_product_is_told_from_a_shift_and_a_shift_from_a_quiet_night() -> None:
    random = np.random.default_rng(0)
    for heldout in (12, 200):
        held_out, night = random.standard_normal(heldout), random.standard_normal(300)
        assert judged(night, held_out) == "like"
        assert judged(night + 1.5, held_out) == "higher"
        assert judged(night - 1.5, held_out) == "lower"
        assert judged(night + 20, held_out) == "unlike"


def test_too_few_images_have_no_verdict() -> None:
    # Two held-out images and 24 others that score above both: one order of 325 is no surprise.
    assert judged(np.arange(24.0) + 10, np.array([1.0, 2.0])) == "few"
    assert judged(np.arange(24.0) + 10, np.array([1.0, 2.0, 3.0])) == "unlike"


def test_a_change_that_only_global_scores_show_is_a_drift() -> None:
    random = np.random.default_rng(0)
    held_out, night = random.standard_normal((2, 40)), random.standard_normal((2, 300))
    night[1] += 2
    found = drift(night[0], 0.05, held_out[0], (night[1], held_out[1]))
    assert found is not None
    assert found.ks_p_value > 0.001 > (found.global_ks_p_value or 1)
    assert (found.verdict, found.has_drifted) == ("higher", True)


def test_a_night_like_the_held_out_images_is_seldom_called_a_drift() -> None:
    """Two tests at 0.001 each; 20 draws of 2,000 would be five times as many as they allow."""
    random = np.random.default_rng(3)

    def has_drifted() -> bool:
        held_out, night = random.standard_normal((2, 12)), random.standard_normal((2, 80))
        found = drift(night[0], 0.05, held_out[0], (night[1], held_out[1]))
        return found is not None and found.has_drifted

    assert sum(has_drifted() for _ in range(2000)) < 20


@pytest.mark.parametrize("verdict", get_args(Verdict))
def test_every_verdict_has_a_sentence_of_its_own(verdict: Verdict) -> None:
    one, others = (Drift(1, 0, 0, 9, 12, 1, 0, 1, name) for name in (verdict, None))
    assert one.words != others.words
    assert "12 held-out images" in one.words
