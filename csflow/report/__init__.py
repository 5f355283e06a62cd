"""The report job: one self-contained HTML page about an archive's scores, and a list of its defects."""

from csflow.report.config import ReportConfig
from csflow.report.job import report

__all__ = ["ReportConfig", "report"]
