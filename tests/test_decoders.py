"""Decoding against the pictures that files were made of, and against the decoders of imagecodecs.

The features of a format are crossed with each other, in small pictures, so that no combination is left to
luck. What is refused, or differs and is meant to, has tests of its own.
"""

import io
import itertools
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image
from test_images import encoded, jpeg, png

from csflow.errors import ErrorCode, ImageError
from csflow.images import decode
from csflow.inputs.range_use import RangeUse
from csflow.preprocessing import Preprocessing

HEIGHT, WIDTH = 21, 35
Y, X = np.mgrid[:HEIGHT, :WIDTH]
GREY = (X * 255 // (WIDTH - 1)).astype(np.uint8)
RGB = np.dstack([GREY, Y * 255 // (HEIGHT - 1), (X + Y) * 255 // (HEIGHT + WIDTH - 2)]).astype(np.uint8)
ALPHA = np.where(Y < 5, 0, 255).astype(np.uint8)
SMOOTH = np.dstack([60 + 3 * X, 200 - 4 * Y, 90 + X + Y]).astype(np.uint8)
"""Without edges, for lossy compression."""


class Variant(NamedTuple):
    name: str
    data: bytes
    expected_HWC: np.ndarray
    """RGB of 8 bits."""
    tolerance: int = 0
    """In levels."""


def differences(variants: Iterator[Variant]) -> list[str]:
    """What is not as expected; checks that there are variants."""
    wrong, count = [], 0
    for variant in variants:
        count += 1
        try:
            pixels_HWC = decode(variant.data).pixels_HWC
        except ImageError as error:
            wrong.append(f"{variant.name}: {error}")
            continue
        if pixels_HWC.shape != variant.expected_HWC.shape:
            wrong.append(f"{variant.name}: {pixels_HWC.shape}")
            continue
        error = np.abs(pixels_HWC.astype(int) - variant.expected_HWC).max()
        if error > variant.tolerance:
            wrong.append(f"{variant.name}: {error} levels off")
    assert count
    return wrong


# --- TIFF ------------------------------------------------------------------------------------------------

TYPES = ("u1", "u2", "u4", "i1", "i2", "i4", "f4")
LAYOUTS = ("grey", "white is zero", "grey and alpha", "rgb", "rgba", "premultiplied", "cmyk", "palette")
COMPRESSIONS = (None, "lzw", "zlib", "packbits")
PREDICTED = ("lzw", "zlib")


def stored(pixels: np.ndarray, kind: str) -> np.ndarray:
    """Levels of 8 bits as samples of another type, over its whole range above zero."""
    dtype = np.dtype(kind)
    top = 1 if dtype.kind == "f" else np.iinfo(dtype).max
    values = pixels.astype(float) * top / 255
    return (values if dtype.kind == "f" else values.round().clip(0, top)).astype(dtype)


def tiff_of(samples: np.ndarray, order: str, **options: Any) -> bytes:
    file = io.BytesIO()
    with tifffile.TiffWriter(file, byteorder=order) as writer:
        writer.write(samples, metadata=None, **options)
    return file.getvalue()


def laid_out(layout: str, kind: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Samples, the RGB that they mean, and tifffile's options, of a chunky TIFF."""
    over_black = RGB * (ALPHA > 0)[..., None]
    if layout in ("grey", "white is zero"):
        name, levels = ("minisblack", GREY) if layout == "grey" else ("miniswhite", 255 - GREY)
        return stored(GREY, kind), np.dstack([levels] * 3), {"photometric": name}
    if layout == "grey and alpha":
        options = {"photometric": "minisblack", "extrasamples": ["unassalpha"], "planarconfig": "contig"}
        return stored(np.dstack([GREY, ALPHA]), kind), np.dstack([GREY * (ALPHA > 0)] * 3), options
    if layout == "palette":
        colours = np.zeros((3, 2 ** (8 * np.dtype(kind).itemsize)), np.uint16)
        colours[:, :256] = np.stack([np.arange(256), 255 - np.arange(256), np.arange(256) // 2]) * 257
        expected_HWC = (colours[:, GREY] // 257).transpose(1, 2, 0)
        return GREY.astype(kind), expected_HWC, {"photometric": "palette", "colormap": colours}
    if layout == "cmyk":
        samples = np.dstack([255 - RGB, np.zeros_like(GREY)])
        return stored(samples, kind), RGB, {"photometric": "separated"}
    if layout == "rgb":
        return stored(RGB, kind), RGB, {"photometric": "rgb"}
    colours, extra = (RGB, "unassalpha") if layout == "rgba" else (over_black, "assocalpha")
    options = {"photometric": "rgb", "extrasamples": [extra]}
    return stored(np.dstack([colours, ALPHA]), kind), over_black, options


def tiffs(layout: str) -> Iterator[Variant]:
    kinds = {"palette": ("u1", "u2"), "cmyk": ("u1", "u2", "u4")}.get(layout, TYPES)
    has_planes = layout in ("rgb", "rgba", "premultiplied", "cmyk")
    axes = kinds, "<>", COMPRESSIONS, (False, True), (None, (16, 16)), (False, True)
    for kind, order, compression, predictor, tile, planar in itertools.product(*axes):
        if (predictor and compression not in PREDICTED) or (planar and not has_planes):
            continue
        samples, expected_HWC, options = laid_out(layout, kind)
        if has_planes:
            options["planarconfig"] = "separate" if planar else "contig"
            samples = np.ascontiguousarray(np.moveaxis(samples, 2, 0)) if planar else samples
        if predictor:
            options["predictor"] = True
        data = tiff_of(samples, order, compression=compression, tile=tile, **options)
        parts = (layout, kind, order, compression, "predicted" * predictor, tile, "planes" * planar)
        yield Variant(" ".join(map(str, parts)), data, expected_HWC, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_combination_of_tiff_features_gives_the_picture(layout: str) -> None:
    assert differences(tiffs(layout)) == []


def test_libtiff_reads_the_same_samples_of_these_files() -> None:
    """So the files are what they claim, and not only what tifffile both writes and reads."""
    checked = 0
    for layout, kind, order, planar in itertools.product(LAYOUTS, TYPES, "<>", (False, True)):
        is_possible = layout == "rgb" if planar else layout != "palette" or kind == "u1"
        if not is_possible or layout == "cmyk":  # which imagecodecs turns to RGB
            continue
        samples, _, options = laid_out(layout, kind)
        if layout == "rgb":
            options["planarconfig"] = "separate" if planar else "contig"
            samples = np.ascontiguousarray(np.moveaxis(samples, 2, 0)) if planar else samples
        data = tiff_of(samples, order, compression="lzw", **options)
        np.testing.assert_array_equal(
            imagecodecs.tiff_decode(data, asrgb=False), samples, f"{layout} {kind} {order}"
        )
        checked += 1
    assert checked > 80


def other_tiffs() -> Iterator[Variant]:
    """Features that do not cross with the others."""
    for orientation in range(1, 9):
        data = tiff_of(stored(RGB, "u2"), ">", photometric="rgb", extratags=[(274, 3, 1, orientation, True)])
        turned = {1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1]}
        turned |= {5: RGB, 6: RGB[::-1], 7: RGB[::-1, ::-1], 8: RGB[:, ::-1]}
        expected_HWC = turned[orientation] if orientation < 5 else turned[orientation].swapaxes(0, 1)
        yield Variant(f"16 bits turned as {orientation}", data, expected_HWC, 1)
    for bits in (10, 12, 14):
        samples = stored(GREY, "u2") >> (16 - bits)
        tag = [(281, 3, 1, 2**bits - 1, True)]
        data = tiff_of(samples, "<", photometric="minisblack", extratags=tag)
        yield Variant(f"MaxSampleValue of {bits} bits", data, np.dstack([GREY] * 3), 1)
        samples = stored(RGB, "u2") >> (16 - bits)
        data = tiff_of(samples, "<", photometric="rgb", extratags=[(281, 3, 3, (2**bits - 1,) * 3, True)])
        yield Variant(f"colour with MaxSampleValue of {bits} bits", data, RGB, 1)
    tag = [(281, 3, 1, 30_000, True)]  # the brightest pixel, as TIFF means it: of no use for a range
    data = tiff_of(stored(GREY, "u2") // 3, "<", photometric="minisblack", extratags=tag)
    yield Variant("MaxSampleValue that is no range", data, np.dstack([GREY // 3] * 3), 1)
    colours = np.zeros((3, 256), np.uint16)
    colours[:] = np.stack([np.arange(256), 255 - np.arange(256), np.arange(256) // 2])
    for compression in COMPRESSIONS:
        data = tiff_of(GREY, "<", photometric="palette", colormap=colours, compression=compression)
        expected_HWC = colours[:, GREY].transpose(1, 2, 0)
        yield Variant(f"palette of bytes, {compression}", data, expected_HWC)
    for quality, tile, subsampling in itertools.product((60, 95), (None, (16, 16)), ((1, 1), (2, 1), (2, 2))):
        options = {"level": quality}
        data = tiff_of(
            SMOOTH,
            "<",
            photometric="ycbcr",
            compression="jpeg",
            compressionargs=options,
            subsampling=subsampling,
            tile=tile,
        )
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            yield Variant(f"JPEG in TIFF {quality} {tile} {subsampling}", data, file.pages[0].asarray(), 6)


def test_other_tiffs_give_the_picture() -> None:
    assert differences(other_tiffs()) == []


@pytest.mark.parametrize("kind", ["f2", "f8", "u8"])
def test_tiffs_of_unread_samples_are_refused_with_a_remedy(kind: str) -> None:
    with pytest.raises(ImageError, match="save it as grey, RGB or CMYK with integers of 8 or 16") as caught:
        decode(tiff_of(GREY.astype(kind), "<", photometric="minisblack"))
    assert caught.value.code == ErrorCode.UNSUPPORTED_FORMAT


# --- PNG -------------------------------------------------------------------------------------------------

COLOUR_TYPES = {"grey": 0, "rgb": 2, "palette": 3, "grey and alpha": 4, "rgba": 6}


def packed(samples_HWC: np.ndarray, bits: int) -> bytes:
    """Rows of a PNG, each with its filter byte."""
    rows = samples_HWC.reshape(len(samples_HWC), -1)
    if bits == 16:
        body = rows.astype(">u2").view(np.uint8)
    else:
        each = np.unpackbits(rows.astype(np.uint8)[..., None], axis=2)[..., 8 - bits :]
        body = np.packbits(each.reshape(len(rows), -1), axis=1)
    return np.pad(body, ((0, 0), (1, 0))).tobytes()


def pngs() -> Iterator[Variant]:
    depths = {"grey": (1, 2, 4, 8, 16), "palette": (1, 2, 4, 8)}
    for layout, colour_type in COLOUR_TYPES.items():
        for bits in depths.get(layout, (8, 16)):
            channels = {"grey": 1, "palette": 1, "grey and alpha": 2, "rgb": 3, "rgba": 4}[layout]
            picture = np.dstack([RGB[..., : channels - (channels in (2, 4))], ALPHA])[..., :channels]
            samples_HWC = (picture.astype(int) * (2**bits - 1) // 255).reshape(HEIGHT, WIDTH, channels)
            palette = bytes(range(256)) + bytes(reversed(range(256))) + bytes(256)
            chunks = [(b"PLTE", palette[: 3 * 2**bits])] if layout == "palette" else []
            rows = packed(samples_HWC, bits)
            keys = {"grey": b"\0\0", "rgb": bytes(6), "palette": b"\0\x80"}
            for name, more in {
                "plain": [],
                "gamma": [(b"gAMA", struct.pack(">I", 100_000))],
                "sBIT": [(b"sBIT", bytes([min(bits, 8)] * (3 if layout == "palette" else channels)))],
                "key": [(b"tRNS", keys[layout])] if layout in keys else [],
            }.items():
                after = [chunk for chunk in more if chunk[0] == b"tRNS"]
                before = [chunk for chunk in more if chunk not in after]
                data = png(WIDTH, HEIGHT, bits, colour_type, rows, *before, *chunks, *after)
                # A key of 16 bits is ignored: Pillow would compare it with 8 bits.
                shown = png(WIDTH, HEIGHT, bits, colour_type, rows) if after and bits == 16 else data
                expected_HWC = over_black(imagecodecs.png_decode(shown))
                yield Variant(f"{layout} of {bits} bits, {name}", data, expected_HWC, 1)


def over_black(samples: np.ndarray) -> np.ndarray:
    """What a decoder gives, as RGB of 8 bits."""
    samples_HWC = samples.reshape(*samples.shape[:2], -1)
    if samples_HWC.dtype == np.uint16:
        samples_HWC = np.rint(samples_HWC / 257).astype(np.uint8)
    channels = samples_HWC.shape[2]
    colours_HWC = samples_HWC[..., :3] if channels >= 3 else samples_HWC[..., :1].repeat(3, axis=2)
    if channels in (1, 3):
        return colours_HWC
    return np.rint(colours_HWC * (samples_HWC[..., -1:] / 255)).astype(np.uint8)


def test_pngs_of_every_kind_are_read_as_by_libpng() -> None:
    assert differences(pngs()) == []


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_samples_that_a_camera_has_not_scaled_are_read_by_sbit(bits: int) -> None:
    variants = []
    for layout, channels in {"grey": 1, "rgb": 3, "grey and alpha": 2, "rgba": 4}.items():
        picture = np.dstack([RGB[..., : channels - (channels in (2, 4))], ALPHA])[..., :channels]
        expected_HWC = over_black(picture)
        wide = stored(picture.reshape(HEIGHT, WIDTH, channels), "u2") >> (16 - bits)
        scaled = wide << (16 - bits) | wide >> (2 * bits - 16)
        for name, samples in {"as they come": wide, "scaled as PNG wants": scaled}.items():
            chunk = (b"sBIT", bytes([bits] * channels))
            data = png(WIDTH, HEIGHT, 16, COLOUR_TYPES[layout], packed(samples, 16), chunk)
            variants.append(Variant(f"{layout}, {name}", data, expected_HWC, 1))
        dark = scaled >> 4 >> (16 - bits) << (16 - bits)  # all below 2 ** bits, and yet scaled
        data = png(WIDTH, HEIGHT, 16, COLOUR_TYPES[layout], packed(dark, 16), chunk)
        variants.append(Variant(f"{layout}, dark", data, over_black(dark), 1))
    assert differences(iter(variants)) == []


# --- JPEG ------------------------------------------------------------------------------------------------


def jpegs() -> Iterator[Variant]:
    sizes = ((21, 35), (16, 16), (1, 1), (8, 65), (33, 7))
    axes = sizes, (0, 1, 2), (30, 75, 100), (False, True), (False, True), (0, 3)
    for size, subsampling, quality, progressive, optimize, restarts in itertools.product(*axes):
        picture = SMOOTH[: size[0], : size[1]]
        if size[0] > HEIGHT or size[1] > WIDTH:
            picture = np.resize(SMOOTH, (*size, 3))
        options = {"progressive": progressive, "optimize": optimize, "restart_marker_blocks": restarts}
        data = jpeg(picture, quality=quality, subsampling=subsampling, **options)
        name = f"{size} 4:{subsampling} quality {quality} {options}"
        yield Variant(name, data, imagecodecs.jpeg8_decode(data))
    for mode, progressive in itertools.product(("L", "CMYK"), (False, True)):
        data = encoded(Image.fromarray(SMOOTH).convert(mode), "JPEG", progressive=progressive)
        expected = imagecodecs.jpeg8_decode(data, outcolorspace="CMYK" if mode == "CMYK" else None)
        if mode == "CMYK":  # as Adobe has it: 255 is no ink
            expected = np.rint(expected[..., :3] * (expected[..., 3:] / 255)).astype(np.uint8)
        yield Variant(f"{mode} {progressive}", data, over_black(expected), 1)


def test_jpegs_of_every_kind_are_read_as_by_another_libjpeg() -> None:
    assert differences(jpegs()) == []


# --- BMP -------------------------------------------------------------------------------------------------


def bmp(
    bits: int, rows: bytes, height: int, palette: bytes = b"", compression: int = 0, tail: bytes = b""
) -> bytes:
    """A BMP with the header of Windows 3, or of version 4 if there are bit masks in `tail`."""
    header_bytes = 108 if tail else 40
    offset = 14 + header_bytes + len(palette)
    header = struct.pack(
        "<IiiHHIIiiII", header_bytes, WIDTH, height, 1, bits, compression, len(rows), 0, 0, 0, 0
    )
    header += tail.ljust(header_bytes - 40, b"\0")
    return b"BM" + struct.pack("<IHHI", offset + len(rows), 0, 0, offset) + header + palette + rows


def padded(rows: np.ndarray) -> bytes:
    """Rows of bytes, each padded to four."""
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4))).tobytes()


def run_lengths(indices_HW: np.ndarray, bits: int) -> bytes:
    """Rows as runs of one value each, and one row as values in a line."""
    body = bytearray()
    for number, row in enumerate(indices_HW):
        if number == 3:
            values = (
                bytes(row) if bits == 8 else np.packbits(np.unpackbits(row[:, None], axis=1)[:, 4:]).tobytes()
            )
            body += bytes([0, WIDTH]) + values + b"\0" * (len(values) % 2)
        else:
            for value, run in itertools.groupby(row.tolist()):
                body += bytes([len(list(run)), value if bits == 8 else value * 17])
        body += b"\0\0"
    return bytes(body) + b"\0\1"


def bmps() -> Iterator[Variant]:
    for upside_down in (False, True):
        height = -HEIGHT if upside_down else HEIGHT
        order = slice(None) if upside_down else slice(None, None, -1)
        for bits in (1, 4, 8):
            indices_HW = GREY >> (8 - bits)
            colours = np.stack([np.arange(2**bits), np.arange(2**bits)[::-1], np.arange(2**bits) // 2], 1)
            colours = (colours * 255 // (2**bits - 1)).astype(np.uint8)
            palette = np.pad(colours[:, ::-1], ((0, 0), (0, 1))).tobytes()
            each = np.unpackbits(indices_HW[order][..., None], axis=2)[..., 8 - bits :]
            rows = padded(np.packbits(each.reshape(HEIGHT, -1), axis=1))
            yield Variant(f"{bits} bits {height}", bmp(bits, rows, height, palette), colours[indices_HW])
            if bits > 1 and not upside_down:
                body = run_lengths(indices_HW[order], bits)
                data = bmp(bits, body, height, palette, compression=1 if bits == 8 else 2)
                yield Variant(f"{bits} bits in runs", data, colours[indices_HW])
        bgr = RGB[order, :, ::-1]
        yield Variant(f"24 bits {height}", bmp(24, padded(bgr.reshape(HEIGHT, -1)), height), RGB)
        bgrx = np.dstack([bgr, np.zeros_like(GREY)])
        yield Variant(f"32 bits {height}", bmp(32, padded(bgrx.reshape(HEIGHT, -1)), height), RGB)
        alpha = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
        data = bmp(32, padded(bgrx.reshape(HEIGHT, -1)), height, compression=3, tail=alpha)
        yield Variant(f"32 bits, nothing visible {height}", data, RGB)
        for name, widths in {"555": (5, 5, 5), "565": (5, 6, 5)}.items():
            shifts = (widths[1] + widths[2], widths[2], 0)
            values = [RGB[..., i].astype(np.uint16) >> (8 - widths[i]) for i in range(3)]
            words = sum(value << shift for value, shift in zip(values, shifts, strict=True))
            full = [value * 255 / (2**width - 1) for value, width in zip(values, widths, strict=True)]
            masks = struct.pack("<III", *((2**w - 1) << s for w, s in zip(widths, shifts, strict=True)))
            rows = padded(words[order].astype("<u2").view(np.uint8))
            expected_HWC = np.dstack(full).round().astype(np.uint8)
            data = bmp(16, rows, height, compression=3, tail=masks)
            yield Variant(f"16 bits {name} {height}", data, expected_HWC, 1)
            if name == "555":
                yield Variant(f"16 bits {height}", bmp(16, rows, height), expected_HWC, 1)


def test_bmps_of_every_kind_give_the_picture() -> None:
    assert differences(bmps()) == []


# --- WebP ------------------------------------------------------------------------------------------------


def webps() -> Iterator[Variant]:
    rgba = np.dstack([SMOOTH, ALPHA])
    for picture, lossless, quality, method in itertools.product(
        (SMOOTH, rgba), (False, True), (5, 80), (0, 3, 6)
    ):
        for exact, alpha_quality in itertools.product((False, True), (10, 100)):
            options = {"lossless": lossless, "quality": quality, "method": method, "exact": exact}
            data = encoded(Image.fromarray(picture), "WEBP", alpha_quality=alpha_quality, **options)
            name = f"{picture.shape[2]} channels {options} {alpha_quality}"
            yield Variant(name, data, over_black(imagecodecs.webp_decode(data)), 1)


def test_webps_of_every_kind_are_read_as_by_another_libwebp() -> None:
    assert differences(webps()) == []


# --- AVIF and JPEG 2000 ----------------------------------------------------------------------------------


def avifs() -> Iterator[Variant]:
    for picture, level, bits in itertools.product((SMOOTH, np.dstack([SMOOTH, ALPHA])), (50, 95), (8, 10)):
        samples = picture if bits == 8 else picture.astype(np.uint16) * 4
        data = imagecodecs.avif_encode(samples, level=level, bitspersample=bits)
        expected = imagecodecs.avif_decode(data)
        expected = expected if bits == 8 else np.rint(expected / 1023 * 255)
        yield Variant(f"{picture.shape[2]} channels {level} {bits} bits", data, over_black(expected), 3)


def test_avifs_are_read_as_by_another_libavif() -> None:
    assert differences(avifs()) == []


def jpeg_2000s() -> Iterator[Variant]:
    for samples, bits, codec in itertools.product((GREY, SMOOTH), (8, 12, 16), ("jp2", "j2k")):
        wide = (samples.astype(np.uint32) * ((1 << bits) - 1) // 255).astype(np.uint16)
        stored = samples if bits == 8 else wide
        data = imagecodecs.jpeg2k_encode(stored, level=0, codecformat=codec, bitspersample=bits)
        expected = np.broadcast_to(np.atleast_3d(samples), SMOOTH.shape)
        yield Variant(f"{samples.shape} {bits} bits {codec}", data, expected, 1)


def test_jpeg_2000s_of_every_depth_give_the_picture() -> None:
    assert differences(jpeg_2000s()) == []


# --- What nobody can see ---------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF"])
def test_the_colours_of_a_wholly_transparent_picture_are_taken(image_format: str) -> None:
    picture = Image.fromarray(np.dstack([RGB, np.zeros_like(GREY)]))
    options = {"lossless": True, "exact": True} if image_format == "WEBP" else {}
    file = io.BytesIO()
    picture.save(file, image_format, **options)
    np.testing.assert_array_equal(decode(file.getvalue()).pixels_HWC, RGB)


def test_models_of_decoding_version_1_are_given_the_pixels_that_they_were_trained_with() -> None:
    """Wholly transparent pictures are black to them, and cameras of 12 bits dark."""
    hidden = encoded(Image.fromarray(np.dstack([RGB, np.zeros_like(GREY)])), "PNG")
    samples = stored(GREY[..., None], "u2") >> 4
    camera = png(WIDTH, HEIGHT, 16, 0, packed(samples, 16), (b"sBIT", b"\x0c"))
    old, new = (Preprocessing((HEIGHT, WIDTH), decoding_version=version) for version in (1, 2))
    assert not decode(hidden, old).pixels_HWC.any() and decode(camera, old).pixels_HWC.max() == 16
    np.testing.assert_array_equal(decode(hidden, new).pixels_HWC, RGB)
    assert decode(camera, new).pixels_HWC.max() == 255


def test_images_of_too_few_bits_are_warned_of_once() -> None:
    dark = decode(png(WIDTH, HEIGHT, 16, 0, packed(stored(GREY[..., None], "u2") >> 4, 16))).range_used
    assert dark == pytest.approx(1 / 16, rel=0.001)
    bright = decode(tiff_of(stored(RGB, "u2"), "<", photometric="rgb")).range_used
    assert bright == 1 and decode(encoded(Image.fromarray(RGB), "PNG")).range_used is None
    range_use = RangeUse()
    range_use.add(99, dark)
    assert range_use.warning() is None  # the next may be bright
    range_use.add(1, dark)
    assert "brightest of 100 images of more than 8 bits uses 6.2% of its range" in (range_use.warning() or "")
    assert range_use.warning(are_all=True) is None
    few, mixed, none = RangeUse(), RangeUse(), RangeUse()
    few.add(3, dark)
    mixed.add(200, bright)
    assert few.warning(are_all=True) and not mixed.warning(are_all=True) and not none.warning(are_all=True)


def test_a_strip_that_is_an_image_of_its_own_size_is_refused() -> None:
    """Decoding it would take the memory that it says, and not that of the page."""
    data = tiff_of(np.zeros((64, 64), np.uint16), "<", compression="jpeg2000")
    with pytest.raises(ImageError, match="uncompressed or with LZW, deflate or Zstandard") as refused:
        decode(data)
    assert refused.value.code == ErrorCode.UNSUPPORTED_FORMAT


def test_a_png_with_a_large_colour_profile_is_read() -> None:
    buffer = io.BytesIO()
    Image.new("L", (16, 8), 7).save(buffer, "PNG", icc_profile=bytes(2_000_000))
    assert (decode(buffer.getvalue()).pixels_HWC == 7).all()
