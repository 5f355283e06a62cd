"""What became of planned images, read from the files of scores and errors in few requests.

A finished shard has files that never change. Once all shards of a group are finished, the keys of their
images are written to one file beside the plan, the outcome file, and later runs read this one in place of
hundreds. Its name holds a digest of the names and versions of all files that it stands for, as a listing
shows them. So if a file was deleted, added or replaced, there is no outcome file of the name that is looked
for, and the files themselves are read again.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from csflow.output.layout import Kind, Output, ShardFile
from csflow.output.reading import permanent_errors, scored_images
from csflow.scoring.key_sets import Keys, KeySet, keys
from csflow.scoring.plan_log import Plan, PlanLog, PlannedShard
from csflow.storage import Location, read_all, to_parquet

GROUP_SHARDS = 4096
"""Number of shards of a plan that one outcome file stands for: at most a million images, whose keys fit into
memory."""
PAGE = 1000
"""Number of files that one request lists."""

OUTCOME = pa.schema(
    [
        pa.field("image_key", pa.binary(16), nullable=False),
        pa.field("is_scored", pa.bool_(), nullable=False),  # else it has a permanent error
    ]
)


@dataclass(frozen=True)
class Outcomes:
    """The outcomes of all images in some plans."""

    unfinished: list[PlannedShard]
    scored: list[KeySet]
    """Keys of the images in scores files; an image is in one of the sets."""
    failed: list[KeySet]
    """Keys of the images that have permanent errors."""


@dataclass(frozen=True)
class _Group:
    """Neighbouring shards of a plan, and their files."""

    plan: Plan
    numbers: range
    """The shards' numbers in the plan."""
    files: dict[Kind, list[ShardFile]] = field(default_factory=lambda: {"scores": [], "errors": []})

    def unfinished(self, output: Output) -> list[PlannedShard]:
        finished = {file.shard for file in self.files["scores"]}
        if len(finished) == len(self.numbers):
            return []
        shards = self.plan.planned_shards(output, self.numbers)
        return [shard for shard in shards if shard.name not in finished]

    def outcome_file(self, output: Output) -> Location | None:
        """The file that stands for this group's files; None if the store does not tell their versions."""
        digest = hashlib.sha256()
        for kind, files in sorted(self.files.items()):
            for file in files:
                if file.version is None:
                    return None
                digest.update(f"{kind} {file.location.name} {file.version}\n".encode())
        return output.outcome_file(self.plan.folder, self.numbers[0], digest.hexdigest()[:16])


class OutcomeReader:
    """Reads outcomes as often as asked; what has not changed since is not read again."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.log = PlanLog(output)
        self._scored, self._failed = KeySet(), KeySet()
        self._known: set[str] = set()
        """Names of the outcome files whose content is in these sets."""

    def read(self, plans: Sequence[Plan], all_plans: Sequence[Plan]) -> Outcomes:
        """The outcomes of the images in `plans`, and of all other images in files of their days."""
        groups, others = self._groups(plans, all_plans)
        unfinished: list[PlannedShard] = []
        settled: dict[str, tuple[_Group, Location]] = {}
        open_groups: list[_Group] = []
        for group in groups:
            missing = group.unfinished(self.output)
            unfinished += missing
            file = None if missing else group.outcome_file(self.output)
            if file is None:
                open_groups.append(group)
            else:
                settled[file.name] = group, file
        self._settle(settled)
        scored, failed = KeySet(), KeySet()
        for files in [*(group.files for group in open_groups), others]:
            _add(scored_images(files["scores"]), scored)
            _add(permanent_errors(files["errors"]), failed)
        return Outcomes(unfinished, [self._scored, scored], [self._failed, failed])

    def _groups(
        self, plans: Sequence[Plan], all_plans: Sequence[Plan]
    ) -> tuple[list[_Group], dict[Kind, list[ShardFile]]]:
        """The groups of these plans, and files of their days that belong to no plan at all."""
        dates = {plan.date for plan in plans}
        in_one_go = sum(plan.shards for plan in all_plans) < PAGE * len(dates)
        groups = {
            (plan.folder, start // GROUP_SHARDS): _Group(
                plan, range(plan.shards)[start : start + GROUP_SHARDS]
            )
            for plan in plans
            for start in range(0, plan.shards, GROUP_SHARDS)
        }
        folders = {plan.folder for plan in all_plans}
        others: dict[Kind, list[ShardFile]] = {"scores": [], "errors": []}
        for kind in others:
            for file in self.output.files(kind, dates, in_one_go):
                folder, _, number = file.shard.rpartition("-")
                if folder not in folders:
                    others[kind].append(file)
                elif group := groups.get((folder, int(number) // GROUP_SHARDS)):
                    group.files[kind].append(file)
        return list(groups.values()), others

    def _settle(self, settled: dict[str, tuple[_Group, Location]]) -> None:
        """Brings the sets of keys to the state of these outcome files, and writes those that are missing."""
        if not self._known <= settled.keys():
            # Files were deleted or replaced since the last time. It is rare, so all is read again.
            self._scored, self._failed, self._known = KeySet(), KeySet(), set()
        new = [settled[name] for name in sorted(settled.keys() - self._known)]
        known = self.log.outcome_files
        written = [(group, file) for group, file in new if file.name in known]
        contents = read_all(known[file.name] for _, file in written)
        for (group, file), content in zip(written, contents, strict=True):
            self._take(file, _parsed(content) or self._written(group, file))
        for group, file in new:
            if file.name not in known:
                self._take(file, self._written(group, file))

    def _take(self, file: Location, outcome: tuple[Keys, Keys]) -> None:
        for keys_of_group, to in zip(outcome, (self._scored, self._failed), strict=True):
            to.add(keys_of_group)
        self._known.add(file.name)

    def _written(self, group: _Group, file: Location) -> tuple[Keys, Keys]:
        """The keys of a group's scored and failed images, read from its files and written to `file`."""
        scored = _keys(scored_images(group.files["scores"]))
        failed = np.unique(_keys(permanent_errors(group.files["errors"])))
        both = np.concatenate([scored, failed])
        key = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(16), len(both), [None, pa.py_buffer(both.tobytes())]
        )
        is_scored = np.arange(len(both)) < len(scored)
        file.write(to_parquet(pa.table([key, is_scored], schema=OUTCOME)))
        return scored, failed


def _parsed(content: bytes) -> tuple[Keys, Keys] | None:
    """The keys of scored and of failed images in an outcome file; None if it is damaged."""
    try:
        table = pq.read_table(io.BytesIO(content), schema=OUTCOME)
    except (pa.ArrowException, OSError):
        return None
    key = np.frombuffer(b"".join(table["image_key"].to_pylist()), dtype="S16")
    is_scored = table["is_scored"].to_numpy()
    return key[is_scored], key[~is_scored]


def _keys(images: Iterable[pa.RecordBatch]) -> Keys:
    return np.concatenate([np.empty(0, "S16"), *map(keys, images)])


def _add(images: Iterator[pa.RecordBatch], to: KeySet) -> None:
    for batch in images:
        to.add(keys(batch))
