"""Selects images by name and by time of change."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from csflow.inputs.names import SKIPPED_FOLDERS
from csflow.inputs.objects import StoredObject

if TYPE_CHECKING:
    from csflow.config import ListingConfig


@dataclass(frozen=True)
class Selection:
    """Filters of a listing; the default takes everything."""

    include: Sequence[str] = ()
    """Patterns of whole image URIs, one of which must match; `*` matches any text, including slashes."""
    exclude: Sequence[str] = ()
    """Patterns of whole image URIs, none of which may match."""
    since: datetime | None = None
    """Files that were last changed before this time are left out, with all images in them."""
    image_column: str | None = None
    """Path of the column of image bytes in Parquet files; None to find it by its name and type."""
    skip_folders: Sequence[str] = SKIPPED_FOLDERS
    """Patterns of the names of folders that are not looked into."""
    allow_schemes: Sequence[str] = ()
    """Schemes that manifests may name beside those of the inputs."""

    @classmethod
    def of(cls, config: "ListingConfig", **more: Any) -> "Selection":
        """The selection of a job's settings, with more of its fields if the job has settings for them."""
        return cls(
            image_column=config.image_column,
            skip_folders=config.skip_folders,
            allow_schemes=config.allow_schemes,
            **more,
        )

    def takes_name(self, image_uri: str) -> bool:
        def matches(patterns: Sequence[str]) -> bool:
            return any(fnmatchcase(image_uri, pattern) for pattern in patterns)

        return (not self.include or matches(self.include)) and not matches(self.exclude)

    def leaves_out(self, uri: str) -> bool:
        """Whether a pattern of `exclude` names this file or folder (which ends in /)."""
        only = Selection(exclude=self.exclude)
        return not (only.takes_name(uri) and only.takes_name(uri.rstrip("/")))

    def is_recent(self, file: StoredObject) -> bool:
        """Whether a file is wanted by its time. If its time is unknown, it is: better scored than missed."""
        if self.since is None or math.isnan(file.modified_at):
            return True
        return file.modified_at >= self.since.timestamp()


EVERYTHING = Selection()
