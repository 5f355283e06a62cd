"""Jobs with all their files in each store: training, two scoring jobs at once, one with nothing new."""

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faulty_s3
import pytest
from conftest import ROOT, SMALL_MODEL, read_scores, run_score
from plain_loop import PlainLoop
from small_models import save_small

from csflow.config import parse
from csflow.errors import ExitStatus
from csflow.storage import Location
from csflow.training.config import TrainConfig
from csflow.training.job import train

IMAGES = 40
"""Two shards."""


@dataclass(frozen=True)
class Store:
    """A new folder in a store."""

    url: str
    options: dict[str, Any]
    front: faulty_s3.FaultyFront | None
    """Through which the options lead; None for disks."""

    def __truediv__(self, name: str) -> Location:
        return Location(f"{self.url}/{name}", self.options)


@pytest.fixture(params=["local", "moto", "localstack", "google", "azure"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    folder = secrets.token_hex(4)
    if request.param == "local":
        yield Store(str(tmp_path), {}, None)
    elif request.param == "moto":
        s3 = faulty_s3.FaultyS3()
        yield Store(f"s3://{faulty_s3.BUCKET}/{folder}", s3.options, s3)
        s3.stop()
    else:
        emulator = request.getfixturevalue(request.param)
        yield Store(f"{emulator.url}/{folder}", emulator.options, emulator.front)
        emulator.front.clear()


class OtherDriver:
    """A process that runs scoring jobs one after the other, beside those of this process."""

    def __init__(self) -> None:
        program = (
            "import json, sys\n"
            "from csflow.config import parse\n"
            "from csflow.scoring.config import ScoreConfig\n"
            "from csflow.scoring.job import score\n"
            "for line in sys.stdin:\n"
            "    print('ended', int(score(parse(ScoreConfig, None, json.loads(line)))), flush=True)"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def start(self, *arguments: object) -> None:
        assert self._process.stdin is not None
        print(json.dumps(list(map(str, arguments))), file=self._process.stdin, flush=True)

    def status(self) -> ExitStatus:
        """How the job that was started last has ended."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ended "):
                return ExitStatus(int(line.split()[1]))
        raise AssertionError("the other driver is gone")

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="module")
def other_driver(ray_cluster: dict[str, str]) -> Iterator[OtherDriver]:
    driver = OtherDriver()
    yield driver
    driver.stop()


class BadNight:
    """The weather in which some reads of images fail, and every second write of scores is not answered."""

    def __init__(self) -> None:
        self._storm = faulty_s3.storm(share=0.3, seed=0, without=frozenset({"hang"}))
        self.writes = 0

    def __call__(self, method: str, path: str) -> str | None:
        if method == "GET" and ".png" in path:
            return self._storm(method, path)
        # Google has the name in the body: there, it is any file that must not exist.
        if (method == "PUT" and "/scores/" in path) or "ifGenerationMatch=0" in path:
            self.writes += 1
            return "lost answer" if self.writes % 2 else None
        return None


def test_two_runs_at_once_score_each_image_once_though_the_store_fails(
    store: Store, cells: Path, other_driver: OtherDriver
) -> None:
    night = {}
    for photograph in sorted((cells / "functional" / "test").iterdir())[:IMAGES]:
        image = store / "night" / photograph.name
        image.write(photograph.read_bytes())
        night[image.url] = photograph.read_bytes()
    model, output = save_small(store / "model"), store / "output"
    arguments = ["--model", model, "--input", f"{store.url}/night", "--output", output, "--workers", "1"]
    arguments += ["--storage_options", json.dumps(store.options)]
    weather = BadNight()
    if store.front:
        store.front.weather = weather
    other_driver.start(*arguments)
    assert run_score(*arguments) == ExitStatus.DONE
    assert other_driver.status() == ExitStatus.DONE
    if store.front:
        store.front.clear()
        assert weather.writes >= 4
    PlainLoop(model).assert_same(read_scores(output, **store.options), night)
    files = (output / "scores").find_details(".parquet")
    assert not (output / "errors").find("")

    assert run_score(*arguments) == ExitStatus.DONE
    assert (output / "scores").find_details(".parquet") == files
    record = json.loads((output / "_runs").find("run.json")[-1].read())
    assert record["counts"]["scored_in_this_run"] == 0
    assert record["counts"]["scored"] == IMAGES


@pytest.mark.soak
@pytest.mark.parametrize("store", ["google", "azure"], indirect=True)
def test_a_model_is_trained_where_its_images_are_though_the_store_fails(
    store: Store, good_cells: Path, cells: Path, ray_cluster: object
) -> None:
    for photograph in sorted(good_cells.iterdir())[:24]:
        (store / "good" / photograph.name).write(photograph.read_bytes())
    photograph = next((cells / "defective").iterdir())
    image = store / "night" / photograph.name
    image.write(photograph.read_bytes())
    model, options = store / "model", ["--storage_options", json.dumps(store.options)]
    assert store.front
    store.front.weather = BadNight()
    arguments = ["--input", f"{store.url}/good", "--output", model, *SMALL_MODEL, "--epochs", "1", *options]
    assert train(parse(TrainConfig, None, list(map(str, arguments)))) == ExitStatus.DONE
    store.front.clear()
    output = store / "output"
    arguments = ["--model", model, "--input", f"{store.url}/night", "--output", output, *options]
    assert run_score(*arguments) == ExitStatus.DONE
    scores = read_scores(output, **store.options)
    PlainLoop(model).assert_same(scores, {image.url: photograph.read_bytes()})
