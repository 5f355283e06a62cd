"""Compaction and pruning: the same rows in fewer files, and nothing gone that a later run needs.

`test_planning.py` prunes and compacts between random nights.
"""

import shutil
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from conftest import run_score
from scored_output import FIRST_NIGHT, NEW_MODEL, OLD_MODEL, day_of, write_output, write_record

from csflow.compaction import CompactConfig, compact
from csflow.errors import ExitStatus, Failed, WrongUse
from csflow.output.layout import Output
from csflow.output.schemas import SCORES
from csflow.pruning import PruneConfig, prune
from csflow.storage import Location, to_parquet
from csflow.tables.job import RegisterConfig, register

NIGHTS = range(13, 19)


@pytest.fixture(scope="module")
def three_weeks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_output(tmp_path_factory.mktemp("scored") / "out", NIGHTS)


@pytest.fixture
def output(three_weeks: Path, tmp_path: Path) -> Path:
    return shutil.copytree(three_weeks, tmp_path / "out")


def run(scores: Path, target: Path, **settings: object) -> ExitStatus:
    return compact(CompactConfig(scores=str(scores), output=str(target), **settings))


PARTITIONS = ds.partitioning(pa.schema([("model_id", pa.string()), ("date", pa.string())]), flavor="hive")


def table(folder: Path) -> pa.Table:
    found = ds.dataset(folder, partitioning=PARTITIONS).to_table()
    keys = ["model_id", "image_uri", "scored_at" if "scored_at" in found.schema.names else "failed_at"]
    return found.sort_by([(key, "ascending") for key in keys])


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}


def test_the_compacted_folder_has_the_same_rows_under_the_same_days_and_models(output, tmp_path, capsys):
    target = tmp_path / "large"
    assert run(output, target) == ExitStatus.DONE
    for kind in ("scores", "errors"):
        assert table(target / kind).equals(table(output / kind))
    assert "11 days in" in capsys.readouterr().out
    before = files(target)
    assert run(output, target) == ExitStatus.DONE
    assert files(target) == before
    assert "merged into 0;" in capsys.readouterr().out


def test_only_days_and_models_that_are_asked_for_are_compacted(output, tmp_path):
    run(output, tmp_path / "large", before=day_of(15), model_id=OLD_MODEL)
    found = table(tmp_path / "large" / "scores")
    assert set(found["model_id"].to_pylist()) == {OLD_MODEL}
    assert set(found["date"].to_pylist()) == {str(day_of(13)), str(day_of(14))}


def test_files_are_merged_up_to_a_size_and_sorted_by_uri(tmp_path):
    folder = tmp_path / "out" / "scores" / "model_id=0a" / "date=2026-11-02"
    folder.mkdir(parents=True)
    row = table(write_output(tmp_path / "some", range(1)) / "scores").select(SCORES.names).slice(0, 1)
    noise = pa.FloatArray.from_buffers(pa.float32(), 75_000, [None, pa.py_buffer(b"random bits " * 25_000)])
    for number in range(9):
        maps = pa.array([noise.to_pylist()], SCORES.field("anomaly_map").type)
        named = row.set_column(0, SCORES.field("image_uri"), pa.array([f"{9 - number}.png"]))
        named = named.set_column(SCORES.names.index("anomaly_map"), SCORES.field("anomaly_map"), maps)
        # Without compression, so that a file is 300 kB.
        pa.parquet.write_table(
            named.cast(SCORES), folder / f"part-{number}.parquet", compression="none", use_dictionary=False
        )
    run(tmp_path / "out", tmp_path / "large", file_size=1)
    merged = sorted((tmp_path / "large").rglob("*.parquet"))
    uris = [pa.parquet.read_table(file, columns=["image_uri"])["image_uri"].to_pylist() for file in merged]
    assert uris == [["6.png", "7.png", "8.png", "9.png"], ["2.png", "3.png", "4.png", "5.png"], ["1.png"]]


def test_a_file_that_changed_since_replaces_the_one_it_was_merged_into(output, tmp_path):
    target = tmp_path / "large"
    run(output, target)
    (changed,) = (output / "scores" / f"model_id={NEW_MODEL}" / f"date={day_of(14)}").iterdir()
    rows = pa.parquet.read_table(changed)
    changed.write_bytes(to_parquet(rows.slice(1)))
    before = files(target)
    run(output, target)
    assert table(target / "scores").equals(table(output / "scores"))
    assert len(files(target).keys() - before.keys()) == 1
    assert len(files(target)) == len(before)


@pytest.mark.parametrize("day", [14, 12])  # of the latter there is no file at all
def test_a_day_with_unfinished_shards_is_named_and_left_out(output, tmp_path, capsys, day):
    plan = {"number": 1, "run_id": "r", "date": str(day_of(day)), "shards": 2, "folder": "000001-ab"}
    Output(Location(str(output)), OLD_MODEL).plan_entry(1).write(
        pa.py_buffer(str(plan).replace("'", '"').encode())
    )
    assert run(output, tmp_path / "large") == ExitStatus.INCOMPLETE
    assert f"{day_of(day)} of model {OLD_MODEL} is left out: 2 planned shards" in capsys.readouterr().out
    found = table(tmp_path / "large" / "scores")
    days = {(row["model_id"], row["date"]) for row in found.select(["model_id", "date"]).to_pylist()}
    assert (OLD_MODEL, str(day_of(day))) not in days
    assert {(NEW_MODEL, str(day_of(14))), (OLD_MODEL, str(day_of(15)))} <= days


@pytest.mark.parametrize("is_compacted", [True, False])
def test_a_folder_with_other_scores_is_refused(output, tmp_path, is_compacted):
    other = write_output(tmp_path / "other", range(13, 14))
    target = tmp_path / "large" if is_compacted else other
    if is_compacted:
        run(other, target)
    before = files(target)
    with pytest.raises(WrongUse, match="choose another folder"):
        run(output, target)
    assert files(target) == before


def test_nothing_is_compacted_into_the_output_itself_or_of_no_day(output, tmp_path):
    with pytest.raises(WrongUse, match="were not compacted"):
        run(output, output)
    for folder in ("scores", "errors/large", "_plans"):
        with pytest.raises(WrongUse, match="is where scoring jobs write; choose another folder"):
            run(output, output / folder)
    with pytest.raises(WrongUse, match=f"no scores of a day before {FIRST_NIGHT}"):
        run(output, tmp_path / "large", before=FIRST_NIGHT)
    with pytest.raises(WrongUse, match=f"no scores of model 00; it has {OLD_MODEL}, {NEW_MODEL}"):
        run(output, tmp_path / "large", model_id="00")


def test_a_damaged_file_is_named_by_its_folder_and_nothing_stands_for_it(output, tmp_path):
    file = sorted((output / "scores").rglob("*.parquet"))[0]
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(Failed, match=f"a file of {file.parent} cannot be read: .*; restore it"):
        run(output, tmp_path / "large")
    assert not (tmp_path / "large" / file.parent.relative_to(output)).exists()


def test_scoring_refuses_a_compacted_folder(output, model, cells, tmp_path):
    run(output, tmp_path / "large")
    with pytest.raises(WrongUse, match="holds compacted scores; choose the output"):
        run_score("--model", model, "--input", cells, "--output", tmp_path / "large")


def test_old_runs_are_pruned_but_for_the_last(output, capsys):
    ids = ["20261101T020000000000Z-ab", "20261102T020000000000Z-ab", "20261103T020000000000Z-ab", "mine"]
    for run_id in ids:
        write_record(output, run_id)
    settings = {"scores": str(output), "runs_before": date(2026, 11, 3)}
    prune(PruneConfig(**settings, dry_run=True))
    assert "2 runs would be deleted" in capsys.readouterr().out
    assert len(list((output / "_runs").iterdir())) == 4
    before = files(output)
    prune(PruneConfig(**settings))
    assert "2 runs were deleted" in capsys.readouterr().out
    assert sorted(path.name for path in (output / "_runs").iterdir()) == ids[2:]
    assert files(output) == before


def test_a_model_is_dropped_with_all_that_it_scored_and_no_other(output, capsys):
    prune(PruneConfig(scores=str(output), drop_model=OLD_MODEL))
    assert set(table(output / "scores")["model_id"].to_pylist()) == {NEW_MODEL}
    assert not list(output.rglob(f"model_id={OLD_MODEL}"))
    assert f"1 folder of scores of model {OLD_MODEL} with 6 files were deleted" in capsys.readouterr().out
    with pytest.raises(WrongUse, match=f"has no scores of {OLD_MODEL}; it has {NEW_MODEL}"):
        prune(PruneConfig(scores=str(output), drop_model=OLD_MODEL))


def test_a_compacted_folder_is_no_table(output, tmp_path):
    run(output, tmp_path / "large")
    with pytest.raises(WrongUse, match="register their origin"):
        register(RegisterConfig(scores=str(tmp_path / "large"), format="delta"))
