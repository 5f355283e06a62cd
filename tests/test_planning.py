"""Planning under random nights, against a model of it in sets and dictionaries.

Every limit is tiny, so that a few images spill to disk, fill several parts of a listing and many shards.
Nights list parts of one folder, of which some images change, some fail for good and some for a while. Runs
end before their shards are scored, meet rivals, and are overtaken by actors that were given up on.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from csflow.compaction import CompactConfig, compact
from csflow.errors import WrongUse
from csflow.inputs.listing import LISTING
from csflow.output.layout import Output, output_files
from csflow.output.schemas import ERRORS, SCORES
from csflow.pruning import PruneConfig, prune
from csflow.scoring import frozen_listing, key_sets, outcomes, plan_log
from csflow.scoring.frozen_listing import Listing
from csflow.scoring.outcomes import OutcomeReader
from csflow.scoring.plan import Account, account, make_plan
from csflow.scoring.plan_log import SHARDS_PER_PART, Plan, PlanLog, PlannedShard
from csflow.storage import Location, read_parquet, to_parquet

BUFFER_ROWS = 7
NIGHTS, IMAGES = 6, 36
Image = tuple[str, str]
"""URI and version."""


class Calendar:
    """Stands for `datetime` where a plan gets its day."""

    def __init__(self) -> None:
        self.today = datetime(2026, 11, 2, 2, tzinfo=UTC)

    def now(self, timezone: object) -> datetime:
        assert timezone is UTC  # a day of the place where the driver runs would differ from other drivers'
        return self.today


@pytest.fixture
def calendar(monkeypatch: pytest.MonkeyPatch) -> Calendar:
    calendar = Calendar()
    monkeypatch.setattr(plan_log, "datetime", calendar)
    return calendar


@pytest.fixture(autouse=True)
def tiny_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_sets, "BUFFER_ROWS", BUFFER_ROWS)
    monkeypatch.setattr(frozen_listing, "PART_ROWS", 5)
    monkeypatch.setattr(plan_log, "SHARDS_PER_PART", 2)
    monkeypatch.setattr(plan_log, "ENTRIES_READ_SINGLY", 2)
    monkeypatch.setattr(outcomes, "GROUP_SHARDS", 2)


@dataclass
class World:
    """An output, and what ought to be in it."""

    output: Output
    runs: int = 0
    shards: dict[str, tuple[PlannedShard, list[Image]]] = field(default_factory=dict)
    """All that were ever planned, by name."""
    unfinished: set[str] = field(default_factory=set)
    scored: Counter[Image] = field(default_factory=Counter)
    failed: set[Image] = field(default_factory=set)
    """For good."""
    reader: OutcomeReader = field(init=False)
    """Of the run that planned last."""

    def freeze(self, images: Iterable[Image]) -> Listing:
        self.runs += 1
        folder = self.output.location / "_runs" / str(self.runs) / "listing"
        return Listing.freeze(folder, batches_of(list(images)), None)

    def plan(self, images: list[Image], retry_errors: bool) -> list[str]:
        """Names of the shards that a run over these images is given, which are those it ought to be given."""
        listing = self.freeze(images)
        self.reader = reader = OutcomeReader(self.output)
        shards = make_plan(listing, reader, f"run-{self.runs}", retry_errors)
        # After planning: a rival may have planned meanwhile.
        adopted = {name for name in self.unfinished if set(self.shards[name][1]) & set(images)}
        waiting = {image for name in self.unfinished for image in self.shards[name][1]}
        settled = set(self.scored) | waiting | (set() if retry_errors else self.failed)
        new = [shard for shard in shards if shard.name not in self.shards]
        assert {shard.name for shard in shards} - {shard.name for shard in new} == adopted
        content = {shard.name: images_of(shard) for shard in new}
        planned = [image for some in content.values() for image in some]
        assert Counter(planned) == Counter(set(images) - settled)
        # In the order of the listing, in shards of one size; only the last may be smaller.
        assert planned == [image for image in dict.fromkeys(images) if image not in settled]
        sizes = [len(some) for some in content.values()]
        assert set(sizes[:-1]) <= {plan_log.SHARD_STEP}
        assert all(size <= plan_log.SHARD_STEP for size in sizes)
        self.shards |= {shard.name: (shard, content[shard.name]) for shard in new}
        self.unfinished |= content.keys()
        return [shard.name for shard in shards]

    def finish(self, name: str, chance: random.Random, failures: float) -> None:
        """What an actor does with a shard, this share of whose images fails; nothing if it is finished."""
        if name not in self.unfinished:
            return
        self.unfinished.remove(name)
        shard, images = self.shards[name]
        outcomes = dict.fromkeys(images, "scored")
        for image in images:
            if chance.random() < failures:
                outcomes[image] = chance.choice(["for good", "for a while"])
        errors = [error_row(image, o == "for a while") for image, o in outcomes.items() if o != "scored"]
        good = [image for image, outcome in outcomes.items() if outcome == "scored"]
        if errors:
            table = pa.Table.from_pylist(errors, ERRORS)
            self.output.errors_file(name, shard.date, table).write(to_parquet(table))
        rows = pa.Table.from_pylist([score_row(image) for image in good], SCORES)
        self.output.scores_file(name, shard.date).create(to_parquet(rows))
        self.scored.update(good)
        self.failed |= {image for image, outcome in outcomes.items() if outcome == "for good"}

    def account(self, images: list[Image]) -> None:
        """The job's own account of a listing is the model's, and no image has two rows."""
        assert max(self.scored.values(), default=1) == 1
        listed = set(images)
        failed = listed & self.failed - set(self.scored)
        missing = listed - set(self.scored) - self.failed
        expected = Account(len(listed), len(listed & set(self.scored)), len(failed), len(missing))
        for reader in (self.reader, OutcomeReader(self.output)):
            assert account(self.freeze(images), reader) == expected

    def prune_and_compact(self, today: datetime) -> None:
        """Later nights show that they need nothing of what was pruned."""
        shards = {file.shard: file for file in self.output.files("scores")}
        if not shards:
            return
        root = self.output.location
        prune(PruneConfig(scores=root.url))
        target = root / "large"
        before = today.date() + timedelta(days=1)
        compact(CompactConfig(scores=root.url, output=target.url, before=before))
        rows: Counter[str] = Counter()
        for file in output_files(target, "scores"):
            rows[file.date.isoformat()] += len(read_parquet(file.location))
        open_days = {self.shards[name][0].date for name in self.unfinished}
        expected = Counter(
            {
                date: sum(len(read_parquet(file.location)) for file in shards.values() if file.date == date)
                for date in {file.date for file in shards.values()} - open_days
            }
        )
        # A day that a new plan opened again is as it was when it was last compacted.
        assert {date: n for date, n in rows.items() if date not in open_days} == expected


def batches_of(images: list[Image]) -> Iterable[pa.RecordBatch]:
    """A listing in batches of 1, 2, 3, … images."""
    rows = [{"size_bytes": 1, "image_uri": u, "image_version": v} for u, v in images]
    start, size = 0, 1
    while start < len(rows):
        yield pa.RecordBatch.from_pylist(rows[start : start + size], LISTING)
        start, size = start + size, size + 1


def images_of(shard: PlannedShard) -> list[Image]:
    """Read as an actor reads them, to which the shard travels as a row."""
    table = PlannedShard.from_row(shard.to_row(), {}).images()
    return list(zip(table["image_uri"].to_pylist(), table["image_version"].to_pylist(), strict=True))


def score_row(image: Image) -> dict[str, Any]:
    row: dict[str, Any] = (
        dict.fromkeys(SCORES.names, 0) | {"model_name": None} | dict(zip(SCORES.names, image, strict=False))
    )
    lists = {"scale_scores": [], "anomaly_map": None, "map_box": None, "regions": None, "tags": None}
    return row | lists | {"run_id": "run", "is_anomalous": False}


def error_row(image: Image, is_transient: bool) -> dict[str, Any]:
    row: dict[str, Any] = dict(zip(ERRORS.names, image, strict=False)) | {"is_transient": is_transient}
    code = "timeout" if is_transient else "corrupt"
    return row | {"error_code": code, "error_message": "", "run_id": "run", "failed_at": 0}


def nightly(chance: random.Random, versions: dict[str, int]) -> list[Image]:
    """The images of a range of the folder, often not all of them; a few are of a new version.

    Ranges of one or two images are frequent, since these often begin where that of an earlier night ended.
    """
    uris = sorted(versions)
    first = chance.randrange(len(uris))
    some = uris[first : first + chance.choice([1, 2, 5, len(uris)])]
    some = chance.sample(some, chance.choice([len(some), len(some), (len(some) + 1) // 2]))
    for uri in chance.sample(some, len(some) // 6):
        versions[uri] += 1
    return [(uri, f"version {versions[uri]}") for uri in some]


@pytest.mark.parametrize("seed", range(12))
def test_nights_of_any_kind_plan_every_image_version_once_and_forget_none(
    seed: int, tmp_path: Path, calendar: Calendar, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_log, "SHARD_STEP", 2 + seed % 3)
    chance = random.Random(seed)
    world = World(Output(Location(str(tmp_path)), "0" * 16))
    versions = {f"/plant/{n:02}.png": 1 for n in range(IMAGES)}
    append = PlanLog.append

    def append_after_a_rival(*arguments: Any) -> Plan:
        if chance.random() < 0.3:
            with monkeypatch.context() as patch:
                patch.setattr(PlanLog, "append", append)
                world.plan(nightly(chance, dict(versions)), chance.random() < 0.2)
        return append(*arguments)

    monkeypatch.setattr(PlanLog, "append", append_after_a_rival)
    for _ in range(NIGHTS):
        calendar.today += timedelta(hours=chance.choice([1, 20]))
        images = nightly(chance, versions)
        shards = world.plan(images, retry_errors=chance.random() < 0.2)
        # Some nights are cut short, and an actor of any earlier night may still come to an end.
        ended = shards[: chance.choice([0, len(shards) // 2, len(shards)])]
        ended += chance.sample(sorted(world.shards), min(2, len(world.shards)))
        for name in ended:
            world.finish(name, chance, failures=0.2)
        world.account(images)
        if chance.random() < 0.5:
            world.prune_and_compact(calendar.today)

    monkeypatch.setattr(PlanLog, "append", append)
    everything = [(uri, f"version {version}") for uri, version in versions.items()]
    for name in world.plan(everything, retry_errors=True):
        world.finish(name, chance, failures=0)
    world.account(everything)
    assert set(everything) <= set(world.scored) | world.failed
    for name in world.plan(everything, retry_errors=True):
        world.finish(name, chance, failures=0)
    assert set(everything) <= set(world.scored)
    entries = len(PlanLog(world.output).read())
    assert world.plan(everything, retry_errors=True) == []
    assert len(PlanLog(world.output).read()) == entries


def numbered(count: int, first: int = 0) -> list[Image]:
    return [(f"/plant/{n:04}.png", "1") for n in range(first, first + count)]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(plan_log, "SHARD_STEP", 2)
    return World(Output(Location(str(tmp_path)), "0" * 16))


@pytest.mark.parametrize(("images", "size"), [(1, 2), (191, 2), (193, 4), (321, 6), (600, 8)])
def test_shards_grow_with_a_plan_in_steps_and_up_to_a_limit(
    world: World, monkeypatch: pytest.MonkeyPatch, images: int, size: int
) -> None:
    # About 64 shards; whole steps keep the last batches full.
    monkeypatch.setattr(frozen_listing, "PART_ROWS", 250)
    monkeypatch.setattr(plan_log, "MAX_SHARD_SIZE", 8)
    monkeypatch.setattr(plan_log, "SHARDS_PER_PART", 64)
    shards = make_plan(world.freeze(numbered(images)), OutcomeReader(world.output), "run", retry_errors=False)
    assert [len(images_of(shard)) for shard in shards[:-1]] == [size] * (len(shards) - 1)
    assert 1 <= len(images_of(shards[-1])) <= size
    assert len(shards) == -(-images // size)


def test_runs_over_one_output_begin_at_different_ends(world: World) -> None:
    listing = world.freeze(numbered(20))
    make_plan(listing, OutcomeReader(world.output), "crashed", retry_errors=False)
    orders = [
        [shard.name for shard in make_plan(listing, OutcomeReader(world.output), run, retry_errors=False)]
        for run in ("one", "other", "one")
    ]
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_an_entry_of_the_log_says_what_it_is(world: World, calendar: Calendar, tmp_path: Path) -> None:
    world.plan(numbered(5, first=3), retry_errors=False)
    calendar.today += timedelta(days=1)
    world.plan(numbered(4, first=6), retry_errors=False)
    folder = tmp_path / "_plans" / f"model_id={'0' * 16}"
    entries = [json.loads((folder / f"00000{number}.json").read_text()) for number in (1, 2)]
    first, second = entries
    folders = [first.pop("folder"), second.pop("folder")]
    assert first == {
        "number": 1,
        "run_id": "run-1",
        "date": "2026-11-02",
        "shards": 3,
        "first_uri": "/plant/0003.png",
        "last_uri": "/plant/0007.png",
    }
    assert second == {
        "number": 2,
        "run_id": "run-2",
        "date": "2026-11-03",
        "shards": 1,
        "first_uri": "/plant/0008.png",
        "last_uri": "/plant/0009.png",
    }
    assert [re.fullmatch(r"00000\d-[0-9a-f]{8}", name) is not None for name in folders] == [True, True]
    assert sorted(path.name for path in (folder / folders[0]).iterdir()) == [
        "part-000000.parquet",
        "part-000001.parquet",
    ]
    part = pq.ParquetFile(folder / folders[0] / "part-000000.parquet")
    assert (part.num_row_groups, part.metadata.row_group(0).column(0).compression) == (2, "ZSTD")
    names = [name for name, (shard, _) in world.shards.items() if shard.date == "2026-11-02"]
    assert names == [f"{folders[0]}-{n:06}" for n in range(3)]


def test_plans_that_an_earlier_csflow_left_are_found_in_parts_of_64_shards(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_log, "SHARDS_PER_PART", SHARDS_PER_PART)
    shards = Plan(7, "run", "2026-11-02", 65, "000007-ab").planned_shards(world.output)
    places = [(shard.part, shard.row_group) for shard in shards]
    first, second = (world.output.plan_part("000007-ab", number) for number in (0, 1))
    assert places == [*((first, n) for n in range(64)), (second, 0)]


def test_images_of_a_plan_that_an_earlier_csflow_left_have_no_time(tmp_path: Path) -> None:
    part = Location(str(tmp_path / "part.parquet"))
    part.write(to_parquet(pa.table({"image_uri": ["a"], "image_version": ["1"]})))
    images = PlannedShard("1-ab-000000", "2026-11-02", part, 0, "a").images()
    assert images.schema.field("image_modified_at") == LISTING.field("image_modified_at")
    (image,) = images.to_pylist()
    assert image == {"image_uri": "a", "image_version": "1", "image_modified_at": None, "tags": None}


def test_a_shard_comes_to_an_actor_as_a_row_without_the_options_of_its_store() -> None:
    options = {"secret": "wJalrXUtnFEMI"}
    shard = PlannedShard("1-ab-000007", "2026-11-02", Location("s3://plant/part", options), 7, "a")
    assert options["secret"] not in str(shard.to_row())
    assert PlannedShard.from_row(shard.to_row(), options) == shard


def test_an_entry_that_does_not_say_its_range_may_hold_any_image(world: World, tmp_path: Path) -> None:
    behind_all_others: list[Image] = [("\U0010fffe.png", "1")]
    world.plan(numbered(4) + behind_all_others, retry_errors=False)
    (file,) = (tmp_path / "_plans").rglob("*.json")
    entry = json.loads(file.read_text())
    file.write_text(json.dumps({name: entry[name] for name in entry if not name.endswith("_uri")}))
    world.plan(numbered(8), retry_errors=False)
    world.plan(behind_all_others, retry_errors=False)
    assert [(entry.first_uri, entry.last_uri) for entry in PlanLog(world.output).read()] == [
        ("", plan_log.LAST),
        ("/plant/0004.png", "/plant/0007.png"),
    ]


@pytest.mark.parametrize("lost", [1, 2])
def test_a_log_with_a_gap_is_refused_by_the_name_of_what_is_lost(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    monkeypatch.setattr(plan_log, "ENTRIES_READ_SINGLY", 3)
    for first in (0, 10, 20):
        world.plan(numbered(3, first), retry_errors=False)
    (tmp_path / "_plans" / f"model_id={'0' * 16}" / f"00000{lost}.json").unlink()
    with pytest.raises(WrongUse, match=rf"has lost entry 00000{lost}\.json; restore it, or choose another"):
        make_plan(world.freeze(numbered(40)), OutcomeReader(world.output), "run", retry_errors=False)


def test_an_image_in_two_files_of_scores_is_found_by_the_account(world: World) -> None:
    images = numbered(3)
    first, second = world.plan(images, retry_errors=False)
    for name in (first, second):
        world.finish(name, random.Random(0), failures=0)
    world.account(images)
    date = world.shards[first][0].date
    world.output.scores_file("twice", date).write(world.output.scores_file(first, date).read())
    with pytest.raises(RuntimeError, match=r"^2 image versions are in .*/scores/model_id=0+ more than once$"):
        account(world.freeze(images), world.reader)


def test_entries_that_a_copy_of_the_log_holds_may_be_lost(world: World, tmp_path: Path) -> None:
    for first in (0, 10, 20):
        world.plan(numbered(3, first), retry_errors=False)
    PlanLog(world.output).read()  # of which so many entries are new to it that it leaves a copy
    folder = tmp_path / "_plans" / f"model_id={'0' * 16}"
    for number in (1, 2):
        (folder / f"00000{number}.json").unlink()
    assert len(PlanLog(world.output).read()) == 3
    assert len(world.plan(numbered(25), retry_errors=False)) > 0


def finished_nights(world: World, failures: float) -> list[Image]:
    """Two finished nights, accounted for; their images."""
    chance = random.Random(0)
    for first in (0, 10):
        for name in world.plan(numbered(10, first), retry_errors=False):
            world.finish(name, chance, failures)
    world.account(numbered(20))
    return numbered(20)


def test_finished_nights_are_known_from_their_outcome_files(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = finished_nights(world, failures=0.3)

    def read_none(files: list[Location]) -> list[pa.RecordBatch]:
        assert files == []
        return []

    monkeypatch.setattr(outcomes, "scored_images", read_none)
    monkeypatch.setattr(outcomes, "permanent_errors", read_none)
    world.plan(images, retry_errors=False)
    world.plan(images, retry_errors=True)


def test_a_damaged_outcome_file_is_written_anew(world: World, tmp_path: Path) -> None:
    images = finished_nights(world, failures=0.3)
    files = sorted((tmp_path / "_plans").rglob("outcome-*.parquet"))
    whole = [file.read_bytes() for file in files]
    assert len(files) > 2
    files[0].write_bytes(whole[0][:-5])
    files[1].write_bytes(b"")
    world.account(images)
    world.plan(images, retry_errors=False)
    assert [file.read_bytes() for file in files] == whole


def test_scores_and_errors_that_were_deleted_are_made_again_in_spite_of_outcome_files(world: World) -> None:
    images = finished_nights(world, failures=0.4)
    name, *_ = (name for name, (_, shard_images) in world.shards.items() if set(shard_images) & world.failed)
    shard, shard_images = world.shards[name]
    output, date = world.output, {shard.date}
    for kind in ("scores", "errors"):
        for file in output.files(kind, date):
            if file.shard == name:
                file.location.remove()
    world.scored.subtract({image: 1 for image in shard_images if image in world.scored})
    world.scored = +world.scored
    world.failed -= set(shard_images)
    world.unfinished.add(name)
    reader = world.reader
    world.account(images)
    # Beside the images that failed for a while.
    again = world.plan(images, retry_errors=False)
    assert name in again
    for left in again:
        world.finish(left, random.Random(0), failures=0)
    assert set(shard_images) <= set(world.scored)
    world.account(images)
    world.reader = reader  # which has seen the old files
    world.account(images)


def test_an_error_that_was_deleted_has_its_image_planned_again(world: World) -> None:
    images = finished_nights(world, failures=0.4)
    gone = {image for image in world.failed if image not in world.scored}
    assert gone
    for _, (shard, _) in world.shards.items():
        for file in world.output.files("errors", {shard.date}):
            file.location.remove()
    world.failed -= gone
    assert world.plan(images, retry_errors=False)
