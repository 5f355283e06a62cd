"""Reads one version (ETag) of a blob of Azure Blob Storage, by adlfs and by obstore."""

from datetime import UTC, datetime
from typing import Any

from obstore.store import AzureStore

from csflow.inputs.native import NO_RETRIES, Native, client_options
from csflow.inputs.store_errors import check_size

SCOPE = "https://storage.azure.com/.default"
ONCE = {"retry_total": 0}
"""Azure's client does not repeat a request: `ObjectStore` has the one policy for retries."""


async def get(
    fs: Any, container: str, key: str, version: str, start: int, end: int | None, limit: int
) -> bytes:
    """Bytes `start` to `end` of that version.

    Raises:
        ImageError: TOO_LARGE above `limit` bytes.
        ResourceModifiedError: of status 412, the blob has another version.
        FileNotFoundError: there is no such blob.
    """
    from azure.core import MatchConditions  # of the extra `azure`
    from azure.core.exceptions import ResourceModifiedError

    condition = {"etag": f'"{version}"', "match_condition": MatchConditions.IfNotModified}
    part = {"offset": start, "length": None if end is None else end - start} if start or end else {}
    # Not closed: the client is the file system's own.
    blob = fs.service_client.get_blob_client(container, key)
    try:
        stream = await blob.download_blob(**part, **condition, **ONCE)
        check_size(stream.size, limit)
        return bytes(await stream.readall())
    except ResourceModifiedError:
        if await blob.exists(**ONCE):
            raise
        raise FileNotFoundError(key) from None


async def page(
    fs: Any, container: str, prefix: str, token: str | None, most: int
) -> tuple[list[dict[str, Any]], str | None]:
    """At most `most` blobs below a prefix, in order and in fsspec's form, and the next page's token."""
    client = fs.service_client.get_container_client(container)
    listing = client.list_blobs(name_starts_with=prefix or None, results_per_page=most, **ONCE)
    pages = listing.by_page(token)
    async for blobs in pages:
        found = [
            {"name": blob.name, "size": blob.size, "etag": blob.etag, "last_modified": blob.last_modified}
            async for blob in blobs
        ]
        return found, pages.continuation_token or None
    return [], None


def native(fs: Any, deadline_s: float) -> Native:
    """How obstore reaches what this `adlfs.AzureBlobFileSystem` does."""
    service = fs.service_client
    endpoint, _, signature = service.url.partition("?")
    settings: dict[str, Any] = {
        "config": {"account_name": service.account_name, "endpoint": endpoint.rstrip("/")},
        "client_options": client_options(endpoint, deadline_s),
        "retry_config": NO_RETRIES,
    }
    if key := getattr(service.credential, "account_key", None):
        settings["config"]["account_key"] = key
    elif signature:
        settings["config"]["sas_key"] = signature
    elif fs.sync_credential is not None:
        settings["credential_provider"] = lambda: _token(fs.sync_credential)
    else:
        settings["config"]["skip_signature"] = True
    given = settings if service.account_name and fs.location_mode == "primary" else None
    return Native(AzureStore, given, lambda version: {"if_match": f'"{version}"'}, "adlfs")


def _token(credential: Any) -> dict[str, Any]:
    found = credential.get_token(SCOPE)
    return {"token": found.token, "expires_at": datetime.fromtimestamp(found.expires_on, UTC)}
