"""Gives obstore the settings of an `s3fs.S3FileSystem`: endpoint, region and credentials."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import sync
from obstore.store import S3Store

from csflow.inputs.native import NO_RETRIES, Native, client_options

OPTIONS = frozenset({"key", "secret", "token", "endpoint_url", "profile", "client_kwargs", "config_kwargs"})
CLIENT_OPTIONS = frozenset({"endpoint_url", "region_name"})
"""Options of s3fs that obstore gets, too. With any other option, s3fs reads."""
OWN_OPTIONS, OWN_CONFIG = frozenset({"use_listings_cache"}), frozenset({"retries", "max_pool_connections"})
"""Options that `ObjectStore` adds, which do not matter for reading."""
CREDENTIALS_ARE_KEPT = timedelta(minutes=10)
"""How long obstore may keep credentials; botocore renews those that would expire within this time."""


def native(fs: fsspec.AbstractFileSystem, deadline_s: float) -> Native:
    """How obstore reaches what this `s3fs.S3FileSystem` does."""
    settings = _settings(fs, deadline_s) if _is_understood(fs) else None
    return Native(S3Store, settings, lambda version: {"if_match": f'"{version}"'}, "s3fs")


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
    options = client_options(client.endpoint_url, deadline_s)
    options["read_timeout"] = min(options["read_timeout"], timedelta(seconds=fs.read_timeout))
    options["connect_timeout"] = min(options["connect_timeout"], timedelta(seconds=fs.connect_timeout))
    if authorities := fs.session.get_config_variable("ca_bundle"):
        try:
            options["root_certificate"] = Path(authorities).read_bytes()
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
        "client_options": options,
        "retry_config": NO_RETRIES,
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
