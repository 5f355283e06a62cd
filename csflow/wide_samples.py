"""Reads what Pillow would misread: TIFFs with planes, TIFFs and PNGs whose samples do not fit into 8 bits.

Pillow knows only some combinations of byte order, sample format, planes and compression, and mistakes others
for them without an error: 16-bit planar colour comes out doubled and striped, big-endian floats under LZW as
noise, signed bytes as unsigned. tifffile, the reference of microscopy, reads them all; imagecodecs has its
codecs, and reads 16-bit colour of PNGs, which Pillow cuts to 8. `tests/test_decoders.py` compares them.
"""

import io
import logging
import math
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile

from csflow.damage import tiff_cut_short
from csflow.errors import ErrorCode, ImageError

# H, W: rows and columns; C: channels, 1 of grey, 3 of RGB or 4 of CMYK.

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # damaged tags, which do not matter or raise

_CHANNELS: dict[int, int] = {
    tifffile.PHOTOMETRIC.MINISWHITE: 1,
    tifffile.PHOTOMETRIC.MINISBLACK: 1,
    tifffile.PHOTOMETRIC.RGB: 3,
    tifffile.PHOTOMETRIC.PALETTE: 1,
    tifffile.PHOTOMETRIC.SEPARATED: 4,
}
_ORIENTATION, _MAX_SAMPLE_VALUE = 274, 281
_COMPRESSIONS = {
    *(tifffile.COMPRESSION.NONE, tifffile.COMPRESSION.LZW, tifffile.COMPRESSION.PACKBITS),
    *(tifffile.COMPRESSION.ADOBE_DEFLATE, tifffile.COMPRESSION.DEFLATE),
    *(tifffile.COMPRESSION.LZMA, tifffile.COMPRESSION.ZSTD),
}
"""Those whose strips are as large as the page says. JPEG 2000 and others have a size of their own."""
_PLAIN_FORMATS = {tifffile.SAMPLEFORMAT.UINT, tifffile.SAMPLEFORMAT.VOID}
_LARGEST_CHUNK = 1 << 26
"""Most values in a strip or tile that is larger than its image, as the edges of tiles are."""

WIDE_KINDS = (
    "a TIFF whose pixels are of a kind that is not read, such as floats of 64 bits; save it as grey, RGB or "
    "CMYK with integers of 8 or 16 bits, or floats of 32, uncompressed or with LZW, deflate or Zstandard"
)


class WideImage(NamedTuple):
    """The stored samples of an image, in upright rows if it is a TIFF, in stored ones if it is a PNG."""

    colour_HWC: npt.NDArray[Any]
    alpha_HW: npt.NDArray[Any] | None
    is_premultiplied: bool
    """Whether the colours are already those over black."""
    bits: int
    """Bits of a sample in the file; those of the array may be more."""
    significant_bits: int
    """Bits that the samples use, fewer than `bits` if the file of a camera of 10, 12 or 14 bits says so."""
    is_white_zero: bool


class Levels(NamedTuple):
    """Samples in 8 bits, of the shape that they had."""

    levels: npt.NDArray[np.uint8]
    range_used: float
    """The brightest sample as a share of the range that was taken to be white."""


# --- TIFF ------------------------------------------------------------------------------------------------


def wide_page(data: bytes) -> tifffile.TiffPage | None:
    """The first page of a TIFF that Pillow might misread, or None.

    It has channels in planes, or samples that are not unsigned integers of up to 8 bits. If tifffile cannot
    read the tags, Pillow will say what is wrong.
    """
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages.first
            is_plain = page.bitspersample <= 8 and page.sampleformat in _PLAIN_FORMATS
            has_planes = page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and page.samplesperpixel > 1
    except Exception:  # tifffile raises anything
        return None
    is_ours = has_planes or not is_plain
    return page if is_ours and isinstance(page, tifffile.TiffPage) else None


def page_size(page: tifffile.TiffPage) -> tuple[int, int]:
    """Width and height of the upright image."""
    size = page.imagewidth, page.imagelength
    return size[::-1] if _orientation(page) >= 5 else size


def read_page(page: tifffile.TiffPage, data: bytes) -> WideImage:
    """The samples of a page. Raises ImageError: UNSUPPORTED_FORMAT, TRUNCATED or CORRUPT."""
    channels = _CHANNELS.get(page.photometric)
    if channels is None or page.samplesperpixel != channels + len(page.extrasamples) or not _is_read(page):
        raise ImageError(ErrorCode.UNSUPPORTED_FORMAT, WIDE_KINDS)
    if tiff_cut_short(data):
        raise ImageError(ErrorCode.TRUNCATED, "a strip or tile of the TIFF lies beyond its end")
    if math.prod(page.chunks) > max(_LARGEST_CHUNK, math.prod(page.shape)):
        raise ImageError(ErrorCode.CORRUPT, f"strips or tiles of {page.chunks} values")
    with tifffile.TiffFile(io.BytesIO(data)) as file:  # a page reads from its file, which was closed
        samples = file.pages.first.asarray(maxworkers=1).reshape(page.shaped)  # planes, depth, H, W, samples
    samples_HWC = np.moveaxis(samples[:, 0], 0, 2).reshape(*samples.shape[2:4], -1)
    bits = page.bitspersample
    colour_HWC, alpha_HW = samples_HWC[..., :channels], None
    if page.colormap is not None:
        colour_HWC, bits = page.colormap.T[samples_HWC[..., 0]], 16
    kinds = [int(kind) for kind in page.extrasamples]
    alpha = next((kind for kind in kinds if kind in (1, 2)), None)  # of TIFF 6.0: associated, unassociated
    if alpha is not None:
        alpha_HW = upright(samples_HWC[..., channels + kinds.index(alpha)], _orientation(page))
    return WideImage(
        upright(colour_HWC, _orientation(page)),
        alpha_HW,
        is_premultiplied=alpha == 1,
        bits=bits,
        significant_bits=_tagged_bits(page, bits, colour_HWC),
        is_white_zero=page.photometric == tifffile.PHOTOMETRIC.MINISWHITE,
    )


def _is_read(page: tifffile.TiffPage) -> bool:
    if page.dtype is None or page.imagedepth != 1 or page.compression not in _COMPRESSIONS:
        return False
    is_integer = page.dtype.kind in "iu" and page.dtype.itemsize <= 4
    return is_integer or page.dtype == np.float32


def _tagged_bits(page: tifffile.TiffPage, bits: int, colour_HWC: npt.NDArray[Any]) -> int:
    """The bits that MaxSampleValue leaves.

    Many programs write the image's own maximum there. That says nothing of the range, so only what is all
    ones, as 4095, counts.
    """
    tag: Any = page.tags.valueof(_MAX_SAMPLE_VALUE)
    top = tag[0] if isinstance(tag, tuple) and tag else tag
    if not isinstance(top, int) or colour_HWC.dtype.kind != "u" or not 255 <= top < 2**bits:
        return bits
    is_range = top & (top + 1) == 0 and colour_HWC.max() <= top
    return top.bit_length() if is_range else bits


def _orientation(page: tifffile.TiffPage) -> int:
    orientation: Any = page.tags.valueof(_ORIENTATION)
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def upright(stored: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """The rows of a raster that is stored with this EXIF orientation."""
    if orientation >= 5:
        stored = stored.swapaxes(0, 1)
        orientation = {5: 1, 6: 2, 7: 3, 8: 4}[orientation]
    return {1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1]}[orientation]


# --- PNG -------------------------------------------------------------------------------------------------


def read_png(data: bytes) -> WideImage:
    """The samples of a PNG of 16 bits. A transparent colour counts as alpha."""
    samples = imagecodecs.png_decode(data)
    samples_HWC = samples.reshape(*samples.shape[:2], -1)
    has_alpha = samples_HWC.shape[2] in (2, 4)
    colour_HWC = samples_HWC[..., : samples_HWC.shape[2] - has_alpha]
    return WideImage(
        colour_HWC,
        samples_HWC[..., -1] if has_alpha else None,
        is_premultiplied=False,
        bits=16,
        significant_bits=png_bits(data, colour_HWC),
        is_white_zero=False,
    )


def png_bits(data: bytes, samples: npt.NDArray[np.uint16]) -> int:
    """The bits that the samples of a 16-bit PNG use: 16, or those of sBIT if the samples are not scaled.

    PNG wants samples scaled to 16 bits even if sBIT says that fewer are significant; then their low bits are
    zeros or repeat the high ones. Cameras that store 0 to 4095 beside an sBIT of 12 have not done so.
    """
    bits = _significant_bits(data)
    if not 8 <= bits < 16 or samples.max() >= 2**bits:
        return 16
    # Of dark samples the repeated bits are zeros; other ways of scaling may round up by one.
    is_scaled = not (samples & (2 ** (16 - bits) - 2)).any()
    return 16 if is_scaled else bits


def _significant_bits(data: bytes) -> int:
    """The largest number of bits in the chunk sBIT; 16 if there is none."""
    for kind, body in _chunks(data):
        if kind == b"sBIT" and body:
            return max(body)
        if kind == b"IDAT":
            break
    return 16


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = 8
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        yield kind, data[position + 8 : position + 8 + length] if kind == b"sBIT" else b""
        position += 12 + length


# --- 8 bits ----------------------------------------------------------------------------------------------


def alpha_levels(image: WideImage) -> npt.NDArray[np.uint8]:
    """The alpha channel (H, W) in 8 bits; it may be full where colours use fewer bits."""
    assert image.alpha_HW is not None
    is_full = image.alpha_HW.max() >= 2**image.significant_bits
    return scale(image.alpha_HW, image.bits if is_full else image.significant_bits).levels


def colour_levels(image: WideImage) -> Levels:
    """The colours of an image in 8 bits, and its grey with black as 0."""
    is_integer = image.colour_HWC.dtype.kind == "u" and image.bits <= 16
    if image.colour_HWC.shape[2] > 1 and is_integer:
        # The high byte, as Pillow takes it: an error below one level.
        high_HWC = image.colour_HWC >> (image.significant_bits - 8)
        return Levels(high_HWC.astype(np.uint8), float(high_HWC.max()) / 255)
    scaled = scale(image.colour_HWC, image.significant_bits)
    return Levels(255 - scaled.levels, scaled.range_used) if image.is_white_zero else scaled


def scale(values: npt.NDArray[Any], bits: int) -> Levels:
    """Integers or floats in 8 bits: black is 0, white is the top of the range.

    The range of up to 24 bits is that of the bits that are used (32767 for 16, if signed). 32-bit
    integers and floats rarely fill their range, so theirs is the first of 1 (floats only), 255, 65535 and the
    type's own that holds the brightest pixel. Filters overshoot, so pixels up to half a range too bright or
    too dark are clipped. The range only grows if the smaller one cannot be meant: a 0-to-255 image no
    brighter than 1.5 is black.

    Raises ImageError: UNSUPPORTED_FORMAT if no range holds the pixels, CORRUPT if some are not finite.
    """
    is_signed = values.dtype.kind == "i"
    if values.dtype.kind == "f":
        tops = [1, 255, 65535]
        if not np.isfinite(values).all():
            raise ImageError(ErrorCode.CORRUPT, "float pixels that are NaN or infinite")
    elif bits == 32:
        tops = [255, 65535, 2**31 - 1 if is_signed else 2**32 - 1]
    else:
        tops = [2 ** (bits - is_signed) - 1]
    low, high = float(values.min()), float(values.max())
    top = next((top for top in tops if high <= 1.5 * top), None)
    if top is None or low < -0.5 * top:
        raise ImageError(
            ErrorCode.UNSUPPORTED_FORMAT,
            f"pixels from {low:g} to {high:g}; rescale to 0..{' or 0..'.join(map(str, tops))}",
        )
    scaled = np.multiply(values, 255 / top, dtype=np.float32)
    scaled = np.clip(np.rint(scaled, out=scaled), 0, 255, out=scaled)
    return Levels(scaled.astype(np.uint8), high / top)
