"""Cuts a list of images into shards that are named by their content."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True)
class Shard:
    """The unit of work: a few hundred images whose result is one file."""

    name: str
    image_uris: tuple[str, ...]
    image_versions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.image_uris)


def cut(image_uris: Sequence[str], image_versions: Sequence[str], size: int) -> Iterator[Shard]:
    """Cuts consecutive images into shards of `size`; the same images give the same names."""
    for start in range(0, len(image_uris), size):
        uris = tuple(image_uris[start : start + size])
        versions = tuple(image_versions[start : start + size])
        yield Shard(fingerprint(uris, versions)[:32], uris, versions)


def listing_fingerprint(images: pa.Table) -> str:
    """A hash of listed image versions, and of their parts and groups if the table has them."""
    columns = ["image_uri", "image_version", *(n for n in ("part", "group") if n in images.schema.names)]
    return fingerprint(*(images[name].fill_null("").to_pylist() for name in columns))


def fingerprint(*columns: Sequence[str]) -> str:
    """A hash of a list of image versions, or of other rows of texts, in hexadecimal."""
    digest = hashlib.sha256()
    for image in zip(*columns, strict=True):
        # Lengths first: no two lists run together to the same bytes.
        for part in image:
            data = part.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
