"""Images that cost too much, or are damaged inside: they are named, and their neighbours are loaded."""

import io
import random
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_images import SMALL, code_of, encoded, jpeg, photograph, resized_header

from csflow.config import parse
from csflow.decode_limits import DecodeLimits, PixelBudget
from csflow.errors import ErrorCode, ImageError
from csflow.images import decode
from csflow.inputs.isolation import IsolatedLoader
from csflow.inputs.listing import list_table
from csflow.inputs.loading import ImageLoader
from csflow.inputs.reading import ImageReader
from csflow.output.layout import Output
from csflow.preprocessing import Preprocessing
from csflow.scoring.config import ScoreConfig
from csflow.scoring.job import _settings as scoring_settings
from csflow.storage import Location
from csflow.training.config import TrainConfig

SMALL_IMAGES = Preprocessing((32, 32))
SHORT = DecodeLimits(seconds=0.5)


def run_length_bmp(width: int, height: int, body: bytes) -> bytes:
    """A BMP of 4 bits, which Pillow decodes in Python."""
    palette = bytes(64)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 4, 2, len(body), 0, 0, 16, 0)
    offset = 54 + len(palette)
    return b"BM" + struct.pack("<IHHI", offset + len(body), 0, 0, offset) + info + palette + body


def slow_bmp() -> bytes:
    """Some seconds of CPU, whatever the machine."""
    return run_length_bmp(10_000, 6_000, (bytes([250, 0x12]) * 40 + b"\0\0") * 6_000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One slow image between small ones."""
    (tmp_path / "b slow.bmp").write_bytes(slow_bmp())
    for name in ("a", "c", "d", "e"):
        (tmp_path / f"{name}.png").write_bytes(SMALL["PNG"])
    return tmp_path


def outcomes(loader: ImageLoader | IsolatedLoader, folder: Path) -> dict[str, str]:
    table = list_table([str(folder)], {})
    images = loader.load(table["image_uri"].to_pylist(), table["image_version"].to_pylist())
    return {
        Path(image.image_uri).name: str(image.content.code)
        if isinstance(image.content, ImageError)
        else "loaded"
        for image in images
    }


NEIGHBOURS = dict.fromkeys(("a.png", "c.png", "d.png", "e.png"), "loaded")


@pytest.mark.parametrize("threads", [1, 4])
def test_an_image_that_takes_too_long_is_given_up_and_its_neighbours_are_loaded(
    folder: Path, threads: int
) -> None:
    loader = ImageLoader(ImageReader({}), SMALL_IMAGES, threads, limits=SHORT)
    assert outcomes(loader, folder) == NEIGHBOURS | {"b slow.bmp": "too_slow"}


def test_a_child_process_that_takes_too_long_is_killed(folder: Path) -> None:
    loader = IsolatedLoader({}, SMALL_IMAGES, SHORT)
    assert outcomes(loader, folder) == NEIGHBOURS | {"b slow.bmp": "too_slow"}


def test_the_limit_of_pixels_is_a_setting(folder: Path) -> None:
    (folder / "b slow.bmp").unlink()
    (folder / "large.png").write_bytes(encoded(Image.new("L", (100, 100)), "PNG"))
    loader = ImageLoader(ImageReader({}), SMALL_IMAGES, 2, limits=DecodeLimits(max_pixels=9_999))
    assert outcomes(loader, folder) == NEIGHBOURS | {"large.png": "too_large"}
    loader = ImageLoader(ImageReader({}), SMALL_IMAGES, 2, limits=DecodeLimits(max_pixels=10_000))
    assert outcomes(loader, folder) == NEIGHBOURS | {"large.png": "loaded"}


def test_more_pixels_than_pillow_allows_are_decoded_if_the_setting_allows_them(monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)  # Pillow's own limit is twice that
    for image_format in ("WEBP", "TIFF", "PNG"):
        data = encoded(Image.fromarray(photograph(60, 50)), image_format)
        assert decode(data, (8, 8), max_pixels=3_000).width == 50, image_format


def with_scans(number: int) -> bytes:
    """A progressive JPEG whose last scan is there many times."""
    data = jpeg(photograph(24, 24), progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * number + data[-2:]


def test_a_jpeg_of_too_many_scans_is_refused_at_once() -> None:
    data = with_scans(50_000)
    started = time.thread_time()
    with pytest.raises(ImageError, match=r"a JPEG of 500\d\d scans; at most 100 are decoded") as caught:
        decode(data)
    assert caught.value.code == ErrorCode.TOO_SLOW
    assert time.thread_time() - started < 0.2  # libjpeg takes minutes
    assert decode(with_scans(1)).width == 24


def test_sequential_jpegs_may_hold_any_number_of_thumbnails() -> None:
    thumbnails = b"Exif\0\0" + b"\xff\xda" * 200
    assert decode(jpeg(photograph(24, 24), exif=thumbnails)).width == 24


def test_run_lengths_that_cannot_fill_their_picture_are_refused() -> None:
    assert code_of(run_length_bmp(6_500, 26_800, b"\0\0" * 26_800)) == ErrorCode.TRUNCATED
    black = run_length_bmp(200, 300, (bytes([200, 0]) + b"\0\0") * 300)
    assert decode(black).height == 300


# --- Pixels at once --------------------------------------------------------------------------------------


def test_threads_never_hold_more_pixels_than_the_budget() -> None:
    budget, lock, held, most = PixelBudget(100), threading.Lock(), [0], [0]
    order = random.Random(0)

    def use(pixels: int) -> None:
        with budget.holding(pixels):
            with lock:
                held[0] += min(pixels, 100)
                most[0] = max(most[0], held[0])
            time.sleep(0)
            with lock:
                held[0] -= min(pixels, 100)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, [order.choice((1, 10, 60, 100, 500)) for _ in range(500)]))
    assert most[0] == 100 and held[0] == 0


def test_small_images_do_not_overtake_a_large_one_that_waits() -> None:
    budget, order = PixelBudget(10), []

    def take(name: str, pixels: int) -> threading.Thread:
        def run() -> None:
            with budget.holding(pixels):
                order.append(name)

        thread = threading.Thread(target=run)
        thread.start()
        while len(budget._waiting) < 1 + (name == "small"):
            pass
        return thread

    with budget.holding(5):
        threads = [take("large", 10), take("small", 1)]
        assert order == []
    for thread in threads:
        thread.join()
    assert order == ["large", "small"]


MEMORY = """
import io
from concurrent.futures import ThreadPoolExecutor
from PIL import Image
from csflow.images import decode
from csflow.process import peak_memory_bytes
file = io.BytesIO()
Image.new("RGB", (9500, 9500)).save(file, "PNG", compress_level=1)
before = peak_memory_bytes()
with ThreadPoolExecutor(4) as pool:
    list(pool.map(decode, [file.getvalue()] * 4, [(32, 32)] * 4))
print(peak_memory_bytes() - before)
"""


def test_threads_without_a_budget_of_their_own_take_the_memory_of_one_large_image() -> None:
    job = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(job.stdout) < 4 * 9500 * 9500  # which is Pillow's raster; the first was there before


def test_an_image_that_fails_gives_its_pixels_back() -> None:
    budget = PixelBudget(300)
    for data in (SMALL["PNG"][:-40], resized_header("BMP", 15, 15)[:-300], SMALL["JPEG"][:-60]):
        with pytest.raises(ImageError):
            decode(data, budget=budget)
    with budget.holding(300):
        pass


# --- Damage inside ---------------------------------------------------------------------------------------


def damaged() -> dict[str, tuple[bytes, ErrorCode]]:
    """Files that decode, with what --strict says of them."""
    whole = jpeg(photograph(200, 300))
    half = len(whole) // 2
    webp = encoded(Image.fromarray(photograph(200, 300)), "WEBP", lossless=False)
    png = bytearray(SMALL["PNG"])
    length = struct.unpack_from(">I", png, png.index(b"IDAT") - 4)[0]
    png[png.index(b"IDAT") + 4 + length] ^= 1
    text = zlib.crc32(b"tEXtk\0v") ^ 1
    chunk = struct.pack(">I", 3) + b"tEXtk\0v" + struct.pack(">I", text)
    return {
        "JPEG cut and closed": (whole[:half] + b"\xff\xd9", ErrorCode.TRUNCATED),
        "JPEG with a hole": (whole[:half] + bytes(99) + whole[half + 99 :], ErrorCode.CORRUPT),
        "PNG with a wrong checksum": (bytes(png), ErrorCode.CORRUPT),
        "PNG with a wrong checksum of a text": (
            SMALL["PNG"][:-12] + chunk + SMALL["PNG"][-12:],
            ErrorCode.CORRUPT,
        ),
        "PNG without its end": (SMALL["PNG"][:-12], ErrorCode.TRUNCATED),
        "WebP with a tail of zeros": (webp[: len(webp) // 2] + bytes(len(webp) // 2), ErrorCode.CORRUPT),
    }


@pytest.mark.parametrize("name", damaged())
def test_strict_decoding_refuses_damage_that_is_otherwise_filled_in(name: str) -> None:
    data, code = damaged()[name]
    decode(data)
    with pytest.raises(ImageError) as caught:
        decode(data, is_strict=True)
    assert caught.value.code == code and caught.value.message


def test_strict_decoding_takes_whole_files() -> None:
    cmyk = io.BytesIO()
    Image.fromarray(photograph(40, 40)).convert("CMYK").save(cmyk, "JPEG")
    multi_picture = encoded(
        Image.fromarray(photograph(40, 48)), "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))]
    )
    # Flat colour is coded as zeros: of all settings, these give the most for each block.
    flat = [
        encoded(Image.new("RGB", size, "grey"), "WEBP", lossless=False, quality=100, method=0)
        for size in ((1, 1), (64, 64), (1000, 700))
    ]
    for data in (
        *SMALL.values(),
        *flat,
        cmyk.getvalue(),
        multi_picture,
        jpeg(photograph(9, 9)) + b"trailing bytes",
    ):
        np.testing.assert_array_equal(decode(data, is_strict=True).pixels_HWC, decode(data).pixels_HWC)


# --- Settings --------------------------------------------------------------------------------------------


def test_jobs_pass_the_limits_on_to_their_workers(tmp_path: Path) -> None:
    flags = ["--input", "i", "--output", str(tmp_path), "--max_pixels", "1000", "--strict"]
    config = parse(ScoreConfig, None, ["--model", "m", *flags])
    expected = DecodeLimits(1_000, is_strict=True)
    place = Location(str(tmp_path))
    assert scoring_settings(config, place, Output(place, "m1"), "run", is_tiled=False).limits == expected
    assert parse(TrainConfig, None, flags).limits == expected
