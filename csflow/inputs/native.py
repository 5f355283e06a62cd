"""Reads from object stores with obstore, a client outside Python that needs a tenth of s3fs's processor time.

obstore gets endpoint and credentials from the fsspec driver of the store, so that they have one source. It
returns bytes or nothing. If it fails, or cannot ask (keys such as `a//b`, S3 buckets of another region), the
driver tries again and explains the failure.
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
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, PreconditionError, UnauthenticatedError

if TYPE_CHECKING:  # it exists for type checkers alone
    from obstore import GetOptions

logger = logging.getLogger(__name__)

BUCKET = re.compile(r"[A-Za-z0-9_$][A-Za-z0-9._-]*")
LONGEST_PAUSE_S = 0.2
FAILURES_TO_REST = 8
REST_S = 30.0
"""After several failures in a row, the driver alone reads a bucket for this long, in case obstore cannot."""


@dataclass(frozen=True)
class Native:
    """How obstore reaches a store."""

    store: Callable[..., Any]
    """obstore's class of such stores; its argument is the bucket."""
    settings: dict[str, Any] | None
    """Further arguments, equivalent to what the driver was given; None if there is no equivalent."""
    condition: "Callable[[str], GetOptions]"
    """The options of a read by which the store answers with this version or with nothing."""
    driver: str
    """The name of the driver, for messages."""


def client_options(endpoint: str, deadline_s: float) -> dict[str, Any]:
    """obstore's options of a connection to an endpoint; an object is given up after `deadline_s` seconds."""
    timeout = timedelta(seconds=deadline_s)
    return {
        "timeout": timeout,
        # The driver must have time left to tell what is wrong with a store that does not answer.
        "read_timeout": timeout / 2,
        "connect_timeout": timeout / 2,
        "allow_http": endpoint.lower().startswith("http://"),
    }


NO_RETRIES = {"max_retries": 0}
"""`ObjectStore` has the one policy for retries."""


@dataclass
class _Health:
    """The failures of the client with one bucket."""

    failures: int = 0
    """Number of failures in a row."""
    rests_until: float = 0.0


class NativeReader:
    """Reads objects of one store for `ObjectStore`. Threads may share it."""

    def __init__(self, native: Native) -> None:
        self._native = native
        self._stores: dict[str, Any] = {}
        self._health: dict[str, _Health] = defaultdict(_Health)
        self._lock = threading.Lock()
        self._process = os.getpid()

    def get(
        self, bucket: str, key: str, version: str, start: int, end: int | None, limit: int
    ) -> bytes | None:
        """Bytes of an object, as `ObjectStore.fetch`; None on failure: the driver tries again."""
        if not self._can_ask(bucket, key, version):
            return None
        health = self._health[bucket]
        if time.monotonic() < health.rests_until:
            return None
        options = self._native.condition(version)
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
        return bool(is_nameable and self._native.settings and os.getpid() == self._process)

    def _store(self, bucket: str) -> Any:
        with self._lock:
            if bucket not in self._stores:
                assert self._native.settings is not None
                self._stores[bucket] = self._native.store(bucket, **self._native.settings)
            return self._stores[bucket]

    def _count_failure(self, bucket: str, error: BaseError) -> None:
        health = self._health[bucket]
        health.failures += 1
        # What was under way when the rest began fails as well.
        if health.failures >= FAILURES_TO_REST and time.monotonic() >= health.rests_until:
            health.failures = 0
            health.rests_until = time.monotonic() + REST_S
            name = type(error).__name__
            driver = self._native.driver
            logger.warning("for %.0f s bucket %s is read by %s alone: %s", REST_S, bucket, driver, name)
