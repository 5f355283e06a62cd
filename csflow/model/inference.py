"""The inference form: a trained detector rebuilt for scoring alone, with the same scores."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from csflow.model.compilation import Recorded, compiled
from csflow.model.detector import Detector, energies
from csflow.model.inference_backbone import InferenceBackbone
from csflow.model.interleaved_flow import InterleavedFlow
from csflow.model.statistic import Scores
from csflow.precision import Precision, PrecisionSetting, multiplies_bfloat16


class InferenceDetector:
    """A trained detector without what only training needs. The detector itself is not changed."""

    def __init__(self, detector: Detector, precision: PrecisionSetting, batch_size: int) -> None:
        """Compiles the detector for batches of one size; a smaller batch takes as long.

        Args:
            precision: `auto` is `mixed` if the processor multiplies matrices in bfloat16, else `float32`.
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
            flow = InterleavedFlow(detector.gaussians, detector.flow, flow_dtype, sizes)
            self._score = partial(_then, flow, detector.statistic)
        else:
            self._score = compiled(_FeatureScorer(detector), device, flow_dtype, dynamic=None)
        whole = partial(_then, self.features, self._score)
        self._pass: Callable[[Tensor], Sequence[Tensor]] = whole if device.type == "cpu" else Recorded(whole)

    @torch.inference_mode()
    def __call__(self, image_BHWC: Tensor) -> Scores:
        """Scores of up to `batch_size` uint8 RGB images of `image_size`."""
        scores = self._pass(self.features.padded(image_BHWC))
        return Scores(*(value[: len(image_BHWC)] for value in scores))

    @torch.inference_mode()
    def score_features(self, y: Sequence[Tensor]) -> Scores:
        """Scores of images, given their features."""
        return self._score(y)


def _then(first: Callable[[Any], Any], second: Callable[[Any], Scores], x: Any) -> Scores:
    return second(first(x))


class _FeatureScorer(nn.Module):
    """Turns features into scores. A compiler leaves out the log-determinant, which nothing reads."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.gaussians, self.flow, self.statistic = detector.gaussians, detector.flow, detector.statistic

    def forward(self, y: Sequence[Tensor]) -> Scores:
        scores: Scores = self.statistic(energies(self.gaussians, self.flow, y))
        return scores
