"""The evaluation job: how well anomaly scores and maps find what is known to be defective."""

from csflow.evaluate.image_metrics import image_metrics
from csflow.evaluate.job import EvaluateConfig, evaluate

__all__ = ["EvaluateConfig", "evaluate", "image_metrics"]
