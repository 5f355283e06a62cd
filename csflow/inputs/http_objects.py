"""Reads from web servers through fsspec's session: bounded, and only the version that was listed.

fsspec's own reading takes a whole answer into memory, passes ranges over that a server ignored, and calls
every failure to look a file up "not found".
"""

from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp

from csflow.errors import ErrorCode, ImageError
from csflow.inputs.store_errors import check_size

CHUNK_BYTES = 1 << 16
PAGE_BYTES = 64 << 20
"""Largest size of a page of links, of some hundred thousand files."""
NO_HEAD = frozenset({400, 403, 405, 501})
"""Statuses of servers that answer GET and not HEAD."""
AS_IT_IS = {"Accept-Encoding": "identity"}
"""Compressed on the way, an answer would have another size and another ETag."""


class BoundedResponse(aiohttp.ClientResponse):
    """An answer that fsspec may take into memory as a whole, as it does with pages of links."""

    async def read(self) -> bytes:
        """The body. Raises ImageError: TOO_LARGE if it is larger than `PAGE_BYTES`."""
        if self._body is None:
            body = await _read(self, 0, PAGE_BYTES + 1)
            check_size(len(body), PAGE_BYTES)
            self._body = body
        return self._body


def is_http(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


async def stat(fs: Any, url: str) -> dict[str, Any]:
    """Size and version of a file in fsspec's form, from the headers of HEAD, or of GET if HEAD is refused."""
    session = await fs.set_session()
    async with session.head(fs.encode_url(url), **_request(fs, AS_IT_IS), allow_redirects=True) as answer:
        if answer.status not in NO_HEAD:
            answer.raise_for_status()
            return _described(answer)
    async with session.get(fs.encode_url(url), **_request(fs, AS_IT_IS)) as answer:
        answer.raise_for_status()
        return _described(answer)


async def get(fs: Any, url: str, start: int, end: int | None, limit: int) -> tuple[bytes, dict[str, Any]]:
    """Bytes `start` to `end` of a file, and its description as `stat`; never reads much beyond `limit`.

    Raises:
        ImageError: TOO_LARGE above `limit` bytes; CONNECTION if the answer ends early.
    """
    headers = dict(AS_IT_IS)
    if start or end is not None:
        headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
    session = await fs.set_session()
    async with session.get(fs.encode_url(url), **_request(fs, headers)) as answer:
        answer.raise_for_status()
        skipped = 0 if answer.status == 206 else start
        wanted = None if end is None else end - start
        if wanted is None and answer.content_length is not None:
            check_size(answer.content_length - skipped, limit)
        data = await _read(answer, skipped, limit + 1 if wanted is None else min(wanted, limit + 1))
        check_size(len(data), limit)
        if wanted is not None and len(data) < wanted:
            raise ImageError(ErrorCode.CONNECTION, f"the answer ended after {len(data)} of {wanted} bytes")
        return data, _described(answer)


async def _read(answer: aiohttp.ClientResponse, skipped: int, most: int) -> bytes:
    data = bytearray()
    async for chunk in answer.content.iter_chunked(CHUNK_BYTES):
        data += chunk[skipped:]
        skipped = max(skipped - len(chunk), 0)
        if len(data) >= most:
            break
    return bytes(data[:most])


def _request(fs: Any, headers: dict[str, str]) -> dict[str, Any]:
    """The options of every request of this file system, with these headers besides."""
    return fs.kwargs | {"headers": dict(fs.kwargs.get("headers", {})) | headers}


def _described(answer: aiohttp.ClientResponse) -> dict[str, Any]:
    size = answer.content_length
    if answer.status == 206:
        total = answer.headers.get("Content-Range", "").rpartition("/")[2]
        size = int(total) if total.isdigit() else None
    description: dict[str, Any] = {"type": "file", "size": size}
    if etag := answer.headers.get("ETag"):
        description["ETag"] = etag
    with suppress(ValueError):  # there is none, or none that can be read
        description["LastModified"] = parsedate_to_datetime(answer.headers.get("Last-Modified", ""))
    return description
