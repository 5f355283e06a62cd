"""Bytes and versions of stored objects, local or remote, with one policy for retries and errors."""

import io
import itertools
import math
import os
import random
import re
import stat
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import fsspec
from botocore.utils import parse_timestamp
from fsspec.asyn import sync

from csflow.errors import ErrorCode, ImageError, WrongUse
from csflow.inputs import azure_objects, google_objects, http_objects, native_s3, plain_reads
from csflow.inputs.http_objects import BoundedResponse, is_http
from csflow.inputs.native import Native, NativeReader
from csflow.inputs.store_errors import NO_CREDENTIALS, check_size, image_error
from csflow.inputs.uris import is_s3, local_path, on_disk, path_in, root_of, scheme_of, split_s3
from csflow.ranged_file import RangedFile
from csflow.storage import filesystem

T = TypeVar("T")

UNKNOWN_VERSION = "unknown"
"""Version of an object that listing could not examine. Reading it raises the reason, or CHANGED."""

RETRIED = frozenset({ErrorCode.THROTTLED, ErrorCode.TIMEOUT, ErrorCode.CONNECTION, ErrorCode.SERVER_ERROR})
SHORTEST_ATTEMPT_S = 5.0
"""Seconds that the last attempt before a deadline gets, even past it; a shorter one could only time out."""
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 20.0
LONGEST_LAG_S = 3600.0
"""Seconds after which a listing knows of a change, if it ever will."""
PAGE_OBJECTS = 1000
"""Number of objects in a page of a listing, except of S3's."""
MAX_RANGE_BYTES = 1 << 30
"""Largest single read in an archive or a Parquet file, so that a hostile header cannot exhaust the memory."""

S3 = "s3://"
# Retries are ours alone: nested ones multiply the load on a store that asked to slow down, and hide why it
# failed. botocore's 10 connections would leave most of a reader's threads waiting.
S3_CLIENT = {"retries": {"total_max_attempts": 1}, "max_pool_connections": 64}

MODIFIED = ("LastModified", "last_modified", "mtime", "updated", "created")
"""Names under which fsspec's drivers give the time of the last change."""


class StoredObject(NamedTuple):
    """One version of an object: a file, an archive member or a Parquet row."""

    uri: str
    version: str
    size: int
    """Size in bytes; 0 if a manifest does not say."""
    modified_at: float = math.nan
    """Time of the last change in seconds since 1970; NaN if unknown."""


class ObjectStore:
    """Reads objects of any store, each at one version. Threads may share it."""

    def __init__(self, storage_options: Mapping[str, Any], deadline_s: float) -> None:
        self._options = dict(storage_options)
        self._deadline_s = deadline_s
        self._remote: dict[str, fsspec.AbstractFileSystem] = {}
        """Asynchronous file systems by scheme and host; of others each thread has its own."""
        self._natives: dict[str, NativeReader] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["ObjectStore"], tuple[dict[str, Any], float]]:
        return type(self), (self._options, self._deadline_s)

    def fetch(
        self, uri: str, version: str, start: int = 0, end: int | None = None, limit: int = MAX_RANGE_BYTES
    ) -> bytes:
        """Bytes `start` to `end` of that version, with one GET or one read of a local file.

        Raises:
            ImageError: CHANGED if the object has another version (S3, Google, Azure, web servers and local
                files can tell), TOO_LARGE above `limit` bytes, and the errors of `image_error`. Transient
                failures are retried until the deadline.
        """
        try:
            return self._fetch(uri, version, start, end, limit)
        except ImageError as failure:
            current = self._version_of_reads(uri, version) if failure.code == ErrorCode.CHANGED else None
            if current is None:
                raise
        return self._fetch(uri, current, start, end, limit)

    def _version_of_reads(self, uri: str, listed: str) -> str | None:
        """The version that reads know the object by, if it differs for good from the one in listings.

        After a crash, a store's index may name a version that its object does not have. Without this, the
        image would be `changed` in every run. A listing that only lags behind is not meant.
        """
        if not is_s3(uri):
            return None
        bucket, key = split_s3(uri)
        try:
            page = self.call_s3("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)
            in_listing = {entry["Key"]: entry["ETag"].strip('"') for entry in page.get("Contents", ())}
            if in_listing.get(key) != listed:
                return None
            current = self.stat(uri)
        except ImageError:  # such as a role that may not list
            return None
        return current.version if time.time() - current.modified_at > LONGEST_LAG_S else None

    def _fetch(self, uri: str, version: str, start: int, end: int | None, limit: int) -> bytes:
        path = local_path(uri)
        if path is not None:
            return self.retried(lambda _: _read_local(on_disk(path), version, start, end, limit))
        if scheme_of(uri) in CLOUDS:
            clients = itertools.chain([self._get_natively], itertools.repeat(self._get_by_driver))
            return self.retried(lambda left_s: next(clients)(uri, version, start, end, limit, left_s))
        if is_http(uri):
            return self.retried(lambda left_s: self._get_http(uri, version, start, end, limit, left_s))
        return self.retried(lambda _: self._get_other(uri, start, end, limit))

    def stat(self, uri: str) -> StoredObject:
        """The current version and size. Raises ImageError as `fetch`; NOT_FOUND for none, or a folder."""
        path = local_path(uri)
        if path is not None:
            return self.retried(lambda _: _stat_local(uri, on_disk(path)))
        if is_s3(uri):
            bucket, key = split_s3(uri)
            head = self.call_s3("head_object", Bucket=bucket, Key=key)
            modified_at = head["LastModified"].timestamp()
            return StoredObject(uri, head["ETag"].strip('"'), head["ContentLength"], modified_at)
        if is_http(uri):
            return self.retried(lambda left_s: self._stat_http(uri, left_s))
        return self.retried(lambda _: self._stat_other(uri))

    def open(self, stored: StoredObject, read_ahead: int = 0) -> BinaryIO:
        """The object as a seekable file of that version, for one thread, which raises as `fetch`.

        Each read fetches at least `read_ahead` bytes.
        """

        def fetch(start: int, end: int) -> bytes:
            if end - start > MAX_RANGE_BYTES:
                raise ImageError(ErrorCode.TOO_LARGE, f"a part of the file has {end - start} bytes")
            return self.fetch(stored.uri, stored.version, start, end)

        return cast(BinaryIO, RangedFile(fetch, stored.size, read_ahead))

    def pages(self, uri: str) -> Iterator[StoredObject]:
        """The objects of Google or Azure below a folder, in order; one page at a time is in memory.

        Raises:
            ImageError: as `fetch`.
        """
        page = CLOUDS[scheme_of(uri)].page
        assert page is not None
        bucket, prefix = self._bucket_and_key(uri)
        prefix = prefix.rstrip("/") and f"{prefix.rstrip('/')}/"
        token: str | None = None
        while True:

            def attempt(left_s: float, token: str | None = token) -> tuple[list[dict[str, Any]], str | None]:
                fs = self.remote(uri)
                found: Any = sync(fs.loop, page, fs, bucket, prefix, token, PAGE_OBJECTS, timeout=left_s)
                return found

            objects, token = self.retried(attempt)
            yield from (described(f"{root_of(uri)}/{info['name']}", info) for info in objects)
            if token is None:
                return

    def call_s3(self, method: str, **request: Any) -> Any:
        """The response of one S3 operation, tried again as `fetch` does."""

        def attempt(left_s: float) -> Any:
            fs = self.remote(S3)
            return sync(fs.loop, _call_s3, fs, method, request, timeout=left_s)

        return self.retried(attempt)

    def remote(self, uri: str) -> fsspec.AbstractFileSystem:
        """The file system of a remote URI's scheme and host. Raises WrongUse for an unknown scheme."""
        root = S3 if is_s3(uri) else root_of(uri)
        fs = self._remote.get(root)
        if fs is None:
            options = self._options
            if root == S3:
                options = options | {"config_kwargs": S3_CLIENT | options.get("config_kwargs", {})}
            if is_http(root):
                bounded = {"response_class": BoundedResponse}
                options = options | {"client_kwargs": bounded | options.get("client_kwargs", {})}
            fs, _ = filesystem(root, options)
            if root == S3:
                fs.retries = 1
            if fs.async_impl:
                self._remote[root] = fs
        return fs

    def retried(self, attempt: Callable[[float], T]) -> T:
        """The result of `attempt(seconds left)`, repeated with growing random pauses until the deadline.

        Raises:
            ImageError: the last failure.
            WrongUse: there are no credentials, or the scheme is unknown.
        """
        deadline = time.monotonic() + self._deadline_s
        pauses_s = _pauses()
        while True:
            try:
                return attempt(max(deadline - time.monotonic(), SHORTEST_ATTEMPT_S))
            except NO_CREDENTIALS as error:
                remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role"
                raise WrongUse(f"no credentials for S3 ({type(error).__name__}); {remedy}") from None
            except WrongUse:
                raise
            except Exception as error:
                failure = image_error(error)
            pause_s = next(pauses_s)
            if failure.code not in RETRIED or time.monotonic() + pause_s > deadline:
                raise failure
            time.sleep(pause_s)

    def _get_natively(
        self, uri: str, version: str, start: int, end: int | None, limit: int, left_s: float
    ) -> bytes:
        deadline = time.monotonic() + left_s
        data = self._native(uri).get(*self._bucket_and_key(uri), version, start, end, limit)
        if data is not None:
            return data
        left_s = max(deadline - time.monotonic(), SHORTEST_ATTEMPT_S)
        return self._get_by_driver(uri, version, start, end, limit, left_s)

    def _native(self, uri: str) -> NativeReader:
        root = S3 if is_s3(uri) else root_of(uri)
        with self._lock:
            if root not in self._natives:
                native = CLOUDS[scheme_of(uri)].native
                self._natives[root] = NativeReader(native(self.remote(uri), self._deadline_s))
            return self._natives[root]

    def _get_by_driver(
        self, uri: str, version: str, start: int, end: int | None, limit: int, left_s: float
    ) -> bytes:
        fs, get = self.remote(uri), CLOUDS[scheme_of(uri)].get
        bucket, key = self._bucket_and_key(uri)
        data: bytes = sync(fs.loop, get, fs, bucket, key, version, start, end, limit, timeout=left_s)
        return data

    def _bucket_and_key(self, uri: str) -> tuple[str, str]:
        if is_s3(uri):
            return split_s3(uri)
        bucket, _, key = path_in(self.remote(uri), uri).partition("/")
        return bucket, key

    def _get_http(
        self, uri: str, version: str, start: int, end: int | None, limit: int, left_s: float
    ) -> bytes:
        fs = self.remote(uri)
        data, info = sync(fs.loop, http_objects.get, fs, uri, start, end, limit, timeout=left_s)
        # Some servers describe a file otherwise if only its description is asked for, as a listing does.
        if version_of(info) != version and self._stat_http(uri, left_s).version != version:
            raise ImageError(ErrorCode.CHANGED, "the file was changed after it was listed")
        return bytes(data)

    def _stat_http(self, uri: str, left_s: float) -> StoredObject:
        fs = self.remote(uri)
        return described(uri, sync(fs.loop, http_objects.stat, fs, uri, timeout=left_s))

    def _get_other(self, uri: str, start: int, end: int | None, limit: int) -> bytes:
        with self._other(uri) as (fs, path):
            return plain_reads.read(fs, path, start, end, limit)

    def _stat_other(self, uri: str) -> StoredObject:
        with self._other(uri) as (fs, path):
            info = fs.info(path)
        if info["type"] != "file":
            raise ImageError(ErrorCode.NOT_FOUND, "not an object")
        return described(uri, info)

    @contextmanager
    def _other(self, uri: str) -> Iterator[tuple[fsspec.AbstractFileSystem, str]]:
        """File system and path of a URI; after a failure the next attempt connects anew."""
        fs = self.remote(uri)
        try:
            yield fs, path_in(fs, uri)
        except FileNotFoundError:
            raise
        except Exception:
            fs.clear_instance_cache()
            raise


def described(uri: str, info: Mapping[str, Any]) -> StoredObject:
    """The object that fsspec describes so."""
    return StoredObject(uri, version_of(info), info["size"] or 0, modified_at(info))


def version_of(info: Mapping[str, Any]) -> str:
    """The version in fsspec's description of a remote object."""
    if info.get("generation"):
        return str(info["generation"])  # Google's: unlike its ETag, a read can ask for it
    etag = info.get("ETag") or info.get("etag")
    if etag:
        return str(etag).strip('"')
    return f"{info['size']}-{_changed(info)}".replace(" ", "T")


def modified_at(info: Mapping[str, Any]) -> float:
    """The time of the last change in fsspec's description of a remote object; NaN if it has none."""
    value = _changed(info)
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return math.nan
    return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()


def _changed(info: Mapping[str, Any]) -> datetime | float | str:
    """The time of the last change as the driver tells it; "" if it has none."""
    if isinstance(info.get("modify"), str):
        # Of FTP's MLSD, in UTC. Without MLSD drivers take the text of a listing, which changes as files age.
        digits = re.match(r"\d{14}", info["modify"])
        return datetime.strptime(digits[0], "%Y%m%d%H%M%S").replace(tzinfo=UTC) if digits else ""
    if "modificationTime" in info:
        return float(info["modificationTime"]) / 1000  # WebHDFS
    value: datetime | float | str = next((info[key] for key in MODIFIED if info.get(key)), "")
    return value


def local_version(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}"


def _pauses() -> Iterator[float]:
    """Seconds to wait after each failure: random, up to a limit that doubles, so that readers spread out."""
    for attempt in itertools.count():
        yield random.uniform(0, min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S))


async def _call_s3(fs: Any, method: str, request: dict[str, Any]) -> Any:
    await fs.set_session()
    # botocore's own parser of times takes two thirds of all that reading a listing takes.
    fs.session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_time)
    return await fs._call_s3(method, **request)


def _time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        time_of_header: datetime = parse_timestamp(text)
        return time_of_header


async def _get_s3(
    fs: Any, bucket: str, key: str, version: str, start: int, end: int | None, limit: int
) -> bytes:
    request = {"Bucket": bucket, "Key": key, "IfMatch": f'"{version}"'}
    if end is not None:
        request["Range"] = f"bytes={start}-{end - 1}"
    response = await fs._call_s3("get_object", **request)
    async with response["Body"] as body:
        size = response["ContentLength"]
        check_size(size, limit)
        data: bytes = await body.read()
    if len(data) != size:
        raise ImageError(ErrorCode.CONNECTION, f"the answer ended after {len(data)} of {size} bytes")
    return data


class _Cloud(NamedTuple):
    """How one version of an object is read, and how objects are listed."""

    get: Callable[..., Awaitable[bytes]]
    """By the fsspec driver: file system, bucket, key, version, start, end, limit."""
    native: Callable[[Any, float], Native]
    """By obstore, with the settings of the file system."""
    page: Callable[..., Awaitable[tuple[list[dict[str, Any]], str | None]]] | None = None
    """A page of a listing: file system, bucket, prefix, token, size. S3's are listed several at once."""


CLOUDS = {
    "s3": _Cloud(_get_s3, native_s3.native),
    "gs": _Cloud(google_objects.get, google_objects.native, google_objects.page),
    "abfs": _Cloud(azure_objects.get, azure_objects.native, azure_objects.page),
}
"""Object stores, by scheme, that give one version of an object or nothing."""


def _read_local(path: str, version: str, start: int, end: int | None, limit: int) -> bytes:
    # Without waiting for the other end of a pipe, should the path name one.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        size = _check_local(file, version)
        wanted = (size if end is None else end) - start
        check_size(wanted, limit)
        file.seek(start)
        data = file.read(wanted)
        # Again: a file that is rewritten while it is read would give a mixture of two versions.
        _check_local(file, version)
    return data


def _check_local(file: io.BufferedReader, version: str) -> int:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(ErrorCode.NOT_FOUND, "no regular file")
    if local_version(status) != version:
        raise ImageError(ErrorCode.CHANGED, "the file was changed after it was listed")
    return status.st_size


def _stat_local(uri: str, path: str) -> StoredObject:
    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(ErrorCode.NOT_FOUND, "not a file")
    return StoredObject(uri, local_version(status), status.st_size, status.st_mtime)
