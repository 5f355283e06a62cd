"""Names the scoring actor for the driver, which imports no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from csflow.cluster import WorkerResources, on_this_node
from csflow.scoring.config import ScoringSettings

CALLS_PER_SCORER, CALLS_WITH_HELPERS = 2, 4
"""Number of shards in an actor at once: while the model scores one, others are read or written. Helpers read
several shards, since all of them work only while many images are wanted."""


def calls_per_scorer(resources: WorkerResources, is_tiled: bool) -> int:
    """Number of shards in an actor at once; one if each image may take a gigabyte, and keeps the model
    busy."""
    if is_tiled:
        return 1
    return CALLS_PER_SCORER if resources.decode == "beside" else CALLS_WITH_HELPERS


class ScoringActor:
    """Is a `KeptModels` in its worker. So the driver need not import torch, which is slow and large."""

    def __init__(self, settings: Sequence[ScoringSettings], resources: WorkerResources, most: int) -> None:
        from csflow.scoring.kept_models import KeptModels

        self._models = KeptModels(settings, on_this_node(resources), most)

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        return self._models(batch)
