"""The log of plans, which brings every image version into the output at most once (docs/exactly-once.md).

A plan assigns images to shards. The plan and the shard's number in it name the shard's scores file, so all
attempts at a shard make one file. The log's entries are `_plans/model_id=<id>/<number>.json`: they are
created, never changed, and numbered without gaps. A run plans only images that are not scored, have no
permanent error, and are in no unfinished shard of an earlier plan. If another run adds its plan first,
creating the entry fails and the run plans again.
"""

import io
import json
import random
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from csflow.errors import WrongUse
from csflow.output.layout import Output
from csflow.output.reading import permanent_errors, scored_images
from csflow.output.schemas import KEY_COLUMNS
from csflow.scoring.frozen_listing import Listing, rebatched
from csflow.scoring.key_sets import KeySet, Omitted, keys
from csflow.storage import Location

SHARD_STEP, MAX_SHARD_SIZE = 32, 256
"""Shards have a multiple of this many images, so that even their last batches are full, also on GPUs: a batch
takes the same time, full or not. It also gives an actor enough work while Ray Data looks for finished shards,
ten times a second."""
LAST = "\U0010ffff"
"""A URI above all others: the last URI of an entry that does not state one."""

SHARDS_PER_PART = 64
"""Number of shards in a part of a plan. Parts are small, since a worker reads one for each shard."""


@dataclass(frozen=True)
class PlannedShard:
    """The images of one row group of a plan, and the name of the file that their scores go to."""

    name: str
    date: str
    """Partition of the output: the day of the plan, even if the shard is scored later."""
    part: Location
    """The file of the plan that holds the shard."""
    row_group: int

    def to_row(self) -> dict[str, Any]:
        """The shard as a row of a Ray dataset."""
        return {"name": self.name, "date": self.date, "part": self.part.url, "row_group": self.row_group}

    @classmethod
    def from_row(cls, row: Mapping[str, Any], storage_options: Mapping[str, Any]) -> "PlannedShard":
        part = Location(str(row["part"]), storage_options)
        return cls(str(row["name"]), str(row["date"]), part, int(row["row_group"]))

    def images(self) -> pa.Table:
        """The images of the shard, in columns image_uri and image_version."""
        return pq.ParquetFile(io.BytesIO(self.part.read())).read_row_group(self.row_group)


@dataclass(frozen=True)
class Plan:
    """An entry of the log of plans."""

    number: int
    run_id: str
    date: str
    shards: int
    folder: str
    """Folder of the plan's images, which no other plan and no other attempt at this plan uses."""
    first_uri: str = ""
    """The smallest URI among the plan's images."""
    last_uri: str = LAST
    """The largest URI among the plan's images."""

    def concerns(self, listing: Listing) -> bool:
        """Whether the plan may hold a listed image."""
        return self.first_uri <= listing.last_uri and listing.first_uri <= self.last_uri

    def planned_shards(self, output: Output) -> Iterator[PlannedShard]:
        for i in range(self.shards):
            part, row_group = divmod(i, SHARDS_PER_PART)
            if row_group == 0:
                file = output.plan_part(self.folder, part)
            yield PlannedShard(f"{self.folder}-{i:06d}", self.date, file, row_group)


def make_plan(listing: Listing, output: Output, run_id: str, retry_errors: bool) -> list[PlannedShard]:
    """The shards that are left until every listed image is scored or has a permanent error.

    First come unfinished shards of earlier plans that hold listed images, then shards of a new plan for
    listed images that are in no shard yet, if there are any.
    """
    while True:
        log = read_log(output.folder("_plans"))
        concerned = [plan for plan in log if plan.concerns(listing)]
        dates = {plan.date for plan in concerned}
        # The scored images are those in the very files that make shards finished: no shard can be finished
        # whose images are not seen, however late or incomplete a listing is.
        finished = output.finished_shards(dates)
        unfinished = [s for plan in concerned for s in plan.planned_shards(output) if s.name not in finished]
        settled = KeySet()
        adopted = _adopt(unfinished, listing.keys, settled)
        _add(scored_images(list(finished.values())), settled)
        if not retry_errors:
            _add(permanent_errors(output.files("errors", dates)), settled)
        # Two runs over one output then begin at different ends, in place of doing everything twice.
        random.Random(run_id).shuffle(adopted)
        settled_rows = Omitted(
            part["number"][np.isin(part["key"], settled_part["key"])]
            for part, settled_part in zip(listing.keys.parts(), settled.parts(), strict=True)
        )
        left = listing.images - len(settled_rows)
        if not left:
            return adopted
        images = settled_rows.drop_from(batch.select(KEY_COLUMNS) for batch in listing.batches())
        number = log[-1].number + 1 if log else 1
        try:
            plan = _append(output, number, run_id, images, left)
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


def account(listing: Listing, output: Output) -> Account:
    """Looks up every listed image in the output. Raises RuntimeError if an image version has two scores."""
    dates = {plan.date for plan in read_log(output.folder("_plans")) if plan.concerns(listing)}
    scored, failed = KeySet(), KeySet()
    _add(scored_images(list(output.finished_shards(dates).values())), scored)
    _add(permanent_errors(output.files("errors", dates)), failed)
    scored_count = failed_count = duplicates = 0
    for listed_part, *others in zip(listing.keys.parts(), scored.parts(), failed.parts(), strict=True):
        scored_keys, failed_keys = (part["key"] for part in others)
        is_scored = np.isin(listed_part["key"], scored_keys)
        scored_count += int(is_scored.sum())
        failed_count += int((np.isin(listed_part["key"], failed_keys) & ~is_scored).sum())
        duplicates += len(scored_keys) - len(np.unique(scored_keys))
    if duplicates:
        raise RuntimeError(f"{duplicates} image versions are in {output.folder('scores')} more than once")
    missing = listing.images - scored_count - failed_count
    return Account(listing.images, scored_count, failed_count, missing)


def read_log(plans: Location) -> list[Plan]:
    """The entries of the log in order.

    Raises:
        WrongUse: an entry is missing, so its plan may hold images that no other entry tells of.
    """
    log = [Plan(**json.loads(file.read())) for file in plans.find(".json")]
    missing = set(range(1, len(log) + 1)) - {plan.number for plan in log}
    if missing:
        raise WrongUse(
            f"{plans} has lost entry {min(missing):06d}.json; restore it, or choose another --output"
        )
    return log


def _add(images: Iterable[pa.RecordBatch], to: KeySet) -> None:
    for batch in images:
        to.add(keys(batch))


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


def _append(output: Output, number: int, run_id: str, images: Iterable[pa.RecordBatch], count: int) -> Plan:
    """Writes a plan's images, `count` of them, then its entry.

    Raises:
        FileExistsError: the log has an entry with that number. It may be this one, if the store accepted it
            but its answer was lost. Either way the log says what is planned.
    """
    folder = f"{number:06d}-{secrets.token_hex(4)}"
    shard_size = min(SHARD_STEP * max(1, round(count / (64 * SHARD_STEP))), MAX_SHARD_SIZE)
    first_uri, last_uri = LAST, ""
    for part, table in enumerate(rebatched(images, shard_size * SHARDS_PER_PART)):
        buffer = io.BytesIO()
        pq.write_table(table, buffer, row_group_size=shard_size, compression="zstd")
        output.plan_part(folder, part).write(buffer.getvalue())
        least, greatest = pc.min_max(table["image_uri"]).as_py().values()
        first_uri, last_uri = min(first_uri, least), max(last_uri, greatest)
    shards = -(-count // shard_size)
    date = datetime.now(UTC).date().isoformat()
    plan = Plan(number, run_id, date, shards, folder, first_uri, last_uri)
    output.plan_entry(number).create(json.dumps(asdict(plan)).encode())
    return plan
