"""Groups shards for workers, so that these change their models rarely."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from csflow.model_directory import PROCESS_BYTES
from csflow.scoring.plan_log import PlannedShard

GROUPS_PER_WORKER = 8
"""So many groups are left for each worker, so that the last ones end at about the same time."""
MAX_GROUP = 8
"""Largest number of shards in a group: nothing is heard of a group before all of it is done."""


def grouped(shards: Sequence[PlannedShard], workers: int) -> Iterator[Sequence[PlannedShard]]:
    """Groups of shards of one model each, all groups of a model one after the other.

    With one model a group is a shard. With many, each of few shards, a group has all shards of a model, so
    that one worker loads the model and the others need not.

    Args:
        shards: those of a model stand together.
    """
    by_model = [list(some) for _, some in groupby(shards, lambda shard: shard.model_id)]
    size = min(MAX_GROUP, len(shards) // (GROUPS_PER_WORKER * workers)) if len(by_model) > 1 else 1
    # What takes longest begins first.
    for some in sorted(by_model, key=len, reverse=True):
        for start in range(0, len(some), max(1, size)):
            yield some[start : start + max(1, size)]


def worker_bytes(of_models: Sequence[int], kept: int) -> int:
    """Memory that a worker needs for the largest of some models, as many as it keeps.

    Args:
        of_models: memory that a worker needs for each model alone.
    """
    largest = sorted(of_models)[-kept:]
    return PROCESS_BYTES + sum(each - PROCESS_BYTES for each in largest)
