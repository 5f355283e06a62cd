"""Plans what is left to score, so that every image version comes into the output at most once, and accounts
for every listed image (docs/exactly-once.md).

A run plans only images that are not scored, have no permanent error, and are in no unfinished shard of an
earlier plan. If another run adds its plan first, creating the entry fails and the run plans again.
"""

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from csflow.scoring.frozen_listing import Listing
from csflow.scoring.key_sets import KeySet, Omitted, joined_parts, keys
from csflow.scoring.outcomes import OutcomeReader
from csflow.scoring.plan_log import PLANNED, PlannedShard


def make_plan(
    listing: Listing,
    outcomes: OutcomeReader,
    run_id: str,
    retry_errors: bool,
    shard_size: int | None = None,
) -> list[PlannedShard]:
    """The shards that are left until every listed image is scored or has a permanent error.

    First come unfinished shards of earlier plans that hold listed images, then shards of a new plan for
    listed images that are in no shard yet, if there are any.

    Args:
        shard_size: number of images in a shard of the new plan; None for what suits their number.
    """
    log, output = outcomes.log, outcomes.output
    while True:
        plans = log.read()
        # The scored images are those in the very files that make shards finished: no shard can be finished
        # whose images are not seen, however late or incomplete a listing is.
        found = outcomes.read([plan for plan in plans if plan.concerns(listing)], plans)
        waiting = KeySet()
        adopted = _adopt(found.unfinished, listing.keys, waiting)
        # Two runs over one output then begin at different ends, in place of doing everything twice.
        random.Random(run_id).shuffle(adopted)
        settled = [waiting, *found.scored, *([] if retry_errors else found.failed)]
        settled_rows = Omitted(
            part["number"][np.isin(part["key"], settled_part["key"])]
            for part, settled_part in zip(listing.keys.parts(), joined_parts(settled), strict=True)
        )
        left = listing.images - len(settled_rows)
        if not left:
            return adopted
        images = settled_rows.drop_from(batch.select(PLANNED) for batch in listing.batches())
        try:
            plan = log.append(run_id, images, left, shard_size)
        except FileExistsError:
            continue
        return adopted + list(plan.planned_shards(output))


@dataclass(frozen=True)
class Account:
    """Counts of the images of a listing, by where they are."""

    listed: int
    scored: int
    permanent_errors: int
    """Images without a score and with a permanent error."""
    missing: int
    """Images with neither: they have a transient error, or something went wrong."""


def account(listing: Listing, outcomes: OutcomeReader) -> Account:
    """Looks up every listed image in the output. Raises RuntimeError if an image version has two scores."""
    plans = outcomes.log.read()
    found = outcomes.read([plan for plan in plans if plan.concerns(listing)], plans)
    scored, failed = joined_parts(found.scored), joined_parts(found.failed)
    scored_count = failed_count = duplicates = 0
    for listed_part, *others in zip(listing.keys.parts(), scored, failed, strict=True):
        scored_keys, failed_keys = (part["key"] for part in others)
        is_scored = np.isin(listed_part["key"], scored_keys)
        scored_count += int(is_scored.sum())
        failed_count += int((np.isin(listed_part["key"], failed_keys) & ~is_scored).sum())
        duplicates += len(scored_keys) - len(np.unique(scored_keys))
    if duplicates:
        scores = outcomes.output.folder("scores")
        raise RuntimeError(f"{duplicates} image versions are in {scores} more than once")
    missing = listing.images - scored_count - failed_count
    return Account(listing.images, scored_count, failed_count, missing)


def _adopt(unfinished: Sequence[PlannedShard], listed: KeySet, settled: KeySet) -> list[PlannedShard]:
    """Adopts unfinished shards that hold a listed image, and settles all their images."""
    planned = KeySet()
    part, file = None, None
    for number, shard in enumerate(unfinished):
        if shard.part != part:
            part, file = shard.part, pq.ParquetFile(io.BytesIO(shard.part.read()))
        assert file is not None
        planned.add(keys(file.read_row_group(shard.row_group)), number)
    adopted: set[int] = set()
    for planned_part, listed_part in zip(planned.parts(), listed.parts(), strict=True):
        adopted.update(planned_part["number"][np.isin(planned_part["key"], listed_part["key"])].tolist())
    for planned_part in planned.parts():
        settled.add(planned_part["key"][np.isin(planned_part["number"], list(adopted))])
    return [unfinished[number] for number in sorted(adopted)]
