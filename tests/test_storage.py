"""Files in local folders and on S3, and the sharing out of a cluster."""

import threading
from dataclasses import dataclass

import pytest

from csflow import storage
from csflow.cluster import WorkerResources, _fit, share_out
from csflow.errors import StorageFailed, WrongUse
from csflow.storage import Location


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path) -> Location:
    return Location(
        request.getfixturevalue("s3_bucket") + "/a" if request.param == "s3" else str(tmp_path / "a")
    )


def test_of_many_writers_exactly_one_creates_a_file(folder):
    outcomes: list[bool] = []
    barrier = threading.Barrier(8)

    def create(i: int) -> None:
        barrier.wait()
        try:
            (folder / "file").create(str(i).encode())
            outcomes.append(True)
        except FileExistsError:
            outcomes.append(False)

    threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False] * 7 + [True]
    assert [file.name for file in folder.find("file")] == ["file"]


def test_files_are_written_read_and_found(folder):
    assert folder.find(".json") == []
    (folder / "b/2.json").write(b"two")
    (folder / "1.json").write(b"one")
    (folder / "1.json").write(b"one again")
    (folder / ".hidden.json").write(b"")
    assert [file.read() for file in folder.find(".json")] == [b"one again", b"two"]
    assert not (folder / "none").exists()
    assert (folder / "1.json").parent.name == folder.name
    with pytest.raises(FileNotFoundError):
        (folder / "none").read()
    folder.check_writable(exclusively=True)
    assert len(folder.find("")) == 2


def test_a_relative_path_means_the_same_to_every_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Location("a/b").url == f"{tmp_path}/a/b"


def test_unknown_schemes_are_wrong_use():
    with pytest.raises(WrongUse, match="nosuch://a"):
        _ = Location("nosuch://a").fs


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus", "cpus"),
    [
        ([{"CPU": 2}], 2, 0, 1),
        ([{"CPU": 8}], 2, 0, 4),
        ([{"CPU": 16}, {"CPU": 16}], 1, 0, 16),
        # Ten each would leave room for one on each node only.
        ([{"CPU": 16}, {"CPU": 16}], 3, 0, 8),
        ([{"CPU": 16, "GPU": 2}, {"CPU": 8, "GPU": 1}], 3, 1, 8),
        ([{"CPU": 1}], 4, 0, 1),
    ],
)
def test_workers_get_as_many_cpus_as_find_room_on_the_nodes(nodes, workers, gpus, cpus):
    assert _fit(nodes, workers, gpus).cpus == cpus


@dataclass
class Answering:
    """A store that gives these HTTP answers to conditional PUTs, one after the other."""

    answers: list[int]
    puts: int = 0

    def pipe_file(self, path: str, data: bytes, mode: str) -> None:
        assert (path, data, mode) == ("plant/file", b"content", "create")
        self.puts += 1
        status = self.answers.pop(0)
        if status != 200:
            cause = Exception()
            cause.response = {"ResponseMetadata": {"HTTPStatusCode": status}}
            raise OSError(f"status {status}") from cause


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited, without waiting."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


def create_at(store: Answering, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "filesystem", lambda url, options=None: (store, "plant/file"))
    Location("s3://plant/file").create(b"content")


def test_a_conflict_of_two_creations_is_tried_again_with_growing_pauses(monkeypatch, pauses):
    store = Answering([409, 409, 409, 409, 409, 200])
    create_at(store, monkeypatch)
    assert store.puts == 6
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6]


def test_after_a_conflict_the_winner_is_found(monkeypatch, pauses):
    store = Answering([409, 412])
    with pytest.raises(FileExistsError, match="s3://plant/file exists"):
        create_at(store, monkeypatch)
    assert store.puts == 2


@pytest.mark.parametrize(("answers", "puts"), [([409] * 9, 6), ([403, 200], 1), ([500, 200], 1)])
def test_a_creation_that_fails_for_good_says_so(monkeypatch, pauses, answers, puts):
    store = Answering(answers)
    with pytest.raises(StorageFailed, match="s3://plant/file cannot be written"):
        create_at(store, monkeypatch)
    assert store.puts == puts


@pytest.mark.parametrize(
    ("nodes", "workers", "worker_bytes", "resources"),
    [
        # One a CPU, but no more than memory holds, node by node.
        ([{"CPU": 8.0, "memory": 100.0}], None, 10, WorkerResources(8, 1, 0)),
        ([{"CPU": 8.0, "memory": 39.0}], None, 10, WorkerResources(3, 2, 0)),
        ([{"CPU": 4.0, "memory": 20.0}, {"CPU": 4.0, "memory": 90.0}], None, 10, WorkerResources(6, 1, 0)),
        ([{"CPU": 4.0, "memory": 5.0}], None, 10, WorkerResources(1, 4, 0)),
        ([{"CPU": 4.0, "memory": 5.0}], None, 0, WorkerResources(4, 1, 0)),
        ([{"CPU": 4.0}], None, 10, WorkerResources(1, 4, 0)),
        # As many as were asked for.
        ([{"CPU": 8.0, "memory": 39.0}], 8, 10, WorkerResources(8, 1, 0)),
        # One a GPU; nodes without one take no part, unless more workers are wanted than there are GPUs.
        ([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 64.0}], None, 10, WorkerResources(2, 4, 1)),
        ([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 64.0}], 1, 10, WorkerResources(1, 8, 1)),
        ([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 64.0}], 3, 10, WorkerResources(3, 21, 0)),
    ],
)
def test_there_are_as_many_workers_as_gpus_or_as_cpus_and_memory(
    monkeypatch, nodes, workers, worker_bytes, resources
):
    dead = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 9.0, "memory": 999.0}}
    alive = [{"Alive": True, "Resources": node} for node in nodes]
    monkeypatch.setattr("ray.nodes", lambda: [dead, *alive])
    assert share_out(workers, worker_bytes) == resources
