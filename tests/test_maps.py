"""Anomaly maps over images."""

import numpy as np
import pytest
from PIL import Image

from csflow.maps import ANCHORS, COLOUR_TABLE, overlay

GREY = Image.new("RGB", (90, 60), (120, 120, 120))


def _map(hot: tuple[int, int] | None = None, value: float = 10.0) -> np.ndarray:
    anomaly_map = np.zeros((4, 6), dtype=np.float32)
    if hot is not None:
        anomaly_map[hot] = value
    return anomaly_map


def test_overlay_has_the_size_and_mode_of_the_image() -> None:
    drawn = overlay(GREY, _map(), vmin=0, vmax=1)
    assert (drawn.size, drawn.mode) == ((90, 60), "RGB")


def test_values_up_to_vmin_leave_the_image_as_it_is() -> None:
    assert np.array_equal(overlay(GREY, _map() - 5, vmin=0, vmax=1), GREY)


def test_the_hot_cell_is_drawn_at_its_place_and_nowhere_else() -> None:
    drawn = np.asarray(overlay(GREY, _map(hot=(3, 0)), vmin=0, vmax=10), dtype=int)
    changed = np.abs(drawn - 120).sum(axis=2)
    assert changed[52, 7] > 100
    assert changed[:30].max() == 0
    assert changed[:, 45:].max() == 0


def test_one_value_has_one_colour_in_every_image() -> None:
    alone = np.asarray(overlay(GREY, np.full((4, 6), 3, np.float32), vmin=0, vmax=10))
    beside_hotter = _map(hot=(0, 5))
    beside_hotter[:, :3] = 3
    assert np.array_equal(np.asarray(overlay(GREY, beside_hotter, vmin=0, vmax=10))[:, :30], alone[:, :30])


def test_alpha_grows_with_the_value() -> None:
    white = Image.new("RGB", (6, 4), "white")
    ramp = np.tile(np.linspace(0, 1, 6, dtype=np.float32), (4, 1))
    table_colour = COLOUR_TABLE[(ramp[0] * 255).round().astype(int)].astype(float)
    drawn = np.asarray(overlay(white, ramp, vmin=0, vmax=1), dtype=float)[0]
    blue = slice(2, 3)  # the channel in which no colour of the scale's lower part is white
    alpha = ((255 - drawn[:, blue]) / (255 - table_colour[:, blue])).ravel()
    assert alpha == pytest.approx(0.8 * ramp[0], abs=0.02)


def test_values_above_vmax_and_values_that_are_no_number_are_brightest() -> None:
    expected = np.asarray(overlay(GREY, np.full((4, 6), 10, np.float32), vmin=0, vmax=10))
    for value in (11.0, np.inf, np.nan):
        drawn = overlay(GREY, np.full((4, 6), value, np.float32), vmin=0, vmax=10)
        assert np.array_equal(drawn, expected)


def test_the_colour_scale_gets_brighter_at_every_step() -> None:
    luminance = COLOUR_TABLE @ np.array([0.2126, 0.7152, 0.0722])
    assert (COLOUR_TABLE.shape, tuple(COLOUR_TABLE[0]), tuple(COLOUR_TABLE[-1])) == (
        (256, 3),
        ANCHORS[0],
        ANCHORS[-1],
    )
    assert (np.diff(luminance) > -0.5).all()


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(ValueError, match="must be below"):
        overlay(GREY, _map(), vmin=1, vmax=1)
