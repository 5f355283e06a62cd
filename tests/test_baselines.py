"""The simple detectors and planted defects that the quality benchmark compares with."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf
from torch import Tensor
from torch.distributions import MultivariateNormal

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import baselines
import quality_table
from planted_defects import AREA, KINDS, plant


def features(images: int, seed: int) -> list[Tensor]:
    """Two levels of correlated normal features, 8 x 8 and 4 x 4 positions."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    fine = torch.randn(images, 6, 8, 8, generator=generator)
    coarse = torch.randn(images, 4, 4, 4, generator=generator)
    return [torch.einsum("ij,njhw->nihw", mixing, fine) + 3, 2 * coarse]


def test_the_loss_of_a_gaussian_is_its_negative_log_likelihood_per_dimension() -> None:
    levels = features(200, seed=1)
    gaussian = baselines.Gaussian(mean_per_position=False)
    gaussian.fit(levels)
    likelihood = 0.0
    for level, mean, factor in zip(levels, gaussian.means, gaussian.factors, strict=True):
        rows = level.movedim(1, -1).double()
        density = MultivariateNormal(mean.flatten().double(), scale_tril=factor)
        constant = rows.shape[-1] / 2 * math.log(2 * math.pi)
        likelihood += float((density.log_prob(rows) + constant).sum((1, 2)).mean())
    assert gaussian.loss(levels) == pytest.approx(-likelihood / (6 * 64 + 4 * 16), abs=1e-5)
    assert float(gaussian.score(levels).scores["mean"].mean()) == pytest.approx(0.5, abs=0.01)


def test_shrinkage_is_that_of_ledoit_and_wolf() -> None:
    rows = features(40, seed=2)[0].mean((2, 3)).double()
    rows = rows - rows.mean(0)
    expected = ledoit_wolf(rows.numpy(), assume_centered=True)[0]
    np.testing.assert_allclose(baselines.ledoit_wolf(rows).numpy(), expected, atol=1e-12)


def test_covariances_of_few_images_are_drawn_to_that_of_all_positions() -> None:
    validation = features(50, seed=3)
    mixed = baselines.PositionGaussian(validation)
    mixed.fit(features(30, seed=4))
    common = baselines.Gaussian(mean_per_position=True)
    common.fit(features(30, seed=4))
    assert min(mixed.weights) >= 0.9
    assert mixed.loss(validation) < common.loss(validation) + 1e-5


@pytest.mark.parametrize(
    "detector",
    [
        baselines.Gaussian(mean_per_position=False),
        baselines.Gaussian(mean_per_position=True),
        baselines.PositionGaussian(features(50, seed=5)),
        baselines.Padim(seed=0, channels=8),
        baselines.NearestNeighbours(seed=0, share=0.1),
    ],
    ids=lambda detector: type(detector).__name__,
)
def test_a_detector_finds_the_changed_image_and_the_changed_place(detector: baselines.Baseline) -> None:
    detector.fit(features(200, seed=6))
    tested = features(20, seed=7)
    tested[0][11, :, 3, 5] += 20
    scored = detector.score(tested)
    assert scored.map_NHW is not None
    row, column = divmod(int(scored.map_NHW[11].argmax()), 8)
    assert abs(row - 3) <= 1 and abs(column - 5) <= 1  # patches are means of 3 x 3 positions
    assert {int(scores.argmax()) for scores in scored.scores.values()} == {11}


def test_a_coreset_leaves_out_no_lonely_patch() -> None:
    generator = torch.Generator().manual_seed(0)
    crowd = 0.01 * torch.randn(500, 3, generator=generator)
    rows = torch.cat([crowd, 5 * torch.eye(3)])
    assert {500, 501, 502} < set(baselines.greedy_coreset(rows, 4, generator).tolist())


def test_the_table_has_means_over_seeds_and_the_best_score_of_each_baseline(tmp_path: Path) -> None:
    flows = [
        {"data": "elpv", "detector": "default", "seed": seed, "auroc": auroc, "detected": detected}
        for seed, auroc, detected in ((0, 0.9, 0.5), (1, 0.94, None))
    ]
    simple = [
        {"data": "elpv", "detector": "PaDiM", "features": "blocks.5", "variant": variant, "auroc": auroc}
        for variant, auroc in (("mean", 0.8), ("max", 0.85))
    ]
    for name, lines in (("flows", flows), ("baselines", simple)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert quality_table.tables(tmp_path).splitlines()[2:] == [
        "| detector | seeds | AUROC | detected at p ≤ 0.01 |",
        "|---|---|---|---|",
        "| default | 2 | 0.920 (0.900 to 0.940) | 0.500 |",
        "| PaDiM, blocks.5; max | 1 | 0.850 |  |",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_defect_is_small_and_leaves_the_rest_as_it_was(kind: str) -> None:
    photograph = np.random.default_rng(0).integers(100, 140, (200, 240), np.uint8)
    for seed in range(5):
        planted, again = plant(photograph, kind, seed), plant(photograph, kind, seed)
        assert AREA[0] <= planted.mask_HW.mean() <= AREA[1]
        assert np.array_equal(planted.image_HW, again.image_HW)
        changed = planted.image_HW != photograph
        assert changed[planted.mask_HW].mean() > 0.8
        rows, columns = np.nonzero(planted.mask_HW)
        near = np.zeros_like(changed)
        near[max(0, rows.min() - 12) : rows.max() + 13, max(0, columns.min() - 12) : columns.max() + 13] = (
            True
        )
        assert not changed[~near].any()
