"""Settings of the scoring job, and what its actors are told of them."""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from csflow.config import JobConfig, Locations, Moment, Patterns
from csflow.output.layout import Output
from csflow.precision import PrecisionSetting
from csflow.storage import Location


class ScoreConfig(JobConfig):
    """Settings of `jobs/score.py`."""

    model: str
    """Model directory, the --output of jobs/train.py."""
    input: Locations
    """Folders, files, globs, archives or manifests of images; one or more."""
    output: str
    """Folder of the scores; many models, inputs and nights may share one."""
    maps: Literal["native", "none"] = "native"
    """Keep anomaly maps in their native resolution, or not at all."""
    false_positive_rate: float = Field(0.01, gt=0, lt=1)
    """Share of normal images that may be flagged: an image is anomalous if its p-value is at most this."""
    include: Patterns = Field([])
    """Take only images whose URI matches one of these patterns; `*` stands for any text, slashes too."""
    exclude: Patterns = Field([])
    """Leave out images whose URI matches one of these patterns."""
    since: Moment | None = None
    """Take only files changed since: a time such as 2026-11-22T18:00Z, or so long ago, such as 36h or 7d."""
    limit: int | None = Field(None, ge=1)
    """Take only the first so many images of the listing."""
    retry_errors: bool = False
    """Try images with a permanent error again."""
    max_error_rate: float = Field(0.5, gt=0, le=1)
    """Stop, or end, with exit status 3 when more than this share of the images fails."""
    batch_size: int | None = Field(None, ge=1)
    """Images per forward pass. [default: 8 on CPUs, 32 on GPUs]"""
    precision: PrecisionSetting = "auto"
    """Of convolutions and matrix products; sums are float32. mixed is float32 where the backbone's maps are
    large and bfloat16 behind, which moves scores by a thousandth, at most a hundredth; auto is mixed where
    the processor multiplies bfloat16, else float32; bfloat16 throughout moves scores by several percent."""
    workers: int | None = Field(None, ge=1)
    """Scoring actors. [default: one per GPU, or one per CPU]"""
    stall_timeout: float = Field(1800.0, gt=0)
    """Seconds without a finished shard after which the run ends with exit status 3 instead of hanging."""
    exit_on_drift: bool = False
    """End with exit status 4, in place of 0, when the scores have drifted from calibration."""


@dataclass(frozen=True)
class ScoringSettings:
    """What every scoring actor is told."""

    model: Location
    output: Output
    run_id: str
    keep_maps: bool
    false_positive_rate: float
    batch_size: int | None
    precision: PrecisionSetting = "auto"
    is_isolated: bool = False
    """Read and decode each image in a child process, since the shards' workers died before."""
