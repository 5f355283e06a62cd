"""The scoring job: right scores, every image once, readable by anyone's tools."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import fsspec
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from conftest import (
    ROOT,
    SHARD_ROW,
    SMALL_MODEL,
    copy_some,
    names,
    read_errors,
    read_scores,
    run_job,
    run_score,
    wait_for,
)
from PIL import Image

from csflow.calibration import p_values
from csflow.cluster import WorkerResources, map_shards, spilled_bytes, with_timeout
from csflow.errors import ExitStatus, WrongUse
from csflow.images import decode
from csflow.inputs.listing import list_images
from csflow.model import InferenceDetector
from csflow.model_directory import load_model
from csflow.output.layout import Output
from csflow.output.schemas import ERRORS, SCORES
from csflow.regions import find_regions
from csflow.scoring.config import ScoringSettings
from csflow.scoring.frozen_listing import Listing
from csflow.scoring.key_sets import keys
from csflow.scoring.outcomes import OutcomeReader
from csflow.scoring.plan import Account, account, make_plan
from csflow.scoring.plan_log import PlanLog
from csflow.scoring.rows import peak
from csflow.scoring.scorer import ShardScorer
from csflow.scoring.tally import Sample, Tally
from csflow.storage import Location, to_parquet


@pytest.fixture(scope="session")
def archive(cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 photographs, functional and defective, and three files that are none."""
    folder = tmp_path_factory.mktemp("archive") / "images"
    copy_some(cells / "functional" / "test", folder / "functional", 20)
    copy_some(cells / "defective", folder / "defective", 20)
    whole = next((folder / "defective").iterdir()).read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.jpg").write_text("no photograph")
    return folder


@pytest.fixture(scope="session")
def scored(model: Path, archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("scored") / "output"
    tags = f"{archive}/{{kind}}/{{cell}}.png"
    assert (
        run_score("--model", model, "--input", archive, "--output", output, "--tags", tags) == ExitStatus.DONE
    )
    return output


def test_scores_are_what_the_detector_gives_for_each_photograph(scored, model, archive):
    frame = read_scores(scored)
    loaded = load_model(Location(str(model)))
    form = InferenceDetector(loaded.detector, "auto", batch_size=1)
    for row in frame.sample(6, random_state=0).itertuples():
        decoded = decode(Path(row.image_uri).read_bytes(), loaded.detector.architecture.preprocessing)
        pixels = torch.from_numpy(decoded.pixels_HWC)
        expected, trained = form(pixels[None]), loaded.detector(pixels[None])
        assert row.anomaly_score == pytest.approx(trained.anomaly_score_B.item(), rel=0.01)
        assert row.anomaly_score == pytest.approx(expected.anomaly_score_B.item(), rel=1e-5)
        assert row.global_score == pytest.approx(expected.global_score_B.item(), rel=1e-5)
        assert row.local_score == pytest.approx(expected.local_score_B.item(), rel=1e-5)
        np.testing.assert_allclose(row.scale_scores, expected.scale_scores_BS[0], rtol=1e-5)
        np.testing.assert_allclose(
            row.anomaly_map, expected.anomaly_map_BHW[0].flatten(), rtol=1e-4, atol=1e-6
        )
        assert (row.map_height, row.map_width) == (16, 16)
        assert (row.image_height, row.image_width) == (300, 300)
        sizes, box_B4 = (np.array([300]), np.array([300])), np.array([decoded.box])
        (peak_y,), (peak_x,) = peak(row.anomaly_map.reshape(1, 16, 16), *sizes, box_B4)
        assert (row.peak_y, row.peak_x) == (peak_y, peak_x)
    expected_p = p_values(frame.anomaly_score, loaded.calibration.anomaly_score)
    np.testing.assert_array_equal(frame.p_value, expected_p)
    np.testing.assert_array_equal(frame.is_anomalous, expected_p <= 0.01)


def test_the_global_and_the_local_score_have_conformal_p_values_of_their_own(scored, model):
    frame, calibration = read_scores(scored), load_model(Location(str(model))).calibration
    for name in ("global", "local"):
        heldout = getattr(calibration, f"{name}_score")
        at_least = (heldout[None] >= frame[f"{name}_score"].to_numpy()[:, None]).sum(1)
        np.testing.assert_array_equal(frame[f"{name}_p_value"], (1 + at_least) / (len(heldout) + 1))
    assert not (frame.global_p_value == frame.local_p_value).all()


def test_the_map_threshold_is_that_of_the_false_positive_rate_and_null_if_images_are_too_few(
    scored, model, archive, tmp_path
):
    # Of 10 held-out images none can be told from one in a hundred.
    assert read_scores(scored).map_threshold.isna().all()
    images = copy_some(archive / "functional", tmp_path / "images", 2)
    arguments = ["--model", model, "--input", images, "--output", tmp_path / "out"]
    assert run_score(*arguments, "--false_positive_rate", 0.2) == ExitStatus.DONE
    frame = read_scores(tmp_path / "out")
    maxima = np.sort(load_model(Location(str(model))).calibration.map_maximum)
    assert len(maxima) == 10
    assert (frame.map_threshold == maxima[-2]).all()


def test_regions_are_those_of_the_map_above_the_threshold_with_p_values_of_their_peaks(
    scored, model, archive, tmp_path
):
    calibration = load_model(Location(str(model))).calibration
    frame = read_scores(scored)
    threshold = calibration.region_threshold(0.1)
    assert (frame.region_threshold == threshold).all()
    # Compared with the hottest cell of all: with ten held-out images, one in eleven may have a region.
    assert threshold == calibration.map_maximum.max()
    assert 0 < sum(map(len, frame.regions)) < 500
    for row in frame.itertuples():
        map_1HW = row.anomaly_map.reshape(1, row.map_height, row.map_width)
        whole = np.array([[0.0, 0.0, row.image_height, row.image_width]])
        found = find_regions(map_1HW, threshold, [row.image_height], [row.image_width], whole)
        columns = [
            getattr(found, f"{name}_N") for name in ("x", "y", "width", "height", "area", "peak", "mean")
        ]
        columns.append(p_values(found.peak_N, calibration.map_maximum))
        assert [list(region.values()) for region in row.regions] == np.transpose(columns).tolist()
    images = copy_some(archive / "defective", tmp_path / "images", 2)
    arguments = ["--model", model, "--input", images, "--output", tmp_path / "out", "--maps", "none"]
    assert run_score(*arguments, "--false_regions", 0.05) == ExitStatus.DONE
    frame = read_scores(tmp_path / "out")
    assert frame.regions.isna().all()
    assert frame.region_threshold.isna().all()


def test_every_image_is_scored_once_or_has_an_error(scored, archive, run_record):
    assert names(read_scores(scored)) == Counter(
        path.name for folder in ("functional", "defective") for path in (archive / folder).iterdir()
    )
    errors = read_errors(scored)
    assert dict(zip(errors.image_uri.map(lambda uri: Path(uri).name), errors.error_code, strict=True)) == {
        "truncated.png": "truncated",
        "empty.png": "empty",
        "notes.jpg": "unsupported_format",
    }
    assert not errors.is_transient.any()
    for rows in (read_scores(scored), errors):
        changed = [Path(uri).stat().st_mtime for uri in rows.image_uri]
        assert [at.timestamp() for at in rows.image_modified_at] == pytest.approx(changed, abs=2e-6)
        assert rows.model_name.isna().all()
    record = run_record(scored)
    counts = record["counts"]
    assert [counts[k] for k in ("listed", "scored", "permanent_errors", "missing")] == [43, 40, 3, 0]
    # Where the time went: on the clock, and of processors.
    assert {"read", "decode", "score", "wait", "write"} == record["seconds_in_workers"].keys()
    stages = {"start", "read", "decode", "score", "write", "other"}
    assert stages == record["cpu_seconds_in_workers"].keys()
    assert record["seconds_to_first_image"] > record["seconds"]["start"]


REGION_FIELDS = ", ".join(
    f"{name}: double" for name in ("x", "y", "width", "height", "area", "peak", "mean", "p_value")
)


def test_files_have_exactly_the_schema_of_the_contract(scored):
    for folder, expected in (("scores", SCORES), ("errors", ERRORS)):
        files = list((scored / folder).rglob("*.parquet"))
        assert files
        for file in files:
            found = pq.read_schema(file)
            assert found.equals(expected)
            # Arrow gives the entries of a map, which have no name in Parquet, that of the column.
            whole = [schema.remove(schema.get_field_index("tags")) for schema in (found, expected)]
            assert whole[0].equals(whole[1], check_metadata=True)
            assert pq.ParquetFile(file).metadata.row_group(0).column(0).compression == "ZSTD"
            assert file.parent.name.startswith("date=20")
            assert file.parent.parent.name.startswith("model_id=")
    assert [(f.name, str(f.type)) for f in SCORES] == [
        ("image_uri", "string"),
        ("image_version", "string"),
        ("image_height", "int32"),
        ("image_width", "int32"),
        ("anomaly_score", "double"),
        ("scale_scores", "list<element: float>"),
        ("p_value", "double"),
        ("is_anomalous", "bool"),
        ("anomaly_map", "list<element: float>"),
        ("map_height", "int32"),
        ("map_width", "int32"),
        ("peak_y", "float"),
        ("peak_x", "float"),
        ("run_id", "string"),
        ("scored_at", "timestamp[us, tz=UTC]"),
        ("map_box", "list<element: float>"),
        ("global_score", "double"),
        ("global_p_value", "double"),
        ("local_score", "double"),
        ("local_p_value", "double"),
        ("map_threshold", "double"),
        ("region_threshold", "double"),
        ("regions", f"list<element: struct<{REGION_FIELDS}>>"),
        ("image_modified_at", "timestamp[us, tz=UTC]"),
        ("model_name", "string"),
        ("image_taken_at", "timestamp[us, tz=UTC]"),
        ("tags", "map<string, string>"),
        ("part_p_value", "double"),
    ]
    assert [(f.name, str(f.type)) for f in ERRORS] == [
        ("image_uri", "string"),
        ("image_version", "string"),
        ("error_code", "string"),
        ("error_message", "string"),
        ("is_transient", "bool"),
        ("run_id", "string"),
        ("failed_at", "timestamp[us, tz=UTC]"),
        ("image_modified_at", "timestamp[us, tz=UTC]"),
        ("model_name", "string"),
        ("tags", "map<string, string>"),
    ]


def test_tags_are_what_the_pattern_names_in_a_uri_and_null_where_it_does_not_match(scored):
    sql = "SELECT image_uri, tags, tags['kind'] AS kind, tags['cell'] AS cell FROM '{}/{}/*/*/*.parquet'"
    frame = duckdb.sql(sql.format(scored, "scores")).df()
    paths = frame.image_uri.map(Path)
    assert list(frame.kind) == [path.parent.name for path in paths]
    assert list(frame.cell) == [path.stem for path in paths]
    assert duckdb.sql(sql.format(scored, "errors")).df().tags.isna().all()


def test_duckdb_polars_and_pandas_read_the_output_without_csflow(scored):
    pattern = f"{scored}/scores/*/*/*.parquet"
    # A process that cannot import csflow: what is read needs nothing of ours.
    script = f"""
import sys
sys.modules["csflow"] = None
import duckdb, pandas, polars
sql = "SELECT count(*), round(sum(anomaly_score), 6), sum(len(anomaly_map)), count(DISTINCT model_id)"
print(duckdb.sql(sql + " FROM read_parquet('{pattern}', hive_partitioning=true)").fetchall()[0])
p = polars.scan_parquet("{pattern}", hive_partitioning=True).collect()
cells = p["anomaly_map"].list.len().sum()
print((len(p), round(p["anomaly_score"].sum(), 6), cells, p["model_id"].n_unique()))
d = pandas.read_parquet("{scored}/scores")
total = round(float(d.anomaly_score.sum()), 6)
print((len(d), total, int(d.anomaly_map.map(len).sum()), d.model_id.nunique()))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    lines = result.stdout.strip().splitlines()
    assert len(lines) == 3
    assert len(set(lines)) == 1
    assert lines[0].startswith("(40, ")


def test_a_run_goes_on_without_what_cannot_be_listed_and_ends_with_status_3(
    scored, model, archive, tmp_path, run_record, capsys
):
    bad = tmp_path / "utf16.csv"
    bad.write_bytes("image_uri".encode("utf-16"))
    output = shutil.copytree(scored, tmp_path / "output")
    arguments = ["--model", model, "--input", archive, bad, "--output", output]
    assert run_score(*arguments) == ExitStatus.INCOMPLETE
    record = run_record(output)
    assert [record["counts"][key] for key in ("scored", "missing", "not_listed")] == [40, 0, 1]
    assert list(record["not_listed"]) == [str(bad)]
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"warning: not listed: {bad}: ") for line in lines)
    assert any(line.startswith("INCOMPLETE: 1 file") and str(bad) in line for line in lines)
    assert run_score(*arguments, "--exclude", "*.csv") == ExitStatus.DONE


def test_running_again_scores_what_is_new_or_changed_and_nothing_else(model, archive, tmp_path, run_record):
    images = shutil.copytree(archive, tmp_path / "images")
    output = tmp_path / "output"
    arguments = ["--model", model, "--input", images, "--output", output, "--maps", "none"]
    assert run_score(*arguments) == ExitStatus.DONE
    first = read_scores(output)
    assert first.anomaly_map.isna().all()

    assert run_score(*arguments) == ExitStatus.DONE
    assert run_record(output)["counts"]["scored_in_this_run"] == 0
    assert "read" not in run_record(output)["seconds_in_workers"]
    pd.testing.assert_frame_equal(read_scores(output), first)

    added, changed = images / "functional" / "added.png", sorted((images / "defective").iterdir())[0]
    shutil.copy2(changed, added)
    shutil.copy(sorted((images / "functional").iterdir())[3], changed)
    assert run_score(*arguments) == ExitStatus.DONE
    assert run_record(output)["counts"]["scored_in_this_run"] == 2
    second = read_scores(output)
    assert names(second) == names(first) + Counter([added.name, changed.name])
    assert not second.duplicated(["image_uri", "image_version"]).any()
    # Permanent errors were not tried again, until asked for.
    assert len(read_errors(output)) == 3
    assert run_score(*arguments, "--retry_errors") == ExitStatus.DONE
    assert len(read_errors(output)) == 6
    pd.testing.assert_frame_equal(read_scores(output), second)


@pytest.mark.parametrize(("workers", "batch_size"), [(1, 1), (2, 16)])
def test_scores_do_not_depend_on_actors_batch_size_or_store(
    workers, batch_size, scored, model, archive, s3_bucket, tmp_path
):
    remote = fsspec.filesystem("s3", use_listings_cache=False)
    remote.put(f"{archive}/", f"{s3_bucket}/images/", recursive=True)
    arguments = ["--model", model, "--input", f"{s3_bucket}/images", "--output", tmp_path / "output"]
    assert run_score(*arguments, "--workers", workers, "--batch_size", batch_size) == ExitStatus.DONE
    here, there = (
        frame.assign(name=frame.image_uri.str.split("/").str[-1]).set_index("name").sort_index()
        for frame in (read_scores(scored), read_scores(tmp_path / "output"))
    )
    assert list(here.index) == list(there.index)
    np.testing.assert_allclose(here.anomaly_score, there.anomaly_score, rtol=1e-5)
    np.testing.assert_allclose(np.stack(here.anomaly_map), np.stack(there.anomaly_map), rtol=1e-4, atol=1e-5)


def test_train_and_score_against_s3_and_read_back_with_duckdb(ray_cluster, good_cells, archive, s3_bucket):
    remote = fsspec.filesystem("s3", use_listings_cache=False)
    remote.put(f"{good_cells}/", f"{s3_bucket}/good/", recursive=True)
    remote.put(f"{archive}/", f"{s3_bucket}/images/", recursive=True)
    trained = run_job("train", "--input", f"{s3_bucket}/good", "--output", f"{s3_bucket}/model", *SMALL_MODEL)
    assert trained.returncode == 0, trained.stderr
    scored = run_job(
        "score",
        *("--model", f"{s3_bucket}/model", "--input", f"{s3_bucket}/images", "--output", f"{s3_bucket}/out"),
    )
    assert scored.returncode == 0, scored.stderr
    assert "scored    40 images" in scored.stdout
    assert "empty 1, truncated 1, unsupported_format 1" in scored.stdout
    assert "images/s" in scored.stdout
    with duckdb.connect() as connection:
        connection.register_filesystem(remote)
        pattern = f"{s3_bucket}/out/scores/*/*/*.parquet"
        sql = f"SELECT image_uri, anomaly_score FROM read_parquet('{pattern}', hive_partitioning=true)"
        rows = connection.sql(sql).fetchall()
    assert len(rows) == len(dict(rows)) == 40
    assert all(uri.startswith(f"{s3_bucket}/images/") and value > 0 for uri, value in rows)


def test_archives_rows_and_manifests_are_scored_like_files(model, scored, archive, tmp_path):
    photographs = sorted((archive / "functional").iterdir())[:6]
    shutil.make_archive(str(tmp_path / "pack"), "zip", photographs[0].parent, photographs[0].name)
    shutil.make_archive(str(tmp_path / "pack"), "tar", photographs[1].parent, photographs[1].name)
    table = pa.table({"image": pa.array([photographs[2].read_bytes()], pa.binary())})
    pq.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "manifest.csv").write_text(f"image_uri\n{photographs[3]}\n")
    inputs = [tmp_path / name for name in ("pack.zip", "pack.tar", "rows.parquet", "manifest.csv")]
    assert run_score("--model", model, "--output", tmp_path / "output", "--input", *inputs) == ExitStatus.DONE
    frame = read_scores(tmp_path / "output").set_index("image_uri")
    expected = read_scores(scored).set_index("image_uri")
    for uri, photograph in {
        f"{tmp_path}/pack.zip!/{photographs[0].name}": photographs[0],
        f"{tmp_path}/pack.tar!/{photographs[1].name}": photographs[1],
        f"{tmp_path}/rows.parquet#0": photographs[2],
        str(photographs[3]): photographs[3],
    }.items():
        assert frame.anomaly_score[uri] == pytest.approx(expected.anomaly_score[str(photograph)], rel=1e-5)


def test_a_run_that_fails_everywhere_ends_with_status_3(model, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(5):
        (images / f"{i}.png").write_bytes(b"no photograph")
    assert (
        run_score("--model", model, "--input", images, "--output", tmp_path / "output")
        == ExitStatus.INCOMPLETE
    )
    lenient = ["--model", model, "--input", images, "--output", tmp_path / "lenient", "--max_error_rate", 1]
    assert run_score(*lenient) == ExitStatus.DONE


def test_an_image_that_cannot_be_read_for_now_is_missing_and_the_next_run_scores_it(
    model, archive, tmp_path, run_record
):
    images = copy_some(archive / "functional", tmp_path / "images", 4)
    late = images / "late.png"
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("image_uri,image_version\n" + f"{late},9-9\n" + f"{next(images.iterdir())},\n")
    shutil.copy2(next(images.iterdir()), late)
    arguments = ["--model", model, "--output", tmp_path / "output", "--max_error_rate", 1]
    # The manifest names another version of the file than the one that is there.
    assert run_score(*arguments, "--input", manifest) == ExitStatus.INCOMPLETE
    assert run_record(tmp_path / "output")["counts"]["missing"] == 1
    assert read_errors(tmp_path / "output").error_code.tolist() == ["changed"]
    assert run_score(*arguments, "--input", images) == ExitStatus.DONE
    assert names(read_scores(tmp_path / "output"))["late.png"] == 1


def test_resume_after_kill_scores_each_image_once(model, cells, tmp_path):
    output = tmp_path / "output"
    arguments = ["--model", model, "--input", cells / "functional" / "test", "--output", output]
    command = [sys.executable, str(ROOT / "jobs" / "score.py"), *map(str, arguments)]
    process = subprocess.Popen(command, start_new_session=True, cwd=ROOT, text=True)
    wait_for(lambda: len(list(output.glob("scores/*/*/part-*.parquet"))) >= 3, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = names(read_scores(output))
    assert 0 < len(before) < 508
    assert run_score(*arguments) == ExitStatus.DONE
    assert names(read_scores(output)) == Counter(
        path.name for path in (cells / "functional" / "test").iterdir()
    )
    assert len(list(output.glob("_plans/*/*.json"))) == 1


def listing_of(folder: Path, location: Path) -> Listing:
    return Listing.freeze(Location(str(location)), list_images([str(folder)], {}), None)


@pytest.fixture(params=["local", "s3"])
def empty_output(request: pytest.FixtureRequest, tmp_path: Path) -> Output:
    url = request.getfixturevalue("s3_bucket") + "/out" if request.param == "s3" else str(tmp_path / "out")
    return Output(Location(url), "0" * 16)


def planned_images(shards) -> list[str]:
    return [uri for shard in shards for uri in shard.images()["image_uri"].to_pylist()]


def test_two_runs_that_plan_at_once_give_every_image_one_shard(archive, empty_output, tmp_path, monkeypatch):
    few = listing_of(archive / "functional", tmp_path / "few")
    all_images = listing_of(archive, tmp_path / "all")
    append = PlanLog.append
    rivals: list[list[object]] = []

    def append_after_a_rival(*arguments):
        if not rivals:
            # The rival's listing differs: shards cut from it would overlap with ours.
            monkeypatch.setattr(PlanLog, "append", append)
            rivals.append(make_plan(few, OutcomeReader(empty_output), "rival", retry_errors=False))
            monkeypatch.setattr(PlanLog, "append", append_after_a_rival)
        return append(*arguments)

    monkeypatch.setattr(PlanLog, "append", append_after_a_rival)
    shards = make_plan(all_images, OutcomeReader(empty_output), "mine", retry_errors=False)
    images = planned_images(shards)
    assert len(images) == len(set(images)) == 43
    assert {shard.name for shard in rivals[0]} < {shard.name for shard in shards}
    assert [entry.run_id for entry in PlanLog(empty_output).read()] == ["rival", "mine"]


def test_only_unfinished_shards_with_listed_images_are_taken_over(archive, empty_output, tmp_path):
    make_plan(
        listing_of(archive / "defective", tmp_path / "a"),
        OutcomeReader(empty_output),
        "crashed",
        retry_errors=False,
    )
    functional = listing_of(archive / "functional", tmp_path / "b")
    shards = make_plan(functional, OutcomeReader(empty_output), "other", retry_errors=False)
    assert len(planned_images(shards)) == 20
    assert all("/functional/" in uri for uri in planned_images(shards))
    both = make_plan(
        listing_of(archive, tmp_path / "c"), OutcomeReader(empty_output), "all", retry_errors=False
    )
    assert len(set(planned_images(both))) == len(planned_images(both)) == 43


def test_a_shard_file_is_created_once_whoever_comes_second(empty_output):
    target = empty_output.scores_file("000001-0000000", "2026-01-01")
    target.create(b"first")
    with pytest.raises(FileExistsError):
        target.create(b"second")
    assert target.read() == b"first"
    (file,) = empty_output.files("scores", {"2026-01-01"})
    assert (file.location, file.shard) == (target, "000001-0000000")


def test_doubled_rows_are_found_by_the_final_account(scored, archive, tmp_path):
    copy = shutil.copytree(scored, tmp_path / "copy")
    file = next((copy / "scores").rglob("*.parquet"))
    listing = listing_of(archive, tmp_path / "listing")
    output = Output(Location(str(copy)), file.parent.parent.name.removeprefix("model_id="))
    assert account(listing, OutcomeReader(output)) == Account(43, 40, 3, 0)
    shutil.copy(file, file.with_name("part-999999-0000000.parquet"))
    with pytest.raises(RuntimeError, match="more than once"):
        account(listing, OutcomeReader(output))
    for path in (copy / "scores").rglob("*.parquet"):
        path.unlink()
    assert account(listing, OutcomeReader(output)) == Account(43, 0, 3, 40)


def test_keys_tell_image_versions_apart():
    def table(*pairs: tuple[str, str]) -> pa.Table:
        return pa.table({"image_uri": [p[0] for p in pairs], "image_version": [p[1] for p in pairs]})

    pairs = [("a", "b"), ("a", "c"), ("ab", ""), ("", "ab"), ("a", "bc"), ("ab", "c")]
    assert len(set(keys(table(*pairs)).tolist())) == len(pairs)


def test_p_values_count_held_out_images_scoring_at_least_as_much():
    calibration = [1.0, 2.0, 2.0, 3.0]
    np.testing.assert_allclose(
        p_values([0.5, 2.0, 2.5, 9.0, np.nan], calibration), [5 / 5, 4 / 5, 2 / 5, 1 / 5, 1 / 5]
    )


def test_p_values_of_exchangeable_normals_hold_their_rate():
    generator = np.random.default_rng(0)
    p = [p_values([generator.normal()], generator.normal(size=19))[0] for _ in range(4000)]
    for rate in (0.05, 0.1, 0.5):
        assert np.mean(np.array(p) <= rate) == pytest.approx(rate, abs=4 * (rate / 4000) ** 0.5)


def test_the_peak_is_the_centre_of_the_hottest_cell_in_pixels_of_the_original():
    anomaly_map_BHW = np.zeros((2, 2, 4), dtype=np.float32)
    anomaly_map_BHW[0, 1, 2] = anomaly_map_BHW[1, 0, 3] = 1
    box_B4 = np.array([[0, 0, 100, 400], [0, 0, 20, 8]])
    peak_y_B, peak_x_B = peak(anomaly_map_BHW, np.array([100, 20]), np.array([400, 8]), box_B4)
    assert (peak_y_B.tolist(), peak_x_B.tolist()) == ([75.0, 5.0], [250.0, 7.0])


def test_reading_back_with_polars_keeps_types(scored):
    frame = pl.read_parquet(f"{scored}/scores/*/*/*.parquet")
    assert frame.schema["scored_at"] == pl.Datetime("us", "UTC")
    assert frame.schema["anomaly_map"] == pl.List(pl.Float32)


def test_an_append_whose_answer_was_lost_plans_no_image_twice(archive, empty_output, tmp_path, monkeypatch):
    listing = listing_of(archive, tmp_path / "listing")
    create = Location.create

    def create_and_fail(self: Location, data: bytes) -> None:
        create(self, data)
        if self.url.endswith(".json"):
            monkeypatch.setattr(Location, "create", create)
            raise FileExistsError("the client tried again and met its own first try")

    monkeypatch.setattr(Location, "create", create_and_fail)
    images = planned_images(make_plan(listing, OutcomeReader(empty_output), "run", retry_errors=False))
    assert len(images) == len(set(images)) == 43
    assert len(PlanLog(empty_output).read()) == 1


def test_a_late_listing_of_the_scores_plans_no_image_twice(archive, empty_output, tmp_path, monkeypatch):
    listing = listing_of(archive, tmp_path / "listing")
    for shard in make_plan(listing, OutcomeReader(empty_output), "first", retry_errors=False):
        rows = [
            dict.fromkeys(SCORES.names, 0) | {"model_name": ""} | row for row in shard.images().to_pylist()
        ]
        columns = {"scale_scores": [], "anomaly_map": None, "run_id": "first", "is_anomalous": False}
        columns |= {"map_box": None, "regions": None}
        table = pa.Table.from_pylist([row | columns for row in rows], schema=SCORES)
        empty_output.scores_file(shard.name, shard.date).create(to_parquet(table))
    finished = empty_output.files("scores", {shard.date})
    late = finished[:1]
    monkeypatch.setattr(Output, "files", lambda self, kind, *_: late if kind == "scores" else [])
    again = make_plan(listing, OutcomeReader(empty_output), "second", retry_errors=False)
    # They are taken over under their own names, where creating them anew changes nothing.
    assert {shard.name for shard in again} == {file.shard for file in finished[1:]}


def test_a_log_that_lost_an_entry_is_refused(archive, tmp_path):
    output = Output(Location(str(tmp_path / "out")), "0" * 16)
    for name in ("functional", "defective"):
        make_plan(
            listing_of(archive / name, tmp_path / name), OutcomeReader(output), name, retry_errors=False
        )
    (tmp_path / "out" / "_plans" / f"model_id={'0' * 16}" / "000001.json").unlink()
    with pytest.raises(WrongUse, match=r"has lost entry 000001\.json; restore it"):
        make_plan(listing_of(archive, tmp_path / "all"), OutcomeReader(output), "third", retry_errors=False)


def test_a_store_without_conditional_writes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Location, "create", Location.write)
    with pytest.raises(WrongUse, match="store without conditional writes"):
        Location(str(tmp_path)).check_writable(exclusively=True)


ONE_CPU = WorkerResources(workers=1, cpus=1, gpus=0)


def settings_of(model: Path, output: Output) -> ScoringSettings:
    return ScoringSettings(Location(str(model)), output, "run", True, 0.01, None)


def test_a_model_replaced_during_the_run_scores_nothing_under_the_old_id(model, tmp_path):
    with pytest.raises(RuntimeError, match="start the run again"):
        ShardScorer(settings_of(model, Output(Location(str(tmp_path)), "0" * 16)), ONE_CPU)


def test_refused_writes_stop_the_run_and_the_next_one_completes(model, archive, tmp_path):
    arguments = ["--model", model, "--input", archive, "--output", tmp_path / "output"]
    scores = tmp_path / "output" / "scores" / f"model_id={load_model(Location(str(model))).model_id}"
    scores.mkdir(parents=True)
    in_the_way = scores / f"date={datetime.now(UTC).date()}"
    in_the_way.write_text("a file where a folder is needed")
    with pytest.raises(RuntimeError, match="shards failed"):
        run_score(*arguments)
    in_the_way.unlink()
    assert run_score(*arguments) == ExitStatus.DONE
    assert len(read_scores(tmp_path / "output")) == 40


@pytest.mark.parametrize(
    "decode", [[], pytest.param(["--decode", "cluster", "--workers", "1"], marks=pytest.mark.soak)]
)
def test_an_image_that_kills_its_process_gets_an_error_and_its_neighbours_are_scored(
    model, archive, tmp_path, decode
):
    images = copy_some(archive / "functional", tmp_path / "images", 6)
    shutil.copy2(next(images.iterdir()), images / "poison.png")
    hook = tmp_path / "hook"
    hook.mkdir()
    # Every process of this job that opens the image dies, as one with a broken native library would.
    (hook / "sitecustomize.py").write_text(
        "import os, sys\n"
        "def die(event, args):\n"
        "    if event == 'open' and str(args[0]).endswith('poison.png'):\n"
        "        os.kill(os.getpid(), 9)\n"
        "sys.addaudithook(die)\n"
    )
    command = [sys.executable, str(ROOT / "jobs" / "score.py"), "--model", str(model)]
    command += ["--input", str(images), "--output", str(tmp_path / "output"), *decode]
    environment = os.environ | {"RAY_ADDRESS": "local", "PYTHONPATH": str(hook)}
    job = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert job.returncode == 0, job.stdout + job.stderr
    assert "1 shards took their workers down again" in job.stdout
    assert len(read_scores(tmp_path / "output")) == 6
    errors = read_errors(tmp_path / "output")
    assert [(Path(e.image_uri).name, e.error_code) for e in errors.itertuples()] == [
        ("poison.png", "crashed")
    ]


def test_rows_that_do_not_come_end_the_wait():
    never = threading.Event()

    def rows() -> Iterator[int]:
        yield 1
        never.wait()
        yield 2

    got = with_timeout(rows(), seconds=0.2)
    assert next(got) == 1
    with pytest.raises(TimeoutError):
        next(got)
    never.set()
    assert list(with_timeout((n for n in [1, 2]), seconds=60)) == [1, 2]
    with pytest.raises(ZeroDivisionError):
        list(with_timeout((1 // 0 for _ in [1]), seconds=60))


def test_what_ends_beside_a_thread_that_hangs_cannot_change_the_status_of_the_job():
    job = """
import atexit, os, threading
from csflow.cluster import with_timeout
from csflow.errors import ExitStatus
from csflow.exit import run_job
from csflow.scoring.config import ScoreConfig

def main(config):
    atexit.register(os._exit, 1)  # as Ray does to a process whose raylet has gone
    try:
        next(with_timeout((threading.Event().wait() for _ in [1]), seconds=0.01))
    except TimeoutError:
        print("stalled")
    return ExitStatus.INCOMPLETE

run_job(ScoreConfig, main, None, ["--model", "m", "--input", "i", "--output", "o"])
"""
    ended = subprocess.run([sys.executable, "-c", job], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (ExitStatus.INCOMPLETE, "stalled\n"), ended.stderr


def test_a_run_that_stops_early_gives_its_workers_back(ray_cluster):
    class Echo:
        def __call__(self, batch: dict[str, object]) -> dict[str, object]:
            return batch

    one_worker = WorkerResources(workers=1, cpus=1, gpus=0)
    rows = with_timeout(map_shards([{"n": n} for n in range(8)], Echo, [], one_worker), seconds=120)
    next(rows)
    rows.close()
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != 2:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.1)


def test_what_object_stores_move_to_disk_is_known(ray_cluster):
    before = spilled_bytes()
    # More than the cluster's 500 MB.
    kept = [ray.put(np.zeros(60 << 20, np.uint8)) for _ in range(12)]
    assert spilled_bytes() - before >= 2 * 60 << 20
    del kept


def test_drift_is_stated_and_ends_the_run_with_a_status_of_its_own_when_asked(
    model, tmp_path, run_record, capfd
):
    images = tmp_path / "noise"
    images.mkdir()
    noise = np.random.default_rng(0)
    for i in range(20):
        pixels = noise.integers(0, 256, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")
    arguments = ["--model", model, "--input", images]
    assert run_score(*arguments, "--output", tmp_path / "a", "--exit_on_drift") == ExitStatus.DRIFT
    drift = run_record(tmp_path / "a")["drift"]
    assert drift["ks_statistic"] > 0.9
    assert drift["ks_p_value"] < 0.001
    assert (drift["sample"], drift["verdict"]) == (20, "unlike")
    assert "drift     100% of the images are unlike all of the 10 held-out images: another" in (
        capfd.readouterr().out
    )
    assert run_score(*arguments, "--output", tmp_path / "b") == ExitStatus.DONE


def test_figures_of_a_run_are_offered_to_prometheus(scored):
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 60
    text = ""
    while 'outcome="truncated"' not in text:
        assert time.monotonic() < deadline, text[:500]
        with urllib.request.urlopen(url) as response:
            text = response.read().decode()
        time.sleep(0.5)
    assert re.search(r'^ray_csflow_images_total\{.*outcome="scored".*\} \d+', text, re.M)
    assert re.search(r'^ray_csflow_stage_seconds_total\{.*stage="decode".*\}', text, re.M)


def test_a_large_run_keeps_a_fair_sample_of_its_scores():
    row = SHARD_ROW | {"images": 5, "scored": 5}
    runs, scores = 4000, 60
    kept = np.zeros(scores)
    for seed in range(runs):
        tally = Tally(sample=Sample(10, generator=random.Random(seed)))
        for first in range(0, scores, 5):
            scores_of_shard = list(map(float, range(first, first + 5)))
            both = {"anomaly_scores": scores_of_shard, "global_scores": scores_of_shard}
            some = {"shard": str(first)} | both
            tally.add(row | some)
            tally.add(row | some | {"is_published": False})  # another attempt counts them
            assert len(tally.sample.values) == min(10, first + 5)
        assert len(set(tally.sample.values)) == 10
        kept[np.array([score for score, _ in tally.sample.values], int)] += 1
    # Each score is kept in a sixth of the runs, the first ones as often as the last ones.
    assert abs(kept - runs / 6).max() < 4 * (runs * 1 / 6 * 5 / 6) ** 0.5
    for tenth in kept.reshape(6, 10).sum(1):
        assert abs(tenth - runs * 10 / 6) < 3 * (runs * 10 * 1 / 6 * 5 / 6) ** 0.5
