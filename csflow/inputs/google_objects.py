"""Reads one version (generation) of an object of Google Cloud Storage, by gcsfs and by obstore."""

import json
from datetime import UTC
from typing import Any

from obstore.store import GCSStore

from csflow.errors import ErrorCode, ImageError
from csflow.inputs.native import NO_RETRIES, Native, client_options
from csflow.inputs.store_errors import check_size

OPTIONS = frozenset({"token", "project", "endpoint_url", "use_listings_cache"})
"""Options of gcsfs that obstore has equivalents of. With any other option, gcsfs reads."""
PAGE_FIELDS = "nextPageToken,items(name,size,generation,updated)"
"""What a listing needs of each object, a tenth of what the store would send."""


async def get(fs: Any, bucket: str, key: str, version: str, start: int, end: int | None, limit: int) -> bytes:
    """Bytes `start` to `end` of that generation.

    Raises:
        ImageError: CHANGED if the object has another generation, TOO_LARGE above `limit` bytes.
        FileNotFoundError: there is no such object.
    """
    _, _, _, content = await _request(fs, "b/{}/o/{}", bucket, key, fields="generation,size")
    current = json.loads(content)
    size = int(current["size"])
    if current["generation"] != version:
        raise ImageError(ErrorCode.CHANGED, "the object was changed after it was listed")
    wanted = (size if end is None else min(end, size)) - start
    check_size(wanted, limit)
    if wanted <= 0:
        return b""
    headers = {"Range": f"bytes={start}-{start + wanted - 1}"}
    try:
        url = fs.url(f"{bucket}/{key}", generation=version)
        _, _, _, data = await _request(fs, url, headers=headers)
    except FileNotFoundError:
        raise ImageError(ErrorCode.CHANGED, "the object was changed while it was read") from None
    if len(data) != wanted:
        raise ImageError(ErrorCode.CONNECTION, f"the answer ended after {len(data)} of {wanted} bytes")
    return bytes(data)


async def page(
    fs: Any, bucket: str, prefix: str, token: str | None, most: int
) -> tuple[list[dict[str, Any]], str | None]:
    """At most `most` objects below a prefix, in order and in fsspec's form, and the next page's token."""
    given = {"prefix": prefix, "pageToken": token, "maxResults": most, "fields": PAGE_FIELDS}
    parameters = {name: value for name, value in given.items() if value}
    _, _, _, content = await _request(fs, "b/{}/o", bucket, **parameters)
    answer = json.loads(content)
    objects = [item | {"size": int(item["size"])} for item in answer.get("items", ())]
    return objects, answer.get("nextPageToken")


def native(fs: Any, deadline_s: float) -> Native:
    """How obstore reaches what this `gcsfs.GCSFileSystem` does."""
    settings: dict[str, Any] | None = None
    if fs.storage_options.keys() <= OPTIONS:
        endpoint = fs._endpoint
        config: dict[str, Any] = {"base_url": endpoint}
        settings = {
            "config": config,
            "client_options": client_options(endpoint, deadline_s),
            "retry_config": NO_RETRIES,
        }
        if fs.credentials.credentials is None:
            config["skip_signature"] = True
        else:
            settings["credential_provider"] = lambda: _token(fs)
    return Native(GCSStore, settings, lambda version: {"version": version}, "gcsfs")


def _token(fs: Any) -> dict[str, Any]:
    """The driver's current token, renewed if it is about to expire."""
    fs.credentials.maybe_refresh()
    found = fs.credentials.credentials
    expires_at = found.expiry.replace(tzinfo=UTC) if found.expiry else None
    return {"token": found.token, "expires_at": expires_at}


async def _request(fs: Any, path: str, *names: str, **parameters: Any) -> Any:
    """One request, not repeated by gcsfs: `ObjectStore` has the one policy for retries."""
    return await type(fs)._request.__wrapped__(fs, "GET", path, *names, **parameters)
