"""Scores whole images with a detector that sees tiles: cuts them, and joins the maps of their tiles.

Where tiles overlap, their maps are averaged with weights that fall towards the tiles' edges, where a tile
shows least of what surrounds a place. All scores of an image come from the joined maps, without what lies in
the padding.

Dimension letters: T tiles, C channels, H height, W width, A averages and the anomaly map, S levels of the
pyramid.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from csflow.model.inference import InferenceDetector
from csflow.model.statistic import Scores, StandardisedStatistic
from csflow.preprocessing import Box


class TiledDetector:
    """Scores one image after another."""

    def __init__(self, form: InferenceDetector) -> None:
        """`form` scores the tiles. Raises ValueError if its detector sees whole images."""
        statistic, self._preprocessing = form.statistic, form.architecture.preprocessing
        if self._preprocessing.tiling is None or not isinstance(statistic, StandardisedStatistic):
            raise ValueError("the detector sees whole images, and no tiles")
        self._statistic, self._form = statistic, form
        self._device = form.device
        self._tile = form.architecture.image_size
        self._tile_cells = statistic.size
        self._cell = self._tile[0] // statistic.size[0]
        overlap_cells = self._preprocessing.tiling.overlap // self._cell
        self._weight_HW = torch.outer(*(_falling(cells, overlap_cells) for cells in self._tile_cells)).to(
            self._device
        )

    @torch.inference_mode()
    def __call__(self, pixels_HWC: NDArray[np.uint8], height: int, width: int) -> Scores:
        """The scores of one image (B = 1), on the CPU; the map covers `map_box`.

        Args:
            pixels_HWC: the image as `csflow.images.decode` gives it.
            height: height of the original in pixels; `width` likewise.
        """
        corners = self._preprocessing.tile_corners(height, width)
        rows, columns = (side // self._cell for side in pixels_HWC.shape[:2])
        sum_AHW = torch.zeros(3, rows, columns, device=self._device)
        weight_HW = torch.zeros(rows, columns, device=self._device)
        scales_S: list[Tensor] = []
        for some, tiles_THWC in self._batches(pixels_HWC, corners):
            scores = self._form(tiles_THWC)
            maps_TAHW = torch.cat([scores.averages_BAHW, scores.anomaly_map_BHW[:, None]], dim=1).float()
            for corner, maps_AHW in zip(some, maps_TAHW, strict=True):
                place = self._cells(*corner)
                sum_AHW[:, *place] += self._weight_HW * maps_AHW
                weight_HW[place] += self._weight_HW
            scales_S.extend(scores.scale_scores_BS)
        seen = self._seen(height, width)
        joined_AHW = sum_AHW[:, *seen] / weight_HW[seen]
        joined_A1HW = joined_AHW[:, None]
        scale_scores_BS = torch.stack(scales_S).mean(0, keepdim=True)
        scores = self._statistic.scores(joined_A1HW[:2], joined_A1HW[2], scale_scores_BS)
        return Scores(*(value.cpu() for value in scores))

    def map_box(self, height: int, width: int) -> Box:
        """The part of an original of this size that its map covers, in its pixels.

        It begins with the image, and ends with it or less than a cell behind it.
        """
        rows, columns = self._map_size(height, width)
        scaled_height, scaled_width = self._preprocessing.place(height, width).size
        return Box(
            0.0,
            0.0,
            rows * self._cell * height / scaled_height,
            columns * self._cell * width / scaled_width,
        )

    def _batches(
        self, pixels_HWC: NDArray[np.uint8], corners: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[Sequence[tuple[int, int]], Tensor]]:
        size = self._form.form.batch_size
        for start in range(0, len(corners), size):
            some = corners[start : start + size]
            tiles = [cut(pixels_HWC, corner, self._tile) for corner in some]
            yield some, torch.from_numpy(np.stack(tiles)).to(self._device)

    def _cells(self, top: int, left: int) -> tuple[slice, slice]:
        """Rows and columns of the padded image's map that belong to the tile with this corner."""
        row, column = top // self._cell, left // self._cell
        return slice(row, row + self._tile_cells[0]), slice(column, column + self._tile_cells[1])

    def _seen(self, height: int, width: int) -> tuple[slice, slice]:
        """Rows and columns of the padded image's map that show the image."""
        above, left, _, _ = self._preprocessing.place(height, width).padding
        row, column = above // self._cell, left // self._cell
        rows, columns = self._map_size(height, width)
        return slice(row, row + rows), slice(column, column + columns)

    def _map_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the map of an original of this size."""
        scaled_height, scaled_width = self._preprocessing.place(height, width).size
        return math.ceil(scaled_height / self._cell), math.ceil(scaled_width / self._cell)


def cut(pixels_HWC: NDArray[np.uint8], corner: tuple[int, int], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The tile with this upper left corner, and this height and width; a view."""
    top, left = corner
    return pixels_HWC[top : top + size[0], left : left + size[1]]


def _falling(cells: int, overlap: int) -> Tensor:
    """Weights along a tile's side, which fall to both ends; those of two overlapping tiles add up to 1."""
    place = torch.arange(cells) + 0.5
    from_edge = torch.minimum(place, cells - place)
    return (from_edge / max(overlap, 1)).clamp(max=1.0) if overlap else torch.ones(cells)
