"""Keeps secrets out of what a job prints and writes."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"
SECRET_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_CLIENT_SECRET",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "RAY_AUTH_TOKEN",
)

_USERINFO = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^/?#\s'\"]*)@")
_LONG_USERINFO = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]*://)(?!arn:)([^/?#@:\s'\"]+:(?!\d*(?:[/?#\s'\"]|$))[^@\s'\"]*)@"
)
"""A user whose password has slashes, as keys of AWS may have; `host:8080/path@2x.png` is none."""
_CONTAINER = re.compile(r"(?:abfss?|az|wasbs?)://[a-z0-9$-]+@", re.IGNORECASE)
"""Azure's own form of a URI, `abfs://container@account.dfs.core.windows.net/…`, names no user."""
_SECRET_NAME = (
    r"(?:[\w-]*(?:secret|password|passwd|token|signature|credential|passphrase"
    r"|(?:access|account|private|api)[_-]?key|connection[_-]?string)[\w-]*"
    r"|key|sig|sas|pwd)"
)
_NAME = re.compile(_SECRET_NAME, re.IGNORECASE)
_VALUE = r"""(?:"[^"]*"|'[^']*'|[^\s&"',;}}\])]+)"""
# `name=value` of a query, and `"name": "value"` of JSON, YAML or Python. Codes such as `ExpiredToken: The …`
# have capitals and stay.
_EQUAL_PAIR = re.compile(rf"""(?<![\w-])(["']?{_SECRET_NAME}["']?\s*=\s*){_VALUE}""", re.IGNORECASE)
_COLON_PAIR = re.compile(rf"""(?<![\w-])(["']?{_SECRET_NAME}["']?\s*:\s*){_VALUE}""")
_CAPITAL_PAIR = re.compile(
    rf"""(?<![\w-])(["']?(?:SecretAccessKey|SessionToken|(?:Account|Private|Api|Shared\w*)Key|Password"""
    rf"""|ConnectionString)["']?\s*:\s*){_VALUE}"""
)
_BEARER = re.compile(r"\b(Bearer|SharedKey|Basic)(\s+)[\w.~+/=:-]{6,}")
_PEM = re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(?=-----END|\Z)", re.DOTALL)
_QUERY = re.compile(rf"[?&]{_SECRET_NAME}=", re.IGNORECASE)
_PRESIGNED = re.compile(r"[?&]X-Amz-(?:Signature|Credential|Security-Token)=", re.IGNORECASE)


def holds_credentials(url: str) -> bool:
    """Whether a URL holds a user, or a key in its query, as presigned URLs do. Paths never do."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return False
    # Keys in S3 are plain text: `?key=` may be a part of one.
    query = _PRESIGNED if scheme in ("s3", "s3a", "s3n") else _QUERY
    has_user = "@" in re.split(r"[/?#]", rest)[0] and not _CONTAINER.match(url)
    has_user = has_user or bool(_LONG_USERINFO.match(url))
    return has_user or bool(query.search(rest))


def secret_values(options: Mapping[str, Any]) -> Iterator[str]:
    """Values of storage options, also nested ones, whose names say that they are secret."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from secret_values(value)
        elif isinstance(value, str) and _NAME.fullmatch(name):
            yield value


def redact(text: str, options: Mapping[str, Any] | None = None) -> str:
    """The message without secrets of the environment and of storage options, and what looks like secrets."""
    known = [*secret_values(options or {}), *(os.environ.get(name, "") for name in SECRET_VARIABLES)]
    # Shorter ones would hide syllables of other words; as values of a name they are found below.
    for value in sorted((v for v in known if len(v) >= 6), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    text = _USERINFO.sub(_without_user, text)
    text = _LONG_USERINFO.sub(_without_user, text)
    text = _BEARER.sub(rf"\g<1>\g<2>{HIDDEN}", _PEM.sub(rf"\g<1>{HIDDEN}", text))
    for pair in (_EQUAL_PAIR, _COLON_PAIR, _CAPITAL_PAIR):
        text = pair.sub(rf"\g<1>{HIDDEN}", text)
    return text


def _without_user(found: re.Match[str]) -> str:
    return found[0] if _CONTAINER.fullmatch(found[0]) else f"{found[1]}{HIDDEN}@"
