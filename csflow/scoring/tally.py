"""Adds up what has happened in a run so far: counts, seconds, memory and a sample of the scores."""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ray.util import metrics

from csflow.inputs.range_use import RangeUse

SAMPLE_SIZE = 100_000
GROUP_SAMPLE_SIZE = 10_000
ERROR_RATE_MINIMUM_IMAGES = 100
"""A run is not stopped for its error rate before this many images are done."""


@dataclass
class Sample:
    """A random sample: every value so far is in it with the same probability (reservoir sampling)."""

    size: int = SAMPLE_SIZE
    values: list[tuple[float, float]] = field(default_factory=list)
    """Anomaly and global score of each image."""
    seen: int = 0
    generator: random.Random = field(default_factory=lambda: random.Random(0), repr=False)

    def add(self, values: Iterable[tuple[float, float]]) -> None:
        for value in values:
            self.seen += 1
            if len(self.values) < self.size:
                self.values.append(value)
            elif (position := self.generator.randrange(self.seen)) < self.size:
                self.values[position] = value


@dataclass
class Tally:
    """Adds up the result rows of shards (`csflow.scoring.scorer.RESULT`)."""

    shards: set[tuple[str, str]] = field(default_factory=set)
    """Model ids and names of the shards that came back."""
    images: int = 0
    scored: int = 0
    anomalous: int = 0
    helped: int = 0
    """Images that helpers on other CPUs read and decoded."""
    p_values_below_5_percent: int = 0
    failed_shards: int = 0
    """Number of shards that failed as a whole, not because of an image."""
    without_model: int = 0
    """Those of them whose model could not be loaded."""
    not_loaded: str | None = None
    """Why, for the first of them."""
    models_loaded: int = 0
    """How often a worker loaded a model."""
    error_codes: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds by stage, summed over workers, and for reading and decoding over threads, too."""
    cpu_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """CPU seconds by stage; the rest of each worker process is `start` and `other`."""
    first_scored_at: datetime | None = None
    """The time when the first images of the run had their scores."""
    forms: set[str] = field(default_factory=set)
    """How workers computed the model, as JSON; several on a mixed cluster."""
    peak_worker_bytes: int = 0
    spilled_bytes: int = 0
    """Bytes that Ray's object stores moved to disk meanwhile."""
    range_use: RangeUse = field(default_factory=RangeUse)
    sample: Sample = field(default_factory=Sample)
    groups: dict[str, Sample] = field(default_factory=dict)
    """The scores of each group, such as a camera, that has a calibration of its own."""

    def add(self, row: Mapping[str, Any]) -> None:
        self.shards.add((row["model_id"], row["shard"]))
        self.failed_shards += bool(row["failure"])
        if row["is_of_model"]:
            self.without_model += 1
            self.not_loaded = self.not_loaded or row["failure"]
        self.models_loaded += row["loads"]
        if not row["is_published"]:
            return
        self._sample(list(zip(row["anomaly_scores"], row["global_scores"], strict=True)), row["groups"])
        self.images += row["images"]
        self.range_use.add(row["deep"], row["range_used"])
        self.scored += row["scored"]
        self.anomalous += row["anomalous"]
        self.helped += row["helped"]
        self.p_values_below_5_percent += row["p_values_below_5_percent"]
        self.error_codes.update(dict(row["error_codes"]))
        self.forms.add(row["form"])
        self.peak_worker_bytes = max(self.peak_worker_bytes, row["peak_memory_bytes"])
        for stage, seconds in row["seconds"]:
            self.seconds[stage] += seconds
        for stage, seconds in row["cpu_seconds"]:
            self.cpu_seconds[stage] += seconds
        if row["first_scored_at"]:
            self.first_scored_at = min(self.first_scored_at or row["first_scored_at"], row["first_scored_at"])

    @property
    def errors(self) -> int:
        return self.error_codes.total()

    def fails_everywhere(self, max_error_rate: float) -> bool:
        """Whether more than this share of the images failed, once enough images are done."""
        return self.images >= ERROR_RATE_MINIMUM_IMAGES and self.errors > max_error_rate * self.images

    def _sample(self, scores: Sequence[tuple[float, float]], groups: Sequence[str | None]) -> None:
        self.sample.add(scores)
        for value, group in zip(scores, groups, strict=False):  # no groups, or one for each score
            if group is not None:
                self.groups.setdefault(group, Sample(min(self.sample.size, GROUP_SAMPLE_SIZE))).add([value])


class LiveMetrics:
    """The figures of a tally as Ray metrics, which Ray's agents offer to Prometheus while the job runs."""

    def __init__(self) -> None:
        def counter(name: str, description: str, *tag: str) -> metrics.Counter:
            return metrics.Counter(f"csflow_{name}", description, tag_keys=("model_id", *tag))

        self._images = counter("images", "Images by outcome: scored, or the error code.", "outcome")
        self._seconds = counter("stage_seconds", "Seconds of workers by stage.", "stage")
        self._low = counter("low_p_values", "Images with a p-value below 0.05.")

    def add(self, row: Mapping[str, Any]) -> None:
        if not row["is_published"]:
            return
        model = {"model_id": row["model_id"]}
        outcomes = {"scored": row["scored"]} | dict(row["error_codes"])
        for outcome, images in outcomes.items():
            if images:
                self._images.inc(images, model | {"outcome": outcome})
        if row["p_values_below_5_percent"]:
            self._low.inc(row["p_values_below_5_percent"], model)
        for stage, seconds in row["seconds"]:
            if seconds > 0:
                self._seconds.inc(seconds, model | {"stage": stage})
