"""Pointers to the model in use: what they name, that every change stays known, and the way back."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from csflow.config import parse
from csflow.errors import WrongUse
from csflow.model import Architecture, Detector
from csflow.model_directory import CALIBRATION, save_model
from csflow.promotion import Pointer, PromoteConfig, Promotion, promote, resolve
from csflow.storage import Location

NAMES = ["monday", "tuesday", "wednesday"]


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector(Architecture("resnet10t", (64, 64), scales=1, hidden_channels=4, kernel_sizes=(3,)))


@pytest.fixture(params=["local", "S3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    url = str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_bucket")
    return Location(url) / "models"


@pytest.fixture
def model_ids(folder: Location, detector: Detector) -> dict[str, str]:
    """Three models in the folder, and their ids by name."""
    return {name: save(folder / name, detector, number) for number, name in enumerate(NAMES)}


def save(location: Location, detector: Detector, score: float) -> str:
    row = {"image_uri": "0.png", "image_version": "1", "anomaly_score": score}
    calibration = pa.Table.from_pylist([row], schema=CALIBRATION)
    return save_model(location, detector, calibration, training={}, data={}, metrics={}, card={})


def run_promote(*words: object) -> None:
    promote(parse(PromoteConfig, None, [str(word) for word in words]))


def test_a_pointer_names_the_model_that_was_promoted_last_and_goes_back_step_by_step(
    folder, model_ids, capsys
):
    pointer = folder / "current.json"
    for name in NAMES:
        run_promote(folder / name, pointer, "--by", "ada")
        assert resolve(pointer).url == (folder / name).url
    assert f"model_id {model_ids['wednesday']}" in capsys.readouterr().out
    content = json.loads(pointer.read())
    assert content["model"] == (folder / "wednesday").url
    assert content["model_id"] == model_ids["wednesday"]
    assert content["promoted_by"] == "ada" and content["promoted_at"].startswith("20")
    for name in ("tuesday", "monday"):
        run_promote("--back", pointer)
        assert resolve(pointer).url == (folder / name).url
    with pytest.raises(WrongUse, match="has named no other model before"):
        run_promote("--back", pointer)
    run_promote(folder / "wednesday", pointer)
    run_promote("--back", pointer)
    history = [promotion.model_id for promotion in Pointer(pointer).promotions()]
    went = ["monday", "tuesday", "wednesday", "tuesday", "monday", "wednesday", "monday"]
    assert history == [model_ids[name] for name in went]


def test_what_is_no_pointer_is_the_model_directory_itself(folder):
    assert resolve(folder / "monday") == folder / "monday"


def test_of_two_who_promote_at_once_both_are_in_the_history_and_the_later_is_in_use(
    folder, model_ids, monkeypatch
):
    pointer = folder / "current.json"
    both_have_read = threading.Barrier(2, timeout=60)
    promotions = Pointer.promotions
    waiting = set(NAMES[:2])

    def promotions_of_both(self: Pointer) -> list[Promotion]:
        found = promotions(self)
        if waiting and threading.current_thread().name.startswith("promoter"):
            waiting.pop()
            both_have_read.wait()
        return found

    monkeypatch.setattr(Pointer, "promotions", promotions_of_both)
    with ThreadPoolExecutor(2, thread_name_prefix="promoter") as threads:
        list(threads.map(lambda name: run_promote(folder / name, pointer), NAMES[:2]))
    history = Pointer(pointer).promotions()
    assert [promotion.number for promotion in history] == [1, 2]
    assert {promotion.model_id for promotion in history} == {model_ids[name] for name in NAMES[:2]}
    assert json.loads(pointer.read())["number"] == 2
    assert history[1].before == 1


def test_a_slow_writer_does_not_leave_an_older_model_in_use(folder, model_ids, monkeypatch):
    pointer, write = folder / "current.json", Location.write
    run_promote(folder / "monday", pointer)

    def slow_write(self: Location, data: bytes) -> None:
        if self == pointer and json.loads(data)["number"] == 2:
            monkeypatch.setattr(Location, "write", write)
            run_promote(folder / "wednesday", pointer)
        write(self, data)

    monkeypatch.setattr(Location, "write", slow_write)
    run_promote(folder / "tuesday", pointer)
    assert resolve(pointer).url == (folder / "wednesday").url


def test_a_directory_that_is_no_whole_model_is_not_promoted(folder, model_ids):
    pointer = folder / "current.json"
    (folder / "monday" / "calibration.parquet").write(b"torn")
    with pytest.raises(WrongUse, match="damaged"):
        run_promote(folder / "monday", pointer)
    assert not pointer.exists()
    run_promote(folder / "tuesday", pointer)
    with pytest.raises(WrongUse, match="does not exist"):
        run_promote(folder / "sunday", pointer)
    assert resolve(pointer).url == (folder / "tuesday").url


def test_a_directory_whose_model_was_replaced_behind_the_pointer_is_refused(folder, model_ids, detector):
    pointer = folder / "current.json"
    run_promote(folder / "monday", pointer)
    save(folder / "monday", detector, 17.0)
    with pytest.raises(WrongUse, match=f"names model_id {model_ids['monday']}.* promote it again"):
        resolve(pointer)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["models/cells"], "csflow promote MODEL POINTER"),
        ([], "csflow promote MODEL POINTER"),
        (["models/cells", "models/current"], "use models/current.json"),
        (["models/cells", "--back", "models/current.json"], "takes the pointer alone"),
        (["--back", "models/none.json"], "is no pointer"),
    ],
)
def test_wrong_use_names_the_remedy(words, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WrongUse, match=complaint):
        run_promote(*words)


def test_a_pointer_that_is_absent_or_damaged_is_said_in_one_line(tmp_path):
    pointer = Location(str(tmp_path / "current.json"))
    with pytest.raises(WrongUse, match=r"current\.json does not exist; `csflow promote MODEL "):
        resolve(pointer)
    pointer.write(b'{"model": "s3://plant/models/cells"}')
    with pytest.raises(WrongUse, match=r"is no pointer .*model_id: Field required.* promote a model"):
        resolve(pointer)
