"""Keeping the model busy: shards overlap in an actor, and its time is accounted for."""

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import copy_some
from PIL import Image
from small_models import save_small

from csflow.cluster import WorkerResources
from csflow.errors import ErrorCode
from csflow.images import DecodedImage
from csflow.inputs.listing import list_images
from csflow.inputs.loading import ImageLoader
from csflow.inputs.reading import ImageReader
from csflow.maps import box_of, map_of, resample
from csflow.model import Form, Scores
from csflow.model_directory import load_model, read_model
from csflow.output.layout import Output
from csflow.output.schemas import ERRORS, SCORES
from csflow.preprocessing import Fit, Preprocessing
from csflow.process import ProcessCpu, Stages, peak_memory_bytes
from csflow.scoring import plan_log
from csflow.scoring.config import ScoringSettings
from csflow.scoring.frozen_listing import Listing
from csflow.scoring.outcomes import OutcomeReader
from csflow.scoring.plan import make_plan
from csflow.scoring.plan_log import PlannedShard
from csflow.scoring.rows import peak
from csflow.scoring.scorer import READ_THREADS, ShardScorer
from csflow.storage import Location, read_parquet

PATIENCE_S = 120
"""Only a test that fails waits so long."""


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Location:
    return save_small(tmp_path_factory.mktemp("small") / "model", "stretch")


@pytest.fixture
def output(small_model: Location, tmp_path: Path) -> Output:
    return Output(Location(str(tmp_path / "output")), load_model(small_model).model_id)


@pytest.fixture
def shards(
    cells: Path, output: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[PlannedShard]:
    """Two shards of photographs, each read ahead as a whole, with one in each that is none."""
    monkeypatch.setattr(plan_log, "SHARD_STEP", 2 * READ_THREADS)
    images = copy_some(cells / "defective", tmp_path / "images", 30)
    for name in ("0.png", "z.png"):
        (images / name).write_text("no photograph")
    found = list_images([str(images)], {})
    listing = Listing.freeze(Location(str(tmp_path / "listing")), found, None, lambda uri: {"name": uri[-5:]})
    return make_plan(listing, OutcomeReader(output), "run", retry_errors=False)


@pytest.fixture
def scorer(small_model: Location, output: Output) -> ShardScorer:
    settings = ScoringSettings(small_model, output, "run", True, 0.01, None)
    return ShardScorer(settings, WorkerResources(workers=1, cpus=1, gpus=0))


class BrightnessDetector:
    """Its maps are 8 by 8 means of the pixels, so that what is bright is anomalous."""

    form = Form("cpu", "float32", 8, ())

    def submit(self, pixels_BHWC: torch.Tensor) -> Callable[[], Scores]:
        mean_BHW = torch.nn.functional.adaptive_avg_pool2d(pixels_BHWC.float().mean(3), 8)
        score_B = mean_BHW.mean((1, 2))
        scores = Scores(score_B, score_B, score_B, score_B[:, None], mean_BHW, mean_BHW[:, None][:, :0])
        return lambda: scores


def errors_of(output: Output, shard: PlannedShard) -> list[dict[str, Any]]:
    files = [file.location for file in output.files("errors", {shard.date}) if file.shard == shard.name]
    return [row for file in files for row in read_parquet(file, ERRORS).to_pylist()]


def call(scorer: ShardScorer, shard: PlannedShard) -> dict[str, object]:
    """As Ray Data calls the actor."""
    (row,) = scorer({name: np.array([value]) for name, value in shard.to_row().items()}).to_pylist()
    return row


@pytest.mark.parametrize("fit", ["stretch", "letterbox", "crop"])
@pytest.mark.parametrize(("orientation", "is_isolated"), [(1, True), (6, False)])
def test_a_bright_spot_is_found_at_its_place_with_every_fit(
    tmp_path: Path, fit: Fit, orientation: int, is_isolated: bool
) -> None:
    pixels_HWC = np.zeros((1200, 600, 3), np.uint8)
    pixels_HWC[760:800, 430:470] = 255  # as stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(pixels_HWC)
    (tmp_path / "images").mkdir()
    image.save(tmp_path / "images" / "spot.jpg", exif=exif)
    # 6: the stored first row is the right edge of what is seen.
    spot, size = ((780, 450), (1200, 600)) if orientation == 1 else ((450, 1200 - 780), (600, 1200))

    model = save_small(tmp_path / "model", fit)
    output = Output(Location(str(tmp_path / "output")), read_model(model).model_id)
    settings = ScoringSettings(model, output, "run", True, 0.01, None, is_isolated=is_isolated)
    scorer = ShardScorer(settings, WorkerResources(workers=1, cpus=1, gpus=0))
    scorer._detector = BrightnessDetector()
    images = list_images([str(tmp_path / "images")], {})
    (shard,) = make_plan(
        Listing.freeze(Location(str(tmp_path / "listing")), images, None), OutcomeReader(output), "run", False
    )
    assert call(scorer, shard)["failure"] is None
    (row,) = read_parquet(output.scores_file(shard.name, shard.date), SCORES).to_pylist()

    assert (row["image_height"], row["image_width"]) == size
    assert (row["map_box"] is None) == (fit == "stretch")
    cell = max(size) / 8
    assert abs(row["peak_y"] - spot[0]) <= cell / 2
    assert abs(row["peak_x"] - spot[1]) <= cell / 2
    level_HW = resample(map_of(row), *size, box_of(row, *size))
    mean_HW = level_HW / level_HW.sum()
    rows, columns = np.indices(size) + 0.5
    assert (mean_HW * rows).sum() == pytest.approx(spot[0], abs=cell / 2)
    assert (mean_HW * columns).sum() == pytest.approx(spot[1], abs=cell / 2)


def test_a_peak_in_the_padding_is_the_nearest_pixel_of_the_image() -> None:
    anomaly_map_BHW = np.zeros((2, 4, 4), dtype=np.float32)
    anomaly_map_BHW[0, 0, 1] = anomaly_map_BHW[1, 3, 2] = 1
    box_B4 = np.array([[-50, 0, 150, 200], [-50, 0, 150, 200]])
    y_B, x_B = peak(anomaly_map_BHW, np.array([100, 100]), np.array([200, 200]), box_B4)
    assert (y_B.tolist(), x_B.tolist()) == ([0.5, 99.5], [75, 125])


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

    submit = scorer._detector.submit

    def submit_when_both_are_read(pixels_BHWC: torch.Tensor):
        assert second_is_read.wait(PATIENCE_S), "the second shard waits for the first"
        return submit(pixels_BHWC)

    monkeypatch.setattr(scorer._loader._reader, "read", note)
    monkeypatch.setattr(scorer._detector, "submit", submit_when_both_are_read)
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
        (error,) = errors_of(output, shard)
        for image in [*scores.to_pylist(), error]:
            assert dict(image["tags"]) == {"name": image["image_uri"][-5:]}
        assert row["first_scored_at"] == min(scores["scored_at"].to_pylist())
        assert row["anomaly_scores"] == scores["anomaly_score"].to_pylist()


def test_a_model_without_whitening_has_one_score_with_one_p_value(scorer, shards, output):
    call(scorer, shards[0])
    scores = read_parquet(output.scores_file(shards[0].name, shards[0].date), SCORES)
    assert scores.num_rows
    assert scores["global_score"] == scores["anomaly_score"]
    assert scores["global_p_value"] == scores["p_value"]
    for name in ("local_score", "local_p_value", "map_threshold"):
        assert scores[name].null_count == scores.num_rows


def test_one_shard_scored_by_two_calls_at_once_is_published_once(scorer, shards, output):
    with ThreadPoolExecutor(2) as calls:
        rows = list(calls.map(lambda _: call(scorer, shards[0]), range(2)))
    assert sorted(row["is_published"] for row in rows) == [False, True]
    assert [file.shard for file in output.files("scores", {shards[0].date})] == [shards[0].name]


def test_batches_are_full_whatever_could_not_be_read(scorer, shards, monkeypatch):
    sizes: list[int] = []
    submit = scorer._detector.submit

    def note(pixels_BHWC: torch.Tensor):
        sizes.append(len(pixels_BHWC))
        return submit(pixels_BHWC)

    monkeypatch.setattr(scorer._detector, "submit", note)
    scored = call(scorer, shards[0])["scored"]
    assert sizes == [8] * (scored // 8) + [scored % 8] * bool(scored % 8)


def test_an_image_without_a_score_is_no_normal_image(scorer, shards, output, monkeypatch):
    submit = scorer._detector.submit

    def beyond_the_range(pixels_BHWC: torch.Tensor):
        score_B = submit(pixels_BHWC)().anomaly_score_B.clone()
        score_B[0] = torch.nan  # as activations beyond the range of float16 have it
        return lambda: submit(pixels_BHWC)()._replace(anomaly_score_B=score_B)

    monkeypatch.setattr(scorer._detector, "submit", beyond_the_range)
    monkeypatch.setattr(scorer._detector, "form", Form("a GPU", "float16", 8, ()))
    row = call(scorer, shards[0])
    assert re.search(r"\.png has the score nan in float16; choose --precision float32", row["failure"])
    assert not output.scores_file(shards[0].name, shards[0].date).exists()


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
    loader = ImageLoader(reader, Preprocessing((64, 64)), threads=2)
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
    loader = ImageLoader(reader, Preprocessing((64, 64)), threads=2)
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
    first, second = cpu.take()[0], cpu.take()[0]
    assert first > 0.01
    assert second < first / 2


def test_a_stage_that_fails_is_measured_too():
    stages = Stages()
    with pytest.raises(ZeroDivisionError), stages.measured("write"):
        1 // 0  # noqa: B018
    assert stages.seconds["write"] > 0


def test_an_unreadable_image_spends_its_time_reading(cells):
    loader = ImageLoader(ImageReader({}), Preprocessing((64, 64)), threads=1)
    (image,) = loader.load([str(cells / "missing.png")], ["1-1"])
    assert image.content.code == ErrorCode.NOT_FOUND
    assert image.stages.seconds.keys() == {"read"}


def test_peak_memory_is_that_of_the_process_alone():
    ballast = np.ones(300_000_000, dtype=np.uint8)
    command = "from csflow.process import peak_memory_bytes; print(peak_memory_bytes())"
    child = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert int(child.stdout) < 100_000_000 < len(ballast) < peak_memory_bytes()


def test_a_worker_dies_of_a_fatal_signal_whatever_handler_was_there_before():
    # As in a worker of Ray: Python's handler first, and above it one that never returns.
    program = """
import ctypes, faulthandler, os, signal
from csflow import process
faulthandler.enable()
endless = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: signal.pause())
set_handler = ctypes.CDLL(None).signal
set_handler.argtypes = [ctypes.c_int, type(endless)]
set_handler(signal.SIGABRT, endless)
process.set_up(1, gpus=0)
os.abort()
"""
    child = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert child.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in child.stderr
