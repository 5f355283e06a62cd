"""The optimiser and its step."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

MAX_GRAD_NORM = 1.0


def new_optimizer(
    parameters: Iterable[nn.Parameter], learning_rate: float, epsilon: float = 1e-4
) -> torch.optim.Adam:
    """Adam with the paper's weight decay and, by default, the paper's ε."""
    # Fused: one pass over weights, gradients and moments, where the default makes one per operation.
    return torch.optim.Adam(parameters, lr=learning_rate, eps=epsilon, weight_decay=1e-5, fused=True)


def annealed(learning_rate: float, step: int, steps: int) -> float:
    """The learning rate of a step (counted from 0), which falls to 0 along half a cosine."""
    return learning_rate * (1 + math.cos(math.pi * step / steps)) / 2


def optimizer_step(parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer) -> Tensor:
    """Clips the gradients, makes a step and clears them; returns their norm before clipping.

    The norm stays on the device, since reading it would make a GPU wait in every step.
    """
    norm = nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
