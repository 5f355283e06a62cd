"""The evaluation job, on Parquet files in the schema of a scoring job."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from csflow.errors import ExitStatus, WrongUse
from csflow.evaluate import EvaluateConfig, evaluate, image_metrics, mvtec_labels, read_labels
from csflow.scores import SCORES
from csflow.storage import Location

NIGHT = datetime(2026, 9, 28, 2, tzinfo=UTC)


def write_scores(output: Path, scores: dict[str, float], model_id: str = "m1", night: int = 0) -> None:
    scored_at = NIGHT + timedelta(days=night)
    rows = [
        {
            "image_uri": uri,
            "image_version": f"v{night}",
            "image_height": 8,
            "image_width": 8,
            "anomaly_score": score,
            "scale_scores": [score],
            "p_value": 0.5,
            "is_anomalous": False,
            "anomaly_map": [score] * 4,
            "map_height": 2,
            "map_width": 2,
            "peak_y": 2.0,
            "peak_x": 2.0,
            "run_id": "r1",
            "scored_at": scored_at,
        }
        for uri, score in scores.items()
    ]
    folder = output / "scores" / f"model_id={model_id}" / f"date={scored_at.date()}"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, SCORES), folder / f"part-{night}.parquet", compression="zstd")


def write_labels(path: Path, labels: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("image_uri,label\n" + "".join(f"{uri},{label}\n" for uri, label in labels.items()))
    return str(path)


def run(tmp_path: Path, **settings: Any) -> dict[str, Any]:
    output = tmp_path / "result" / "evaluation.json"
    config = EvaluateConfig(scores=str(tmp_path / "out"), output=str(output), **settings)
    assert evaluate(config) == ExitStatus.DONE
    return json.loads(output.read_text())


def test_metrics_of_a_ranking_with_ties_are_those_computed_by_hand() -> None:
    # Of the 3 x 4 pairs of a defective and a normal image 10 are in order and 2 are tied: (10 + 2/2) / 12.
    labels = [1, 1, 1, 0, 0, 0, 0]
    scores = [0.9, 0.7, 0.5, 0.5, 0.5, 0.2, 0.1]
    metrics = image_metrics(labels, scores)
    assert metrics["image_auroc"] == pytest.approx(11 / 12)
    # All three are found at 0.5, where two of four normal images are too.
    assert metrics["fpr_at_95_recall"] == pytest.approx(2 / 4)
    assert metrics["average_precision"] == pytest.approx(1 / 3 + 1 / 3 + 3 / 5 / 3)
    # At 0.7: two found, none wrong, one missed.
    assert metrics["best_f1"] == pytest.approx(4 / 5)
    assert metrics["best_f1_threshold"] == pytest.approx(0.7)


def test_a_score_that_is_no_number_ranks_highest() -> None:
    with_number = image_metrics([0, 0, 1, 1], [1.0, 3.0, 2.0, 4.0])
    assert image_metrics([0, 0, 1, 1], [1.0, 3.0, 2.0, np.nan])["image_auroc"] == with_number["image_auroc"]
    assert image_metrics([0, 0, 1, 1], [1.0, np.inf, 2.0, 3.0])["image_auroc"] == pytest.approx(0.5)


def test_evaluation_holds_metrics_and_counts_and_prints_them(tmp_path: Path, capsys: Any) -> None:
    write_scores(tmp_path / "out", {"s3://b/a.png": 1.0, "s3://b/b.png": 2.0, "s3://b/unlabelled.png": 9.0})
    labels = write_labels(tmp_path / "labels.csv", {"s3://b/a.png": 0, "s3://b/b.png": 1, "s3://b/c.png": 1})
    evaluation = run(tmp_path, labels=labels)
    assert evaluation["model_id"] == "m1"
    assert evaluation["images"] == {"labelled": 3, "missing": 1, "normal": 1, "defective": 1}
    assert evaluation["metrics"]["image_auroc"] == 1.0
    printed = capsys.readouterr().out
    assert "1 of 3 labelled images have no score" in printed
    assert "image_auroc         1.0000" in printed


def test_the_latest_score_of_an_image_counts(tmp_path: Path) -> None:
    write_scores(tmp_path / "out", {"/d/a.png": 1.0, "/d/b.png": 2.0}, night=1)
    write_scores(tmp_path / "out", {"/d/a.png": 5.0}, night=0)
    labels = write_labels(tmp_path / "labels.csv", {"/d/a.png": 0, "/d/b.png": 1})
    assert run(tmp_path, labels=labels)["metrics"]["image_auroc"] == 1.0


def test_the_scores_folder_itself_is_accepted_even_inside_an_output_of_that_name(tmp_path: Path) -> None:
    write_scores(tmp_path / "scores", {"/d/a.png": 1.0, "/d/b.png": 2.0})
    labels = write_labels(tmp_path / "labels.csv", {"/d/a.png": 0, "/d/b.png": 1})
    for location in (tmp_path / "scores", tmp_path / "scores" / "scores"):
        assert evaluate(EvaluateConfig(scores=str(location), labels=labels)) == ExitStatus.DONE


def test_relative_image_uris_start_at_the_folder_of_the_label_table(tmp_path: Path) -> None:
    write_scores(tmp_path / "out", {f"{tmp_path}/images/{name}.png": 1.0 for name in "abc"})
    labels = {"../images/a.png": 0, f"{tmp_path}/images/b.png": 1, f"file://{tmp_path}/images/c.png": 1}
    table = write_labels(tmp_path / "labels" / "labels.csv", labels)
    assert run(tmp_path, labels=table)["images"]["missing"] == 0


def test_relative_image_uris_of_a_table_in_a_store_start_there() -> None:
    location = Location("memory://bucket/labels.csv")
    location.write(b"image_uri,label\nimages/a.png,0\n/local/b.png,1\ns3://other/c.tar!/c.png,1\n")
    assert read_labels(location) == {
        "memory://bucket/images/a.png": 0,
        "/local/b.png": 1,
        "s3://other/c.tar!/c.png": 1,
    }


def test_labels_may_be_parquet_with_further_columns(tmp_path: Path) -> None:
    write_scores(tmp_path / "out", {"/d/a.png": 1.0, "/d/b.png": 2.0})
    table = pa.table(
        {
            "image_uri": pa.array(["/d/a.png", "/d/b.png"], pa.large_string()),
            "label": [False, True],
            "mask_uri": [None, "/d/b-mask.png"],
        }
    )
    pq.write_table(table, tmp_path / "labels.parquet")
    assert run(tmp_path, labels=str(tmp_path / "labels.parquet"))["metrics"]["image_auroc"] == 1.0


def test_mvtec_layout_labels_the_test_images_by_their_folder(tmp_path: Path) -> None:
    assert mvtec_labels(
        [
            "s3://b/bottle/test/good/000.png",
            "s3://b/bottle.tar!/bottle/test/crack/000.png",
            "s3://b/bottle/train/good/000.png",
            "s3://b/bottle/ground_truth/crack/000_mask.png",
            "test/good/000.png",
        ]
    ) == {
        "s3://b/bottle/test/good/000.png": 0,
        "s3://b/bottle.tar!/bottle/test/crack/000.png": 1,
        "test/good/000.png": 0,
    }
    write_scores(tmp_path / "out", {"/m/test/good/0.png": 1.0, "/m/test/hole/0.png": 2.0, "/m/x.png": 3.0})
    images = run(tmp_path, layout="mvtec")["images"]
    assert images == {"labelled": 2, "missing": 0, "normal": 1, "defective": 1}


def test_one_of_several_models_must_be_chosen(tmp_path: Path) -> None:
    labels = write_labels(tmp_path / "labels.csv", {"/d/a.png": 0, "/d/b.png": 1})
    write_scores(tmp_path / "out", {"/d/a.png": 1.0, "/d/b.png": 2.0}, model_id="m1")
    write_scores(tmp_path / "out", {"/d/a.png": 2.0, "/d/b.png": 1.0}, model_id="m2")
    with pytest.raises(WrongUse, match="several models; choose with --model_id: m1, m2"):
        run(tmp_path, labels=labels)
    with pytest.raises(WrongUse, match="no scores of model m3; choose with --model_id: m1, m2"):
        run(tmp_path, labels=labels, model_id="m3")
    assert run(tmp_path, labels=labels, model_id="m2")["metrics"]["image_auroc"] == 0.0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("image_uri,defect\n/d/a.png,0\n", r"labels\.csv lacks the column label"),
        ("uri,label\n/d/a.png,0\n", r"labels\.csv lacks the column image_uri"),
        ("image_uri,label\n/d/a.png,0.33\n", r"/d/a\.png has the label 0\.33; label must be 0 or 1"),
        ("image_uri,label\n/d/a.png,\n", r"/d/a\.png has the label None"),
        ("image_uri,label\n/d/a.png,good\n", r"labels\.csv cannot be read"),
        ("image_uri,label\n/d/a.png,0\n/d/a.png,1\n", r"/d/a\.png has both labels"),
        ("image_uri,label\n/d/a.png,0\n/d/b.png,0\n", r"all 2 labelled images with a score are normal"),
        ("image_uri,label\n/elsewhere/a.png,0\n", r"labelled /elsewhere/a\.png, scored /d/a\.png"),
        ("image_uri,label\n", r"no image labelled in .*labels\.csv has a score"),
        ("", r"labels\.csv cannot be read"),
    ],
)
def test_a_label_table_that_cannot_be_used_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    write_scores(tmp_path / "out", {"/d/a.png": 1.0, "/d/b.png": 2.0})
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(WrongUse, match=complaint):
        run(tmp_path, labels=str(tmp_path / "labels.csv"))


def test_other_wrong_uses_name_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match=r"out holds no scores .*--scores takes the --output"):
        run(tmp_path, labels="labels.csv")
    write_scores(tmp_path / "out", {"/d/a.png": 1.0})
    with pytest.raises(WrongUse, match=r"nowhere\.csv does not exist"):
        run(tmp_path, labels=str(tmp_path / "nowhere.csv"))
    with pytest.raises(WrongUse, match=r"must be a \.csv or \.parquet file"):
        run(tmp_path, labels=str(tmp_path / "labels.xlsx"))
    with pytest.raises(WrongUse, match="either --labels"):
        run(tmp_path)
    with pytest.raises(WrongUse, match="no image below a test/<class>/ folder"):
        run(tmp_path, layout="mvtec")


def test_files_that_are_no_scores_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "scores" / "model_id=m1" / "date=2026-09-28"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"image_uri": ["/d/a.png"]}), folder / "part.parquet")
    with pytest.raises(WrongUse, match=r"part\.parquet lacks the columns image_version"):
        run(tmp_path, layout="mvtec")
    (folder / "part.parquet").write_bytes(b"no parquet")
    with pytest.raises(WrongUse, match="a file that is no Parquet"):
        run(tmp_path, layout="mvtec")


def test_the_job_leaves_with_status_2_and_one_line_on_wrong_use(tmp_path: Path) -> None:
    job = Path(__file__).parents[1] / "jobs" / "evaluate.py"
    command = [sys.executable, str(job), "--scores", str(tmp_path), "--labels", "labels.csv"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (ExitStatus.WRONG_USE, "", 1)
    assert done.stderr.startswith(f"error: {tmp_path} holds no scores")
