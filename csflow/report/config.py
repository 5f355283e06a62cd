"""Settings of the report job."""

from typing import Annotated

from pydantic import AfterValidator, Field

from csflow.config import JobConfig
from csflow.report.links import check_template


class ReportConfig(JobConfig):
    """Settings of `csflow report`."""

    scores: str
    """Location of the scores: the `--output` of scoring jobs."""
    output: str = "report.html"
    """HTML file to write the report to."""
    top: Annotated[int, Field(ge=1)] = 60
    """Number of images to show: those with the highest anomaly scores."""
    false_discovery_rate: float = Field(0.1, gt=0, lt=1)
    """Share of the defect list that may be normal, on average."""
    estimate: bool = False
    """If too few images are held out to promise that, choose the list by an estimate, from how the scores of
    these images fall off. It takes 10,000 images."""
    defects: str | None = None
    """CSV or Parquet file to write the defect list to, highest anomaly score first."""
    run_id: str | None = None
    """Report only on the images that this run scored; `latest` is the last run. [default: all images]"""
    link: Annotated[str, AfterValidator(check_template)] | None = None
    """Address that opens an image in another program, with the placeholder `{uri}`, the image URI with all
    special characters encoded, or `{path}`, the URI without its `s3://` or first slash, other slashes kept:
    `--link 'https://viewer.example/?image={uri}'`. [default: no links]"""
    presign_hours: Annotated[float, Field(gt=0, le=168)] | None = None
    """Link each shown image of an object store by a presigned URL that is valid for so many hours. Until
    then everybody who has the report can open these images. [default: no links]"""
    model_id: str | None = None
    """Model whose scores are shown, needed if --scores holds several models."""
    model: str | None = None
    """Model directory. Its held-out scores draw the line of normal images in the histogram. [default: where
    the last run found it]"""
