"""Evaluates how well anomaly scores and maps find known defects."""

from csflow.evaluate.job import EvaluateConfig, evaluate
from csflow.evaluate.ranking import image_metrics

__all__ = ["EvaluateConfig", "evaluate", "image_metrics"]
