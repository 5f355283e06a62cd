"""Decodes image bytes to pixels, for training, scoring and report, and masks with their stored values.

`decode` is part of a model's preprocessing: the same bytes always give the same pixels. Its rules:

- The first frame of animated and multi-page files is taken. ICC profiles and gamma are ignored.
- EXIF orientation is applied. Damaged EXIF counts as none, as in every viewer.
- Transparent pixels become black, whatever colour the exporting program left under them; a partly transparent
  pixel is laid over black. If all pixels are transparent, the colours are taken: frames saved from BGRX have
  zeros where alpha would be.
- Grey of 12, 16 and 32 bits and float is scaled by its type (`wide_samples.scale`), never by its own minimum
  and maximum, but by fewer bits where sBIT or MaxSampleValue says that no more are used. Colour of 16 bits is
  cut to its high byte, an error below one level.
- TIFFs with planes, or of other samples than unsigned ones of up to 8 bits, are read by tifffile
  (`csflow.wide_samples`).
- CMYK becomes RGB by the plain formula. CMYK JPEGs are taken as inverted, as Adobe writes them.
- AVIF and colour in HEIC of 10 and 12 bits, and colour in JPEG 2000 of more than 8, become 8 bits as their
  decoders do it.
- Letterboxes are filled on each side with the mean colour of the adjoining row or column (`_padded`). An
  image that is cut into tiles is continued by its reflection.

Models of decoding version 1 are given the pixels that they were trained with: without the colours of wholly
transparent images, without sBIT and MaxSampleValue, and with all TIFFs read by Pillow.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from PIL import AvifImagePlugin, ExifTags, Image, ImageChops, PngImagePlugin
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    COLORMAP,
    PHOTOMETRIC_INTERPRETATION,
    SAMPLEFORMAT,
    TiffImageFile,
)
from PIL.WebPImagePlugin import WebPImageFile

from csflow.damage import check_undamaged, diagnosis, is_cut_short, jpeg_scans
from csflow.decode_limits import MAX_PIXELS, OF_PROCESS, PixelBudget
from csflow.errors import ErrorCode, ImageError
from csflow.exif import taken_at
from csflow.interest import OUTSIDE, from_text
from csflow.preprocessing import DECODING_VERSION, Box, Interpolation, Placement, Preprocessing, whole
from csflow.wide_samples import (
    WIDE_KINDS,
    Levels,
    WideImage,
    alpha_levels,
    colour_levels,
    page_size,
    png_bits,
    read_page,
    read_png,
    scale,
    upright,
    wide_page,
)

# H, W: rows and columns of the upright image; C: red, green, blue.

PngImagePlugin.MAX_TEXT_CHUNK = 1 << 26
"""Most bytes of an unpacked colour profile or text, which take no part. Pillow itself refuses a megabyte."""
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a job has a thread for each processor already
HEIC_BRANDS = frozenset([b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1"])
_RASTERS: dict[str | None, int] = {"AVIF": 2, "HEIF": 2, "JPEG2000": 5}
"""How many times the memory of its raster a decoder takes, by the format; of others once."""
MAX_BRANDS_BYTES = 1024
MAX_SCANS = 100
"""Most scans of a JPEG. Encoders write ten or so; a file of thousands takes minutes."""
_DRAFT_MARGIN = 1.5
# A JPEG is decoded at 1/2, 1/4 or 1/8 only if that leaves 1.5 times the wanted sides. With no margin the
# resizing filter has nothing left to do and the image comes out sharper than one decoded in full: on 768 px
# photographs asked for at 384, 4.3 levels of 255 on average, against at most 1.6 with it.
_REDUCING_GAP = 3.0
# Box-reduces huge rasters first; 0.3 levels from the plain filter, a quarter faster at 3000 px.

_BAND_ROWS = 512
_BLOCK_BYTES = 1 << 26
# Pillow's default, 16 MB, is less than what glibc maps singly. A thread's freed rasters would stay with it.

_FILTERS: dict[Interpolation, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that turns the stored raster upright, by EXIF orientation; 5 to 8 swap height and width."""


_StoredBox = tuple[float, float, float, float]
"""Left, upper, right and lower edge in the raster as it is stored, in Pillow's order."""


class DecodedImage(NamedTuple):
    """The pixels of an image, and the size of its original."""

    pixels_HWC: npt.NDArray[np.uint8]
    """RGB, contiguous, of the size that the caller asked for, or as large as what is cut into tiles."""
    height: int
    """Height of the upright original in pixels; `width` likewise."""
    width: int
    box: Box
    """The area that the pixels cover, in pixels of the original: all of it if stretched, a part if cropped,
    more than the original if letterboxed or padded for tiles."""
    range_used: float | None = None
    """Of images of more than 8 bits a sample: the brightest sample as a share of what counts as white."""
    taken_at: datetime | None = None
    """When the camera says that it took the photograph; None if the file does not tell."""


class StoredImage(NamedTuple):
    """An upright image with the samples of its file."""

    image: Image.Image | WideImage
    """In the mode of its file, with its palette and alpha channel."""
    is_lossy: bool
    """Whether the file is compressed as JPEG or lossy WebP, so that values differ from the original's."""
    is_white_zero: bool
    """Whether a TIFF has its greys inverted. Pillow has turned those of its images."""


def decode(
    data: bytes,
    target: Preprocessing | tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
    is_strict: bool = False,
    budget: PixelBudget = OF_PROCESS,
) -> DecodedImage:
    """The first frame of a JPEG, PNG, WebP, BMP, TIFF, AVIF, HEIC or JPEG 2000 file as upright RGB.

    Many threads may call this at once. They run in parallel, since Pillow releases the GIL for most of the
    work (but not for WebP).

    Args:
        target: a model's preprocessing; or (height, width), to stretch the image; or None for its own size.
        is_strict: whether to refuse files that are damaged inside (`csflow.damage.check_undamaged`).
        budget: shared by threads, which wait for each other so that not all decode large images at once.

    Raises `ImageError` and nothing else: EMPTY, UNSUPPORTED_FORMAT, TRUNCATED, CORRUPT, TOO_LARGE for more
    than `max_pixels`, or TOO_SLOW for a JPEG of too many scans. The header tells the number of pixels before
    any is decoded.
    """
    preprocessing = Preprocessing(target) if isinstance(target, tuple) else target
    with _opening(data) as image_file:
        read = _read(image_file, data, preprocessing, max_pixels, budget.holding)
        if is_strict:
            check_undamaged(image_file, data)
    height, width, range_used, taken_at = read[1:]
    if preprocessing is None:
        pixels_HWC = np.array(_in_mode(read.image, "RGB"))
        return DecodedImage(pixels_HWC, height, width, whole(height, width), range_used, taken_at)
    placement = preprocessing.place(height, width)
    if preprocessing.tiling:
        pixels_HWC = _reflected(read.image, placement.padding)
    else:
        pixels_HWC = _padded(np.array(_in_mode(read.image, "RGB")), placement.padding)
    if preprocessing.mask is not None:
        pixels_HWC[~from_text(preprocessing.mask, *preprocessing.image_size)] = OUTSIDE
    return DecodedImage(pixels_HWC, height, width, placement.box, range_used, taken_at)


def decode_stored(data: bytes, max_pixels: int = MAX_PIXELS) -> StoredImage:
    """The first frame of such a file, upright and with its stored values, for masks, in which 1 is not black.

    Raises as `decode`.
    """
    with _opening(data) as image_file:
        page = wide_page(data) if image_file is TiffImageFile else None
        if page is not None:
            _check_size(*page_size(page), max_pixels)
            wide = read_page(page, data)
            return StoredImage(wide, is_lossy=False, is_white_zero=wide.is_white_zero)
        image = _opened(image_file, data, max_pixels)
        if _is_cut_to_8_bits(image, data):
            return StoredImage(_turned_samples(read_png(data), image), is_lossy=False, is_white_zero=False)
        orientation = _load(image, data, DECODING_VERSION)
        image.load()
        tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
        return StoredImage(
            image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image,
            is_lossy=_is_lossy(image, data),
            is_white_zero=tags.get(PHOTOMETRIC_INTERPRETATION) == 0,
        )


def measure(data: bytes) -> tuple[int, int]:
    """Height and width of the upright image, from the header of its file alone. Raises as `decode`."""
    with _opening(data) as image_file:
        image = image_file(io.BytesIO(data))
        return (image.width, image.height) if _orientation(image) >= 5 else (image.height, image.width)


@contextmanager
def _opening(data: bytes) -> Iterator[type[ImageFile]]:
    """The Pillow class that reads these bytes; exceptions inside the context become an `ImageError`."""
    if not data:
        raise ImageError(ErrorCode.EMPTY, "zero bytes")
    _mute_pillow()
    image_file = _image_file(data)
    try:
        yield image_file
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(ErrorCode.TOO_LARGE, str(error)) from error
    except MemoryError as error:
        raise ImageError(ErrorCode.TOO_LARGE, "more memory than can be allocated") from error
    except Exception as error:
        # Pillow reports damage as OSError, SyntaxError, ValueError, KeyError, AssertionError and more.
        code, message = diagnosis(error, image_file, data), f"{type(error).__name__}: {error}"
        if "unknown pixel mode" in message:
            message = WIDE_KINDS
        raise ImageError(code, message) from error


class _Read(NamedTuple):
    """An upright 8-bit grey or RGB image, resized but not padded."""

    image: Image.Image
    height: int
    """Of the original, as `width`."""
    width: int
    range_used: float | None
    taken_at: datetime | None = None


def _read(
    image_file: type[ImageFile],
    data: bytes,
    preprocessing: Preprocessing | None,
    max_pixels: int,
    holding: Callable[[int], AbstractContextManager[None]],
) -> _Read:
    version = preprocessing.decoding_version if preprocessing else DECODING_VERSION
    page = wide_page(data) if image_file is TiffImageFile and version > 1 else None
    if page is not None:
        width, height = page_size(page)
        _check_size(width, height, max_pixels)
        with holding(width * height):
            plain, share = _from_wide(read_page(page, data), version)
            return _Read(_resized(plain, height, width, preprocessing), height, width, share)
    image = _opened(image_file, data, max_pixels)
    if isinstance(image, JpegImageFile):
        return _read_jpeg(image, data, preprocessing, holding)._replace(taken_at=taken_at(image))
    with holding(image.width * image.height * _RASTERS.get(image.format, 1)):
        orientation = _load(image, data, version)
        plain, range_used = _eight_bit(image, data, version)
        read = _placed(plain, image.size, orientation, preprocessing, None, range_used)
        return read._replace(taken_at=taken_at(image))


def _read_jpeg(
    image: JpegImageFile,
    data: bytes,
    preprocessing: Preprocessing | None,
    holding: Callable[[int], AbstractContextManager[None]],
) -> _Read:
    scans = jpeg_scans(data)
    if scans > MAX_SCANS:
        raise ImageError(
            ErrorCode.TOO_SLOW, f"a JPEG of {scans} scans; at most {MAX_SCANS} are decoded, so save it anew"
        )
    orientation, size = _orientation(image), image.size
    is_turned = orientation >= 5
    box: _StoredBox | None = None
    if preprocessing:
        width, height = reversed(size) if is_turned else size
        box = _draft(image, *_as_stored(preprocessing.place(height, width), is_turned))
    with holding(image.width * image.height):
        plain = _eight_bit(image, data, DECODING_VERSION)[0]
        return _placed(plain, size, orientation, preprocessing, box, None)


def _placed(
    plain: Image.Image,
    size: tuple[int, int],
    orientation: int,
    preprocessing: Preprocessing | None,
    drafted: _StoredBox | None,
    range_used: float | None,
) -> _Read:
    """The raster in the model's size, turned upright. As stored it is smaller to turn once it is resized.

    Args:
        size: width and height of the original, as stored.
        drafted: the box in the raster, if the raster is smaller than the original.
    """
    is_turned = orientation >= 5
    width, height = reversed(size) if is_turned else size
    plain = _resized(plain, height, width, preprocessing, is_turned, drafted)
    if orientation in _UPRIGHT:
        plain = plain.transpose(_UPRIGHT[orientation])
    return _Read(plain, height, width, range_used)


def _resized(
    plain: Image.Image,
    height: int,
    width: int,
    preprocessing: Preprocessing | None,
    is_turned: bool = False,
    drafted: _StoredBox | None = None,
) -> Image.Image:
    """The raster in the model's size, if there is a model.

    Args:
        height: of the upright original, as `width`.
        is_turned: whether the raster has height and width swapped.
        drafted: the box in the raster, if the raster is smaller than the original.
    """
    if preprocessing is None:
        return plain
    size, box = _as_stored(preprocessing.place(height, width), is_turned)
    if drafted is None and plain.size == size and list(box) == [0, 0, *size]:
        return plain  # `resize` would copy it
    return plain.resize(size, _FILTERS[preprocessing.interpolation], drafted or box, _REDUCING_GAP)


def _opened(image_file: type[ImageFile], data: bytes, max_pixels: int) -> ImageFile:
    """The image with its header read."""
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        # Pillow refuses WebPs and TIFFs of more than twice this value, which is one of the process.
        Image.MAX_IMAGE_PIXELS = max_pixels
    allocator = Image.core  # type: ignore[attr-defined]  # which has no types
    if allocator.get_block_size() < _BLOCK_BYTES:
        allocator.set_block_size(_BLOCK_BYTES)
    image = image_file(io.BytesIO(data))
    _check_size(*image.size, max_pixels)
    # Pillow gathers a row block by block, quadratic in the blocks: minutes for a WebP 16 million wide.
    image.decodermaxblock = max(image.decodermaxblock, 8 * image.width)  # at most 8 bytes a pixel
    return image


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(
            ErrorCode.TOO_LARGE, f"{width}x{height} pixels, over the limit of {max_pixels} pixels"
        )


def _load(image: ImageFile, data: bytes, version: int) -> int:
    """Loads all formats but JPEG, which may later be decoded smaller; returns the orientation to apply."""
    if isinstance(image, BmpImageFile):
        _check_run_lengths(image, data)
    if isinstance(image, PngImageFile):
        _drop_wide_colour_key(image)
    if isinstance(image, Jpeg2KImageFile) and is_cut_short(Jpeg2KImageFile, data):
        raise ImageError(ErrorCode.TRUNCATED, "the end marker is missing")  # Pillow may show a black image
    if not isinstance(image, JpegImageFile):
        image.load()  # Pillow turns a TIFF upright, and swaps its sides, while it loads
    if isinstance(image, TiffImageFile) and version > 1:
        _mend_palette(image)
    return _orientation(image)


def _mute_pillow() -> None:
    """Drops Pillow's warnings (damaged tags, large images), even if `-W error` would raise them.

    `warnings.catch_warnings` would swap the filters of the whole process while other threads run. So one
    filter for Pillow's modules is added at the first image and stays. Every call looks for it, since others
    do swap filters.
    """
    if _PILLOW_FILTER not in warnings.filters:
        warnings.filterwarnings("ignore", module=_PILLOW_MODULES)


_PILLOW_MODULES = r"PIL\."
_PILLOW_FILTER: Any = ("ignore", None, Warning, re.compile(_PILLOW_MODULES), 0)  # as `warnings` keeps it


# --- Formats ---------------------------------------------------------------------------------------------


def _image_file(data: bytes) -> type[ImageFile]:
    """The Pillow class that reads these bytes, in place of `Image.open`.

    With only these classes, no other parser can be reached (EPS starts Ghostscript). A multi-picture
    JPEG (MPO) is read as its first JPEG even if its index is damaged. And the size limit is our own: Pillow's
    is that of the process, and warns or raises before the header can be read.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImageFile
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return TiffImageFile
    if (
        data.startswith(b"BM") and data[15:18] == b"\0\0\0"
    ):  # a small header size; "BM" alone may begin a text
        return BmpImageFile
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImageFile
    if data.startswith((b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")):
        return Jpeg2KImageFile
    if data[4:8] == b"ftyp":
        head = data[8 : min(int.from_bytes(data[:4], "big"), MAX_BRANDS_BYTES)]
        brands = {head[place : place + 4] for place in range(0, len(head), 4)}
        if b"avif" in brands:
            return AvifImageFile
        if brands & HEIC_BRANDS:
            return _heif_image_file()
    raise ImageError(
        ErrorCode.UNSUPPORTED_FORMAT,
        f"no JPEG, PNG, WebP, BMP, TIFF, AVIF, HEIC or JPEG 2000: the content begins with {data[:12]!r}",
    )


def _heif_image_file() -> type[ImageFile]:
    """The class that an extra brings, since its decoder is under patents in some countries."""
    try:
        from pillow_heif import HeifImageFile, options
    except ImportError:
        raise ImageError(
            ErrorCode.UNSUPPORTED_FORMAT, "HEIC is read with an extra: pip install 'csflow[heif]'"
        ) from None
    options.DECODE_THREADS = 1  # as above
    return cast("type[ImageFile]", HeifImageFile)


def _is_lossy(image: ImageFile, data: bytes) -> bool:
    if isinstance(image, WebPImageFile):
        return data[12:16] == b"VP8 "
    if image.format in ("AVIF", "HEIF", "JPEG2000"):
        return True  # they may be lossless, which their headers do not tell
    return isinstance(image, JpegImageFile) or image.info.get("compression") == "jpeg"


def _draft(image: JpegImageFile, size: tuple[int, int], box: _StoredBox) -> _StoredBox:
    """Lets libjpeg decode at a fraction of the size; returns the box in the smaller raster.

    Args:
        size: width and height that the box is to be resized to.
    """
    stored_width, stored_height = image.size
    wanted_width = size[0] * stored_width / (box[2] - box[0])
    wanted_height = size[1] * stored_height / (box[3] - box[1])
    drafted = image.draft(None, (int(wanted_width * _DRAFT_MARGIN), int(wanted_height * _DRAFT_MARGIN)))
    if drafted is None:
        return box
    reduction = stored_width / drafted[1][2]  # 1, 2, 4 or 8
    left, upper, right, lower = (edge / reduction for edge in box)
    return left, upper, right, lower


def _drop_wide_colour_key(image: PngImageFile) -> None:
    """Drops the transparent colour of a 16-bit RGB PNG, which Pillow would compare with 8-bit pixels."""
    if image.tile and image.tile[0].args == "RGB;16B":
        image.info.pop("transparency", None)


def _check_run_lengths(image: BmpImageFile, data: bytes) -> None:
    """Refuses a BMP whose run-length codes, of two bytes and up to 255 pixels, cannot fill it.

    Pillow would fill it in Python, pixel by pixel: 22 seconds for 54 KB.
    """
    run_lengths = BmpImageFile.COMPRESSIONS["RLE4"], BmpImageFile.COMPRESSIONS["RLE8"]
    is_run_length = image.info.get("compression") in run_lengths
    if is_run_length and image.width * image.height > 128 * len(data):
        raise ImageError(ErrorCode.TRUNCATED, "its run lengths are fewer than its pixels")


def _mend_palette(image: TiffImageFile) -> None:
    """Takes the colours of a palette as bytes if all fit into bytes, as libtiff does; TIFF has 16 bits."""
    colours = image.tag_v2.get(COLORMAP, ())
    if image.mode == "P" and colours and max(colours) < 256:
        image.putpalette(bytes(colours), "RGB;L")


def _is_cut_to_8_bits(image: ImageFile, data: bytes) -> bool:
    """Whether this is a PNG of 16 bits of whose samples Pillow keeps the high byte: all but grey ones."""
    return isinstance(image, PngImageFile) and data[24] == 16 and data[25] != 0  # depth and kind in IHDR


def _turned_samples(wide: WideImage, image: ImageFile) -> WideImage:
    orientation = _orientation(image)
    alpha_HW = None if wide.alpha_HW is None else upright(wide.alpha_HW, orientation)
    return wide._replace(colour_HWC=upright(wide.colour_HWC, orientation), alpha_HW=alpha_HW)


def _orientation(image: ImageFile) -> int:
    """EXIF orientation, 1 to 8; 1 if EXIF is missing or damaged."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the EXIF parser lets many types through, and none of them harms the pixels
        return 1
    return orientation if orientation in _UPRIGHT else 1


# --- Placing ---------------------------------------------------------------------------------------------


def _as_stored(placement: Placement, is_turned: bool) -> tuple[tuple[int, int], _StoredBox]:
    """The size to which the source is resized, and the source, both in the raster as it is stored.

    Sources are whole or centred, so a flip does not move them.
    """
    (top, left, bottom, right), (height, width) = placement.source, placement.size
    if is_turned:
        return (height, width), (top, left, bottom, right)
    return (width, height), (left, top, right, bottom)


def _padded(pixels_HWC: npt.NDArray[np.uint8], padding: tuple[int, int, int, int]) -> npt.NDArray[np.uint8]:
    """The image with rows and columns added above, to the left, below and to the right.

    Each side has the mean colour of the row or column that it adjoins. A fixed colour such as black would
    make an edge in every image. Repeating the last row would draw a defect at the border out into a streak,
    and reflection would show it twice; in a mean it vanishes.
    """
    if not any(padding):
        return pixels_HWC
    above, left, below, right = padding
    height, width, channels = pixels_HWC.shape
    padded_HWC = np.empty((above + height + below, left + width + right, channels), np.uint8)
    rows, columns = slice(above, above + height), slice(left, left + width)
    padded_HWC[:above] = _mean_colour(pixels_HWC[0])
    padded_HWC[above + height :] = _mean_colour(pixels_HWC[-1])
    padded_HWC[rows, :left] = _mean_colour(pixels_HWC[:, 0])
    padded_HWC[rows, left + width :] = _mean_colour(pixels_HWC[:, -1])
    padded_HWC[rows, columns] = pixels_HWC
    return padded_HWC


def _reflected(image: Image.Image, padding: tuple[int, int, int, int]) -> npt.NDArray[np.uint8]:
    """The image in RGB, continued by its reflection on all sides, so that tiles show no edge where it ends.

    It is copied in bands of rows: with all of it in one array more, a strip of 200 million pixels would take
    another gigabyte.
    """
    above, left, below, right = padding
    row_of = np.pad(np.arange(image.height), (above, below), mode="reflect")
    column_of = np.pad(np.arange(image.width), (left, right), mode="reflect")
    padded_HWC = np.empty((len(row_of), len(column_of), 3), np.uint8)
    inner_HWC = padded_HWC[above : above + image.height]
    for top in range(0, image.height, _BAND_ROWS):
        band = image.crop((0, top, image.width, min(top + _BAND_ROWS, image.height)))
        inner_HWC[top : top + _BAND_ROWS, left : left + image.width] = np.asarray(_in_mode(band, "RGB"))
    for edge in (slice(0, left), slice(left + image.width, None)):
        inner_HWC[:, edge] = inner_HWC[:, left + column_of[edge]]
    for edge in (slice(0, above), slice(above + image.height, None)):
        padded_HWC[edge] = padded_HWC[above + row_of[edge]]
    return padded_HWC


def _mean_colour(pixels_NC: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.rint(pixels_NC.mean(axis=0)).astype(np.uint8)


# --- Pixels ----------------------------------------------------------------------------------------------


def _eight_bit(image: ImageFile, data: bytes, version: int) -> tuple[Image.Image, float | None]:
    """The image in mode L or RGB, decoded now if it was not before; and the range that it uses, if wide."""
    if version > 1 and _is_cut_to_8_bits(image, data):
        wide = read_png(data)
        if wide.significant_bits < 16:
            return _from_wide(wide, version)
    image.load()
    if image.mode in {"I", "F"} or image.mode.startswith("I;16"):
        return _wide_grey(image, data, version)
    if image.has_transparency_data:
        return _over_black(image.convert("RGBA"), version), None
    return _in_mode(image, "L" if image.mode in {"1", "L"} else "RGB"), None


def _over_black(image: Image.Image, version: int) -> Image.Image:
    if version > 1 and image.getbbox() is None:  # of what is visible: nothing is
        return image.convert("RGB")
    # Premultiplied colours are the colours over black.
    red, green, blue, _ = image.convert("RGBa").split()
    return Image.merge("RGB", (red, green, blue))


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # `convert` copies even to the same mode


def _wide_grey(image: ImageFile, data: bytes, version: int) -> tuple[Image.Image, float]:
    """Grey that Pillow reads with all its bits: 16 of PNGs; up to 32 of TIFFs, for models of version 1."""
    values_HW: npt.NDArray[Any] = np.asarray(image)
    if not isinstance(image, TiffImageFile):
        bits = png_bits(data, values_HW) if version > 1 else 16
        return _as_image(scale(values_HW, bits))
    bits = image.tag_v2.get(BITSPERSAMPLE, (16,))[0]
    if bits == 32 and image.mode != "F" and image.tag_v2.get(SAMPLEFORMAT, (1,))[0] != 2:
        values_HW = values_HW.view(np.uint32)
    grey, range_used = _as_image(scale(values_HW, bits))
    if image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0:  # Pillow heeds it up to 8 bits only
        grey = ImageChops.invert(grey)
    return grey, range_used


def _from_wide(wide: WideImage, version: int) -> tuple[Image.Image, float]:
    """The image in mode L or RGB, and the range that it uses."""
    colour, range_used = _as_image(colour_levels(wide))
    if wide.alpha_HW is None or wide.is_premultiplied:
        return _in_mode(colour, "L" if colour.mode == "L" else "RGB"), range_used
    layered = colour.convert("RGB")
    layered.putalpha(Image.fromarray(alpha_levels(wide)))
    return _over_black(layered, version), range_used


def _as_image(levels: Levels) -> tuple[Image.Image, float]:
    levels_HWC = levels.levels
    is_grey = levels_HWC.ndim == 3 and levels_HWC.shape[2] == 1
    mode = "CMYK" if levels_HWC.ndim == 3 and levels_HWC.shape[2] == 4 else None
    return Image.fromarray(levels_HWC[..., 0] if is_grey else levels_HWC, mode), levels.range_used
