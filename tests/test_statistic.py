"""The anomaly statistic: 1 is usual, every score of normal images has honest p-values, small defects count.

Energies are drawn here: of an own size at each place, alike within an image, exchangeable between images.
"""

import copy

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import betabinom, kstest
from torch import Tensor

from csflow.calibration import p_values
from csflow.model import Gaussians, PlainStatistic, Scores, StandardisedStatistic
from csflow.model.statistic import energy_map, fitted_statistic
from csflow.model_directory import Calibration
from csflow.training.closing import CALIBRATED, calibration_columns, calibration_table, closing_tensors
from csflow.training.loop import Evaluation

SHAPES = [(8, 16, 16), (12, 8, 8)]
MAPS = [size for _, *size in [*SHAPES, *SHAPES]]
"""Of the Gaussian of each level, then of its latents."""
USUAL, HELDOUT, UNSEEN = 100, 499, 2000
"""Images."""


def normal_energies(images: int, seed: int) -> list[Tensor]:
    """Energy maps of normal images, (N, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    of_image_N11 = torch.exp(0.1 * torch.randn(images, 1, 1, generator=generator))
    energies = []
    for e, (height, width) in enumerate(MAPS):
        size_HW = (1 + e) * torch.linspace(0.5, 2, height * width).view(height, width)
        normal_NHWC = torch.randn(images, height, width, 8, generator=generator)
        energies.append(of_image_N11 * size_HW * normal_NHWC.square().mean(3))
    return energies


@pytest.fixture(scope="module")
def statistic() -> StandardisedStatistic:
    return fitted_statistic(normal_energies(2000, seed=0), SHAPES)


def test_one_is_usual_in_all_scores_and_at_every_place(statistic):
    scores = statistic(normal_energies(2000, seed=1))
    assert scores.global_score_B.mean().item() == pytest.approx(1, abs=0.02)
    assert scores.anomaly_score_B.mean().item() == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(scores.anomaly_map_BHW.mean(0), torch.ones(16, 16), rtol=0, atol=0.05)


def test_a_small_hot_spot_is_found_by_the_local_score_and_not_by_the_mean(statistic):
    normal = statistic(normal_energies(1000, seed=2))
    energies = normal_energies(20, seed=3)
    for e in (0, 2):  # at one place of the Gaussian and of the latents
        energies[e][:, 5, 7] *= 12
    hot = statistic(energies)
    local_p = p_values(hot.local_score_B, normal.local_score_B)
    global_p = p_values(hot.global_score_B, normal.global_score_B)
    anomaly_p = p_values(hot.anomaly_score_B, normal.anomaly_score_B)
    assert np.median(local_p) < 0.01
    assert np.median(anomaly_p) < 0.01
    assert np.median(global_p) > 0.1
    hottest_B = hot.anomaly_map_BHW.flatten(1).argmax(1)
    assert (hottest_B == 5 * 16 + 7).float().mean() >= 0.9


@pytest.mark.parametrize(
    ("energy", "missed_by"), [(0, "broad"), (3, "fine")], ids=["finest Gaussian", "coarsest latents"]
)
def test_what_one_average_misses_the_other_finds(statistic, energy, missed_by):
    def local_p(statistic: StandardisedStatistic) -> float:
        energies = normal_energies(20, seed=3)
        energies[energy][:, 5, 7] *= 8
        normal = statistic(normal_energies(1000, seed=2)).local_score_B
        return float(np.median(p_values(statistic(energies).local_score_B, normal)))

    alone = copy.deepcopy(statistic)
    weight_E = alone.weight_E if missed_by == "broad" else alone.fine_weight_E
    alone.weight_E.copy_(weight_E)
    alone.fine_weight_E.copy_(weight_E)
    alone.fine_line_2.copy_(torch.tensor([1.0, 0.0]))
    assert local_p(statistic) < 0.01 < 0.05 < local_p(alone)


def test_an_energy_is_of_means_over_the_window_that_lies_inside_of_the_map():
    x_BCHW = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(9))
    for row, column in ((0, 0), (1, 4), (2, 2), (3, 1)):
        rows, columns = slice(max(row - 1, 0), row + 2), slice(max(column - 1, 0), column + 2)
        expected_B = x_BCHW[:, :, rows, columns].mean((2, 3)).square().mean(1)
        torch.testing.assert_close(energy_map(x_BCHW, 3)[:, row, column], expected_B)
    torch.testing.assert_close(energy_map(x_BCHW), x_BCHW.square().mean(1))


def test_an_image_that_is_unusual_everywhere_is_found_by_the_global_score(statistic):
    normal = statistic(normal_energies(1000, seed=2))
    dim = statistic([1.4 * energy_NHW for energy_NHW in normal_energies(20, seed=3)])
    assert np.median(p_values(dim.global_score_B, normal.global_score_B)) < 0.01


def test_the_scores_of_levels_are_of_their_latents(statistic):
    energies = normal_energies(3, seed=4)
    expected_BS = torch.stack([energy_BHW.mean((1, 2)) / 2 for energy_BHW in energies[2:]], dim=1)
    torch.testing.assert_close(statistic(energies).scale_scores_BS, expected_BS)


@pytest.fixture(scope="module")
def calibrated() -> tuple[Calibration, dict[str, NDArray[np.float64]]]:
    """What the end of a training writes of held-out images, and the same columns of unseen ones."""
    gaussians = Gaussians(SHAPES)
    usual, heldout = (
        Evaluation(normal_energies(images, seed), torch.zeros(images))
        for images, seed in ((USUAL, 10), (HELDOUT, 11))
    )
    closing = closing_tensors(usual, heldout, gaussians, SHAPES)
    statistic = StandardisedStatistic(SHAPES)
    prefix = "state.statistic."
    statistic.load_state_dict({k.removeprefix(prefix): v for k, v in closing.items() if k.startswith(prefix)})
    images = pa.array([str(n) for n in range(HELDOUT)])
    columns = {"image_uri": images, "image_version": images}
    calibration = calibration_table({name: closing[f"calibration.{name}"] for name in CALIBRATED})
    unseen = calibration_columns(statistic(normal_energies(UNSEEN, seed=12)))
    columns |= {name: calibration[name] for name in calibration.column_names}
    return Calibration.of(pa.table(columns)), {name: value.numpy() for name, value in unseen.items()}


@pytest.mark.parametrize("name", ["anomaly_score", "global_score", "local_score"])
def test_p_values_of_normal_images_are_uniform_and_flag_as_many_as_wanted(calibrated, name):
    calibration, unseen = calibrated
    p = p_values(unseen[name], getattr(calibration, name))
    # All share one draw of held-out images, whose own scatter is that of as many images.
    assert kstest(p, "uniform").statistic < 1.63 * np.sqrt(1 / HELDOUT + 1 / UNSEEN)
    for rate in (0.01, 0.05, 0.1, 0.2):
        assert within_interval((p <= rate).sum(), rate)


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
def test_the_map_threshold_is_passed_anywhere_in_as_many_normal_images_as_wanted(calibrated, rate):
    calibration, unseen = calibrated
    threshold = calibration.map_threshold(rate)
    assert within_interval((unseen["map_maximum"] > threshold).sum(), rate)
    assert (calibration.map_maximum > threshold).sum() <= rate * (HELDOUT + 1) - 1


@pytest.mark.parametrize("wanted", [0.02, 0.1, 0.5])
def test_normal_images_have_as_many_regions_as_the_threshold_was_asked_for(calibrated, wanted):
    calibration, unseen = calibrated
    threshold = calibration.region_threshold(wanted)
    regions_N = (unseen["region_levels"] > threshold).sum(1)
    # The held-out images scatter as well.
    half_width = 2.6 * regions_N.std() * np.sqrt(1 / HELDOUT + 1 / UNSEEN)
    assert regions_N.mean() == pytest.approx(wanted, abs=half_width + 1 / HELDOUT)


def within_interval(found: int, rate: float) -> bool:
    """Whether so many of the unseen images are what 99 % of calibrations lead to."""
    k = round(rate * (HELDOUT + 1))
    low, high = betabinom.interval(0.99, UNSEEN, k, HELDOUT + 1 - k)
    return bool(low <= found <= high)


def test_the_share_of_images_above_the_map_threshold_is_at_most_the_rate_on_average():
    random = np.random.default_rng(8)
    for heldout, rate in ((30, 0.05), (99, 0.01), (60, 0.1)):
        shares = []
        for _ in range(400):
            maxima = random.standard_normal(heldout + 100)
            calibration = calibration_of(maxima[:heldout])
            shares.append((maxima[heldout:] > calibration.map_threshold(rate)).mean())
        assert np.mean(shares) <= rate + 2.6 * np.std(shares) / np.sqrt(len(shares))
        assert np.mean(shares) >= 0.5 * rate


def test_too_few_held_out_images_and_models_that_know_no_maxima_have_no_map_threshold():
    assert calibration_of(np.arange(98.0)).map_threshold(0.01) is None
    assert calibration_of(np.arange(99.0)).map_threshold(0.01) == 98
    assert calibration_of(None).map_threshold(0.5) is None


def calibration_of(map_maximum: NDArray[np.float64] | None) -> Calibration:
    images = 3 if map_maximum is None else len(map_maximum)
    uris = [str(n) for n in range(images)]
    columns = {"image_uri": uris, "image_version": uris, "anomaly_score": np.ones(images)}
    if map_maximum is not None:
        columns["map_maximum"] = map_maximum
    return Calibration.of(pa.table(columns))


def test_scores_do_not_depend_on_the_batch(statistic):
    energies = normal_energies(5, seed=9)
    together = statistic(energies)
    alone = [statistic([energy_NHW[[n]] for energy_NHW in energies]) for n in range(5)]
    joined = Scores(*map(torch.cat, zip(*alone, strict=True)))
    torch.testing.assert_close(together, joined, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("images", [1, 2, 7])
@pytest.mark.parametrize("value", [0.0, 1e-9, 1.0, 1e4])
def test_images_that_never_differ_give_finite_scores(images, value):
    energies = [torch.full((images, *size), value) for size in MAPS]
    statistic = fitted_statistic(energies, SHAPES)
    for scored in (energies, normal_energies(3, seed=10)):
        assert all(values.isfinite().all() for values in statistic(scored))


def test_a_single_image_tells_what_is_usual_as_far_as_it_goes():
    statistic = fitted_statistic(normal_energies(1, seed=11), SHAPES)
    scores = statistic(normal_energies(200, seed=12))
    assert all(values.isfinite().all() for values in scores)
    assert scores.global_score_B.mean().item() == pytest.approx(1, abs=0.3)


def test_without_whitening_only_the_anomaly_score_is_calibrated():
    energies = [torch.rand(4, *size) for size in MAPS[2:]]
    heldout = Evaluation(energies, torch.zeros(4))
    closing = closing_tensors(heldout, heldout, None, SHAPES)
    assert [name for name in closing if name.startswith("calibration.")] == ["calibration.anomaly_score"]
    expected_B = PlainStatistic(SHAPES)(energies).anomaly_score_B
    torch.testing.assert_close(closing["calibration.anomaly_score"], expected_B.double())
