"""Modules compiled by PyTorch, or run as they are where there is no compiler for them."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

FAILURES = (TorchDynamoException, CppCompileError, InvalidCxxCompiler)
"""No compiler, no Triton, too old a GPU, or a module that cannot be traced."""


def compiled(
    module: Callable[..., Any], device: torch.device, dtype: torch.dtype, dynamic: bool | None
) -> Callable[..., Any]:
    """The module, with element-wise work fused, convolutions and products in this type, float32 elsewhere.

    Args:
        dynamic: False compiles anew for every shape; None compiles for all after the second.
    """
    # Of all modules of one class together: parts and scales of a backbone, batch sizes.
    torch._dynamo.config.recompile_limit = 64
    function: Callable[..., Any] = torch.compile(module, dynamic=dynamic)

    def run(*inputs: Any) -> Any:
        nonlocal function
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            try:
                return function(*inputs)
            except FAILURES as error:
                reason = str(error).strip().partition("\n")[0]
                logging.getLogger(__name__).warning("runs uncompiled, more slowly: %s", reason)
                function = module
            return function(*inputs)

    return run
