"""Reads masks of defects: images whose nonzero pixels are defective, stored in many ways.

A mask is data, not a picture: a value of 1 out of 65,535 is a label, however dark. But JPEG compression turns
black into grey. Defective pixels are:

- Grey and colour: those that are not black. The brightest channel of a colour image counts.
- More than 8 bits, float: those that are not zero in some channel.
- Palettes: by colour if colours tell the indices apart and one of them is black; otherwise by index.
- Alpha: visible pixels that are not black or, if there are none, visible pixels. Constant alpha is ignored.
- Grey ringing (`_has_ringing`): those at least half as bright as the brightest pixel.
"""

import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from csflow.errors import ErrorCode, ImageError
from csflow.images import StoredImage, decode_stored
from csflow.inputs import archives
from csflow.inputs.objects import ObjectStore
from csflow.inputs.reading import ImageReader
from csflow.wide_samples import WideImage

DEADLINE_S = 60.0
"""Seconds during which transient failures of one mask are tried again."""

RINGING_TOP = 128
"""A mask of 8 bits whose brightest value is lower holds labels; only black-and-white masks show ringing."""
FEW_LEVELS = 8
"""A mask with at most this many values above zero may hold labels."""
NEAR_WHITE = 0.95
"""Share of the brightest value above which grey is near white. Ringing also leaves grey beside white."""
GRAIN = 2 / 3
"""Share of differing neighbours above which dark grey is not an area. JPEGs of any quality have at least 3/4,
labels of 3 x 3 pixels or more at most 1/2."""


class Mask(NamedTuple):
    """Which pixels of an image are defective."""

    is_defective_HW: NDArray[np.bool_]
    is_thresholded: bool
    """Whether darker pixels were not black, and were taken for ringing."""


class MaskReader:
    """Reads masks from files, objects and members of archives. Threads may share it."""

    def __init__(self, storage_options: Mapping[str, Any]) -> None:
        self._store = ObjectStore(storage_options, DEADLINE_S)
        self._reader = ImageReader(storage_options, DEADLINE_S)
        self._indexes: dict[str, dict[str, str]] = {}
        self._lock = threading.Lock()

    def read(self, mask_uri: str) -> Mask:
        """The mask in its own resolution. Raises ImageError: unreadable, or NOT_FOUND if there is none."""
        return decode_mask(self._reader.read(mask_uri, self._version(mask_uri)))

    def _version(self, uri: str) -> str:
        member = archives.split_member(uri)
        if member is None:
            return self._store.stat(uri).version
        version = self._index(member[0]).get(uri)
        if version is None:
            raise ImageError(ErrorCode.NOT_FOUND, "the archive has no such member")
        return version

    def _index(self, archive_uri: str) -> dict[str, str]:
        with self._lock:
            if archive_uri not in self._indexes:
                archive = self._store.stat(archive_uri)
                members = archives.list_members(self._store, archive, lambda name: True)
                self._indexes[archive_uri] = {member.uri: member.version for member in members}
            return self._indexes[archive_uri]


def decode_mask(data: bytes) -> Mask:
    """The mask in these bytes. Raises ImageError as `csflow.images.decode`."""
    stored = decode_stored(data)
    levels_HW = _levels(stored)
    if levels_HW.dtype != np.uint8:
        return Mask(levels_HW != 0, is_thresholded=False)
    top = int(levels_HW.max())
    is_dark_HW = (levels_HW > 0) & (levels_HW < top / 2)
    if is_dark_HW.any() and (stored.is_lossy or _has_ringing(levels_HW, is_dark_HW)):
        return Mask(levels_HW >= top / 2, is_thresholded=True)
    return Mask(levels_HW > 0, is_thresholded=False)


def _levels(stored: StoredImage) -> NDArray[Any]:
    """One value per pixel, shape (height, width), 0 where there is no defect; uint8 if it may be grey."""
    image = stored.image
    if isinstance(image, WideImage):
        return _wide_colour_levels(image)
    if image.mode == "P":
        return _palette_levels(image)
    if image.mode in {"I", "F"} or image.mode.startswith("I;16"):
        return _wide_levels(np.asarray(image), stored.is_white_zero)
    if image.mode in {"1", "L"}:
        grey_HW = np.asarray(image.convert("L"))
        # White is zero: then the labels 0 and 1 are white and nearly white, and black is what is darkest.
        darkest = int(grey_HW.min()) if stored.is_white_zero else 0
        return grey_HW - np.uint8(darkest if darkest < 255 else 0)
    if image.mode not in {"LA", "PA", "RGBA", "La", "RGBa"}:
        return _brightest_channel(image)
    alpha_HW = np.asarray(image.getchannel(image.getbands()[-1]))
    if alpha_HW.min() == alpha_HW.max():
        return _brightest_channel(image)
    visible_HW = _brightest_channel(image.convert("RGBA").convert("RGBa"))
    return visible_HW if visible_HW.any() else alpha_HW


def _brightest_channel(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode == "RGBa":
        return np.asarray(image)[..., :3].max(axis=2)
    return np.asarray(image.convert("RGB")).max(axis=2)


def _palette_levels(image: Image.Image) -> NDArray[Any]:
    index_HW = np.asarray(image)
    used = np.unique(index_HW)
    colours_NC = np.zeros((256, 3), np.uint8)
    entries_NC = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    colours_NC[: len(entries_NC)] = entries_NC
    colours = {tuple(colours_NC[index].tolist()) for index in used}
    if len(colours) == len(used) and (0, 0, 0) in colours:
        return colours_NC.max(axis=1)[index_HW]
    return index_HW != 0


def _wide_colour_levels(image: WideImage) -> NDArray[Any]:
    """As of colour and alpha of 8 bits, but nothing is rounded: a label of 1 in 65,535 is a label."""
    if image.colour_HWC.shape[2] == 4:
        raise ImageError(ErrorCode.UNSUPPORTED_FORMAT, "CMYK of more than 8 bits; save the mask as grey")
    levels_HW = _wide_levels(image.colour_HWC.max(axis=2), image.is_white_zero)
    alpha_HW = image.alpha_HW
    if alpha_HW is None or alpha_HW.min() == alpha_HW.max():
        return levels_HW
    visible_HW = (levels_HW != 0) & (alpha_HW != 0)
    return visible_HW if visible_HW.any() else alpha_HW


def _wide_levels(values_HW: NDArray[Any], is_white_zero: bool) -> NDArray[Any]:
    if not np.isfinite(values_HW).all():
        raise ImageError(ErrorCode.CORRUPT, "float pixels that are NaN or infinite")
    # Black is the largest of the stored values, unless all are white.
    return values_HW != values_HW.max() if is_white_zero and values_HW.any() else values_HW


def _has_ringing(levels_HW: NDArray[np.uint8], is_dark_HW: NDArray[np.bool_]) -> bool:
    """Whether dark pixels are traces of compression in black areas, and not labels.

    Labels have few values, or lie in areas. Ringing and soft edges have many values, some of them near white,
    and hardly any pixel has the value of its neighbour.
    """
    top = int(levels_HW.max())
    used = np.flatnonzero(np.bincount(levels_HW.ravel(), minlength=256))
    is_near_white = (used >= NEAR_WHITE * top) & (used < top)
    if top < RINGING_TOP or not (is_near_white.any() or np.count_nonzero(used) > FEW_LEVELS):
        return False
    pairs = differing = 0
    for turned_HW, is_dark in ((levels_HW, is_dark_HW), (levels_HW.T, is_dark_HW.T)):
        is_pair = is_dark[1:] | is_dark[:-1]
        pairs += int(is_pair.sum())
        differing += int((is_pair & (turned_HW[1:] != turned_HW[:-1])).sum())
    return differing > GRAIN * pairs
