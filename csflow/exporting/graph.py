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


class Judge(nn.Module):
    """Compares scores of images with the held-out ones."""

    def __init__(self, calibration: Calibration, false_positive_rate: float) -> None:
        super().__init__()
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

    @property
    def inputs(self) -> list[str]:
        """Names of the scores that `forward` takes, those of the columns of `scores`."""
        return [f"{name}_score" for name in self.heldout]

    @property
    def outputs(self) -> list[str]:
        """Names of what `forward` returns, those of the columns of `scores`."""
        others = [f"{name}_p_value" for name in self.heldout if name != "anomaly"]
        return ["p_value", *others, "is_anomalous"]

    def forward(self, *scores_B: Tensor) -> tuple[Tensor, ...]:
        at_least_B = [
            (self.get_buffer(f"heldout_{name}_N") >= score_B[:, None]).long().sum(1)
            for name, score_B in zip(self.heldout, scores_B, strict=True)
        ]
        p_values_B = [
            self.get_buffer(f"p_value_{name}_K")[place_B]
            for name, place_B in zip(self.heldout, at_least_B, strict=True)
        ]
        return *p_values_B, at_least_B[0] <= self.most_at_least


class ScoringDetector(nn.Module):
    """A float32 detector that returns the columns of `scores`."""

    def __init__(self, detector: Detector, has_local: bool) -> None:
        super().__init__()
        self.detector = detector
        self.outputs = ["anomaly_score", "anomaly_map", "scale_scores", "global_score"]
        self.outputs += ["local_score"] if has_local else []

    def forward(self, image_BHWC: Tensor) -> tuple[Tensor, ...]:
        scores = self.detector(image_BHWC)
        columns = {
            "anomaly_score": scores.anomaly_score_B,
            "anomaly_map": scores.anomaly_map_BHW,
            "scale_scores": scores.scale_scores_BS,
            "global_score": scores.global_score_B,
            "local_score": scores.local_score_B,
        }
        return tuple(columns[name] for name in self.outputs)


class JudgingDetector(nn.Module):
    """Both, one behind the other."""

    def __init__(self, scoring: ScoringDetector, judge: Judge) -> None:
        super().__init__()
        self.scoring, self.judge = scoring, judge
        self.outputs = scoring.outputs + judge.outputs

    def forward(self, image_BHWC: Tensor) -> tuple[Tensor, ...]:
        values = self.scoring(image_BHWC)
        by_name = dict(zip(self.scoring.outputs, values, strict=True))
        return *values, *self.judge(*(by_name[name] for name in self.judge.inputs))


def image_program(
    module: ScoringDetector | JudgingDetector, image_size: tuple[int, int]
) -> torch.onnx.ONNXProgram:
    """The graph of a module that takes images, for any number of them in a pass."""
    # Two images, since the exporter takes a batch of one for a batch of always one.
    example_BHWC = torch.zeros(2, *image_size, 3, dtype=torch.uint8)
    return _program(module, (example_BHWC,), [INPUT], module.outputs)


def judge_program(judge: Judge) -> torch.onnx.ONNXProgram:
    """The graph of the judge alone."""
    examples = tuple(torch.zeros(2) for _ in judge.inputs)
    return _program(judge, examples, judge.inputs, judge.outputs)


def _program(
    module: nn.Module, examples: tuple[Tensor, ...], inputs: list[str], outputs: list[str]
) -> torch.onnx.ONNXProgram:
    batch = {0: torch.export.Dim("batch")}
    # The judge takes its scores as *args, which is one argument to the exporter.
    shapes = ((batch,) * len(examples),) if isinstance(module, Judge) else (batch,)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of operators that torchvision registers, and of the exporter's own
        program = torch.onnx.export(
            module.eval(),
            examples,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            input_names=inputs,
            output_names=outputs,
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
