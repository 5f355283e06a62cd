"""Settings of the scoring job, and those of them that its actors receive."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from csflow.config import (
    FALSE_POSITIVE_RATE,
    FALSE_REGIONS,
    Decode,
    ListingConfig,
    Locations,
    Moment,
    Patterns,
)
from csflow.decode_limits import DEFAULT_LIMITS, MAX_PIXELS, DecodeLimits
from csflow.errors import WrongUse
from csflow.precision import Device, PrecisionSetting

if TYPE_CHECKING:  # with pyarrow and fsspec --help would take a second
    from csflow.output.layout import Output
    from csflow.storage import Location


class ScoreConfig(ListingConfig):
    """Settings of `csflow score`."""

    model: str | None = None
    """Model directory, the --output of training or import, or a pointer to one, made by `csflow promote`.
    [default: none; required without --routes]"""
    routes: str | list[dict[str, Any]] | None = None
    """YAML file that says which images go to which model, and gives them tags. In --config it may also be
    the rules themselves. [default: all images go to --model]"""
    unrouted: Literal["error", "ignore"] = "error"
    """What images are that no rule of --routes matches: with `error` the run ends with exit status 3."""
    input: Locations
    """Folders, files, globs, archives or manifests of images; one or more."""
    output: str
    """Folder of the scores; many models, inputs and nights may share one."""
    tags: str | None = Field(None, min_length=1)
    """Pattern of image URIs, whose names in braces become the column `tags`, such as
    s3://plant/images/{line}/{day}/{part}_{camera}.jpg. `*` matches any text without a slash, `**` any text.
    [default: no tags]"""
    maps: Literal["native", "none"] = "native"
    """How anomaly maps are stored: `native` keeps their own resolution, `none` stores no maps."""
    false_positive_rate: float = Field(FALSE_POSITIVE_RATE, gt=0, lt=1)
    """Share of normal images that may be flagged. An image is flagged if its p-value is at most this."""
    false_regions: float = Field(FALSE_REGIONS, gt=0, le=1)
    """Number of regions (column `regions`) that a normal image may have on average."""
    include: Patterns = Field([])
    """Take only images whose URI matches one of these patterns; `*` matches any text, including slashes.
    [default: all images]"""
    exclude: Patterns = Field([])
    """Leave out images whose URI matches one of these patterns."""
    since: Moment | None = None
    """Take only files changed after this time, such as 2026-11-22T18:00Z, or within this age, such as 36h or
    7d."""
    limit: int | None = Field(None, ge=1)
    """Take only the first N images of the listing."""
    retry_errors: bool = False
    """Also retry images whose error is permanent."""
    max_error_rate: float = Field(0.5, gt=0, le=1)
    """If more than this share of the images fails, the run ends, maybe early, with exit status 3."""
    batch_size: int | None = Field(None, ge=1)
    """Number of images per forward pass. [default: 8 on CPUs; 128 on GPUs, fewer if images are large]"""
    precision: PrecisionSetting = "auto"
    """Precision of convolutions and matrix products; sums are float32. `mixed`, for CPUs, is float32 in the
    backbone's early layers, then bfloat16: scores differ from float32 by 0.2 % typically, rarely 1 %.
    `float16`, for GPUs, is as exact as `mixed`. `bfloat16` changes scores by several percent. `auto` is
    `float32` if training found that rounding would move the model's p-values; else `float16` on GPUs, `mixed`
    on CPUs that support bfloat16, and `float32` on others."""
    workers: int | None = Field(None, ge=1)
    """Number of scoring actors. If the cluster has room for fewer, the others start as room appears.
    [default: one per GPU, or one per CPU, and more when nodes join]"""
    device: Device = "auto"
    """What the actors compute on. `gpu` waits for GPU nodes that the autoscaler has not started yet,
    `cpu` leaves GPUs alone, `auto` is `gpu` if the cluster has one."""
    decode: Decode = "auto"
    """Where images are read and decoded. `beside`: by the actor alone. `cluster`: also by helpers, on CPUs
    that no actor has. `auto`: by helpers only while a GPU waits for images."""
    max_pixels: int = Field(MAX_PIXELS, ge=1)
    """Images of more pixels than this have the error `too_large`."""
    strict: bool = False
    """Images whose files are damaged inside have the errors `truncated` or `corrupt`, even if they can be
    decoded: JPEGs that end early, PNGs with wrong checksums. Takes up to half as long again for JPEGs."""
    models_kept: int = Field(4, ge=1)
    """Largest number of models that an actor keeps in memory at once."""
    start_timeout: float = Field(1800.0, gt=0)
    """If the cluster has no node for a worker at the start, and no shard finishes within this many seconds,
    the run ends with exit status 3."""
    stall_timeout: float = Field(1800.0, gt=0)
    """If no shard finishes for this many seconds, the run ends with exit status 3 instead of hanging."""
    exit_on_drift: bool = False
    """End with exit status 4 instead of 0 if the scores have drifted from the calibration."""

    @model_validator(mode="after")
    def _one_way_to_name_models(self) -> "ScoreConfig":
        if self.model is None and self.routes is None:
            raise WrongUse("--model is required, or --routes; see --help")
        if self.routes is not None and (self.model or self.tags):
            raise WrongUse(f"--routes names models and tags; leave out --{'model' if self.model else 'tags'}")
        return self


@dataclass(frozen=True)
class ScoringSettings:
    """The settings that every scoring actor receives."""

    model: "Location"
    output: "Output"
    run_id: str
    keep_maps: bool
    false_positive_rate: float
    batch_size: int | None
    precision: PrecisionSetting = "auto"
    false_regions: float = FALSE_REGIONS
    limits: DecodeLimits = DEFAULT_LIMITS
    is_tiled: bool = False
    """Whether the model sees images in tiles."""
    is_isolated: bool = False
    """Read and decode each image in a child process, because these shards' workers died before."""
