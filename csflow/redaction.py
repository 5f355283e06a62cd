"""Keeps secrets out of what a job prints and writes."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"
SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN")

_USERINFO = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/?#\s'\"]*@")
_SECRET_NAME = (
    r"(?:[\w-]*(?:secret|password|passwd|token|signature|credential|accesskey|access_key|account_key)[\w-]*"
    r"|key|sig|sas)"
)
_NAME = re.compile(_SECRET_NAME, re.IGNORECASE)
_VALUE = r"""(?:"[^"]*"|'[^']*'|[^\s&"',;}}\])]+)"""
# `name=value` of a query, and `"name": "value"` of JSON, YAML or Python. Codes such as `ExpiredToken: The …`
# have capitals and stay.
_EQUAL_PAIR = re.compile(rf"""(?<![\w-])(["']?{_SECRET_NAME}["']?\s*=\s*){_VALUE}""", re.IGNORECASE)
_COLON_PAIR = re.compile(rf"""(?<![\w-])(["']?{_SECRET_NAME}["']?\s*:\s*){_VALUE}""")
_QUERY = re.compile(rf"[?&]{_SECRET_NAME}=", re.IGNORECASE)
_PRESIGNED = re.compile(r"[?&]X-Amz-(?:Signature|Credential|Security-Token)=", re.IGNORECASE)


def holds_credentials(url: str) -> bool:
    """Whether a URL holds a user, or a key in its query, as presigned URLs do. Paths never do."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return False
    # Keys in S3 are plain text: `?key=` may be a part of one.
    query = _PRESIGNED if scheme in ("s3", "s3a", "s3n") else _QUERY
    return "@" in re.split(r"[/?#]", rest)[0] or bool(query.search(rest))


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
    text = _USERINFO.sub(rf"\g<1>{HIDDEN}@", text)
    return _COLON_PAIR.sub(rf"\g<1>{HIDDEN}", _EQUAL_PAIR.sub(rf"\g<1>{HIDDEN}", text))
