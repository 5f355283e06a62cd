"""Evaluates how well anomaly scores and maps find known defects."""

from csflow.evaluation.job import EvaluateConfig, evaluate
from csflow.evaluation.ranking import image_metrics

__all__ = ["EvaluateConfig", "evaluate", "image_metrics"]
