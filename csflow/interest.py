"""The region of interest: the pixels that a model looks at.

A camera sees more than the part: a conveyor belt, fixtures, the next part. What lies outside a mask becomes
one colour before the backbone, so that it cannot move a score, and is no part of what the flow models.

Dimension letters: H height, W width.
"""

import base64
import zlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

OUTSIDE = (124, 116, 104)
"""Colour of pixels outside, the mean colour of the images that backbones were trained on: their features
there are near zero, and no edge is stronger than it has to be."""


def to_text(mask_HW: NDArray[np.bool_]) -> str:
    """A mask as text, which a model's config.json keeps."""
    return base64.b64encode(zlib.compress(np.packbits(mask_HW).tobytes(), 9)).decode()


@lru_cache(16)
def from_text(text: str, height: int, width: int) -> NDArray[np.bool_]:
    """The mask (H, W) in a text. Raises ValueError if the text is none of this size."""
    most = height * width
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(base64.b64decode(text, validate=True), -(-most // 8) + 1)
    except zlib.error as error:
        raise ValueError(f"the mask is damaged: {error}") from None
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    if not most <= len(bits) < most + 8:
        raise ValueError(f"the mask is not one of {height} x {width} pixels")
    mask_HW = bits[:most].astype(bool).reshape(height, width)
    mask_HW.flags.writeable = False  # it is shared
    return mask_HW
