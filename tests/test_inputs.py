"""Listing and reading of inputs: every kind and store, and what is damaged, changed, hostile or refused."""

import gzip
import io
import json
import os
import struct
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import faulty_s3
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import csv, orc

from csflow.config import parse
from csflow.errors import ErrorCode, ImageError, WrongUse
from csflow.inputs import folders, inventories, native, native_s3, objects
from csflow.inputs.exclusion import read_exclusion
from csflow.inputs.listing import LISTING, list_images, list_table
from csflow.inputs.manifests import canonical_uri
from csflow.inputs.reading import ImageReader
from csflow.inputs.selection import EVERYTHING, Selection
from csflow.scoring.config import ScoreConfig
from csflow.scoring.frozen_listing import Listing
from csflow.storage import Location


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (16, 8), shade).save(buffer, "PNG")
    return buffer.getvalue()


def listing(
    *uris: object, options: dict[str, Any] | None = None, selection: Selection = EVERYTHING
) -> dict[str, str]:
    """Image URI → version, in the order of the listing; each URI must come once."""
    batches = list(list_images([str(uri) for uri in uris], options or {}, selection))
    assert all(batch.schema == LISTING for batch in batches)
    table = pa.Table.from_batches(batches, LISTING)
    found = dict(zip(table["image_uri"].to_pylist(), table["image_version"].to_pylist(), strict=True))
    assert len(found) == len(table)
    return found


def contents(found: dict[str, str], options: dict[str, Any] | None = None) -> dict[str, bytes]:
    reader = ImageReader(options or {}, deadline_s=20)
    return {uri: reader.read(uri, version) for uri, version in found.items()}


def failure(uri: str, version: str, deadline_s: float = 20, **settings: Any) -> ImageError:
    """Why an image cannot be read."""
    reader = ImageReader(settings.pop("options", {}), deadline_s=deadline_s, **settings)
    with pytest.raises(ImageError) as caught:
        reader.read(uri, version)
    assert uri not in caught.value.message
    return caught.value


def wrong_use(*uris: object, **settings: Any) -> str:
    with pytest.raises(WrongUse) as caught:
        listing(*uris, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert str(uris[0]) in message
    return message


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def tar_of(members: dict[str, bytes], **settings: Any) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **settings) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def zip_of(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def parquet_of(columns: dict[str, Any], row_group_size: int = 2) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=row_group_size)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def server() -> Iterator[faulty_s3.FaultyS3]:
    started = faulty_s3.FaultyS3()
    yield started
    started.stop()


@pytest.fixture
def bucket(server: faulty_s3.FaultyS3) -> Iterator[faulty_s3.FaultyS3]:
    yield server
    server.empty()


ARCHIVE = {
    "part.jpg": png(1),
    "deep/er.PNG": png(2),
    "../climb.png": png(3),
    "/etc/absolute.png": png(4),
    "./dot.png": png(5),
    "_DSC0001.JPG": png(6),
    "__MACOSX/._part.jpg": b"AppleDouble",
    "notes.txt": b"no image",
}
MEMBERS = [name for name in ARCHIVE if name not in ("__MACOSX/._part.jpg", "notes.txt")]
ROWS = [png(20), png(21), png(22), png(23), png(24)]
HUGGING_FACE = {"image": [{"bytes": data, "path": "a.png"} for data in ROWS], "label": [0] * 5}


def archive_tree() -> dict[str, bytes]:
    """Every kind of input in one folder: relative name → bytes."""
    return {
        "b.jpg": png(10),
        "a.TIFF": png(11),
        "line 1/ü#1?.png": png(12),
        "line 1/c[1].webp": png(13),
        "line 1/d::e.bmp": png(14),
        "line 1/_DSC0001.JPG": png(15),
        "pack.tar": tar_of(ARCHIVE),
        "pack.zip": zip_of(ARCHIVE),
        "stored.zip": zip_of(ARCHIVE, zipfile.ZIP_STORED),
        "rows.parquet": parquet_of(HUGGING_FACE),
        "labels.parquet": parquet_of({"image_uri": ["a.jpg"], "label": [1]}),
        "labels.csv": b"image_uri\nb.jpg\n",
        ".hidden.jpg": png(99),
        ".cache/x.jpg": png(99),
        "_temporary/x.jpg": png(99),
        "readme.txt": b"",
    }


def expected_images(root: str) -> dict[str, bytes]:
    tree = archive_tree()
    singles = {f"{root}/{name}": tree[name] for name in list(tree)[:6]}
    packs = ("pack.tar", "pack.zip", "stored.zip")
    members = {f"{root}/{pack}!/{name}": ARCHIVE[name] for pack in packs for name in MEMBERS}
    rows = {f"{root}/rows.parquet#{row}": data for row, data in enumerate(ROWS)}
    return singles | members | rows


def test_local_folder_lists_every_kind_and_reads_it_back(tmp_path: Path) -> None:
    for name, data in archive_tree().items():
        write(tmp_path / name, data)
    found = listing(tmp_path)
    assert contents(found) == expected_images(str(tmp_path))
    assert list(found.items()) == list(listing(tmp_path).items())
    assert list(tmp_path.rglob("climb*")) == []


def test_s3_prefix_lists_every_kind_and_reads_it_back(bucket: faulty_s3.FaultyS3) -> None:
    for name, data in archive_tree().items():
        bucket.put(f"archive/{name}", data)
    found = listing("s3://inputs/archive", options=bucket.options)
    assert contents(found, bucket.options) == expected_images("s3://inputs/archive")
    assert list(found.items()) == list(listing("s3a://inputs/archive/", options=bucket.options).items())


def test_other_stores_are_listed_and_read(tmp_path: Path) -> None:
    store, archive = fsspec.filesystem("memory"), "memory:///archive"
    # Parquet files are opened in a child process, and this store is in the memory of this one.
    for name, data in archive_tree().items():
        if not name.endswith(".parquet"):
            store.pipe_file(f"/archive/{name}", data)
    try:
        expected = {u: data for u, data in expected_images(archive).items() if ".parquet" not in u}
        assert contents(listing(archive)) == expected
        assert failure(f"{archive}/gone.png", "1").code == ErrorCode.NOT_FOUND
    finally:
        store.rm("/archive", recursive=True)


def test_s3_images_take_one_request_each_and_no_head(bucket: faulty_s3.FaultyS3) -> None:
    for number in range(5):
        bucket.put(f"many/{number}.png", png(number))
    bucket.put("many/x.tar", tar_of({"m.png": png(7)}))
    bucket.put("many/x.zip", zip_of({"m.png": png(8)}))
    found = listing("s3://inputs/many/", options=bucket.options)
    assert not any(request.startswith("HEAD") for request in bucket.requests)
    bucket.requests.clear()
    assert len(contents(found, bucket.options)) == 7
    assert [request.split()[0] for request in bucket.requests] == ["GET"] * 7


def test_s3_zip_is_listed_with_one_request_for_its_index(bucket: faulty_s3.FaultyS3) -> None:
    bucket.put("x.zip", zip_of({f"{number}.png": os.urandom(1000) for number in range(500)}))
    assert len(listing("s3://inputs", options=bucket.options)) == 500
    assert [request for request in bucket.requests if "list-type" not in request] == ["GET /inputs/x.zip"]


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 lists three keys a page."""
    real = objects.ObjectStore.call_s3

    def call(self: objects.ObjectStore, method: str, **request: Any) -> Any:
        return real(self, method, **({"MaxKeys": 3} | request))

    monkeypatch.setattr(objects.ObjectStore, "call_s3", call)


def test_s3_pages_of_many_folders_are_all_listed(
    bucket: faulty_s3.FaultyS3, small_pages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"p/{folder}/{name}.png" for folder in range(6) for name in range(4)] + ["p/top.png"]
    for name in names:
        bucket.put(name, b"x")
    for listings_at_once in (1, 4, 16):
        monkeypatch.setattr(folders, "LISTINGS_AT_ONCE", listings_at_once)
        found = listing("s3://inputs/p", options=bucket.options)
        assert sorted(found) == sorted(f"s3://inputs/{name}" for name in names)
        assert list(found) == list(listing("s3://inputs/p", options=bucket.options))


def test_a_large_s3_folder_is_divided_by_the_beginnings_of_names_and_no_image_is_listed_twice(
    bucket: faulty_s3.FaultyS3, small_pages: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered = [f"image-{number:03d}.png" for number in range(0, 1000, 17)]
    # Names that begin others, are sorted by their bytes, differ in the last character, or lie below.
    odd = [
        "image-0.png",
        "image-05.png.png",
        "image-9/1.png",
        "image-9/2.png",
        "ähnlich.png",
        "\U0001f4f7.png",
    ]
    odd += [f"{character}.png" for character in "abcdefghijklmnopqrstuvwxyz"]
    names = sorted(f"p/{name}" for name in numbered + odd)
    for name in names:
        bucket.put(name, b"x")
    monkeypatch.setattr(folders, "PAGES_IN_A_ROW", 2)
    orders = []
    for listings_at_once in (2, 4, 16, 16):
        monkeypatch.setattr(folders, "LISTINGS_AT_ONCE", listings_at_once)
        found = pa.Table.from_batches(list_images(["s3://inputs/p"], bucket.options))
        assert sorted(found["image_uri"].to_pylist()) == [f"s3://inputs/{name}" for name in names]
        orders.append(found["image_uri"].to_pylist())
    assert orders[-1] == orders[-2]
    assert any("prefix=p%2Fimage-1" in request for request in bucket.requests)


@pytest.mark.parametrize("oddity", ["order", "start"])
def test_a_large_folder_of_a_store_that_lists_otherwise_is_listed_whole(
    bucket: faulty_s3.FaultyS3, monkeypatch: pytest.MonkeyPatch, oddity: str
) -> None:
    names = [f"p/{number:02d}.png" for number in range(40)]
    for name in names:
        bucket.put(name, b"x")
    real = objects.ObjectStore.call_s3

    def odd_pages(self: objects.ObjectStore, method: str, **request: Any) -> Any:
        if oddity == "start":
            request.pop("StartAfter", None)
        page = real(self, method, **({"MaxKeys": 3} | request))
        if oddity == "order":
            page["Contents"] = page.get("Contents", [])[::-1]
        return page

    monkeypatch.setattr(objects.ObjectStore, "call_s3", odd_pages)
    monkeypatch.setattr(folders, "PAGES_IN_A_ROW", 2)
    found = pa.Table.from_batches(list_images(["s3://inputs/p"], bucket.options))
    assert sorted(found["image_uri"].to_pylist()) == [f"s3://inputs/{name}" for name in names]


def test_listing_comes_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csflow.inputs.listing.BATCH_ROWS", 2)
    for number in range(5):
        write(tmp_path / f"{number}.png", png(number))
    assert [len(batch) for batch in list_images([str(tmp_path)], {})] == [2, 2, 1]


def test_overlapping_inputs_give_each_image_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = write(tmp_path / "a" / "1.png", png(1))
    write(tmp_path / "a" / "2.png", png(2))
    monkeypatch.chdir(tmp_path)
    inputs = [str(image), "a", "./a/../a/", f"file://{image}", str(tmp_path / "*" / "*.png"), "a"]
    once = [str(image), str(tmp_path / "a" / "2.png")]
    assert list_table(inputs, {})["image_uri"].to_pylist() == once
    listing = Listing.freeze(Location(str(tmp_path / "frozen")), list_images(inputs, {}), None)
    assert (listing.images, listing.first_uri, listing.last_uri) == (2, *once)
    assert [uri for batch in listing.batches() for uri in batch["image_uri"].to_pylist()] == once


def test_only_names_that_are_included_and_not_excluded_are_listed(tmp_path: Path) -> None:
    for name in ("line-1/a.png", "line-1/b.jpg", "line-1/calib/c.png", "line-2/d.png"):
        write(tmp_path / name, png(1))
    with tarfile.open(tmp_path / "line-1" / "night.tar", "w") as tar:
        tar.add(tmp_path / "line-2" / "d.png", "calib/e.png")
        tar.add(tmp_path / "line-2" / "d.png", "f.png")
    selection = Selection(include=["*/line-1/*.png"], exclude=["*/calib/*", "*!/calib/*"])
    found = listing(tmp_path, selection=selection)
    assert list(found) == [f"{tmp_path}/line-1/a.png", f"{tmp_path}/line-1/night.tar!/f.png"]


def exclude(
    inputs: Path | str, *entries: object, options: dict[str, Any] | None = None
) -> tuple[list[str], list[str]]:
    """Names that are left of an input, and warnings."""
    exclusion = read_exclusion([str(entry) for entry in entries], options or {})
    images = list_table([str(inputs)], options or {})
    left = exclusion.leave_out(images)["image_uri"].to_pylist()
    return [uri.removeprefix(f"{inputs}/") for uri in left], list(exclusion.warnings(images))


def test_manifests_and_patterns_leave_images_out_of_an_input(
    tmp_path: Path, bucket: faulty_s3.FaultyS3
) -> None:
    for name in ("a.png", "b.png", "calib/c.png", "d.jpg"):
        write(tmp_path / "in" / name, png(1))
    with tarfile.open(tmp_path / "in" / "night.tar", "w") as tar:
        for name in ("e.png", "f.png"):
            tar.add(tmp_path / "in" / "a.png", name)
    everything = ["a.png", "b.png", "calib/c.png", "d.jpg", "night.tar!/e.png", "night.tar!/f.png"]
    assert exclude(tmp_path / "in") == (everything, [])
    write(
        tmp_path / "bad.csv", f"image_uri,why\n{tmp_path}/in/a.png,scratch\nin/night.tar!/f.png,\n".encode()
    )
    parquet = pa.table({"image_uri": ["in/b.png"], "image_version": ["of long ago"]})
    pq.write_table(parquet, tmp_path / "worse.PARQUET")
    entries = (tmp_path / "bad.csv", "*/calib/*", tmp_path / "worse.PARQUET")
    assert exclude(tmp_path / "in", *entries) == (["d.jpg", "night.tar!/e.png"], [])

    for name, data in (("in/a.png", png(1)), ("in/b.png", png(2)), ("bad.csv", b"image_uri\nin/a.png\n")):
        bucket.put(name, data)
    in_store = exclude("s3://inputs/in", "s3a://inputs/bad.csv", options=bucket.options)
    assert in_store == (["b.png"], [])


def test_an_exclusion_that_does_less_than_it_says_is_named(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write(tmp_path / "in" / name, png(1))
    first = f"{tmp_path}/in/a.png"
    some = write(tmp_path / "some.csv", b"image_uri\nin/b.png\nin/y.png\nin/x.png\n")
    none = write(tmp_path / "none.csv", b"image_uri\nb.png\n")
    empty = write(tmp_path / "empty.csv", b"image_uri\n")
    left, warnings = exclude(tmp_path / "in", some, none, empty, "b.png", "*/a*")
    assert left == []
    assert warnings == [
        f"--exclude {some}: 2 of its 3 images are not in the input, {tmp_path}/in/x.png first",
        f"--exclude {none} names no image of the input; write URIs as listed (named {tmp_path}/b.png, "
        f"listed {first})",
        f"--exclude {empty} names no image of the input; write URIs as listed (listed {first})",
        f"--exclude b.png matches no whole URI of the input, such as {first}",
    ]


def test_a_manifest_of_exclusions_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match=r"gone\.csv does not exist"):
        read_exclusion([f"{tmp_path}/gone.csv"], {})
    with pytest.raises(
        WrongUse, match=r"list\.csv has no column image_uri, only name; name it in the header"
    ):
        read_exclusion([str(write(tmp_path / "list.csv", b"name\na.png\n"))], {})
    pq.write_table(pa.table({"image": [png(1)]}), tmp_path / "images.parquet")
    with pytest.raises(WrongUse, match=r"images\.parquet has no column image_uri"):
        read_exclusion([f"{tmp_path}/images.parquet"], {})
    with pytest.raises(WrongUse, match=r"broken\.parquet cannot be read as a manifest"):
        read_exclusion([str(write(tmp_path / "broken.parquet", b"no parquet"))], {})


def test_only_files_changed_since_are_listed_and_old_archives_are_not_opened(
    tmp_path: Path, bucket: faulty_s3.FaultyS3
) -> None:
    since = datetime(2026, 11, 22, 18, tzinfo=UTC)
    for name, age_s in (("old.png", 1), ("new.png", 0), ("old.tar", 1)):
        path = write(tmp_path / name, b"no archive" if name.endswith("tar") else png(1))
        os.utime(path, (since.timestamp() - age_s,) * 2)
        bucket.put(name, path.read_bytes())
    assert list(listing(tmp_path, selection=Selection(since=since))) == [f"{tmp_path}/new.png"]
    manifest = write(tmp_path / "list.csv", b"image_uri\nold.png\nnew.png\nold.tar\n")
    assert list(listing(manifest, selection=Selection(since=since))) == [f"{tmp_path}/new.png"]
    past, future = (datetime.now(UTC) + timedelta(days=days) for days in (-1, 1))
    recent = listing("s3://inputs", options=bucket.options, selection=Selection(since=past))
    assert len(recent) == 3
    # Nothing new is no mistake, as nothing at all would be.
    assert not listing("s3://inputs", options=bucket.options, selection=Selection(since=future))


INVENTORY = {
    "Bucket": ["inputs"] * 6,
    "Key": ["a b/1+1.png", "old.png", "gone.png", "notes.txt", "_runs/x.png", "c.tar"],
    "IsLatest": [True, False, True, True, True, True],
    "IsDeleteMarker": [False, False, True, False, False, False],
    "Size": [1, 2, None, 3, 4, 5],
    "LastModifiedDate": [datetime(2026, 11, day, tzinfo=UTC) for day in (22, 20, 21, 22, 22, 20)],
    "ETag": ["e1", "e2", "", "e3", "e4", "e5"],
}


@pytest.mark.parametrize("file_format", ["CSV", "Parquet", "ORC"])
def test_an_s3_inventory_stands_for_a_listing(
    bucket: faulty_s3.FaultyS3, file_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with io.BytesIO() as archive:
        with tarfile.open(fileobj=archive, mode="w") as tar:
            info = tarfile.TarInfo("member.png")
            info.size = len(png(1))
            tar.addfile(info, io.BytesIO(png(1)))
        etag = bucket.fs.info(bucket.put("c.tar", archive.getvalue()))["ETag"]
    columns = INVENTORY | {"ETag": [*INVENTORY["ETag"][:5], etag], "Size": [*INVENTORY["Size"][:5], 10_240]}
    sink = io.BytesIO()
    if file_format == "CSV":
        encoded = columns | {"Key": [quote_plus(str(key)) for key in columns["Key"]]}
        encoded["LastModifiedDate"] = [
            f"{time:%Y-%m-%dT%H:%M:%S}.000Z" for time in columns["LastModifiedDate"]
        ]
        options = csv.WriteOptions(include_header=False, quoting_style="all_valid")
        csv.write_csv(pa.table(encoded), sink, options)
        data, schema = gzip.compress(sink.getvalue()), ", ".join(columns)
    else:
        table = pa.table(columns).rename_columns(list(inventories.COLUMNS.values()))
        (pq.write_table if file_format == "Parquet" else orc.write_table)(table, sink)
        data, schema = sink.getvalue(), f"struct<{','.join(f'{name}:string' for name in table.column_names)}>"
    bucket.put("inventory/data/1", data)
    manifest = {"destinationBucket": "arn:aws:s3:::inputs", "fileFormat": file_format, "fileSchema": schema}
    manifest["files"] = [{"key": "inventory/data/1", "size": len(data)}]
    bucket.put("inventory/manifest.json", json.dumps(manifest).encode())
    found = listing("s3://inputs/inventory/manifest.json", options=bucket.options)
    assert list(found) == ["s3://inputs/a b/1+1.png", "s3://inputs/c.tar!/member.png"]
    assert found["s3://inputs/a b/1+1.png"] == "e1"
    selection = Selection(since=datetime(2026, 11, 21, tzinfo=UTC))
    recent = listing("s3://inputs/inventory/manifest.json", options=bucket.options, selection=selection)
    assert list(recent) == ["s3://inputs/a b/1+1.png"]


def test_an_inventory_without_etags_is_refused_with_the_remedy(bucket: faulty_s3.FaultyS3) -> None:
    manifest = {"destinationBucket": "arn:aws:s3:::inputs", "fileFormat": "CSV", "fileSchema": "Bucket, Key"}
    bucket.put("manifest.json", json.dumps(manifest | {"files": []}).encode())
    with pytest.raises(WrongUse, match=r"manifest\.json lacks ETag; add these fields to the inventory"):
        listing("s3://inputs/manifest.json", options=bucket.options)
    bucket.put("manifest.json", b"{}")
    with pytest.raises(WrongUse, match="is no manifest of an S3 Inventory"):
        listing("s3://inputs/manifest.json", options=bucket.options)


def test_patterns_match_files_and_folders(tmp_path: Path, bucket: faulty_s3.FaultyS3) -> None:
    names = ["d-1/a.png", "d-1/b.jpg", "d-2/sub/c.png", "e/d.png", "d-1/.h.png", "d-1/[x].png", "d-1/x.png"]
    for name in names:
        write(tmp_path / name, png(1))
        bucket.put(name, png(1))
    expected = {
        "d-*/*.png": ["d-1/[x].png", "d-1/a.png", "d-1/x.png"],
        "d-*": ["d-1/[x].png", "d-1/a.png", "d-1/b.jpg", "d-1/x.png", "d-2/sub/c.png"],
        "**/c.png": ["d-2/sub/c.png"],
        "d-1/[x].png": ["d-1/[x].png"],  # an object of that very name is preferred
    }
    for pattern, matches in expected.items():
        for root, options in ((str(tmp_path), {}), ("s3://inputs", bucket.options)):
            found = listing(f"{root}/{pattern}", options=options)
            assert sorted(found) == [f"{root}/{name}" for name in matches]


@pytest.mark.parametrize("form", ["lot[3]", "lot[3]/", "lot[3]/*.png", "lot[[]3]", "lo*[[]3]/a.png"])
def test_a_folder_that_exists_is_meant_and_not_the_pattern_that_its_name_is(
    tmp_path: Path, bucket: faulty_s3.FaultyS3, form: str
) -> None:
    for name in ("in/lot[3]/a.png", "in/lot3/a.png", "in/lot3/b.png", "in/lot33/a.png"):
        write(tmp_path / name, png(1))
        bucket.put(name, png(1))
    for root, options in ((str(tmp_path), {}), ("s3://inputs", bucket.options)):
        assert list(listing(f"{root}/in/{form}", options=options)) == [f"{root}/in/lot[3]/a.png"]


def test_a_pattern_below_a_folder_that_has_marks_in_its_name_is_still_a_pattern(tmp_path: Path) -> None:
    for name in ("lot[3]/n1/a.png", "lot[3]/n[12]/b.png", "lot[3]/n2/c.png", "lot3/n1/d.png"):
        write(tmp_path / name, png(1))
    assert names_below(tmp_path, "lot[3]/n?/*.png") == ["lot[3]/n1/a.png", "lot[3]/n2/c.png"]
    assert names_below(tmp_path, "lot[3]/n[12]/*.png") == ["lot[3]/n[12]/b.png"]
    assert names_below(tmp_path, "lot[2-4]/n[12]/*.png") == ["lot3/n1/d.png"]


def names_below(folder: Path, pattern: str) -> list[str]:
    return sorted(uri.removeprefix(f"{folder}/") for uri in listing(f"{folder}/{pattern}"))


def test_a_relative_uri_of_a_manifest_keeps_the_names_of_its_folders(bucket: faulty_s3.FaultyS3) -> None:
    for name in ("d//double//a.png", "d/double/a.png", "d//b.png", "d//double//.c.png", "e/d.png"):
        bucket.put(name, png(1))
    relative = ["a.png", "../b.png", "./.c.png", "../../../e/d.png", "../../../../../e/d.png"]
    manifest = bucket.put("d//double//m.csv", "\n".join(["image_uri", *relative]).encode())
    root = "s3://inputs"
    names = ["d//double//a.png", "d//double/b.png", "d//double//.c.png", "d/e/d.png", "e/d.png"]
    assert list(listing(manifest, options=bucket.options)) == [f"{root}/{name}" for name in names]


@pytest.mark.parametrize("scheme", ["s3", "S3", "s3a"])
def test_a_manifest_names_only_schemes_of_the_inputs_and_allowed_ones(
    tmp_path: Path, bucket: faulty_s3.FaultyS3, scheme: str
) -> None:
    uri, path = bucket.put("a.png", png(1)), write(tmp_path / "a.png", png(1))
    here = write(tmp_path / "m.csv", f"image_uri\n{path}\n{uri}\n".encode())
    there = bucket.put("m.parquet", parquet_of({"image_uri": [uri, f"file://{path}"]}))
    message = wrong_use(here, options=bucket.options)
    assert f"names {uri}, whose scheme s3 is that of no input" in message
    assert message.endswith("pass --allow_schemes s3")
    assert wrong_use(there, options=bucket.options).endswith("pass --allow_schemes file")
    both = [str(path), uri]
    assert sorted(listing(here, options=bucket.options, selection=Selection(allow_schemes=[scheme]))) == both
    assert sorted(listing(there, options=bucket.options, selection=Selection(allow_schemes=["file"]))) == both
    more = bucket.put("b.png", png(1))
    assert sorted(listing(here, more, options=bucket.options)) == [*both, more]


def test_symbolic_links_are_followed_once_and_dangling_ones_accounted_for(tmp_path: Path) -> None:
    write(tmp_path / "real" / "a.png", png(1))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "gone.png").symlink_to(tmp_path / "nothing")
    found = listing(tmp_path / "in")
    gone = str(tmp_path / "in" / "gone.png")
    assert list(found) == [gone, str(tmp_path / "in" / "linked" / "a.png")]
    assert failure(gone, found[gone]).code == ErrorCode.NOT_FOUND


def test_files_whose_names_are_not_utf8_are_listed_and_read(tmp_path: Path) -> None:
    write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")), png(1))
    write(tmp_path / "x.tar", tar_of({"\udcff.png": png(2)}, format=tarfile.GNU_FORMAT))
    expected = {f"{tmp_path}/\\udcff.png": png(1), f"{tmp_path}/x.tar!/\\udcff.png": png(2)}
    assert contents(listing(tmp_path)) == expected
    same = write(tmp_path / "so it is \\udcff named.png", png(3))
    assert contents({str(same): listing(same)[str(same)]}) == {str(same): png(3)}


@pytest.mark.parametrize(
    ("uri", "canonical"),
    [
        ("gcs://plant/a.png", "gs://plant/a.png"),
        ("az://images/a.png", "abfs://images/a.png"),
        ("abfss://images@plant.dfs.core.windows.net/a.png", "abfs://images@plant.dfs.core.windows.net/a.png"),
        ("s3n://plant/a.tar!/b.png", "s3://plant/a.tar!/b.png"),
        ("file:///plant/../a.png", "/a.png"),
    ],
)
def test_an_object_has_one_uri_whatever_its_stores_scheme_is_called(uri: str, canonical: str) -> None:
    assert canonical_uri(uri) == canonical


def test_every_image_has_the_time_of_its_last_change_if_anything_says_it(tmp_path: Path) -> None:
    file = write(tmp_path / "a.png", png(1))
    os.utime(file, (1_700_000_000, 1_700_000_000.25))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, mtime in (("dated.png", 1_600_000_000), ("undated.png", 0)):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(png(2)), mtime
            tar.addfile(member, io.BytesIO(png(2)))
    write(tmp_path / "b.tar", packed.getvalue())
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        for name, parts in (("dated.png", (2020, 2, 29, 12, 30, 2)), ("undated.png", (1980, 1, 1, 0, 0, 0))):
            archive.writestr(zipfile.ZipInfo(name, parts), png(3))
    write(tmp_path / "c.zip", zipped.getvalue())
    rows = write(tmp_path / "d.parquet", parquet_of(HUGGING_FACE))
    os.utime(rows, (1_500_000_000, 1_500_000_000))
    (tmp_path / "m.csv").write_text("image_uri,image_version\na.png,known\n")

    def times(uri: Path) -> dict[str, datetime | None]:
        table = list_table([str(uri)], {})
        uris = (name.removeprefix(f"{tmp_path}/") for name in table["image_uri"].to_pylist())
        return dict(zip(uris, table["image_modified_at"].to_pylist(), strict=True))

    found = times(tmp_path)
    assert found["a.png"] == datetime(2023, 11, 14, 22, 13, 20, 250_000, tzinfo=UTC)
    assert found["b.tar!/dated.png"] == datetime.fromtimestamp(1_600_000_000, UTC)
    assert found["c.zip!/dated.png"] == datetime(2020, 2, 29, 12, 30, 2, tzinfo=UTC)
    assert found["d.parquet#0"] == datetime.fromtimestamp(1_500_000_000, UTC)
    assert found["b.tar!/undated.png"] is found["c.zip!/undated.png"] is None
    assert times(tmp_path / "m.csv") == {"a.png": None}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_manifest_names_images_of_every_kind(tmp_path: Path, kind: str) -> None:
    single = write(tmp_path / "in" / "a.png", png(1))
    bare = write(tmp_path / "in" / "no_suffix", png(2))
    write(tmp_path / "in" / "x.zip", zip_of({"m.png": png(3), "n.png": png(4)}))
    write(tmp_path / "in" / "r.parquet", parquet_of(HUGGING_FACE))
    whole = write(tmp_path / "in" / "whole.tar", tar_of({"w.png": png(5)}))
    uris = ["../in/a.png", str(bare), "x.zip!/n.png", "r.parquet#3", "whole.tar", "gone.png", "x.zip!/z.png"]
    manifest = tmp_path / "in" / f"m.{kind}"
    if kind == "csv":
        manifest.write_text("note,image_uri\n" + "".join(f'"1,5",{uri}\n' for uri in uris))
    else:
        pq.write_table(pa.table({"image_uri": uris, "image": [b""] * len(uris)}), manifest)
    found = listing(manifest)
    gone, absent = f"{tmp_path}/in/gone.png", f"{tmp_path}/in/x.zip!/z.png"
    assert failure(gone, found.pop(gone)).code == ErrorCode.NOT_FOUND
    assert failure(absent, found.pop(absent)).code == ErrorCode.NOT_FOUND
    assert contents(found) == {
        str(single): png(1),
        str(bare): png(2),
        f"{tmp_path}/in/x.zip!/n.png": png(4),
        f"{tmp_path}/in/r.parquet#3": ROWS[3],
        f"{whole}!/w.png": png(5),
    }


def test_manifest_versions_save_the_look_up(bucket: faulty_s3.FaultyS3) -> None:
    bucket.put("in/a.png", png(1))
    etag = bucket.fs.info("inputs/in/a.png")["ETag"]
    rows = [f's3://inputs/in/a.png,"{etag.replace(chr(34), chr(34) * 2)}",7', "b.png,old,8"]
    manifest = bucket.put("in/m.csv", "\n".join(["image_uri,etag,size", *rows]).encode())
    table = pa.Table.from_batches(list_images([manifest], bucket.options))
    undated = {"image_modified_at": None}
    assert table.to_pylist() == [
        {"image_uri": "s3://inputs/in/a.png", "image_version": etag.strip('"'), "size_bytes": 7} | undated,
        {"image_uri": "s3://inputs/in/b.png", "image_version": "old", "size_bytes": 8} | undated,
    ]
    assert not any(".png" in request for request in bucket.requests)


def test_scored_images_can_be_named_again_by_uri_and_version(tmp_path: Path) -> None:
    write(tmp_path / "x.tar", tar_of(ARCHIVE))
    write(tmp_path / "r.parquet", parquet_of(HUGGING_FACE))
    found = listing(tmp_path)
    columns = {"image_uri": list(found), "image_version": list(found.values())}
    pq.write_table(pa.table(columns), tmp_path / "again.parquet")
    assert listing(tmp_path / "again.parquet") == found


@pytest.mark.parametrize(
    "columns", [{"bytes": ROWS}, {"photo": ROWS, "n": [1] * 5}, {"x": ROWS, "data": ROWS}]
)
def test_parquet_image_column_is_found(tmp_path: Path, columns: dict[str, Any]) -> None:
    file = write(tmp_path / "r.parquet", parquet_of(columns))
    assert list(contents(listing(file)).values()) == ROWS


def test_parquet_row_group_is_fetched_once_for_all_its_rows(bucket: faulty_s3.FaultyS3) -> None:
    uri = bucket.put("r.parquet", parquet_of({"image": [png(n) for n in range(16)]}, row_group_size=8))
    found = listing(uri, options=bucket.options)
    bucket.requests.clear()
    reader = ImageReader(bucket.options)
    with ThreadPoolExecutor(16) as pool:
        images = list(pool.map(lambda image: reader.read(*image), found.items()))
    assert images == [png(n) for n in range(16)]
    # The footer is parsed once, and each of the two row groups fetched once.
    assert len([request for request in bucket.requests if request.startswith("GET")]) <= 4


def test_null_or_empty_images_are_empty(tmp_path: Path) -> None:
    write(tmp_path / "a.png", b"")
    write(tmp_path / "r.parquet", parquet_of({"image": pa.array([None, b""], pa.binary())}))
    write(tmp_path / "x.tar", tar_of({"e.png": b""}))
    write(tmp_path / "x.zip", zip_of({"e.png": b""}))
    found = listing(tmp_path)
    assert len(found) == 5
    assert {failure(*image).code for image in found.items()} == {ErrorCode.EMPTY}


def test_rewritten_local_files_are_changed_and_removed_ones_not_found(tmp_path: Path) -> None:
    tree = {"a.png": png(1), "x.tar": tar_of(ARCHIVE), "x.zip": zip_of(ARCHIVE)}
    tree["r.parquet"] = parquet_of(HUGGING_FACE)
    for name, data in tree.items():
        write(tmp_path / name, data)
    found = listing(tmp_path)
    for name, data in tree.items():
        # Of the same size: only the time tells.
        write(tmp_path / name, data)
        os.utime(tmp_path / name, ns=(1, 1))
    assert {failure(*image).code for image in found.items()} == {ErrorCode.CHANGED}
    for name in tree:
        (tmp_path / name).unlink()
    assert {failure(*image).code for image in found.items()} == {ErrorCode.NOT_FOUND}


def test_replaced_s3_objects_are_changed_and_removed_ones_not_found(bucket: faulty_s3.FaultyS3) -> None:
    old = {"a.png": png(1), "x.tar": tar_of({"m.png": png(2)}), "x.zip": zip_of({"m.png": png(3)})}
    new = {"a.png": png(4), "x.tar": tar_of({"m.png": png(5)}), "x.zip": zip_of({"m.png": png(6)})}
    old["r.parquet"], new["r.parquet"] = parquet_of({"image": [png(7)]}), parquet_of({"image": [png(8)]})
    for name, data in old.items():
        bucket.put(name, data)
    found = listing("s3://inputs", options=bucket.options)
    assert len(found) == 4
    for name, data in new.items():
        bucket.put(name, data)
    failures = [failure(*image, options=bucket.options) for image in found.items()]
    assert {error.code for error in failures} == {ErrorCode.CHANGED}
    bucket.empty()
    failures = [failure(*image, options=bucket.options) for image in found.items()]
    assert {error.code for error in failures} == {ErrorCode.NOT_FOUND}


def test_an_s3_object_that_listings_name_otherwise_for_good_is_read(
    bucket: faulty_s3.FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = bucket.put("a.png", png(1))
    bucket.put("a.png.png", png(2))  # Its name begins with that of the other.
    known = bucket.fs.info(uri)["ETag"].strip('"').encode()
    bucket.rewrite = lambda path, data: data.replace(known, b"of an index") if "list-type" in path else data
    found = listing("s3://inputs", options=bucket.options)
    assert found[uri] == "of an index"
    # A listing may lag behind a change.
    assert failure(uri, found[uri], options=bucket.options).code == ErrorCode.CHANGED
    monkeypatch.setattr(objects, "LONGEST_LAG_S", -60.0)
    assert contents(found, bucket.options)[uri] == png(1)
    # Another version than the one in question.
    assert failure(uri, "listed long ago", options=bucket.options).code == ErrorCode.CHANGED
    bucket.weather = lambda method, path: "denied" if "list-type" in path else None
    assert failure(uri, found[uri], options=bucket.options).code == ErrorCode.CHANGED


def cut_inside_data() -> bytes:
    return tar_of({"a.png": png(1), "b.png": bytes(5000)})[:3000]


def cut_inside_header() -> bytes:
    return tar_of({"a.png": png(1), "b.png": png(2)})[:1124]


def bad_header_in_the_middle() -> bytes:
    data = bytearray(tar_of({"a.png": png(1), "b.png": png(2), "c.png": png(3)}))
    data[1024:1536] = os.urandom(512)
    return bytes(data)


def negative_size() -> bytes:
    data = bytearray(tar_of({"a.png": png(1), "b.png": png(2)}))
    header = data[1024:1536]
    header[124:136] = b"\xff" * 10 + struct.pack(">h", -1024)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[1024:1536] = header
    return bytes(data)


def zip_without_directory() -> bytes:
    return zip_of(ARCHIVE)[:-60]


def zip_with_bad_directory() -> bytes:
    data = zip_of({"a.png": png(1)})
    return data[: data.index(b"PK\x01\x02")] + b"PK\x01\x09" + data[data.index(b"PK\x01\x02") + 4 :]


@pytest.mark.parametrize(
    ("suffix", "damaged"),
    [
        ("tar", cut_inside_data),
        ("tar", cut_inside_header),
        ("tar", bad_header_in_the_middle),
        ("tar", negative_size),
        ("tar", lambda: b"no archive at all"),
        ("tar", lambda: b""),
        ("zip", zip_without_directory),
        ("zip", zip_with_bad_directory),
        ("zip", lambda: b""),
        ("parquet", lambda: parquet_of(HUGGING_FACE)[:-20]),
        ("parquet", lambda: b"PAR1"),
    ],
)
def test_damaged_archive_is_one_row_and_its_neighbours_go_on(
    tmp_path: Path, suffix: str, damaged: Any
) -> None:
    archive = write(tmp_path / f"m.{suffix}", damaged())
    neighbours = {str(write(tmp_path / name, png(1))): png(1) for name in ("a.png", "z.png")}
    found = listing(tmp_path)
    assert listing(archive) == {str(archive): found[str(archive)]}
    assert failure(str(archive), found.pop(str(archive))).code == ErrorCode.CORRUPT
    assert contents(found) == neighbours


def test_repaired_archive_is_listed_anew(tmp_path: Path) -> None:
    archive = write(tmp_path / "m.tar", cut_inside_header())
    ((uri, version),) = listing(archive).items()
    write(archive, tar_of({"a.png": png(1)}))
    assert failure(uri, version).code == ErrorCode.CHANGED
    assert list(listing(archive)) == [f"{archive}!/a.png"]


def test_of_a_repeated_member_the_last_counts(tmp_path: Path) -> None:
    tar, packed = tar_of({"a.png": png(1)}), zip_of({"a.png": png(1)})
    tar = tar[: tar.rindex(png(1)[-12:]) // 512 * 512 + 512] + tar_of({"a.png": png(2)})
    write(tmp_path / "x.tar", tar)
    buffer = io.BytesIO(packed)
    with zipfile.ZipFile(buffer, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a.png", png(2))
    write(tmp_path / "x.zip", buffer.getvalue())
    assert list(contents(listing(tmp_path)).values()) == [png(2), png(2)]


def test_links_and_folders_in_a_tar_are_skipped(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for kind, name in (
            (tarfile.SYMTYPE, "s.png"),
            (tarfile.LNKTYPE, "l.png"),
            (tarfile.DIRTYPE, "d.png"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        member = tarfile.TarInfo("a.png")
        member.size = len(png(1))
        archive.addfile(member, io.BytesIO(png(1)))
    assert list(listing(tmp_path / "x.tar")) == [f"{tmp_path}/x.tar!/a.png"]


def test_members_above_the_limit_are_too_large_before_they_are_unpacked(tmp_path: Path) -> None:
    bomb = bytes(1 << 20)
    for name, data in {
        "a.png": bomb,
        "x.tar": tar_of({"b.png": bomb}),
        "x.zip": zip_of({"b.png": bomb}),
    }.items():
        write(tmp_path / name, data)
    found = listing(tmp_path)
    assert {failure(*image, max_bytes=1000).code for image in found.items()} == {ErrorCode.TOO_LARGE}


def test_s3_objects_above_the_limit_are_too_large(bucket: faulty_s3.FaultyS3) -> None:
    uri = bucket.put("a.png", bytes(2000))
    found = listing(uri, options=bucket.options)
    assert failure(uri, found[uri], options=bucket.options, max_bytes=1000).code == ErrorCode.TOO_LARGE


def test_zip_headers_that_lie_about_the_size_are_corrupt(tmp_path: Path) -> None:
    data = zip_of({"b.png": bytes(1 << 20)})
    lying = data.replace(struct.pack("<I", 1 << 20), struct.pack("<I", 100))
    assert lying != data
    ((uri, version),) = listing(write(tmp_path / "x.zip", lying)).items()
    assert failure(uri, version, max_bytes=1000).code == ErrorCode.CORRUPT


def test_damaged_zip_members_are_corrupt_and_their_neighbours_go_on(tmp_path: Path) -> None:
    data = bytearray(zip_of({"a.png": png(1), "b.png": png(2)}, zipfile.ZIP_STORED))
    data[data.index(png(1)) + 20] ^= 0xFF
    (first, second) = listing(write(tmp_path / "x.zip", bytes(data))).items()
    assert failure(*first).code == ErrorCode.CORRUPT
    assert contents(dict([second])) == {second[0]: png(2)}


def test_encrypted_or_unusually_packed_zip_members_are_unsupported(tmp_path: Path) -> None:
    encrypted = bytearray(zip_of({"a.png": png(1)}))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        encrypted[encrypted.index(signature) + offset] |= 1
    write(tmp_path / "e.zip", bytes(encrypted))
    write(tmp_path / "l.zip", zip_of({"a.png": png(1)}, zipfile.ZIP_LZMA))
    found = listing(tmp_path)
    assert len(found) == 2
    assert {failure(*image).code for image in found.items()} == {ErrorCode.UNSUPPORTED_FORMAT}


def test_missing_parquet_rows_are_not_found(tmp_path: Path) -> None:
    found = listing(write(tmp_path / "r.parquet", parquet_of(HUGGING_FACE)))
    version = next(iter(found.values()))
    assert failure(f"{tmp_path}/r.parquet#5", version).code == ErrorCode.NOT_FOUND


@pytest.mark.parametrize("fault", ["slow down", "too many", "broken", "cut", "reset"])
def test_transient_failures_are_tried_again(bucket: faulty_s3.FaultyS3, fault: str) -> None:
    uri = bucket.put("a.png", png(1))
    found = listing(uri, options=bucket.options)
    bucket.requests.clear()
    bucket.faults.extend([fault] * 2)
    assert contents(found, bucket.options) == {uri: png(1)}
    assert len(bucket.requests) == 3


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("slow down", ErrorCode.THROTTLED),
        ("too many", ErrorCode.THROTTLED),
        ("broken", ErrorCode.SERVER_ERROR),
        ("cut", ErrorCode.CONNECTION),
        ("reset", ErrorCode.CONNECTION),
    ],
)
def test_transient_failures_past_the_deadline_are_transient_errors(
    bucket: faulty_s3.FaultyS3, fault: str, code: ErrorCode
) -> None:
    uri = bucket.put("a.png", png(1))
    version = listing(uri, options=bucket.options)[uri]
    bucket.faults.extend([fault] * 1000)
    error = failure(uri, version, deadline_s=0.2, options=bucket.options)
    assert error.code == code
    assert error.is_transient


def test_listing_goes_on_after_transient_failures(bucket: faulty_s3.FaultyS3) -> None:
    uri = bucket.put("d/x.tar", tar_of({"m.png": png(1)}))
    bucket.faults.extend(["slow down", "broken", "reset"])
    assert list(listing("s3://inputs/d", options=bucket.options)) == [f"{uri}!/m.png"]


def test_archive_that_failed_for_a_while_is_a_transient_error(
    bucket: faulty_s3.FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = bucket.put("d/x.tar", tar_of({"m.png": png(1)}))
    monkeypatch.setattr("csflow.inputs.listing.DEADLINE_S", 0.0)
    real = objects.ObjectStore.fetch

    def failing_fetch(self: objects.ObjectStore, *args: Any) -> bytes:
        bucket.faults.extend(["broken"] * 2)  # for each of the two clients
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(objects.ObjectStore, "fetch", failing_fetch)
        found = listing("s3://inputs/d", options=bucket.options)
    assert list(found) == [uri]
    bucket.faults.clear()
    error = failure(uri, found[uri], options=bucket.options)
    assert (error.code, error.is_transient) == (ErrorCode.CHANGED, True)


def test_refused_object_is_not_tried_again(bucket: faulty_s3.FaultyS3) -> None:
    uri = bucket.put("a.png", png(1))
    version = listing(uri, options=bucket.options)[uri]
    bucket.requests.clear()
    bucket.faults.extend(["denied"] * 10)
    assert failure(uri, version, options=bucket.options).code == ErrorCode.PERMISSION_DENIED
    assert len(bucket.requests) == 2  # s3fs tells why the native client was refused


def test_usual_objects_of_s3_are_read_by_the_native_client(bucket: faulty_s3.FaultyS3) -> None:
    uri = bucket.put("ä b/#1?.png", png(1))
    found = listing("s3://inputs", options=bucket.options)
    bucket.user_agents.clear()
    assert contents(found, bucket.options) == {uri: png(1)}
    assert [agent.partition("/")[0] for agent in bucket.user_agents] == ["object_store"]
    member = bucket.put("x.tar", tar_of({"m.png": png(2)}))
    found = listing(member, options=bucket.options)
    assert contents(found, bucket.options) == {f"{member}!/m.png": png(2)}
    assert bucket.user_agents[-1].startswith("object_store/")


@pytest.mark.parametrize("name", ["inputs/", "inputs//", "in puts/a.png", "in#puts/a.png", "../a.png"])
def test_names_that_the_native_client_would_change_or_choke_on_are_not_found(
    bucket: faulty_s3.FaultyS3, name: str
) -> None:
    bucket.put("a.png", png(1))
    assert failure(f"s3://{name}", "unknown", options=bucket.options).code == ErrorCode.NOT_FOUND
    failure("s3://inputs/a.png", "no\nversion", options=bucket.options, deadline_s=0.1)
    assert not any(agent.startswith("object_store/") for agent in bucket.user_agents)


def test_secrets_that_no_header_can_hold_do_not_reach_the_native_client(bucket: faulty_s3.FaultyS3) -> None:
    uri = bucket.put("a.png", png(1))
    version = listing(uri, options=bucket.options)[uri]
    bucket.user_agents.clear()
    failure(uri, version, options=bucket.options | {"token": "t\n"}, deadline_s=0.1)
    assert not any(agent.startswith("object_store/") for agent in bucket.user_agents)


def test_environment_does_not_lead_the_native_client_elsewhere(
    bucket: faulty_s3.FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = bucket.put("a.png", png(1))
    found = listing(uri, options=bucket.options)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    for name in ("SKIP_SIGNATURE", "VIRTUAL_HOSTED_STYLE_REQUEST", "REQUEST_PAYER", "S3_EXPRESS"):
        monkeypatch.setenv(f"AWS_{name}", "true")
    assert contents(found, bucket.options) == {uri: png(1)}
    assert bucket.user_agents[-1].startswith("object_store/")
    assert "Credential=testing/" in bucket.authorizations[-1]


def test_unreadable_certificates_are_no_fault_of_the_image(
    bucket: faulty_s3.FaultyS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uri = bucket.put("a.png", png(1))
    version = listing(uri, options=bucket.options)[uri]
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "none.pem"))
    options = bucket.options | {"endpoint_url": bucket.options["endpoint_url"].replace("http:", "https:")}
    assert failure(uri, version, options=options, deadline_s=0.1).is_transient


@pytest.mark.parametrize("key", ["a//b.png", "/a.png", "a/./b.png", "a/../b.png", "a/b.png/"])
def test_keys_that_the_native_client_cannot_name_are_read_all_the_same(
    bucket: faulty_s3.FaultyS3, key: str
) -> None:
    for near_by in ("a/b.png", "b.png", "a.png"):
        bucket.put(near_by, png(2))
    bucket.behind.put_object(Bucket="inputs", Key=key, Body=png(1))
    uri = f"s3://inputs/{key}"
    version = bucket.behind.head_object(Bucket="inputs", Key=key)["ETag"].strip('"')
    assert contents({uri: version}, bucket.options) == {uri: png(1)}


def test_native_client_is_left_alone_while_it_fails(
    bucket: faulty_s3.FaultyS3, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uri = bucket.put("a.png", png(1))
    version = listing(uri, options=bucket.options)[uri]
    reader = ImageReader(bucket.options)
    monkeypatch.setattr(native, "LONGEST_PAUSE_S", 0.0)
    for _ in range(native.FAILURES_TO_REST):
        bucket.faults.extend(["broken", "none"])
        assert reader.read(uri, version) == png(1)
    assert "s3fs alone" in caplog.text
    bucket.requests.clear()
    bucket.user_agents.clear()
    assert reader.read(uri, version) == png(1)
    assert len(bucket.requests) == 1
    assert not bucket.user_agents[0].startswith("object_store/")


def test_native_client_has_the_credentials_of_a_profile_and_follows_when_they_change(
    bucket: faulty_s3.FaultyS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uri = bucket.put("a.png", png(1))
    version = listing(uri, options=bucket.options)[uri]
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    source = f"cat {tmp_path}/current.json"
    config = f"[profile night]\nregion = eu-central-1\ncredential_process = {source}\n"
    monkeypatch.setenv("AWS_CONFIG_FILE", str(write(tmp_path / "config", config.encode())))
    monkeypatch.setattr(native_s3, "CREDENTIALS_ARE_KEPT", timedelta(0))
    reader = ImageReader({"profile": "night", "endpoint_url": bucket.options["endpoint_url"]})
    for key in ("AKIA1", "AKIA2"):
        # Within a quarter of an hour of their end botocore renews credentials.
        expiration = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()
        credentials = {"Version": 1, "AccessKeyId": key, "SecretAccessKey": "x", "Expiration": expiration}
        write(tmp_path / "current.json", json.dumps(credentials).encode())
        assert reader.read(uri, version) == png(1)
        assert bucket.user_agents[-1].startswith("object_store/")
        assert f"Credential={key}/" in bucket.authorizations[-1]
        assert "/eu-central-1/s3/" in bucket.authorizations[-1]


@pytest.mark.parametrize(
    "options",
    [
        {"requester_pays": True},
        {"client_kwargs": {"verify": False}},
        {"config_kwargs": {"s3": {"addressing_style": "path"}}},
    ],
)
def test_options_unknown_to_the_native_client_go_to_s3fs(
    bucket: faulty_s3.FaultyS3, options: dict[str, Any]
) -> None:
    uri = bucket.put("a.png", png(1))
    found = listing(uri, options=bucket.options)
    bucket.user_agents.clear()
    assert contents(found, bucket.options | options) == {uri: png(1)}
    assert len(bucket.user_agents) == 1
    assert not bucket.user_agents[0].startswith("object_store/")


def test_unexpected_exceptions_are_internal_errors_without_their_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> bytes:
        raise KeyError("secret")

    monkeypatch.setattr(objects, "_read_local", broken)
    error = failure(str(write(tmp_path / "a.png", png(1))), "1")
    assert error.code == ErrorCode.INTERNAL
    assert "KeyError" in error.message
    assert "secret" not in error.message


def test_threads_share_a_reader(tmp_path: Path, bucket: faulty_s3.FaultyS3) -> None:
    for name, data in archive_tree().items():
        bucket.put(f"t/{name}", data)
    found = listing("s3://inputs/t", options=bucket.options)
    reader = ImageReader(bucket.options)
    start = threading.Barrier(16)

    def read_all(_: int) -> dict[str, bytes]:
        start.wait()
        return {uri: reader.read(uri, version) for uri, version in found.items()}

    with ThreadPoolExecutor(16) as pool:
        for images in pool.map(read_all, range(16)):
            assert images == expected_images("s3://inputs/t")


def test_missing_locations_are_wrong_use(tmp_path: Path, bucket: faulty_s3.FaultyS3) -> None:
    assert "does not exist" in wrong_use(tmp_path / "nothing")
    assert "does not exist" in wrong_use("s3://inputs/nothing", options=bucket.options)
    assert "does not exist" in wrong_use("s3://inputs/nothing/", options=bucket.options)
    assert "bucket absent does not exist" in wrong_use("s3://absent/x", options=bucket.options)
    assert "bucket absent does not exist" in wrong_use("s3://absent", options=bucket.options)
    assert "no such bucket or key name" in wrong_use("s3://", options=bucket.options)
    assert "nothing matches" in wrong_use(tmp_path / "*.png")
    assert "nothing matches" in wrong_use("s3://absent/*.png", options=bucket.options)


def test_every_input_is_checked_before_the_first_image_is_listed(tmp_path: Path) -> None:
    write(tmp_path / "a.png", png(1))
    with pytest.raises(WrongUse, match="nothing"):
        next(list_images([str(tmp_path), str(tmp_path / "nothing")], {}))


def test_inputs_without_images_are_wrong_use(tmp_path: Path, bucket: faulty_s3.FaultyS3) -> None:
    write(tmp_path / "in" / ".hidden.png", png(1))
    note = write(tmp_path / "in" / "note.txt", b"x")
    assert ".jpeg" in wrong_use(tmp_path / "in")
    assert "is not named like an input" in wrong_use(note)
    assert "holds no images" in wrong_use(write(tmp_path / "x.tar", tar_of({"a.txt": b"x"})))
    bucket.put("notes/a.txt", b"x")
    assert "holds no images" in wrong_use("s3://inputs/notes", options=bucket.options)


def test_tables_that_are_no_manifests_are_wrong_use(tmp_path: Path) -> None:
    assert "no column image_uri" in wrong_use(
        write(tmp_path / "semicolons.csv", b"image_uri;size\na.png;1\n")
    )
    assert "manifest" in wrong_use(write(tmp_path / "empty.csv", b""))
    assert "holds no images" in wrong_use(write(tmp_path / "header.csv", b"image_uri\n"))
    assert "manifest" in wrong_use(write(tmp_path / "size.csv", b"image_uri,size\na.png,big\n"))
    assert "row 2" in wrong_use(write(tmp_path / "gap.csv", b"image_uri,size\na.png,1\n,2\n"))
    assert "names no images" in wrong_use(write(tmp_path / "t.parquet", parquet_of({"x": [1]})))


def test_unknown_schemes_are_wrong_use() -> None:
    assert "nonsense" in wrong_use("nonsense://bucket/a.png")
    assert "paramiko" in wrong_use("sftp://host/a.png")


def test_refused_and_missing_credentials_are_wrong_use(
    bucket: faulty_s3.FaultyS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    uri = bucket.put("a.png", png(1))
    bucket.faults.extend(["denied"] * 10)
    message = wrong_use(uri, options=bucket.options)
    assert "access denied" in message
    assert "s3:ListBucket" in message

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    options = {"endpoint_url": bucket.options["endpoint_url"]}
    assert "AWS_ACCESS_KEY_ID" in wrong_use(uri, options=options)
    manifest = write(tmp_path / "m.csv", f"image_uri\n{uri}\n".encode())
    on_s3 = Selection(allow_schemes=["s3"])
    assert "AWS_ACCESS_KEY_ID" in wrong_use(manifest, options=options, selection=on_s3)
    assert failure(uri, "1", options=options).code == ErrorCode.PERMISSION_DENIED


def test_unreachable_store_is_a_connection_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csflow.inputs.listing.DEADLINE_S", 0.0)
    options = {"key": "a", "secret": "b", "endpoint_url": "http://127.0.0.1:9"}
    with pytest.raises(ConnectionError, match="AWS_ENDPOINT_URL"):
        listing("s3://inputs/a.png", options=options)


def test_a_row_or_member_that_a_manifest_names_and_a_container_lacks_is_not_found(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", parquet_of({"image": [png(1)] * 3}))
    write(tmp_path / "x.zip", zip_of({"a.png": png(2)}))
    named = [f"{tmp_path}/x.parquet#2", f"{tmp_path}/x.parquet#3", f"{tmp_path}/x.zip!/b.png"]
    write(tmp_path / "m.csv", "\n".join(["image_uri", *named]).encode())
    found = listing(tmp_path / "m.csv")
    assert list(found) == named
    assert list(contents({named[0]: found[named[0]]}).values()) == [png(1)]
    for uri in named[1:]:
        assert failure(uri, found[uri]).code == ErrorCode.NOT_FOUND


def test_an_archive_without_members_holds_no_images(tmp_path: Path) -> None:
    write(tmp_path / "d" / "empty.zip", zip_of({}))
    write(tmp_path / "d" / "a.png", png(1))
    assert list(listing(tmp_path / "d")) == [f"{tmp_path}/d/a.png"]


def test_an_empty_input_is_refused() -> None:
    with pytest.raises(WrongUse, match="--input: String should have at least 1 character"):
        parse(ScoreConfig, None, ["--model", "m", "--input", "", "--output", "o"])
