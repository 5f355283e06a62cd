"""Walks folders, prefixes and glob patterns of any store: every file below, with its version, in order."""

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from csflow.errors import ErrorCode, ImageError
from csflow.inputs.http_objects import is_http
from csflow.inputs.objects import UNKNOWN_VERSION, ObjectStore, StoredObject, described, local_version
from csflow.inputs.uris import as_text, is_s3, local_path, path_in, root_of, split_s3, uri_of

LISTINGS_AT_ONCE = 16
PATTERN_MARKS = "*?["

Description = dict[str, Any]
"""Description of files by fsspec or S3: of one file, or of a page of a listing."""
Wanted = Callable[[str], bool]


def is_folder(store: ObjectStore, uri: str) -> bool:
    """Whether a folder exists; in an object store, whether any object is below that prefix.

    Raises:
        ImageError: NOT_FOUND if the bucket does not exist, unless the URI is a pattern, too; or as
            `ObjectStore.fetch`.
    """
    path = local_path(uri)
    if path is not None:
        return Path(path).is_dir()
    if is_s3(uri):
        bucket, prefix = _split_prefix(uri)
        try:
            page = store.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)
        except ImageError as error:
            if error.code == ErrorCode.NOT_FOUND and is_pattern(uri):
                return False
            raise
        return bool(page["KeyCount"]) or not prefix
    fs = store.remote(uri)
    return store.retried(lambda _: bool(fs.isdir(path_in(fs, uri))))


def walk(store: ObjectStore, pool: ThreadPoolExecutor, uri: str, is_wanted: Wanted) -> Iterator[StoredObject]:
    """Files below a folder whose names are wanted, without hidden files and folders.

    Their order depends only on the names and, on S3, on how names fall into pages of a listing.

    Raises:
        ImageError, OSError: a part of the folder cannot be listed.
    """
    path = local_path(uri)
    if path is not None:
        return _walk_local(path, is_wanted, frozenset())
    return _walk_s3(store, pool, uri, is_wanted) if is_s3(uri) else _walk_other(store, uri, is_wanted)


def glob(store: ObjectStore, pattern: str) -> tuple[list[StoredObject], list[str]]:
    """Files and folders that match a pattern, each sorted; `**` matches files only.

    Hidden ones are left out, unless the pattern itself has a hidden name.

    Raises:
        ImageError: as `ObjectStore.fetch`.
    """
    fixed = pattern[: min(pattern.find(mark) for mark in PATTERN_MARKS if mark in pattern)]
    root = fixed[: fixed.rfind("/") + 1]
    shows_hidden = is_hidden(pattern[len(root) :])
    files: list[StoredObject] = []
    folders: list[str] = []
    for uri, info in sorted(_matches(store, pattern).items()):
        is_directory = info["type"] == "directory"
        if is_hidden(uri[len(root) :] + "/" * is_directory) and not shows_hidden:
            continue
        if is_directory:
            folders.append(uri)
        else:
            files.append(_examine(uri) if local_path(uri) else _described(store, uri, info))
    return files, [] if "**" in pattern else folders


def is_pattern(uri: str) -> bool:
    return any(mark in uri for mark in PATTERN_MARKS)


def escaped(store: ObjectStore, pattern: str) -> str:
    """The pattern, with marks escaped in the names of its leading folders that exist as they are written.

    Raises:
        ImageError: as `is_folder`.
    """
    parts = pattern.split("/")
    literal = 0
    while literal < len(parts) - 1:
        if is_pattern(parts[literal]) and not is_folder(store, "/".join(parts[: literal + 1])):
            break
        literal += 1
    return "/".join([re.sub(r"[*?[]", r"[\g<0>]", part) for part in parts[:literal]] + parts[literal:])


def is_hidden(name: str, folder_marks: tuple[str, ...] = (".", "_")) -> bool:
    """Whether a relative name begins with a dot, or one of its folders (which end in /) with a mark.

    Jobs write folders like `_runs`, but cameras write photographs like `_DSC0001.JPG`.
    """
    *folders, file = name.split("/")
    if file.startswith("."):
        return True
    return any(folder.startswith(folder_marks) and folder not in (".", "..") for folder in folders)


def _walk_local(path: str, is_wanted: Wanted, above: frozenset[tuple[int, int]]) -> Iterator[StoredObject]:
    status = Path(path).stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return  # a symbolic link back to a folder that is being walked
    with os.scandir(path) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        is_directory = entry.is_dir()
        if is_hidden(entry.name + "/" * is_directory):
            continue
        if is_directory:
            yield from _walk_local(entry.path, is_wanted, above | {here})
        elif is_wanted(entry.name):
            yield _examine(entry.path)


def _examine(path: str) -> StoredObject:
    """Describes a link that leads nowhere, too, so that it is accounted for: reading it raises NOT_FOUND."""
    try:
        status = Path(path).stat()
    except FileNotFoundError:
        return StoredObject(as_text(path), UNKNOWN_VERSION, 0)
    return StoredObject(as_text(path), local_version(status), status.st_size, status.st_mtime)


def _walk_other(store: ObjectStore, uri: str, is_wanted: Wanted) -> Iterator[StoredObject]:
    fs = store.remote(uri)
    root = path_in(fs, uri).rstrip("/") + "/"
    found = store.retried(lambda _: fs.find(root, detail=True))
    for path, info in sorted(found.items()):
        if is_wanted(path) and not is_hidden(path.removeprefix(root)):
            yield _described(store, uri_of(fs, root_of(uri), path), info)


def _walk_s3(
    store: ObjectStore, pool: ThreadPoolExecutor, uri: str, is_wanted: Wanted
) -> Iterator[StoredObject]:
    """Lists several parts of the prefix at once, 1000 objects per request, and keeps none in memory."""
    bucket, root = _split_prefix(uri)
    pages, folders = _split_up(store, bucket, root)
    for page in chain(pages, _list_at_once(store, pool, bucket, folders)):
        for entry in page.get("Contents", ()):
            key = entry["Key"]
            if is_wanted(key) and not is_hidden(key[len(root) :]):
                etag, modified_at = entry["ETag"].strip('"'), entry["LastModified"].timestamp()
                yield StoredObject(f"s3://{bucket}/{key}", etag, entry["Size"], modified_at)


def _split_up(store: ObjectStore, bucket: str, root: str) -> tuple[list[Description], list[str]]:
    """Descends until there are enough folders to list at once; returns the files above them, and the folders.

    A folder with more entries than one page is not entered, but listed as a whole.
    """
    pages: list[Description] = []
    waiting = deque([root])
    whole: list[str] = []
    while waiting and len(waiting) + len(whole) < LISTINGS_AT_ONCE:
        folder = waiting.popleft()
        page = store.call_s3("list_objects_v2", Bucket=bucket, Prefix=folder, Delimiter="/")
        if page["IsTruncated"]:
            whole.append(folder)
            continue
        pages.append(page)
        below = (entry["Prefix"] for entry in page.get("CommonPrefixes", ()))
        waiting += (prefix for prefix in below if not is_hidden(prefix[len(root) :]))
    return pages, [*whole, *waiting]


def _list_at_once(
    store: ObjectStore, pool: ThreadPoolExecutor, bucket: str, folders: Iterable[str]
) -> Iterator[Description]:
    """Pages of the folders in turn: the next page of one folder is fetched while others' pages are used."""

    def fetch(folder: str, **after: str) -> Future[Description]:
        return pool.submit(store.call_s3, "list_objects_v2", Bucket=bucket, Prefix=folder, **after)

    unlisted = iter(folders)
    under_way = deque((folder, fetch(folder)) for folder in islice(unlisted, LISTINGS_AT_ONCE))
    while under_way:
        folder, future = under_way.popleft()
        page = future.result()
        if page["IsTruncated"]:
            under_way.append((folder, fetch(folder, ContinuationToken=page["NextContinuationToken"])))
        else:
            under_way += ((new, fetch(new)) for new in islice(unlisted, 1))
        yield page


def _matches(store: ObjectStore, pattern: str) -> dict[str, Description]:
    path = local_path(pattern)
    if path is not None:
        found = LocalFileSystem().glob(path, detail=True)
        return {uri: info | {"type": _local_type(uri)} for uri, info in found.items()}
    fs = store.remote(pattern)
    found = store.retried(lambda _: fs.glob(path_in(fs, pattern), detail=True))
    return {uri_of(fs, root_of(pattern), name): info for name, info in found.items()}


def _local_type(path: str) -> str:
    return "directory" if Path(path).is_dir() else "file"  # also through symbolic links


def _described(store: ObjectStore, uri: str, info: Description) -> StoredObject:
    """Describes a link of a web page that leads nowhere, too: reading it raises NOT_FOUND."""
    if not is_http(uri):
        return described(uri, info)
    try:
        return store.stat(uri)  # a page of links says nothing of their versions
    except ImageError:
        return StoredObject(uri, UNKNOWN_VERSION, 0)


def _split_prefix(uri: str) -> tuple[str, str]:
    bucket, prefix = split_s3(uri)
    return bucket, f"{prefix.rstrip('/')}/" if prefix else ""
