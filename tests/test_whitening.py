"""The whitening: exact as a bijection, sound for few images, and its fit the same for all batchings."""

import numpy as np
import pytest
import torch
from torch import Tensor

from csflow.model.whitening import Gaussians, Moments, Whitening, fit_latents, gaussians_of

SHAPES = [(6, 4, 4), (9, 2, 2)]


def correlated(images: int, seed: int = 0, shapes: list[tuple[int, int, int]] = SHAPES) -> list[Tensor]:
    """Features of some images, per level, correlated over channels and of very different spread."""
    generator = torch.Generator().manual_seed(seed)
    levels = []
    for channels, height, width in shapes:
        mixing_CC = torch.randn(channels, channels, generator=torch.Generator().manual_seed(1))
        x_BCHW = torch.randn(images, channels, height, width, generator=generator)
        levels.append(torch.einsum("dc,bchw->bdhw", mixing_CC, x_BCHW) * 3 + 5)
    return levels


def fitted(y: list[Tensor], batches: int = 1, origin: int = 0) -> Whitening:
    return gaussians(y, batches, origin).whitening


def gaussians(y: list[Tensor], batches: int = 1, origin: int = 0) -> Gaussians:
    levels = []
    for y_BCHW in y:
        moments = Moments.around(y_BCHW[[origin]])
        for part_BCHW in y_BCHW.chunk(batches):
            moments = moments.with_images(part_BCHW)
        levels.append(moments)
    return gaussians_of(levels)


def test_inverse_and_log_determinant_are_exact():
    whitening = fitted(correlated(50)).double()
    y = [y_BCHW.double() for y_BCHW in correlated(2, seed=5)]
    for restored, expected in zip(whitening.inverse(whitening(y)), y, strict=True):
        torch.testing.assert_close(restored, expected, rtol=1e-10, atol=1e-10)
    flat_D = torch.cat([y_BCHW[0].flatten() for y_BCHW in y])

    def whole(flat_D: Tensor) -> Tensor:
        parts = flat_D.split([y_BCHW[0].numel() for y_BCHW in y])
        levels = [part.view(1, *y_BCHW.shape[1:]) for part, y_BCHW in zip(parts, y, strict=True)]
        return torch.cat([x_BCHW.flatten() for x_BCHW in whitening(levels)])

    jacobian_DD = torch.autograd.functional.jacobian(whole, flat_D)
    assert whitening.log_det() == pytest.approx(torch.linalg.slogdet(jacobian_DD).logabsdet.item(), rel=1e-10)


def test_whitened_training_features_have_mean_0_and_covariance_1():
    y = correlated(2000)
    for x_BCHW in fitted(y)(y):
        x_CN = x_BCHW.movedim(1, 0).flatten(1)
        torch.testing.assert_close(x_CN.mean(1), torch.zeros(len(x_CN)), atol=1e-3, rtol=0)
        torch.testing.assert_close(x_CN.cov(), torch.eye(len(x_CN)), atol=0.05, rtol=0)


def test_the_fit_does_not_depend_on_batches_nor_on_the_order_of_images():
    y = correlated(40)
    shuffled = [y_BCHW.flip(0) for y_BCHW in y]
    once, often = fitted(y), fitted(shuffled, batches=7, origin=39)
    for name, value in once.state_dict().items():
        torch.testing.assert_close(often.state_dict()[name], value, rtol=1e-5, atol=1e-5)


def test_moments_of_disjoint_images_add_up():
    y_BCHW = correlated(30)[0]
    start = Moments.around(y_BCHW)
    both = start.with_images(y_BCHW[:11]) + start.with_images(y_BCHW[11:])
    whole = start.with_images(y_BCHW)
    assert both.images == whole.images == 30
    torch.testing.assert_close(both.product_PCC, whole.product_PCC)
    torch.testing.assert_close(both.sum_CP, whole.sum_CP)
    assert both.squared_norm == pytest.approx(whole.squared_norm)


def test_a_mean_that_differs_between_positions_is_taken_out_and_chance_is_not():
    """Aligned parts have a mean image; a texture has none, and a few of its images must not invent one."""
    texture = correlated(10)
    means_CHW = [20 * torch.randn(shape, generator=torch.Generator().manual_seed(9)) for shape in SHAPES]
    part = [y_BCHW + mean_CHW for y_BCHW, mean_CHW in zip(texture, means_CHW, strict=True)]
    for level, mean_CHW in enumerate(means_CHW):
        found_CHW = fitted(part).mean(level)
        expected_CHW = part[level].mean(0)
        assert (found_CHW - expected_CHW).std() < 0.02 * mean_CHW.std()
        spread = fitted(texture).mean(level).flatten(1).std(dim=1)
        by_chance = texture[level].mean(0).flatten(1).std(dim=1)
        assert (spread < 0.5 * by_chance).all()


@pytest.mark.parametrize("images", [2, 3, 20])
def test_fewer_images_than_channels_give_finite_features_of_new_images(images):
    shapes = [(64, 2, 2), (128, 1, 1)]
    whitening = fitted(correlated(images, shapes=shapes))
    assert np.isfinite(whitening.log_det())
    for x_BCHW in whitening(correlated(20, seed=3, shapes=shapes)):
        assert x_BCHW.isfinite().all()
        # Unseen directions are not taken for ones that never vary.
        assert x_BCHW.square().mean() < 100


def test_features_that_never_differ_are_only_centred():
    y = [torch.full((5, *shape), 7.0) for shape in SHAPES]
    whitening = fitted(y)
    for x_BCHW, shape in zip(whitening([y_BCHW + 1 for y_BCHW in y]), SHAPES, strict=True):
        torch.testing.assert_close(x_BCHW, torch.ones(5, *shape))
    assert whitening.log_det() == pytest.approx(0, abs=1e-6)


def test_differences_below_the_rounding_of_the_cache_are_not_magnified():
    generator = torch.Generator().manual_seed(0)
    y_BCHW = 5 + 1e-5 * torch.randn(50, 6, 4, 4, generator=generator)
    rounded_BCHW = y_BCHW * (1 + 2**-11 * torch.rand(y_BCHW.shape, generator=generator))
    (x_BCHW,) = fitted([y_BCHW])([rounded_BCHW])
    assert x_BCHW.square().mean() < 3


def test_a_covariance_that_differs_between_positions_is_whitened_at_each_of_them():
    """Given images enough; a few say nothing of single positions, and the level's covariance serves all."""
    y_BCHW = correlated(4000)[0] - 5
    scale_HW = torch.linspace(0.2, 5, 16).view(4, 4)
    fitted = gaussians([y_BCHW * scale_HW])
    (x_BCHW,) = fitted.positions(fitted.whitening([y_BCHW * scale_HW]))
    torch.testing.assert_close(x_BCHW[:, :, 1:].var(0), torch.ones(6, 3, 4), atol=0.1, rtol=0)
    few = gaussians([y_BCHW[:5]]).positions.matrix(0)
    torch.testing.assert_close(few, torch.eye(6).expand_as(few), atol=0.05, rtol=0)


def test_the_log_determinant_of_the_gaussian_is_that_of_its_matrices():
    y = correlated(500)
    gaussian = gaussians(y).positions
    by_hand = sum(
        torch.linalg.slogdet(gaussian.matrix(level)).logabsdet.sum().item() for level in range(len(SHAPES))
    )
    assert gaussian.log_det() == pytest.approx(by_hand, rel=1e-5)


def test_latents_become_white_at_each_position():
    y = correlated(4000)
    fitted = Gaussians([y_BCHW.shape[1:] for y_BCHW in y])
    zero = [torch.zeros(y_BCHW.shape[1]).double() for y_BCHW in y]
    moments = [
        Moments.about(o, y_BCHW.shape[1:]).with_images(y_BCHW) for o, y_BCHW in zip(zero, y, strict=True)
    ]
    fit_latents(fitted.latents, moments)
    for z_BCHW in fitted.latents(y):
        z_PCB = z_BCHW.flatten(2).permute(2, 1, 0)
        moment_PCC = z_PCB @ z_PCB.mT / len(z_BCHW)
        torch.testing.assert_close(
            moment_PCC, torch.eye(len(z_PCB[0])).expand_as(moment_PCC), atol=0.05, rtol=0
        )


def test_levels_without_room_for_a_matrix_per_position_have_one_for_all(monkeypatch):
    monkeypatch.setattr("csflow.model.whitening.MOST_NUMBERS", 9 * 9 * 4)
    y = correlated(2000)
    fitted = gaussians(y)
    assert [fitted.positions.matrix(level).shape for level in (0, 1)] == [(1, 6, 6), (4, 9, 9)]
    for x_BCHW in fitted.positions(fitted.whitening(y)):
        x_CN = x_BCHW.movedim(1, 0).flatten(1)
        torch.testing.assert_close(x_CN.cov(), torch.eye(len(x_CN)), atol=0.05, rtol=0)


def test_no_images_are_refused():
    y_BCHW = correlated(1)[0]
    with pytest.raises(ValueError, match="at least one image"):
        gaussians_of([Moments.around(y_BCHW)])
