"""When a scoring run stops before its end, told by the rows that come back from its shards; no cluster."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARD_ROW

from csflow.cluster import WorkerResources
from csflow.config import parse
from csflow.errors import Failed
from csflow.output.layout import Output
from csflow.scoring import pool
from csflow.scoring.config import ScoreConfig, ScoringSettings
from csflow.scoring.heartbeat import Heartbeat
from csflow.scoring.plan_log import PlannedShard
from csflow.scoring.stopping import FAILED_SHARDS_IN_A_ROW
from csflow.scoring.tally import Tally
from csflow.storage import Location

BAD: dict[str, Any] = {
    "failure": "OSError: No space left on device",
    "is_published": False,
    "began_at": None,
}
CORRUPT: dict[str, Any] = SHARD_ROW | {"scored": 4, "error_codes": [("corrupt", 6)]}
Follow = Callable[..., tuple[Tally, str, list[int]]]


@pytest.fixture
def follow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Follow:
    """Lets rows come back in place of those of actors; gives the tally, what was printed, and how many shards
    each pass over the cluster was given."""

    def run(
        *passes: Iterable[dict[str, Any]], shards: int, has_room: bool = True, **settings: object
    ) -> tuple[Tally, str, list[int]]:
        given: list[int] = []

        def map_shards(work: list[dict[str, Any]], *_: object, **__: object) -> Iterator[dict[str, Any]]:
            rows = passes[len(given)]
            given.append(len(work))
            for group, row in zip(work, rows, strict=False):
                (shard,) = json.loads(group["shards"])
                yield SHARD_ROW | {"shard": shard["name"]} | row

        monkeypatch.setattr(pool, "map_shards", map_shards)
        monkeypatch.setattr(pool, "has_room", lambda resources: has_room)
        location = Location(str(tmp_path))
        planned = [PlannedShard(f"{n:03}", "2026-11-02", location, n, "0" * 16) for n in range(shards)]
        arguments = {"model": "m", "input": "i", "output": "o"} | settings
        flags = [flag for name, value in arguments.items() for flag in (f"--{name}", str(value))]
        scoring = ScoringSettings(location, Output(location, "0" * 16), "run", True, 0.01, None)
        tally = Tally()
        heartbeat = Heartbeat(location, "run", datetime.now(UTC))
        resources = WorkerResources(workers=1, cpus=1, gpus=0)
        config, tallies = parse(ScoreConfig, None, flags), {"0" * 16: Tally()}
        pool.ScoringPool(config, [scoring], planned, resources, tally, tallies, heartbeat).score()
        return tally, capsys.readouterr().out, given

    return run


def test_a_run_in_which_one_shard_after_the_other_fails_is_stopped(follow: Follow) -> None:
    tally, printed, given = follow([SHARD_ROW] + [BAD] * 40, shards=41)
    assert len(tally.shards) == 1 + FAILED_SHARDS_IN_A_ROW == 17
    assert "shard 016 failed: OSError: No space left on device" in printed
    assert "stopped: the last 16 shards failed, see above" in printed
    assert given == [41]  # what is left is not tried once more


def test_failed_shards_among_good_ones_do_not_stop_a_run(follow: Follow) -> None:
    rows = [SHARD_ROW, *[BAD] * 15] * 3
    tally, printed, given = follow(rows, shards=48)
    assert (len(tally.shards), tally.failed_shards, tally.scored) == (48, 45, 30)
    assert "stopped" not in printed
    assert given == [48]


@pytest.mark.parametrize(("shards", "seen"), [(41, 4), (4, 4), (3, 3), (1, 1)])
def test_a_run_whose_first_shards_all_fail_is_failed(follow: Follow, shards: int, seen: int) -> None:
    said = f"the first {seen} shards failed, nothing of them was written; the last: OSError: No space"
    with pytest.raises(Failed, match=said):
        follow([BAD] * shards, shards=shards)


def test_a_run_is_stopped_when_too_large_a_share_of_enough_images_fails(follow: Follow) -> None:
    tally, printed, _ = follow([CORRUPT] * 40, shards=40, max_error_rate=0.5)
    assert tally.images == 100
    assert "stopped: 60 of 100 images failed: {'corrupt': 60}" in printed
    tally, printed, _ = follow([CORRUPT] * 40, shards=40, max_error_rate=0.6)
    assert tally.images == 400
    assert "stopped" not in printed


def test_shards_that_were_lost_are_tried_as_before_and_then_image_by_image(follow: Follow) -> None:
    tally, printed, given = follow([SHARD_ROW] * 3, [SHARD_ROW], [SHARD_ROW], shards=5)
    assert given == [5, 2, 1]
    assert "2 shards were lost with their workers; they are tried again" in printed
    assert "1 shards took their workers down again; their images are now tried one by one" in printed
    assert len(tally.shards) == 5


def test_shards_that_were_lost_with_a_node_are_not_tried_image_by_image(follow: Follow) -> None:
    tally, printed, given = follow([SHARD_ROW] * 3, [SHARD_ROW] * 2, shards=5)
    assert given == [5, 2]
    assert "one by one" not in printed
    assert len(tally.shards) == 5


def test_a_run_that_waits_in_vain_ends(follow: Follow) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield SHARD_ROW
        time.sleep(5)

    tally, printed, given = follow(rows(), shards=3, stall_timeout=0.2)
    assert "stalled: no shard finished for 0 s, 2 are still waited for" in printed
    assert (len(tally.shards), given) == (1, [3])


def test_a_run_to_which_no_worker_comes_ends_and_says_what_it_waited_for(follow: Follow) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        time.sleep(5)
        yield SHARD_ROW

    tally, printed, given = follow(rows(), shards=3, has_room=False, start_timeout=0.2)
    assert "no worker came within 0 s: the cluster had no node with 1 CPUs and 0 GPUs" in printed
    assert (len(tally.shards), given) == (0, [3])
