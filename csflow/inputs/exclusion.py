"""Images to leave out: named by manifests, or by patterns of their URIs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from csflow.inputs import manifests, rows
from csflow.inputs.listing import list_names
from csflow.inputs.selection import Selection


@dataclass(frozen=True)
class Exclusion:
    """The images to leave out."""

    patterns: Sequence[str]
    """Patterns of whole image URIs, as in a `Selection`."""
    manifests: Mapping[str, frozenset[str]]
    """Image URIs by the manifest that names them."""

    def leave_out(self, images: pa.Table) -> pa.Table:
        """The rows of a listing that are neither named nor matched."""
        named: set[str] = set().union(*self.manifests.values())
        selection = Selection(exclude=self.patterns)
        uris = images["image_uri"].to_pylist()
        return images.filter(
            pa.array((uri not in named and selection.takes_name(uri) for uri in uris), pa.bool_())
        )

    def leaves_out(self, uri: str) -> bool:
        """Whether a pattern names this file or folder (which ends in /)."""
        return Selection(exclude=self.patterns).leaves_out(uri)

    def warnings(self, images: pa.Table) -> Iterator[str]:
        """A line for each manifest and pattern that does less than it says."""
        uris = images["image_uri"].to_pylist()
        listed, first = set(uris), next(iter(uris), "none")
        for manifest, named in self.manifests.items():
            unknown = sorted(named - listed)
            if len(unknown) == len(named):
                example = f"named {unknown[0]}, " if unknown else ""
                yield (
                    f"--exclude {manifest} names no image of the input; write URIs as listed ({example}"
                    f"listed {first})"
                )
            elif unknown:
                yield (
                    f"--exclude {manifest}: {len(unknown):,} of its {len(named):,} images are not in the "
                    f"input, {unknown[0]} first"
                )
        for pattern in self.patterns:
            if all(map(Selection(exclude=[pattern]).takes_name, uris)):
                yield f"--exclude {pattern} matches no whole URI of the input, such as {first}"


def read_exclusion(entries: Sequence[str], storage_options: Mapping[str, Any]) -> Exclusion:
    """Reads `--exclude`. An entry that ends like a manifest's name is a manifest, any other is a pattern.

    Raises:
        WrongUse: a manifest does not exist, is refused or is not one.
        ConnectionError: the store failed for longer than a listing retries.
    """
    named = [entry for entry in entries if entry.lower().endswith((manifests.SUFFIX, rows.SUFFIX))]
    return Exclusion(
        [entry for entry in entries if entry not in named],
        {manifest: frozenset(list_names(manifest, storage_options)) for manifest in named},
    )
