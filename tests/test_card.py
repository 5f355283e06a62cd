"""What a training tells of itself: its baseline, what it lacks, odd training images, labelled ones."""

import csv
import html
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SMALL_MODEL, copy_some
from PIL import Image

from csflow.config import parse
from csflow.errors import ExitStatus, WrongUse
from csflow.evaluation import EvaluateConfig, evaluate
from csflow.model.whitening import Gaussians, Moments, gaussians_of, one_thread
from csflow.model_directory import Calibration
from csflow.scoring.config import ScoreConfig
from csflow.scoring.job import score
from csflow.training.advice import advice
from csflow.training.card import model_card
from csflow.training.config import TrainConfig
from csflow.training.gaussians import gaussian_energies
from csflow.training.job import train
from csflow.training.outliers import leave_out_gaussians, leave_out_scores, outlier_files, trimmed_count

PLANTED = 3


@pytest.fixture(scope="module")
def contaminated(good_cells: Path, cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The good cells, and some smeared ones among them."""
    folder = copy_some(good_cells, tmp_path_factory.mktemp("contaminated") / "images", 48)
    for number, path in enumerate(sorted((cells / "functional" / "test").iterdir())[:PLANTED]):
        with Image.open(path) as image:
            grey_HW = np.array(image.convert("L"))
        grey_HW[40 * number : 40 * number + 90, 60:200] = 255
        Image.fromarray(grey_HW).save(folder / f"planted-{number}.png")
    return folder


def run_train(*arguments: object) -> ExitStatus:
    return train(parse(TrainConfig, None, [*SMALL_MODEL, *map(str, arguments)]))


def listed(model: Path) -> list[str]:
    """Names of the images in the model card, in its order."""
    uris = re.findall(r"<code>(.*?)</code>", (model / "README.md").read_text())
    return [Path(html.unescape(uri)).name for uri in uris]


def advised(
    *losses: float | None, final: float | None, gaussian: float | None, epochs: int, recommended: int = 3
) -> list[str]:
    lines = [{"validation_loss": loss} for loss in losses]
    return advice(lines, final, gaussian, epochs, recommended, learning_rate=0.003)


def test_a_training_that_went_well_gets_no_advice():
    assert advised(1.2, 0.9, 0.85, 0.848, final=0.8, gaussian=0.9, epochs=4) == []
    assert advised(0.9, 0.8, 0.801, final=0.7, gaussian=0.9, epochs=3) == []


def test_a_flow_no_better_than_the_gaussian_is_told_of_with_the_remedy():
    said = "no better than a Gaussian of each position (validation loss 0.9500, the Gaussian's 0.9000); "
    slower = f"{said}lower --learning_rate, which is 0.003"
    for losses in ((1.2, 1.001, 1.0), (1.2, 1.0, 1.3), (1.0, 1.1, 1.2), (3.0, 2.0, 1.0)):
        [line] = advised(*losses, final=0.95, gaussian=0.9, epochs=3)
        assert line.endswith(slower)
    [line] = advised(1.2, 1.1, 1.0, final=0.95, gaussian=0.9, epochs=3, recommended=42)
    assert line.endswith(f"{said}train for longer (--epochs 42)")
    [line] = advised(1.0, 1.1, 1.2, final=0.95, gaussian=0.9, epochs=3, recommended=42)
    assert line.endswith(slower), "more of the same would make it worse"


def test_a_loss_that_rises_from_the_start_asks_for_a_lower_rate_and_not_for_images():
    for gaussian in (0.9, None):
        [line] = advised(0.8, 0.85, 0.9, final=0.7, gaussian=gaussian, epochs=3, recommended=42)
        assert "rose from the first epoch on, by 0.1000; lower --learning_rate, which is 0.003" in line


def test_a_loss_that_was_still_falling_is_told_of_with_the_remedy():
    [line] = advised(1.2, 0.9, 0.8, final=0.8, gaussian=1.0, epochs=3)
    assert "still falling, by 0.1000 in the last epoch; train for longer (--epochs 6)" in line
    [line] = advised(1.2, 0.9, 0.8, final=0.8, gaussian=1.0, epochs=3, recommended=42)
    assert line.endswith("(--epochs 42)")
    stopped_early = advised(1.2, 0.9, 0.8, final=0.8, gaussian=1.0, epochs=9)
    risen_since = advised(1.2, 0.8, 0.9, final=0.8, gaussian=1.0, epochs=3)
    assert stopped_early == risen_since == []


def test_without_validation_images_or_a_gaussian_only_what_is_known_is_said():
    assert advised(None, None, final=None, gaussian=0.1, epochs=2) == []
    assert advised(0.9, 0.899, final=0.899, gaussian=None, epochs=2) == []


class Features:
    """A source of features that are in memory."""

    inside = None

    def __init__(self, y: list[torch.Tensor]) -> None:
        self.y = y
        self.feature_shapes = [tuple(y_BCHW.shape[1:]) for y_BCHW in y]

    def __len__(self) -> int:
        return len(self.y[0])

    def batches(self, epoch, shares):
        for share in shares:
            yield [y_BCHW[share] for y_BCHW in self.y]


@pytest.fixture
def features() -> Features:
    generator = torch.Generator().manual_seed(0)
    return Features([torch.randn(70, *shape, generator=generator) for shape in [(6, 4, 4), (9, 2, 2)]])


def test_each_image_is_scored_by_the_gaussian_of_the_folds_it_is_not_in(features):
    whole, of_others = leave_out_gaussians(features)

    def fitted(images: list[int]) -> Gaussians:
        levels = [Moments.around(y_BCHW[::4]).with_images(y_BCHW[images]) for y_BCHW in features.y]
        return gaussians_of(levels)

    expected = [fitted([i for i in range(70) if i % 4 != fold]) for fold in range(4)]
    for found, by_hand in zip([whole, *of_others], [fitted(list(range(70))), *expected], strict=True):
        energies = [gaussian_energies(gaussians, features.y) for gaussians in (found, by_hand)]
        for found_map, by_hand_map in zip(*energies, strict=True):
            torch.testing.assert_close(found_map, by_hand_map, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("usual_images", [1000, 40])
def test_an_odd_image_is_found_whether_or_not_it_is_in_the_sample_of_usual_ones(
    features, monkeypatch, usual_images
):
    monkeypatch.setattr("csflow.training.outliers.USUAL_IMAGES", usual_images)
    features.y[0][[13, 53]] *= 3
    _, of_others = leave_out_gaussians(features)
    scores_N = leave_out_scores(features, of_others)
    assert sorted(scores_N.argsort(descending=True)[:2].tolist()) == [13, 53]
    assert scores_N.median() == pytest.approx(1, abs=0.2)


def test_a_share_to_trim_is_at_least_one_image_and_leaves_three():
    assert [trimmed_count(1000, trim) for trim in (0, 0.0001, 0.01)] == [0, 1, 10]
    assert [trimmed_count(images, 0.4) for images in (1, 3, 4, 10)] == [0, 0, 1, 4]


@pytest.fixture(scope="module")
def odd_run(
    ray_cluster, contaminated: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, set[str]]:
    """A model trained on the contaminated images, and those of the smeared ones that it was trained on."""
    folder = tmp_path_factory.mktemp("odd") / "model"
    assert run_train("--input", contaminated, "--output", folder) == ExitStatus.DONE
    return folder, planted_in_training(folder)


@pytest.fixture(scope="module")
def odd_model(odd_run: tuple[Path, set[str]]) -> Path:
    return odd_run[0]


def settings_and_data(model: Path) -> dict[str, dict[str, object]]:
    return json.loads((model / "config.json").read_text())


def held_out(model: Path) -> list[str]:
    return pq.read_table(model / "calibration.parquet")["image_uri"].to_pylist()


def planted_in_training(model: Path) -> set[str]:
    """Names of the smeared images that are neither held out nor for validation."""
    [split] = [path for path in (model / "_work" / "splits").glob("*.parquet") if "ranking" not in path.name]
    rows = pq.read_table(split).to_pylist()
    names = [Path(row["image_uri"]).name for row in rows if row["subset"] == "training"]
    return {name for name in names if name.startswith("planted")}


def test_planted_images_lead_the_list_and_have_pictures(odd_run):
    odd_model, planted = odd_run
    assert planted
    assert set(listed(odd_model)[: len(planted)]) == planted
    card = (odd_model / "README.md").read_text()
    for number in range(1, 13):
        with Image.open(odd_model / "outliers" / f"{number:02}.jpg") as thumbnail:
            assert max(thumbnail.size) <= 160
        assert f"![](outliers/{number:02}.jpg)" in card
    rows = list(csv.DictReader(io.StringIO((odd_model / "outliers.csv").read_text())))
    assert [Path(row["image_uri"]).name for row in rows] == listed(odd_model)
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)


def test_the_gaussians_loss_and_all_warnings_stand_in_the_card(odd_model):
    metrics, config = (json.loads((odd_model / f"{name}.json").read_text()) for name in ("metrics", "config"))
    written = (odd_model / "README.md").read_text()
    assert f"| validation loss of the Gaussian of each position | {metrics['gaussian_loss']:.4f} |" in written
    assert "| map threshold at a false-positive rate of 0.01 | too few held-out images to tell |" in written
    assert f"| validation loss, latents whitened | {metrics['validation_loss']:.4f} |" in written
    calibration = Calibration.of(pq.read_table(odd_model / "calibration.parquet"))
    threshold = calibration.region_threshold(0.1)
    assert f"at most 0.1 regions expected on a normal image | {threshold:.4f} |" in written
    metrics |= {"warnings": ["warning: the loss was still falling", "warning: images are stretched"]}
    card = model_card(config["training"], config["data"], metrics, calibration, [])["README.md"].decode()
    for line in metrics["warnings"]:
        assert f"\n> {line}\n" in card


@pytest.mark.soak
def test_the_list_is_a_manifest_of_images_to_exclude(odd_model, contaminated, tmp_path, capfd):
    arguments = ["--input", contaminated, "--work_dir", odd_model / "_work", "--output", tmp_path / "model"]
    assert run_train(*arguments, "--exclude", odd_model / "outliers.csv") == ExitStatus.DONE
    assert "12 images left out by --exclude" in capfd.readouterr().out
    assert not set(listed(odd_model)) & set(listed(tmp_path / "model"))


@pytest.mark.soak
def test_trimmed_images_are_not_trained_on_and_held_out_ones_stay(odd_model, contaminated, tmp_path, capfd):
    arguments = ["--input", contaminated, "--work_dir", odd_model / "_work", "--output", tmp_path / "model"]
    runs = set((odd_model / "_work" / "training").iterdir())
    assert run_train(*arguments, "--trim", 0.1) == ExitStatus.DONE
    printed = capfd.readouterr().out
    assert "4 training images left out by --trim" in printed
    everything, trimmed = settings_and_data(odd_model), settings_and_data(tmp_path / "model")
    assert trimmed["data"]["trimmed_images"] == 4
    assert trimmed["data"]["training_images"] == everything["data"]["training_images"] - 4
    assert trimmed["model_id"] != everything["model_id"]
    assert held_out(tmp_path / "model") == held_out(odd_model)
    assert listed(tmp_path / "model") == listed(odd_model)
    assert (tmp_path / "model" / "README.md").read_text().count("(left out by `--trim`)") == 4
    assert len(set((odd_model / "_work" / "training").iterdir()) - runs) == 1, "it has checkpoints of its own"


@pytest.mark.soak
def test_the_papers_recipe_has_no_gaussian_in_its_card(ray_cluster, good_cells, model, tmp_path):
    arguments = ["--input", good_cells, "--output", tmp_path / "paper", "--recipe", "paper"]
    arguments += ["--coupling_blocks", 1, "--work_dir", tmp_path / "work"]
    assert run_train(*arguments) == ExitStatus.DONE
    card = (tmp_path / "paper" / "README.md").read_text()
    assert "Gaussian of each position" not in card
    assert "mean of z²/2" in card
    assert "there is no local score" in card.replace("\n", " ")
    assert "has no map threshold" in card
    assert "| map threshold" not in card
    assert "is there an unusual place?" in (model / "README.md").read_text().replace("\n", " ")


@pytest.fixture(scope="module")
def labels(good_cells: Path, cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 labelled cells, a copy of a training image, a training image, and a broken one."""
    folder = tmp_path_factory.mktemp("labels")
    normal = copy_some(cells / "functional" / "test", folder / "normal", 20)
    defective = copy_some(cells / "defective", folder / "defective", 20)
    first = next(iter(sorted(good_cells.iterdir())))
    (folder / "copy.png").write_bytes(first.read_bytes())
    (folder / "broken.png").write_bytes(first.read_bytes()[:500])
    rows = [(path, 0) for path in sorted(normal.iterdir())]
    rows += [(path, 1) for path in sorted(defective.iterdir())]
    rows += [(folder / "copy.png", 0), (first, 0), (folder / "broken.png", 1)]
    table = folder / "labels.csv"
    table.write_text("image_uri,label\n" + "".join(f"{path},{label}\n" for path, label in rows))
    return table


@pytest.mark.soak
def test_labelled_images_are_measured_as_the_evaluation_job_does_and_change_nothing(
    model, good_cells, labels, tmp_path, capfd
):
    measured = tmp_path / "measured"
    arguments = ["--input", good_cells, "--output", measured, "--work_dir", tmp_path / "work"]
    with one_thread():  # the model's own job had as many as the machine has CPUs
        assert run_train(*arguments, "--evaluate", labels) == ExitStatus.DONE
    printed = capfd.readouterr().out
    assert (
        "40 labelled images to evaluate on; 2 are in the input as well and left out; 1 cannot be read"
        in printed
    )
    config, plain = (json.loads((folder / "config.json").read_text()) for folder in (measured, model))
    assert config["model_id"] == plain["model_id"]
    assert config["data"] == plain["data"]
    found = json.loads((measured / "metrics.json").read_text())["evaluation"]
    assert (found["images"], found["defective"]) == (40, 20)
    line = f"flow {found['flow_auroc']:.3f}, Gaussian {found['gaussian_auroc']:.3f} on 40 labelled images"
    assert line in printed
    assert line in (measured / "README.md").read_text()
    assert 0.5 < found["gaussian_auroc"] <= 1

    scored = ["--input", str(labels.parent / "normal"), str(labels.parent / "defective")]
    scored += ["--model", str(measured), "--output", str(tmp_path / "scores"), "--precision", "float32"]
    assert score(parse(ScoreConfig, None, scored)) == ExitStatus.DONE
    evaluated = ["--scores", tmp_path / "scores", "--labels", labels, "--output", tmp_path / "e.json"]
    assert evaluate(parse(EvaluateConfig, None, list(map(str, evaluated)))) == ExitStatus.DONE
    metrics = json.loads((tmp_path / "e.json").read_text())["metrics"]
    assert found["flow_auroc"] == pytest.approx(metrics["image_auroc"], abs=1e-3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image_uri,label\na.png,0\nb.png,0\n", "--evaluate .* needs images of label 0 and of label 1"),
        ("image_uri\na.png\n", "--evaluate .* lacks the column label"),
        ("image_uri,label\na.png,2\n", "a label must be 0 \\(normal\\) or 1"),
        ("image_uri,label\na.png,bad\n", "--evaluate .* has 'bad' in the column label"),
        ("image_uri,label\n", "needs images of label 0 and of label 1, and it has no rows"),
    ],
)
def test_a_wrong_table_of_labels_is_refused_before_any_work(good_cells, tmp_path, content, message):
    (tmp_path / "labels.csv").write_text(content)
    with pytest.raises(WrongUse, match=message):
        run_train("--input", good_cells, "--output", tmp_path / "m", "--evaluate", tmp_path / "labels.csv")


def test_an_image_that_is_gone_is_listed_without_a_picture(tmp_path):
    columns = {
        "image_uri": [str(tmp_path / "gone.png")], "image_version": ["1"],
        "image_height": [10], "image_width": [10], "leave_out_score": [3.0],
    }  # fmt: skip
    rows, files = outlier_files(pa.table(columns), 0, {})
    assert rows[0]["thumbnail"] is None
    assert list(files) == ["outliers.csv"]
