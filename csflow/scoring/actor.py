"""The scoring actor as the driver knows it: what it is told, and how it is called."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from csflow.cluster import WorkerResources
from csflow.config import Precision
from csflow.scoring.output import Output
from csflow.storage import Location

CALLS_PER_SCORER = 2
"""Shards in an actor at once: while the model scores one, the other is read ahead, or written."""


@dataclass(frozen=True)
class ScoringSettings:
    """What every scoring actor is told."""

    model: Location
    output: Output
    run_id: str
    keep_maps: bool
    false_positive_rate: float
    batch_size: int | None
    precision: Precision = "auto"
    is_isolated: bool = False
    """Read and decode each image in a child process, since the shards' workers died before."""


class ScoringActor:
    """A `ShardScorer` in its worker. The driver imports no torch, which is slow and large, for its name."""

    def __init__(self, settings: ScoringSettings, resources: WorkerResources) -> None:
        from csflow.scoring.shard import ShardScorer

        self._scorer = ShardScorer(settings, resources)

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        return self._scorer(batch)
