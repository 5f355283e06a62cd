"""Photographs that show one part stay together, and count as one: in the split, and in p-values."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SMALL_MODEL, copy_some, read_scores, run_job, run_score
from numpy.typing import NDArray
from PIL import Image
from small_models import save_small

from csflow.calibration import (
    drift,
    p_values,
    part_maxima,
    part_weights,
    region_threshold,
    value_exceeded,
)
from csflow.config import parse
from csflow.errors import ExitStatus, WrongUse
from csflow.model_directory import CALIBRATION, Calibration, load_model, read_model
from csflow.output.layout import run_ids
from csflow.output.runs import read_record
from csflow.recalibration import RecalibrateConfig, recalibrate
from csflow.scoring.record import summary
from csflow.storage import Location
from csflow.training.advice import calibration_warning
from csflow.training.cache import INDEX
from csflow.training.config import TrainConfig
from csflow.training.parts import pattern_of, with_own_calibration, with_tags
from csflow.training.split import FOLDS, TrainingData, split_images

RATES = (0.02, 0.05, 0.1, 0.2)


# --- The split -------------------------------------------------------------------------------------------


def of_parts(parts: int, sides: int) -> dict[str, str]:
    """The part of each image, by digest."""
    return {f"digest-{part}-{side}": f"part-{part}" for part in range(parts) for side in range(sides)}


def listed(parts: dict[str, str]) -> pa.Table:
    """Rows of `INDEX`, in which URI and digest are equal."""
    rows = [
        {"image_uri": digest, "image_version": "1", "content_digest": digest, "file": "f", "offset": 0}
        | {"dtype": "F16"}
        for digest in parts
    ]
    return pa.Table.from_pylist(rows, schema=INDEX)


def test_photographs_of_a_part_stay_together_and_shares_are_of_parts() -> None:
    parts = of_parts(100, 3)
    split = split_images(parts, 0.1, 0.2, seed=0, parts=parts)
    found = [{parts[digest] for digest in subset} for subset in split]
    assert [len(some) for some in found] == [70, 10, 20]
    assert [len(subset) for subset in split] == [210, 30, 60]
    assert len(set.union(*found)) == 100


def test_parts_of_one_photograph_are_divided_as_photographs_are() -> None:
    digests = [f"digest-{number}" for number in range(200)]
    alone = split_images(digests, 0.1, 0.2, seed=3)
    assert split_images(digests, 0.1, 0.2, seed=3, parts={digest: digest for digest in digests}) == alone


def test_the_folds_of_a_cross_calibration_hold_whole_parts() -> None:
    parts = of_parts(23, 4)
    data = TrainingData.divide(listed(parts), 0.1, 0.2, 0, is_cross=True, part_of=parts).calibrating
    fold_of = defaultdict(set)
    for part, fold in zip(data["part"].to_pylist(), data["fold"].to_pylist(), strict=True):
        fold_of[part].add(fold)
    assert all(len(folds) == 1 for folds in fold_of.values())
    sizes = Counter(min(folds) for folds in fold_of.values())
    assert sorted(sizes.values()) == [4, 4, 5, 5, 5]
    with pytest.raises(WrongUse, match="4 different parts are too few"):
        TrainingData.divide(listed(of_parts(4, 4)), 0.1, 0.2, 0, True, of_parts(4, 4))
    assert len(sizes) == FOLDS


def test_a_copy_of_a_photograph_is_of_the_part_that_is_listed_first() -> None:
    rows = listed({"a": "1", "b": "2", "c": "3", "d": "4", "e": "5"})
    copies = rows.set_column(2, INDEX.field("content_digest"), pa.array(["a", "b", "c", "d", "a"]))
    part_of = {"a": "1", "b": "2", "c": "3", "d": "4", "e": "5"}
    split = TrainingData.divide(copies, 0, 0.2, 0, part_of=part_of).split
    assert sorted(split["part"].to_pylist()) == ["1", "2", "3", "4"]


def test_tags_name_the_part_and_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    images = pa.table({"image_uri": ["/p/1/7_top.png", "/p/1/7_side.png", "/p/2/7_top.png", "/p/other.png"]})
    pattern = pattern_of("/p/{day}/{part}_{camera}.png", ["day", "part"], "camera")
    assert pattern is not None
    table = with_tags(images, pattern.tags, ["day", "part"], "camera")
    assert table["part"].to_pylist() == ["1/7", "1/7", "2/7", "/p/other.png"]
    assert table["group"].to_pylist() == ["camera=top", "camera=side", "camera=top", None]
    assert "1 of 4 images have no tag day and part, such as /p/other.png" in capsys.readouterr().out
    for tags, part, camera, said in (
        (None, ["part"], None, "--part names tags of images, and needs the pattern that gives them: --tags"),
        (None, [], "camera", "--calibrate_by names tags of images"),
        ("/p/{part}.png", [], None, "--tags gives tags for --part"),
        (
            "/p/{part}.png",
            ["prat"],
            None,
            r"--part: prat is no tag of --tags /p/\{part\}.png \(its",
        ),
        ("/p/{part}.png", [], "line", "--calibrate_by: line is no tag of"),
    ):
        with pytest.raises(WrongUse, match=said):
            pattern_of(tags, part, camera)
    for part, camera in ((["part"], None), ([], "camera")):
        with pytest.raises(WrongUse, match=f"none of the images has the tag {camera or 'part'}"):
            with_tags(images.slice(3), pattern.tags, part, camera)
    with pytest.raises(WrongUse, match="leave out --tags"):
        TrainConfig.model_validate({"input": "i", "output": "o", "routes": "plant.yaml", "tags": "{part}"})


# --- p-values --------------------------------------------------------------------------------------------


def test_a_part_counts_as_one_however_many_photographs_show_it() -> None:
    weights = part_weights(["a", "a", "b", "c", "c", "c"])
    assert weights.tolist() == pytest.approx([1 / 2, 1 / 2, 1, 1 / 3, 1 / 3, 1 / 3])
    scores = [5.0, 1.0, 3.0, 6.0, 2.0, 0.0]
    p = p_values([7.0, 6.0, 5.0, 3.0, 0.0, np.nan], scores, weights)
    assert p.tolist() == pytest.approx([1 / 4, 4 / 12, 11 / 24, 17 / 24, 1, 1 / 4])
    # Thirds add up to a whole: what is exactly at a rate is flagged.
    thirds = part_weights(["a"] * 3 + ["b"] * 3 + ["c"] * 3)
    assert p_values([1.0], [2, 2, 2, 0, 0, 0, 0, 0, 0], thirds).tolist() == [0.5]


def test_equal_photographs_of_a_part_change_nothing() -> None:
    random = np.random.default_rng(0)
    scores, levels = random.normal(size=60), -np.sort(-random.normal(size=(60, 4)))
    times = random.integers(1, 5, size=60)
    weights = part_weights([str(part) for part in np.repeat(np.arange(60), times)])
    new = random.normal(size=200)
    assert p_values(new, np.repeat(scores, times), weights).tolist() == p_values(new, scores).tolist()
    for rate in (0.01, 1 / 61, 0.1, 0.35):
        assert value_exceeded(np.repeat(scores, times), rate, weights) == value_exceeded(scores, rate)
        repeated = np.repeat(levels, times, axis=0)
        assert region_threshold(repeated, rate, weights) == region_threshold(levels, rate)


def test_what_exceeds_a_threshold_has_a_p_value_of_at_most_its_rate() -> None:
    random = np.random.default_rng(1)
    scores = random.normal(size=90).round(1)
    weights = part_weights([str(part) for part in random.integers(0, 30, size=90)])
    for of_images in (None, weights):
        for rate in (0.05, 0.1, 0.3):
            threshold = value_exceeded(scores, rate, of_images)
            assert threshold is not None
            p = p_values([np.nextafter(threshold, 9), threshold], scores, of_images)
            lower = scores[scores < threshold].max()
            assert p[0] <= rate < p_values([np.nextafter(lower, 9)], scores, of_images)[0]


def photographs(random: np.random.Generator, parts: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Features of the photographs of normal parts, 1 to 4 of each, which look much alike; and their parts."""
    part_N = np.repeat(np.arange(parts), random.integers(1, 5, size=parts))
    centres = random.normal(size=(parts, 10))
    return centres[part_N] + 0.2 * random.normal(size=(len(part_N), 10)), part_N


def scored(learned: NDArray[np.float64], new: NDArray[np.float64]) -> NDArray[np.float64]:
    """The simplest detector there is: how far the nearest photograph is that it has learned from."""
    distances: NDArray[np.float64] = np.linalg.norm(new[:, None] - learned, axis=2).min(1)
    return distances


def realised(keeps_parts: bool, draws: int = 150) -> NDArray[np.float64]:
    """Share of photographs of new normal parts with a p-value of at most each of `RATES`, part by part."""
    random = np.random.default_rng(4)
    found = []
    for _ in range(draws):
        features, part_N = photographs(random, 80)
        digests = [str(number) for number in range(len(features))]
        parts = dict(zip(digests, map(str, part_N), strict=True)) if keeps_parts else None
        split = split_images(digests, 0, 0.5, seed=0, parts=parts)
        training, heldout = (np.array(some, int) for some in (split.training, split.heldout))
        weights = part_weights([str(part_N[number]) for number in heldout]) if keeps_parts else None
        new, new_part_N = photographs(random, 40)
        p = p_values(scored(features[training], new), scored(features[training], features[heldout]), weights)
        share = part_weights([str(part) for part in new_part_N]) / 40
        found.append([float(share[p <= rate].sum()) for rate in RATES])
    return np.array(found)


def test_p_values_are_uniform_over_parts_if_these_are_not_divided_and_else_are_not() -> None:
    together, apart = realised(keeps_parts=True), realised(keeps_parts=False)
    half_width = 2.576 * together.std(axis=0, ddof=1) / len(together) ** 0.5
    assert (together.mean(axis=0) - half_width <= RATES).all()
    # 40 parts have p-values in steps of about 1/41.
    assert (together.mean(axis=0) + half_width >= np.array(RATES) - 1 / 41).all()
    assert (apart.mean(axis=0) > 3 * np.array(RATES)).all()


def test_counting_photographs_flags_too_many_parts_even_if_parts_are_kept_together() -> None:
    """Four equal photographs of each of 19 parts are no 76 witnesses."""
    random = np.random.default_rng(5)
    flagged = {True: 0, False: 0}
    for _ in range(2000):
        *heldout, new = random.normal(size=20)
        weights = part_weights([str(part) for part in np.repeat(np.arange(19), 4)])
        for counts_parts in flagged:
            p = p_values([new], np.repeat(heldout, 4), weights if counts_parts else None)
            flagged[counts_parts] += int(p[0] <= 0.02)
    assert flagged[True] == 0  # it takes 49 parts
    assert flagged[False] / 2000 == pytest.approx(1 / 20, abs=0.015)


def test_a_normal_part_is_flagged_no_more_often_than_wanted_whatever_its_views() -> None:
    """By its worst view, beside the worst views of held-out parts; they have one to four views each."""
    random = np.random.default_rng(7)
    flagged, draws = np.zeros(len(RATES)), 4000
    for _ in range(draws):
        part_N = np.repeat(np.arange(50), random.integers(1, 5, size=50))
        scores = random.normal(size=50)[part_N] + random.normal(size=len(part_N))
        is_new = part_N == 49
        maxima = part_maxima(scores[~is_new], [str(part) for part in part_N[~is_new]])
        flagged += p_values(scores[is_new], maxima).min() <= np.array(RATES)
    np.testing.assert_allclose(flagged / draws, RATES, atol=4 * (0.2 * 0.8 / draws) ** 0.5)


def test_a_quiet_night_of_parts_is_seldom_called_a_drift() -> None:
    random = np.random.default_rng(6)

    def scores(parts: int) -> NDArray[np.float64]:
        return np.repeat(random.normal(size=parts), 4) + 0.05 * random.normal(size=4 * parts)

    weights = part_weights([str(part) for part in np.repeat(np.arange(30), 4)])
    drifts = [drift(scores(100), 0.0, scores(30), weights=weights) for _ in range(400)]
    assert all(found is not None and found.units == 30 for found in drifts)
    assert sum(found is not None and found.has_drifted for found in drifts) <= 3
    counted = [drift(scores(100), 0.0, scores(30)) for _ in range(400)]
    assert sum(found is not None and found.has_drifted for found in counted) > 20
    higher = drift(scores(100) + 2, 0.0, scores(30), weights=weights)
    assert higher is not None
    assert higher.verdict == "higher"


# --- The model -------------------------------------------------------------------------------------------


def test_the_parts_are_kept_with_the_model_and_decide_its_id(tmp_path: Path) -> None:
    scores = (0.1, 0.2, 0.3, 0.4)
    ids = []
    for number, parts in enumerate((None, "aabb", "xxyy", "abab")):
        folder = save_small(tmp_path / str(number), heldout=scores, parts=parts)
        model = read_model(folder)
        ids.append(model.model_id)
        size, unit = (2, "parts") if parts else (4, "images")
        assert (model.calibration.size, model.calibration.unit) == (size, unit)
    assert ids[1] == ids[2]  # what a part is called decides nothing
    assert len(set(ids)) == 3
    older = pq.read_table(tmp_path / "0" / "calibration.parquet").drop_columns("part")
    assert Calibration.of(older).weights is None


def test_warnings_count_parts() -> None:
    warning = calibration_warning(60, 60, 0.2, 0.1, is_cross=True, unit="parts")
    assert warning is not None
    assert warning.startswith("60 parts are held out")
    assert "train on 99 parts" in warning


# --- Groups ----------------------------------------------------------------------------------------------


def grouped(sizes: dict[str | None, int], sides: int = 1) -> pa.Table:
    """A calibration of so many parts of each group, with so many images each."""
    rows = [
        {"image_uri": f"{group}-{part}", "image_version": "1", "anomaly_score": float(part)}
        | {"part": f"{part}", "group": group}
        for group, parts in sizes.items()
        for part in range(parts)
        for _ in range(sides)
    ]
    return pa.Table.from_pylist(rows, schema=CALIBRATION)


def test_a_group_is_calibrated_apart_if_it_has_parts_enough_to_flag_one() -> None:
    table, said = with_own_calibration(grouped({"camera=top": 99, "camera=back": 98, None: 5}, sides=2))
    assert set(table["group"].to_pylist()) == {"camera=top", None}
    assert said == (
        "calibrated apart: camera=top (99 held-out parts); compared with all, since it takes 99: "
        "camera=back (98 held-out parts)"
    )
    calibration = Calibration.of(table)
    assert {group: own.size for group, own in calibration.groups.items()} == {"camera=top": 99}
    assert calibration.of_tags({"camera": "top", "line": "1"}).size == 99
    for tags in ({"camera": "back"}, {"line": "top"}, {}):
        assert calibration.of_tags(tags) is calibration


def test_normal_images_of_each_camera_are_flagged_as_often_as_wanted_and_all_together_are_not() -> None:
    """One camera of two has higher scores: compared with all it is flagged more often, the other never."""
    random = np.random.default_rng(8)
    shift = {"top": 0.0, "side": 1.5}
    realised = {(camera, apart): [] for camera in shift for apart in (False, True)}
    for _ in range(200):
        table = grouped({f"camera={camera}": 199 for camera in shift}).drop_columns("part")
        offsets = np.repeat(list(shift.values()), 199)
        place = table.schema.get_field_index("anomaly_score")
        table = table.set_column(place, "anomaly_score", pa.array(random.normal(size=398) + offsets))
        calibration = Calibration.of(table)
        for camera, higher in shift.items():
            scores = random.normal(size=100) + higher
            for apart in (False, True):
                heldout = calibration.of_tags({"camera": camera} if apart else {}).anomaly_score
                realised[camera, apart].append(float((p_values(scores, heldout) <= 0.05).mean()))
    means = {key: np.mean(values) for key, values in realised.items()}
    for camera in shift:
        assert means[camera, True] == pytest.approx(0.05, abs=0.005)
    assert means["top", False] < 0.01
    assert means["side", False] > 0.08


def test_groups_decide_the_model_id_and_an_image_is_compared_with_its_own_group(
    cells: Path, ray_cluster: object, tmp_path: Path
) -> None:
    groups = ["side=left"] * 9 + ["side=right"] * 9 + [None]
    heldout = (0.0,) * 9 + (1e9,) * 9 + (1e9,)
    model = save_small(tmp_path / "model", heldout=heldout, groups=groups)
    other = save_small(tmp_path / "other", heldout=heldout)
    assert read_model(model).model_id != read_model(other).model_id
    images = copy_some(cells / "functional" / "test", tmp_path / "images", 18)
    for number, photograph in enumerate(sorted(images.iterdir())):
        photograph.rename(images / f"{number:02}_{('left', 'right', 'back')[number % 3]}.png")
    flags = ["--model", model.path, "--input", images, "--output", tmp_path / "scores"]
    tags = ["--tags", f"{images}/{{part}}_{{side}}.png"]
    assert run_score(*flags, *tags, "--false_positive_rate", "0.1") == ExitStatus.DONE
    rows = read_scores(tmp_path / "scores").set_index("image_uri").sort_index()
    # Nine images of the left are below, nine of the right above; of the back, ten of all nineteen are above.
    assert rows.p_value.tolist() == [0.1, 1.0, 11 / 20] * 6
    assert rows.is_anomalous.tolist() == [True, False, False] * 6

    # All images together differ no more than by chance. The back has no calibration of its own.
    output = Location(str(tmp_path / "scores"))
    record = read_record(output, run_ids(output)[-1])
    assert record is not None and record.drift is not None
    verdicts = {group: drift.verdict for group, drift in record.drift_by_group.items()}
    assert (record.drift.verdict, verdicts) == (
        "like",
        {"side=left": "unlike", "side=right": "lower"},
    )
    assert record.drift_by_group["side=left"].share_below_5_percent == 0
    assert record.models[0].drift_by_group == record.drift_by_group
    said = [line.split(None, 1)[1] for line in summary(record, output).splitlines() if line[:5] == "drift"]
    assert said == [
        "scores differ from those of the 19 held-out images no more than by chance",
        "side=left: 100% of the images are unlike all of the 9 held-out images: another product or camera, "
        "or no part in the picture?",
        "side=right: scores are below those of the 9 held-out images: smoother pictures, or images of the "
        "training?",
    ]
    flags[-1] = tmp_path / "again"
    assert run_score(*flags, *tags, "--exit_on_drift") == ExitStatus.DRIFT


# --- Jobs ------------------------------------------------------------------------------------------------

HALVES = ("left", "right")


@pytest.fixture(scope="module")
def halves(cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both overlapping halves of 40 solar cells."""
    folder = tmp_path_factory.mktemp("halves") / "good"
    folder.mkdir()
    for source in sorted((cells / "functional" / "train").iterdir())[:40]:
        photograph = Image.open(source)
        width, height = photograph.size
        for side, left in zip(HALVES, (0, width // 4), strict=True):
            photograph.crop((left, 0, left + 3 * width // 4, height)).save(
                folder / f"{source.stem}_{side}.png"
            )
    return folder


@pytest.mark.soak
def test_a_training_keeps_parts_together_and_scores_count_them(
    halves: Path, ray_cluster: object, tmp_path: Path
) -> None:
    tags = ["--tags", f"{halves}/{{part}}_{{side}}.png", "--part", "part", "--calibrate_by", "side"]
    arguments = ["--input", halves, "--output", tmp_path / "model", *tags, *SMALL_MODEL, "--holdout", "0.3"]
    job = run_job("train", *arguments)
    assert job.returncode == 0, job.stderr
    assert "40 parts by --part part: the photographs of each stay together" in job.stdout
    assert "12 parts are held out, so the smallest p-value is 0.077" in job.stdout + job.stderr
    [split] = [
        file
        for file in (tmp_path / "model" / "_work" / "splits").glob("*.parquet")
        if "rank" not in file.name
    ]
    subsets = pq.read_table(split).to_pandas().groupby("part").subset.agg(["nunique", "size"])
    assert subsets["nunique"].tolist() == [1] * 40
    assert subsets["size"].tolist() == [2] * 40
    card = (tmp_path / "model" / "README.md").read_text()
    said = (
        "calibrated apart: none; compared with all, since it takes 99: side=left (12 held-out parts), side=r"
    )
    assert said in job.stdout
    assert said in card
    assert "| parts that they show, which count as one each | 12 |" in card

    model = load_model(str(tmp_path / "model"))
    assert (len(model.calibration.anomaly_score), model.calibration.size) == (24, 12)
    flags = ["--model", tmp_path / "model", "--input", halves, "--output", tmp_path / "scores"]
    assert run_score(*flags, "--false_positive_rate", "0.1") == ExitStatus.DONE
    rows = read_scores(tmp_path / "scores")
    expected = p_values(rows.anomaly_score, model.calibration.anomaly_score, model.calibration.weights)
    assert rows.p_value.tolist() == expected.tolist()
    # Twelve parts of two photographs each: p-values come in halves of 1/13, and no photograph is below that.
    np.testing.assert_allclose(rows.p_value * 26, np.rint(rows.p_value * 26))
    assert rows.p_value.min() >= 1 / 13
    highest = (
        pq.read_table(tmp_path / "model" / "calibration.parquet")
        .to_pandas()
        .groupby("part")
        .anomaly_score.max()
    )
    assert rows.part_p_value.tolist() == p_values(rows.anomaly_score, highest).tolist()
    assert rows.is_anomalous.tolist() == (rows.p_value <= 0.1).tolist()

    config = ["--model", str(tmp_path / "model"), "--input", str(halves), "--output", str(tmp_path / "new")]
    assert recalibrate(parse(RecalibrateConfig, None, [*config, *tags])) == ExitStatus.DONE
    assert read_model(str(tmp_path / "new")).calibration.size == 40
