"""Explains why image bytes cannot be decoded: they end early, are damaged or of an unsupported kind."""

import re
import struct
from collections.abc import Callable

from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import STRIPBYTECOUNTS, STRIPOFFSETS, TILEBYTECOUNTS, TILEOFFSETS, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from csflow.errors import ErrorCode

_UNSUPPORTED = re.compile(
    "unknown pixel mode|unknown data organization|cannot handle|unsupported|not yet supported", re.I
)
_ENDS_EARLY = re.compile("truncated|not enough image data", re.I)


def diagnosis(error: Exception, image_file: type[ImageFile], data: bytes) -> ErrorCode:
    """Why Pillow failed. The structure decides first: Pillow's message varies with where a file ends."""
    if _CUT_SHORT[image_file](data) or _ENDS_EARLY.search(str(error)):
        return ErrorCode.TRUNCATED
    if _UNSUPPORTED.search(str(error)):
        return ErrorCode.UNSUPPORTED_FORMAT
    return ErrorCode.CORRUPT


def _jpeg_cut_short(data: bytes) -> bool:
    """Whether start of scan or the end marker after it is missing. EXIF thumbnails have their own marker."""
    position = 2
    while position + 4 <= len(data):
        marker, length = struct.unpack_from(">HH", data, position)
        if marker == 0xFFDA:
            return b"\xff\xd9" not in data[position:]
        if marker < 0xFFC0:
            return False  # no segment: damaged
        position += 2 + length
    return True


def _png_cut_short(data: bytes) -> bool:
    """Whether the chunks stop before IEND."""
    position = 8
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IEND" or not kind.isalpha():
            return False  # whole, or no chunk here: damaged
        position += 12 + length
    return True


def _webp_cut_short(data: bytes) -> bool:
    """Whether the RIFF container claims more bytes than there are."""
    riff_bytes = int.from_bytes(data[4:8], "little")
    return riff_bytes + 8 > len(data)


def _bmp_cut_short(data: bytes) -> bool:
    """Whether the header claims more bytes than there are."""
    file_bytes = int.from_bytes(data[2:6], "little")
    return file_bytes > len(data)


def tiff_cut_short(data: bytes) -> bool:
    """Whether the first directory, one of its values, or a strip or tile lies beyond the end (TIFF 6.0)."""
    order = "<" if data.startswith(b"II") else ">"
    is_big = 43 in data[2:4]
    word, entry_count = ("Q", "Q") if is_big else ("I", "H")
    blocks: dict[int, tuple[int, ...]] = {}
    try:
        (position,) = struct.unpack_from(order + word, data, 8 if is_big else 4)
        (entries,) = struct.unpack_from(order + entry_count, data, position)
        position += struct.calcsize(order + entry_count)
        for _ in range(entries):
            tag, kind, n_values = struct.unpack_from(order + "HH" + word, data, position)
            value = position + 4 + struct.calcsize(order + word)
            position = value + struct.calcsize(order + word)
            n_bytes = n_values * _TIFF_VALUE_BYTES.get(kind, 1)
            if n_bytes > struct.calcsize(order + word):
                (value,) = struct.unpack_from(order + word, data, value)
            if value + n_bytes > len(data):
                return True
            if tag in {*_TIFF_BLOCK_TAGS, *_TIFF_BLOCK_TAGS.values()} and kind in _TIFF_INTEGERS:
                blocks[tag] = struct.unpack_from(f"{order}{n_values}{_TIFF_INTEGERS[kind]}", data, value)
    except (struct.error, OverflowError):
        return True
    return any(
        start + length > len(data)
        for starts, lengths in _TIFF_BLOCK_TAGS.items()
        for start, length in zip(blocks.get(starts, ()), blocks.get(lengths, ()), strict=False)
    )


_TIFF_VALUE_BYTES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Bytes per value, by its type. Types that are not here have one byte."""
_TIFF_INTEGERS = {3: "H", 4: "I", 16: "Q"}
_TIFF_BLOCK_TAGS = {STRIPOFFSETS: STRIPBYTECOUNTS, TILEOFFSETS: TILEBYTECOUNTS}

_CUT_SHORT: dict[type[ImageFile], Callable[[bytes], bool]] = {
    JpegImageFile: _jpeg_cut_short,
    PngImageFile: _png_cut_short,
    WebPImageFile: _webp_cut_short,
    BmpImageFile: _bmp_cut_short,
    TiffImageFile: tiff_cut_short,
}
