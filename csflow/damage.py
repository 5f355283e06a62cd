"""Explains why image bytes cannot be decoded, and finds damage in bytes that can be."""

import re
import struct
import zlib
from collections.abc import Callable

import simplejpeg
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import STRIPBYTECOUNTS, STRIPOFFSETS, TILEBYTECOUNTS, TILEOFFSETS, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from csflow.errors import ErrorCode, ImageError

_UNSUPPORTED = re.compile(
    "unknown pixel mode|unknown data organization|cannot handle|unsupported|not yet supported", re.I
)
_ENDS_EARLY = re.compile("truncated|premature end|not enough image data", re.I)


def diagnosis(error: Exception, image_file: type[ImageFile], data: bytes) -> ErrorCode:
    """Why Pillow failed. The structure decides first: Pillow's message varies with where a file ends."""
    if is_cut_short(image_file, data) or _ENDS_EARLY.search(str(error)):
        return ErrorCode.TRUNCATED
    if _UNSUPPORTED.search(str(error)):
        return ErrorCode.UNSUPPORTED_FORMAT
    return ErrorCode.CORRUPT


def check_undamaged(image_file: type[ImageFile], data: bytes) -> None:
    """Raises ImageError if a file that Pillow decodes is damaged inside, as far as its format tells.

    Decoders fill in what is missing: grey in a JPEG, anything in a lossy WebP. Formats know the sizes of
    their parts, PNG its checksums, and libjpeg warns of codes that end early or make no sense. In a lossless
    WebP, a tail of zeros cannot be told from a picture: flat colour is coded as zeros, too.
    """
    if is_cut_short(image_file, data):
        raise ImageError(ErrorCode.TRUNCATED, "the file is shorter than its parts say")
    if image_file is JpegImageFile:
        try:
            # At an eighth of the size, which needs all codes, but little arithmetic.
            simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=8, strict=True)
        except ValueError as error:
            is_short = _ENDS_EARLY.search(str(error))
            raise ImageError(ErrorCode.TRUNCATED if is_short else ErrorCode.CORRUPT, str(error)) from None
    if image_file is PngImageFile and (kind := _damaged_chunk(data)):
        raise ImageError(ErrorCode.CORRUPT, f"the checksum of the PNG's chunk {kind} is wrong")
    if image_file is WebPImageFile and _ends_in_zeros(data):
        raise ImageError(ErrorCode.CORRUPT, "the WebP ends in more zeros than flat colour is coded as")


def is_cut_short(image_file: type[ImageFile], data: bytes) -> bool:
    """Whether the file ends before its structure does, as far as its format tells."""
    return _CUT_SHORT.get(image_file, _boxes_cut_short)(data)


def _damaged_chunk(data: bytes) -> str | None:
    """The kind of the first chunk of a PNG with a wrong checksum."""
    position = 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 8 + length
        if zlib.crc32(memoryview(data)[position + 4 : end]).to_bytes(4, "big") != data[end : end + 4]:
            return data[position + 4 : position + 8].decode("latin-1")
        if data[position + 4 : position + 8] == b"IEND":
            break
        position = end + 4
    return None


def _ends_in_zeros(data: bytes) -> bool:
    """Whether the coded picture of a lossy WebP ends in more zero bytes than blocks of one colour take."""
    position = 12
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        picture = data[position + 8 : position + 8 + length]
        if kind == b"VP8 " and len(picture) >= 10:
            width, height = (size & 0x3FFF for size in struct.unpack_from("<HH", picture, 6))
            blocks = -(-width // 16) * -(-height // 16)
            zeros = length - len(picture.rstrip(b"\0"))
            return zeros > WEBP_ZEROS_OF_BLOCK * blocks + WEBP_ZEROS_AT_END
        position += 8 + length + length % 2
    return False


WEBP_ZEROS_OF_BLOCK, WEBP_ZEROS_AT_END = 1, 16
"""libwebp codes 16 x 16 pixels of one colour as 0.71 bytes at most (at quality 100, method 0)."""


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


def jpeg_scans(data: bytes) -> int:
    """Number of scans; 1 without looking further if the first has all channels in full.

    Markers are two bytes that the coded data between them cannot hold.
    """
    position, components, is_progressive = 2, 0, False
    while position + 10 <= len(data):
        marker, length = struct.unpack_from(">HH", data, position)
        if marker == 0xFFDA:
            is_single = not is_progressive and data[position + 4] == components
            return 1 if is_single else data.count(b"\xff\xda", position)
        if marker in _FRAMES:
            components, is_progressive = data[position + 9], marker in _PROGRESSIVE
        position += 2 + length if 0xFFC0 <= marker < 0xFFFF else 1  # a marker may follow filling bytes
    return 0


_PROGRESSIVE = {0xFFC2, 0xFFC6, 0xFFCA, 0xFFCE}
_FRAMES = {marker for marker in range(0xFFC0, 0xFFD0) if marker not in (0xFFC4, 0xFFC8, 0xFFCC)}
"""Start of frame, of any coding."""


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


def _jpeg2000_cut_short(data: bytes) -> bool:
    """Whether the end marker is missing, which no coded picture can hold."""
    return b"\xff\xd9" not in data


def _boxes_cut_short(data: bytes) -> bool:
    """Whether a box of an AVIF or HEIC, its index or its picture lies beyond the end (ISO/IEC 14496-12).

    What trails behind the picture and is no box does no harm.
    """
    position, kind = 0, b""
    kinds = set()
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if length == 1:
            if position + 16 > len(data):
                return True
            (length,) = struct.unpack_from(">Q", data, position + 8)
        kinds.add(kind)
        if length == 0:  # up to the end
            length = len(data) - position
        elif length < 8:
            return False  # damaged
        position += length
    has_index = b"meta" in kinds or b"moov" in kinds
    has_picture = b"mdat" in kinds or b"idat" in data  # the latter is inside of the index
    return not has_index or not has_picture or (position > len(data) and kind in _BOXES)


_BOXES = {b"ftyp", b"meta", b"moov", b"mdat", b"free", b"skip", b"uuid"}


_CUT_SHORT: dict[type[ImageFile], Callable[[bytes], bool]] = {
    JpegImageFile: _jpeg_cut_short,
    PngImageFile: _png_cut_short,
    WebPImageFile: _webp_cut_short,
    BmpImageFile: _bmp_cut_short,
    TiffImageFile: tiff_cut_short,
    Jpeg2KImageFile: _jpeg2000_cut_short,
}
