"""Files in local folders and on S3, and the sharing out of a cluster."""

import threading

import pytest

from csflow.cluster import _fit
from csflow.errors import WrongUse
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
