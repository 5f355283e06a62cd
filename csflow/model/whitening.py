"""The whitening in front of the flow: a constant linear layer that leaves training features uncorrelated.

Features of a backbone are far from standard normal: strongly correlated, and of very different spread. A flow
of few coupling blocks spends its training on that, and stays behind a Gaussian that is known at once. So each
level of the pyramid is centred and multiplied by Σ^(−1/2), a bijection with a constant log-determinant. The
model is a normalizing flow as before, which begins as the Gaussian N(μ, Σ) and goes on from there.

Dimension letters: B batch, C channels, H height, W width, P positions (H · W).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SMALLEST_SHRINKAGE = 1e-3
"""Least weight of the mean variance in a covariance, however many images there are: directions that hardly
vary must not magnify the roundings of cached and of bfloat16 features."""

FeatureShape = Sequence[int]
"""Channels, height and width of a level."""


class Whitening(nn.Module):
    """W · (y − μ) at every level: μ for each position, W for all positions of a level."""

    def __init__(self, feature_shapes: Sequence[FeatureShape]) -> None:
        """The identity, until a state is loaded; `whitening_of` makes one."""
        super().__init__()
        self.levels = len(feature_shapes)
        for level, (channels, height, width) in enumerate(feature_shapes):
            self.register_buffer(f"mean_{level}", torch.zeros(channels, height, width))
            self.register_buffer(f"matrix_{level}", torch.eye(channels))

    def forward(self, y: Sequence[Tensor]) -> list[Tensor]:
        """Whitened features, given those of the backbone, per level (B, C, H, W)."""
        return [_product(self.matrix(level), y_BCHW - self.mean(level)) for level, y_BCHW in enumerate(y)]

    def inverse(self, x: Sequence[Tensor]) -> list[Tensor]:
        """The backbone's features of whitened ones."""
        return [
            _product(torch.linalg.inv(self.matrix(level)), x_BCHW) + self.mean(level)
            for level, x_BCHW in enumerate(x)
        ]

    def log_det(self) -> float:
        """log|det| of the whole map, the same for every image."""
        return sum(
            torch.linalg.slogdet(self.matrix(level).double()).logabsdet.item() * self.mean(level)[0].numel()
            for level in range(self.levels)
        )

    def matrix(self, level: int) -> Tensor:
        """W of a level, (C, C)."""
        return self.get_buffer(f"matrix_{level}")

    def mean(self, level: int) -> Tensor:
        """μ of a level, (C, H, W)."""
        return self.get_buffer(f"mean_{level}")


def _product(matrix_CC: Tensor, x_BCHW: Tensor) -> Tensor:
    return (matrix_CC @ x_BCHW.flatten(2)).view_as(x_BCHW)


@dataclass(frozen=True)
class Moments:
    """Float64 sums over images of one level, from which its whitening follows; `+` joins disjoint images."""

    origin_C: Tensor
    """What features are taken relative to, near their mean, so that sums of squares stay exact."""
    images: int
    position_sum_CHW: Tensor
    product_CC: Tensor
    """Sum over images of y · yᵀ, averaged over positions."""
    squared_norm: float
    """Sum over images of the squared Frobenius norm of y · yᵀ, averaged over positions."""

    @classmethod
    def around(cls, y_BCHW: Tensor) -> "Moments":
        """Of no images yet, relative to the mean of these."""
        _, channels, height, width = y_BCHW.shape
        origin_C = y_BCHW.double().mean((0, 2, 3))
        return cls(
            origin_C,
            images=0,
            position_sum_CHW=origin_C.new_zeros(channels, height, width),
            product_CC=origin_C.new_zeros(channels, channels),
            squared_norm=0.0,
        )

    def with_images(self, y_BCHW: Tensor) -> "Moments":
        """These images added."""
        x_BCHW = y_BCHW.double() - self.origin_C[:, None, None]
        x_BCP = x_BCHW.flatten(2)
        product_BCC = x_BCP @ x_BCP.mT / x_BCP.shape[2]
        return Moments(
            self.origin_C,
            self.images + len(x_BCHW),
            self.position_sum_CHW + x_BCHW.sum(0),
            self.product_CC + product_BCC.sum(0),
            self.squared_norm + product_BCC.square().sum().item(),
        )

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.origin_C,
            self.images + other.images,
            self.position_sum_CHW + other.position_sum_CHW,
            self.product_CC + other.product_CC,
            self.squared_norm + other.squared_norm,
        )


@torch.no_grad()
def whitening_of(levels: Sequence[Moments]) -> Whitening:
    """The whitening after which these images have mean 0 and covariance 1 at every level.

    Raises:
        ValueError: there is no image.
    """
    if not levels[0].images:
        raise ValueError("a whitening needs at least one image")
    whitening = Whitening([moments.position_sum_CHW.shape for moments in levels])
    for level, moments in enumerate(levels):
        mean_CHW, matrix_CC = _mean_and_matrix(moments)
        whitening.mean(level).copy_(mean_CHW)
        whitening.matrix(level).copy_(matrix_CC)
    return whitening


def _mean_and_matrix(moments: Moments) -> tuple[Tensor, Tensor]:
    n = moments.images
    mean_CHW = moments.position_sum_CHW / n
    level_mean_C = mean_CHW.mean((1, 2))
    offset_CP = (mean_CHW - level_mean_C[:, None, None]).flatten(1)
    between_CC = offset_CP @ offset_CP.T / offset_CP.shape[1]
    total_CC = moments.product_CC / n - level_mean_C.outer(level_mean_C)
    shrinkage = _shrinkage(moments)
    # The means of positions are means of n images each, and so differ by chance, too.
    trust = 0.0
    if n > 1:
        within_CC = _shrunk((total_CC - between_CC) * (n / (n - 1)), shrinkage)
        spread = torch.linalg.solve(within_CC, between_CC).trace().item() / len(level_mean_C)
        trust = max(0.0, 1 - 1 / (n * spread)) if spread > 0 else 0.0
    # Positions' means are taken out of the features by this share, and so out of their covariance.
    covariance_CC = _shrunk(total_CC - (2 * trust - trust**2) * between_CC, shrinkage)
    variance_C, direction_CC = torch.linalg.eigh(covariance_CC)
    matrix_CC = direction_CC * variance_C.rsqrt() @ direction_CC.T
    mean_CHW = (moments.origin_C + level_mean_C)[:, None, None] + trust * offset_CP.view_as(mean_CHW)
    return mean_CHW, matrix_CC


def _shrinkage(moments: Moments) -> float:
    """Weight of the mean variance against the measured covariance (Ledoit and Wolf 2004, lemma 3.3).

    An image is one observation, whose own covariance over its positions stands for the product y · yᵀ there:
    positions of an image are alike, and would count as many times more observations than there are.
    """
    n = moments.images
    second_moment_CC = moments.product_CC / n
    variance = second_moment_CC.trace() / len(second_moment_CC)
    excess_CC = second_moment_CC - variance * torch.eye(len(second_moment_CC)).to(second_moment_CC)
    distance = excess_CC.square().sum().item()
    error = (moments.squared_norm / n - second_moment_CC.square().sum().item()) / n
    # One image says nothing about how images differ.
    if n == 1 or distance <= 0:
        return 0.5
    return min(1.0, max(SMALLEST_SHRINKAGE, error / distance))


def _shrunk(covariance_CC: Tensor, shrinkage: float) -> Tensor:
    channels = len(covariance_CC)
    identity_CC = torch.eye(channels).to(covariance_CC)
    variance = covariance_CC.trace() / channels
    if variance <= 0:
        return identity_CC  # features that never differ stay as they are
    return (1 - shrinkage) * covariance_CC + shrinkage * variance * identity_CC
