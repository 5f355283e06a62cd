"""Members of tar and zip archives. Listing indexes an archive once; a member is one range of bytes.

A member's version holds everything needed to read it, so that readers share no state and open no archive:

    tar   <archive version>:<offset>+<size>
    zip   <archive version>:<offset>+<span>+<size>+<crc32>     offset and span of header and data together

A member's name is only a part of its URI and never a path on a disk, so `../x.jpg` does no harm.
"""

import math
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator
from datetime import UTC, datetime
from itertools import pairwise
from typing import BinaryIO, NamedTuple

from csflow.errors import ErrorCode, ImageError
from csflow.inputs.objects import ObjectStore, StoredObject
from csflow.inputs.store_errors import check_size, parsing
from csflow.inputs.uris import as_text

SUFFIXES = (".tar", ".zip")
SEPARATOR = "!/"
READ_AHEAD = 4 << 20
"""Bytes per request while a tar is indexed: its headers lie between the data."""

ZIP_TAIL = 256 << 10

MEMBER_URI = re.compile(r"(?s)(?P<archive>.*?\.(?:tar|zip))!/(?P<name>.*)", re.IGNORECASE)
TAR_VERSION = re.compile(r"(?s)(?P<archive>.*):(?P<offset>\d+)\+(?P<size>\d+|sparse)")
ZIP_VERSION = re.compile(
    r"(?s)(?P<archive>.*):(?P<offset>\d+)\+(?P<span>\d+)\+(?P<size>\d+)\+(?P<crc>[0-9a-f]{8})"
)
LOCAL_HEADER = struct.Struct("<4s5H3I2H")
LOCAL_SIGNATURE = b"PK\x03\x04"
LONGEST_HEADER = LOCAL_HEADER.size + 2 * 0xFFFF
ENCRYPTED = 0x1
NO_TIME = (1980, 1, 1, 0, 0, 0)
"""What programs write that give all zip members the same time; in a tar it is 0."""


def split_member(uri: str) -> tuple[str, str] | None:
    """Archive URI and member name; None if the URI names no member."""
    match = MEMBER_URI.fullmatch(uri)
    return (match["archive"], match["name"]) if match else None


def list_members(
    store: ObjectStore,
    archive: StoredObject,
    is_wanted: Callable[[str], bool],
    is_no_file: Callable[[str], object] = lambda name: None,
) -> list[StoredObject]:
    """The wanted members, in the order of the archive. Of a repeated name the last counts, as when unpacking.

    Args:
        is_no_file: is told of wanted members of a tar that are no files: links to what is no wanted member.

    Raises:
        ImageError: CORRUPT if the archive's index is damaged anywhere, TOO_LARGE if an index entry would fill
            the memory, or as `ObjectStore.fetch`.
    """
    is_tar = archive.uri.lower().endswith(".tar")
    index = _index_tar if is_tar else _index_zip
    members: dict[str, StoredObject] = {}
    with parsing("archive"), store.open(archive, READ_AHEAD) as file:
        for name, place, size, modified_at in index(file, archive.size):
            if not is_wanted(name):
                continue
            if not isinstance(place, _Link):
                version = f"{archive.version}:{place}"
            elif place.target in members:
                _, version, size, _ = members[place.target]
            else:
                is_no_file(name)
                continue
            members[name] = StoredObject(f"{archive.uri}{SEPARATOR}{name}", version, size, modified_at)
    return list(members.values())


def read_member(store: ObjectStore, uri: str, version: str, max_bytes: int) -> bytes | None:
    """Bytes of a member, read in one request; None if URI and version do not name a member.

    Raises:
        ImageError: as `ObjectStore.fetch`; TOO_LARGE above `max_bytes` unpacked; CORRUPT or
            UNSUPPORTED_FORMAT if unpacking fails.
    """
    member = split_member(uri)
    if member is None:
        return None
    archive = member[0]
    position = ZIP_VERSION.fullmatch(version)
    if position:
        return _read_zip_member(store, archive, position, max_bytes)
    position = TAR_VERSION.fullmatch(version)
    return _read_tar_member(store, archive, position, max_bytes) if position else None


class _Link(NamedTuple):
    """In place of the position of a member that is a hard link to an earlier one."""

    target: str
    """Name of the earlier member; empty for symbolic links, which may lead anywhere."""


Entry = tuple[str, str | _Link, int, float]
"""Name, position and size of a member, and the time of its last change, NaN if that is not known."""


def _index_tar(file: BinaryIO, size: int) -> Iterator[Entry]:
    """Also of tars that were joined by `cat`: one may follow the zeros at the end of another."""
    end = yield from _index_one_tar(file, size)
    while end < size:
        file.seek(end)
        block = file.read(READ_AHEAD)
        zeros = len(block) - len(block.lstrip(b"\0"))
        end += zeros // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        if zeros < len(block):
            file.seek(end)
            try:
                tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                return  # what follows an archive and is none is not read, as by tar itself
            file.seek(end)
            end = yield from _index_one_tar(file, size)


def _index_one_tar(file: BinaryIO, size: int) -> Generator[Entry, None, int]:
    """The members of the tar that begins here; returns where the zeros at its end begin."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        end = -1
        while (member := tar.next()) is not None:
            # A negative size sends tarfile back to headers it has read, for ever (CVE-2025-8194).
            if member.offset <= end or member.size < 0:
                raise tarfile.ReadError("members overlap")
            if member.offset_data + member.size > size and not member.issparse():
                raise tarfile.ReadError("the archive ends inside a member")
            end = member.offset
            tar.members.clear()  # type: ignore[attr-defined]  # a million of them would be kept otherwise
            if member.isreg():
                length = "sparse" if member.issparse() else str(member.size)
                modified_at = float(member.mtime) or math.nan
                yield as_text(member.name), f"{member.offset_data}+{length}", member.size, modified_at
            elif member.islnk() or member.issym():
                target = as_text(member.linkname) if member.islnk() else ""
                yield as_text(member.name), _Link(target), 0, float(member.mtime) or math.nan
        # tarfile takes a damaged or cut header for the end of the archive, and what follows would be lost.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"no valid header at byte {tar.offset}")
        return tar.offset


def _read_tar_member(store: ObjectStore, archive: str, position: re.Match[str], max_bytes: int) -> bytes:
    if position["size"] == "sparse":
        raise ImageError(ErrorCode.UNSUPPORTED_FORMAT, "a sparse tar member; pack it without --sparse")
    start, size = int(position["offset"]), int(position["size"])
    check_size(size, max_bytes)
    return store.fetch(archive, position["archive"], start, start + size, max_bytes) if size else b""


def _index_zip(file: BinaryIO, size: int) -> Iterator[Entry]:
    # The index is at the end: one request for both it and the record that says where it begins.
    file.seek(max(0, size - ZIP_TAIL))
    file.read()
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        starts = sorted({member.header_offset for member in members} | {archive.start_dir})
    # Header and data of a member end where the next begins: the length of the header is in the header alone.
    ends = dict(pairwise(starts))
    for member in members:
        if member.is_dir():
            continue
        if not 0 <= member.header_offset < size:
            raise zipfile.BadZipFile("a member lies outside of the archive")
        span = ends.get(member.header_offset, size) - member.header_offset
        span = min(span, LONGEST_HEADER + member.compress_size)
        position = f"{member.header_offset}+{span}+{member.file_size}+{member.CRC:08x}"
        yield as_text(member.filename), position, member.file_size, _time_of(member)


def _time_of(member: zipfile.ZipInfo) -> float:
    """Seconds since 1970 of a zip member, whose time has no zone and counts as UTC; NaN if it has none."""
    if member.date_time == NO_TIME:
        return math.nan
    try:
        return datetime(*member.date_time, tzinfo=UTC).timestamp()
    except ValueError:
        return math.nan


def _read_zip_member(store: ObjectStore, archive: str, position: re.Match[str], max_bytes: int) -> bytes:
    start, span, size = int(position["offset"]), int(position["span"]), int(position["size"])
    check_size(size, max_bytes)
    # Deflate adds less than a thousandth to what it cannot compress.
    limit = LONGEST_HEADER + max_bytes + max_bytes // 1000
    data = _unpack(store.fetch(archive, position["archive"], start, start + span, limit), size)
    if len(data) != size or zlib.crc32(data) != int(position["crc"], 16):
        raise ImageError(ErrorCode.CORRUPT, "the zip member does not have the size and checksum of its entry")
    return data


def _unpack(region: bytes, size: int) -> bytes:
    """Data of the zip member at the start of `region`, never more than one byte above `size`."""
    with parsing("zip member"):
        signature, _, flags, method, *_, name_length, extra_length = LOCAL_HEADER.unpack_from(region)
        if signature != LOCAL_SIGNATURE:
            raise zipfile.BadZipFile("no header where its entry points")
        if flags & ENCRYPTED:
            raise ImageError(ErrorCode.UNSUPPORTED_FORMAT, "the zip member is encrypted")
        data_start = LOCAL_HEADER.size + name_length + extra_length
        if method == zipfile.ZIP_STORED:
            return region[data_start : data_start + size]
        if method == zipfile.ZIP_DEFLATED:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(region[data_start:], size + 1)
        raise ImageError(ErrorCode.UNSUPPORTED_FORMAT, f"zip compression method {method}; use deflate")
