"""The output contract: paths that are made are taken apart again, and run.json says what its readers know."""

import json
from datetime import UTC, date, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from pydantic import ValidationError
from scored_output import write_record

from csflow.errors import WrongUse
from csflow.output.layout import Output, output_files, run_folder, run_ids
from csflow.output.runs import RunRecord, read_record
from csflow.output.schemas import ERRORS, SCORES
from csflow.storage import Location

SHARD = "000001-0badc0de-000000"
FAILURE = {
    "image_uri": "/plant/a.png",
    "image_version": "1",
    "error_code": "corrupt",
    "error_message": "what happened",
    "is_transient": False,
    "run_id": "r1",
    "failed_at": datetime(2026, 11, 2, tzinfo=UTC),
}


def test_a_file_is_told_apart_as_it_was_named(tmp_path: Path) -> None:
    output = Output(Location(str(tmp_path)), "1234567890123456")
    errors = pa.Table.from_pylist([FAILURE], ERRORS)
    output.scores_file(SHARD, "2026-11-02").write(b"")
    output.errors_file(SHARD, "2026-11-02", errors).write(b"")
    for kind in ("scores", "errors"):
        (file,) = output_files(output.location, kind)
        assert (file.model_id, file.date, file.shard) == (output.model_id, date(2026, 11, 2), SHARD)
        assert (output.location / kind / file.path).url == file.location.url
    assert [file.shard for file in output.files("scores", {"2026-11-02"})] == [SHARD]


def test_a_parquet_file_outside_the_partitions_is_not_taken_for_scores(tmp_path: Path) -> None:
    output = Output(Location(str(tmp_path)), "1234567890123456")
    file = output.scores_file(SHARD, "2026-11-02")
    file.write(b"")
    (tmp_path / "scores" / "copy.parquet").write_bytes(b"")
    assert [found.location for found in output_files(output.location, "scores")] == [file]


def test_run_json_has_the_keys_that_its_readers_know(tmp_path: Path) -> None:
    write_record(tmp_path, "20261102T020000000000Z-aaaaaaaa")
    text = (tmp_path / "_runs" / "20261102T020000000000Z-aaaaaaaa" / "run.json").read_text()
    content = json.loads(text)
    assert text == json.dumps(content, indent=2) + "\n"
    assert list(content) == [
        *("format_version", "run_id", "status", "exit_status", "started_at", "ended_at", "model"),
        *("configuration", "counts", "not_listed", "skipped", "precisions", "forms", "drift"),
        *("drift_by_group", "peak_memory_bytes", "images_per_second", "seconds", "seconds_to_first_image"),
        *("seconds_in_workers", "images_helped", "spilled_bytes", "cpu_seconds_in_workers"),
        "libraries",
        *("models", "not_loaded", "unrouted", "models_loaded"),
    ]
    assert content["format_version"] == 1
    assert content["model"].keys() == {"location", "model_id", "model_name"}
    assert content["counts"].keys() == {
        *("listed", "scored", "permanent_errors", "missing", "scored_in_this_run", "anomalous_in_this_run"),
        *("errors_in_this_run", "failed_shards_in_this_run", "unrouted", "not_listed"),
    }
    assert content["drift"].keys() == {
        *("ks_statistic", "ks_p_value", "share_below_5_percent", "sample", "heldout"),
        *("global_ks_statistic", "global_ks_p_value", "share_above_all", "verdict", "heldout_parts"),
    }
    assert content["peak_memory_bytes"].keys() == {"driver", "worker"}
    assert content["ended_at"] == "2026-11-02T02:10:00.123456+00:00"


def test_only_what_may_be_left_out_or_came_later_can_be_null() -> None:
    assert [field.name for field in SCORES if field.nullable] == [
        *("anomaly_map", "map_box", "global_score", "global_p_value", "local_score", "local_p_value"),
        *("map_threshold", "region_threshold", "regions", "image_modified_at", "model_name"),
        *("image_taken_at", "tags", "part_p_value"),
    ]
    assert [field.name for field in ERRORS if field.nullable] == ["image_modified_at", "model_name", "tags"]


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_record(tmp_path, "b", seconds_to_first_image=4.25, precisions=["mixed"], drift=None)
    record = read_record(Location(str(tmp_path)), "b")
    assert isinstance(record, RunRecord)
    assert (record.seconds_to_first_image, record.precisions, record.drift) == (4.25, ["mixed"], None)
    assert record.counts.scored_in_this_run == 3
    assert record.ended_at.microsecond == 123456
    with pytest.raises(ValidationError, match="frozen"):
        record.status = "failed"


def rewrite(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def test_a_record_of_the_first_csflow_is_read_and_a_newer_key_is_passed_over(tmp_path: Path) -> None:
    write_record(tmp_path, "a")
    file = tmp_path / "_runs" / "a" / "run.json"
    missing = ("format_version", "precisions", "seconds_to_first_image", "cpu_seconds_in_workers")
    counts = json.loads(file.read_text())["counts"]
    del counts["failed_shards_in_this_run"]
    rewrite(file, new_key=1, counts=counts, **dict.fromkeys(missing, ...))
    record = read_record(Location(str(tmp_path)), "a")
    assert record is not None
    assert (record.precisions, record.seconds_to_first_image) == ([], None)
    assert record.counts.failed_shards_in_this_run == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format_version": 2}, r"has format version 2, .* newer csflow"),
        ({"counts": {}}, "no record of a run"),
    ],
)
def test_a_record_that_cannot_be_understood_is_refused_by_name(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    write_record(tmp_path, "a")
    rewrite(tmp_path / "_runs" / "a" / "run.json", **changes)
    with pytest.raises(WrongUse, match=rf"_runs/a/run\.json .*{said}"):
        read_record(Location(str(tmp_path)), "a")


def test_runs_are_found_in_any_store(tmp_path: Path, s3_bucket: str) -> None:
    for url in (str(tmp_path), s3_bucket, f"memory://{tmp_path}"):
        for run_id in ("20261103T0-a", "20261102T0-b"):
            (run_folder(Location(url), run_id) / "run.json").write(b"{}")
        assert run_ids(Location(url)) == ["20261102T0-b", "20261103T0-a"]


def test_runs_are_told_in_the_order_of_their_beginning(tmp_path: Path) -> None:
    assert run_ids(Location(str(tmp_path))) == []
    write_record(tmp_path, "20261103T0-a")
    (tmp_path / "_runs" / "20261104T0-c" / "listing").mkdir(parents=True)
    write_record(tmp_path, "20261102T0-b")
    assert run_ids(Location(str(tmp_path))) == ["20261102T0-b", "20261103T0-a", "20261104T0-c"]
    assert read_record(Location(str(tmp_path)), "20261104T0-c") is None
