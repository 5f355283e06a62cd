"""Compiles modules with PyTorch and records passes for GPUs; what fails to compile runs as it is."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

WARM_UP_PASSES = 3
"""Passes of a shape before it is recorded, in which the module compiles and libraries initialise."""

FAILURES = (TorchDynamoException, CppCompileError, InvalidCxxCompiler)
"""Errors if there is no compiler, no Triton, too old a GPU, or a module that cannot be traced."""


def compiled(
    module: Callable[..., Any], device: torch.device, dtype: torch.dtype, dynamic: bool | None
) -> Callable[..., Any]:
    """The module with fused element-wise work; convolutions and products have this dtype, all else float32.

    Args:
        dynamic: False compiles again for every shape; None compiles for all shapes after the second one.
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
                _complain("runs uncompiled", error)
                function = module
            return function(*inputs)

    return run


class Recorded:
    """A pass over one GPU tensor, recorded as a CUDA graph for each shape: all kernels are one launch.

    Many kernels take less time than a launch. PyTorch's own graphs (`mode="reduce-overhead"`) are kept once
    per thread, but an actor's threads take turns.
    """

    def __init__(self, function: Callable[[Tensor], Sequence[Tensor]]) -> None:
        self._function = function
        self._stream = torch.cuda.Stream()
        self._records: dict[torch.Size, _Record | None] = {}

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """The function's result, in tensors that the caller owns. All inputs of a shape have one dtype."""
        if x.shape not in self._records:
            self._records[x.shape] = self._recorded(x)
        record = self._records[x.shape]
        if record is None:
            return self._function(x)
        record.input.copy_(x)
        record.graph.replay()
        return [output.clone() for output in record.outputs]

    def _recorded(self, x: Tensor) -> "_Record | None":
        x = x.clone()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP_PASSES):
                self._function(x)
        torch.cuda.current_stream().wait_stream(self._stream)
        # Graphs use the same memory: none runs while another's outputs are wanted.
        pool = next((record.graph.pool() for record in self._records.values() if record), None)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local"):
                outputs = self._function(x)
        except RuntimeError as error:
            _complain("runs without a CUDA graph", error)
            return None
        return _Record(graph, x, outputs)


class _Record(NamedTuple):
    graph: torch.cuda.CUDAGraph
    input: Tensor
    """The tensor that the graph reads from."""
    outputs: Sequence[Tensor]
    """The tensors that the graph writes to."""


def _complain(what: str, error: Exception) -> None:
    reason = str(error).strip().partition("\n")[0]
    logging.getLogger(__name__).warning("%s, more slowly: %s", what, reason)
