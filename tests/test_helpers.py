"""Helpers: images that other processes read and decode while a loader's own threads are too slow."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from csflow.errors import ErrorCode
from csflow.inputs import helpers, loading
from csflow.inputs.helpers import Helpers, Images, Load, Pending
from csflow.inputs.listing import list_images
from csflow.inputs.loaded import LoadedImage
from csflow.inputs.loading import HelpingLoader, ImageLoader, LoaderSettings
from csflow.inputs.reading import ImageReader
from csflow.preprocessing import Preprocessing
from csflow.process import IdleClock

SETTINGS = LoaderSettings({}, Preprocessing((64, 64)), with_sha256=True)
HELPER = HelpingLoader(SETTINGS)
PIXEL_BYTES = 3 * 64 * 64
PATIENCE_S = 120
"""Only a test that fails waits so long."""


@pytest.fixture
def images(cells: Path) -> Images:
    """48 images, and one that is not there."""
    rows = pa.Table.from_batches(list_images([str(cells / "defective")], {})).slice(0, 48)
    uris, versions = rows["image_uri"].to_pylist(), rows["image_version"].to_pylist()
    return [*zip(uris, versions, strict=True), (str(cells / "missing.png"), "1-1")]


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Holds up whoever waits for it, until the test is over at the latest."""
    event = threading.Event()
    yield event
    event.set()


class SlowReader(ImageReader):
    """Reads images when a gate opens, and those that others have not read by then."""

    def __init__(self, gate: threading.Event) -> None:
        super().__init__({})
        self.gate = gate
        self.read_uris: list[str] = []

    def read(self, image_uri: str, image_version: str) -> bytes:
        assert self.gate.wait(PATIENCE_S)
        self.read_uris.append(image_uri)
        return super().read(image_uri, image_version)


class SleepingReader(ImageReader):
    """Of a slow store."""

    def read(self, image_uri: str, image_version: str) -> bytes:
        time.sleep(0.2)
        return super().read(image_uri, image_version)


def helping(load: Callable[[Images], list[LoadedImage]]) -> Callable[[], AbstractContextManager[Load]]:
    """Helpers that load with this function; it is called without images while there is no CPU yet."""

    @contextmanager
    def helper() -> Iterator[Load]:
        load([])
        yield lambda images: partial(load, images)

    return helper


def loader_with(
    load: Callable[[Images], list[LoadedImage]], reader: ImageReader, are_always_wanted: bool = True
) -> ImageLoader:
    some = Helpers(helping(load), PIXEL_BYTES, are_always_wanted)
    return ImageLoader(reader, SETTINGS.preprocessing, 2, with_sha256=True, helpers=some)


def load(loader: ImageLoader, images: Images) -> list[LoadedImage]:
    return list(loader.load([uri for uri, _ in images], [version for _, version in images]))


def assert_same(loaded: list[LoadedImage], images: Images) -> None:
    """Each image once, in order, with the pixels and the digest that a loader without helpers gives."""
    for image, alone in zip(loaded, load(SETTINGS.loader(2), images), strict=True):
        assert (image.image_uri, image.image_version) == (alone.image_uri, alone.image_version)
        assert image.sha256 == alone.sha256
        if alone.sha256 is None:
            assert image.content.code == alone.content.code == ErrorCode.NOT_FOUND
        else:
            np.testing.assert_array_equal(image.content.pixels_HWC, alone.content.pixels_HWC)


def test_helpers_load_what_the_own_threads_have_not_begun(images, gate):
    reader, asked = SlowReader(gate), []

    def elsewhere(some: Images) -> list[LoadedImage]:
        asked.extend(some)
        # All but the two images that the own threads hold.
        if len(asked) == len(images) - 2:
            gate.set()
        return HELPER.load(some)

    loaded = load(loader_with(elsewhere, reader), images)
    assert_same(loaded, images)
    assert Counter(image.is_helped for image in loaded) == {True: len(asked), False: len(reader.read_uris)}
    assert len(asked) == len(images) - 2
    assert {name for image in loaded if image.is_helped for name in image.stages.seconds} == {
        "helped_read",
        "helped_decode",
    }


def test_what_a_lost_helper_had_is_loaded_here(images, gate):
    lost = []

    def elsewhere(some: Images) -> list[LoadedImage]:
        if some:
            lost.extend(some)
            gate.set()
            raise RuntimeError("the node is gone")
        return []

    loaded = load(loader_with(elsewhere, SlowReader(gate)), images)
    assert lost
    assert_same(loaded, images)


def test_what_a_helper_keeps_too_long_is_loaded_here_too(images, gate, monkeypatch):
    monkeypatch.setattr(loading, "PATIENCE_S", 0.05)
    monkeypatch.setattr(loading, "REVIEW_S", 0.05)
    never = threading.Event()

    def elsewhere(some: Images) -> list[LoadedImage]:
        if some:
            gate.set()
            never.wait(PATIENCE_S)
        return HELPER.load(some)

    loaded = load(loader_with(elsewhere, SlowReader(gate)), images)
    assert_same(loaded, images)
    # What it brings in the end changes nothing.
    never.set()


def test_no_image_waits_for_a_cpu_that_does_not_come(images, gate):
    def elsewhere(some: Images) -> list[LoadedImage]:
        assert not some
        gate.wait(PATIENCE_S)
        return []

    assert_same(load(loader_with(elsewhere, ImageReader({})), images), images)


def test_helpers_come_if_all_wait_for_more_than_a_twentieth_of_the_time(monkeypatch):
    now, called = [0.0], threading.Event()
    monkeypatch.setattr(helpers, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def elsewhere(some: Images) -> list[LoadedImage]:
        called.set()
        return []

    some, queue = Helpers(helping(elsewhere), PIXEL_BYTES, are_always_wanted=False), SimpleQueue()
    # Too early to tell, then too little.
    for seconds, idle_seconds in ((0.5, 0.5), (10.0, 0.5), (20.0, 0.99)):
        now[0] = seconds
        some.review(idle_seconds, queue, lambda pending: None)
    assert not called.is_set()
    now[0] = 30.0
    some.review(1.5, queue, lambda pending: None)
    assert called.wait(PATIENCE_S)


def test_the_images_of_all_calls_under_way_have_a_largest_size(gate):
    at_work, queue = threading.Event(), SimpleQueue()

    def elsewhere(some: Images) -> list[LoadedImage]:
        if some:
            at_work.set()
            gate.wait(PATIENCE_S)
        return HELPER.load(some)

    some = Helpers(helping(elsewhere), PIXEL_BYTES, are_always_wanted=True, most_bytes=100 * PIXEL_BYTES)
    queue.put(Pending("a.png", "1-1"))
    some.review(0, queue, lambda pending: None)
    assert at_work.wait(PATIENCE_S)
    # One call has what a helper can use, two have half of the hundred each, less what their own threads have.
    assert [some.images_ahead(calls, own=4) for calls in (1, 2, 20, 40)] == [48, 46, 1, 0]


def test_a_slow_store_calls_helpers(images, monkeypatch):
    monkeypatch.setattr(helpers, "REVIEW_S", 0.02)
    helped = []

    def elsewhere(some: Images) -> list[LoadedImage]:
        helped.extend(some)
        return HELPER.load(some)

    slow = loader_with(elsewhere, SleepingReader({}), are_always_wanted=False)
    assert_same(load(slow, images), images)
    assert helped


def test_each_helper_has_two_chunks_under_way_and_gives_its_cpu_back(monkeypatch):
    monkeypatch.setattr(helpers, "REVIEW_S", 0.05)
    monkeypatch.setattr(helpers, "LEASE_S", 0.2)
    lock, waited_for, most, ended = threading.Lock(), [0], [], []

    @contextmanager
    def helper() -> Iterator[Load]:
        def load(some: Images) -> Callable[[], list[LoadedImage]]:
            with lock:
                waited_for[0] += 1
                most.append(waited_for[0])

            def result() -> list[LoadedImage]:
                time.sleep(0.01)
                with lock:
                    waited_for[0] -= 1
                return HELPER.load(some)

            return result

        yield load
        ended.append(True)

    one = Helpers(helper, PIXEL_BYTES, are_always_wanted=True)
    monkeypatch.setattr(helpers, "MOST_HELPERS", 1)
    loader = ImageLoader(SleepingReader({}), SETTINGS.preprocessing, 2, helpers=one)
    many = [(f"/missing/{i}.png", "1-1") for i in range(1500)]
    assert len(load(loader, many)) == len(many)
    assert max(most) == 2
    assert len(ended) >= 2


def test_idle_is_the_time_in_which_all_wait():
    clock = IdleClock()
    assert clock.take() == 0
    with clock.user(), clock.waiting():
        time.sleep(0.02)
        with clock.user():
            before = clock.seconds()
            time.sleep(0.02)
            assert clock.seconds() == before
    assert before >= 0.02
    assert clock.take() == pytest.approx(before, abs=0.01)
    assert clock.take() == 0
