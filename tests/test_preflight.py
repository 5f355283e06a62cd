"""What a job says before it works: sizes of images and map cells, and whether anything can be flagged."""

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from csflow import duration
from csflow.calibration import heldout_for, lowest_rate, p_values, why_none_is_flagged
from csflow.errors import WrongUse
from csflow.inputs.listing import list_table
from csflow.model import Architecture
from csflow.preflight import describe_images, some_sizes, spread
from csflow.preprocessing import Preprocessing
from csflow.training.advice import calibration_warning
from csflow.training.config import CROSS_BELOW, TrainConfig
from csflow.training.job import train
from csflow.training.loop import LoopSettings
from csflow.training.split import split_sizes


def described(folder, fit="stretch", map_shape=(8, 8)):
    images = list_table([str(folder)], {})
    sizes = some_sizes(images, {})
    return describe_images(images.num_rows, sizes, Preprocessing((256, 256), fit), map_shape)


def test_the_description_names_the_size_of_the_photographs_and_of_a_map_cell_in_their_pixels(cells):
    assert described(cells / "functional" / "test") == (
        "508 images of 300 × 300 → 256 × 256 pixels; a map cell is 38 × 38 pixels of the original"
    )


def test_a_map_cell_is_that_of_the_part_that_the_model_sees(tmp_path):
    Image.new("L", (2448, 2048)).save(tmp_path / "wide.jpg")
    assert "1 image of 2448 × 2048 → 256 × 256 pixels; a map cell is 306 × 256 pixels" in described(tmp_path)
    cropped = described(tmp_path, "crop")
    assert "a map cell is 256 × 256 pixels" in cropped


def test_a_photograph_turned_by_its_camera_is_described_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (40, 30)).save(tmp_path / "turned.jpg", exif=exif)
    assert "1 image of 30 × 40 →" in described(tmp_path)


def test_images_of_several_sizes_are_described_by_the_smallest_and_the_largest_looked_at(tmp_path):
    for number, side in enumerate((64, 128, 256)):
        Image.new("L", (side, side)).save(tmp_path / f"{number}.png")
    assert "3 images of 64 × 64 to 256 × 256 →" in described(tmp_path)
    assert "32 × 32 pixels of the largest of them" in described(tmp_path)


def test_images_that_cannot_be_read_are_only_counted(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert described(tmp_path) == "1 image → 256 × 256 pixels, 8 × 8 map cells"


def test_rows_looked_at_are_spread_over_the_listing():
    rows = [spread(pa.table({"row": range(images)}))["row"].to_pylist() for images in (0, 1, 3, 100)]
    assert rows == [[], [0], [0, 1, 2], [0, 33, 66, 99]]


@pytest.mark.parametrize("rate", [0.5, 0.1, 0.03, 0.01, 0.001])
def test_the_held_out_images_that_a_rate_needs_are_the_fewest_with_which_the_worst_image_is_flagged(rate):
    def flags(heldout):
        return bool(p_values([1.0], np.zeros(heldout))[0] <= rate)

    assert flags(heldout_for(rate))
    assert not flags(heldout_for(rate) - 1)
    assert why_none_is_flagged(heldout_for(rate), rate) is None
    assert why_none_is_flagged(heldout_for(rate) - 1, rate)


@pytest.mark.parametrize("heldout", [1, 3, 12, 40, 99, 998])
def test_at_the_lowest_rate_that_is_proposed_the_worst_image_is_flagged(heldout):
    assert p_values([1.0], np.zeros(heldout))[0] <= lowest_rate(heldout) <= 1.1 / (heldout + 1)


def test_too_few_held_out_images_are_told_of_with_every_remedy_that_works():
    warning = calibration_warning(60, 12, holdout=0.2, validation=0.1)
    assert warning == (
        "12 images are held out, so the smallest p-value is 0.077, and --false_positive_rate 0.01 can flag "
        "no image, however bad; train on 495 images, or score with --false_positive_rate 0.077"
    )
    # Half of 60 images are too few, but half of 250 are enough.
    assert "train with --holdout 0.4" in calibration_warning(250, 50, holdout=0.2, validation=0.1)
    for images, holdout in ((495, 0.2), (250, 0.4)):
        heldout = split_sizes(images, 0.1, holdout)[2]
        assert calibration_warning(images, heldout, holdout, 0.1) is None


def test_images_that_are_held_out_in_turn_need_no_other_share_to_be_enough():
    assert calibration_warning(99, 99, 0.2, 0.1, is_cross=True) is None
    assert calibration_warning(60, 60, 0.2, 0.1, is_cross=True) == (
        "60 images are held out, so the smallest p-value is 0.017, and --false_positive_rate 0.01 can flag "
        "no image, however bad; train on 99 images, or score with --false_positive_rate 0.017"
    )


@pytest.mark.parametrize(
    ("images", "flags", "expected"),
    [
        (CROSS_BELOW - 1, {}, "cross"),
        (CROSS_BELOW, {}, "holdout"),
        (60, {"holdout": 0.5}, "holdout"),
        (60, {"validation": 0}, "holdout"),
        (60, {"trim": 0.1}, "holdout"),
        (60, {"recipe": "paper"}, "holdout"),
        (60, {"calibration": "holdout"}, "holdout"),
        (5000, {"calibration": "cross"}, "cross"),
    ],
)
def test_few_images_are_held_out_in_turn_unless_something_else_is_asked_for(images, flags, expected):
    config = TrainConfig(input=["good"], output="model", **flags)
    assert config.with_calibration(images).calibration == expected
    # What a model stores of its training decides the same.
    again = TrainConfig.model_validate(config.with_calibration(images).model_dump())
    assert again.with_calibration(images).calibration == expected


def test_images_that_are_held_out_in_turn_are_not_shown_so_often_that_the_flow_learns_them_by_heart():
    config = TrainConfig(input=["good"], output="model")
    epochs = [LoopSettings.of(config.with_calibration(n), n).epochs for n in (60, 499, 500)]
    assert epochs == [6, 6, 9]
    told = config.model_copy(update={"epochs": 40, "calibration": "cross"})
    assert LoopSettings.of(told, 60).epochs == 40


def test_what_cannot_be_held_out_in_turn_is_refused(tmp_path):
    for flags, message in (
        ({"trim": 0.1}, "--calibration cross and --trim exclude each other"),
        ({"augment": True}, "--calibration cross and --augment exclude each other"),
        ({"recipe": "paper"}, "models of --recipe paper need --calibration holdout"),
    ):
        with pytest.raises(WrongUse, match=message):
            train(TrainConfig(input=["good"], output=str(tmp_path / "m"), calibration="cross", **flags))


def test_the_duration_is_a_range_around_what_was_measured_and_grows_with_the_work():
    minutes = [
        duration.in_words(duration.training_seconds(size, 1000, 4200, cpus))
        for size, cpus in (((256, 256), 2), ((256, 256), 1), ((512, 512), 2))
    ]
    # The README's demo shows 2,100 images in 47 s, and extracts 1,000 in about 20 s.
    assert minutes == ["about 1 to 5 minutes", "about 2 to 10 minutes", "about 4 to 16 minutes"]
    assert duration.in_words(duration.scoring_seconds((256, 256), 60, 2)) == "under 2 minutes"
    assert duration.in_words(100, 1000) == "about 1 to 42 minutes"
    assert duration.in_words(36_000) == "about 6 to 25 hours"


def test_nothing_is_said_about_the_duration_with_a_model_that_was_not_measured():
    default = Architecture.to_json(TrainConfig(input=["good"], output="model").architecture())
    assert duration.is_measured(default)
    for name, value in (("backbone", "resnet50"), ("hidden_channels", 1024), ("kernel_sizes", [3])):
        assert not duration.is_measured(default | {name: value})


def test_a_training_on_absurdly_few_images_is_refused_before_any_work(good_cells, tmp_path):
    few = [str(path) for path in sorted(good_cells.iterdir())[:9]]
    with pytest.raises(WrongUse, match=r"--input has 9 images, .* fewer than 10; add images of good parts"):
        train(TrainConfig(input=few, output=str(tmp_path / "model")))
    assert not (tmp_path / "model" / "_work").exists()
