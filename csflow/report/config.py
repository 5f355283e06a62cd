"""Settings of the report job."""

from typing import Annotated

from pydantic import Field

from csflow.config import JobConfig


class ReportConfig(JobConfig):
    """Settings of `jobs/report.py`."""

    scores: str
    """Location of the scores: the `--output` of scoring jobs."""
    output: str = "report.html"
    """HTML file to write the report to."""
    top: Annotated[int, Field(ge=1)] = 60
    """Number of images to show: those with the highest anomaly scores."""
    false_discovery_rate: float = Field(0.1, gt=0, lt=1)
    """Share of the defect list that may be normal, on average."""
    defects: str | None = None
    """CSV or Parquet file to write the defect list to, highest anomaly score first."""
    run_id: str | None = None
    """Report only on the images that this run scored; `latest` is the last run. [default: all images]"""
    model_id: str | None = None
    """Model whose scores are shown, needed if --scores holds several models."""
    model: str | None = None
    """Model directory. Its held-out scores draw the line of normal images in the histogram. [default: where
    the last run found it]"""
