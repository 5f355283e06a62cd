"""Reads from S3 with obstore, a client outside Python that needs a tenth of s3fs's processor time.

obstore gets endpoint, region and credentials from s3fs, so that they have one source. It returns bytes or
nothing. If it fails, or cannot ask (keys such as `a//b`, buckets of another region), s3fs retries and
explains the failure.
"""

import logging
import os
import random
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import obstore
from fsspec.asyn import sync
from obstore.exceptions import BaseError, PermissionDeniedError, PreconditionError, UnauthenticatedError
from obstore.store import S3Store

if TYPE_CHECKING:  # it exists for type checkers alone
    from obstore import GetOptions

logger = logging.getLogger(__name__)

OPTIONS = frozenset({"key", "secret", "token", "endpoint_url", "profile", "client_kwargs", "config_kwargs"})
CLIENT_OPTIONS = frozenset({"endpoint_url", "region_name"})
"""Options of s3fs that obstore gets, too. With any other option, s3fs reads."""
OWN_OPTIONS, OWN_CONFIG = frozenset({"use_listings_cache"}), frozenset({"retries", "max_pool_connections"})
"""Options that `ObjectStore` adds, which do not matter for reading."""
BUCKET = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
CREDENTIALS_ARE_KEPT = timedelta(minutes=10)
"""How long obstore may keep credentials; botocore renews those that would expire within this time."""
LONGEST_PAUSE_S = 0.2
FAILURES_TO_REST = 8
REST_S = 30.0
"""After several failures in a row, s3fs alone reads a bucket for this long, in case obstore cannot."""


@dataclass
class _Health:
    """The failures of the client with one bucket."""

    failures: int = 0
    """Number of failures in a row."""
    rests_until: float = 0.0


class NativeS3:
    """Reads objects of S3 for `ObjectStore`. Threads may share it."""

    def __init__(self, fs: fsspec.AbstractFileSystem, deadline_s: float) -> None:
        """Connects an `s3fs.S3FileSystem`. After `deadline_s` seconds an object is given up."""
        self._settings = _settings(fs, deadline_s) if _is_understood(fs) else None
        self._stores: dict[str, S3Store] = {}
        self._health: dict[str, _Health] = defaultdict(_Health)
        self._lock = threading.Lock()
        self._process = os.getpid()

    def get(
        self, bucket: str, key: str, version: str, start: int, end: int | None, limit: int
    ) -> bytes | None:
        """Bytes of an object, as `ObjectStore.fetch`; None on failure, so that s3fs retries and explains."""
        if not self._can_ask(bucket, key, version):
            return None
        health = self._health[bucket]
        if time.monotonic() < health.rests_until:
            return None
        options: GetOptions = {"if_match": f'"{version}"'}
        if end is not None:
            options["range"] = (start, end)
        data: bytes | None = None
        try:
            result = obstore.get(self._store(bucket), key, options=options)
            first, last = result.range
            if last - first <= limit:
                data = result.bytes().to_bytes()
        except (ValueError, FileNotFoundError, PreconditionError):
            pass
        except BaseError as error:
            self._count_failure(bucket, error)
            if not isinstance(error, PermissionDeniedError | UnauthenticatedError):
                # The store may have asked to slow down, and will be asked again at once.
                time.sleep(random.uniform(0, LONGEST_PAUSE_S))
            return None
        health.failures = 0
        return data

    def _can_ask(self, bucket: str, key: str, version: str) -> bool:
        """Whether the client would ask for this exact object.

        obstore removes slashes at both ends of a key, panics if a URL or a header would be invalid, and hangs
        in a forked process if it was used before the fork.
        """
        is_nameable = BUCKET.fullmatch(bucket) and key and key == key.strip("/") and version.isprintable()
        return bool(is_nameable and self._settings and os.getpid() == self._process)

    def _store(self, bucket: str) -> S3Store:
        with self._lock:
            if bucket not in self._stores:
                assert self._settings is not None
                self._stores[bucket] = S3Store(bucket, **self._settings)
            return self._stores[bucket]

    def _count_failure(self, bucket: str, error: BaseError) -> None:
        health = self._health[bucket]
        health.failures += 1
        # What was under way when the rest began fails as well.
        if health.failures >= FAILURES_TO_REST and time.monotonic() >= health.rests_until:
            health.failures = 0
            health.rests_until = time.monotonic() + REST_S
            name = type(error).__name__
            logger.warning("for %.0f s bucket %s is read by s3fs alone: %s", REST_S, bucket, name)


def _is_understood(fs: fsspec.AbstractFileSystem) -> bool:
    return (
        fs.storage_options.keys() - OWN_OPTIONS <= OPTIONS
        and fs.client_kwargs.keys() <= CLIENT_OPTIONS
        and fs.config_kwargs.keys() <= OWN_CONFIG
    )


def _settings(fs: fsspec.AbstractFileSystem, deadline_s: float) -> dict[str, Any] | None:
    """Arguments of an `S3Store` equivalent to this file system; None if there is no equivalent."""
    sync(fs.loop, fs.set_session, timeout=deadline_s)
    client = fs.s3.meta
    provider = _credential_provider(fs, deadline_s)
    if provider is None or not all(map(str.isprintable, (client.endpoint_url, client.region_name))):
        return None
    timeout = timedelta(seconds=deadline_s)
    client_options: dict[str, Any] = {
        "timeout": timeout,
        # s3fs must have time left to tell what is wrong with a store that does not answer.
        "read_timeout": min(timeout / 2, timedelta(seconds=fs.read_timeout)),
        "connect_timeout": min(timeout / 2, timedelta(seconds=fs.connect_timeout)),
        "allow_http": client.endpoint_url.lower().startswith("http://"),
    }
    if authorities := fs.session.get_config_variable("ca_bundle"):
        try:
            client_options["root_certificate"] = Path(authorities).read_bytes()
        except OSError:
            return None
    config = {
        "endpoint": client.endpoint_url,
        "region": client.region_name,
        # Else variables of the environment, of which botocore knows some and not others, would win.
        "aws_endpoint_url_s3": client.endpoint_url,
        "skip_signature": False,
        "virtual_hosted_style_request": False,
        "request_payer": False,
        "s3_express": False,
    }
    return {
        "config": config,
        "credential_provider": provider,
        "client_options": client_options,
        "retry_config": {"max_retries": 0},  # `ObjectStore` has the one policy for retries
    }


def _credential_provider(
    fs: fsspec.AbstractFileSystem, deadline_s: float
) -> Callable[[], dict[str, Any]] | None:
    """A function that returns the file system's current credentials; None if it has none."""
    if fs.key:
        explicit = _credentials(fs.key, fs.secret, fs.token, None)
        return None if explicit is None else lambda: explicit
    found = sync(fs.loop, fs.session.get_credentials, timeout=deadline_s)
    if found is None:
        return None

    def current() -> dict[str, Any]:
        frozen = sync(fs.loop, found.get_frozen_credentials, timeout=deadline_s)
        expires_at = datetime.now(UTC) + CREDENTIALS_ARE_KEPT
        credentials = _credentials(frozen.access_key, frozen.secret_key, frozen.token, expires_at)
        if credentials is None:
            raise ValueError("credentials that no header can hold")
        return credentials

    return current


def _credentials(
    key: str, secret: str | None, token: str | None, expires_at: datetime | None
) -> dict[str, Any] | None:
    """The credentials in obstore's form; None if a header cannot hold them, because of a line break."""
    if not all(map(str.isprintable, (key, secret or "", token or ""))):
        return None
    return {"access_key_id": key, "secret_access_key": secret, "token": token, "expires_at": expires_at}
