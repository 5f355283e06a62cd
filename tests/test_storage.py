"""Files in local folders and on S3, and the sharing out of a cluster."""

import errno
import io
import os
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_inputs import contents, listing, png

from csflow import storage
from csflow.cluster import WorkerResources, _fit, share_out
from csflow.errors import StorageFailed, WrongUse
from csflow.inputs.listing import list_images
from csflow.literal_paths import arrow_filesystem
from csflow.storage import Location


@pytest.fixture(params=["local", "s3", "localstack", "google", "azure"])
def folder(request: pytest.FixtureRequest, tmp_path) -> Location:
    """A new folder on a disk and in each object store whose conditional writes csflow relies on."""
    if request.param == "local":
        return Location(str(tmp_path / "a"))
    if request.param == "s3":
        return Location(request.getfixturevalue("s3_bucket") + "/a")
    emulator = request.getfixturevalue(request.param)
    return Location(f"{emulator.url}/{tmp_path.name}-{secrets.token_hex(4)}", emulator.direct)


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


def test_a_folder_is_removed_by_its_very_name(folder):
    for name in ("m[1]/a", "m[1]/below/b", "m1/a", "m[1]x"):
        (folder / name).write(b"")
    (folder / "m[1]").remove_folder()
    assert not (folder / "m[1]").exists()
    assert [file.url.removeprefix(f"{folder.url}/") for file in folder.find("")] == ["m1/a", "m[1]x"]


def test_arrow_and_ray_remove_what_they_name(folder):
    for name in ("m[1]/a", "m[1]/below/b", "m[1]/c?", "m1/a", "m[1]/cd"):
        (folder / name).write(b"")
    fs = arrow_filesystem(folder.fs)
    fs.delete_file((folder / "m[1]" / "c?").path)
    fs.delete_dir((folder / "m[1]" / "below").path)
    assert [file.name for file in folder.find("")] == ["a", "a", "cd"]
    fs.delete_dir_contents((folder / "m[1]").path)
    assert [file.url.removeprefix(f"{folder.url}/") for file in folder.find("")] == ["m1/a"]
    fs.delete_dir_contents((folder / "none").path, missing_dir_ok=True)
    with pytest.raises(FileNotFoundError):
        fs.delete_dir_contents((folder / "none").path)


def test_two_colons_in_a_name_are_part_of_it(folder):
    (folder / "a::b" / "c::s3").write(b"content")
    assert (folder / "a::b").path == f"{folder.path}/a::b"
    assert [file.url for file in folder.find("")] == [f"{folder.url}/a::b/c::s3"]
    assert (folder / "a::b" / "c::s3").read() == b"content"


@pytest.mark.parametrize(
    "url",
    [
        "simplecache::s3://plant/a",
        "zip://*.png::s3://plant/a.zip",
        "filecache::zip://x::https://plant/a.zip",
    ],
)
def test_chains_of_file_systems_are_refused(url):
    for act in (Location(url).exists, lambda: next(list_images([url], {}))):
        with pytest.raises(WrongUse, match=f"^{re.escape(url)} chains file systems"):
            act()


def test_a_store_that_ignores_conditions_is_refused_as_output_and_read_as_input(rclone):
    folder = Location(f"{rclone.url}/a", rclone.options)
    with pytest.raises(WrongUse, match=r"is in a store without conditional writes \(If-None-Match\)"):
        folder.check_writable(exclusively=True)
    assert folder.find("") == []
    uris = [(folder / f"{number}.png").url for number in range(3)]
    for number, uri in enumerate(uris):
        Location(uri, rclone.options).write(png(number))
    found = listing(folder.url, options=rclone.options)
    assert contents(found, rclone.options) == {uri: png(number) for number, uri in enumerate(uris)}


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
    """A store that gives these HTTP answers to conditional PUTs, one after the other; 0 has no status."""

    answers: list[int]
    puts: int = 0

    def pipe_file(self, path: str, data: bytes, mode: str) -> None:
        assert (path, data, mode) == ("plant/file", b"content", "create")
        self.puts += 1
        status = self.answers.pop(0)
        if status != 200:
            cause = Exception()
            cause.response = {"ResponseMetadata": {"HTTPStatusCode": status}} if status else {"Error": {}}
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


@pytest.mark.parametrize(("answers", "puts"), [([409] * 9, 6), ([403, 200], 1), ([500, 200], 1), ([0], 1)])
def test_a_creation_that_fails_for_good_says_so(monkeypatch, pauses, answers, puts):
    store = Answering(answers)
    with pytest.raises(StorageFailed, match=r"s3://plant/file cannot be written \(OSError: status "):
        create_at(store, monkeypatch)
    assert store.puts == puts


CPUS, GPUS = {"CPU": 64.0, "memory": 999.0}, {"CPU": 8.0, "GPU": 2.0, "memory": 99.0}


@pytest.mark.parametrize(
    ("nodes", "workers", "worker_bytes", "device", "resources"),
    [
        # One a CPU, but no more than memory holds, node by node; more when nodes join, if memory bounds them.
        ([{"CPU": 8.0, "memory": 100.0}], None, 10, "auto", WorkerResources(8, 1, 0, 10, None)),
        ([{"CPU": 8.0, "memory": 39.0}], None, 10, "auto", WorkerResources(3, 2, 0, 10, None)),
        (
            [{"CPU": 4.0, "memory": 20.0}, {"CPU": 4.0, "memory": 90.0}],
            None,
            10,
            "auto",
            WorkerResources(6, 1, 0, 10, None),
        ),
        ([{"CPU": 4.0, "memory": 5.0}], None, 10, "auto", WorkerResources(1, 4, 0, 0, 1)),
        ([{"CPU": 4.0, "memory": 5.0}], None, 0, "auto", WorkerResources(4, 1, 0, 0, 4)),
        ([{"CPU": 4.0}], None, 10, "auto", WorkerResources(1, 4, 0, 0, 1)),
        # As many as were asked for.
        ([{"CPU": 8.0, "memory": 39.0}], 8, 10, "auto", WorkerResources(8, 1, 0, 0, 8)),
        # One a GPU, and no more than were asked for when nodes join; nodes without one take no part.
        ([GPUS, CPUS], None, 10, "auto", WorkerResources(2, 4, 1, 0, None)),
        ([GPUS, CPUS], 1, 10, "auto", WorkerResources(1, 8, 1, 0, 1)),
        # More workers than GPUs never become workers without one: they start as GPUs come.
        ([GPUS, CPUS], 3, 10, "auto", WorkerResources(3, 4, 1, 0, 3)),
        ([GPUS] * 2, 8, 10, "auto", WorkerResources(8, 4, 1, 0, 8)),
        ([CPUS], 4, 10, "gpu", WorkerResources(4, 1, 1, 0, 4)),
        ([], None, 10, "gpu", WorkerResources(1, 1, 1, 0, None)),
        ([GPUS, CPUS], 9, 10, "cpu", WorkerResources(9, 8, 0, 0, 9)),
    ],
)
def test_there_are_as_many_workers_as_gpus_or_as_cpus_and_memory(
    monkeypatch, nodes, workers, worker_bytes, device, resources
):
    dead = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 9.0, "memory": 999.0}}
    alive = [{"Alive": True, "Resources": node} for node in nodes]
    monkeypatch.setattr("ray.nodes", lambda: [dead, *alive])
    assert share_out(workers, worker_bytes, device) == resources


@pytest.mark.parametrize(
    ("nodes", "decode", "resources"),
    [
        ([{"CPU": 16.0, "GPU": 1.0}, CPUS], "auto", WorkerResources(1, 4, 1, 0, 1, "auto")),
        ([{"CPU": 16.0, "GPU": 1.0}, CPUS], "beside", WorkerResources(1, 16, 1, 0, 1, "beside")),
        ([{"CPU": 2.0, "GPU": 1.0}], "cluster", WorkerResources(1, 2, 1, 0, 1, "cluster")),
        # CPUs that score anyway have no time to help, unless they are told to.
        ([CPUS], "auto", WorkerResources(1, int(CPUS["CPU"]), 0, 0, 1, "beside")),
        ([CPUS], "cluster", WorkerResources(1, 1, 0, 0, 1, "cluster")),
    ],
)
def test_workers_leave_cpus_to_helpers(monkeypatch, nodes, decode, resources):
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
    assert share_out(1, 10, "auto", decode) == resources


def test_options_and_fresh_listings_go_to_stores_and_not_to_disks(tmp_path):
    fs, path = storage.filesystem("s3://plant/a/b.png", {"key": "k", "secret": "s"})
    assert path == "plant/a/b.png"
    assert fs.storage_options == {"key": "k", "secret": "s", "use_listings_cache": False}
    for url in (f"{tmp_path}/a", f"file://{tmp_path}/a"):
        fs, path = storage.filesystem(url, {"key": "k"})
        assert (path, fs.storage_options) == (f"{tmp_path}/a", {})
    assert Location("s3://plant", {"key": "k"}).fs.key == "k"
    assert Location("s3://plant", {"key": "k"}) / "a" == Location("s3://plant/a", {"key": "k"})
    assert Location("s3://plant/a/", {"key": "k"}).parent == Location("s3://plant", {"key": "k"})


def test_all_that_is_done_with_a_location_is_done_with_its_options(tmp_path):
    (tmp_path / "a").mkdir()
    folder = Location("dir://a", {"path": str(tmp_path), "target_protocol": "file"})
    (folder / "file").write(b"content")
    assert (tmp_path / "a" / "file").read_bytes() == (folder / "file").read() == b"content"
    assert (folder / "file").exists()
    assert folder.find("") == [folder / "file"]


@pytest.mark.parametrize("scheme", ["nowhere", "sftp"])
@pytest.mark.parametrize("act", [Location.exists, Location.read, lambda location: location.find("")])
def test_a_scheme_that_is_unknown_or_has_no_driver_here_is_wrong_use(act, scheme):
    with pytest.raises(WrongUse, match=rf"^{scheme}://plant/a: "):
        act(Location(f"{scheme}://plant/a"))


def test_names_and_folders_are_those_of_the_path():
    location = Location("s3://plant/a/b/")
    assert (location / "c.png").url == "s3://plant/a/b/c.png"
    assert (location.name, location.parent.url) == ("b", "s3://plant/a")
    assert (Location("/a").parent.url, Location("/a").name) == ("/", "a")
    assert str(location) == "s3://plant/a/b/"
    assert (location.path, location.is_local) == ("plant/a/b", False)
    assert Location("/a").is_local
    assert "hunter2" not in repr(Location("s3://plant", {"secret": "hunter2"}))


def test_what_is_there_exists(folder):
    (folder / "file").write(b"content")
    assert (folder / "file").exists() is True
    assert (folder / "file").parent.exists() is True
    assert (folder / "other").exists() is False


class Broken:
    """A store whose client raises what no other does."""

    def __getattr__(self, name: str) -> object:
        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("no answer")

        return fail


@pytest.mark.parametrize(
    ("act", "done"),
    [
        (Location.exists, "looked up"),
        (Location.read, "read"),
        (lambda location: location.write(b""), "written"),
        (lambda location: location.find(""), "listed"),
    ],
)
def test_a_failure_of_a_store_has_the_name_of_the_file_and_the_remedy(monkeypatch, act, done):
    monkeypatch.setattr(storage, "filesystem", lambda url, options=None: (Broken(), "plant/file"))
    said = rf"^s3://plant/file cannot be {done} \(RuntimeError: no answer\); the same command continues$"
    with pytest.raises(StorageFailed, match=said):
        act(Location("s3://plant/file"))


@pytest.mark.parametrize("failing", ["pathlib.Path.open", "os.fsync"])
@pytest.mark.parametrize("how", [Location.write, Location.create])
def test_a_file_is_whole_or_not_there_and_nothing_else_stays(tmp_path, monkeypatch, how, failing):
    location = Location(str(tmp_path / "a" / "file"))
    how(location, b"first")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]
    with monkeypatch.context() as patch, pytest.raises(StorageFailed, match=r"written \(OSError: .*No space"):
        patch.setattr(failing, full_disk)
        how(location, b"second")
    assert location.read() == b"first"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


@pytest.mark.parametrize("how", [Location.write, Location.create])
def test_all_bytes_are_on_the_disk_before_a_file_has_its_name(tmp_path, monkeypatch, how):
    # Otherwise a power failure could leave an empty file that counts as finished.
    synced = []
    found = Location(str(tmp_path)).find
    monkeypatch.setattr("os.fsync", lambda fd: synced.append((os.fstat(fd).st_size, found(""))))
    how(Location(str(tmp_path / "file")), b"content")
    assert synced == [(len(b"content"), [])]


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_second_creation_leaves_the_first_file_alone(folder):
    (folder / "file").create(b"first")
    with pytest.raises(FileExistsError):
        (folder / "file").create(b"second")
    assert (folder / "file").read() == b"first"
    assert [file.name for file in folder.find("")] == ["file"]


def test_a_file_where_a_folder_is_needed_is_named(tmp_path):
    (tmp_path / "a").write_text("a file")
    with pytest.raises(NotADirectoryError, match=f"{tmp_path}/a is a file, a folder is needed"):
        (Location(str(tmp_path)) / "a" / "b").create(b"")


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    def walk(folder: str, onerror: Callable[[OSError], None]) -> list[object]:
        onerror(FileNotFoundError(folder))  # removed meanwhile
        onerror(PermissionError("not yours"))
        return []

    monkeypatch.setattr("os.walk", walk)
    with pytest.raises(StorageFailed, match=r"cannot be listed \(PermissionError: not yours\)"):
        Location(str(tmp_path)).find("")


def test_files_are_found_by_the_end_of_their_name_in_order_and_without_what_is_in_the_making(folder):
    for name in ("b/x.json", "c.json", "b/a.json", "a.parquet", ".c.json", "b/_writable-1.json"):
        (folder / name).write(b"")
    found = folder.find(".json")
    assert [file.url.removeprefix(folder.url + "/") for file in found] == ["b/a.json", "b/x.json", "c.json"]
    assert (
        Location(folder.url + "/", folder.storage_options).find(".parquet")[0].url
        == f"{folder.url}/a.parquet"
    )


def test_a_folder_is_probed_without_a_trace(folder, monkeypatch):
    write, found = Location.write, []

    def write_and_look(location: Location, data: bytes) -> None:
        write(location, data)
        found.extend(folder.find(""))

    monkeypatch.setattr(Location, "write", write_and_look)
    for exclusively in (False, True):
        folder.check_writable(exclusively)
        assert folder.fs.find(folder.path) == found == []


def test_a_folder_that_cannot_be_written_to_is_wrong_use(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", full_disk)
    said = (
        r"/a cannot be written to \(OSError: .*No space left on device\); create it or grant write permission"
    )
    with pytest.raises(WrongUse, match=said):
        (Location(str(tmp_path)) / "a").check_writable()


def test_only_who_asks_for_it_needs_a_store_with_conditional_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(Location, "create", Location.write)
    Location(str(tmp_path)).check_writable()
    with pytest.raises(WrongUse, match=r"is in a store without conditional writes \(If-None-Match\)"):
        Location(str(tmp_path)).check_writable(exclusively=True)
    assert list(tmp_path.iterdir()) == []


def test_tables_are_parquet_in_zstd_and_read_in_the_schema_that_is_asked_for(folder):
    table = pa.table({"a": [1, 2], "b": ["x", "y"]})
    (folder / "t.parquet").write(storage.to_parquet(table))
    assert storage.read_parquet(folder / "t.parquet") == table
    assert storage.read_parquet(folder / "t.parquet", table.select(["b"]).schema) == table.select(["b"])
    metadata = pq.ParquetFile(io.BytesIO((folder / "t.parquet").read())).metadata
    assert metadata.row_group(0).column(0).compression == "ZSTD"
    (folder / "torn.parquet").write(b"torn")
    with pytest.raises(pa.ArrowException):
        storage.read_parquet(folder / "torn.parquet")
