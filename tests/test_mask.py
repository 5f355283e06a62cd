"""The region of interest: what lies outside moves no score, and is no part of what the flow models."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import SMALL_MODEL, copy_some, run_job
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

import csflow
from csflow.config import parse
from csflow.decode_limits import DEFAULT_LIMITS
from csflow.edge.artefact import Artefact
from csflow.errors import ExitStatus, Failed, WrongUse
from csflow.images import decode
from csflow.inputs.listing import list_table
from csflow.interest import OUTSIDE, from_text, to_text
from csflow.model import CrossScaleFlow, Detector
from csflow.model.detector import energies
from csflow.model.flow import negative_log_likelihood
from csflow.model.interleaved_flow import InterleavedFlow
from csflow.model.pyramid import inside_levels
from csflow.model.whitening import Gaussians, Moments, fit_latents, gaussians_of
from csflow.model_directory import load_model
from csflow.preprocessing import Preprocessing
from csflow.storage import Location
from csflow.training.config import TrainConfig
from csflow.training.job import train
from csflow.training.mask import mask_for, read_mask
from csflow.training.variation import find_varying

SIDE = 96
SIZES = [(8, 6), (4, 3)]
SHAPES = [(6, 8, 6), (5, 4, 3)]


def round_mask(height: int, width: int) -> NDArray[np.bool_]:
    y, x = np.mgrid[:height, :width]
    return ((y - height / 2) / (0.4 * height)) ** 2 + ((x - width / 2) / (0.4 * width)) ** 2 <= 1


def inside() -> list[Tensor]:
    return inside_levels(round_mask(64, 48), SIZES)


def random_flow(dtype: torch.dtype) -> CrossScaleFlow:
    """With random γ: with γ = 0 every block is the identity and hides its bugs."""
    torch.manual_seed(1)
    flow = CrossScaleFlow([shape[0] for shape in SHAPES], 2, 8, (3, 1), inside=inside()).to(dtype)
    for block in flow.blocks:
        for subnetwork in (block.subnetwork_first, block.subnetwork_second):
            torch.nn.init.uniform_(subnetwork.gamma_S, 0.2, 1.0)
    return flow


def random_features(images: int, seed: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = [torch.randn(images, *shape, generator=generator) for shape in SHAPES]
    mixing = [torch.randn(shape[0], shape[0], generator=generator) for shape in SHAPES]
    return [
        torch.einsum("cd,bdhw->bchw", matrix, y_BCHW) + 3 for matrix, y_BCHW in zip(mixing, y, strict=True)
    ]


def elsewhere(y: list[Tensor]) -> list[Tensor]:
    """The same features inside of the region, others outside."""
    others = random_features(len(y[0]), seed=9)
    return [
        torch.where(inside_HW > 0, y_BCHW, 50 * other_BCHW)
        for y_BCHW, other_BCHW, inside_HW in zip(y, others, inside(), strict=True)
    ]


def test_a_mask_is_kept_as_text_and_another_size_or_damage_is_refused():
    mask_HW = round_mask(50, 31)
    text = to_text(mask_HW)
    np.testing.assert_array_equal(from_text(text, 50, 31), mask_HW)
    for damaged, height in ((text, 60), (text, 40), (text[:-8], 50), ("%", 50)):
        with pytest.raises(ValueError):
            from_text(damaged, height, 31)


def test_every_map_has_a_place_in_a_region_however_small():
    mask_HW = np.zeros((64, 48), bool)
    mask_HW[10:14, 30:33] = True
    fine, coarse = inside_levels(mask_HW, SIZES)
    assert fine.nonzero().tolist() == [[1, 3]]
    assert coarse.nonzero().tolist() == [[0, 1]]


def test_the_log_determinant_is_that_of_the_dimensions_inside_and_the_others_stay():
    flow = random_flow(torch.float64)
    y = [y_BCHW.double() * inside_HW for y_BCHW, inside_HW in zip(random_features(1), inside(), strict=True)]
    is_inside = torch.cat([
        (inside_HW > 0).expand(shape).flatten() for inside_HW, shape in zip(inside(), SHAPES, strict=True)
    ])  # fmt: skip
    sizes = [y_BCHW.numel() for y_BCHW in y]
    flat = torch.cat([y_BCHW.flatten() for y_BCHW in y])

    def latents_inside(of_inside: Tensor) -> Tensor:
        whole = flat.clone().masked_scatter(is_inside, of_inside)
        parts = whole.split(sizes)
        z = flow([part.view(y_BCHW.shape) for part, y_BCHW in zip(parts, y, strict=True)]).z
        return torch.cat([z_BCHW.flatten() for z_BCHW in z])[is_inside]

    jacobian = torch.autograd.functional.jacobian(latents_inside, flat[is_inside])
    output = flow(y)
    torch.testing.assert_close(output.log_det_B[0], torch.linalg.slogdet(jacobian).logabsdet)
    assert not torch.cat([z_BCHW.flatten() for z_BCHW in output.z])[~is_inside].any()
    restored = flow.inverse(output.z).z
    torch.testing.assert_close(restored, y)
    energy = sum(z_BCHW.square().sum() for z_BCHW in output.z) / 2
    dimensions = int(is_inside.sum())
    loss_B = negative_log_likelihood(output, dimensions)
    torch.testing.assert_close(loss_B[0], (energy - output.log_det_B[0]) / dimensions)


def fitted(y: list[Tensor]) -> Gaussians:
    levels = [
        Moments.around(y_BCHW, inside_HW=inside_HW).with_images(y_BCHW)
        for y_BCHW, inside_HW in zip(y, inside(), strict=True)
    ]
    return gaussians_of(levels)


def test_the_gaussians_are_those_of_the_places_inside_whatever_is_elsewhere():
    y = random_features(300)
    gaussians, other = fitted(y), fitted(elsewhere(y))
    x = gaussians.whitening(y)
    torch.testing.assert_close(gaussians.state_dict(), other.state_dict(), atol=1e-4, rtol=1e-4)
    dimensions = 0
    for x_BCHW, read_BCHW, inside_HW in zip(x, gaussians.positions(x), inside(), strict=True):
        assert not x_BCHW[:, :, inside_HW == 0].any()
        assert read_BCHW[:, :, inside_HW > 0].square().mean() == pytest.approx(1, abs=0.1)
        dimensions += x_BCHW[0, :, inside_HW > 0].numel()
    assert gaussians.whitening.dimensions() == dimensions
    log_det = sum(
        torch.linalg.slogdet(gaussians.whitening.matrix(level).double()).logabsdet * inside_HW.sum()
        for level, inside_HW in enumerate(inside())
    )
    assert gaussians.whitening.log_det() == pytest.approx(float(log_det))


def test_the_flow_of_cpus_gives_the_energies_of_the_trained_one():
    y, flow = random_features(64), random_flow(torch.float32)
    gaussians = fitted(y)
    zero = torch.zeros((), dtype=torch.float64)
    latents = zip(SHAPES, inside(), flow(gaussians.whitening(y)).z, strict=True)
    fit_latents(
        gaussians.latents,
        [Moments.about(zero.expand(s[0]), s, inside_HW=i).with_images(z_BCHW) for s, i, z_BCHW in latents],
    )
    sizes = [(4, *size) for size in SIZES]
    for window in (1, 3):
        interleaved = InterleavedFlow(gaussians, flow, window, torch.float32, sizes).eval()
        some = [y_BCHW[:4] for y_BCHW in y]
        with torch.inference_mode():
            expected = energies(gaussians, flow, some, window)
            torch.testing.assert_close(interleaved(some), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(energies(gaussians, flow, elsewhere(some), window), expected)


@pytest.fixture(scope="module")
def masked(good_cells: Path, ray_cluster: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that looks at the middle of a cell."""
    folder = tmp_path_factory.mktemp("masked")
    Image.fromarray(round_mask(300, 300).astype(np.uint8) * 255).save(folder / "mask.png")
    arguments = ["--input", good_cells, "--output", folder / "model", "--mask", folder / "mask.png"]
    done = run_job("train", *arguments, *SMALL_MODEL)
    assert done.returncode == 0, done.stderr
    return folder / "model"


@pytest.mark.soak
def test_what_lies_outside_moves_no_score_of_any_form(
    masked: Path, model: Path, cells: Path, tmp_path: Path
) -> None:
    y, x = np.mgrid[:300, :300]
    # A little away from the mask, since resizing mixes pixels across its border.
    far_HW = ((y - 150) / 130) ** 2 + ((x - 150) / 130) ** 2 > 1
    random = np.random.default_rng(0)
    pairs = []
    for path in sorted(copy_some(cells / "defective", tmp_path / "cells", 6).iterdir()):
        with Image.open(path) as image:
            pixels_HWC = np.array(image.convert("RGB"))
        pixels_HWC[far_HW] = random.integers(0, 256, (far_HW.sum(), 3))
        Image.fromarray(pixels_HWC).save(tmp_path / f"other-{path.name}")
        pairs.append((path, tmp_path / f"other-{path.name}"))
    with_mask, without = csflow.load(masked), csflow.load(model)
    for path, other in pairs:
        one, two = with_mask.score(path), with_mask.score(other)
        assert one.anomaly_score == two.anomaly_score
        assert one.p_value == two.p_value
        np.testing.assert_array_equal(one.anomaly_map, two.anomaly_map)
        assert without.score(path).anomaly_score != without.score(other).anomaly_score
    assert len({with_mask.score(path).anomaly_score for path, _ in pairs}) > 1

    exported = tmp_path / "model.onnx"
    exporting = [sys.executable, "-m", "csflow.cli", "export", str(masked), "--to", "onnx"]
    done = subprocess.run([*exporting, "--output", str(exported)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    artefact = Artefact(exported)
    artefact.check()
    for path, other in pairs:
        judged = [artefact.judge(decode(file.read_bytes(), artefact.preprocessing)) for file in (path, other)]
        assert judged[0].anomaly_score_B[0] == judged[1].anomaly_score_B[0]
        assert judged[0].anomaly_score_B[0] == pytest.approx(with_mask.score(path).anomaly_score, rel=1e-3)


def test_the_model_keeps_its_mask_and_its_map_is_zero_elsewhere(masked: Path, good_cells: Path) -> None:
    config = json.loads((masked / "config.json").read_text())
    mask_HW = from_text(config["architecture"]["mask"], 128, 128)
    assert mask_HW.mean() == pytest.approx(round_mask(128, 128).mean(), abs=0.01)
    detector: Detector = load_model(Location(str(masked))).detector
    image = decode(sorted(good_cells.iterdir())[0].read_bytes(), detector.architecture.preprocessing)
    assert (image.pixels_HWC[~mask_HW] == OUTSIDE).all()
    scores = detector(torch.from_numpy(image.pixels_HWC)[None])
    corner = scores.anomaly_map_BHW[0, :2, :2]
    assert not corner.any()
    assert scores.anomaly_map_BHW.max() > 0.5
    loss = json.loads((masked / "metrics.json").read_text())
    assert loss["validation_loss"] < 3


def geojson_of(path: Path, rings: object) -> str:
    path.write_text(json.dumps({"type": "Polygon", "coordinates": rings}))
    return str(path)


def image_of(path: Path, pixels_HW: NDArray[np.uint8]) -> str:
    Image.fromarray(pixels_HW.astype(np.uint8)).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none.png", "--mask .*none.png cannot be read .*name an image, or a Geo"),
        (lambda folder: folder / "text.png", "--mask .*text.png cannot be read .*unsupported_format"),
        (
            lambda folder: image_of(folder / "black.png", np.zeros((300, 300))),
            "is all black; .* must be white",
        ),
        (
            lambda folder: image_of(folder / "small.png", np.pad([[255]], (150, 149))),
            "nothing is left of its region at 128 x 128 pixels; enlarge the region or --image_size",
        ),
        (
            lambda folder: image_of(folder / "wide.png", np.full((100, 200), 255)),
            "has 100 x 200 pixels, and .* 300 x 300: the mask must have the shape of the photographs",
        ),
        (
            lambda folder: geojson_of(folder / "beyond.json", [[(0, 0), (400, 0), (400, 90)]]),
            "beyond.json has the point x 400, y 0 outside of a picture of 300 x 300 pixels",
        ),
    ],
)
def test_a_wrong_mask_is_one_line_and_exit_2(make, message, good_cells, ray_cluster, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    arguments = ["--input", good_cells, "--output", tmp_path / "m", "--mask", make(tmp_path), *SMALL_MODEL]
    with pytest.raises(WrongUse, match=message):
        train(parse(TrainConfig, None, list(map(str, arguments))))
    assert not list((tmp_path / "m").rglob("*")), "no feature was extracted"


@pytest.mark.parametrize("other", [["--tile", "64"], ["--augment"], ["--recipe", "paper"]])
def test_settings_that_a_mask_cannot_go_with_are_refused(other):
    arguments = ["--input", "good", "--output", "m", "--mask", "mask.png", *other]
    named = " ".join(other) if other[0] == "--recipe" else other[0]
    with pytest.raises(WrongUse, match=f"--mask and {named} exclude each other"):
        parse(TrainConfig, None, arguments)


def test_a_mask_of_zeros_and_ones_is_read_and_placed_as_photographs_are(tmp_path):
    mask_HW = np.zeros((100, 200))
    mask_HW[:, :100] = 1
    read = read_mask(config_of(image_of(tmp_path / "mask.png", mask_HW), fit="letterbox"))
    found_HW = from_text(read.text, 64, 64)
    assert (read.height, read.width) == (100, 200)
    assert found_HW[16:48, :31].all()
    assert not found_HW[:15].any()
    assert not found_HW[:, 33:].any()


def config_of(mask: str, **settings: object) -> TrainConfig:
    return TrainConfig(input=["good"], output="m", mask=mask, image_size=[64], **settings)


SQUARE = [(20, 20), (100, 20), (100, 80), (20, 80), (20, 20)]
HOLE = [(40, 40), (60, 40), (60, 60), (40, 60), (40, 40)]
CORNER = [(180, 0), (200, 0), (200, 20)]


def coco(segmentations: dict[int, object], sizes: dict[int, tuple[int, int]]) -> dict[str, object]:
    images = [{"id": number, "height": h, "width": w} for number, (h, w) in sizes.items()]
    annotations = [{"image_id": number, "segmentation": s} for number, s in segmentations.items()]
    return {"images": images, "annotations": annotations, "categories": []}


FLAT = [np.ravel(ring).tolist() for ring in (SQUARE, CORNER)]


@pytest.mark.parametrize("fit", ["stretch", "letterbox", "crop"])
def test_polygons_are_filled_where_an_image_of_them_is_white(fit, tmp_path):
    shapes = {"type": "MultiPolygon", "coordinates": [[SQUARE, HOLE], [CORNER]]}
    features = [{"type": "Feature", "geometry": geometry} for geometry in (shapes, None)]
    with_hole = [(SQUARE, 255), (HOLE, 0), (CORNER, 255)]
    sizes = {7: (100, 200), 8: (100, 200), 9: (50, 50)}
    for content, rings in (
        (shapes, with_hole),
        ({"type": "FeatureCollection", "features": features}, with_hole),
        (coco({7: FLAT, 8: FLAT}, sizes), [(SQUARE, 255), (CORNER, 255)]),
    ):
        drawn = Image.new("L", (200, 100))
        for ring, level in rings:
            points = [(x - 0.5, y - 0.5) for x, y in ring]
            ImageDraw.Draw(drawn).polygon(points, fill=level)
        drawn.save(tmp_path / "mask.png")
        expected = read_mask(config_of(str(tmp_path / "mask.png"), fit=fit))
        (tmp_path / "mask").write_text(json.dumps(content))
        mask = mask_for(read_mask(config_of(str(tmp_path / "mask"), fit=fit)), [(100, 200)] * 2)
        assert (mask.height, mask.width) == (100, 200)
        assert (from_text(mask.text, 64, 64) ^ from_text(expected.text, 64, 64)).mean() < 0.005


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"type": "Polygon", "coordinates": [[(0, 0), (9, 9), (0, 0)]]}, "has a polygon of 2 points"),
        ({"type": "Polygon", "coordinates": [[(0, 0), (9, 9), (5, 5)]]}, "encloses no area"),
        ({"type": "Polygon", "coordinates": [[0, 0]]}, "is wrong at 0.0: Input should be a valid list"),
        ({"type": "LineString", "coordinates": []}, "has a LineString, which is no area"),
        ({"type": "FeatureCollection", "features": []}, "has no polygon"),
        ({"shapes": []}, "is neither GeoJSON .* nor COCO"),
        (coco({}, {1: (9, 9)}), "has no annotation"),
        (
            coco({1: {"counts": [0, 81], "size": [9, 9]}}, {1: (9, 9)}),
            "run-length .* export polygons, or save",
        ),
        (
            coco({1: FLAT, 2: FLAT[:1]}, dict.fromkeys((1, 2), (100, 200))),
            "different annotations for 2 images",
        ),
        (coco({1: FLAT, 2: FLAT}, {1: (100, 200), 2: (200, 200)}), "different annotations for 2 images"),
        (coco({3: FLAT}, {1: (100, 200)}), "annotation of image 3, which it does not list"),
        (coco({1: FLAT}, {1: (100, 100)}), "point x 180, y 0 outside of a picture of 100 x 100 pixels"),
    ],
)
def test_polygons_that_are_no_region_are_one_line(content, message, tmp_path):
    (tmp_path / "mask.json").write_text(json.dumps(content))
    with pytest.raises(WrongUse, match=f"--mask .*mask.json .*{message}"):
        read_mask(config_of(str(tmp_path / "mask.json")))


def test_coordinates_without_a_size_need_photographs_of_one(tmp_path):
    mask = read_mask(config_of(geojson_of(tmp_path / "mask.json", [SQUARE])))
    with pytest.raises(WrongUse, match="100 x 200 pixels, but a photograph 200 x 400, and GeoJSON does not"):
        mask_for(mask, [(100, 200), (200, 400)])
    with pytest.raises(Failed, match="the first of them cannot be read"):
        mask_for(mask, [])


@pytest.fixture(scope="module")
def on_a_fixture(good_cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Round pieces of cells, which lie a little differently each time, on a background that stays."""
    folder = tmp_path_factory.mktemp("fixture") / "good"
    folder.mkdir()
    random = np.random.default_rng(0)
    still_HW = np.asarray(Image.open(min(good_cells.iterdir())).convert("L").rotate(90), np.float64)
    for path in sorted(good_cells.iterdir())[:24]:
        with Image.open(path) as image:
            cell_HW = np.asarray(image.convert("L"), np.float64)
        place = random.integers(-6, 7, 2)
        pixels_HW = np.where(np.roll(round_mask(300, 300), place, (0, 1)), cell_HW, still_HW)
        pixels_HW += random.normal(0, 2, (300, 300))  # of the sensor
        image_of(folder / path.name, pixels_HW.clip(0, 255))
    return folder


def test_auto_is_where_photographs_vary_or_everywhere(on_a_fixture, good_cells):
    preprocessing = Preprocessing((128, 128))
    images = list_table([str(on_a_fixture)], {})
    found = find_varying(images, preprocessing, {}, DEFAULT_LIMITS)
    inside_HW, part_HW = from_text(found.text, 128, 128), round_mask(128, 128)
    assert inside_HW[part_HW].all()
    assert inside_HW[~part_HW].mean() < 0.35, "a margin, and where the part may lie"
    assert not inside_HW[:4].any()
    assert f"looks at {inside_HW.mean():.0%} of the pixels" in found.line
    again = find_varying(images.take(pa.array(range(24)[::-1])), preprocessing, {}, DEFAULT_LIMITS)
    assert again == found
    whole = find_varying(list_table([str(good_cells)], {}), preprocessing, {}, DEFAULT_LIMITS)
    assert whole.text is None
    assert "48 photographs vary by about the same everywhere" in whole.line


def test_a_training_with_auto_keeps_its_mask_when_it_is_continued(on_a_fixture, ray_cluster, tmp_path):
    arguments = ["--input", on_a_fixture, "--output", tmp_path, "--mask", "auto", *SMALL_MODEL, "--epochs", 1]
    masks = []
    for flags in ([], ["--resume", "--workers", 2]):
        assert train(parse(TrainConfig, None, [str(a) for a in (*arguments, *flags)])) == ExitStatus.DONE
        masks.append(load_model(Location(str(tmp_path))).detector.architecture.mask)
    assert masks[0] == masks[1]
    mask_HW = from_text(masks[0], 128, 128)
    assert mask_HW[round_mask(128, 128)].all()
    assert mask_HW.mean() < 0.7
    with Image.open(tmp_path / "mask.png") as image:
        np.testing.assert_array_equal(np.asarray(image), mask_HW)
    assert "white in [mask.png](mask.png)" in (tmp_path / "README.md").read_text()


def test_jobs_print_it(masked):
    done = subprocess.run(
        [sys.executable, "-m", "csflow.cli", "inspect", str(masked)], capture_output=True, text=True
    )
    assert done.returncode == ExitStatus.DONE, done.stderr
    assert "50% of the pixels are looked at" in done.stdout
