"""Walks folders, prefixes and glob patterns of any store: every file below, with its version, in order."""

import re
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from html import unescape
from itertools import chain
from pathlib import Path
from typing import Any

from csflow.errors import ErrorCode, ImageError
from csflow.inputs import local_folders
from csflow.inputs.http_objects import is_http
from csflow.inputs.local_folders import fixed_part
from csflow.inputs.names import Takes
from csflow.inputs.objects import CLOUDS, UNKNOWN_VERSION, ObjectStore, StoredObject, described
from csflow.inputs.unlisted import Unlisted
from csflow.inputs.uris import is_s3, local_path, path_in, root_of, scheme_of, split_s3, uri_of

LISTINGS_AT_ONCE = 16
PAGES_IN_A_ROW = 10
"""A folder that has had so many pages is divided."""
MOST_FOLDERS_DEEP = 100
LAST_CHARACTER = "\U0010ffff"
PATTERN_MARKS = "*?["

Description = dict[str, Any]
"""Description of files by fsspec or S3: of one file, or of a page of a listing."""
Page = Callable[..., Description]
"""Lists a page of an S3 prefix, given the prefix and further parameters of `list_objects_v2`."""


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


def walk(
    store: ObjectStore, pool: ThreadPoolExecutor, uri: str, takes: Takes, unlisted: Unlisted
) -> Iterator[StoredObject]:
    """Files below a folder whose names are taken.

    Their order depends only on the names and, on S3, on how names fall into pages of a listing. Folders below
    that may not be listed are noted.

    Raises:
        ImageError, OSError: the folder cannot be listed.
    """
    path = local_path(uri)
    if path is not None:
        return local_folders.walk(path, takes, unlisted)
    if is_s3(uri):
        return _walk_s3(store, pool, uri, takes, unlisted)
    if scheme_of(uri) in CLOUDS:
        return _walk_pages(store, uri, takes)
    return _walk_other(store, uri, takes, unlisted)


def glob(
    store: ObjectStore, pattern: str, takes: Takes, unlisted: Unlisted
) -> tuple[list[StoredObject], list[str]]:
    """Files and folders that match a pattern, each sorted; `**` matches files only.

    Names are taken or not relative to the part of the pattern before its first mark.

    Raises:
        WrongUse: the pattern is not understood.
        ImageError: as `ObjectStore.fetch`.
    """
    path = local_path(pattern)
    if path is not None:
        return local_folders.glob(path, takes, unlisted)
    root = fixed_part(pattern)
    files: list[StoredObject] = []
    folders: list[str] = []
    for uri, info in sorted(_matches(store, pattern).items()):
        is_directory = info["type"] == "directory"
        if not takes(uri[len(root) :] + "/" * is_directory):
            continue
        if is_directory:
            folders.append(uri)
        else:
            files.append(_described(store, uri, info))
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


def _walk_pages(store: ObjectStore, uri: str, takes: Takes) -> Iterator[StoredObject]:
    root = uri.rstrip("/") + "/"
    # A name that ends in a slash marks an empty folder.
    return (
        file for file in store.pages(uri) if not file.uri.endswith("/") and takes(file.uri.removeprefix(root))
    )


def _walk_other(store: ObjectStore, uri: str, takes: Takes, unlisted: Unlisted) -> Iterator[StoredObject]:
    """As `walk`, folder by folder, since servers follow links: one to a folder above would have no end."""
    fs = store.remote(uri)
    root = path_in(fs, uri).rstrip("/") + "/"
    found: dict[str, Description] = {}
    waiting: list[tuple[str, tuple[frozenset[str], ...]]] = [(root, ())]
    while waiting:
        folder, above = waiting.pop()
        try:
            entries = _entries(store, fs, folder)
        except ImageError as failure:
            if failure.code not in (ErrorCode.PERMISSION_DENIED, ErrorCode.NOT_FOUND) or not above:
                raise
            unlisted.fail(uri_of(fs, root_of(uri), folder), failure.message)
            continue
        files = {path: info for path, info in entries.items() if info["type"] != "directory"}
        names = frozenset(path.removeprefix(folder) for path in entries)
        if (files and names in above) or len(above) > MOST_FOLDERS_DEEP:
            unlisted.fail(uri_of(fs, root_of(uri), folder), "it is the same as a folder above it: a link?")
            continue
        found |= files
        below = entries.keys() - files.keys()
        waiting += [(f"{path.rstrip('/')}/", (*above, names)) for path in below]
    for path, info in sorted(found.items()):
        if takes(path.removeprefix(root)):
            yield _described(store, uri_of(fs, root_of(uri), path), info)


def _entries(store: ObjectStore, fs: Any, folder: str) -> dict[str, Description]:
    """What is in a folder, by path, without the folder itself."""
    listed: list[Description] = store.retried(lambda _: fs.ls(folder, detail=True))
    # fsspec takes the links of a page as they are written in it.
    named = {unescape(info["name"]) if is_http(folder) else info["name"]: info for info in listed}
    return {path: info for path, info in named.items() if path.rstrip("/") != folder.rstrip("/")}


def _walk_s3(
    store: ObjectStore, pool: ThreadPoolExecutor, uri: str, takes: Takes, unlisted: Unlisted
) -> Iterator[StoredObject]:
    """Lists several parts of the prefix at once, 1000 objects per request, and keeps none in memory."""
    bucket, root = _split_prefix(uri)

    def fetch(folder: str, **request: Any) -> Description:
        try:
            page: Description = store.call_s3("list_objects_v2", Bucket=bucket, Prefix=folder, **request)
        except ImageError as failure:
            if failure.code != ErrorCode.PERMISSION_DENIED or folder == root:
                raise
            unlisted.fail(f"s3://{bucket}/{folder}", failure.message)
            return {"IsTruncated": False}
        return page

    pages, folders = _split_up(fetch, root, takes)
    for page in chain(pages, _list_at_once(fetch, pool, folders)):
        for entry in page.get("Contents", ()):
            key = entry["Key"]
            if not key.endswith("/") and takes(key[len(root) :]):  # such a key marks an empty folder
                etag, modified_at = entry["ETag"].strip('"'), entry["LastModified"].timestamp()
                yield StoredObject(f"s3://{bucket}/{key}", etag, entry["Size"], modified_at)


def _split_up(fetch: Page, root: str, takes: Takes) -> tuple[list[Description], list[str]]:
    """Descends until there are enough folders to list at once; returns the files above them, and the folders.

    A folder with more entries than one page is not entered, but listed as a whole.
    """
    pages: list[Description] = []
    waiting = deque([root])
    whole: list[str] = []
    while waiting and len(waiting) + len(whole) < LISTINGS_AT_ONCE:
        folder = waiting.popleft()
        page = fetch(folder, Delimiter="/")
        if page["IsTruncated"]:
            whole.append(folder)
            continue
        pages.append(page)
        below = (entry["Prefix"] for entry in page.get("CommonPrefixes", ()))
        waiting += (prefix for prefix in below if takes(prefix[len(root) :]))
    return pages, [*whole, *waiting]


def _list_at_once(fetch: Page, pool: ThreadPoolExecutor, folders: Iterable[str]) -> Iterator[Description]:
    """Pages of the folders in turn: the next page of one folder is fetched while others' pages are used.

    What is left of a folder of many pages is divided by the beginnings of names, if few folders are left.
    """
    waiting: deque[tuple[str, dict[str, str]]] = deque((folder, {}) for folder in folders)
    under_way: deque[tuple[str, int, Future[Description]]] = deque()
    while waiting or under_way:
        while waiting and len(under_way) < LISTINGS_AT_ONCE:
            prefix, after = waiting.popleft()
            under_way.append((prefix, 1, pool.submit(fetch, prefix, **after)))
        prefix, number, future = under_way.popleft()
        page = future.result()
        if page["IsTruncated"]:
            parts = None
            if number >= PAGES_IN_A_ROW and not waiting and len(under_way) + 1 < LISTINGS_AT_ONCE:
                parts = _divided(fetch, prefix, page)
            if parts is None:
                token = page["NextContinuationToken"]
                under_way.append((prefix, number + 1, pool.submit(fetch, prefix, ContinuationToken=token)))
            else:
                waiting.extend(parts)
        yield page


def _divided(fetch: Page, prefix: str, page: Description) -> list[tuple[str, dict[str, str]]] | None:
    """Divides the keys below a prefix that come after a page: longer prefixes and the prefix itself, each
    with the parameters that leave out other keys.

    None if the store does not list keys in the order of their bytes, as S3's directory buckets, or heeds no
    `StartAfter`: then only its own tokens lead to every key once.
    """
    keys = [entry["Key"] for entry in page["Contents"]]
    last = keys[-1]
    if keys != sorted(keys, key=str.encode):
        return None
    is_ordered = True

    def next_key(beginning: str) -> str | None:
        """The first key below the prefix after all that begin so."""
        nonlocal is_ordered
        found = fetch(prefix, StartAfter=beginning + LAST_CHARACTER, MaxKeys=1).get("Contents")
        if not found:
            return None
        key: str = found[0]["Key"]
        is_ordered &= not key.startswith(beginning) and key.encode() > last.encode()
        return key

    # The more characters of `last`, the more keys come after all that begin so. The first that leaves any is
    # the one in which the keys differ.
    lengths = range(len(prefix) + 1, len(last))
    length = len(prefix) + 1 + bisect_left(lengths, True, key=lambda n: next_key(last[:n]) is not None)
    beginning = last[:length]
    parts = [(beginning, {"StartAfter": last})]
    for _ in range(LISTINGS_AT_ONCE):
        if (key := next_key(beginning)) is None or not is_ordered:
            break
        beginning = key[:length]
        parts.append((beginning, {}))
    else:
        parts.append((prefix, {"StartAfter": beginning + LAST_CHARACTER}))
    return parts if is_ordered else None


def _matches(store: ObjectStore, pattern: str) -> dict[str, Description]:
    fs = store.remote(pattern)
    found = store.retried(lambda _: fs.glob(path_in(fs, pattern), detail=True))
    return {uri_of(fs, root_of(pattern), name): info for name, info in found.items()}


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
