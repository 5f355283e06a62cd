"""A detector with its calibration as one ONNX graph: uint8 pixels in, score, p-value, verdict and map out.

The graph takes images of the model's size. Resizing is left to Pillow in the runtime: only so are the
pixels those of the scoring job, bit for bit. Pillow resizes in fixed point, decodes large JPEGs at a fraction
of their size and reduces huge rasters before filtering; matrix products in the graph would do none of this.

Dimension letters: B batch, H height, W width, C channels, N held-out images, K = N + 1.
"""

import io
import warnings
from contextlib import redirect_stdout

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from csflow.calibration import p_values
from csflow.model import Detector
from csflow.model_directory import Calibration

OPSET = 20
"""Version of ONNX's operators."""
INPUT = "image"


class JudgingDetector(nn.Module):
    """A float32 detector that compares its scores with the held-out ones."""

    def __init__(self, detector: Detector, calibration: Calibration, false_positive_rate: float) -> None:
        super().__init__()
        self.detector = detector
        heldout = {
            "anomaly": calibration.anomaly_score,
            "global": calibration.global_score,
            "local": calibration.local_score,
        }
        self.heldout = [name for name, scores in heldout.items() if scores is not None]
        for name in self.heldout:
            scores = heldout[name]
            assert scores is not None
            p_value_K = _p_value_by_rank(scores, calibration.weights)
            self.register_buffer(f"heldout_{name}_N", torch.from_numpy(_rounded_down(scores)))
            self.register_buffer(f"p_value_{name}_K", torch.from_numpy(p_value_K.astype(np.float32)))
            if name == "anomaly":
                self.most_at_least = int((p_value_K <= false_positive_rate).sum()) - 1
        self.has_local = calibration.local_score is not None

    @property
    def outputs(self) -> list[str]:
        """Names of what `forward` returns, those of the columns of `scores`."""
        names = ["anomaly_score", "p_value", "is_anomalous", "anomaly_map", "scale_scores", "global_score"]
        names += ["local_score"] if self.has_local else []
        return names + [f"{name}_p_value" for name in self.heldout if name != "anomaly"]

    def forward(self, image_BHWC: Tensor) -> tuple[Tensor, ...]:
        scores = self.detector(image_BHWC)
        at_least_B = self._at_least("anomaly", scores.anomaly_score_B)
        values = [
            scores.anomaly_score_B,
            self.get_buffer("p_value_anomaly_K")[at_least_B],
            at_least_B <= self.most_at_least,
            scores.anomaly_map_BHW,
            scores.scale_scores_BS,
            scores.global_score_B,
        ]
        values += [scores.local_score_B] if self.has_local else []
        others = {"global": scores.global_score_B, "local": scores.local_score_B}
        values += [
            self.get_buffer(f"p_value_{name}_K")[self._at_least(name, others[name])]
            for name in self.heldout
            if name in others
        ]
        return tuple(values)

    def _at_least(self, name: str, score_B: Tensor) -> Tensor:
        """Number of held-out images that score at least this."""
        return (self.get_buffer(f"heldout_{name}_N") >= score_B[:, None]).long().sum(1)


def onnx_program(
    detector: Detector, calibration: Calibration, false_positive_rate: float
) -> torch.onnx.ONNXProgram:
    """The graph, for any number of images in a pass."""
    judging = JudgingDetector(detector, calibration, false_positive_rate).eval()
    # Two images, since the exporter takes a batch of one for a batch of always one.
    example_BHWC = torch.zeros(2, *detector.architecture.image_size, 3, dtype=torch.uint8)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of operators that torchvision registers, and of the exporter's own
        program = torch.onnx.export(
            judging,
            (example_BHWC,),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=[INPUT],
            output_names=judging.outputs,
            verbose=False,
        )
    assert program is not None
    return program


def _rounded_down(scores: NDArray[np.float64]) -> NDArray[np.float32]:
    """The largest float32 numbers that are not above: they are at least a float32 score if the others are."""
    ordered = np.sort(scores)
    rounded = ordered.astype(np.float32)
    too_high = rounded > ordered
    rounded[too_high] = np.nextafter(rounded[too_high], np.float32(-np.inf))
    return rounded


def _p_value_by_rank(scores: NDArray[np.float64], weights: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """The p-value of an image as which k = 0 … N held-out ones score at least as much."""
    ordered = np.sort(scores)
    return p_values(np.append(np.inf, ordered[::-1]), scores, weights)
