"""Decoding: what the pixels of each format become, and that no bytes whatever do harm."""

import io
import itertools
import random
import resource
import struct
import sys
import time
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Literal

import numpy as np
import pillow_heif
import pytest
from PIL import ExifTags, Image

from csflow.decode_limits import MAX_PIXELS
from csflow.errors import ErrorCode, ImageError
from csflow.images import DecodedImage, decode
from csflow.preprocessing import Box, Fit, Preprocessing, distortion

LOSSLESS = ["PNG", "BMP", "TIFF", "WEBP"]
NEWER = {"AVIF": 3, "HEIF": 1, "JPEG2000": 0}
"""Further formats, and by how many levels a colour that `encoded` writes as YCbCr may differ."""
pillow_heif.register_heif_opener()  # with which Pillow writes them, too
ByteOrder = Literal["<", ">"]
BYTE_ORDERS: tuple[ByteOrder, ...] = ("<", ">")
ORIENTATION = 0x0112


# --- Making files by hand --------------------------------------------------------------------------------


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    if image_format == "WEBP":
        options = {"lossless": True, "exact": True, **options}
    if image_format in NEWER:
        options = {"quality": 100, "subsampling": "4:4:4", "chroma": 444, **options}
    if image_format == "HEIF":
        options["quality"] = -1
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def jpeg(pixels_HWC: np.ndarray, **options: object) -> bytes:
    return encoded(Image.fromarray(pixels_HWC), "JPEG", **{"quality": 95, "subsampling": 0, **options})


def png(
    width: int, height: int, bits: int, colour_type: int, rows: bytes, *chunks: tuple[bytes, bytes]
) -> bytes:
    """A PNG of any depth, also of those Pillow cannot write; `rows` with their filter bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def png_16(pixels: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """Grey (H, W) or RGB (H, W, 3) of 16 bits."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png(pixels.shape[1], pixels.shape[0], 16, 2 if pixels.ndim == 3 else 0, rows, *chunks)


def tiff(
    pixels: np.ndarray,
    photometric: int,
    order: ByteOrder = "<",
    deflate: bool = False,
    tags: dict[int, int] | None = None,
) -> bytes:
    """A one-strip TIFF in the array's own sample type, also of those Pillow cannot write; `tags` win."""
    samples = pixels.shape[2] if pixels.ndim == 3 else 1
    strip = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    if deflate:
        strip = zlib.compress(strip)
    sample_format = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    entries = {
        256: pixels.shape[1],
        257: pixels.shape[0],
        258: (pixels.dtype.itemsize * 8,) * samples,
        259: 8 if deflate else 1,
        262: photometric,
        273: 8,
        277: samples,
        278: pixels.shape[0],
        279: len(strip),
        339: (sample_format,) * samples,
    } | (tags or {})
    directory_at = 8 + len(strip) + len(strip) % 2
    spill_at = directory_at + 2 + 12 * len(entries) + 4
    directory, spill = struct.pack(order + "H", len(entries)), b""
    for tag, value in sorted(entries.items()):
        values = value if isinstance(value, tuple) else (value,)
        kind, code = (3, "H") if max(values) < 2**16 else (4, "I")
        packed = struct.pack(f"{order}{len(values)}{code}", *values)
        if len(packed) > 4:
            field = struct.pack(order + "I", spill_at + len(spill))
            spill += packed
        else:
            field = packed.ljust(4, b"\0")
        directory += struct.pack(order + "HHI", tag, kind, len(values)) + field
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", directory_at)
    return header + strip + b"\0" * (len(strip) % 2) + directory + b"\0" * 4 + spill


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def photograph(height: int, width: int) -> np.ndarray:
    """Smooth shading, sharp edges and grain: RGB (H, W, 3)."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    shade = 110 + 70 * np.sin(7 * x + 3 * y) * np.cos(5 * y)
    disc = 60 * (((x - 0.5) ** 2 + (y - 0.4) ** 2) < 0.04) - 50 * ((x * 20 % 1 < 0.1) & (y > 0.6))
    grain = np.random.default_rng(1).normal(0, 4, (height, width, 3))
    return np.clip((shade + disc)[..., None] + grain, 0, 255).astype(np.uint8)


def grey(data: bytes) -> np.ndarray:
    """The decoded image as (H, W), checked to be colourless."""
    pixels_HWC = decode(data).pixels_HWC
    assert (pixels_HWC == pixels_HWC[..., :1]).all()
    return pixels_HWC[..., 0]


def code_of(data: bytes, max_pixels: int = MAX_PIXELS) -> ErrorCode:
    with pytest.raises(ImageError) as caught:
        decode(data, max_pixels=max_pixels)
    return caught.value.code


# --- Pixels of each format and mode ----------------------------------------------------------------------


@pytest.mark.parametrize("image_format", [*LOSSLESS, *NEWER])
def test_8_bit_colour_is_kept_exactly(image_format: str) -> None:
    pixels_HWC = noise(13, 17)
    decoded = decode(encoded(Image.fromarray(pixels_HWC), image_format))
    assert isinstance(decoded, DecodedImage)
    assert (decoded.height, decoded.width) == (13, 17)
    assert decoded.pixels_HWC.dtype == np.uint8
    assert decoded.pixels_HWC.flags.c_contiguous and decoded.pixels_HWC.flags.writeable
    np.testing.assert_allclose(
        decoded.pixels_HWC.astype(int), pixels_HWC, rtol=0, atol=NEWER.get(image_format, 0)
    )


@pytest.mark.parametrize("image_format", [*LOSSLESS, *NEWER])
def test_8_bit_grey_is_kept_exactly(image_format: str) -> None:
    ramp_HW = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(grey(encoded(Image.fromarray(ramp_HW), image_format)), ramp_HW)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2}])
def test_jpeg_is_close(options: dict[str, object]) -> None:
    y, x = np.mgrid[:64, :48]
    pixels_HWC = np.stack([2 * x, 3 * y, x + y], axis=-1).astype(np.uint8)
    decoded = decode(jpeg(pixels_HWC, **options))
    assert np.abs(decoded.pixels_HWC.astype(int) - pixels_HWC).mean() < 1.5


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "TIFF"])
def test_1_bit_becomes_black_and_white(image_format: str) -> None:
    bits_HW = np.array([[1, 0, 1, 1, 0], [0, 0, 1, 0, 1]], dtype=bool)
    np.testing.assert_array_equal(grey(encoded(Image.fromarray(bits_HW), image_format)), bits_HW * 255)


def test_1_bit_is_resized_antialiased() -> None:
    checkers_HW = np.indices((16, 16)).sum(0) % 2 == 1
    resized = decode(encoded(Image.fromarray(checkers_HW), "PNG"), (4, 4)).pixels_HWC
    assert resized.min() > 100 and resized.max() < 155


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "TIFF"])
def test_palette_is_looked_up(image_format: str) -> None:
    indices_HW = np.array([[0, 1, 2], [2, 1, 0]], dtype=np.uint8)
    palette = np.array([[255, 0, 0], [0, 200, 0], [10, 20, 30]], dtype=np.uint8)
    image = Image.fromarray(indices_HW)
    image.putpalette(palette.tobytes())
    assert image.mode == "P"
    np.testing.assert_array_equal(decode(encoded(image, image_format)).pixels_HWC, palette[indices_HW])


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    ramp_HW = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected_HW = (ramp_HW.astype(int) + 128) // 257
    files = {
        "png": png_16(ramp_HW),
        "little-endian tiff": tiff(ramp_HW, 1, "<"),
        "big-endian tiff": tiff(ramp_HW, 1, ">"),
        "lzw tiff": encoded(Image.fromarray(ramp_HW), "TIFF", compression="tiff_lzw"),
    }
    for name, data in files.items():
        np.testing.assert_array_equal(grey(data), expected_HW, err_msg=name)
    np.testing.assert_array_equal(grey(tiff(ramp_HW, 0)), 255 - expected_HW, err_msg="white is zero")


def test_12_bit_grey_is_scaled_by_4095() -> None:
    # Two 12-bit samples in three bytes: 0xFFF and 0x800, padded to whole 16-bit words.
    packed_HW = np.frombuffer(bytes.fromhex("fff800"), dtype=np.uint8).reshape(1, 3)
    data = tiff(packed_HW, 1, tags={256: 2, 258: 12})
    np.testing.assert_array_equal(grey(data), [[255, 128]])


def test_signed_16_bit_grey_is_scaled_by_32767() -> None:
    values_HW = np.array([[-5, 0, 16384, 32767]], dtype=np.int16)
    np.testing.assert_array_equal(grey(tiff(values_HW, 1)), [[0, 0, 128, 255]])
    assert code_of(tiff(np.array([[-32768, 32767]], dtype=np.int16), 1)) == ErrorCode.UNSUPPORTED_FORMAT


def test_16_bit_colour_keeps_its_high_byte() -> None:
    ramp_HWC = np.arange(0, 65536, 2, dtype=np.uint16)[: 3 * 10_800].reshape(108, 100, 3)
    files = {"png": png_16(ramp_HWC)}
    for order in BYTE_ORDERS:
        files[f"tiff {order}"] = tiff(ramp_HWC, 2, order)
        files[f"deflated tiff {order}"] = tiff(ramp_HWC, 2, order, deflate=True)
    for name, data in files.items():
        pixels_HWC = decode(data).pixels_HWC
        np.testing.assert_array_equal(pixels_HWC, ramp_HWC >> 8, err_msg=name)
        assert np.abs(pixels_HWC - ramp_HWC / 257).max() <= 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([-0.1, 0.2, 1.4], [0, 51, 255]),  # overshoot of a filter
        ([0.0, 2.0, 255.0], [0, 2, 255]),
        ([0.0, 128.0, 300.0], [0, 128, 255]),
        ([0.0, 32768.0, 65535.0], [0, 128, 255]),
    ],
)
def test_float_range_is_the_first_that_fits(values: list[float], expected: list[int]) -> None:
    for order in BYTE_ORDERS:
        np.testing.assert_array_equal(grey(tiff(np.array([values], np.float32), 1, order)), [expected])


@pytest.mark.parametrize("values", [[0, 1e6], [-1, 1], [-300, 200]])
def test_float_of_unknown_range_is_refused(values: list[float]) -> None:
    assert code_of(tiff(np.array([values], np.float32), 1)) == ErrorCode.UNSUPPORTED_FORMAT


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_float_that_is_not_finite_is_corrupt(value: float) -> None:
    assert code_of(tiff(np.array([[0.5, value]], np.float32), 1)) == ErrorCode.CORRUPT


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (np.uint32, [0, 128, 255], [0, 128, 255]),
        (np.uint32, [0, 32768, 65535], [0, 128, 255]),
        (np.uint32, [0, 2**31, 2**32 - 1], [0, 128, 255]),
        (np.int32, [0, 2**30, 2**31 - 1], [0, 128, 255]),
    ],
)
def test_32_bit_integer_range_is_the_first_that_fits(
    dtype: type, values: list[int], expected: list[int]
) -> None:
    np.testing.assert_array_equal(grey(tiff(np.array([values], dtype), 1)), [expected])


RGBA = np.array([[[200, 100, 50, 255], [200, 100, 50, 0], [200, 100, 50, 51]]], dtype=np.uint8)
OVER_BLACK = np.array([[[200, 100, 50], [0, 0, 0], [40, 20, 10]]], dtype=np.uint8)


@pytest.mark.parametrize("image_format", [*LOSSLESS, *NEWER])
def test_transparent_pixels_are_laid_over_black(image_format: str) -> None:
    if image_format == "BMP":
        rows = RGBA[..., [2, 1, 0, 3]].tobytes()
        masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
        info = struct.pack("<IiiHHIIiiII", 108, 3, 1, 1, 32, 3, len(rows), 0, 0, 0, 0) + masks + b"\0" * 52
        data = b"BM" + struct.pack("<IHHI", 122 + len(rows), 0, 0, 122) + info + rows
    else:
        data = encoded(Image.fromarray(RGBA), image_format)
    np.testing.assert_array_equal(decode(data).pixels_HWC, OVER_BLACK)


def test_hidden_colours_do_not_bleed_when_resized() -> None:
    cut_out = np.zeros((32, 32, 4), np.uint8)
    cut_out[:, 16:] = [90, 90, 90, 255]
    garbage = cut_out.copy()
    garbage[:, :16, :3] = 255
    left, right = (decode(encoded(Image.fromarray(a), "PNG"), (5, 5)).pixels_HWC for a in (cut_out, garbage))
    np.testing.assert_array_equal(left, right)


def test_alpha_of_grey_and_palette_images_is_laid_over_black() -> None:
    la_HWC = np.array([[[200, 255], [200, 0], [200, 51]]], dtype=np.uint8)
    for image_format in ("PNG", "TIFF"):
        np.testing.assert_array_equal(grey(encoded(Image.fromarray(la_HWC), image_format)), [[200, 0, 40]])
    palette = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8))
    palette.putpalette(bytes([200, 100, 50] * 3))
    data = encoded(palette, "PNG", transparency=b"\xff\x00\x33")
    np.testing.assert_array_equal(decode(data).pixels_HWC, OVER_BLACK)


def test_colour_key_is_transparent_in_8_bits_and_ignored_in_16() -> None:
    pixels_HWC = np.array([[[200, 100, 50], [1, 2, 3]]], dtype=np.uint8)
    data = encoded(Image.fromarray(pixels_HWC), "PNG", transparency=(1, 2, 3))
    np.testing.assert_array_equal(decode(data).pixels_HWC, [[[200, 100, 50], [0, 0, 0]]])
    wide_HWC = pixels_HWC.astype(np.uint16) << 8
    data = png_16(wide_HWC, (b"tRNS", struct.pack(">HHH", 200, 100, 50)))
    np.testing.assert_array_equal(decode(data).pixels_HWC, pixels_HWC)


def test_cmyk_of_jpeg_and_tiff_is_the_same_colour() -> None:
    cmyk_HWC = np.tile(np.array([0, 200, 100, 20], dtype=np.uint8), (16, 16, 1))
    image = Image.fromarray(cmyk_HWC, mode="CMYK")
    for data in (encoded(image, "TIFF"), encoded(image, "JPEG", quality=100)):
        assert np.abs(decode(data).pixels_HWC[8, 8].astype(int) - [235, 51, 143]).max() <= 2
    assert b"Adobe" in encoded(image, "JPEG")[:40]


def test_ycbcr_and_lab_tiff_become_rgb() -> None:
    red = np.tile(np.array([76, 85, 255], dtype=np.uint8), (8, 8, 1))
    assert np.abs(decode(tiff(red, 6)).pixels_HWC[4, 4].astype(int) - [254, 0, 0]).max() <= 2
    # L = 50.2 of 100, a = b = 0, as signed bytes: a middle grey of sRGB.
    middle = np.tile(np.array([128, 0, 0], dtype=np.uint8), (8, 8, 1))
    assert np.abs(decode(tiff(middle, 8)).pixels_HWC[4, 4].astype(int) - [119, 119, 119]).max() <= 1


def test_first_frame_of_animated_and_multi_page_files() -> None:
    frames = [Image.fromarray(noise(9, 11, seed)) for seed in range(3)]
    for image_format in ("PNG", "WEBP", "TIFF"):
        data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:])
        np.testing.assert_array_equal(decode(data).pixels_HWC, noise(9, 11, 0), err_msg=image_format)


def test_multi_picture_jpeg_is_read_as_its_first_picture() -> None:
    first, second = photograph(40, 48), photograph(20, 24)
    data = encoded(Image.fromarray(first), "MPO", save_all=True, append_images=[Image.fromarray(second)])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    decoded = decode(data)
    assert (decoded.height, decoded.width) == (40, 48)
    damaged = data.replace(b"MPF\0II*\0", b"MPF\0II*\xff")
    assert damaged != data
    np.testing.assert_array_equal(decode(damaged).pixels_HWC, decoded.pixels_HWC)


# --- Orientation -----------------------------------------------------------------------------------------

STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: upright[:, ::-1].swapaxes(0, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: upright[::-1].swapaxes(0, 1),
}
"""EXIF 2.3: orientation → how an upright image is stored (where its first row and column lie)."""


def oriented(upright_HWC: np.ndarray, orientation: int, image_format: str, **options: object) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright_HWC)))
    if image_format == "HEIF":  # whose own sign of orientation Pillow does not write
        heif, buffer = pillow_heif.from_pillow(image), io.BytesIO()
        heif.info["exif"] = exif.tobytes()
        heif.save(buffer, quality=-1, chroma=444)
        return buffer.getvalue()
    return encoded(image, image_format, exif=exif, **options)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_every_orientation_is_turned_upright(orientation: int, image_format: str) -> None:
    upright_HWC = noise(6, 10)
    decoded = decode(oriented(upright_HWC, orientation, image_format))
    assert (decoded.height, decoded.width) == (6, 10)
    np.testing.assert_allclose(
        decoded.pixels_HWC.astype(int), upright_HWC, rtol=0, atol=NEWER.get(image_format, 0)
    )


@pytest.mark.parametrize("orientation", STORED)
def test_every_orientation_of_a_jpeg_with_draft_and_stretch(orientation: int) -> None:
    upright_HWC = photograph(301, 500)
    decoded = decode(oriented(upright_HWC, orientation, "JPEG", quality=95), (60, 40))
    assert (decoded.height, decoded.width) == (301, 500)
    expected_HWC = np.asarray(Image.fromarray(upright_HWC).resize((40, 60), Image.Resampling.BILINEAR))
    assert np.abs(decoded.pixels_HWC.astype(int) - expected_HWC).mean() < 1.5


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x05"]
)
def test_damaged_exif_counts_as_none(exif: bytes) -> None:
    pixels_HWC = noise(6, 10)
    for image_format in ("PNG", "WEBP"):
        data = encoded(Image.fromarray(pixels_HWC), image_format, exif=exif)
        np.testing.assert_array_equal(decode(data).pixels_HWC, pixels_HWC)
    assert decode(jpeg(pixels_HWC, exif=exif)).height == 6


def taken(image_format: str, text: str, offset: str | None = None) -> datetime | None:
    """When a photograph was taken whose EXIF holds this time, and this offset to UTC."""
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "camera"
    details = exif.get_ifd(ExifTags.IFD.Exif)
    details[ExifTags.Base.DateTimeOriginal] = text
    if offset:
        details[ExifTags.Base.OffsetTimeOriginal] = offset
    return decode(encoded(Image.fromarray(noise(6, 10)), image_format, exif=exif), (6, 10)).taken_at


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_the_time_of_a_photograph_is_that_of_its_camera_in_utc_if_the_camera_knows(image_format: str) -> None:
    assert taken(image_format, "2026:11:02 14:30:05") == datetime(2026, 11, 2, 14, 30, 5, tzinfo=UTC)
    expected = datetime(2026, 11, 2, 12, 30, 5, tzinfo=UTC)
    assert taken(image_format, "2026:11:02 14:30:05", "+02:00") == expected
    assert taken(image_format, "2026:11:02 14:30:05", "   :  ") == datetime(
        2026, 11, 2, 14, 30, 5, tzinfo=UTC
    )


@pytest.mark.parametrize("text", ["0000:00:00 00:00:00", "    :  :     :  :  ", "yesterday", "2026:13:45"])
def test_a_camera_whose_clock_was_not_set_gives_no_time(text: str) -> None:
    assert taken("JPEG", text) is None
    assert decode(jpeg(noise(6, 10))).taken_at is None


# --- Size ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", [*LOSSLESS, "JPEG", *NEWER])
@pytest.mark.parametrize("size", [(7, 31), (64, 64), (1, 1)])
def test_size_is_height_and_width_of_the_result(image_format: str, size: tuple[int, int]) -> None:
    decoded = decode(encoded(Image.fromarray(photograph(40, 50)), image_format), size)
    assert decoded.pixels_HWC.shape == (*size, 3)
    assert (decoded.height, decoded.width) == (40, 50)


@pytest.mark.parametrize("shape", [(768, 768), (1023, 1541), (2000, 900)])
def test_draft_hardly_changes_a_jpeg(shape: tuple[int, int]) -> None:
    data = jpeg(photograph(*shape), subsampling=2)
    whole = Image.fromarray(decode(data).pixels_HWC)
    expected_HWC = np.asarray(whole.resize((256, 256), Image.Resampling.BILINEAR)).astype(int)
    difference_HWC = np.abs(decode(data, (256, 256)).pixels_HWC - expected_HWC)
    assert 0 < difference_HWC.mean() < 1  # not 0: it was drafted


def test_jpeg_less_than_three_times_the_size_is_decoded_in_full() -> None:
    data = jpeg(photograph(512, 767))
    expected = Image.fromarray(decode(data).pixels_HWC).resize((256, 256), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(decode(data, (256, 256)).pixels_HWC, np.asarray(expected))


# --- Fit -------------------------------------------------------------------------------------------------

FITS: tuple[Fit, ...] = ("stretch", "letterbox", "crop")


def test_images_are_stretched_with_bilinear_weights_unless_a_model_says_otherwise() -> None:
    pixels_HWC = photograph(333, 1000)
    whole = Image.fromarray(pixels_HWC).resize((96, 64), Image.Resampling.BILINEAR, reducing_gap=3.0)
    drafted = Image.open(io.BytesIO(jpeg(pixels_HWC)))
    drafted.draft(None, (96 * 3 // 2, 64 * 3 // 2))  # at half of the size, and a last row half filled
    reduced = drafted.resize((96, 64), Image.Resampling.BILINEAR, (0, 0, 500, 166.5), reducing_gap=3.0)
    for data, expected in ((encoded(Image.fromarray(pixels_HWC), "PNG"), whole), (jpeg(pixels_HWC), reduced)):
        decoded = decode(data, Preprocessing((64, 96)))
        np.testing.assert_array_equal(decoded.pixels_HWC, np.asarray(expected))
        assert decoded.box == (0, 0, 333, 1000)


def test_the_filter_is_the_models() -> None:
    image = Image.fromarray(photograph(300, 200))
    expected = image.resize((96, 64), Image.Resampling.BICUBIC, reducing_gap=3.0)
    decoded = decode(encoded(image, "PNG"), Preprocessing((64, 96), interpolation="bicubic"))
    np.testing.assert_array_equal(decoded.pixels_HWC, np.asarray(expected))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("shape", [(600, 1000), (1000, 600)])
def test_pixels_lie_where_the_box_says(fit: Fit, orientation: int, shape: tuple[int, int]) -> None:
    upright_HWC = np.full((*shape, 3), 60, np.uint8)
    y, x = shape[0] // 2 - 160, shape[1] // 2 + 90
    upright_HWC[y - 20 : y + 20, x - 20 : x + 20] = 250
    decoded = decode(
        oriented(upright_HWC, orientation, "JPEG", quality=95), Preprocessing((96, 128), fit, "bicubic")
    )
    assert decoded.pixels_HWC.shape == (96, 128, 3)
    assert (decoded.height, decoded.width) == shape
    weight_HW = decoded.pixels_HWC[..., 0].astype(float) - 60
    weight_HW[weight_HW < 20] = 0  # JPEG's ripples
    row, column = ((weight_HW * place).sum() / weight_HW.sum() + 0.5 for place in np.indices((96, 128)))
    top, left, bottom, right = decoded.box
    found = top + row / 96 * (bottom - top), left + column / 128 * (right - left)
    np.testing.assert_allclose(found, (y, x), atol=1)  # a pixel of the model's is 6 to 10 of these


def test_a_crop_is_the_middle_of_the_image_in_the_models_shape() -> None:
    pixels_HWC = photograph(120, 400)
    decoded = decode(encoded(Image.fromarray(pixels_HWC), "PNG"), Preprocessing((60, 60), "crop"))
    assert decoded.box == (0, 140, 120, 260)
    middle = Image.fromarray(pixels_HWC[:, 140:260]).resize((60, 60), Image.Resampling.BILINEAR)
    # Apart from its edges, where the filter reaches beyond what is cut out.
    np.testing.assert_array_equal(decoded.pixels_HWC[:, 1:-1], np.asarray(middle)[:, 1:-1])


def test_a_letterbox_is_filled_with_the_mean_colour_of_what_it_adjoins() -> None:
    pixels_HWC = np.full((50, 100, 3), 120, np.uint8)
    pixels_HWC[:25, :50] = [30, 60, 90]
    pixels_HWC[:25, 50:] = [50, 80, 110]
    decoded = decode(encoded(Image.fromarray(pixels_HWC), "PNG"), Preprocessing((101, 100), "letterbox"))
    assert decoded.box == (-25, 0, 76, 100)
    assert (decoded.pixels_HWC[:25] == [40, 70, 100]).all()
    assert (decoded.pixels_HWC[75:] == 120).all()
    np.testing.assert_array_equal(decoded.pixels_HWC[25:75], pixels_HWC)


@pytest.mark.parametrize("fit", FITS)
def test_a_jpeg_is_drafted_as_far_as_its_fit_allows(fit: Fit) -> None:
    pixels_HWC = photograph(700, 2400)
    preprocessing = Preprocessing((128, 128), fit)
    drafted = decode(jpeg(pixels_HWC, subsampling=2), preprocessing)
    whole = decode(jpeg(pixels_HWC, subsampling=2)).pixels_HWC
    exact = decode(encoded(Image.fromarray(whole), "PNG"), preprocessing)
    assert drafted.box == exact.box
    difference = np.abs(drafted.pixels_HWC.astype(int) - exact.pixels_HWC).mean()
    assert 0 < difference < 1  # not 0: it was drafted


@pytest.mark.parametrize("fit", FITS)
def test_every_shape_fits_and_keeps_its_own(fit: Fit) -> None:
    shapes = [(1, 1), (1, 4000), (4000, 1), (3, 1000), (255, 257), (257, 255), (1999, 2001), (64, 96)]
    for height, width in shapes:
        data = encoded(Image.new("L", (width, height), 200), "PNG")
        for size in [(64, 96), (96, 64), (1, 1), (7, 300)]:
            decoded = decode(data, Preprocessing(size, fit))
            assert decoded.pixels_HWC.shape == (*size, 3)
            assert np.abs(decoded.pixels_HWC.astype(int) - 200).max() <= 3  # Pillow's fixed point
            (top, left, bottom, right), whole = decoded.box, (0, 0, height, width)
            if fit == "stretch":
                assert decoded.box == whole
                continue
            outer, inner = (decoded.box, whole) if fit == "letterbox" else (whole, decoded.box)
            assert outer[0] <= inner[0] < inner[2] <= outer[2]
            assert outer[1] <= inner[1] < inner[3] <= outer[3]
            if min(height, width, *size) >= 64:  # else a letterbox's whole pixels are coarse
                assert (bottom - top) / (right - left) == pytest.approx(size[0] / size[1], rel=0.02)
    assert distortion((64, 64), 100, 300) == pytest.approx(3)
    assert distortion((64, 64), 300, 100) == pytest.approx(3)
    assert Preprocessing((64, 96), fit).place(64, 96).box == Box(0, 0, 64, 96)


# --- Limits ----------------------------------------------------------------------------------------------


def resized_header(image_format: str, width: int, height: int) -> bytes:
    """A valid small file whose header claims another size."""
    data = bytearray(encoded(Image.fromarray(noise(16, 16)), image_format))
    if image_format == "PNG":
        return png(width, height, 8, 2, bytes(1000))
    if image_format == "JPEG":
        struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, height, width)
    elif image_format == "BMP":
        struct.pack_into("<ii", data, 18, width, height)
    elif image_format == "WEBP":
        struct.pack_into("<I", data, 21, (width - 1) | (height - 1) << 14)
    else:
        return tiff(noise(16, 16), 2, tags={256: width, 257: height})
    return bytes(data)


@pytest.mark.parametrize(
    ("image_format", "side"),
    [("PNG", 60000), ("JPEG", 65000), ("BMP", 60000), ("TIFF", 60000), ("WEBP", 13300)],
)
def test_too_many_pixels_are_refused_before_decoding(image_format: str, side: int) -> None:
    data = resized_header(image_format, side, side - 1)
    before = peak_memory_bytes()
    started = time.perf_counter()
    with pytest.raises(ImageError) as caught:
        decode(data, (64, 64))
    assert caught.value.code == ErrorCode.TOO_LARGE
    assert f"{side}x{side - 1}" in caught.value.message and "175000000" in caught.value.message
    assert time.perf_counter() - started < 1
    assert peak_memory_bytes() - before < 50e6


def test_webp_that_pillow_itself_refuses_is_too_large() -> None:
    assert code_of(resized_header("WEBP", 16383, 16383)) == ErrorCode.TOO_LARGE


def test_limit_is_inclusive_and_counts_original_pixels() -> None:
    data = jpeg(photograph(100, 200))
    assert decode(data, (10, 10), max_pixels=20_000).width == 200
    assert code_of(data, max_pixels=19_999) == ErrorCode.TOO_LARGE


def test_large_image_decodes_without_a_warning() -> None:
    side = 9_700  # 94 million pixels: over Pillow's threshold for a warning
    data = png(side, side, 1, 0, bytes((side + 7) // 8 + 1) * side)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not decode(data, (8, 8)).pixels_HWC.any()


# --- Bad input -------------------------------------------------------------------------------------------

SMALL = {
    "JPEG": jpeg(noise(24, 20), quality=60),
    "progressive JPEG": jpeg(noise(24, 20), quality=60, progressive=True),
    "PNG": encoded(Image.fromarray(noise(14, 14)), "PNG"),
    "WEBP": encoded(Image.fromarray(noise(14, 14)), "WEBP"),
    "BMP": encoded(Image.fromarray(noise(14, 14)), "BMP"),
    "palette BMP": encoded(Image.fromarray(noise(14, 14)).quantize(16), "BMP"),
    "TIFF": tiff(noise(14, 14), 2),
    "big TIFF": encoded(Image.fromarray(noise(14, 14)), "TIFF", big_tiff=True),
    "LZW TIFF": encoded(Image.fromarray(noise(14, 14)), "TIFF", compression="tiff_lzw"),
    "16-bit TIFF": tiff(np.arange(400, dtype=np.uint16).reshape(20, 20), 1, ">"),
    "animated PNG": encoded(
        Image.fromarray(noise(9, 9)), "PNG", save_all=True, append_images=[Image.fromarray(noise(9, 9, 1))]
    ),
    "animated WEBP": encoded(
        Image.fromarray(noise(9, 9)), "WEBP", save_all=True, append_images=[Image.fromarray(noise(9, 9, 1))]
    ),
    "multi-page TIFF": encoded(
        Image.fromarray(noise(9, 9)), "TIFF", save_all=True, append_images=[Image.fromarray(noise(9, 9, 1))]
    ),
    "JPEG with EXIF": oriented(noise(16, 16), 6, "JPEG"),
    "AVIF": encoded(Image.fromarray(noise(14, 14)), "AVIF"),
    "HEIC": encoded(Image.fromarray(noise(14, 14)), "HEIF"),
    "JPEG 2000": encoded(Image.fromarray(noise(14, 14)), "JPEG2000"),
    "codestream of JPEG 2000": encoded(Image.fromarray(noise(14, 14)), "JPEG2000", no_jp2=True),
}


def truncations() -> Iterator[tuple[str, bytes]]:
    for name, data in SMALL.items():
        for length in range(0, len(data), 10):
            yield f"{name}[:{length}]", data[:length]


def random_bodies() -> Iterator[tuple[str, bytes]]:
    rng = random.Random(20)
    for name, data in SMALL.items():
        for header_bytes in (18, 30, 60, len(data) // 2):
            for length in (0, 9, 300):
                yield f"{name} with a random body", data[:header_bytes] + rng.randbytes(length)


def flipped_bytes() -> Iterator[tuple[str, bytes]]:
    rng = random.Random(21)
    for name, data in SMALL.items():
        for _ in range(60):
            flipped = bytearray(data)
            for position in rng.choices(
                range(min(len(data), rng.choice((64, 10_000)))), k=rng.choice((1, 3, 20))
            ):
                flipped[position] = rng.choice((0, 255, rng.randrange(256)))
            yield f"{name} with flipped bytes", bytes(flipped)


def absurd_sizes() -> Iterator[tuple[str, bytes]]:
    for image_format in (*LOSSLESS, "JPEG"):
        limit = 16383 if image_format == "WEBP" else 65535
        for width, height in itertools.product((0, 1, 999, 1000, limit), repeat=2):
            if image_format != "WEBP" or min(width, height) > 0:
                yield f"{image_format} of {width}x{height}", resized_header(image_format, width, height)


def bombs() -> Iterator[tuple[str, bytes]]:
    yield "PNG of zeros", png(999, 1000, 8, 2, bytes(2998 * 1000))
    yield "PNG with too much data", png(4, 4, 8, 2, bytes(30_000_000))
    yield "PNG text bomb", png(2, 2, 8, 2, bytes(14), (b"zTXt", b"k\0\0" + zlib.compress(bytes(30_000_000))))
    yield (
        "PNG profile bomb",
        png(2, 2, 8, 2, bytes(14), (b"iCCP", b"k\0\0" + zlib.compress(bytes(30_000_000)))),
    )
    yield "TIFF of zeros", tiff(np.zeros((900, 900, 3), np.uint8), 2, deflate=True)
    yield "TIFF with an endless tag", tiff(noise(4, 4), 2, tags={278: 0})
    yield "BigTIFF pointing past 2**63", b"II+\0\x08\0\0\0" + b"\xff" * 8
    for samples in (0, 60_000):
        yield "TIFF with odd samples", tiff(noise(4, 4), 2, tags={277: samples})


def strangers() -> Iterator[tuple[str, bytes]]:
    yield "text", b"This is not a photograph.\n" * 20
    yield "text beginning with BM", b"BMW, Audi and Porsche are cars.\n"
    yield "zeros", bytes(5000)
    yield "PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    yield "PDF", b"%PDF-1.7\n"
    yield "GIF", encoded(Image.new("P", (4, 4)), "GIF")
    yield "SVG", b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    yield "sound", b"RIFF\x24\0\0\0WAVEfmt "
    yield "RIFF alone", b"RIFF"


BAD = [*truncations(), *random_bodies(), *flipped_bytes(), *absurd_sizes(), *bombs(), *strangers()]


def peak_memory_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_bad_input_decodes_or_raises_an_image_error() -> None:
    assert len(BAD) >= 300
    before = peak_memory_bytes()
    outcomes = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for index, (name, data) in enumerate(BAD):
            try:
                decoded = decode(data, None if index % 2 else (8, 9), max_pixels=1_000_000)
                assert decoded.pixels_HWC.dtype == np.uint8 and decoded.pixels_HWC.shape[2] == 3, name
            except ImageError as error:
                outcomes.add(error.code)
                assert error.message and not error.is_transient, name
            except Exception as error:
                raise AssertionError(f"{name}: {error!r}") from error
    assert outcomes == {
        ErrorCode.EMPTY,
        ErrorCode.UNSUPPORTED_FORMAT,
        ErrorCode.TRUNCATED,
        ErrorCode.CORRUPT,
        ErrorCode.TOO_LARGE,
    }
    assert peak_memory_bytes() - before < 100e6


@pytest.mark.parametrize("name", SMALL)
def test_a_file_that_ends_early_is_truncated(name: str) -> None:
    data = SMALL[name]
    expected_HWC = decode(data).pixels_HWC
    early = 0
    for length in range(20, len(data)):
        try:
            pixels_HWC = decode(data[:length]).pixels_HWC
        except ImageError as error:
            assert error.code == ErrorCode.TRUNCATED, (length, error)
            early += 1
        else:  # what is missing lies behind the first frame's pixels
            np.testing.assert_array_equal(pixels_HWC, expected_HWC)
    assert early > 0.3 * len(data)


def test_what_is_no_image_is_an_unsupported_format() -> None:
    for name, data in strangers():
        assert code_of(data) == ErrorCode.UNSUPPORTED_FORMAT, name


def test_an_image_kind_that_pillow_cannot_read_is_an_unsupported_format() -> None:
    twelve_bit = SMALL["JPEG"].replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c")
    for data in (twelve_bit, tiff(np.zeros((4, 4), np.float64), 1), tiff(np.zeros((4, 4, 2), np.float32), 1)):
        assert code_of(data) == ErrorCode.UNSUPPORTED_FORMAT


def test_heic_is_known_by_any_of_its_brands() -> None:
    data, length = SMALL["HEIC"], int.from_bytes(SMALL["HEIC"][:4], "big")
    assert b"heix" in data[:length]
    for brand in (b"heix", b"mif1"):
        only = struct.pack(">I4s4sI4s", 20, b"ftyp", brand, 0, brand) + free_box(length - 20)
        np.testing.assert_array_equal(
            decode(only + data[length:]).pixels_HWC, decode(data).pixels_HWC, err_msg=str(brand)
        )


def free_box(length: int) -> bytes:
    """So many bytes that decoders skip."""
    return struct.pack(">I4s", length, b"free").ljust(length, b"\0")


@pytest.mark.parametrize("name", ["AVIF", "HEIC", "JPEG 2000"])
def test_what_trails_behind_a_picture_is_no_damage(name: str) -> None:
    for trailer in (b"\n", b"\0" * 20, b"hello world, trailer"):
        data = SMALL[name] + trailer
        np.testing.assert_array_equal(decode(data, is_strict=True).pixels_HWC, decode(data).pixels_HWC)


def test_heic_without_its_extra_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"pip install 'csflow\[heif\]'") as caught:
        decode(SMALL["HEIC"])
    assert caught.value.code == ErrorCode.UNSUPPORTED_FORMAT


def test_zero_bytes_are_empty_and_damage_is_named() -> None:
    assert code_of(b"") == ErrorCode.EMPTY
    damaged = bytearray(SMALL["PNG"])
    damaged[damaged.index(b"IDAT") + 8 : -30] = bytes(len(damaged) - 30 - damaged.index(b"IDAT") - 8)
    with pytest.raises(ImageError, match="OSError: broken data stream") as caught:
        decode(bytes(damaged))
    assert caught.value.code == ErrorCode.CORRUPT


# --- Threads ---------------------------------------------------------------------------------------------


def test_threads_decode_the_same_pixels_and_no_warning_leaks() -> None:
    files = [
        jpeg(
            photograph(
                300,
                400,
            )
        ),
        *SMALL.values(),
        *(data for _, data in bombs()),
    ] * 4

    def outcome(data: bytes) -> bytes:
        try:
            return decode(data, (32, 32), max_pixels=1_000_000).pixels_HWC.tobytes()
        except ImageError as error:
            return str(error).encode()

    expected = [outcome(data) for data in files]
    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(8) as pool:
        warnings.simplefilter("always")
        assert list(pool.map(outcome, files)) == expected
    assert not caught
