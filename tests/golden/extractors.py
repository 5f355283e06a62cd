"""Weights and images that are the same everywhere, for values printed by the original code bases."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SIDE = 128


def weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for a network by the order and shapes of its tensors, so that its maps are neither 0 nor huge.

    NumPy guarantees the stream of its legacy generator.
    """
    return {name: _drawn(number, name, value) for number, (name, value) in enumerate(state.items())}


def _drawn(number: int, name: str, value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return torch.zeros_like(value)
    drawn = np.random.RandomState(number).uniform(-1, 1, tuple(value.shape)).astype(np.float32)
    if name.endswith("running_var"):
        drawn = 0.25 + 0.2 * drawn
    elif value.ndim > 1:
        drawn = drawn * np.float32(np.sqrt(3 / value[0].numel()))
    elif name.endswith("weight"):  # of a batch norm
        drawn = 0.6 + 0.2 * drawn  # more, and maps grow from block to block
    else:
        drawn = 0.05 * drawn
    return torch.from_numpy(drawn)


def images() -> NDArray[np.uint8]:
    """Two images (B, H, W, C) of different brightness. Neighbouring pixels differ, so that smaller scales
    depend on how they are made."""
    noise_BHWC = np.random.RandomState(0).randint(0, 128, (2, SIDE, SIDE, 3))
    brightness_HW = np.add.outer(np.arange(SIDE), np.arange(SIDE)) // 2
    return (noise_BHWC + np.stack([brightness_HW, 0 * brightness_HW])[..., None]).astype(np.uint8)
