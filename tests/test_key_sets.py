"""Sets of images larger than memory: what goes in comes out, from disk as from memory."""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from csflow.scoring import key_sets
from csflow.scoring.key_sets import KEY_PARTS, KEYED, KeySet, Omitted, Partitioned, keys, repeated


@pytest.fixture(autouse=True)
def spilled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files; more than 7 rows go there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(key_sets, "BUFFER_ROWS", 7)
    return tmp_path


def table(*images: tuple[str, str]) -> pa.Table:
    return pa.table({"image_uri": [uri for uri, _ in images], "image_version": [v for _, v in images]})


@pytest.mark.parametrize(("buffer_rows", "rows"), [(7, 1), (7, 3), (500, 90)])
def test_rows_come_back_part_by_part_in_their_order_with_at_most_the_buffer_in_memory(
    spilled: Path, monkeypatch: pytest.MonkeyPatch, buffer_rows: int, rows: int
) -> None:
    monkeypatch.setattr(key_sets, "BUFFER_ROWS", buffer_rows)
    partitioned = Partitioned(np.dtype("<i8"))
    random = np.random.default_rng(0)
    values, parts = np.arange(30 * rows), random.integers(0, 4, 30 * rows)
    for end in range(rows, 31 * rows, rows):
        partitioned.add(values[end - rows : end], parts[end - rows : end])
        assert len(partitioned) == end
        on_disk = sum(file.stat().st_size // 8 for file in spilled.rglob("*") if file.is_file())
        assert 0 <= end - on_disk <= buffer_rows
        for part in range(4):
            expected = values[:end][parts[:end] == part]
            assert partitioned.part(part).tolist() == expected.tolist()
    assert partitioned.part(9).tolist() == []


def test_few_rows_touch_no_disk_and_the_files_of_many_go_with_them(spilled: Path) -> None:
    partitioned = Partitioned(np.dtype("<i8"))
    for n in range(8):
        partitioned.add(np.array([n]), np.array([n]))
        partitioned.add(np.empty(0, np.int64), np.empty(0, np.int64))
        assert [path.name.startswith("csflow-") for path in spilled.iterdir()] == [True] * (n == 7)
    assert [partitioned.part(n).tolist() for n in range(8)] == [[n] for n in range(8)]
    del partitioned
    assert list(spilled.iterdir()) == []


def test_a_key_is_in_one_part_of_every_set_with_its_number() -> None:
    images = keys(table(*((f"{n}.png", "1") for n in range(600))))
    assert len(set(images.tolist())) == 600
    alone, together = KeySet(), KeySet()
    together.add(images, np.arange(600))
    for start in range(0, 600, 50):
        alone.add(images[start : start + 50])
    assert len(alone) == len(together) == 600
    parts = list(zip(alone.parts(), together.parts(), strict=True))
    assert len(parts) == KEY_PARTS
    assert sum(len(one) > 0 for one, _ in parts) > 200  # spread evenly
    # A key whose part nobody visits would be planned every night.
    assert sorted(number for _, other in parts for number in other["number"].tolist()) == list(range(600))
    for one, other in parts:
        assert one.dtype == other.dtype == KEYED
        assert one["key"].tolist() == other["key"].tolist()
        assert (images[other["number"]] == other["key"]).all()
        assert not one["number"].any()


def test_keys_are_those_of_the_columns_that_are_asked_for() -> None:
    images = table(("a", "1"), ("a", "2"), ("b", "1"))
    assert len(set(keys(images).tolist())) == 3
    assert len(set(keys(images, ["image_uri"]).tolist())) == 2
    assert keys(images.to_batches()[0]).tolist() == keys(images).tolist()
    assert keys(images.slice(0, 0)).tolist() == []
    assert keys(images).dtype.itemsize == 16


def test_of_equal_keys_all_but_the_first_are_repeated() -> None:
    keyed = np.array([(b"b", 5), (b"a", 3), (b"b", 2), (b"c", 4), (b"b", 9), (b"a", 1)], KEYED)
    assert repeated(keyed).tolist() == [(b"a", 3), (b"b", 5), (b"b", 9)]
    assert repeated(keyed[:0]).tolist() == []
    assert repeated(keyed[:1]).tolist() == []


@pytest.mark.parametrize("rows", [1, 4, 7, 8, 50])
def test_rows_are_left_out_by_their_position_however_a_stream_is_divided(rows: int) -> None:
    left_out = [0, 3, 6, 7, 8, 13, 14, 20, 21, 22, 23, 49]
    omitted = Omitted(np.array(some) for some in (left_out[::2], left_out[1::2], []))
    assert len(omitted) == len(left_out)
    batches = pa.table({"n": range(50)}).to_batches(max_chunksize=rows)
    kept = [n for batch in omitted.drop_from(batches) for n in batch["n"].to_pylist()]
    assert kept == [n for n in range(50) if n not in left_out]
