"""Lists the images in archives and Parquet files among other files; several of them are open at once."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import islice

from csflow.errors import ImageError
from csflow.inputs import archives, rows
from csflow.inputs.names import IMAGE_SUFFIXES, Takes, suffix, takes_of
from csflow.inputs.objects import UNKNOWN_VERSION, ObjectStore, StoredObject
from csflow.inputs.parquet_files import ParquetFiles
from csflow.inputs.selection import Selection
from csflow.inputs.unlisted import Reason, Unlisted

SUFFIXES = (*archives.SUFFIXES, rows.SUFFIX)
OPENED_AT_ONCE = 32
INDEXES_KEPT = 4


class Containers:
    """Opens archives and Parquet files."""

    def __init__(
        self,
        store: ObjectStore,
        pool: ThreadPoolExecutor,
        selection: Selection,
        unlisted: Unlisted,
        parquet: ParquetFiles,
    ) -> None:
        self._store = store
        self._parquet = parquet
        self._pool = pool
        self._selection = selection
        self._unlisted = unlisted
        self._index = lru_cache(INDEXES_KEPT)(self._read_index)
        self._unindexed: set[str] = set()

    def expand(self, files: Iterable[StoredObject], in_manifest: bool = False) -> Iterator[StoredObject]:
        """Yields images, and in place of archives and Parquet files the images in them.

        A container that cannot be opened stays as it is: reading it raises the reason.
        """
        # Before anything is opened: an old archive costs nothing.
        files = filter(self._is_recent, files)
        while chunk := list(islice(files, OPENED_AT_ONCE)):
            opened: list[StoredObject | Future[Iterable[StoredObject]]] = [
                self._pool.submit(self._open, file, in_manifest) if _needs_look(file) else file
                for file in chunk
            ]
            for item in opened:
                if isinstance(item, Future):
                    yield from item.result()
                else:
                    yield item

    def look_up(self, images: Iterable[StoredObject]) -> Iterator[StoredObject]:
        """Looks up the versions of archive members and Parquet rows in a manifest, which only an index knows.

        If a container cannot be indexed, one row for it replaces all that the manifest names in it.
        """
        for image in images:
            part = archives.split_member(image.uri) or rows.split_row(image.uri)
            if part is None or image.version != UNKNOWN_VERSION:
                yield image
                continue
            index = self._index(part[0])
            if index is not None:
                yield index(image.uri)
            elif part[0] not in self._unindexed:
                self._unindexed.add(part[0])
                yield StoredObject(part[0], UNKNOWN_VERSION, 0)

    def _is_recent(self, file: StoredObject) -> bool:
        if self._selection.is_recent(file):
            return True
        self._unlisted.skip(Reason.NOT_SELECTED, suffix(file.uri))
        return False

    def _open(self, file: StoredObject, in_manifest: bool) -> Iterable[StoredObject]:
        try:
            if in_manifest:
                file = self._store.stat(file.uri)
                if not self._is_recent(file):
                    return []
            images = self._read(file, self._takes_member(file.uri))
        except ImageError:
            return [file]
        if images is not None:
            return images
        if in_manifest:
            return [file]  # what a manifest names must be accounted for
        self._unlisted.skip(Reason.NO_IMAGE_COLUMN, suffix(file.uri))
        return []

    def _read(self, file: StoredObject, takes: Takes) -> Iterable[StoredObject] | None:
        """The images in a container, or the file itself; None for a Parquet file without image bytes."""
        name = file.uri.lower()
        if name.endswith(archives.SUFFIXES):
            return archives.list_members(self._store, file, takes, self._skip_link)
        if not name.endswith(rows.SUFFIX):
            return [file]
        outline = self._parquet.outline(file)
        return outline.images(file) if outline.column else None

    def _skip_link(self, name: str) -> None:
        self._unlisted.skip(Reason.NO_REGULAR_FILE, suffix(name))

    def _takes_member(self, archive: str) -> Takes:
        # Only dots hide members: cameras write `_DSC0001.JPG`, macOS adds `__MACOSX/._DSC0001.JPG`.
        skipped = tuple(self._selection.skip_folders)
        return takes_of(
            f"{archive}{archives.SEPARATOR}", IMAGE_SUFFIXES, self._unlisted, skipped, folder_marks=(".",)
        )

    def _read_index(self, uri: str) -> Callable[[str], StoredObject] | None:
        """Finds the image of a URI in a container; None if the container cannot be indexed.

        What is not in it has the container's version, so that reading it tells what is wrong.
        """
        find: Callable[[str], StoredObject | None]
        try:
            file = self._store.stat(uri)
            if uri.lower().endswith(rows.SUFFIX):
                find = partial(self._parquet.outline(file).find, file)
            else:
                images = archives.list_members(self._store, file, lambda name: True)
                find = {image.uri: image for image in images}.get
        except ImageError:
            return None
        return lambda image_uri: find(image_uri) or StoredObject(image_uri, file.version, 0)


def _needs_look(file: StoredObject) -> bool:
    return file.version == UNKNOWN_VERSION or file.uri.lower().endswith(SUFFIXES)
