"""Settings of the report job."""

from typing import Annotated

from pydantic import Field

from csflow.config import JobConfig


class ReportConfig(JobConfig):
    """Settings of `jobs/report.py`."""

    scores: str
    """Location of the scores: the `--output` of scoring jobs."""
    output: str = "report.html"
    """HTML file that the report is written to."""
    top: Annotated[int, Field(ge=1)] = 60
    """Images shown, those with the highest anomaly scores."""
    false_discovery_rate: float = Field(0.1, gt=0, lt=1)
    """Share of normal images that the defect list may hold, on average (docs/calibration.md)."""
    defects: str | None = None
    """CSV or Parquet file that the defect list is written to, the highest anomaly score first."""
    run_id: str | None = None
    """Report on the images that this run scored, `latest` for those of the last one. [default: on all]"""
    model_id: str | None = None
    """Model whose scores are shown, where the location holds scores of several."""
    model: str | None = None
    """Its model directory, for the held-out scores. [default: where the last scoring run had it]"""
