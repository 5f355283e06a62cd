"""The evaluation job: how well anomaly scores and maps find what is known to be defective."""

from csflow.evaluate.job import EvaluateConfig, evaluate
from csflow.evaluate.ranking import image_metrics

__all__ = ["EvaluateConfig", "evaluate", "image_metrics"]
