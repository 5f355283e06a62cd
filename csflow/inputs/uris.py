"""Parses URIs of images and files: local paths, `s3://` and those of other stores."""

import os
import re
from typing import Any

SAME_SCHEMES = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "abfss": "abfs", "az": "abfs", "local": "file"}


def local_path(uri: str) -> str | None:
    """The path of a local URI (`/data/a.jpg` or `file:///data/a.jpg`); None for a remote URI."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    if match is None:
        return uri
    return uri[match.end() :] if match[1] in ("file", "local") else None


def scheme_of(uri: str) -> str:
    """The scheme of a URI in lower case, `file` for a local path; schemes of one store are one."""
    scheme = "file" if local_path(uri) is not None else uri.partition("://")[0].lower()
    return SAME_SCHEMES.get(scheme, scheme)


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def split_s3(uri: str) -> tuple[str, str]:
    """Bucket and key of an `s3://` URI. The key is plain text, which may hold `#`, `?`, `::` and `*`."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def root_of(uri: str) -> str:
    """Scheme and host of a remote URI: `ftp://host:2121` of `ftp://host:2121/a/b.png`."""
    scheme, _, rest = uri.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


def path_in(fs: Any, uri: str) -> str:
    """The path of a remote URI in its fsspec file system; its driver might drop `#…` or `//` from names."""
    root = root_of(uri)
    return f"{_path_of_root(fs, root)}/{uri[len(root) + 1 :]}"


def uri_of(fs: Any, root: str, path: str) -> str:
    """The inverse of `path_in`, whose `root` drivers forget: `unstrip_protocol` gives `ftp:///a/b.png`."""
    return f"{root}/{path[len(_path_of_root(fs, root)) + 1 :]}"


def _path_of_root(fs: Any, root: str) -> str:
    path: str = fs._strip_protocol(f"{root}/")
    return path.rstrip("/")


def resolve(folder: str, path: str) -> str:
    """The remote URI of a path that is relative to a remote folder, by RFC 3986, 5.2.4: `//` stays."""
    root = root_of(folder)
    parts = folder[len(root) + 1 :].split("/") if len(folder) > len(root) else []
    for part in path.split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part != ".":
            parts.append(part)
    return "/".join([root, *parts])


def on_disk(path: str) -> str:
    """The inverse of `as_text` for a local path; a path that has such escapes by name stays."""
    escape = r"\\udc([89a-f][0-9a-f])"
    if not re.search(escape, path) or os.path.lexists(path):
        return path
    return re.sub(escape, lambda found: chr(0xDC00 + int(found[1], 16)), path)


def as_text(name: str) -> str:
    """The name with lone surrogates (bytes that are not UTF-8) escaped, so that Arrow can hold it."""
    return name.encode(errors="backslashreplace").decode()
