"""Which of the images behind an input are wanted: by name and by time of change."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase

from csflow.inputs.objects import StoredObject


@dataclass(frozen=True)
class Selection:
    """Filters of a listing; the default takes everything."""

    include: Sequence[str] = ()
    """Patterns of whole image URIs, of which one must match; `*` stands for any text, slashes too."""
    exclude: Sequence[str] = ()
    """Patterns of which none may match."""
    since: datetime | None = None
    """Files that were last changed before are left out, with all that is in them."""

    def takes_name(self, image_uri: str) -> bool:
        def matches(patterns: Sequence[str]) -> bool:
            return any(fnmatchcase(image_uri, pattern) for pattern in patterns)

        return (not self.include or matches(self.include)) and not matches(self.exclude)

    def is_recent(self, file: StoredObject) -> bool:
        """A file whose time of change is not known counts as recent: better scored than missed."""
        if self.since is None or math.isnan(file.modified_at):
            return True
        return file.modified_at >= self.since.timestamp()


EVERYTHING = Selection()
