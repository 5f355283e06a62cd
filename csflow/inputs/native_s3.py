"""GETs from S3 through obstore, a client outside Python: a fifth to a tenth of s3fs's processor time.

Endpoint, region and credentials are those that s3fs has found, so that there is one answer to where they come
from. The client only says yes: whatever it cannot do (keys such as `a//b`, buckets of another region) or is
refused, s3fs is asked again, and tells why.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import obstore
from fsspec.asyn import sync
from obstore.exceptions import BaseError, PreconditionError
from obstore.store import S3Store

from csflow.errors import ErrorCode, ImageError

if TYPE_CHECKING:  # it exists for type checkers alone
    from obstore import GetOptions

logger = logging.getLogger(__name__)

OPTIONS = frozenset({"key", "secret", "token", "endpoint_url", "profile", "client_kwargs"})
CLIENT_OPTIONS = frozenset({"endpoint_url", "region_name"})
"""Of s3fs's options, those whose meaning is passed on. With any other, s3fs reads."""
CREDENTIALS_ARE_KEPT = timedelta(minutes=10)
"""botocore renews credentials that would expire within this time."""
FAILURES_TO_REST = 8
REST_S = 300.0
"""After so many failures in a row it is left alone for a while: it may be unfit for this store."""


class NativeS3:
    """Reads objects of S3 for `ObjectStore`. Threads may share it."""

    def __init__(
        self, fs: fsspec.AbstractFileSystem, storage_options: Mapping[str, Any], deadline_s: float
    ) -> None:
        """Connects the file system.

        Args:
            fs: an `s3fs.S3FileSystem`, made with these options.
            deadline_s: seconds after which an object is given up.
        """
        self._settings = _settings(fs, deadline_s) if _is_understood(storage_options) else None
        self._stores: dict[str, S3Store] = {}
        self._lock = threading.Lock()
        self._failures = 0
        self._rests_until = 0.0

    def get(
        self, bucket: str, key: str, version: str, start: int, end: int | None, limit: int
    ) -> bytes | None:
        """Bytes of an object, as `ObjectStore.fetch`; None if there are none for a reason that s3fs can tell.

        Raises:
            ImageError: CONNECTION, of a failure that may pass.
        """
        if self._settings is None or time.monotonic() < self._rests_until:
            return None
        options: GetOptions = {"if_match": f'"{version}"'}
        if end is not None:
            options["range"] = (start, end)
        try:
            result = obstore.get(self._store(bucket), key, options=options)
            first, last = result.range
            if last - first > limit:
                return None
            data: bytes = result.bytes().to_bytes()
        except (ValueError, FileNotFoundError, PreconditionError):
            return None
        except BaseError as error:
            self._count_failure(error)
            raise ImageError(ErrorCode.CONNECTION, f"reading failed ({type(error).__name__})") from error
        self._failures = 0
        return data

    def _store(self, bucket: str) -> S3Store:
        with self._lock:
            if bucket not in self._stores:
                assert self._settings is not None
                self._stores[bucket] = S3Store(bucket, **self._settings)
            return self._stores[bucket]

    def _count_failure(self, error: BaseError) -> None:
        self._failures += 1
        if self._failures >= FAILURES_TO_REST:
            self._failures = 0
            self._rests_until = time.monotonic() + REST_S
            logger.warning("for %.0f s S3 is read by s3fs alone: %s", REST_S, type(error).__name__)


def _is_understood(storage_options: Mapping[str, Any]) -> bool:
    client_options = storage_options.get("client_kwargs") or {}
    return storage_options.keys() <= OPTIONS and client_options.keys() <= CLIENT_OPTIONS


def _settings(fs: fsspec.AbstractFileSystem, deadline_s: float) -> dict[str, Any] | None:
    """Arguments of an `S3Store` that is as this file system; None if there are no credentials."""
    fs.connect()
    client = fs.s3.meta
    provider = _credential_provider(fs)
    if provider is None:
        return None
    # s3fs must have time left to tell what is wrong.
    timeout = timedelta(seconds=deadline_s / 2)
    client_options: dict[str, Any] = {
        "timeout": timeout,
        "read_timeout": min(timeout, timedelta(seconds=fs.read_timeout)),
        "connect_timeout": min(timeout, timedelta(seconds=fs.connect_timeout)),
        "allow_http": client.endpoint_url.startswith("http://"),
    }
    if authorities := fs.session.get_config_variable("ca_bundle"):
        client_options["root_certificate"] = Path(authorities).read_bytes()
    return {
        "config": {"endpoint": client.endpoint_url, "region": client.region_name},
        "credential_provider": provider,
        "client_options": client_options,
        "retry_config": {"max_retries": 0},  # `ObjectStore` has the one policy for retries
    }


def _credential_provider(fs: fsspec.AbstractFileSystem) -> Callable[[], dict[str, Any]] | None:
    """What gives the file system's credentials whenever it is asked; None if there are none."""
    if fs.key:
        static = {"access_key_id": fs.key, "secret_access_key": fs.secret, "token": fs.token}
        return lambda: static | {"expires_at": None}
    credentials = sync(fs.loop, fs.session.get_credentials)
    if credentials is None:
        return None

    def current() -> dict[str, Any]:
        frozen = sync(fs.loop, credentials.get_frozen_credentials)
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + CREDENTIALS_ARE_KEPT,
        }

    return current
