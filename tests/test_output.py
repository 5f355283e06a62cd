"""One model's part of the output: where its files are, and which of them count."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from csflow.output.layout import Output
from csflow.output.reading import permanent_errors, scored_images
from csflow.output.schemas import ERRORS, SCORES
from csflow.storage import Location, to_parquet

MODEL, OTHER = "0123456789abcdef", "fedcba9876543210"


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return Output(Location(str(tmp_path)), MODEL)


def failed(uri: str, code: str = "corrupt", is_transient: bool = False, message: str = "") -> dict[str, Any]:
    row = {"image_uri": uri, "image_version": "1", "error_code": code, "error_message": message}
    return row | {"is_transient": is_transient, "run_id": "run", "failed_at": 0}


def errors(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), ERRORS)


def scores(*uris: str) -> bytes:
    row: dict[str, Any] = dict.fromkeys(SCORES.names, 0) | {"image_version": "1", "run_id": "run"}
    row |= {"scale_scores": [], "anomaly_map": None, "map_box": None, "is_anomalous": False}
    return to_parquet(pa.Table.from_pylist([row | {"image_uri": uri} for uri in uris], SCORES))


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
    assert output.listing_folder("20261102T0-a").path == str(tmp_path / "_runs" / "20261102T0-a" / "listing")


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
    assert output.finished_shards(["2026-11-02"]) == {}
    output.scores_file("1-a", "2026-11-02").create(scores("a.png"))
    output.scores_file("2-b", "2026-11-03").create(scores("b.png"))
    output.scores_file("3-c", "2026-11-04").create(scores("c.png"))
    other_model.scores_file("4-d", "2026-11-02").create(scores("d.png"))
    (output.scores_file("5-e", "2026-11-02").parent / "notes.txt").write(b"no scores")
    assert output.finished_shards([]) == {}
    finished = output.finished_shards(["2026-11-02", "2026-11-03", "2026-11-05"])
    assert finished == {
        "1-a": output.scores_file("1-a", "2026-11-02"),
        "2-b": output.scores_file("2-b", "2026-11-03"),
    }
    found = pa.Table.from_batches(scored_images(list(finished.values())))
    assert sorted(found["image_uri"].to_pylist()) == ["a.png", "b.png"]
    assert found.schema.names == ["image_uri", "image_version"]
    assert list(scored_images([])) == []


def test_errors_that_stay_are_those_of_these_days_that_are_not_transient(output: Output) -> None:
    assert list(permanent_errors(output.files("errors", ["2026-11-02"]))) == []
    nights = {
        "2026-11-02": errors(failed("a.png"), failed("b.png", "timeout", is_transient=True)),
        "2026-11-03": errors(failed("c.png", "timeout", is_transient=True), failed("d.png", "empty")),
        "2026-11-04": errors(failed("e.png")),
    }
    for night, table in nights.items():
        output.errors_file("1", night, table).write(to_parquet(table))
        Output(output.location, OTHER).errors_file("2", night, table).write(to_parquet(table))
    batches = list(permanent_errors(output.files("errors", ["2026-11-02", "2026-11-03", "2026-11-05"])))
    assert sorted(uri for batch in batches for uri in batch["image_uri"].to_pylist()) == ["a.png", "d.png"]
