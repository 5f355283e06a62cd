"""A folder of files that no camera made, and what is to become of each of them."""

import io
import itertools
import os
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import test_images
import test_inputs

from csflow.decode_limits import MAX_PIXELS
from csflow.errors import ErrorCode
from csflow.inputs.names import IMAGE_SUFFIXES

CUT_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")


def write_corpus(folder: Path) -> tuple[dict[str, bytes], dict[str, ErrorCode]]:
    """Writes it. Returns the images in it, and the containers that cannot be opened, both by URI."""
    images = {}
    bodies = [*cut_short(), *test_images.random_bodies(), *test_images.bombs(), *test_images.strangers()]
    bodies += [*absurd(), *test_images.SMALL.items(), ("zero bytes", b""), ("random", os.urandom(3000))]
    for index, (name, data) in enumerate(bodies):
        # The suffixes by turns, whatever the content.
        suffix = IMAGE_SUFFIXES[index % len(IMAGE_SUFFIXES)]
        path = test_inputs.write(folder / f"{index:04d} {name.replace('/', ' ')}{suffix}", data)
        images[str(path)] = data
    for name, (container, members) in hostile_containers().items():
        path = test_inputs.write(folder / name, container)
        images |= {f"{path}{separator}{member}": data for separator, member, data in members}
    broken = {}
    for name, data in damaged_containers().items():
        broken[str(test_inputs.write(folder / "damaged" / name, data))] = ErrorCode.CORRUPT
    return images, broken


def write_all_damage(folder: Path) -> dict[str, bytes]:
    """Every file of the decoder's corpus, also those whose headers claim 65 million pixels; by URI."""
    images = {}
    for index, (_, data) in enumerate(test_images.BAD):
        suffix = IMAGE_SUFFIXES[index % len(IMAGE_SUFFIXES)]
        images[str(test_inputs.write(folder / f"{index:04d}{suffix}", data))] = data
    return images


def cut_short() -> Iterable[tuple[str, bytes]]:
    """Each format up to every tenth byte."""
    whole = test_images.truncations()
    return [(name, data) for name, data in whole if name.partition("[")[0] in CUT_FORMATS]


def absurd() -> Iterable[tuple[str, bytes]]:
    """Headers that claim no pixel, a single row of them, or more than the limit."""
    for image_format in (*test_images.LOSSLESS, "JPEG"):
        limit = 16383 if image_format == "WEBP" else 65535
        for width, height in itertools.product((0, 1, 999, limit), repeat=2):
            is_small = width * height <= 1_000_000 or width * height > MAX_PIXELS
            if is_small and (image_format != "WEBP" or min(width, height) > 0):
                data = test_images.resized_header(image_format, width, height)
                yield f"{image_format} of {width}x{height}", data


Members = list[tuple[str, str, bytes]]
"""Separator, name and content of what can be reached in a container."""


def hostile_containers() -> dict[str, tuple[bytes, Members]]:
    """Whole archives whose members have names that must not be taken for paths, and what is in them."""
    some = list(test_images.SMALL.values())
    names = [
        "../../escape.png",
        "/etc/absolute.png",
        "C:\\drive.png",
        "a/../b.png",
        "n\nl.png",
        "é\u202e.png",
    ]
    members = dict(zip(names, some, strict=False)) | {"x/" * 200 + "deep.png": some[0], " .png": some[1]}
    reached: Members = [("!/", name, data) for name, data in members.items()]
    rows = [*some, b"", some[0][:100], b"no photograph"]
    return {
        "hostile.tar": (tar_with_devices(members), reached),
        "hostile.zip": (test_inputs.zip_of(members), reached),
        "bomb.zip": (zip_bomb(), [("!/", "bomb.png", bytes(30_000_000))]),
        "repeated.zip": (repeated(), [("!/", "twice.png", some[2])]),
        "nul.zip": (nul_in_a_name(), [("!/", "second.png", some[3])]),
        "no images.tar": (test_inputs.tar_of({"readme.txt": b"none"}), []),
        "rows.parquet": (
            test_inputs.parquet_of({"image": rows}),
            [("#", str(row), data) for row, data in enumerate(rows)],
        ),
        "no images.parquet": (test_inputs.parquet_of({"number": [1, 2]}), []),
    }


def tar_with_devices(members: dict[str, bytes]) -> bytes:
    """Also links, a device, a pipe and a folder that are named like images: none of them is one."""
    buffer = io.BytesIO(test_inputs.tar_of(members))
    kinds = {
        "link.png": tarfile.SYMTYPE,
        "hard link.png": tarfile.LNKTYPE,
        "device.png": tarfile.CHRTYPE,
        "disk.png": tarfile.BLKTYPE,
        "pipe.png": tarfile.FIFOTYPE,
        "folder.png": tarfile.DIRTYPE,
    }
    with tarfile.open(fileobj=buffer, mode="a") as archive:
        for name, kind in kinds.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.devmajor, member.devminor = kind, "/etc/passwd", 1, 3
            archive.addfile(member)
    return buffer.getvalue()


def zip_bomb() -> bytes:
    """30 MB of zeros in 30 kB."""
    return test_inputs.zip_of({"bomb.png": bytes(30_000_000)})


def repeated() -> bytes:
    """Two members of one name: the last counts."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for data in list(test_images.SMALL.values())[1:3]:
            archive.writestr("twice.png", data)
    return buffer.getvalue()


def nul_in_a_name() -> bytes:
    """A name ends at a NUL, as C programs read it; here nothing is left that is named like an image."""
    some = list(test_images.SMALL.values())
    data = test_inputs.zip_of({"nul@.png": some[1], "second.png": some[3]})
    return data.replace(b"nul@.png", b"nul\0.png")


def damaged_containers() -> dict[str, bytes]:
    tar = test_inputs.tar_of({f"{i}.png": data for i, data in enumerate(test_images.SMALL.values())})
    archive = test_inputs.zip_of({f"{i}.png": data for i, data in enumerate(test_images.SMALL.values())})
    table = test_inputs.parquet_of({"image": list(test_images.SMALL.values())})
    damaged = {
        "inside data.tar": test_inputs.cut_inside_data(),
        "inside header.tar": test_inputs.cut_inside_header(),
        "bad header.tar": test_inputs.bad_header_in_the_middle(),
        "negative size.tar": test_inputs.negative_size(),
        "without directory.zip": test_inputs.zip_without_directory(),
        "bad directory.zip": test_inputs.zip_with_bad_directory(),
        "jpeg.tar": test_images.SMALL["JPEG"],
        "jpeg.zip": test_images.SMALL["JPEG"],
        "jpeg.parquet": test_images.SMALL["JPEG"],
    }
    # What follows a tar's last member is padding, which nobody misses.
    for suffix, whole in (("tar", tar.rstrip(b"\0")), ("zip", archive), ("parquet", table)):
        damaged[f"empty.{suffix}"] = b""
        damaged[f"random.{suffix}"] = os.urandom(5000)
        for tenth in range(1, 10):
            damaged[f"{tenth} tenths.{suffix}"] = whole[: len(whole) * tenth // 10 - 7]
    return damaged
