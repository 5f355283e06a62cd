"""URIs of images and what they lie in: local paths, `s3://` and those of other stores."""

import re


def local_path(uri: str) -> str | None:
    """The path of a local URI (`/data/a.jpg` or `file:///data/a.jpg`), None for a remote one."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    if match is None:
        return uri
    return uri[match.end() :] if match[1] in ("file", "local") else None


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def split_s3(uri: str) -> tuple[str, str]:
    """Bucket and key; plain text after `s3://`, since keys may hold `#`, `?`, `::` and glob characters."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def as_text(name: str) -> str:
    """A name that Arrow can hold: bytes that are not UTF-8 arrive as lone surrogates, and become escapes."""
    return name.encode(errors="backslashreplace").decode()
