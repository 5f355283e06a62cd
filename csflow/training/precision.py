"""Mixed precision of training: bfloat16 where the hardware multiplies it natively."""

from typing import Literal

import torch

from csflow.model import multiplies_bfloat16

Precision = Literal["auto", "float32", "bfloat16"]


def uses_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Whether convolutions run in bfloat16; weights, sums and the loss stay in float32."""
    return multiplies_bfloat16(device) if precision == "auto" else precision == "bfloat16"
