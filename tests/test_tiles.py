"""Images that are cut into tiles: pixels, joined maps, scores of images of any size, training and scoring."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_scores, run_job, run_score
from PIL import Image
from scipy import stats

import csflow
from csflow.calibration import p_values
from csflow.config import parse
from csflow.errors import ExitStatus, WrongUse
from csflow.images import decode
from csflow.model import (
    Architecture,
    Detector,
    InferenceDetector,
    StandardisedStatistic,
    TiledDetector,
    fitted_statistic,
)
from csflow.model_directory import load_model, read_config
from csflow.preprocessing import Preprocessing, Tiling
from csflow.recalibration import RecalibrateConfig, recalibrate
from csflow.training.config import TrainConfig

TILED = Preprocessing((128, 128), tiling=Tiling(overlap=32))
SHAPES = [(4, 16, 16), (4, 8, 8)]


def png(pixels_HWC: np.ndarray, folder: Path) -> bytes:
    file = folder / "image.png"
    Image.fromarray(pixels_HWC).save(file)
    return file.read_bytes()


# --- Pixels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (50, 300), (96, 96), (97, 128), (500, 260)])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_every_pixel_is_in_a_tile_and_none_only_at_a_tiles_edge(size, scale, tmp_path):
    preprocessing = replace(TILED, tiling=Tiling(32, scale))
    original = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    decoded = decode(png(original, tmp_path), preprocessing)
    height, width = preprocessing.place(*size).size
    covered = np.zeros(decoded.pixels_HWC.shape[:2], bool)
    inside = np.zeros_like(covered)
    for top, left in preprocessing.tile_corners(*size):
        covered[top : top + 128, left : left + 128] = True
        inside[top + 16 : top + 112, left + 16 : left + 112] = True
    assert covered.all()
    assert inside[16 : 16 + height, 16 : 16 + width].all()
    if scale == 1:
        np.testing.assert_array_equal(decoded.pixels_HWC[16 : 16 + height, 16 : 16 + width], original)


def test_images_are_continued_by_their_reflection(tmp_path):
    original = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    pixels = decode(png(original, tmp_path), TILED).pixels_HWC
    assert pixels.shape == (224, 224, 3)
    np.testing.assert_array_equal(pixels[:16, 16:116], original[16:0:-1])
    np.testing.assert_array_equal(pixels[16:116, 116:200], original[:, -2:-86:-1])


# --- Statistic -------------------------------------------------------------------------------------------


def tile_energies(tiles: int, seed: int) -> list[torch.Tensor]:
    """Energy maps of tiles of normal images, two levels of the Gaussian, then of the latents."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(16, 16), (8, 8)] * 2
    return [torch.randn(tiles, 8, *size, generator=generator).square().mean(1) for size in sizes]


def image_score(statistic: StandardisedStatistic, tiles: int, seed: int) -> float:
    """The anomaly score of a normal image of so many tiles, side by side."""
    averages_ANHW = statistic.averages(statistic.relative(tile_energies(tiles, seed)))
    joined_A1HW = averages_ANHW.flatten(1, 2)[:, None]
    return statistic.scores(joined_A1HW, joined_A1HW[0], torch.ones(1, 2)).anomaly_score_B.item()


def test_p_values_of_normal_images_do_not_depend_on_their_number_of_tiles():
    statistic = fitted_statistic(tile_energies(800, seed=0), SHAPES, tile_counts=[16] * 50)
    heldout = [image_score(statistic, (1, 4, 16, 64)[i % 4], 1000 + i) for i in range(400)]
    for tiles in (1, 4, 16, 64):
        p = p_values([image_score(statistic, tiles, 5000 + 100 * tiles + i) for i in range(100)], heldout)
        assert stats.kstest(p, "uniform").pvalue > 0.01, tiles


def test_all_places_of_tiles_have_one_usual_energy():
    energies = tile_energies(20, seed=0)
    energies[0][:, :, :4] *= 3  # one side of tiles shows another thing than the other
    statistic = fitted_statistic(energies, SHAPES, tile_counts=[4] * 5)
    assert len(statistic.get_buffer("usual_0").unique()) == 1


# --- Maps ------------------------------------------------------------------------------------------------


def detector_of(side: int) -> Detector:
    """An untrained detector of tiles, in which each place of the map sees 57 pixels to each side."""
    architecture = Architecture(
        backbone="resnet18",
        image_size=(side, side),
        cut_after=("layer1", "layer2"),
        scales=1,
        hidden_channels=8,
        kernel_sizes=(1,),
        whitening=True,
        tiling=Tiling(overlap=64),
    )
    torch.manual_seed(0)
    detector = Detector(architecture).eval().requires_grad_(False)
    for parameter in detector.flow.parameters():
        parameter.normal_(std=0.05)
    return detector


def tiled(detector: Detector) -> TiledDetector:
    return TiledDetector(InferenceDetector(detector, "float32", 4))


@pytest.fixture(scope="module")
def photograph(cells: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """500 rows and 310 columns of a real photograph."""
    file = min((cells / "functional" / "train").iterdir())
    pixels = np.asarray(Image.open(file).convert("RGB").resize((500, 500)))[:, :310]
    return png(pixels, tmp_path_factory.mktemp("photograph"))


def test_a_joined_map_is_that_of_the_whole_image_where_tiles_show_all_that_a_place_sees(photograph):
    small, large = detector_of(256), detector_of(640)
    maps = []
    for detector in (small, large):
        decoded = decode(photograph, detector.architecture.preprocessing)
        assert decoded.pixels_HWC.shape[0] == 640  # the same padding, nine tiles or one
        maps.append(tiled(detector)(decoded.pixels_HWC, 500, 310).anomaly_map_BHW[0].numpy())
    joined, whole = maps
    assert joined.shape == whole.shape == (125, 78)
    # Tiles have 64 cells and begin every 48, 8 before the image. Their middle 32 overlap no other.
    alone = np.arange(125) % 48
    alone = (alone >= 8) & (alone < 40)
    inside = np.ix_(alone, alone[:78])
    np.testing.assert_allclose(joined[inside], whole[inside], rtol=1e-3)
    assert 1e-3 < np.abs(joined / whole - 1).max() < 0.2  # where two tiles are averaged


def test_the_scores_of_an_image_of_one_tile_are_those_of_the_tile_without_its_padding(photograph):
    detector = detector_of(640)
    decoded = decode(photograph, detector.architecture.preprocessing)
    scores = tiled(detector)(decoded.pixels_HWC, 500, 310)
    tile = detector(torch.from_numpy(decoded.pixels_HWC)[None])
    shown = tile.averages_BAHW[0, 0, 8:133, 8:86]
    assert scores.global_score_B.item() == pytest.approx(shown.mean().item(), rel=1e-4)
    assert scores.local_score_B.item() == pytest.approx(
        shown.flatten().topk(round(0.005 * 160 * 160)).values.mean().item(), rel=1e-4
    )
    map_BHW = tile.anomaly_map_BHW[:, 8:133, 8:86]
    torch.testing.assert_close(scores.anomaly_map_BHW, map_BHW, rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_map_covers_its_image_and_less_than_a_cell_more(scale):
    detector = detector_of(256)
    detector.architecture = replace(detector.architecture, tiling=Tiling(64, scale))
    top, left, bottom, right = tiled(detector).map_box(501, 310)
    assert (top, left) == (0, 0)
    assert 501 <= bottom < 501 + 4 / scale
    assert 310 <= right < 310 + 4 / scale


def test_an_overlap_that_splits_cells_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"--overlap 60 does not fit: .* 8, .* \(nearest: 56 or 64\)"):
        Detector(replace(detector_of(256).architecture, tiling=Tiling(60)))


# --- Jobs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tile", "256", "--image_size", "512"], "--image_size resizes whole images"),
        (["--tile", "256", "--fit", "crop"], "--fit resizes whole images"),
        (["--overlap", "32"], "--overlap is for images that are cut into tiles"),
        (["--tile", "256", "--augment"], "--augment reads every image anew"),
        (["--tile", "256", "--recipe", "paper"], "--recipe paper compares whole images"),
    ],
)
def test_settings_that_mean_nothing_with_or_without_tiles_are_refused(arguments, message):
    with pytest.raises(WrongUse, match=message):
        parse(TrainConfig, None, ["--input", "in", "--output", "out", *arguments])


@pytest.fixture(scope="module")
def plates(good_cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of normal parts, of different sizes, put together from photographs of cells."""
    folder = tmp_path_factory.mktemp("plates")
    files = sorted(good_cells.iterdir())
    cells = [np.asarray(Image.open(file).convert("RGB").resize((150, 150))) for file in files]
    random = np.random.default_rng(0)
    for number in range(24):
        rows, columns = random.integers(2, 4, 2)
        chosen = random.choice(len(cells), (rows, columns))
        pixels = np.concatenate([np.concatenate([cells[i] for i in row], axis=1) for row in chosen])
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def tile_model(ray_cluster: dict[str, str], plates: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiled") / "model"
    arguments = ["--tile", "128", "--overlap", "32", "--tiles_per_image", "4", "--hidden_channels", "16"]
    arguments += ["--epochs", "2", "--precision", "float32"]
    job = run_job("train", "--input", plates, "--output", folder, *arguments)
    assert job.returncode == 0, job.stderr
    return folder


def test_a_model_of_tiles_is_trained_on_tiles_and_calibrated_on_whole_images(tile_model, plates):
    config = read_config(csflow.storage.Location(str(tile_model)))
    assert config["format_version"] == 5
    assert config["architecture"]["tiling"] == {"overlap": 32, "scale": 1.0}
    assert (config["data"]["training_images"], config["data"]["heldout_images"]) == (17, 5)
    model = load_model(str(tile_model))
    assert model.calibration.table.num_rows == 5
    uris = model.calibration.table["image_uri"].to_pylist()
    for uri, score in zip(uris, model.calibration.anomaly_score, strict=True):
        data = (plates / Path(uri).name).read_bytes()
        decoded = decode(data, model.detector.architecture.preprocessing)
        scores = tiled(model.detector)(decoded.pixels_HWC, decoded.height, decoded.width)
        assert scores.anomaly_score_B.item() == pytest.approx(score, rel=1e-3)


def test_scores_have_native_maps_and_regions_in_pixels_of_the_original(tile_model, plates, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    pixels = np.asarray(Image.open(plates / "00.png")).copy()
    pixels[200:220, 130:160] = (255, 0, 255)
    Image.fromarray(pixels).save(images / "defective.png")
    Image.open(plates / "01.png").save(images / "normal.png")
    arguments = ["--precision", "float32", "--false_regions", "0.5", "--false_positive_rate", "0.2"]
    arguments += ["--model", str(tile_model), "--input", str(images), "--output", str(tmp_path / "out")]
    assert run_score(*arguments) == ExitStatus.DONE
    _, (row, normal) = zip(*read_scores(tmp_path / "out").sort_values("image_uri").iterrows(), strict=True)
    assert (row.image_height, row.image_width) == pixels.shape[:2]
    assert (row.map_height, row.map_width) == tuple(-(-side // 8) for side in pixels.shape[:2])
    assert len(row.anomaly_map) == row.map_height * row.map_width
    assert 200 - 8 <= row.peak_y <= 220 + 8
    assert 130 - 8 <= row.peak_x <= 160 + 8
    assert row.p_value < normal.p_value
    worst = row.regions[0]
    assert worst["x"] < 145 < worst["x"] + worst["width"]
    assert worst["y"] < 210 < worst["y"] + worst["height"]
    result = csflow.load(tile_model, precision="float32").score(images / "defective.png")
    assert result.anomaly_score == pytest.approx(row.anomaly_score, rel=1e-4)
    np.testing.assert_allclose(result.anomaly_map.ravel(), row.anomaly_map, rtol=1e-3)
    assert list(result.map_box) == list(row.map_box)


def test_a_model_of_tiles_is_recalibrated_on_whole_images_of_any_size(tile_model, plates, tmp_path):
    arguments = ["--model", tile_model, "--input", plates, "--output", tmp_path / "again"]
    largest = max(Image.open(file).width * Image.open(file).height for file in plates.iterdir())
    config = parse(RecalibrateConfig, None, [*map(str, arguments), "--max_pixels", str(largest - 1)])
    assert recalibrate(config) == ExitStatus.DONE
    before, after = (load_model(str(folder)).calibration.table for folder in (tile_model, tmp_path / "again"))
    assert 0 < after.num_rows < 24  # without the largest
    scores = dict(zip(after["image_uri"].to_pylist(), after["anomaly_score"].to_pylist(), strict=True))
    for uri, score in zip(before["image_uri"].to_pylist(), before["anomaly_score"].to_pylist(), strict=True):
        assert scores.get(uri, score) == pytest.approx(score, rel=1e-3)
