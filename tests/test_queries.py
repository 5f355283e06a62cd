"""docs/queries.md, as it is written: every question in every engine that installs from a package."""

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlglot
from pages import DOCS, Block, blocks, run_python, statements
from scored_output import (
    LINES,
    NEW_MODEL,
    NIGHTS,
    OLD_MODEL,
    day_of,
    photographs,
    scored,
    write_output,
    write_rows,
)

from csflow.output.schemas import ERRORS, REGION, REGIONS, SCORES, TAGS

PAGE = list(blocks(DOCS / "queries.md"))
ABOUT_ERRORS = {"Error rates by code and day", "Open errors"}


def set_up(language: str, engine: str | None, word: str) -> list[Block]:
    wanted = {word} | ({engine} if engine else set())
    return [
        b for b in PAGE if b.language == language and wanted <= b.words and (engine or wanted == set(b.words))
    ]


def questions(language: str) -> dict[str, Block]:
    return {block.heading: block for block in PAGE if block.language == language and not block.words}


QUESTIONS = list(questions("sql"))
Answers = dict[str, pd.DataFrame]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that holds `demo/scores`, made the working folder."""
    folder = tmp_path_factory.mktemp("queries")
    write_output(folder / "demo" / "scores")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def duckdb_answers(folder: Path) -> Answers:
    return ask_duckdb([*set_up("sql", "duckdb", "setup"), *set_up("sql", "duckdb", "errors")])


def ask_duckdb(
    views: list[Block], transpiled: Callable[[str], str] = str, only: str | None = None
) -> Answers:
    connection = duckdb.connect()
    for block in views:
        for statement in statements(block):
            connection.execute(transpiled(statement))
    return {
        heading: connection.execute(transpiled(statements(block)[0])).df()
        for heading, block in questions("sql").items()
        if only in (None, heading)
    }


@pytest.fixture(scope="module")
def polars_answers(folder: Path) -> Answers:
    names: dict[str, Any] = {}
    for block in [*set_up("python", None, "setup"), *set_up("python", None, "errors")]:
        run_python(block, names)
    return {heading: run_python(block, names).to_pandas() for heading, block in questions("python").items()}


@pytest.fixture(scope="module")
def pandas_answers(folder: Path) -> Answers:
    """pandas has not every question."""
    names: dict[str, Any] = {}
    for block in set_up("python", "pandas", "setup"):
        run_python(block, names)
    asked = [block for block in PAGE if block.language == "python" and block.words == {"pandas"}]
    return {block.heading: run_python(block, names).reset_index(drop=True) for block in asked}


@pytest.fixture(scope="module")
def spark_answers(folder: Path) -> Answers:
    pytest.importorskip("pyspark")
    if not (shutil.which("java") or os.environ.get("JAVA_HOME")):
        pytest.skip("Spark needs Java")
    # Spark forks to start its JVM. In a process with gRPC threads, such as Ray has, that can cut connections
    # for good: Ray then waits for ever for an actor that has long been there.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(ask_spark).result()


def ask_spark() -> Answers:
    from pyspark.sql import SparkSession

    # Little data: compiling, planning and the warming up of the JVM would take most of the time.
    quick = {
        "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -Xshare:auto",
        "spark.log.level": "OFF",
        "spark.sql.adaptive.enabled": False,
        "spark.sql.codegen.factoryMode": "NO_CODEGEN",
        "spark.sql.codegen.wholeStage": False,
        "spark.sql.shuffle.partitions": 1,
        "spark.sql.sources.parallelPartitionDiscovery.threshold": 1000,
        "spark.ui.enabled": False,
        "spark.ui.showConsoleProgress": False,
    }
    builder = SparkSession.builder.master("local[1]")
    for name, value in quick.items():
        builder = builder.config(name, value)
    spark = builder.getOrCreate()
    names: dict[str, Any] = {}
    for block in [*set_up("python", "spark", "setup"), *set_up("python", "spark", "errors")]:
        run_python(block, names)
    answers = {
        heading: pd.DataFrame([row.asDict() for row in spark.sql(statements(block)[0]).collect()])
        for heading, block in questions("sql").items()
    }
    spark.stop()
    return answers


@pytest.fixture(scope="module")
def trino_answers(folder: Path) -> Answers:
    """Trino's SQL translated to DuckDB's, over the files in place of the external tables."""

    def translate(statement: str) -> str:
        # Trino unnests rows into their fields, DuckDB only where it is told to.
        statement = statement.replace("UNNEST(regions)", "LATERAL (SELECT UNNEST(regions, max_depth := 2))")
        return sqlglot.transpile(statement, read="trino", write="duckdb")[0]

    tables = "CREATE VIEW all_scores AS {};\nCREATE VIEW errors AS {};\n".format(
        *(
            f"SELECT * FROM read_parquet('demo/scores/{kind}/*/*/*.parquet', "
            "hive_types = {'model_id': VARCHAR, 'date': DATE})"
            for kind in ("scores", "errors")
        )
    )
    connection = duckdb.connect()
    connection.execute(tables)
    for block in set_up("sql", "trino", "setup"):
        if "athena" in block.words:
            for statement in statements(block):
                connection.execute(translate(statement))
    return {
        heading: connection.execute(translate(statements(block)[0])).df()
        for heading, block in questions("sql").items()
    }


def plain(answer: pd.DataFrame) -> pd.DataFrame:
    """Dates as text and numbers as floats, so that engines can be compared."""

    def value(cell: Any) -> Any:
        if isinstance(cell, str):
            return cell
        return cell.isoformat()[:10] if hasattr(cell, "isoformat") else float(cell)

    return answer.map(value)


@pytest.mark.parametrize("engine", ["polars", "spark", "trino"])
def test_engines_give_the_same_answers(engine, duckdb_answers, request):
    answers: Answers = request.getfixturevalue(f"{engine}_answers")
    assert list(answers) == QUESTIONS
    for heading, expected in duckdb_answers.items():
        answer = answers[heading]
        assert len(expected), heading
        pd.testing.assert_frame_equal(plain(answer), plain(expected), rtol=1e-6, obj=heading)


def test_pandas_gives_the_same_answers_to_the_questions_of_every_morning(duckdb_answers, pandas_answers):
    assert list(pandas_answers) == QUESTIONS[: len(pandas_answers)]
    assert len(pandas_answers) == 5
    for heading, answer in pandas_answers.items():
        pd.testing.assert_frame_equal(plain(answer), plain(duckdb_answers[heading]), rtol=1e-6, obj=heading)


def test_flagged_since_the_last_run_leaves_out_what_an_earlier_run_flagged(tmp_path, monkeypatch):
    output = write_output(tmp_path / "demo" / "scores", range(19, 21))
    monkeypatch.chdir(tmp_path)
    views = set_up("sql", "duckdb", "setup")
    heading = "Flagged since the last run"
    before = ask_duckdb(views, only=heading)[heading]
    assert set(before.image_uri) <= set(photographs(20))
    assert len(before) > 1
    # The worst one was photographed again: its older version was flagged the night before.
    [file] = (output / "scores" / f"model_id={NEW_MODEL}" / f"date={day_of(19)}").iterdir()
    rows = pq.read_table(file).to_pylist()
    rows[0] |= {"image_uri": before.image_uri[0], "is_anomalous": True}
    pq.write_table(pa.Table.from_pylist(rows, SCORES), file)
    assert list(ask_duckdb(views, only=heading)[heading].image_uri) == list(before.image_uri[1:])


def test_a_line_stands_out_against_its_own_baseline(duckdb_answers):
    compared = duckdb_answers["A line against its baseline"].set_index("line")
    assert set(compared.images) == {6}
    assert compared.share_before.idxmax() == "line-3"
    growth = compared.share - compared.share_before
    assert growth.is_monotonic_decreasing


def test_links_hold_the_encoded_uri(duckdb_answers):
    first = duckdb_answers["Links to the images"].iloc[0]
    assert parse_qs(urlsplit(first.link).query) == {"image": [first.image_uri]}


def test_the_worst_of_the_last_night_come_first(duckdb_answers):
    worst = duckdb_answers["The worst images of the night"]
    assert len(worst) == 20
    assert set(worst.image_uri) <= set(photographs(20))
    assert worst.anomaly_score.is_monotonic_decreasing
    assert set(worst.line) == {"line-1", "line-2", "line-3", "line-4"}


def test_the_line_with_defects_stands_out(duckdb_answers):
    by_line = duckdb_answers["By line and day"].groupby("line")[["images", "anomalous"]].sum()
    share = by_line.anomalous / by_line.images
    assert share.idxmax() == "line-3"
    assert by_line.images.sum() == 7 * 24 - 4  # the new model's nights, one of them with four broken images


def test_tags_tell_cameras_of_a_line_apart(duckdb_answers):
    by_camera = duckdb_answers["By line and camera"]
    assert list(by_camera.columns[:3]) == ["date", "line", "camera"]
    assert set(by_camera.camera) == {"top", "side"}
    by_line = duckdb_answers["By line and day"]
    for column in ("images", "anomalous"):
        summed = by_camera.groupby(["date", "line"])[column].sum()
        assert dict(summed) == dict(by_line.set_index(["date", "line"])[column])


def test_a_part_is_as_bad_as_its_worst_view(duckdb_answers):
    parts = duckdb_answers["A verdict for each part"]
    nights = range(14, NIGHTS)  # of the new model
    uris = {uri for night in nights for uri in photographs(night) if scored(uri, night, NEW_MODEL, 0.5)}
    assert parts.views.sum() == len(uris)
    assert len(parts) == len(nights) * len(LINES) * 3
    failed = [night for night in nights if night % 5 == 3]
    assert (parts.views == 1).sum() == len(failed) * len(LINES)
    assert parts.is_anomalous.tolist() == (parts.p_value <= 0.01).tolist()
    assert 0 < parts.is_anomalous.sum() < len(parts) / 4
    assert parts.worst_image.is_unique
    for row in parts.itertuples():
        assert row.worst_image.endswith(f"part-{row.part[:2]}-{row.worst_image[-7:-4]}.png")
        assert int(row.worst_image[-7:-4]) // 2 == int(row.part[3:])
        night = scored(row.worst_image, int(row.part[:2]), NEW_MODEL, 0.5)
        assert night is not None
        assert night["part_p_value"] == row.p_value


def test_defects_are_counted_and_listed_with_their_boxes(duckdb_answers):
    defects = duckdb_answers["Defects by line and day"].groupby("line")[["regions", "images", "sure_regions"]]
    by_line = defects.sum()
    assert by_line.sure_regions.idxmax() == "line-3"
    assert by_line.regions.sum() > by_line.images.sum() > by_line.sure_regions.sum()
    largest = duckdb_answers["The largest defects"]
    assert largest.area.is_monotonic_decreasing
    # Most defects are at one place of the part, and in one cell of the map.
    hottest = largest.sort_values("peak").iloc[-1]
    assert (hottest.y, hottest.x, hottest.height, hottest.width) == (60, 480, 60, 80)


def test_drift_of_the_old_model_shows_from_week_to_week(duckdb_answers):
    drift = duckdb_answers["Drift over weeks"].set_index("model_id")
    assert list(drift.loc[OLD_MODEL].share_below_5_percent) == sorted(
        drift.loc[OLD_MODEL].share_below_5_percent
    )
    assert drift.loc[OLD_MODEL].mean_p_value.iloc[-1] < 0.2 < 0.3 < drift.loc[NEW_MODEL].mean_p_value


def test_defects_are_found_where_they_are(duckdb_answers):
    hottest = duckdb_answers["Where on the part: maps"].iloc[0]
    assert (hottest.map_row, hottest.map_column) == (1, 6)
    assert hottest.anomalous > 5 * hottest.others
    peak = duckdb_answers["Where on the part: peaks"].iloc[0]
    assert (peak.fourth_down, peak.fourth_across) == (0, 3)


def test_models_are_compared_on_the_images_that_both_scored(duckdb_answers):
    [compared] = duckdb_answers["Two models on the same images"].itertuples()
    assert compared.images == 7 * 24 - 4
    assert compared.flagged_by_both > 5
    assert compared.only_by_previous > compared.only_by_latest  # the old one has drifted
    changed = duckdb_answers["Images whose score changed with a new model"]
    ratios = (changed.p_now / changed.p_before).tolist()
    extremes = [max(ratio, 1 / ratio) for ratio in ratios]
    assert extremes == sorted(extremes, reverse=True)


def test_an_image_that_failed_twice_is_one_image_in_the_error_rates(duckdb_answers):
    rates = duckdb_answers["Error rates by code and day"]
    night = rates[rates.date == pd.Timestamp(day_of(3))].set_index("error_code")
    assert dict(night.images) == {"corrupt": 2, "too_large": 1, "truncated": 1}
    assert night.share["corrupt"] == pytest.approx(2 / 24)


def test_an_image_scored_after_it_failed_is_not_open(duckdb_answers):
    errors = duckdb_answers["Open errors"]
    broken = {uri for night in (3, 8, 13, 18) for uri in photographs(night) if uri.endswith("005.png")}
    assert set(errors.image_uri) == broken
    assert "timeout" not in set(errors.error_code)
    assert errors.attempts.max() == 2


def in_duckdb_and_polars() -> tuple[duckdb.DuckDBPyConnection, dict[str, Any]]:
    """The set-up of the page, run over the output below the working folder; names are those of Python."""
    connection, names = duckdb.connect(), {}
    for statement in statements(set_up("sql", "duckdb", "setup")[0]):
        connection.execute(statement)
    run_python(set_up("python", None, "setup")[0], names)
    return connection, names


def test_an_output_without_errors_or_a_second_model_answers_all_other_questions(folder, tmp_path):
    """As after the demo: one night, one model, no error."""
    write_output(tmp_path / "demo" / "scores", range(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        connection, names = in_duckdb_and_polars()
        for heading in set(QUESTIONS) - ABOUT_ERRORS:
            answer = connection.execute(statements(questions("sql")[heading])[0]).df()
            in_polars = run_python(questions("python")[heading], names)
            assert len(answer) == len(in_polars), heading
            if "model_id" in answer:  # of digits only, and text all the same
                assert list(answer.model_id) == list(in_polars["model_id"]) == [OLD_MODEL]
            assert len(answer) or "new model" in heading, heading


def test_of_two_products_in_one_output_none_is_lost(tmp_path, monkeypatch):
    """The latest model of each name, whichever product was scored last."""
    output = tmp_path / "demo" / "scores"
    scored_in = [
        ("gear", "old gear", 0),
        ("board", "board", 1),
        ("gear", "new gear", 2),
        (None, "nameless", 3),
    ]
    for name, model_id, night in scored_in:
        rows = [scored(uri, night, OLD_MODEL, 0.0) for uri in photographs(0)]
        named = [row | {"model_name": name} for row in rows if row]
        write_rows(output, "scores", model_id, night, named)
    monkeypatch.chdir(tmp_path)
    connection, names = in_duckdb_and_polars()
    for view, models in (
        ("latest_model", ["board", "nameless", "new gear"]),
        ("previous_model", ["old gear"]),
    ):
        found = connection.execute(f"SELECT DISTINCT model_id FROM {view} ORDER BY 1").df()
        assert list(found.model_id) == models
        assert sorted(set(names[view].collect()["model_id"])) == models


def test_weeks_are_those_of_the_photographs_and_not_of_the_night_that_scored_them(tmp_path, monkeypatch):
    rows = [scored(uri, night, OLD_MODEL, 0.0) for night in range(21) for uri in photographs(night)]
    write_rows(tmp_path / "demo" / "scores", "scores", OLD_MODEL, 20, [row for row in rows if row])
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    run_python(set_up("python", None, "setup")[0], names)
    connection = duckdb.connect()
    for statement in statements(set_up("sql", "duckdb", "setup")[0]):
        connection.execute(statement)
    heading = "Drift over weeks"
    weeks = connection.execute(statements(questions("sql")[heading])[0]).df().week
    in_polars = run_python(questions("python")[heading], names)["week"]
    assert [week.date() for week in weeks] == list(in_polars) == [day_of(0), day_of(7), day_of(14)]


def test_the_tables_of_athena_and_trino_are_those_of_the_contract():
    types = {
        "string": ("STRING", "VARCHAR"),
        "int32": ("INT", "INTEGER"),
        "float": ("FLOAT", "REAL"),
        "double": ("DOUBLE", "DOUBLE"),
        "bool": ("BOOLEAN", "BOOLEAN"),
        "list<element: float>": ("ARRAY<FLOAT>", "ARRAY(REAL)"),
        str(REGIONS): (
            f"ARRAY<STRUCT<{', '.join(f'{name}: DOUBLE' for name in REGION.names)}>>",
            f"ARRAY(ROW({', '.join(f'{name} DOUBLE' for name in REGION.names)}))",
        ),
        "timestamp[us, tz=UTC]": ("TIMESTAMP", "TIMESTAMP(6)"),
        str(TAGS): ("MAP<STRING, STRING>", "MAP(VARCHAR, VARCHAR)"),
    }
    for place, engine in enumerate(("athena", "trino")):
        tables = [b for b in set_up("sql", engine, "setup") if "CREATE" in b.code and "TABLE" in b.code]
        declared = {}
        for block in tables:
            for statement in statements(block):
                parsed = sqlglot.parse_one(statement, dialect=engine)
                if parsed.key == "create" and parsed.kind == "TABLE":
                    columns = {
                        c.name: c.kind.sql(dialect="hive" if engine == "athena" else engine)
                        for c in parsed.this.expressions
                    }
                    declared[parsed.this.this.name] = columns
        for name, schema in {"all_scores": SCORES, "errors": ERRORS}.items():
            expected = {field.name: types[str(field.type)][place] for field in schema}
            columns = {c: kind for c, kind in declared[name].items() if c not in ("model_id", "date")}
            assert columns == expected


@pytest.mark.parametrize("dialect", ["athena", "trino"])
def test_questions_are_understood_by_athena_and_trino(dialect):
    blocks = [*questions("sql").values(), *set_up("sql", dialect, "setup")]
    for block in blocks:
        for statement in statements(block):
            if not statement.startswith("CALL"):  # a procedure of the connector, no SQL of the parser's
                sqlglot.parse_one(statement, dialect=dialect)
