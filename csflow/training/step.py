"""The optimiser of the paper, and one step of it."""

from collections.abc import Iterable

import torch
from torch import nn

MAX_GRAD_NORM = 1.0


def new_optimizer(parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Adam:
    """Adam with the paper's constants."""
    # Fused: one pass over weights, gradients and moments, where the default makes one per operation.
    return torch.optim.Adam(parameters, lr=learning_rate, eps=1e-4, weight_decay=1e-5, fused=True)


def optimizer_step(parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer) -> float:
    """Clips the gradients, steps and clears them; returns their norm before clipping."""
    norm = nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(norm)
