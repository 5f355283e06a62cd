"""Parses URIs of images and files: local paths, `s3://` and those of other stores."""

import re


def local_path(uri: str) -> str | None:
    """The path of a local URI (`/data/a.jpg` or `file:///data/a.jpg`); None for a remote URI."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    if match is None:
        return uri
    return uri[match.end() :] if match[1] in ("file", "local") else None


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def split_s3(uri: str) -> tuple[str, str]:
    """Bucket and key of an `s3://` URI. The key is plain text, which may hold `#`, `?`, `::` and `*`."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def as_text(name: str) -> str:
    """The name with lone surrogates (bytes that are not UTF-8) escaped, so that Arrow can hold it."""
    return name.encode(errors="backslashreplace").decode()
