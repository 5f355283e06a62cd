"""Names the scoring actor for the driver, which imports no torch."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from csflow.cluster import WorkerResources, on_this_node
from csflow.scoring.config import ScoringSettings

CALLS_PER_SCORER, CALLS_WITH_HELPERS = 2, 4
"""Number of shards in an actor at once: while the model scores one, others are read or written. Helpers read
several shards, since all of them work only while many images are wanted."""


class ScoringActor:
    """Is a `ShardScorer` in its worker. So the driver need not import torch, which is slow and large."""

    def __init__(self, settings: ScoringSettings, resources: WorkerResources) -> None:
        from csflow.scoring.scorer import ShardScorer

        self._scorer = ShardScorer(settings, on_this_node(resources))

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        return self._scorer(batch)
