"""Measures how rounding a network's weights to bfloat16 shifts its results, and removes the shift.

The mean activation is far from zero, so rounded weights shift the result of a convolution by much the same
for every image, and the flow would take that for an anomaly. The shift is measured on images once, and
subtracted from the bias where weights are rounded (bias correction: Nagel, van Baalen, Blankevoort, Welling:
Data-Free Quantization, ICCV 2019).

Dimension letters: B batch, C channels, H height, W width.
"""

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

Layers = TypeVar("Layers", bound=nn.Module)


def rounding_shifts(layers: nn.Module, x_BCHW: Tensor) -> dict[str, Tensor]:
    """The mean shift (C,) of each convolution's results, on the CPU, by the convolution's name."""
    # One by one: large images would take gigabytes together.
    found = [_shifts(layers, x_CHW[None]) for x_CHW in x_BCHW]
    return {name: torch.stack([shifts[name] for shifts in found]).mean(0) for name in found[0]}


@torch.no_grad()
def _shifts(layers: nn.Module, x_BCHW: Tensor) -> dict[str, Tensor]:
    shifts: dict[str, Tensor] = {}

    def measure(name: str, convolution: nn.Module, inputs: tuple[Tensor], exact_BCHW: Tensor) -> None:
        assert isinstance(convolution, nn.Conv2d)
        weight = convolution.weight
        convolution.weight = _constant(weight.bfloat16().float())
        shifts[name] = (convolution.forward(*inputs) - exact_BCHW).mean((0, 2, 3)).cpu()
        convolution.weight = weight

    hooks = [
        module.register_forward_hook(
            lambda module, inputs, output, name=name: measure(name, module, inputs, output)
        )
        for name, module in layers.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    try:
        layers(x_BCHW)
    finally:
        for hook in hooks:
            hook.remove()
    return shifts


def without_shifts(layers: Layers, shifts: Mapping[str, Tensor]) -> Layers:
    """A copy of the network whose biases cancel the shifts; convolutions without a shift do not change."""
    corrected = copy.deepcopy(layers)
    for name, module in corrected.named_modules():
        if isinstance(module, nn.Conv2d) and name in shifts:
            shift_C = shifts[name].to(module.weight.device)
            module.bias = _constant(-shift_C if module.bias is None else module.bias - shift_C)
    return corrected


def _constant(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
