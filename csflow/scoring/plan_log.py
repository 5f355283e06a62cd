"""The log of plans: which images are in which shard, and which file a shard's scores go to.

A plan assigns images to shards. The plan and the shard's number in it name the shard's scores file, so all
attempts at a shard make one file. The log's entries are `_plans/model_id=<id>/<number>.json`: they are
created, never changed, and numbered without gaps.
"""

import io
import json
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from csflow.errors import WrongUse
from csflow.output.layout import Output
from csflow.output.schemas import KEY_COLUMNS
from csflow.scoring.frozen_listing import FROZEN, Listing, rebatched
from csflow.storage import FoundFile, Location, read_all

SHARD_STEP, MAX_SHARD_SIZE = 32, 256
"""Shards have a multiple of this many images, so that even their last batches are full, also on GPUs: a batch
takes the same time, full or not. It also gives an actor enough work while Ray Data looks for finished shards,
ten times a second."""
SHARD_SIZE_WITH_TILES = 8
"""Size of shards of images that are cut into tiles: one such image may take as long as hundreds of others."""
PLANNED = [*KEY_COLUMNS, "image_modified_at", "tags"]
"""What a plan has of each image."""
LAST = "\U0010ffff"
"""A URI above all others: the last URI of an entry that does not state one."""
SHARDS_PER_PART = 64
"""Number of shards in a part of a plan. Parts are small, since a worker reads one for each shard."""
ENTRIES_READ_SINGLY = 64
"""So many entries are read one by one; then a copy of the log is made in one file."""


@dataclass(frozen=True)
class PlannedShard:
    """The images of one row group of a plan, and the name of the file that their scores go to."""

    name: str
    date: str
    """Partition of the output: the day of the plan, even if the shard is scored later."""
    part: Location
    """The file of the plan that holds the shard."""
    row_group: int
    model_id: str

    def to_row(self) -> dict[str, Any]:
        """The shard as it travels to a worker."""
        return {
            "name": self.name,
            "date": self.date,
            "part": self.part.url,
            "row_group": self.row_group,
            "model_id": self.model_id,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any], storage_options: Mapping[str, Any]) -> "PlannedShard":
        part = Location(str(row["part"]), storage_options)
        return cls(str(row["name"]), str(row["date"]), part, int(row["row_group"]), str(row["model_id"]))

    def images(self) -> pa.Table:
        """The images of the shard, in the columns `PLANNED`."""
        images = pq.ParquetFile(io.BytesIO(self.part.read())).read_row_group(self.row_group)
        # The plans of an older csflow have no times and no tags.
        for name in set(PLANNED) - set(images.schema.names):
            kind = FROZEN.field(name)
            images = images.append_column(kind, pa.nulls(len(images), kind.type))
        return images.select(PLANNED)


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

    def planned_shards(self, output: Output, numbers: range | None = None) -> Iterator[PlannedShard]:
        """The shards with these numbers, or all."""
        for part, some in groupby(numbers or range(self.shards), lambda number: number // SHARDS_PER_PART):
            file = output.plan_part(self.folder, part)
            for number in some:
                row_group = number % SHARDS_PER_PART
                yield PlannedShard(self.shard_name(number), self.date, file, row_group, output.model_id)

    def shard_name(self, number: int) -> str:
        """The name of the shard with this number."""
        return f"{self.folder}-{number:06d}"


class PlanLog:
    """Reads and appends to the log of one output. An entry is read only once."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.outcome_files: dict[str, FoundFile] = {}
        """The outcome files that there were when the log was last read, by name."""
        self._plans: dict[int, Plan] = {}

    def read(self) -> list[Plan]:
        """All entries in order.

        Raises:
            WrongUse: an entry is missing, so its plan may hold images that no other entry tells of.
        """
        files = {file.location.name: file for file in self.output.folder("_plans").find_details("")}
        self.outcome_files = {name: file for name, file in files.items() if name.startswith("outcome-")}
        copies = [file for name, file in files.items() if name.endswith(".jsonl")]
        if copies and not self._plans:
            self._add(copies[-1].read().splitlines())
        entries = {
            int(name.removesuffix(".json")): file for name, file in files.items() if name.endswith(".json")
        }
        new = [file for number, file in entries.items() if number not in self._plans]
        self._add(read_all(new))
        missing = set(range(1, len(self._plans) + 1)) - self._plans.keys()
        if missing:
            raise WrongUse(
                f"{self.output.folder('_plans')} has lost entry {min(missing):06d}.json; restore it, or "
                "choose another --output"
            )
        log = [self._plans[number] for number in sorted(self._plans)]
        if len(new) >= ENTRIES_READ_SINGLY:
            lines = "".join(f"{json.dumps(asdict(plan))}\n" for plan in log)
            self.output.log_copy(len(log)).write(lines.encode())
        return log

    def append(
        self, run_id: str, images: Iterable[pa.RecordBatch], count: int, shard_size: int | None = None
    ) -> Plan:
        """Writes a plan's images, `count` of them, then its entry behind the last one that was read.

        Args:
            shard_size: number of images in a shard; None for what suits their number.

        Raises:
            FileExistsError: the log has an entry with that number. It may be this one, if the store accepted
                it but its answer was lost. Either way the log says what is planned.
        """
        number = len(self._plans) + 1
        folder = f"{number:06d}-{secrets.token_hex(4)}"
        if shard_size is None:
            shard_size = min(SHARD_STEP * max(1, round(count / (64 * SHARD_STEP))), MAX_SHARD_SIZE)
        first_uri, last_uri = LAST, ""
        for part, table in enumerate(rebatched(images, shard_size * SHARDS_PER_PART)):
            buffer = io.BytesIO()
            pq.write_table(table, buffer, row_group_size=shard_size, compression="zstd")
            self.output.plan_part(folder, part).write(buffer.getvalue())
            least, greatest = pc.min_max(table["image_uri"]).as_py().values()
            first_uri, last_uri = min(first_uri, least), max(last_uri, greatest)
        shards = -(-count // shard_size)
        date = datetime.now(UTC).date().isoformat()
        plan = Plan(number, run_id, date, shards, folder, first_uri, last_uri)
        self.output.plan_entry(number).create(json.dumps(asdict(plan)).encode())
        return plan

    def _add(self, entries: Iterable[bytes]) -> None:
        for entry in entries:
            plan = Plan(**json.loads(entry))
            self._plans[plan.number] = plan
