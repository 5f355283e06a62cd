"""The inference form: a trained detector rebuilt for scoring alone, with the same scores."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from csflow.model.compilation import compiled
from csflow.model.detector import Detector, Scores, score_latents
from csflow.model.flow import CrossScaleFlow
from csflow.model.inference_backbone import InferenceBackbone
from csflow.model.interleaved_flow import InterleavedFlow

Precision = Literal["float32", "mixed", "bfloat16"]
PrecisionSetting = Literal["auto", "float32", "mixed", "bfloat16"]


class InferenceDetector:
    """Scores of a trained detector, without what only training needs. The detector stays as it is."""

    def __init__(self, detector: Detector, precision: PrecisionSetting, batch_size: int) -> None:
        """Compiles it for batches of one size; a smaller one takes as long.

        Args:
            precision: of convolutions and matrix products; the flow's state and all sums are float32.
                `mixed` is float32 in the backbone, whose roundings the flow would take for anomalies, and
                bfloat16 in the flow; `auto` is `mixed` where the processor multiplies matrices in bfloat16.
        """
        device = detector.get_buffer("mean").device
        self.precision: Precision = _native_precision(device) if precision == "auto" else precision
        backbone_dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        flow_dtype = torch.float32 if self.precision == "float32" else torch.bfloat16
        self.features = InferenceBackbone(detector, backbone_dtype, batch_size)
        self._score: Callable[[Sequence[Tensor]], Scores]
        if device.type == "cpu":
            sizes = [(batch_size, height, width) for _, height, width in detector.feature_shapes]
            self._score = InterleavedFlow(detector.flow, flow_dtype, sizes)
        else:
            self._score = compiled(_ScoringFlow(detector.flow), device, flow_dtype, dynamic=None)

    def __call__(self, image_BHWC: Tensor) -> Scores:
        """Scores of up to `batch_size` uint8 RGB images of `image_size`."""
        scores = self.score_features(self.features(self.features.padded(image_BHWC)))
        return Scores(*(value[: len(image_BHWC)] for value in scores))

    @torch.inference_mode()
    def score_features(self, y: Sequence[Tensor]) -> Scores:
        """Scores of images whose features are known."""
        return self._score(y)


class _ScoringFlow(nn.Module):
    """The trained flow; a compiler leaves out the log-determinant, which nothing reads."""

    def __init__(self, flow: CrossScaleFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, y: Sequence[Tensor]) -> Scores:
        return score_latents(self.flow(y).z)


def _native_precision(device: torch.device) -> Precision:
    if device.type == "cuda":
        multiplies_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        multiplies_bfloat16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "mixed" if multiplies_bfloat16 else "float32"
