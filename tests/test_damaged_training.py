"""Damaged files of a training: what can be made again is made again, of the rest one line tells."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import safetensors.torch
import torch
from conftest import SMALL_MODEL

from csflow.config import parse
from csflow.errors import DamagedFile, ExitStatus, StorageFailed
from csflow.storage import Location
from csflow.training.cache import FeatureCache, FeatureFile, find_images
from csflow.training.checkpoint import PROGRESS_FILE, STATE_FILE, read_checkpoint
from csflow.training.config import TrainConfig
from csflow.training.job import train
from csflow.training.run import SNAPSHOT_FILE, check_continuable
from csflow.training.sources import open_features

SHAPES = [(2, 4, 4), (3, 2, 2)]
IMAGES = pa.table({"image_uri": ["a", "b", "c", "d"], "image_version": ["1"] * 4})


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    cache = FeatureCache(Location(str(tmp_path / "features")), SHAPES)
    for name, uris in (("first", ["a", "b"]), ("second", ["c", "d"])):
        features_ND = torch.randn(2, sum(cache.sizes))
        cache.write(name, FeatureFile(uris, ["1"] * 2, ["0" * 64] * 2, [(8, 8)] * 2, features_ND, []))
    return cache


def of_cache(cache: FeatureCache, suffix: str) -> list[Path]:
    return sorted(Path(cache.folder.url).glob(f"*{suffix}"))


def missing(cache: FeatureCache) -> list[str]:
    return find_images(IMAGES, cache.index())[1]["image_uri"].to_pylist()


@pytest.mark.parametrize("is_indexed", [False, True])
@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_features_that_are_cut_off_are_removed_and_made_again(
    cache: FeatureCache, is_indexed: bool, length: int, capsys: pytest.CaptureFixture[str]
) -> None:
    if is_indexed:
        assert missing(cache) == []
    file, _ = of_cache(cache, ".features.safetensors")
    file.write_bytes(file.read_bytes()[:length])
    assert missing(cache) == ["a", "b"]
    assert not file.exists()
    assert f"{file} of the feature cache is damaged" in capsys.readouterr().out


def test_a_damaged_index_is_made_again(cache: FeatureCache) -> None:
    assert missing(cache) == []
    (index,) = of_cache(cache, ".index.parquet")
    for damaged in (b"", index.read_bytes()[:-20], b"PAR1" + bytes(8) + b"\x08\0\0\0PAR1"):
        index.write_bytes(damaged)
        assert missing(cache) == []
        assert index.read_bytes() != damaged


def test_features_that_only_loading_finds_damaged_are_named_with_the_remedy(cache: FeatureCache) -> None:
    rows = find_images(IMAGES, cache.index())[0]
    file, _ = of_cache(cache, ".features.safetensors")
    file.write_bytes(b"\xff" * 20 + file.read_bytes()[20:])
    with pytest.raises(DamagedFile, match=f"{file}.*delete it"):
        open_features(cache, rows, 1 << 30, torch.device("cpu"))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (STATE_FILE, b""),
        (STATE_FILE, b"\xff" * 50),
        (PROGRESS_FILE, b'{"history": ['),
        (PROGRESS_FILE, b"{}"),
    ],
)
def test_a_damaged_checkpoint_is_one_line_with_the_remedy(tmp_path: Path, file: str, content: bytes) -> None:
    safetensors.torch.save_file({"flow.x": torch.zeros(2)}, tmp_path / STATE_FILE)
    (tmp_path / PROGRESS_FILE).write_text('{"history": [], "best_epoch": 0}')
    assert read_checkpoint(str(tmp_path))[1] == {"history": [], "best_epoch": 0}
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DamagedFile, match="--resume") as caught:
        read_checkpoint(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    safetensors.torch.save_file({"flow.x": torch.zeros(2)}, tmp_path / STATE_FILE)
    (tmp_path / PROGRESS_FILE).mkdir()
    with pytest.raises(StorageFailed, match="the same command continues"):
        read_checkpoint(str(tmp_path))


def reshaped(**changes: object) -> Callable[[bytes], bytes]:
    """A change of a JSON file that is still one."""
    return lambda content: json.dumps(json.loads(content) | changes).encode()


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (SNAPSHOT_FILE, lambda content: b""),
        (SNAPSHOT_FILE, lambda content: content[:-10]),
        (SNAPSHOT_FILE, lambda content: b"\xff" * 40 + content[40:]),
        (SNAPSHOT_FILE, lambda content: b"7"),
        (SNAPSHOT_FILE, reshaped(checkpoint_results=3)),
        (SNAPSHOT_FILE, reshaped(checkpoint_results=[])),
        (SNAPSHOT_FILE, lambda content: content.replace(b"checkpoint_2", b"checkpoint_1")),
        (SNAPSHOT_FILE, None),
        (STATE_FILE, lambda content: content[:-1]),
        (STATE_FILE, None),
        (PROGRESS_FILE, lambda content: content[:10]),
        (PROGRESS_FILE, lambda content: b"[]"),
        (PROGRESS_FILE, None),
    ],
)
def test_whatever_ends_a_continued_training_is_found_before_it_begins(
    model: Path, tmp_path: Path, file: str, damage: Callable[[bytes], bytes] | None
) -> None:
    original = next(path for path in (model / "_work" / "training").iterdir() if [*path.rglob(STATE_FILE)])
    folder = shutil.copytree(original, tmp_path / original.name)
    check_continuable(Location(str(folder)))
    (path,) = folder.rglob(file)
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedFile) as caught:
        check_continuable(Location(str(folder)))
    assert "\n" not in str(caught.value)


def test_a_training_without_checkpoint_has_nothing_to_continue(tmp_path: Path) -> None:
    check_continuable(Location(str(tmp_path / "nothing")))


def test_a_training_whose_files_are_damaged_begins_anew_and_gives_the_same_model(
    model: Path, good_cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Other tests may have trained in the model's folder since.
    work = shutil.copytree(model / "_work", tmp_path / "work")
    contents = {path: path.read_bytes() for path in (work / "splits").glob("*.gaussians.safetensors")}
    for path in *contents, *(work / "training").rglob(SNAPSHOT_FILE):
        path.write_bytes(path.read_bytes()[:-20])
    arguments = ["--input", good_cells, "--output", tmp_path / "model", "--work_dir", work, "--resume"]
    assert train(parse(TrainConfig, None, [*SMALL_MODEL, *map(str, arguments)])) == ExitStatus.DONE
    shown = capsys.readouterr().out
    assert "gaussians.safetensors or the ranking beside it is damaged; both are made again" in shown
    assert f"{SNAPSHOT_FILE} is damaged" in shown
    assert "begins anew" in shown
    assert [content for path, content in contents.items() if path.read_bytes() == content]
    folders = (tmp_path / "model", model)
    made, whole = (json.loads((folder / "config.json").read_text())["model_id"] for folder in folders)
    assert made == whole
