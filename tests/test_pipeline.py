"""Keeping the model busy: shards overlap in an actor, and its time is accounted for."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import copy_some

from csflow.cluster import WorkerResources
from csflow.errors import ErrorCode
from csflow.images import DecodedImage
from csflow.inputs.listing import list_images
from csflow.inputs.loading import ImageLoader
from csflow.inputs.reading import ImageReader
from csflow.model import Architecture, Detector
from csflow.model_directory import CALIBRATION, load_model, save_model
from csflow.process import peak_memory_bytes
from csflow.scores import SCORES
from csflow.scoring import plan
from csflow.scoring.listing import Listing
from csflow.scoring.output import Output
from csflow.scoring.plan import PlannedShard, make_plan
from csflow.scoring.shard import READ_THREADS, ScoringSettings, ShardScorer
from csflow.stages import ProcessCpu, Stages
from csflow.storage import Location, read_parquet

PATIENCE_S = 120
"""Only a test that fails waits so long."""


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Location:
    location = Location(str(tmp_path_factory.mktemp("small") / "model"))
    architecture = Architecture("tf_efficientnet_lite0", (128, 128), hidden_channels=8, kernel_sizes=(1,))
    row = {"image_uri": "good.png", "image_version": "1", "anomaly_score": 0.5}
    calibration = pa.Table.from_pylist([row], schema=CALIBRATION)
    save_model(location, Detector(architecture), calibration, training={}, data={}, metrics={}, card={})
    return location


@pytest.fixture
def output(small_model: Location, tmp_path: Path) -> Output:
    return Output(Location(str(tmp_path / "output")), load_model(small_model).model_id)


@pytest.fixture
def shards(
    cells: Path, output: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[PlannedShard]:
    """Two shards of photographs, each read ahead as a whole, with one in each that is none."""
    monkeypatch.setattr(plan, "SHARD_STEP", 2 * READ_THREADS)
    images = copy_some(cells / "defective", tmp_path / "images", 30)
    for name in ("0.png", "z.png"):
        (images / name).write_text("no photograph")
    listing = Listing.freeze(Location(str(tmp_path / "listing")), list_images([str(images)], {}), None)
    return make_plan(listing, output, "run", retry_errors=False)


@pytest.fixture
def scorer(small_model: Location, output: Output) -> ShardScorer:
    settings = ScoringSettings(small_model, output, "run", True, 0.01, None)
    return ShardScorer(settings, WorkerResources(workers=1, cpus=1, gpus=0))


def call(scorer: ShardScorer, shard: PlannedShard) -> dict[str, object]:
    """As Ray Data calls the actor."""
    (row,) = scorer({name: np.array([value]) for name, value in shard.to_row().items()}).to_pylist()
    return row


def test_a_shard_is_read_while_the_model_has_another(scorer, shards, monkeypatch):
    read: set[str] = set()
    second_is_read, original = threading.Event(), scorer._loader._reader.read
    second_uris = set(shards[1].images()["image_uri"].to_pylist())

    def note(uri: str, version: str) -> bytes:
        data = original(uri, version)
        read.add(uri)
        if second_uris <= read:
            second_is_read.set()
        return data

    forward = scorer._forward

    def forward_when_both_are_read(pixels_BHWC: torch.Tensor):
        assert second_is_read.wait(PATIENCE_S), "the second shard waits for the first"
        return forward(pixels_BHWC)

    monkeypatch.setattr(scorer._loader._reader, "read", note)
    monkeypatch.setattr(scorer, "_forward", forward_when_both_are_read)
    assert len(shards) == 2
    with ThreadPoolExecutor(2) as calls:
        first, second = calls.map(lambda shard: call(scorer, shard), shards)
    assert first["failure"] is second["failure"] is None


def test_shards_that_overlap_keep_their_images_and_errors_apart(scorer, shards, output):
    with ThreadPoolExecutor(2) as calls:
        rows = list(calls.map(lambda shard: call(scorer, shard), shards))
    for shard, row in zip(shards, rows, strict=True):
        planned = shard.images()["image_uri"].to_pylist()
        scores = read_parquet(output.scores_file(shard.name, shard.date), SCORES)
        scored = scores["image_uri"].to_pylist()
        assert len(scored) == len(set(scored)) == len(planned) - 1
        assert set(scored) < set(planned)
        assert (row["scored"], row["error_codes"]) == (len(scored), [("unsupported_format", 1)])
        assert row["first_scored_at"] == min(scores["scored_at"].to_pylist())
        assert row["anomaly_scores"] == scores["anomaly_score"].to_pylist()


def test_one_shard_scored_by_two_calls_at_once_is_published_once(scorer, shards, output):
    with ThreadPoolExecutor(2) as calls:
        rows = list(calls.map(lambda _: call(scorer, shards[0]), range(2)))
    assert sorted(row["is_published"] for row in rows) == [False, True]
    assert list(output.finished_shards([shards[0].date])) == [shards[0].name]


def test_batches_are_full_whatever_could_not_be_read(scorer, shards, monkeypatch):
    sizes: list[int] = []
    forward = scorer._forward

    def note(pixels_BHWC: torch.Tensor):
        sizes.append(len(pixels_BHWC))
        return forward(pixels_BHWC)

    monkeypatch.setattr(scorer, "_forward", note)
    scored = call(scorer, shards[0])["scored"]
    assert sizes == [8] * (scored // 8) + [scored % 8] * bool(scored % 8)


def test_an_image_that_is_late_gives_the_model_to_others_meanwhile(cells, monkeypatch):
    class Meanwhile:
        entered = 0

        def __enter__(self) -> None:
            self.entered += 1
            late.set()

        def __exit__(self, *error: object) -> None: ...

    reader, late, meanwhile = ImageReader({}), threading.Event(), Meanwhile()
    rows = pa.Table.from_batches(list_images([str(cells / "defective")], {})).slice(0, 6)
    uris, versions = rows["image_uri"].to_pylist(), rows["image_version"].to_pylist()
    original = reader.read

    def read(uri: str, version: str) -> bytes:
        if uri == uris[2]:
            assert late.wait(PATIENCE_S), "nobody was let in while the image was waited for"
        return original(uri, version)

    monkeypatch.setattr(reader, "read", read)
    loader = ImageLoader(reader, (64, 64), threads=2)
    loaded = loader.load(uris, versions, meanwhile)
    assert [image.image_uri for image in loaded] == uris
    assert meanwhile.entered >= 1


def test_loading_begins_before_the_first_image_is_asked_for_and_stays_bounded(cells, monkeypatch):
    reader, begun = ImageReader({}), threading.Semaphore(0)
    rows = pa.Table.from_batches(list_images([str(cells / "defective")], {})).slice(0, 9)
    original, reads = reader.read, []

    def read(uri: str, version: str) -> bytes:
        reads.append(uri)
        begun.release()
        return original(uri, version)

    monkeypatch.setattr(reader, "read", read)
    loader = ImageLoader(reader, (64, 64), threads=2)
    loaded = loader.load(rows["image_uri"].to_pylist(), rows["image_version"].to_pylist())
    for _ in range(4):
        assert begun.acquire(timeout=PATIENCE_S)
    assert len(reads) == 4
    assert all(isinstance(image.content, DecodedImage) for image in loaded)
    assert len(reads) == 9


def test_cpu_seconds_by_stage_add_up_to_the_process(scorer, shards, monkeypatch):
    taken: list[float] = []
    take = scorer._process_cpu.take

    def note() -> tuple[float, float]:
        taken.append(take()[0])
        return taken[-1], 0.0

    monkeypatch.setattr(scorer._process_cpu, "take", note)
    seconds = dict(call(scorer, shards[0])["cpu_seconds"])
    assert {"start", "read", "decode", "score", "write", "other"} == seconds.keys()
    assert sum(seconds.values()) - seconds["start"] == pytest.approx(taken[0])
    assert seconds["start"] > 0
    assert dict(call(scorer, shards[1])["cpu_seconds"])["start"] == 0


def test_cpu_seconds_of_a_process_are_handed_out_once():
    cpu = ProcessCpu()
    sum(i * i for i in range(2_000_000))
    assert cpu.take()[0] > 0.01
    assert cpu.take()[0] < 0.01


def test_a_stage_that_fails_is_measured_too():
    stages = Stages()
    with pytest.raises(ZeroDivisionError), stages.measured("write"):
        1 // 0  # noqa: B018
    assert stages.seconds["write"] > 0


def test_an_unreadable_image_spends_its_time_reading(cells):
    loader = ImageLoader(ImageReader({}), (64, 64), threads=1)
    (image,) = loader.load([str(cells / "missing.png")], ["1-1"])
    assert image.content.code == ErrorCode.NOT_FOUND
    assert image.stages.seconds.keys() == {"read"}


def test_peak_memory_is_that_of_the_process_alone():
    ballast = np.ones(300_000_000, dtype=np.uint8)
    command = "from csflow.process import peak_memory_bytes; print(peak_memory_bytes())"
    child = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert int(child.stdout) < 100_000_000 < len(ballast) < peak_memory_bytes()
