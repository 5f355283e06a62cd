"""The closed-form layers: a whitening before the flow, Gaussians of each position beside and behind the flow.

Features of a backbone are far from standard normal: they are strongly correlated, and their spread varies.
A flow of few coupling blocks spends its training on that, and stays worse than a Gaussian, which is known at
once. So each level of the pyramid is centred at each position, and multiplied by Σ^(−1/2): a bijection with a
constant log-determinant. The model is still a normalizing flow, but one that starts as good as the Gaussian.

On an aligned part the covariance also differs from position to position (as in PaDiM, Defard et al., arXiv
2011.08785), but convolutions treat all positions alike. So the last layer of the model whitens the latents of
the trained flow at each position. Another such layer does the same with the whitened features, beside the
flow; the statistic reads both. None stands in front of the flow, which would learn little more from features
that are whitened at each position (docs/method.md).

A tile may come from anywhere in an image, so its positions mean nothing. Then each level has one mean and one
matrix for all positions, and the layers of each position do nothing.

With a region of interest (`csflow.interest`), whitened features are zero outside of it. What is fitted, and
what log-determinants count, are the positions inside.

Dimension letters: B batch, C channels, H height, W width, P positions (H · W, or 1 that stands for all).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from csflow.model.pyramid import Region

SMALLEST_SHRINKAGE = 1e-3
"""Smallest weight of the mean variance in a covariance, for any number of images. Directions that hardly vary
must not magnify the rounding errors of cached features and of bfloat16."""
CACHE_ROUNDING = 2**-11
"""Largest relative error of a feature in the cache, float16. Smaller differences are not known."""
HEAVY_TAILS = 1.25
"""How much more covariances of whitened features scatter than a Gaussian's; measured: 1.07 to 1.33 times."""
MOST_NUMBERS = 1 << 25
"""Largest size of one level's matrices (128 MB). A larger level has one matrix for all positions."""

FeatureShape = Sequence[int]
"""Channels, height and width of a level."""


class Gaussians(nn.Module):
    """The closed-form parts of a detector. Each is the identity until it is fitted or its state is loaded."""

    def __init__(
        self,
        feature_shapes: Sequence[FeatureShape],
        is_tiled: bool = False,
        inside: Sequence[Tensor] | None = None,
    ) -> None:
        """
        Args:
            is_tiled: whether the features are those of tiles.
            inside: per level, 1 at positions in the region of interest and 0 at others, (H, W); None for all.
        """
        super().__init__()
        self.is_tiled = is_tiled
        self.whitening = Whitening(feature_shapes, inside)
        """The first layer, before the flow."""
        self.positions = PositionGaussian(feature_shapes, is_tiled)
        """The Gaussian of whitened features at each position, beside the flow."""
        self.latents = PositionGaussian(feature_shapes, is_tiled)
        """The last layer, behind the flow."""


class Whitening(nn.Module):
    """Computes W · (y − μ) at every level; each position has its own μ."""

    def __init__(
        self, feature_shapes: Sequence[FeatureShape], inside: Sequence[Tensor] | None = None
    ) -> None:
        super().__init__()
        self.levels = len(feature_shapes)
        self.region = Region(inside)
        for level, (channels, height, width) in enumerate(feature_shapes):
            self.register_buffer(f"mean_{level}", torch.zeros(channels, height, width))
            self.register_buffer(f"matrix_{level}", _identity(channels))

    def forward(self, y: Sequence[Tensor]) -> list[Tensor]:
        """Whitened features, given the backbone's features, per level (B, C, H, W)."""
        return [
            self.region.only(_product(self.matrix(level).unsqueeze(0), y_BCHW - self.mean(level)), level)
            for level, y_BCHW in enumerate(y)
        ]

    def inverse(self, x: Sequence[Tensor]) -> list[Tensor]:
        """The backbone's features, given whitened ones; their mean outside a region of interest."""
        return [
            _product(torch.linalg.inv(self.matrix(level)).unsqueeze(0), x_BCHW) + self.mean(level)
            for level, x_BCHW in enumerate(x)
        ]

    def log_det(self) -> float:
        """log|det| of the whole map, the same for every image."""
        with one_thread():
            return sum(
                torch.linalg.slogdet(self.matrix(level).double()).logabsdet.item() * self.positions(level)
                for level in range(self.levels)
            )

    def dimensions(self) -> int:
        """The number of whitened features of all levels, without those that are always zero."""
        return sum(len(self.mean(level)) * self.positions(level) for level in range(self.levels))

    def positions(self, level: int) -> int:
        """The number of positions of a level, in the region of interest if there is one."""
        inside_HW = self.region.inside(level)
        return self.mean(level)[0].numel() if inside_HW is None else int(inside_HW.sum())

    def mean(self, level: int) -> Tensor:
        """The mean μ of a level, (C, H, W)."""
        return self.get_buffer(f"mean_{level}")

    def matrix(self, level: int) -> Tensor:
        """The matrix W of a level, (C, C)."""
        return self.get_buffer(f"matrix_{level}")


class PositionGaussian(nn.Module):
    """Makes the covariance of each position the identity, given maps that are nearly white overall."""

    def __init__(self, feature_shapes: Sequence[FeatureShape], is_tiled: bool = False) -> None:
        super().__init__()
        self.positions = [height * width for _, height, width in feature_shapes]
        for level, (channels, height, width) in enumerate(feature_shapes):
            count = _positions_with_matrix(channels, height * width, is_tiled)
            self.register_buffer(f"matrix_{level}", _identity(channels).repeat(count, 1, 1))

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        """Maps that are white at each position, given maps (B, C, H, W) per level."""
        return [_product(self.matrix(level), x_BCHW) for level, x_BCHW in enumerate(x)]

    def log_det(self) -> float:
        """log|det| of the whole map, the same for every image."""
        return sum(
            self.matrix(level).double().diagonal(dim1=1, dim2=2).abs().log().sum(1).mean().item() * positions
            for level, positions in enumerate(self.positions)
        )

    def matrix(self, level: int) -> Tensor:
        """The matrices of a level, (P, C, C), lower triangular."""
        return self.get_buffer(f"matrix_{level}")


def _identity(channels: int) -> Tensor:
    # On the meta device, `torch.eye` would load PyTorch's compiler, which takes seconds.
    return torch.zeros(channels, channels).fill_diagonal_(1.0)


def _product(matrix_PCC: Tensor, x_BCHW: Tensor) -> Tensor:
    x_PCB = x_BCHW.flatten(2).permute(2, 1, 0)
    # Autocast would round features to bfloat16 that are to be magnified.
    with torch.autocast(x_PCB.device.type, enabled=False):
        return (matrix_PCC @ x_PCB).permute(2, 1, 0).reshape(x_BCHW.shape)


def _positions_with_matrix(channels: int, positions: int, is_tiled: bool) -> int:
    return positions if positions * channels**2 <= MOST_NUMBERS and not is_tiled else 1


@dataclass(frozen=True)
class Moments:
    """Float64 sums over the images of one level, which give its Gaussians; `+` joins disjoint images."""

    origin_C: Tensor
    """Origin near the mean, subtracted from features so that sums of squares stay exact."""
    images: int
    shape: FeatureShape
    sum_CP: Tensor
    product_PCC: Tensor
    """Sum over images of y · yᵀ at each position, or of the mean of y · yᵀ over all positions."""
    squared_norm: float
    """Sum over images of the squared Frobenius norm of y · yᵀ averaged over positions."""
    is_tiled: bool = False
    """Whether the images are tiles."""
    inside_HW: Tensor | None = None
    """Where the positions P are, those of the region of interest; None if they are all."""

    @classmethod
    def around(cls, y_BCHW: Tensor, is_tiled: bool = False, inside_HW: Tensor | None = None) -> "Moments":
        """Moments of no images yet, with the mean of these images as origin."""
        y_BCP = _inside(y_BCHW, inside_HW)
        return cls.about(y_BCP.double().mean((0, 2)), y_BCHW.shape[1:], is_tiled, inside_HW)

    @classmethod
    def about(
        cls,
        origin_C: Tensor,
        shape: FeatureShape,
        is_tiled: bool = False,
        inside_HW: Tensor | None = None,
    ) -> "Moments":
        """Moments of no images yet, with this float64 origin."""
        channels, height, width = shape
        positions = height * width if inside_HW is None else int(inside_HW.sum())
        has_matrices = _positions_with_matrix(channels, height * width, is_tiled) > 1
        return cls(
            origin_C,
            images=0,
            shape=shape,
            sum_CP=origin_C.new_zeros(channels, positions),
            product_PCC=origin_C.new_zeros(positions if has_matrices else 1, channels, channels),
            squared_norm=0.0,
            is_tiled=is_tiled,
            inside_HW=inside_HW,
        )

    def with_images(self, y_BCHW: Tensor) -> "Moments":
        """The moments with these images added."""
        x_BCP = _inside(y_BCHW, self.inside_HW).double() - self.origin_C[:, None]
        channels, positions = x_BCP.shape[1:]
        if len(self.product_PCC) > 1:
            product_PCC = torch.baddbmm(self.product_PCC, x_BCP.permute(2, 1, 0), x_BCP.permute(2, 0, 1))
            # The norms of X · Xᵀ and Xᵀ · X are the same: the smaller one is computed.
            of_image = x_BCP.mT @ x_BCP if positions < channels else x_BCP @ x_BCP.mT
        else:
            of_image = x_BCP @ x_BCP.mT
            product_PCC = self.product_PCC + of_image.sum(0, keepdim=True) / positions
        return replace(
            self,
            images=self.images + len(x_BCP),
            sum_CP=self.sum_CP + x_BCP.sum(0),
            product_PCC=product_PCC,
            squared_norm=self.squared_norm + (of_image / positions).square().sum().item(),
        )

    def __add__(self, other: "Moments") -> "Moments":
        return replace(
            self,
            images=self.images + other.images,
            sum_CP=self.sum_CP + other.sum_CP,
            product_PCC=self.product_PCC + other.product_PCC,
            squared_norm=self.squared_norm + other.squared_norm,
        )

    def everywhere(self, value_PX: Tensor, outside_X: Tensor) -> Tensor:
        """Values of all positions of the level, (H · W, …): these, and one value outside of the region."""
        if self.inside_HW is None:
            return value_PX
        value_X = outside_X.repeat(self.inside_HW.numel(), *[1] * outside_X.ndim)
        value_X[self.inside_HW.flatten() > 0] = value_PX
        return value_X

    def matrices_everywhere(self, matrix_PCC: Tensor) -> Tensor:
        """The matrices of all positions, the identity outside of the region; or the one for all."""
        if len(self.product_PCC) == 1:
            return matrix_PCC
        return self.everywhere(matrix_PCC, _identity(matrix_PCC.shape[1]).to(matrix_PCC))


def _inside(y_BCHW: Tensor, inside_HW: Tensor | None) -> Tensor:
    """The features (B, C, P) at the positions of the region of interest."""
    return y_BCHW.flatten(2) if inside_HW is None else y_BCHW[:, :, inside_HW > 0]


@contextmanager
def one_thread() -> Iterator[None]:
    """Context of one thread, in which sums do not depend on how many there are, and matrices are factorised.

    With several threads, MKL's factorisations of small matrices wait for each other at every step. Beside
    other processes that took minutes in place of a second, and MKL complained of `Parameter 6` of `DLASWP`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def gaussians_of(levels: Sequence[Moments]) -> Gaussians:
    """Fits the whitening of each level to these images, and the Gaussians of each position behind it.

    Latents are known only after the flow is trained; then `fit_latents` fits their Gaussians.

    Raises:
        ValueError: there is no image.
    """
    if not levels[0].images:
        raise ValueError("a whitening needs at least one image")
    inside = [moments.inside_HW for moments in levels if moments.inside_HW is not None]
    gaussians = Gaussians([moments.shape for moments in levels], levels[0].is_tiled, inside or None)
    for level, moments in enumerate(levels):
        with one_thread():
            mean_CHW, matrix_CC, matrix_PCC = _fit(moments)
        gaussians.whitening.mean(level).copy_(mean_CHW)
        gaussians.whitening.matrix(level).copy_(matrix_CC)
        gaussians.positions.matrix(level).copy_(matrix_PCC)
    return gaussians


@torch.no_grad()
def fit_latents(latents: PositionGaussian, levels: Sequence[Moments]) -> None:
    """Fits the layer that turns latents with these moments, about 0, into standard normal ones."""
    for level, moments in enumerate(levels):
        covariance_PCC = moments.product_PCC / moments.images
        with one_thread():
            matrix_PCC = _root(covariance_PCC, moments.images)
        latents.matrix(level).copy_(moments.matrices_everywhere(matrix_PCC))


def _fit(moments: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """The means of positions, the level's W, and the matrices of positions that come after W."""
    n = moments.images
    mean_PC = moments.sum_CP.T / n
    level_mean_C = mean_PC.mean(0)
    offset_PC = mean_PC - level_mean_C
    shrinkage = _shrinkage(moments)
    within_PCC = moments.product_PCC / n - _outer(mean_PC, len(moments.product_PCC))
    # The means of positions are means of n images each, and so differ by chance, too.
    trust = 0.0
    if n > 1 and not moments.is_tiled:
        within_CC = _shrunk(within_PCC.mean(0) * n / (n - 1), shrinkage)
        between_CC = _outer(offset_PC, 1)[0]
        signal = torch.linalg.solve(within_CC, between_CC).trace().item() / len(level_mean_C)
        trust = max(0.0, 1 - 1 / (n * signal)) if signal > 0 else 0.0
    # What is not taken out of the features as the mean of their position is left in their covariance.
    covariance_PCC = within_PCC + (1 - trust) ** 2 * _outer(offset_PC, len(within_PCC))
    covariance_CC = covariance_PCC.mean(0)
    square = (moments.origin_C + level_mean_C).square().mean() + covariance_CC.trace() / len(covariance_CC)
    known = CACHE_ROUNDING**2 / 3 * square.item()
    matrix_CC = _inverse_root(_shrunk(covariance_CC, shrinkage), known)
    mean_PC = moments.origin_C + level_mean_C + trust * offset_PC
    matrix_PCC = _root(matrix_CC @ covariance_PCC @ matrix_CC, n)
    mean_PC = moments.everywhere(mean_PC, moments.origin_C + level_mean_C)
    matrix_PCC = moments.matrices_everywhere(matrix_PCC)
    return mean_PC.T.reshape(moments.shape), matrix_CC, matrix_PCC


def _root(covariance_PCC: Tensor, images: int) -> Tensor:
    """The matrices that make covariances near the identity exactly so; the identity if images are too few."""
    channels = covariance_PCC.shape[1]
    identity_CC = torch.eye(channels).to(covariance_PCC)
    if len(covariance_PCC) == 1 or images == 1:
        return identity_CC.expand_as(covariance_PCC)
    # Ledoit and Wolf, with the scatter that a Gaussian's covariance would have (Chen et al. 2010).
    squared_norm = covariance_PCC.square().sum((1, 2)).mean().item()
    distance = (covariance_PCC - identity_CC).square().sum((1, 2)).mean().item()
    scatter = HEAVY_TAILS * (channels**2 + squared_norm) / images
    shrinkage = min(1.0, max(SMALLEST_SHRINKAGE, scatter / distance)) if distance > 0 else 1.0
    # Any root will do, since only sums of squares over its outputs are read: this one is the cheapest.
    lower_PCC = torch.linalg.cholesky((1 - shrinkage) * covariance_PCC + shrinkage * identity_CC)
    return torch.linalg.solve_triangular(lower_PCC, identity_CC.expand_as(lower_PCC), upper=False)


def _shrinkage(moments: Moments) -> float:
    """Weight of the mean variance in the covariance of a level (Ledoit and Wolf 2004, lemma 3.3).

    An image counts as one observation; its own covariance over its positions takes the place of y · yᵀ in the
    lemma. Positions are not observations, since positions of one image are alike.
    """
    n = moments.images
    second_moment_CC = moments.product_PCC.mean(0) / n
    squared_norm = second_moment_CC.square().sum().item()
    channels = len(second_moment_CC)
    distance = squared_norm - second_moment_CC.trace().item() ** 2 / channels
    # One image says nothing about how images differ.
    if n == 1 or distance <= 0:
        return 0.5
    error = (moments.squared_norm / n - squared_norm) / n
    return min(1.0, max(SMALLEST_SHRINKAGE, error / distance))


def _shrunk(covariance_CC: Tensor, shrinkage: float) -> Tensor:
    channels = len(covariance_CC)
    identity_CC = torch.eye(channels).to(covariance_CC)
    variance = covariance_CC.trace() / channels
    if variance <= 0:
        return identity_CC  # features that never differ stay as they are
    return (1 - shrinkage) * covariance_CC + shrinkage * variance * identity_CC


def _inverse_root(covariance_CC: Tensor, smallest: float) -> Tensor:
    """The symmetric Σ^(−1/2), which changes the channels as little as possible.

    Args:
        smallest: variance that a direction with less is given.
    """
    variance_C, direction_CC = torch.linalg.eigh(covariance_CC)
    return direction_CC * variance_C.clamp(min=max(smallest, 1e-12)).rsqrt() @ direction_CC.mT


def _outer(x_PC: Tensor, positions: int) -> Tensor:
    """x · xᵀ of each position, or the mean of x · xᵀ over all positions, (positions, C, C)."""
    if positions == 1:
        return (x_PC.T @ x_PC / len(x_PC)).unsqueeze(0)
    return x_PC.unsqueeze(2) * x_PC.unsqueeze(1)
