"""Damaged files of a training: what can be made again is made again, of the rest one line tells."""

from pathlib import Path

import pyarrow as pa
import pytest
import safetensors.torch
import torch

from csflow.errors import DamagedFile
from csflow.storage import Location
from csflow.training.cache import FeatureCache, FeatureFile, find_images
from csflow.training.checkpoint import PROGRESS_FILE, STATE_FILE, read_checkpoint
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
