"""The log of plans, which gives every image version at most one place in the output.

A plan assigns images to shards; the file name of a shard follows from its place in the plan, so that
whoever scores it, how often and whenever, one file comes of it. `_plans/model_id=<id>/<number>.json` are
the entries of the log: created, never changed, numbered without gaps. A run plans only images that are
not scored, have no permanent error, and are in no unfinished shard of an earlier plan. Should another run
append its plan first, creating the entry fails and the run plans again. docs/exactly-once.md tells why
this holds under crashes.
"""

import io
import json
import random
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from csflow.errors import WrongUse
from csflow.scoring.listing import Listing
from csflow.scoring.output import KEY_COLUMNS, Keys, Output, contained, keys, scored_keys, sorted_keys
from csflow.storage import Location

MIN_SHARD_SIZE, MAX_SHARD_SIZE = 16, 256
SHARDS_PER_PART = 64
"""A worker reads the part of a plan for each of its shards, so parts are small."""


@dataclass(frozen=True)
class PlannedShard:
    """The images of one row group of a plan, and the name of the file that their scores go to."""

    name: str
    date: str
    """Partition of the output: the day of the plan, also if the shard is scored later."""
    part: Location
    """Plan file."""
    row_group: int

    def to_row(self) -> dict[str, Any]:
        """As a row of a Ray dataset."""
        return {"name": self.name, "date": self.date, "part": self.part.url, "row_group": self.row_group}

    @classmethod
    def from_row(cls, row: Mapping[str, Any], storage_options: Mapping[str, Any]) -> "PlannedShard":
        part = Location(str(row["part"]), storage_options)
        return cls(str(row["name"]), str(row["date"]), part, int(row["row_group"]))

    def images(self) -> pa.Table:
        """Columns image_uri and image_version."""
        return pq.ParquetFile(io.BytesIO(self.part.read())).read_row_group(self.row_group)


@dataclass(frozen=True)
class Plan:
    """An entry of the log."""

    number: int
    run_id: str
    date: str
    shards: int
    folder: str
    """Of the plan's images; used by no other plan nor by another try at this one."""

    def planned_shards(self, plans: Location) -> Iterator[PlannedShard]:
        for i in range(self.shards):
            part, row_group = divmod(i, SHARDS_PER_PART)
            file = plans / self.folder / f"part-{part:06d}.parquet"
            yield PlannedShard(f"{self.folder}-{i:06d}", self.date, file, row_group)


def make_plan(listing: Listing, output: Output, run_id: str, retry_errors: bool) -> list[PlannedShard]:
    """The shards that are left until every listed image is scored or has a permanent error.

    Unfinished shards of earlier plans with listed images among theirs come first, then those of a new
    plan for the images that have no place yet, if there are any.
    """
    plans = output.folder("_plans")
    listed = sorted_keys(map(keys, listing.batches()))
    while True:
        log = read_log(plans)
        # The scored images are those in the very files that make shards finished: no shard can be finished
        # whose images are not seen, however late or incomplete a listing is.
        finished = output.finished_shards()
        unfinished = [s for plan in log for s in plan.planned_shards(plans) if s.name not in finished]
        adopted, planned = _adopt(unfinished, listed)
        settled = [scored_keys(finished.values()), planned]
        if not retry_errors:
            settled.append(output.permanent_error_keys())
        left = list(_images_left(listing, sorted_keys(settled)))
        # Two runs over one output then begin at different ends, in place of doing everything twice.
        random.Random(run_id).shuffle(adopted)
        if not sum(part.num_rows for part in left):
            return adopted
        number = log[-1].number + 1 if log else 1
        try:
            plan = _append(plans, number, run_id, pa.Table.from_batches(left))
        except FileExistsError:
            continue
        return adopted + list(plan.planned_shards(plans))


@dataclass(frozen=True)
class Account:
    """Where the images of a listing are."""

    listed: int
    scored: int
    permanent_errors: int
    """Without a score, and with an error that stays."""
    missing: int
    """With neither: their errors may pass, or something went wrong."""


def account(listing: Listing, output: Output) -> Account:
    """Looks up every listed image in the output.

    Raises:
        RuntimeError: an image version is in the scores twice.
    """
    scored = scored_keys(output.finished_shards().values())
    failed = output.permanent_error_keys()
    duplicates = len(scored) - len(np.unique(scored))
    if duplicates:
        raise RuntimeError(f"{duplicates} image versions are in {output.folder('scores')} more than once")
    scored_images = failed_images = 0
    for batch in listing.batches():
        batch_keys = keys(batch)
        is_scored = contained(batch_keys, scored)
        scored_images += int(is_scored.sum())
        failed_images += int((contained(batch_keys, failed) & ~is_scored).sum())
    missing = listing.images - scored_images - failed_images
    return Account(listing.images, scored_images, failed_images, missing)


def read_log(plans: Location) -> list[Plan]:
    """The entries of the log in order.

    Raises:
        WrongUse: an entry is missing, so that images may have a place that nobody knows of.
    """
    log = [Plan(**json.loads(file.read())) for file in plans.find(".json")]
    missing = set(range(1, len(log) + 1)) - {plan.number for plan in log}
    if missing:
        raise WrongUse(
            f"{plans} has lost entry {min(missing):06d}.json; restore it, or choose another --output"
        )
    return log


def _adopt(unfinished: list[PlannedShard], listed: Keys) -> tuple[list[PlannedShard], Keys]:
    """Of the unfinished shards those with a listed image, and the keys of all images of these."""
    adopted: list[PlannedShard] = []
    planned: list[Keys] = []
    part, file = None, None
    for shard in unfinished:
        if shard.part != part:
            part, file = shard.part, pq.ParquetFile(io.BytesIO(shard.part.read()))
        assert file is not None
        shard_keys = keys(file.read_row_group(shard.row_group))
        if contained(shard_keys, listed).any():
            adopted.append(shard)
            planned.append(shard_keys)
    return adopted, sorted_keys(planned)


def _images_left(listing: Listing, settled: Keys) -> Iterator[pa.RecordBatch]:
    for batch in listing.batches():
        is_left = ~contained(keys(batch), settled)
        yield batch.select(KEY_COLUMNS).filter(pa.array(is_left))


def _append(plans: Location, number: int, run_id: str, images: pa.Table) -> Plan:
    """Writes a plan's images, then its entry.

    Raises:
        FileExistsError: the log has an entry of that number, maybe this one: a store may fail to tell that
            it took what it took. Either way the log says what is planned.
    """
    folder = f"{number:06d}-{secrets.token_hex(4)}"
    shard_size = min(max(images.num_rows // 64, MIN_SHARD_SIZE), MAX_SHARD_SIZE)
    starts = range(0, images.num_rows, shard_size)
    for part, first in enumerate(range(0, len(starts), SHARDS_PER_PART)):
        buffer = io.BytesIO()
        with pq.ParquetWriter(buffer, images.schema, compression="zstd") as writer:
            for start in starts[first : first + SHARDS_PER_PART]:
                writer.write_table(images.slice(start, shard_size), row_group_size=shard_size)
        (plans / folder / f"part-{part:06d}.parquet").write(buffer.getvalue())
    plan = Plan(number, run_id, datetime.now(UTC).date().isoformat(), len(starts), folder)
    (plans / f"{number:06d}.json").create(json.dumps(plan.__dict__).encode())
    return plan
