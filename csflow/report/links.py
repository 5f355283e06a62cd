"""Makes the links of a report's images: from a template, or presigned by their object store."""

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from csflow.errors import WrongUse
from csflow.storage import Location

PLACEHOLDERS = ("{uri}", "{path}")
# Parts of a file have no address of their own: members of archives (`a.tar!/b.png`), rows (`a.parquet#3`).
_PART_OF_A_FILE = re.compile(r"!/|#\d+$")


def check_template(template: str) -> str:
    """The template itself. Raises ValueError if it makes no links, or others than of the web."""
    if not re.match(r"https?://", template):
        raise ValueError("a link must begin with https:// or http://")
    unknown = [name for name in re.findall(r"{[^}]*}", template) if name not in PLACEHOLDERS]
    if unknown:
        raise ValueError(f"{unknown[0]} is no placeholder of a link; use {' or '.join(PLACEHOLDERS)}")
    if not any(name in template for name in PLACEHOLDERS):
        raise ValueError("a link needs the placeholder {uri} or {path}, or all images have the same one")
    return template


def links(
    image_uris: Sequence[str],
    template: str | None,
    presign_hours: float | None,
    storage_options: Mapping[str, Any],
) -> list[str | None]:
    """The address of each image; None for those that have none.

    Raises:
        WrongUse: both ways are asked for, or no image is an object in a store that presigns.
    """
    if template and presign_hours:
        raise WrongUse("--link and --presign_hours make different links; give one of them")
    if template:
        return [_filled(template, uri) for uri in image_uris]
    if not presign_hours:
        return [None] * len(image_uris)
    signed = [_presigned(uri, presign_hours, storage_options) for uri in image_uris]
    if image_uris and not any(signed):
        raise WrongUse(
            "--presign_hours: no shown image is an object in a store that presigns, "
            f"{image_uris[0]} for one; use --link"
        )
    return signed


def _filled(template: str, uri: str) -> str:
    path = re.sub(r"^[a-z][a-z0-9+.-]*://|^/", "", uri)
    # In one pass: an image may be called {path}.
    values = {"{uri}": quote(uri, safe=""), "{path}": quote(path, safe="/")}
    return re.sub("|".join(map(re.escape, values)), lambda found: values[found[0]], template)


def _presigned(uri: str, hours: float, storage_options: Mapping[str, Any]) -> str | None:
    location = Location(uri, storage_options)
    if location.is_local or _PART_OF_A_FILE.search(uri):
        return None
    try:
        return str(location.fs.sign(location.path, expiration=round(3600 * hours)))
    except NotImplementedError:  # fsspec's answer for stores that cannot
        return None
