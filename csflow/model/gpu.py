"""The inference form on GPUs: 16-bit convolutions, channels last, recorded as one CUDA graph.

float16 has three more bits than bfloat16, and features that are to be whitened need them: scores move by
less than a percent in the one, by a tenth in the other (benchmarks/gpu.md).

Dimension letters: B batch, C channels, H height, W width.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from torch import Tensor, nn

from csflow.model.detector import Detector, energies, scales
from csflow.model.fallbacks import Fallbacks
from csflow.model.statistic import Scores

WARM_UP_PASSES = 3
"""Passes before one is recorded, in which libraries initialise and kernels compile."""
PROBE_SIDE = 128
"""Side of the images that show whether fused kernels compute what the layers compute."""
FUSIBLE = (DepthwiseSeparableConv, InvertedResidual)
"""Blocks that fused kernels can take the place of."""
FUSED_TOLERANCES = {torch.float16: 0.1, torch.bfloat16: 0.5}
"""Largest difference of maps of fused kernels from those of the layers, relative to the norm: a few times
that of rounding in either."""

Module = TypeVar("Module", bound=nn.Module)


class GpuFeatures(nn.Module):
    """`Detector.features` with convolutions and matrix products in one dtype."""

    def __init__(self, detector: Detector, dtype: torch.dtype, fallbacks: Fallbacks) -> None:
        super().__init__()
        self.dtype = dtype
        self.architecture = detector.architecture
        self.pyramid = detector.pyramid
        for name in ("mean", "std"):
            self.register_buffer(name, 255 * detector.get_buffer(name))
        self.backbone = rounded(detector.backbone, dtype)
        if dtype != torch.float32:
            self._fuse(fallbacks)

    def forward(self, image_BHWC: Tensor) -> list[Tensor]:
        """Features, float32 per level, of uint8 RGB images."""
        pixel_BHWC = (image_BHWC.float() - self.get_buffer("mean")) / self.get_buffer("std")
        pixel_BCHW = pixel_BHWC.permute(0, 3, 1, 2)
        with _autocast(self.dtype, image_BHWC.device):
            maps = [self.backbone(scale.to(self.dtype)) for scale in scales(pixel_BCHW, self.architecture)]
        return [y_BCHW.float() for y_BCHW in self.pyramid.join(maps)]

    def _fuse(self, fallbacks: Fallbacks) -> None:
        """Replaces blocks by fused kernels, if they compile here and compute the same."""
        if not any(isinstance(layer, FUSIBLE) for layer in self.backbone.modules()):
            return
        what = "the backbone runs without fused kernels"
        try:
            # Triton comes with PyTorch for GPUs only, and needs a C compiler when its kernels first run.
            from csflow.model.fused_blocks import with_fused_blocks

            fused = with_fused_blocks(self.backbone)
            pixel_BCHW = torch.randn(2, 3, PROBE_SIDE, PROBE_SIDE, generator=torch.Generator().manual_seed(0))
            pixel_BCHW = pixel_BCHW.to(self.get_buffer("mean").device, self.dtype)
            with torch.no_grad(), _autocast(self.dtype, pixel_BCHW.device):
                pairs = zip(fused(pixel_BCHW), self.backbone(pixel_BCHW), strict=True)
                off = max(((a - b).float().norm() / b.float().norm()).item() for a, b in pairs)
        except Exception as error:  # whatever a compiler, a driver or an unknown block stumbles over
            fallbacks.add(what, error)
        else:
            if off <= FUSED_TOLERANCES[self.dtype]:
                self.backbone = fused
            else:
                fallbacks.add(what, f"its maps are off by {off:.1e}")


class GpuDetector(nn.Module):
    """A trained detector with convolutions and matrix products in one dtype; all else is float32."""

    def __init__(self, detector: Detector, dtype: torch.dtype, fallbacks: Fallbacks) -> None:
        super().__init__()
        self.dtype = dtype
        self.features = GpuFeatures(detector, dtype, fallbacks)
        self.gaussians, self.statistic = detector.gaussians, detector.statistic
        self.latent_window = detector.architecture.latent_window
        self.flow = rounded(detector.flow, dtype)

    def forward(self, image_BHWC: Tensor) -> Scores:
        """Scores of uint8 RGB images."""
        return self.score_features(self.features(image_BHWC))

    def score_features(self, y: Sequence[Tensor]) -> Scores:
        """Scores of images, given their features."""
        with _autocast(self.dtype, y[0].device):
            scores: Scores = self.statistic(energies(self.gaussians, self.flow, y, self.latent_window))
        return scores


class Recorded:
    """A function of one GPU tensor of one shape, recorded as a CUDA graph: all its kernels are one launch.

    Many kernels take less time than a launch. PyTorch's own graphs (`mode="reduce-overhead"`) are kept once
    per thread, but an actor's threads take turns.
    """

    is_possible = True
    """False after a recording has failed: then the process's memory is in no state for another."""

    def __init__(
        self, function: Callable[[Tensor], Sequence[Tensor]], x: Tensor, fallbacks: Fallbacks
    ) -> None:
        """Records the function on an example.

        Raises:
            torch.OutOfMemoryError: the GPU has no room for tensors of this size.
        """
        self._function = function
        self._x = x.clone()
        self._graph: torch.cuda.CUDAGraph | None = None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_PASSES):
                function(self._x)
        torch.cuda.current_stream().wait_stream(stream)
        what = "passes run without a CUDA graph"
        if not Recorded.is_possible:
            fallbacks.add(what, "an earlier one of this process could not be recorded")
            return
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._outputs = function(self._x)
        except RuntimeError as error:
            for cause in (error, error.__context__):
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause from None
            Recorded.is_possible = False
            fallbacks.add(what, error)
            return
        self._graph = graph

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """The function's result, in tensors that the caller owns, for up to as many images as the example.

        The images may be in the memory of the host.
        """
        # Rows behind them keep what they held; no image's score depends on the others.
        self._x[: len(x)].copy_(x, non_blocking=True)
        if self._graph is None:
            outputs = self._function(self._x)
        else:
            self._graph.replay()
            outputs = self._outputs
        return [output[: len(x)].clone() for output in outputs]


def rounded(module: Module, dtype: torch.dtype) -> Module:
    """A copy whose convolutions and matrix products have weights of this dtype, with channels last."""
    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.to(dtype).to(memory_format=torch.channels_last)
        elif isinstance(layer, nn.Linear):
            layer.to(dtype)
    return module


def _autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[None]:
    if dtype == torch.float32:
        return nullcontext()
    # Weights have the dtype already: nothing is left that a cache would save.
    return torch.autocast(device.type, dtype, cache_enabled=False)
