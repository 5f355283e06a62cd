"""The sign of life of a run at work: written when something is done, and in nobody's way."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from csflow.errors import StorageFailed
from csflow.output.runs import Progress, read_progress
from csflow.scoring import heartbeat
from csflow.scoring.heartbeat import Heartbeat
from csflow.storage import Location

STARTED = datetime(2026, 11, 2, 1, tzinfo=UTC)


@pytest.fixture
def output(tmp_path: Path) -> Location:
    return Location(str(tmp_path))


def told(output: Location) -> Progress:
    progress = read_progress(output, "r1")
    assert progress is not None
    return progress


def test_each_step_and_what_is_done_in_it_is_told(output, monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.0)
    beating = Heartbeat(output, "r1", STARTED)
    assert read_progress(output, "r1") is None
    beating.begin("score", of=3)
    before = told(output)
    assert (before.step, before.done, before.of, before.started_at) == ("score", 0, 3, STARTED)
    items = beating.over(iter("abc"))
    assert next(items) == "a"
    assert told(output).done == 1
    assert list(items) == ["b", "c"]
    assert told(output).done == 3
    assert told(output).updated_at > before.updated_at
    beating.begin("account")
    assert (told(output).step, told(output).done, told(output).of) == ("account", 0, 0)


def test_the_file_is_written_once_a_minute_however_much_is_done(output):
    beating = Heartbeat(output, "r1", STARTED)
    beating.begin("score", of=1000)
    assert len(list(beating.over(range(1000)))) == 1000
    assert told(output).done == 0


def test_a_store_that_fails_stops_no_run(output, monkeypatch):
    def fail(self: Location, data: bytes) -> None:
        raise StorageFailed("the disk is full")

    monkeypatch.setattr(Location, "write", fail)
    beating = Heartbeat(output, "r1", STARTED)
    beating.begin("list")
    assert list(beating.over([1])) == [1]


def test_what_cannot_be_read_is_no_progress(output):
    (output / "_runs" / "r1" / "progress.json").write(json.dumps({"run_id": "r1"}).encode())
    assert read_progress(output, "r1") is None
