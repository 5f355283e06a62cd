"""The scoring actor as the driver knows it."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from csflow.cluster import WorkerResources
from csflow.scoring.config import ScoringSettings

CALLS_PER_SCORER = 2
"""Shards in an actor at once: while the model scores one, the other is read ahead, or written."""


class ScoringActor:
    """A `ShardScorer` in its worker. The driver imports no torch, which is slow and large, for its name."""

    def __init__(self, settings: ScoringSettings, resources: WorkerResources) -> None:
        from csflow.scoring.scorer import ShardScorer

        self._scorer = ShardScorer(settings, resources)

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        return self._scorer(batch)
