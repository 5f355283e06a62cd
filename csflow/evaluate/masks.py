"""Reading the masks of defects: images whose nonzero pixels are defective."""

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csflow.errors import ErrorCode, ImageError
from csflow.images import decode
from csflow.inputs import archives
from csflow.inputs.objects import ObjectStore
from csflow.inputs.reading import ImageReader

DEADLINE_S = 60.0
"""Seconds during which transient failures of one mask are tried again."""


class MaskReader:
    """Reads masks from files, objects and members of archives. Threads may share it."""

    def __init__(self, storage_options: Mapping[str, Any]) -> None:
        self._store = ObjectStore(storage_options, DEADLINE_S)
        self._reader = ImageReader(storage_options, DEADLINE_S)
        self._indexes: dict[str, dict[str, str]] = {}
        self._lock = threading.Lock()

    def read(self, mask_uri: str) -> NDArray[np.bool_]:
        """The mask in its own resolution, shape (height, width).

        Raises:
            ImageError: it cannot be read or decoded; NOT_FOUND if there is none.
        """
        pixels_HWC = decode(self._reader.read(mask_uri, self._version(mask_uri))).pixels_HWC
        return pixels_HWC.max(axis=2) > 0

    def _version(self, uri: str) -> str:
        member = archives.split_member(uri)
        if member is None:
            return self._store.stat(uri).version
        version = self._index(member[0]).get(uri)
        if version is None:
            raise ImageError(ErrorCode.NOT_FOUND, "the archive has no such member")
        return version

    def _index(self, archive_uri: str) -> dict[str, str]:
        with self._lock:
            if archive_uri not in self._indexes:
                archive = self._store.stat(archive_uri)
                members = archives.list_members(self._store, archive, lambda name: True)
                self._indexes[archive_uri] = {member.uri: member.version for member in members}
            return self._indexes[archive_uri]
