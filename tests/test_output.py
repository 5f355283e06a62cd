"""One model's part of the output: where its files are, which of them count, and what readers find there."""

from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from faulty_s3 import FaultyS3
from scored_output import write_record

from csflow.errors import WrongUse
from csflow.literal_paths import READ_AHEAD
from csflow.output import reading
from csflow.output.layout import Output, listing_folder
from csflow.output.reading import (
    last_records,
    latest_per_image,
    open_errors,
    open_scores,
    permanent_errors,
    scored_images,
)
from csflow.output.runs import ScoredWith
from csflow.output.schemas import ERRORS, SCORES
from csflow.storage import Location, read_all, read_parquet, to_parquet
from csflow.tables.files import final_files, read_footers

MODEL, OTHER = "0123456789abcdef", "fedcba9876543210"


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return Output(Location(str(tmp_path)), MODEL)


def failed(uri: str, code: str = "corrupt", is_transient: bool = False, message: str = "") -> dict[str, Any]:
    row = {"image_uri": uri, "image_version": "1", "error_code": code, "error_message": message}
    return row | {"is_transient": is_transient, "run_id": "run", "failed_at": 0}


def errors(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), ERRORS)


def scores(*rows: dict[str, Any]) -> bytes:
    row: dict[str, Any] = dict.fromkeys(SCORES.names, 0) | {
        "image_version": "1",
        "run_id": "run",
        "model_name": "",
    }
    row |= {"scale_scores": [], "anomaly_map": None, "map_box": None, "is_anomalous": False}
    row |= {"regions": None, "tags": [("line", "4")]}
    return to_parquet(pa.Table.from_pylist([row | some for some in rows], SCORES))


def test_files_lie_in_partitions_of_model_and_day(output: Output, tmp_path: Path) -> None:
    model = f"model_id={MODEL}"
    assert output.scores_file("000001-ab-000002", "2026-11-02").path == str(
        tmp_path / "scores" / model / "date=2026-11-02" / "part-000001-ab-000002.parquet"
    )
    file = output.errors_file("000001-ab-000002", "2026-11-02", errors(failed("a.png")))
    assert file.parent.path == str(tmp_path / "errors" / model / "date=2026-11-02")
    prefix, digest = file.name.removesuffix(".parquet").rsplit("-", 1)
    assert (prefix, len(digest)) == ("part-000001-ab-000002", 8)


def test_plans_and_listings_lie_beside_the_data(output: Output, tmp_path: Path) -> None:
    plans = tmp_path / "_plans" / f"model_id={MODEL}"
    assert output.plan_entry(7).path == str(plans / "000007.json")
    assert output.plan_part("000007-ab", 12).path == str(plans / "000007-ab" / "part-000012.parquet")
    assert listing_folder(output.location, "20261102T0-a").path == str(
        tmp_path / "_runs" / "20261102T0-a" / "listing"
    )


def test_the_same_failures_go_to_the_same_file_and_others_to_another(output: Output) -> None:
    def name(*rows: dict[str, Any]) -> str:
        return output.errors_file("1", "2026-11-02", errors(*rows)).name

    both = name(failed("a.png"), failed("b.png"))
    assert name(failed("a.png", message="later"), failed("b.png")) == both
    # Another csflow that tries the same shard must find the same name.
    assert both == "part-1-cf5148e1.parquet"
    others = {name(failed("a.png")), name(failed("a.png", "empty"), failed("b.png")), name(failed("b.png"))}
    assert len(others | {both}) == 4


def test_a_shard_is_finished_by_its_file_of_the_day_and_model(output: Output) -> None:
    other_model = Output(output.location, OTHER)
    assert output.files("scores", {"2026-11-02"}) == []
    output.scores_file("1-a", "2026-11-02").create(scores({"image_uri": "a.png"}))
    output.scores_file("2-b", "2026-11-03").create(scores({"image_uri": "b.png"}))
    output.scores_file("3-c", "2026-11-04").create(scores({"image_uri": "c.png"}))
    other_model.scores_file("4-d", "2026-11-02").create(scores({"image_uri": "d.png"}))
    (output.scores_file("5-e", "2026-11-02").parent / "notes.txt").write(b"no scores")
    assert output.files("scores", set()) == []
    dates = {"2026-11-02", "2026-11-03", "2026-11-05"}
    finished = output.files("scores", dates)
    assert output.files("scores", dates, in_one_go=True) == finished
    assert {file.shard: file.location for file in finished} == {
        "1-a": output.scores_file("1-a", "2026-11-02"),
        "2-b": output.scores_file("2-b", "2026-11-03"),
    }
    found = pa.Table.from_batches(scored_images(finished))
    assert sorted(found["image_uri"].to_pylist()) == ["a.png", "b.png"]
    assert found.schema.names == ["image_uri", "image_version"]
    assert list(scored_images([])) == []


@pytest.fixture
def store() -> Iterator[FaultyS3]:
    server = FaultyS3()
    yield server
    server.stop()


def test_a_store_is_not_asked_for_the_sizes_of_files_that_it_has_listed(store: FaultyS3) -> None:
    output = Output(Location("s3://inputs/out", store.options), MODEL)
    small = {"image_uri": "a.png"}
    # A map that does not compress, so that the file is larger than what is read at once.
    large = {"image_uri": "b.png", "anomaly_map": np.random.default_rng(0).random(1_000_000).tolist()}
    for number, row in enumerate((small, large)):
        output.scores_file(f"{number}-a", "2026-11-02").write(scores(row))
    (output.location / "empty").write(b"")
    files = output.files("scores")
    assert files[1].size > 2 * READ_AHEAD
    store.requests.clear()
    found = pa.Table.from_batches(scored_images(files))
    assert sorted(found["image_uri"].to_pylist()) == ["a.png", "b.png"]
    assert sorted(request.split()[0] for request in store.requests) == ["GET"] * 3
    everything = output.location.find_details("")
    store.requests.clear()
    assert [len(content) for content in read_all(everything)] == [file.size for file in everything]
    assert [request.split()[0] for request in store.requests] == ["GET"] * 2
    store.requests.clear()
    assert len(open_scores(output.location).scores.to_table(columns=["image_uri"])) == 2
    assert len(read_footers(final_files(output.location)["scores"])) == 2
    assert {request.split()[0] for request in store.requests if "parquet" in request} == {"GET"}


def test_errors_that_stay_are_those_of_these_days_that_are_not_transient(output: Output) -> None:
    assert output.files("errors", {"2026-11-02"}) == []
    nights = {
        "2026-11-02": errors(failed("a.png"), failed("b.png", "timeout", is_transient=True)),
        "2026-11-03": errors(failed("c.png", "timeout", is_transient=True), failed("d.png", "empty")),
        "2026-11-04": errors(failed("e.png")),
    }
    for night, table in nights.items():
        output.errors_file("1", night, table).write(to_parquet(table))
        Output(output.location, OTHER).errors_file("2", night, table).write(to_parquet(table))
    files = output.files("errors", {"2026-11-02", "2026-11-03", "2026-11-05"})
    batches = list(permanent_errors(files))
    assert sorted(uri for batch in batches for uri in batch["image_uri"].to_pylist()) == ["a.png", "d.png"]


def night(number: int) -> datetime:
    return datetime(2026, 11, number, 2, tzinfo=UTC)


def write_scores(output: Output, *rows: dict[str, Any]) -> None:
    output.scores_file("1", "2026-11-02").write(scores(*rows))


def write_errors(output: Output, *rows: dict[str, Any]) -> None:
    table = errors(*rows)
    output.errors_file("1", "2026-11-02", table).write(to_parquet(table))


def test_scores_are_opened_from_the_output_or_the_folder_in_it(output: Output, tmp_path: Path) -> None:
    write_scores(output, {"image_uri": "a.png"})
    for url in (f"{tmp_path}", f"{tmp_path}/", f"{tmp_path}/scores", f"{tmp_path}/scores/"):
        opened = open_scores(Location(url))
        assert (opened.model_id, opened.root.path, opened.errors) == (MODEL, str(tmp_path), None)
        (row,) = opened.scores.to_table(columns=["image_uri", "date"]).to_pylist()
        assert row == {"image_uri": "a.png", "date": date(2026, 11, 2)}
        assert open_errors(opened) == last_records(opened) == []


def test_an_output_in_a_store_is_read_with_the_options_of_its_location(s3_bucket: str) -> None:
    options = {"key": "test", "secret": "test"}
    output = Output(Location(f"{s3_bucket}/out", options), MODEL)
    write_scores(output, {"image_uri": "a.png"})
    (file,) = output.files("scores", {"2026-11-02"})
    (found,) = scored_images([file])
    assert found["image_uri"].to_pylist() == ["a.png"]
    for url in (f"{s3_bucket}/out/", f"{s3_bucket}/out/scores"):
        opened = open_scores(Location(url, options))
        assert opened.root == output.location
        assert opened.scores.to_table()["image_uri"].to_pylist() == ["a.png"]


def test_scores_of_one_model_are_opened_with_its_errors_and_its_runs_alone(
    output: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "RUNS_LOOKED_AT", 4)
    other = Output(output.location, OTHER)
    for each, uri in ((output, "a.png"), (other, "b.png")):
        write_scores(each, {"image_uri": uri})
        write_errors(each, failed(f"failed {uri}"))
    for run_id, model_id in (("1", MODEL), ("2", MODEL), ("4", OTHER), ("5", MODEL)):
        write_record(tmp_path, run_id, model=ScoredWith(location="/models/cells", model_id=model_id))
    listing = listing_folder(output.location, "3")
    listing.fs.makedirs(listing.path)
    opened = open_scores(output.location, MODEL)
    assert opened.scores.to_table()["image_uri"].to_pylist() == ["a.png"]
    assert opened.errors is not None
    assert opened.errors.to_table()["image_uri"].to_pylist() == ["failed a.png"]
    assert [record.run_id for record in last_records(opened)] == ["5", "2"]
    named = rf"{MODEL} \(/models/cells\), {OTHER} \(/models/cells\)"
    with pytest.raises(WrongUse, match=f"{tmp_path} holds scores of several models; choose .*: {named}"):
        open_scores(output.location)
    with pytest.raises(WrongUse, match=f"{tmp_path} has no scores of model m3; choose .*: {named}"):
        open_scores(output.location, "m3")


def test_a_folder_of_a_day_that_there_is_not_is_no_partition(output: Output, tmp_path: Path) -> None:
    write_scores(output, {"image_uri": "a.png"})
    odd = tmp_path / "scores" / f"model_id={MODEL}" / "date=2026-99-99" / "part-1.parquet"
    odd.parent.mkdir()
    odd.write_bytes(b"")
    assert open_scores(output.location).scores.count_rows() == 1


def test_columns_that_older_files_lack_are_null_and_others_are_missed_by_name(output: Output) -> None:
    write_scores(output, {"image_uri": "a.png"})
    file = output.scores_file("1", "2026-11-02")
    whole = read_parquet(file)
    file.write(to_parquet(whole.drop_columns(["global_score", "map_threshold", "regions", "tags"])))
    opened = open_scores(output.location)
    assert opened.scores.schema.names == [*SCORES.names, "date"]
    (row,) = opened.scores.to_table().to_pylist()
    assert (row["global_score"], row["map_threshold"], row["local_score"]) == (None, None, 0)
    assert row["regions"] is row["tags"] is None
    output.scores_file("2", "2026-11-02").write(to_parquet(whole))
    file.write(to_parquet(whole.drop_columns(["run_id", "p_value"])))
    with pytest.raises(WrongUse, match=rf"{file.name} lacks the columns p_value, run_id; was it"):
        open_scores(output.location)
    file.write(b"torn")
    with pytest.raises(WrongUse, match=f"{output.location} holds a file that is no Parquet"):
        open_scores(output.location)


def test_a_map_takes_no_more_room_than_its_numbers() -> None:
    cells = np.random.default_rng(0).normal(size=(32, 1024)).astype(np.float32)
    table = pa.table({"anomaly_map": pa.array(list(cells), SCORES.field("anomaly_map").type)})
    assert len(to_parquet(table)) < cells.nbytes


def test_a_folder_without_scores_or_out_of_reach_is_named(
    output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def walk(folder: str, onerror: Callable[[OSError], None]) -> None:
        onerror(PermissionError("not yours"))

    with pytest.raises(WrongUse, match=rf"{output.location} holds no scores .*scores are in the --output"):
        open_scores(output.location)
    monkeypatch.setattr("os.walk", walk)
    with pytest.raises(
        WrongUse,
        match=rf"{output.location} cannot be listed \(StorageFailed: .*not yours.*; check address and",
    ):
        open_scores(output.location)


def test_the_latest_row_of_each_image_comes_in_order_of_time() -> None:
    rows = [("a", 3), ("b", 9), ("a", 1), ("c", 2), ("b", 5)]
    table = pa.table({"image_uri": [uri for uri, _ in rows], "at": [at for _, at in rows]})
    assert latest_per_image(table, "at").to_pylist() == [
        {"image_uri": "c", "at": 2},
        {"image_uri": "a", "at": 3},
        {"image_uri": "b", "at": 9},
    ]
    assert latest_per_image(table.slice(0, 0), "at").num_rows == 0


def test_open_errors_are_the_latest_of_images_that_no_later_score_settles(output: Output) -> None:
    write_scores(
        output,
        {"image_uri": "later score.png", "image_version": "2", "scored_at": night(3)},
        {"image_uri": "same version.png", "scored_at": night(1)},
        {"image_uri": "new version failed.png", "image_version": "0", "scored_at": night(1)},
        {"image_uri": "new version failed at once.png", "image_version": "0", "scored_at": night(2)},
    )
    write_errors(
        output,
        *(failed(f"{name}.png") | {"failed_at": night(2)} for name in ("later score", "same version")),
        failed("new version failed.png") | {"failed_at": night(2)},
        failed("new version failed at once.png") | {"failed_at": night(2)},
        failed("twice.png", "timeout", is_transient=True) | {"failed_at": night(3), "run_id": "second"},
        failed("twice.png", "empty") | {"failed_at": night(1)},
        failed("once.png", "corrupt", message="last") | {"failed_at": night(4), "run_id": "second"},
    )
    opened = open_scores(output.location)
    first, second = open_errors(opened)
    assert (first.code, first.images, first.is_transient) == ("corrupt", 3, False)
    assert (second.code, second.images, second.is_transient) == ("timeout", 1, True)
    assert (first.latest["image_uri"], first.latest["error_message"]) == ("once.png", "last")
    assert {(group.code, group.images) for group in open_errors(opened, "second")} == {
        ("timeout", 1),
        ("corrupt", 1),
    }
    assert [(group.code, group.images) for group in open_errors(opened, "run")] == [
        ("corrupt", 2),
        ("empty", 1),
    ]
