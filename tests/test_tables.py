"""Registration with Iceberg and Delta Lake: the same rows through the table, nothing rewritten, once only."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
import scored_output
from deltalake import DeltaTable
from pyiceberg.catalog import load_catalog
from scored_output import NEW_MODEL, write_output

from csflow.config import parse
from csflow.errors import ExitStatus, WrongUse
from csflow.output.schemas import SCORES
from csflow.tables import job
from csflow.tables.job import RegisterConfig, register

Read = Callable[[str], pa.Table]


def run(*arguments: object) -> ExitStatus:
    return register(parse(RegisterConfig, None, list(map(str, arguments))))


class Iceberg:
    def __init__(self, folder: Path, output: str) -> None:
        self.database, self.output = f"sqlite:///{folder}/catalog.db", output

    def register(self) -> ExitStatus:
        return run("--scores", self.output, "--format", "iceberg", "--catalog", self.database)

    def table(self, kind: str):
        properties = {"py-io-impl": "pyiceberg.io.fsspec.FsspecFileIO"}
        return load_catalog("csflow", type="sql", uri=self.database, **properties).load_table(
            ("csflow", kind)
        )

    def read(self, kind: str) -> pa.Table:
        return self.table(kind).scan().to_arrow()

    def versions(self) -> int:
        return len(self.table("scores").snapshots())


class Delta:
    def __init__(self, folder: Path, output: str) -> None:
        self.output = output

    def register(self) -> ExitStatus:
        return run("--scores", self.output, "--format", "delta")

    def read(self, kind: str) -> pa.Table:
        options = {"AWS_ALLOW_HTTP": "true"}
        return DeltaTable(f"{self.output}/{kind}", storage_options=options).to_pyarrow_table()

    def versions(self) -> int:
        return DeltaTable(f"{self.output}/scores").version()


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return write_output(tmp_path / "out", range(11, 16))


@pytest.fixture(params=[Iceberg, Delta])
def tables(request: pytest.FixtureRequest, tmp_path: Path, output: Path) -> Iceberg | Delta:
    return request.param(tmp_path, str(output))


def rows(table: pa.Table) -> list[dict[str, object]]:
    """In one order, whatever the table's order and its kind of string."""
    keys = [
        ("model_id", "ascending"),
        ("image_uri", "ascending"),
        ("failed_at" if "failed_at" in table.column_names else "scored_at", "ascending"),
    ]
    return table.sort_by(keys).to_pylist()


def files_read(output: Path, kind: str) -> list[dict[str, object]]:
    partitioning = ds.partitioning(
        pa.schema([("model_id", pa.string()), ("date", pa.date32())]), flavor="hive"
    )
    return rows(ds.dataset(output / kind, partitioning=partitioning).to_table())


def content(output: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in output.glob("*/model_id=*/*/*")}


@pytest.mark.parametrize("kind", ["scores", "errors"])
def test_a_table_reads_back_the_rows_of_the_files_which_stay_as_they_are(kind, tables, output):
    before = content(output)
    assert tables.register() == ExitStatus.DONE
    read = rows(tables.read(kind))
    assert read == files_read(output, kind)
    assert read
    assert content(output) == before


def test_registering_twice_changes_nothing(tables, capsys):
    tables.register()
    assert "scores: 7 files added, 0 were registered before" in capsys.readouterr().out
    versions, before = tables.versions(), rows(tables.read("scores"))
    tables.register()
    assert "scores: 0 files added, 7 were registered before" in capsys.readouterr().out
    assert tables.versions() == versions
    assert rows(tables.read("scores")) == before


def test_a_later_run_is_added(tables, output):
    tables.register()
    write_output(output, range(16, 19))
    tables.register()
    for kind in ("scores", "errors"):
        assert rows(tables.read(kind)) == files_read(output, kind)


def test_a_table_of_an_older_csflow_gets_the_columns_that_are_new(tables, output, monkeypatch):
    older = pa.schema([field for field in SCORES if field.name != "map_box"])
    shutil.rmtree(output)
    with monkeypatch.context() as patch:
        patch.setattr(scored_output, "SCORES", older)
        patch.setattr(job, "SCHEMAS", job.SCHEMAS | {"scores": older})
        write_output(output, range(11, 16))
        tables.register()
    assert "map_box" not in tables.read("scores").column_names
    write_output(output, range(16, 19))
    assert tables.register() == ExitStatus.DONE
    read = tables.read("scores")
    assert "map_box" in read.column_names
    assert read.num_rows == len(files_read(output, "scores"))
    tables.register()
    assert tables.read("scores").num_rows == read.num_rows


def test_registering_at_the_same_time_adds_each_file_once(tables, output):
    tables.register()
    write_output(output, range(16, 21))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: tables.register(), range(4)))
    assert rows(tables.read("scores")) == files_read(output, "scores")


def test_errors_of_an_unfinished_shard_wait_for_the_shard(tables, output):
    """Another attempt at the shard may write them again."""
    finished = files_read(output, "errors")
    [scores] = output.glob("scores/model_id=1*/date=2026-11-15/*.parquet")
    hidden = scores.rename(output / "later")
    tables.register()
    night = {row["image_uri"] for row in finished if "2026-11-15" in str(row["image_uri"])}
    assert night
    registered = {(row["model_id"], row["image_uri"]) for row in rows(tables.read("errors"))}
    assert not {("1234567890123456", uri) for uri in night} & registered
    hidden.rename(scores)
    tables.register()
    assert rows(tables.read("errors")) == finished


def test_partitions_are_pruned_by_the_formats_own_readers(output, tmp_path):
    iceberg = Iceberg(tmp_path, str(output))
    iceberg.register()
    scan = iceberg.table("scores").scan(row_filter=f"model_id = '{NEW_MODEL}' and date >= '2026-11-17'")
    assert len(list(scan.plan_files())) == 1
    Delta(tmp_path, str(output)).register()
    table = DeltaTable(str(output / "scores"))
    assert (
        len(table.file_uris(file_pruning_predicate=f"model_id = '{NEW_MODEL}' and date >= '2026-11-17'")) == 1
    )


def test_a_delta_log_is_no_row_of_the_scores(output, tmp_path):
    """Readers that know nothing of Delta still read the folder."""
    before = files_read(output, "scores")
    Delta(tmp_path, str(output)).register()
    assert files_read(output, "scores") == before
    assert not list(output.glob("scores/_delta_log/*.parquet"))


@pytest.mark.parametrize("kind", [Iceberg, Delta])
def test_an_output_in_an_object_store_is_registered_there(kind, output, s3_bucket, tmp_path):
    fsspec.filesystem("s3").put(f"{output}/", f"{s3_bucket}/out", recursive=True)
    tables = kind(tmp_path, f"{s3_bucket}/out")
    tables.register()
    assert rows(tables.read("scores")) == files_read(output, "scores")


def test_iceberg_asks_for_a_catalogue(output):
    with pytest.raises(WrongUse, match="--catalog is needed for Iceberg"):
        run("--scores", output, "--format", "iceberg")
    with pytest.raises(WrongUse, match="for Iceberg only"):
        run("--scores", output, "--format", "delta", "--catalog", "sqlite:///catalog.db")
