"""Which tiles of an image a training sees."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from csflow.model.tiles import cut
from csflow.preprocessing import Preprocessing


@dataclass(frozen=True)
class TileSample:
    """Draws tiles of images: all of them, or a random choice that depends on the image's content only."""

    preprocessing: Preprocessing
    most: int
    """Largest number of tiles of an image."""

    def count(self, height: int, width: int) -> int:
        """The number of tiles that are drawn from an original of this size."""
        return min(self.most, len(self.preprocessing.tile_corners(height, width)))

    def draw(
        self, pixels_HWC: NDArray[np.uint8], height: int, width: int, content_digest: str
    ) -> list[NDArray[np.uint8]]:
        """The pixels of the tiles, copied, so that the image may go.

        Args:
            pixels_HWC: the image as `csflow.images.decode` gives it.
            height: height of the original in pixels; `width` likewise.
            content_digest: hexadecimal digest of the image's bytes.
        """
        corners = self.preprocessing.tile_corners(height, width)
        random = np.random.default_rng(int(content_digest, 16))
        drawn = random.choice(len(corners), self.count(height, width), replace=False)
        size = self.preprocessing.image_size
        return [cut(pixels_HWC, corners[number], size).copy() for number in sorted(drawn)]
