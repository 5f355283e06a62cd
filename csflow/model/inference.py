"""The inference form: a trained detector rebuilt for scoring alone, with the same scores."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from csflow.model.compilation import Recorded, compiled
from csflow.model.detector import Detector, Scores, score_latents
from csflow.model.flow import CrossScaleFlow
from csflow.model.inference_backbone import InferenceBackbone
from csflow.model.interleaved_flow import InterleavedFlow
from csflow.model.precision import Precision, PrecisionSetting, multiplies_bfloat16


class InferenceDetector:
    """Scores of a trained detector, without what only training needs. The detector stays as it is."""

    def __init__(self, detector: Detector, precision: PrecisionSetting, batch_size: int) -> None:
        """Compiles it for batches of one size; a smaller one takes as long.

        Args:
            precision: `auto` is `mixed` where the processor multiplies matrices in bfloat16, else `float32`.
        """
        device = detector.get_buffer("mean").device
        self.precision: Precision
        if precision == "auto":
            self.precision = "mixed" if multiplies_bfloat16(device) else "float32"
        else:
            self.precision = precision
        self.features = InferenceBackbone(detector, self.precision, batch_size)
        flow_dtype = torch.float32 if self.precision == "float32" else torch.bfloat16
        self._score: Callable[[Sequence[Tensor]], Scores]
        if device.type == "cpu":
            sizes = [(batch_size, height, width) for _, height, width in detector.feature_shapes]
            self._score = InterleavedFlow(detector.flow, flow_dtype, sizes)
        else:
            self._score = compiled(_ScoringFlow(detector.flow), device, flow_dtype, dynamic=None)
        whole = partial(_scores, self.features, self._score)
        self._pass: Callable[[Tensor], Sequence[Tensor]] = whole if device.type == "cpu" else Recorded(whole)

    @torch.inference_mode()
    def __call__(self, image_BHWC: Tensor) -> Scores:
        """Scores of up to `batch_size` uint8 RGB images of `image_size`."""
        scores = self._pass(self.features.padded(image_BHWC))
        return Scores(*(value[: len(image_BHWC)] for value in scores))

    @torch.inference_mode()
    def score_features(self, y: Sequence[Tensor]) -> Scores:
        """Scores of images whose features are known."""
        return self._score(y)


def _scores(
    features: InferenceBackbone, flow: Callable[[Sequence[Tensor]], Scores], image_BHWC: Tensor
) -> Scores:
    return flow(features(image_BHWC))


class _ScoringFlow(nn.Module):
    """The trained flow; a compiler leaves out the log-determinant, which nothing reads."""

    def __init__(self, flow: CrossScaleFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, y: Sequence[Tensor]) -> Scores:
        return score_latents(self.flow(y).z)
