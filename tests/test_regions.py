"""Regions of anomaly maps: they are what a flood fill finds, and normal images have as many as wanted."""

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from csflow.calibration import p_values, region_threshold
from csflow.preprocessing import Preprocessing, whole
from csflow.regions import find_regions, region_levels, region_pixels

Cells = set[tuple[int, int]]


def maps(images: int, side: int = 12, seed: int = 0, blur: float = 0.8) -> NDArray[np.float32]:
    """Maps of normal images, with a few regions at most thresholds."""
    noise = np.random.default_rng(seed).standard_normal((images, side, side))
    return ndimage.gaussian_filter(noise, (0, blur, blur)).astype(np.float32)


def flood_fill(map_HW: NDArray[np.float32], threshold: float) -> Iterator[Cells]:
    """The regions of a map, cell by cell."""
    hot = {(int(row), int(column)) for row, column in np.argwhere(map_HW > threshold)}
    while hot:
        region, waiting = set(), [hot.pop()]
        while waiting:
            row, column = waiting.pop()
            region.add((row, column))
            around = {(row + down, column + across) for down in (-1, 0, 1) for across in (-1, 0, 1)} & hot
            hot -= around
            waiting += around
        yield region


def overlap(start: float, end: float, side: float) -> float:
    return max(0.0, min(end, side) - max(start, 0.0))


@pytest.mark.parametrize("fit", ["stretch", "letterbox", "crop"])
def test_regions_are_those_of_a_flood_fill_with_boxes_and_areas_in_pixels_of_the_original(fit):
    sizes = [(300, 500), (480, 90), (64, 64)] * 7
    map_BHW = maps(len(sizes))
    boxes = [Preprocessing((96, 96), fit).place(*size).box for size in sizes]
    heights, widths = np.transpose(sizes)
    regions = find_regions(map_BHW, 0.4, heights, widths, np.array(boxes))
    hidden = 0
    for image, ((height, width), (top, left, bottom, right)) in enumerate(zip(sizes, boxes, strict=True)):
        down, across = (bottom - top) / 12, (right - left) / 12
        expected = []
        for cells in flood_fill(map_BHW[image], 0.4):
            areas = {
                (row, column): overlap(top + row * down, top + (row + 1) * down, height)
                * overlap(left + column * across, left + (column + 1) * across, width)
                for row, column in cells
            }
            seen = sorted(cell for cell, area in areas.items() if area > 0)
            hidden += len(cells) - len(seen)
            if not seen:
                continue
            rows, columns = np.transpose(seen)
            y, end_y = np.clip([top + rows.min() * down, top + (rows.max() + 1) * down], 0, height)
            x, end_x = np.clip([left + columns.min() * across, left + (columns.max() + 1) * across], 0, width)
            values = map_BHW[image][rows, columns]
            area = sum(areas.values())
            expected.append([x, y, end_x - x, end_y - y, area, values.max(), values.mean(dtype=float)])
        of_image = regions.take(regions.image_N == image)
        found = np.transpose(
            [
                *(of_image.x_N, of_image.y_N, of_image.width_N, of_image.height_N),
                *(of_image.area_N, of_image.peak_N, of_image.mean_N),
            ]
        )
        np.testing.assert_allclose(found, sorted(expected, key=lambda region: -region[5]), rtol=1e-6)
    assert (hidden > 0) == (fit == "letterbox"), "cells in the padding are none of the image's"
    assert len(regions.image_N) > 20


def test_cells_that_touch_at_a_corner_are_one_region_and_those_of_two_images_are_not():
    map_BHW = np.zeros((2, 4, 4), np.float32)
    map_BHW[0, 3, 2] = map_BHW[0, 2, 3] = map_BHW[1, 3, 3] = 2
    map_BHW[1, 0, 0] = 3
    regions = find_regions(map_BHW, 1, [8, 8], [8, 8], np.array([whole(8, 8)] * 2))
    assert regions.image_N.tolist() == [0, 1, 1]
    assert regions.peak_N.tolist() == [2, 3, 2]
    assert regions.area_N.tolist() == [8, 4, 4]
    assert regions.x_N.tolist() == [4, 0, 6]


def test_a_cell_at_the_threshold_is_in_no_region():
    map_BHW = np.full((1, 3, 3), 0.1, np.float32)
    assert not len(find_regions(map_BHW, float(map_BHW.max()), [3], [3], np.array([whole(3, 3)])).image_N)


def test_the_levels_above_a_threshold_are_the_most_regions_at_it_or_a_higher_one():
    for map_HW in [*maps(4, 9), *np.round(maps(4, 9, seed=1), 1)]:
        levels = region_levels(map_HW, 16)
        assert levels[0] == map_HW.max()
        most = 0
        for threshold in [*np.unique(map_HW)[::-1].tolist(), -np.inf]:
            most = max(most, sum(1 for _ in flood_fill(map_HW, threshold)))
            assert (levels > threshold).sum() == min(most, 16)


def test_with_one_level_per_image_the_threshold_is_that_of_map_maxima():
    levels_N1 = np.array([3.0, 1, 2, 4, 9, 8, 7, 6, 5])[:, None]
    assert [region_threshold(levels_N1, wanted) for wanted in (0.05, 0.099)] == [None, None]
    found = [region_threshold(levels_N1, wanted) for wanted in (0.1, 0.15, 0.199, 0.2, 0.9)]
    assert found == [9, 9, 9, 8, 1]


def test_a_new_image_counts_with_as_many_regions_as_the_worst_held_out_one():
    levels = np.array([[9.0, 8, 7], [6, -np.inf, -np.inf], [5, 2, -np.inf]] + [[1.0, -np.inf, -np.inf]] * 7)
    # 10 + 1 images: 1 region at 9, 2 + 1 at 8 (above it lies 9), 2 + 2 at 7, 3 + 3 at 6, 4 + 3 at 5.
    for wanted, threshold in ((1 / 11, 9), (2 / 11, 8), (3.9 / 11, 8), (4 / 11, 7), (6 / 11, 6), (7 / 11, 5)):
        assert region_threshold(levels, wanted) == threshold
    assert region_threshold(levels, 0.9 / 11) is None


@pytest.fixture(scope="module")
def normal_levels() -> NDArray[np.float64]:
    """Levels of normal images, of which few have most of the regions: a dirty lens."""
    is_dirty = np.random.default_rng(0).random(1000) < 0.02
    map_NHW = maps(1000, seed=5) * (1 + is_dirty)[:, None, None].astype(np.float32)
    return np.array([region_levels(map_HW, 8) for map_HW in map_NHW])


@pytest.mark.parametrize(("heldout", "wanted"), [(30, 0.1), (99, 0.02), (99, 0.3)])
def test_the_mean_number_of_regions_of_normal_images_is_at_most_what_was_asked_for(
    normal_levels, heldout, wanted
):
    random = np.random.default_rng(heldout)
    counts = []
    for _ in range(300):
        levels = random.permutation(normal_levels)
        threshold = region_threshold(levels[:heldout], wanted)
        of_worst = max(1, (levels[:heldout] > threshold).sum(1).max())
        counts.append((levels[heldout:] > threshold).sum(1).clip(max=of_worst).mean())
    assert np.mean(counts) <= wanted + 2.6 * np.std(counts) / np.sqrt(len(counts))
    assert np.mean(counts) >= 0.5 * wanted


def test_the_smallest_p_value_of_an_images_regions_is_honest_for_the_image():
    map_BHW = maps(2000, seed=3)
    maxima_B = map_BHW.max((1, 2))
    heldout, new = maxima_B[:1000], map_BHW[1000:]
    sides = [10] * len(new)
    regions = find_regions(new, float(np.median(heldout)), sides, sides, np.array([whole(10, 10)] * len(new)))
    smallest = np.ones(len(new))
    np.minimum.at(smallest, regions.image_N, p_values(regions.peak_N, heldout))
    for rate in (0.01, 0.05, 0.2):
        assert (smallest <= rate).mean() == pytest.approx(rate, abs=2.6 * np.sqrt(2 * rate / 1000))


@pytest.mark.parametrize("fit", ["stretch", "letterbox", "crop"])
def test_the_pixels_of_a_region_are_those_whose_centres_its_cells_cover(fit):
    height, width = 100, 170
    box = Preprocessing((96, 96), fit).place(height, width).box
    for map_HW in maps(8, seed=9):
        regions = find_regions(map_HW[None], 0.3, [height], [width], np.array([box]))
        pixels_HW = region_pixels(map_HW, 0.3, height, width, box)
        assert pixels_HW.shape == (height, width)
        assert pixels_HW.max() == len(regions.peak_N) > 1
        top, left = np.array(box[:2])
        down, across = (box.bottom - top) / 12, (box.right - left) / 12
        for n in range(len(regions.peak_N)):
            rows, columns = np.nonzero(pixels_HW == n + 1)
            cell_rows, cell_columns = ((rows + 0.5 - top) // down, (columns + 0.5 - left) // across)
            values = map_HW[cell_rows.astype(int), cell_columns.astype(int)]
            assert values.min() > 0.3
            assert values.max() == regions.peak_N[n]
            assert abs(len(rows) - regions.area_N[n]) <= regions.width_N[n] + regions.height_N[n]
            assert abs(columns.min() - regions.x_N[n]) <= 0.5
            assert abs(rows.max() + 1 - regions.y_N[n] - regions.height_N[n]) <= 0.5
