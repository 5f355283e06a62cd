"""Google Cloud Storage and Azure Blob Storage as inputs and outputs, on emulators of their protocols."""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from emulators import Emulator
from test_inputs import archive_tree, contents, expected_images, failure, listing, png

from csflow.errors import ErrorCode
from csflow.inputs import objects
from csflow.inputs.native import LONGEST_PAUSE_S
from csflow.storage import filesystem


@dataclass(frozen=True)
class Cloud:
    """A new folder in a bucket of an emulator."""

    emulator: Emulator
    url: str

    def put(self, name: str, data: bytes) -> str:
        """Stores an object past the front, and returns its URI."""
        fs, folder = filesystem(self.url, self.emulator.direct)
        fs.pipe_file(f"{folder}/{name}", data)
        return f"{self.url}/{name}"

    def remove(self, name: str) -> None:
        fs, folder = filesystem(self.url, self.emulator.direct)
        fs.rm_file(f"{folder}/{name}")

    def list(self, name: str = "") -> dict[str, str]:
        return listing(f"{self.url}/{name}".rstrip("/"), options=self.emulator.options)

    def read(self, found: dict[str, str]) -> dict[str, bytes]:
        return contents(found, self.emulator.options)

    def failure(self, uri: str, version: str, **settings: object) -> ErrorCode:
        return failure(uri, version, options=self.emulator.options, **settings).code


@pytest.fixture(params=["google", "azure"])
def cloud(request: pytest.FixtureRequest) -> Iterator[Cloud]:
    emulator = request.getfixturevalue(request.param)
    yield Cloud(emulator, f"{emulator.url}/{secrets.token_hex(4)}")
    emulator.front.clear()


def test_a_folder_lists_every_kind_and_reads_it_back(cloud: Cloud) -> None:
    for name, data in archive_tree().items():
        cloud.put(name, data)
    found = cloud.list()
    assert cloud.read(found) == expected_images(cloud.url)


def test_a_folder_is_listed_page_by_page_and_a_busy_store_is_asked_again(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris = [cloud.put(f"n{number}.png", png(number)) for number in range(7)]
    cloud.put("a.txt", b"no image")
    cloud.put("_runs/a.png", png(1))
    monkeypatch.setattr(objects, "PAGE_OBJECTS", 2)
    pages: list[str] = []
    faults = {1: "slow down", 4: "broken"}

    def weather(method: str, path: str) -> str | None:
        if "maxresults=2" not in path.lower():
            return None
        pages.append(path)
        return faults.get(len(pages) - 1)

    cloud.emulator.front.weather = weather
    assert list(cloud.list()) == uris
    assert len(pages) == 5 + len(faults)


def test_an_image_takes_one_request_of_the_native_client(cloud: Cloud) -> None:
    cloud.put("a.png", png(1))
    found = cloud.list()
    cloud.emulator.front.clear()
    assert list(cloud.read(found).values()) == [png(1)]
    assert len(cloud.emulator.front.user_agents) == 1
    assert cloud.emulator.front.user_agents[0].startswith("object_store/")


def test_replaced_objects_are_changed_and_removed_ones_not_found(cloud: Cloud) -> None:
    uri = cloud.put("a.png", png(1))
    first = cloud.list("a.png")
    cloud.put("a.png", png(2))
    assert cloud.failure(uri, first[uri]) == ErrorCode.CHANGED
    second = cloud.list()
    assert second != first
    assert cloud.read(second) == {uri: png(2)}
    cloud.remove("a.png")
    assert cloud.failure(uri, second[uri]) == ErrorCode.NOT_FOUND


def test_names_are_taken_as_they_are(cloud: Cloud) -> None:
    odd = ["a#1.png", "a?b.png", "x//y.png", "lot[3]/z.png", "ü 1.png", "a%20b.png"]
    uris = [cloud.put(name, png(number)) for number, name in enumerate([*odd, "lot3/z.png"])]
    assert cloud.read(cloud.list()) == {uri: png(number) for number, uri in enumerate(uris)}
    assert list(cloud.list("lot[3]")) == [f"{cloud.url}/lot[3]/z.png"]


def test_the_mark_of_an_empty_folder_is_no_image(cloud: Cloud) -> None:
    image = cloud.put("line/a.png", png(1))
    if cloud.emulator.url.startswith("gs://"):  # Azure's client trims such a name
        cloud.put("line/empty/", b"")
    assert list(cloud.list()) == [image]


def test_empty_and_large_objects_are_errors(cloud: Cloud) -> None:
    empty, large = cloud.put("empty.png", b""), cloud.put("large.png", bytes(2000))
    found = cloud.list()
    assert cloud.failure(empty, found[empty]) == ErrorCode.EMPTY
    assert cloud.failure(large, found[large], max_bytes=1999) == ErrorCode.TOO_LARGE


@pytest.mark.parametrize("fault", ["slow down", "too many", "broken", "reset", "cut"])
def test_transient_failures_are_tried_again(cloud: Cloud, fault: str) -> None:
    uri = cloud.put("a.png", png(1))
    found = cloud.list()
    cloud.emulator.front.faults.extend([fault] * 3)
    assert cloud.read(found) == {uri: png(1)}
    assert not cloud.emulator.front.faults


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("slow down", ErrorCode.THROTTLED),
        ("too many", ErrorCode.THROTTLED),
        ("broken", ErrorCode.SERVER_ERROR),
        ("reset", ErrorCode.CONNECTION),
        ("denied", ErrorCode.PERMISSION_DENIED),
    ],
)
def test_failures_past_the_deadline_say_why(cloud: Cloud, fault: str, code: ErrorCode) -> None:
    uri = cloud.put("a.png", png(1))
    found = cloud.list()
    cloud.emulator.front.weather = lambda method, path: fault
    assert cloud.failure(uri, found[uri], deadline_s=LONGEST_PAUSE_S) == code
