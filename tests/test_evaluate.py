"""The evaluation job, on Parquet files in the schema of a scoring job."""

import io
import json
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import xml.etree.ElementTree
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import imagecodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from scipy import ndimage
from scored_output import write_record
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from csflow import __version__
from csflow.config import parse
from csflow.errors import ExitStatus, WrongUse
from csflow.evaluation import EvaluateConfig, evaluate, image_metrics
from csflow.evaluation.labels import Label, check_mask_schemes, mvtec_labels, read_labels
from csflow.evaluation.masks import decode_mask
from csflow.evaluation.pixel_metrics import FPR_LIMIT, PixelHistograms, upsample
from csflow.evaluation.ranking import Ranking, auroc_loss, bootstrap_intervals, share
from csflow.output.runs import ScoredWith
from csflow.output.schemas import SCORES
from csflow.preprocessing import whole
from csflow.regions import find_regions
from csflow.storage import Location

NIGHT = datetime(2026, 9, 28, 2, tzinfo=UTC)


def write_scores(
    output: Path,
    scores: dict[str, float],
    model_id: str = "m1",
    night: int = 0,
    size: tuple[int, int] = (8, 8),
    maps: dict[str, np.ndarray] | None = None,
    flagged: tuple[str, ...] = (),
    region_threshold: float | None = None,
) -> None:
    """Rows as a scoring job writes them; `maps` gives the anomaly maps, None for those of --maps none."""
    scored_at = NIGHT + timedelta(days=night)
    rows = []
    for uri, score in scores.items():
        anomaly_map = np.full((2, 2), score) if maps is None else maps.get(uri)
        height, width = (2, 2) if anomaly_map is None else anomaly_map.shape
        rows.append(
            {
                "image_uri": uri,
                "image_version": f"v{night}",
                "image_height": size[0],
                "image_width": size[1],
                "anomaly_score": score,
                "scale_scores": [score],
                "p_value": 0.5,
                "is_anomalous": uri in flagged,
                "anomaly_map": None if anomaly_map is None else anomaly_map.ravel(),
                "map_height": height,
                "map_width": width,
                "peak_y": 2.0,
                "peak_x": 2.0,
                "run_id": "r1",
                "scored_at": scored_at,
                "region_threshold": region_threshold,
                "regions": None
                if region_threshold is None
                else regions_of(anomaly_map, region_threshold, size),
            }
        )
    folder = output / "scores" / f"model_id={model_id}" / f"date={scored_at.date()}"
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, SCORES), folder / f"part-{night}.parquet", compression="zstd")


def regions_of(anomaly_map: np.ndarray, threshold: float, size: tuple[int, int]) -> list[dict[str, float]]:
    """The regions of one map, with what the evaluation reads of them."""
    found = find_regions(anomaly_map[None], threshold, size[:1], size[1:], np.array([whole(*size)]))
    return [{"area": area, "peak": peak} for area, peak in zip(found.area_N, found.peak_N, strict=True)]


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
    assert "warning             1 normal and 1 defective images are too few to tell a rate" in printed
    assert "image_auroc         1.0000   1.0000 - 1.0000" in printed
    assert (
        "best_f1             1.0000   1.0000 - 1.0000   threshold 2.0000, chosen on these labels" in printed
    )


def test_an_evaluation_in_which_nothing_could_be_flagged_says_why(tmp_path: Path, capsys: Any) -> None:
    write_scores(tmp_path / "out", {"/d/a.png": 1.0, "/d/b.png": 2.0})
    labels = write_labels(tmp_path / "labels.csv", {"/d/a.png": 0, "/d/b.png": 1})
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"format_version": 4, "model_id": "m1"}')

    def hold_out(images: int) -> None:
        heldout = {
            "image_uri": ["a"] * images,
            "image_version": ["1"] * images,
            "anomaly_score": [0.5] * images,
        }
        pq.write_table(pa.table(heldout), model / "calibration.parquet")

    hold_out(12)
    write_record(tmp_path / "out", "1", model=ScoredWith(location=str(model), model_id="m1"))
    assert "smallest p-value is 0.077" in run(tmp_path, labels=labels)["why_none_is_flagged"]
    assert "no flags            12 images are held out" in capsys.readouterr().out
    # With 19 held-out images the run's rate of 0.05 can flag, and has found nothing.
    hold_out(19)
    assert run(tmp_path, labels=labels)["why_none_is_flagged"] is None


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
    assert {uri: label.is_defective for uri, label in read_labels(location).items()} == {
        "memory://bucket/images/a.png": False,
        "/local/b.png": True,
        "s3://other/c.tar!/c.png": True,
    }


def test_labels_may_be_parquet_with_further_columns(tmp_path: Path) -> None:
    write_scores(tmp_path / "out", {"/d/a.png": 1.0, "/d/b.png": 2.0})
    table = pa.table(
        {
            "image_uri": pa.array(["/d/a.png", "/d/b.png"], pa.large_string()),
            "label": [False, True],
            "operator": [None, "B. Franz"],
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
        "s3://b/bottle/test/good/000.png": Label(False),
        "s3://b/bottle.tar!/bottle/test/crack/000.png": Label(
            True, "crack", "s3://b/bottle.tar!/bottle/ground_truth/crack/000_mask.png"
        ),
        "test/good/000.png": Label(False),
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
    place = {"model": ScoredWith(location="/models/boards", model_id="m2")}
    write_record(tmp_path / "out", "1", **place)
    with pytest.raises(WrongUse, match=r"--model_id: m1, m2 \(/models/boards\)$"):
        run(tmp_path, labels=labels)
    named = {"model": ScoredWith(location="/models/boards", model_id="m2", model_name="board")}
    write_record(tmp_path / "out", "2", **named)
    with pytest.raises(WrongUse, match=r"--model_id: m1, m2 \(board\)$"):
        run(tmp_path, labels=labels)
    with pytest.raises(WrongUse, match="no scores of model m3; choose with --model_id: m1, m2"):
        run(tmp_path, labels=labels, model_id="m3")
    assert run(tmp_path, labels=labels, model_id="m2")["metrics"]["image_auroc"] == 0.0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("image_uri,defect\n/d/a.png,0\n", r"labels\.csv lacks the column label"),
        ("uri,label\n/d/a.png,0\n", r"labels\.csv lacks the column image_uri"),
        ("image_uri,label\n/d/a.png,0.33\n", r"/d/a\.png has '0\.33' in the column label; a label must be 0"),
        ("image_uri,label\n/d/a.png,\n", r"/d/a\.png has '' in the column label"),
        (
            "image_uri,label\n/d/b.png,1\n/d/a.png,True\n/d/c.png,bad\n",
            r"^--labels .*labels\.csv: image /d/a\.png has 'True' in the column label; a label must be 0 "
            r"\(normal\) or 1 \(defective\)$",
        ),
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
    with pytest.raises(WrongUse, match=r"--seed: .* less than or equal to 4294967295"):
        parse(EvaluateConfig, None, ["--scores", "s", "--labels", "l.csv", "--seed", str(2**32)])
    with pytest.raises(WrongUse, match=r"out holds no scores .*scores are in the --output"):
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
    assert (done.returncode, done.stderr.count("\n")) == (ExitStatus.WRONG_USE, 1)
    assert done.stdout == f"csflow {__version__} evaluate: starting\n"
    assert done.stderr.startswith(f"error: {tmp_path} holds no scores")


# --- Image metrics and their intervals -------------------------------------------------------------------


def overlapping_scores(images: int, seed: int = 0) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Labels and scores, rounded so that many are tied."""
    random = np.random.default_rng(seed)
    labels = random.random(images) < 0.3
    return labels, (random.normal(size=images) + labels).round(1)


def test_image_metrics_equal_those_of_scikit_learn() -> None:
    labels, scores = overlapping_scores(700)
    metrics = image_metrics(labels, scores)
    assert metrics["image_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert metrics["average_precision"] == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    fpr, recall, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert metrics["fpr_at_95_recall"] == pytest.approx(fpr[np.argmax(recall >= 0.95)], abs=1e-12)
    f1 = [
        2 * (labels & (scores >= t)).sum() / (labels.sum() + (scores >= t).sum()) for t in np.unique(scores)
    ]
    assert metrics["best_f1"] == pytest.approx(max(f1), abs=1e-12)
    assert metrics["best_f1_threshold"] == np.unique(scores)[np.argmax(f1)]


def test_the_interval_of_a_loss_of_auroc_holds_the_true_loss_and_minds_that_images_are_the_same() -> None:
    random = np.random.default_rng(0)

    def drawn(images: int) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        labels = np.arange(images) % 2
        before = random.normal(size=images) + 1.5 * labels
        return labels, before, before + 0.7 * random.normal(size=images)

    labels, before, after = drawn(200_000)
    true = auroc_loss(labels, before, after, resamples=1)[0]
    assert 0.02 < true < 0.06
    held, widths, apart = 0, [], []
    for _ in range(100):
        labels, before, after = drawn(200)
        loss, (low, high) = auroc_loss(labels, before, after, resamples=200)
        held += low <= true <= high
        widths.append(high - low)
        assert low <= loss <= high
        apart.append(np.ptp(bootstrap_intervals(Ranking.of(labels, after), 200)["image_auroc"]))
    assert 88 <= held <= 100
    assert np.mean(widths) < 0.8 * np.mean(apart)


def test_bootstrap_intervals_hold_what_resampling_the_images_gives() -> None:
    labels, scores = overlapping_scores(200)
    found = bootstrap_intervals(Ranking.of(labels, scores), 800, seed=1)
    random = np.random.default_rng(2)
    groups = [np.flatnonzero(labels), np.flatnonzero(~labels)]
    drawn = [np.concatenate([random.choice(group, len(group)) for group in groups]) for _ in range(800)]
    expected = [image_metrics(labels[rows], scores[rows]) for rows in drawn]
    for name, interval in found.items():
        reference = np.quantile([metrics[name] for metrics in expected], [0.025, 0.975])
        np.testing.assert_allclose(interval, reference, atol=0.03)


def test_a_bootstrap_interval_repeats_itself_and_holds_the_true_value_nineteen_times_of_twenty() -> None:
    covered = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        labels = np.arange(120) < 60
        ranking = Ranking.of(labels, random.normal(size=120) + labels)
        low, high = bootstrap_intervals(ranking, 200)["image_auroc"]
        assert (low, high) == bootstrap_intervals(ranking, 200)["image_auroc"]
        covered += low <= 0.7602 <= high  # Φ(1/√2)
    assert covered >= 51  # below that with a probability of 1 in 500 at 95 % coverage


def test_flagged_shares_are_given_with_exact_intervals(tmp_path: Path) -> None:
    scores = {f"/d/good{i}.png": float(i) for i in range(20)} | {f"/d/bad{i}.png": 30.0 for i in range(4)}
    write_scores(
        tmp_path / "out", scores, flagged=("/d/good19.png", "/d/bad0.png", "/d/bad1.png", "/d/bad2.png")
    )
    labels = write_labels(tmp_path / "labels.csv", {uri: int("bad" in uri) for uri in scores})
    evaluation = run(tmp_path, labels=labels)
    assert evaluation["metrics"]["flag_fpr"] == pytest.approx(1 / 20)
    assert evaluation["metrics"]["flag_recall"] == pytest.approx(3 / 4)
    # Table of Clopper and Pearson: 1 of 20.
    assert evaluation["intervals"]["flag_fpr"] == pytest.approx([0.0013, 0.2487], abs=1e-4)
    assert share([False] * 10)[1] == pytest.approx((0, 0.3085), abs=1e-4)


def test_each_defect_class_is_measured_against_all_normal_images(tmp_path: Path, capsys: Any) -> None:
    scores = {"/d/a.png": 1.0, "/d/b.png": 3.0, "/d/crack.png": 4.0, "/d/dust.png": 2.0, "/d/odd.png": 5.0}
    write_scores(tmp_path / "out", scores)
    (tmp_path / "labels.csv").write_text(
        "image_uri,label,defect_class\n/d/a.png,0,\n/d/b.png,0,\n/d/odd.png,1,\n"
        "/d/crack.png,1,crack\n/d/dust.png,1,dust\n"
    )
    classes = run(tmp_path, labels=str(tmp_path / "labels.csv"))["defect_classes"]
    assert {name: found["metrics"]["image_auroc"] for name, found in classes.items()} == {
        "crack": 1.0,
        "dust": 0.5,
    }
    assert classes["dust"]["images"] == 1
    assert "dust                     1  0.5000       0.0000 - 1.0000" in capsys.readouterr().out


def test_a_folder_gets_the_metrics_and_plots_that_are_well_formed(tmp_path: Path) -> None:
    labels, scores = overlapping_scores(3000)
    scores = scores + np.arange(3000) * 1e-6  # all distinct: more points than a plot needs
    uris = [f"/d/{i}.png" for i in range(3000)]
    write_scores(tmp_path / "out", dict(zip(uris, scores, strict=True)))
    table = write_labels(tmp_path / "labels.csv", dict(zip(uris, labels.astype(int), strict=True)))
    config = EvaluateConfig(
        scores=str(tmp_path / "out"), labels=table, output=str(tmp_path / "result"), bootstrap=100
    )
    assert evaluate(config) == ExitStatus.DONE
    names = {path.name for path in (tmp_path / "result").iterdir()}
    assert names == {"metrics.json", "roc.svg", "precision_recall.svg", "score_histogram.svg"}
    for path in (tmp_path / "result").glob("*.svg"):
        drawing = xml.etree.ElementTree.parse(path).getroot()
        assert len(drawing.findall("{http://www.w3.org/2000/svg}polyline")) in (1, 2)
        texts = [text.text for text in drawing.findall("{http://www.w3.org/2000/svg}text")]
        of_rates = ["0", "0.25", "0.5", "0.75", "1"]
        ticks = [text for text in texts if text and text.replace(".", "").isdecimal()]
        assert path.name == "score_histogram.svg" or ticks == of_rates * 2
        assert path.stat().st_size < 30_000


# --- Pixel metrics against a slow reference --------------------------------------------------------------


def defects(images: int, size: tuple[int, int], seed: int = 0) -> list[tuple[np.ndarray, NDArray[np.bool_]]]:
    """Maps in a native resolution and masks: some empty, some of several regions that touch at corners."""
    random = np.random.default_rng(seed)
    made = []
    for i in range(images):
        mask_HW = np.zeros(size, bool)
        for _ in range(i % 4):
            y, x = random.integers(0, size[0] - 9), random.integers(0, size[1] - 9)
            mask_HW[y : y + random.integers(2, 9), x : x + random.integers(2, 9)] = True
        if i % 4 == 3:
            mask_HW[np.arange(5), np.arange(5)] = True  # one region by corners alone
        small = np.asarray(Image.fromarray(mask_HW.astype(np.float32)).resize((size[1] // 8, size[0] // 8)))
        noise = random.chisquare(4, small.shape) / 4
        made.append(((noise + 4 * small).astype(np.float32), mask_HW))
    return made


def exact_aupro(images: list[tuple[np.ndarray, NDArray[np.bool_]]]) -> float:
    """Every value a threshold, every region looked at anew for each of them."""
    maps = [upsample(anomaly_map, *mask.shape) for anomaly_map, mask in images]
    regions = []
    for level, (_, mask) in zip(maps, images, strict=True):
        numbers, count = ndimage.label(mask, np.ones((3, 3)))
        regions += [np.sort(level[numbers == number]) for number in range(1, count + 1)]
    normal = np.sort(np.concatenate([level[~mask] for level, (_, mask) in zip(maps, images, strict=True)]))
    thresholds = np.unique(np.concatenate([level.ravel() for level in maps]))[::-1]
    fpr, pro = [0.0], [0.0]
    for threshold in thresholds:
        fpr.append(1 - np.searchsorted(normal, threshold) / len(normal))
        pro.append(np.mean([1 - np.searchsorted(region, threshold) / len(region) for region in regions]))
    end = np.searchsorted(fpr, FPR_LIMIT, side="right")
    x = np.append(fpr[:end], FPR_LIMIT)
    y = np.append(pro[:end], np.interp(FPR_LIMIT, fpr[end - 1 : end + 1], pro[end - 1 : end + 1]))
    return float(np.trapezoid(y, x) / FPR_LIMIT)


def counted(images: list[tuple[np.ndarray, NDArray[np.bool_]]]) -> PixelHistograms:
    histograms = PixelHistograms()
    for anomaly_map, mask in images:
        histograms.add(anomaly_map, mask)
    return histograms


@pytest.mark.parametrize("seed", [0, 1])
def test_binned_pixel_metrics_equal_the_exact_ones_within_their_stated_error(seed: int) -> None:
    images = defects(12, (48, 64), seed)
    histograms = counted(images)
    auroc, aupro = histograms.auroc(), histograms.aupro()
    levels = np.concatenate([upsample(m, *mask.shape).ravel() for m, mask in images])
    exact_auroc = roc_auc_score(np.concatenate([mask.ravel() for _, mask in images]), levels)
    assert abs(auroc.value - exact_auroc) <= auroc.binning_error + 1e-9
    assert abs(aupro.value - exact_aupro(images)) <= aupro.binning_error + 1e-9
    assert max(auroc.binning_error, aupro.binning_error) < 5e-4
    assert 0.3 < aupro.value < 0.99  # neither trivial nor hopeless
    assert histograms.regions == sum(ndimage.label(mask, np.ones((3, 3)))[1] for _, mask in images)


def test_tied_pixels_count_half_and_a_perfect_map_has_the_whole_area() -> None:
    mask_HW = np.zeros((16, 16), bool)
    mask_HW[4:8, 4:8] = True
    flat = counted([(np.ones((16, 16), np.float32), mask_HW)])
    assert flat.auroc() == (0.5, 0.5)
    assert flat.aupro().value == pytest.approx(0.15)  # below the diagonal up to 0.3
    perfect = counted([(mask_HW.astype(np.float32), mask_HW)])
    assert (perfect.auroc().value, perfect.aupro().value) == (1.0, 1.0)


def test_a_small_region_weighs_as_much_as_a_large_one() -> None:
    mask_HW = np.zeros((32, 32), bool)
    mask_HW[:16, :16] = True
    mask_HW[30, 30] = True
    found = np.zeros((32, 32), np.float32)
    found[:16, :16] = 1
    histograms = counted([(found, mask_HW)])
    fpr, pro = histograms.pro_curve()
    assert pro[np.flatnonzero(fpr == 0).max()] == pytest.approx(1 / 2)
    assert histograms.auroc().value == pytest.approx((256 + 1 / 2) / 257)


def test_map_values_that_are_no_number_rank_highest() -> None:
    mask_HW = np.zeros((4, 4), bool)
    mask_HW[0, 0] = True
    anomaly_map = np.ones((4, 4), np.float32)
    for value in (np.nan, np.inf):
        anomaly_map[0, 0] = value
        assert counted([(anomaly_map, mask_HW)]).auroc().value == 1.0
    with pytest.raises(ValueError, match="cannot be negative"):
        counted([(-anomaly_map, mask_HW)])


def test_maps_are_upsampled_as_torch_does_it() -> None:
    anomaly_map = np.random.default_rng(0).random((3, 5), np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(anomaly_map)[None, None], size=(17, 40), mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(upsample(anomaly_map, 17, 40), expected[0, 0], atol=1e-6)


def test_pixels_count_where_the_box_puts_them_and_lowest_beyond_it() -> None:
    anomaly_map, mask_HW = defects(4, (64, 64))[3]
    cropped, letterboxed = np.zeros((64, 96), bool), mask_HW[16:48]
    cropped[:, 16:80] = mask_HW
    cropped[:4, :4] = True  # a defect that the model cannot see
    seen, boxed, crop = PixelHistograms(), PixelHistograms(), PixelHistograms()
    boxed.add(anomaly_map, letterboxed, [-16, 0, 48, 64])
    seen.add(upsample(anomaly_map, 64, 64)[16:48], letterboxed)
    assert boxed.auroc().value == pytest.approx(seen.auroc().value, abs=1e-3)
    assert boxed.aupro().value == pytest.approx(seen.aupro().value, abs=1e-3)
    crop.add(anomaly_map, cropped, [0, 16, 64, 80])
    levels = np.zeros((64, 96), np.float32)
    levels[:, 16:80] = upsample(anomaly_map, 64, 64)
    expected = roc_auc_score(cropped.ravel(), levels.ravel())
    assert crop.auroc().value == pytest.approx(expected, abs=crop.auroc().binning_error + 1e-6)
    assert crop.normal_pixels + crop.defective_pixels == 64 * 96


def test_ten_million_pixels_need_no_more_memory_than_one_million() -> None:
    anomaly_map, mask_HW = defects(4, (512, 512))[3]
    peaks = []
    for images in (4, 40):
        tracemalloc.start()
        assert counted([(anomaly_map, mask_HW)] * images).regions
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.05 * peaks[0] < 64 << 20


# --- Pixel metrics of scored images ----------------------------------------------------------------------


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def pixel_labels() -> dict[str, tuple[np.ndarray, NDArray[np.bool_]]]:
    """Map and mask by image name; an image is defective if its mask is not empty."""
    return {f"{i}.png": image for i, image in enumerate(defects(8, (40, 48)))}


def write_pixels(output: Path, root: str, images: dict[str, tuple[np.ndarray, NDArray[np.bool_]]]) -> None:
    folders = {name: "crack" if mask.any() else "good" for name, (_, mask) in images.items()}
    maps = {f"{root}/test/{folders[name]}/{name}": m for name, (m, _) in images.items()}
    write_scores(output, {uri: float(m.mean()) for uri, m in maps.items()}, size=(40, 48), maps=maps)


def assert_exact(pixels: dict[str, Any], images: dict[str, tuple[np.ndarray, NDArray[np.bool_]]]) -> None:
    masks = np.concatenate([mask.ravel() for _, mask in images.values()])
    levels = np.concatenate([upsample(m, *mask.shape).ravel() for m, mask in images.values()])
    error = pixels["binning_error"]
    assert pixels["metrics"]["pixel_auroc"] == pytest.approx(
        roc_auc_score(masks, levels), abs=error["pixel_auroc"]
    )
    assert pixels["metrics"]["aupro"] == pytest.approx(exact_aupro(list(images.values())), abs=error["aupro"])


def image_counts(**counts: int) -> dict[str, int]:
    names = ("normal", "with_mask", "without_mask", "empty_mask", "thresholded_mask")
    return dict.fromkeys(names, 0) | counts


def test_mvtec_layout_finds_the_masks_in_a_store_and_in_an_archive(
    tmp_path: Path, s3_bucket: str, pixel_labels: Any
) -> None:
    bucket = s3_bucket.removeprefix("s3://")
    tar = tarfile.open(tmp_path / "part.tar", "w")  # noqa: SIM115
    for name, (_, mask) in pixel_labels.items():
        data = png(mask.astype(np.uint8) * 255)
        if mask.any():
            key = f"part/ground_truth/crack/{name.replace('.png', '_mask.png')}"
            boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=data)
            member = tarfile.TarInfo(key)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    tar.close()
    for number, root in enumerate((f"{s3_bucket}/part", f"{tmp_path}/part.tar!/part")):
        write_pixels(tmp_path / f"out{number}", root, pixel_labels)
        config = EvaluateConfig(
            scores=str(tmp_path / f"out{number}"), layout="mvtec", output=str(tmp_path / "result")
        )
        assert evaluate(config) == ExitStatus.DONE
        pixels = json.loads((tmp_path / "result" / "metrics.json").read_text())["pixels"]
        assert pixels["images"] == image_counts(normal=2, with_mask=6)
        assert pixels["empty_masks"] == []
        assert_exact(pixels, pixel_labels)
        assert (tmp_path / "result" / "pro.svg").exists()


def test_a_label_table_names_masks_and_the_latest_map_of_an_image_counts(
    tmp_path: Path, pixel_labels: Any, capsys: Any
) -> None:
    write_pixels(tmp_path / "out", "/d", pixel_labels)
    stale = {uri: (m[::-1], mask) for uri, (m, mask) in pixel_labels.items()}
    maps = {f"/d/test/crack/{name}": m for name, (m, _) in stale.items()}
    write_scores(tmp_path / "out", dict.fromkeys(maps, 0.5), night=-1, size=(40, 48), maps=maps)
    lines = ["image_uri,label,mask_uri"]
    for name, (_, mask) in pixel_labels.items():
        (tmp_path / name).write_bytes(png(mask.astype(np.uint8)))  # class indices: 1 is nonzero
        folder = "crack" if mask.any() else "good"
        lines.append(f"/d/test/{folder}/{name},{int(mask.any())},{name if mask.any() else ''}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    assert_exact(run(tmp_path, labels=str(tmp_path / "labels.csv"))["pixels"], pixel_labels)
    assert "masks               6 images, " in capsys.readouterr().out


def test_a_label_table_names_masks_of_its_own_scheme_and_of_its_images_schemes_alone(tmp_path: Path) -> None:
    write_scores(tmp_path / "out", {"/d/a.png": 1.0, "/d/b.png": 2.0})
    table = Location(str(tmp_path / "labels.csv"))
    table.write(
        b"image_uri,label,mask_uri\n/d/a.png,0,\ns3://d/c.png,1,s3://d/m.png\n/d/b.png,1,s3://d/m.png\n"
    )
    with pytest.raises(WrongUse, match=r"names the mask s3://d/m\.png, .*; .* pass --allow_schemes s3$"):
        run(tmp_path, labels=table.url)
    check_mask_schemes(read_labels(table), table, ["s3"])
    check_mask_schemes({"s3://d/c.png": Label(True, mask_uri="s3a://d/m.png")}, table, [])
    with pytest.raises(WrongUse, match="whose scheme file is neither"):
        check_mask_schemes({"s3://d/c.png": Label(True, mask_uri="/m.png")}, Location("gs://d/l.csv"), ["s3"])


def test_defective_images_without_a_mask_are_left_out_of_pixel_metrics_and_counted(
    tmp_path: Path, capsys: Any
) -> None:
    images = {f"{i}.png": image for i, image in enumerate(defects(4, (40, 48)))}
    write_pixels(tmp_path / "out", f"{tmp_path}/part", images)
    assert run(tmp_path, layout="mvtec")["pixels"] == {
        "images": image_counts(normal=1, without_mask=3),
        "empty_masks": [],
    }
    assert "masks               none found" in capsys.readouterr().out
    folder = tmp_path / "part" / "ground_truth" / "crack"
    folder.mkdir(parents=True)
    (folder / "3_mask.png").write_bytes(png(images["3.png"][1]))
    pixels = run(tmp_path, layout="mvtec")["pixels"]
    assert pixels["images"] == image_counts(normal=1, with_mask=1, without_mask=2)
    assert_exact(pixels, {name: images[name] for name in ("0.png", "3.png")})
    assert "2 defective images, left out of pixel metrics" in capsys.readouterr().out
    assert "pixels" not in run(tmp_path, layout="mvtec", pixel_metrics=False)


def test_defects_found_by_regions_are_counted_by_size_and_false_regions_per_normal_image(
    tmp_path: Path, capsys: Any
) -> None:
    """Maps of 6 x 6 cells of 8 pixels. The large defect is hit, the small one is missed by one cell."""
    maps = {f"/d/{name}.png": np.zeros((6, 6), np.float32) for name in ("a", "b", "c", "d")}
    maps["/d/a.png"][0, 0] = maps["/d/a.png"][0, 5] = maps["/d/b.png"][2, 2] = 3  # a, b and c are normal
    maps["/d/d.png"][1:3, 1] = maps["/d/d.png"][5, 5] = 3
    write_scores(tmp_path / "out", dict.fromkeys(maps, 1.0), size=(48, 48), maps=maps, region_threshold=2)
    mask = np.zeros((48, 48), np.uint8)
    mask[8:28, 15:35] = 255  # 20 x 20, of which the first column lies in a hot cell
    mask[40:44, 35:40] = 255  # 4 x 5, left of a hot cell
    (tmp_path / "mask.png").write_bytes(png(mask))
    lines = ["image_uri,label,mask_uri", *(f"/d/{name}.png,0," for name in "abc"), "/d/d.png,1,mask.png"]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    regions = run(tmp_path, labels=str(tmp_path / "labels.csv"))["regions"]
    assert regions["false_regions_per_normal_image"]["mean"] == 1
    assert regions["normal_images_with_regions"]["share"] == pytest.approx(2 / 3)
    assert regions["normal_images"] == 3
    assert (regions["defects"]["defects"], regions["defects"]["recall"]["share"]) == (2, 0.5)
    by_side = {
        (size["from_side"], size["to_side"]): size["recall"]["share"] for size in regions["defects_by_side"]
    }
    assert by_side == {(0, 8): 0, (16, 32): 1}
    assert regions["regions_on_defective_images"] == 2
    assert regions["precision_on_defective_images"]["share"] == 0.5
    printed = capsys.readouterr().out
    assert "false regions       1.0000   0.0000 - 2.0000   per normal image, of 3" in printed
    assert "  16 to 32 px       1.0000" in printed


def test_scores_without_regions_have_no_metrics_of_regions(tmp_path: Path, pixel_labels: Any) -> None:
    write_pixels(tmp_path / "out", f"{tmp_path}/part", pixel_labels)
    folder = tmp_path / "part" / "ground_truth" / "crack"
    folder.mkdir(parents=True)
    (folder / "1_mask.png").write_bytes(png(pixel_labels["1.png"][1]))
    assert run(tmp_path, layout="mvtec")["regions"] is None


def float64_tiff(values_HW: NDArray[np.float64]) -> bytes:
    """What NumPy's default type becomes in scientific software; Pillow cannot write it."""
    (height, width), data = values_HW.shape, values_HW.tobytes()
    tags = {256: width, 257: height, 258: 64, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    tags |= {339: 3}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    return head + data + struct.pack("<H", len(tags)) + directory + bytes(4)


@pytest.mark.parametrize(
    ("mask", "complaint"),
    [
        (np.ones((8, 9), np.uint8), r"mask .*b\.png has 8 x 9 pixels, its image /d/b\.png has 8 x 8"),
        (b"no image", r"mask .*b\.png cannot be read \(unsupported_format"),
        (
            float64_tiff(np.ones((8, 8))),
            r"mask .*b\.png cannot be read \(unsupported_format: a TIFF .* floats of 64 bits; save it as "
            r"grey, RGB or CMYK with integers of 8 or 16 bits, or floats of 32, uncompressed or with LZW, "
            r"deflate or Zstandard\)",
        ),
        (None, r"mask .*b\.png cannot be read \(not_found"),
    ],
)
def test_a_mask_that_cannot_be_used_is_named(tmp_path: Path, mask: Any, complaint: str) -> None:
    write_scores(tmp_path / "out", {"/d/a.png": 1.0, "/d/b.png": 2.0})
    (tmp_path / "labels.csv").write_text("image_uri,label,mask_uri\n/d/a.png,0,\n/d/b.png,1,b.png\n")
    if mask is not None:
        (tmp_path / "b.png").write_bytes(mask if isinstance(mask, bytes) else png(mask))
    with pytest.raises(WrongUse, match=complaint):
        run(tmp_path, labels=str(tmp_path / "labels.csv"))


def test_scores_without_maps_are_refused_where_masks_ask_for_them(tmp_path: Path) -> None:
    write_scores(tmp_path / "out", {"/d/a.png": 1.0, "/d/b.png": 2.0}, maps={})
    (tmp_path / "labels.csv").write_text("image_uri,label,mask_uri\n/d/a.png,0,\n/d/b.png,1,b.png\n")
    (tmp_path / "b.png").write_bytes(png(np.ones((8, 8), np.uint8)))
    labels = str(tmp_path / "labels.csv")
    with pytest.raises(WrongUse, match=r"2 images, /d/a\.png first, .*--maps native, or pass --no-pixel"):
        run(tmp_path, labels=labels)
    assert "pixels" not in run(tmp_path, labels=labels, pixel_metrics=False)


def test_an_empty_mask_of_a_defective_image_counts_as_none_with_a_warning(
    tmp_path: Path, capsys: Any, pixel_labels: Any
) -> None:
    write_pixels(tmp_path / "out", f"{tmp_path}/part", pixel_labels)
    folder = tmp_path / "part" / "ground_truth" / "crack"
    folder.mkdir(parents=True)
    defective = {name: mask for name, (_, mask) in pixel_labels.items() if mask.any()}
    for name, mask in defective.items():
        (folder / name.replace(".png", "_mask.png")).write_bytes(
            png(mask if name == "3.png" else mask & False)
        )
    pixels = run(tmp_path, layout="mvtec")["pixels"]
    assert pixels["images"] == image_counts(normal=2, with_mask=1, without_mask=5, empty_mask=5)
    assert pixels["empty_masks"][0] == str(folder / "1_mask.png")
    assert_exact(pixels, {name: pixel_labels[name] for name in ("0.png", "4.png", "3.png")})
    printed = capsys.readouterr().out
    assert "5 defective images, left out of pixel metrics" in printed
    warning = f"5 masks of defective images mark no pixel and count as none, {folder / '1_mask.png'} first"
    assert warning in printed

    (folder / "3_mask.png").write_bytes(png(np.zeros((40, 48), np.uint8)))
    assert "metrics" not in run(tmp_path, layout="mvtec")["pixels"]
    assert "none marks a pixel, so no pixel metrics" in capsys.readouterr().out


def test_a_mask_that_marks_pixels_of_a_normal_image_is_refused(tmp_path: Path) -> None:
    write_scores(tmp_path / "out", {"/d/a.png": 1.0, "/d/b.png": 2.0})
    (tmp_path / "labels.csv").write_text("image_uri,label,mask_uri\n/d/a.png,0,a.png\n/d/b.png,1,b.png\n")
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(png(np.eye(8, dtype=np.uint16)))
    with pytest.raises(WrongUse, match=r"a\.png marks pixels of a normal image, /d/a\.png; correct mask or"):
        run(tmp_path, labels=str(tmp_path / "labels.csv"))


def test_masks_with_ringing_are_thresholded_and_counted(
    tmp_path: Path, capsys: Any, pixel_labels: Any
) -> None:
    write_pixels(tmp_path / "out", "/d", pixel_labels)
    lines = ["image_uri,label,mask_uri"]
    for name, (_, mask) in pixel_labels.items():
        folder = "crack" if mask.any() else "good"
        lines.append(f"/d/test/{folder}/{name},{int(mask.any())},{name if mask.any() else ''}")
        Image.fromarray(mask).convert("L").save(tmp_path / name, "JPEG", quality=90)
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    pixels = run(tmp_path, labels=str(tmp_path / "labels.csv"))["pixels"]
    assert pixels["images"] == image_counts(normal=2, with_mask=6, thresholded_mask=6)
    assert_exact(pixels, pixel_labels)
    assert "thresholded masks   6 with grey beside black and white" in capsys.readouterr().out


# --- Masks in every way that they are stored -------------------------------------------------------------

BLOCK = np.zeros((60, 80), bool)
BLOCK[20:40, 30:60] = True


def encoded(image: Image.Image | np.ndarray, image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def with_palette(index_HW: NDArray[np.uint8], *colours: tuple[int, int, int]) -> Image.Image:
    image = Image.frombytes("P", index_HW.shape[::-1], index_HW.tobytes())
    image.putpalette([channel for colour in colours for channel in colour])
    return image


def white_is_zero(stored_HW: np.ndarray) -> bytes:
    """A TIFF of these stored values, of which 0 is white."""
    return encoded(stored_HW, "TIFF").replace(
        b"\x06\x01\x03\x00\x01\x00\x00\x00\x01", b"\x06\x01\x03\x00\x01\x00\x00\x00\x00"
    )


def dots(defective: Any, other: Any) -> np.ndarray:
    """The block in two values of as many channels as they have."""
    return np.where(BLOCK[..., None], np.array(defective, np.uint8), np.array(other, np.uint8))


def quarter_turn() -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return exif


def tiff_of(samples: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, samples, metadata=None, **options)
    return file.getvalue()


INDEX = BLOCK.astype(np.uint8)
LABELS = np.where(BLOCK, np.arange(80) % 128 + 1, 0).astype(np.uint16)
"""All of them black to a decoder that keeps the high byte."""
STORED_MASKS = {
    "1 bit": encoded(BLOCK),
    "8 bits, 255": encoded(INDEX * 255),
    "8 bits, 1": encoded(INDEX),
    "16 bits, 65535": encoded(BLOCK * np.uint16(65535)),
    "16 bits, 128": encoded(BLOCK * np.uint16(128)),
    "16 bits, 1": encoded(BLOCK * np.uint16(1)),
    "16 bits, 1 to 128": encoded(LABELS),
    "16-bit colour": imagecodecs.png_encode(LABELS[..., None] * np.array([0, 1, 0], np.uint16)),
    "16 bits and alpha": imagecodecs.png_encode(np.dstack([LABELS, np.full_like(LABELS, 65535)])),
    "16-bit alpha": imagecodecs.png_encode(np.dstack([np.zeros_like(LABELS), LABELS])),
    "16-bit colour TIFF": tiff_of(LABELS[..., None] * np.array([1, 0, 0], np.uint16), photometric="rgb"),
    "16-bit planes": tiff_of(
        np.stack([LABELS * 0, LABELS, LABELS * 0]), photometric="rgb", planarconfig="separate"
    ),
    "signed big-endian TIFF": tiff_of(LABELS.astype(">i2"), byteorder=">", compression="lzw"),
    "16-bit TIFF": encoded(BLOCK * np.uint16(1), "TIFF"),
    "32-bit TIFF": encoded(BLOCK * np.int32(1), "TIFF"),
    "float TIFF": encoded(BLOCK * np.float32(1 / 1000), "TIFF"),
    "1-bit TIFF, white is zero": white_is_zero(~BLOCK),
    "8-bit TIFF, white is zero": white_is_zero(1 - INDEX),
    "16-bit TIFF, white is zero": white_is_zero((~BLOCK).astype(np.uint16)),
    "red palette": encoded(with_palette(INDEX, (0, 0, 0), (128, 0, 0))),
    "black palette": encoded(with_palette(INDEX, (0, 0, 0), (0, 0, 0))),
    "palette that begins with white": encoded(with_palette(1 - INDEX, (255, 255, 255), (0, 0, 0))),
    "palette without black": encoded(with_palette(INDEX, (120, 120, 120), (180, 120, 120))),
    "grey palette of a JPEG": encoded(
        Image.open(io.BytesIO(encoded(np.roll(INDEX, 3) * 255, "JPEG", quality=75))).convert("P")
    ),
    "red": encoded(dots((255, 0, 0), (0, 0, 0))),
    "red, the rest transparent": encoded(dots((255, 0, 0, 255), (0, 0, 0, 0))),
    "red, the rest transparent white": encoded(dots((255, 0, 0, 255), (255, 255, 255, 0))),
    "all transparent": encoded(dots((255, 255, 255, 0), (0, 0, 0, 0))),
    "black, the rest transparent": encoded(dots((0, 0, 0, 255), (0, 0, 0, 0))),
    "black, the rest transparent white": encoded(dots((0, 0, 0, 255), (255, 255, 255, 0))),
    "grey and alpha": encoded(Image.fromarray(dots((0, 255), (0, 0)))),
    "turned by EXIF": encoded(BLOCK.T[::-1] * np.uint16(1), exif=quarter_turn()),
}


@pytest.mark.parametrize("name", STORED_MASKS)
def test_a_mask_marks_the_same_pixels_however_it_is_stored(name: str) -> None:
    expected = np.roll(BLOCK, 3) if name == "grey palette of a JPEG" else BLOCK
    np.testing.assert_array_equal(decode_mask(STORED_MASKS[name]).is_defective_HW, expected)


@pytest.mark.parametrize("quality", [30, 60, 75, 90, 95, 98])
@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_ringing_is_left_out_also_where_a_jpeg_was_saved_as_another_format(
    quality: int, image_format: str
) -> None:
    for seed, (_, mask_HW) in enumerate(defects(8, (120, 160))[1:]):
        jpeg = encoded(Image.fromarray(mask_HW).convert("RGB" if seed % 2 else "L"), "JPEG", quality=quality)
        data = jpeg if image_format == "JPEG" else encoded(Image.open(io.BytesIO(jpeg)))
        found = decode_mask(data)
        assert found.is_thresholded == mask_HW.any()
        if quality >= 60:
            np.testing.assert_array_equal(found.is_defective_HW, mask_HW)
        assert (found.is_defective_HW != mask_HW).mean() < 0.001


def test_ringing_of_a_lossy_webp_and_around_a_defect_of_few_pixels_is_left_out() -> None:
    webp = encoded(Image.fromarray(BLOCK).convert("RGB"), "WEBP", quality=80)
    np.testing.assert_array_equal(decode_mask(webp).is_defective_HW, BLOCK)
    for y, x in np.ndindex(4, 4):
        mask_HW = np.zeros((32, 32), bool)
        mask_HW[8 + y, 9 + x : 11 + x] = True
        jpeg = encoded(Image.fromarray(mask_HW).convert("L"), "JPEG", quality=75)
        found = decode_mask(encoded(Image.open(io.BytesIO(jpeg)))).is_defective_HW
        np.testing.assert_array_equal(found, mask_HW)


def labelled(*levels: int, side: int = 3) -> NDArray[np.uint8]:
    """Squares of these values, some of which touch."""
    squares = np.zeros((12, 20), np.uint8)
    squares.ravel()[: len(levels)] = levels
    return np.repeat(np.repeat(squares, side, 0), side, 1)


@pytest.mark.parametrize(
    "labels_HW",
    [
        labelled(1, 255),
        labelled(1, 2, 15, 255),
        labelled(*range(1, 201)),
        labelled(*range(1, 128), side=1),
        labelled(40, 0, 80, 0, 120, 0, 160, 0, 200, 0, 240, side=1),
        np.diag(np.array([1] * 30 + [255] * 10, np.uint8)),
    ],
)
def test_labels_are_no_ringing(labels_HW: NDArray[np.uint8]) -> None:
    found = decode_mask(encoded(labels_HW))
    assert not found.is_thresholded
    np.testing.assert_array_equal(found.is_defective_HW, labels_HW > 0)


def test_the_binning_error_holds_where_the_limit_cuts_through_a_bin() -> None:
    # One bin holds nine of ten normal pixels and the only defect: whether the defect ranks before or behind
    # them, the exact curve is anywhere between the bin's lower and upper edge.
    mask_HW = np.zeros((1, 101), bool)
    mask_HW[0, 50] = True
    within = 1 + np.linspace(0, 2**-12, 90)
    for defect in (within[0] - 2**-20, within[-1] + 2**-20):
        anomaly_map = np.full((1, 101), 2, np.float32)
        anomaly_map[0, [*range(10, 50), *range(51, 101)]] = within
        anomaly_map[0, 50] = defect
        area = counted([(anomaly_map, mask_HW)]).aupro()
        exact = exact_aupro([(anomaly_map, mask_HW)])
        assert abs(area.value - exact) <= area.binning_error + 1e-9, (area, exact)
