"""Lists the images behind the locations that a job is given."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from csflow.errors import ErrorCode, ImageError, WrongUse
from csflow.inputs import archives, folders, inventories, manifests, rows
from csflow.inputs.folders import is_hidden
from csflow.inputs.objects import UNKNOWN_VERSION, ObjectStore, StoredObject
from csflow.inputs.selection import EVERYTHING, Selection
from csflow.inputs.store_errors import image_error
from csflow.inputs.uris import is_s3, split_s3

LISTING = pa.schema(
    [
        pa.field("image_uri", pa.string(), nullable=False),
        pa.field("image_version", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
    ]
)
"""Schema of a listing. `size_bytes` is 0 if a manifest does not say, and an average for Parquet rows."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
CONTAINER_SUFFIXES = (*archives.SUFFIXES, rows.SUFFIX)
BATCH_ROWS = 10_000
THREADS = 16
CONTAINERS_AT_ONCE = 32
INDEXES_KEPT = 4
DEADLINE_S = 60.0


def list_images(
    inputs: Sequence[str], storage_options: Mapping[str, Any], selection: Selection = EVERYTHING
) -> Iterator[pa.RecordBatch]:
    """Every selected image behind the inputs, in batches of schema `LISTING`, always in the same order.

    If inputs overlap or a manifest repeats an image, the image appears several times. An archive or Parquet
    file that cannot be listed is one row under its own URI; reading it raises the reason. All inputs are
    looked up before the first image is listed.

    Raises:
        WrongUse: an input does not exist, is refused, is not understood or holds no image. With `since`, it
            may hold none.
        ConnectionError: the store failed for longer than the listing retries.
    """
    store = ObjectStore(storage_options, DEADLINE_S)
    with ThreadPoolExecutor(THREADS, thread_name_prefix="listing") as pool:
        listing = _Listing(store, pool, selection)
        found = [(uri, listing.find(uri)) for uri in inputs]
        images = (image for uri, images in found for image in _some(uri, images, selection))
        yield from _batches(image for image in images if selection.takes_name(image.uri))


def list_table(inputs: Sequence[str], storage_options: Mapping[str, Any]) -> pa.Table:
    """The listing as one table in memory, each URI once, where it is first found; raises as `list_images`."""
    table = pa.Table.from_batches(list_images(inputs, storage_options), LISTING)
    _, first = np.unique(table["image_uri"].to_pylist(), return_index=True)
    return table.take(np.sort(first))


def list_names(manifest: str, storage_options: Mapping[str, Any]) -> list[str]:
    """The URIs of the images that a manifest names, whether or not they exist.

    Raises:
        WrongUse: the manifest does not exist, is refused or is not one.
        ConnectionError: as `list_images`.
    """
    store = ObjectStore(storage_options, DEADLINE_S)
    with _explaining(manifest):
        file = store.stat(manifests.canonical_uri(manifest))
        if file.uri.lower().endswith(manifests.SUFFIX):
            return [image.uri for image in manifests.read_csv(store, file)]
        try:
            parquet = rows.open_parquet(store, file)
        except ImageError as failure:
            if failure.code != ErrorCode.CORRUPT:
                raise
            raise WrongUse(f"{file.uri} cannot be read as a manifest: {failure.message}") from None
        if not manifests.is_manifest(parquet.schema_arrow):
            raise WrongUse(f"{file.uri} has no column {manifests.URI}; name the images in one")
        return [image.uri for image in manifests.read_parquet(file.uri, parquet)]


class _Listing:
    """Finds out what a location is, and lists the images in it and in its archives and tables."""

    def __init__(self, store: ObjectStore, pool: ThreadPoolExecutor, selection: Selection) -> None:
        self._store = store
        self._pool = pool
        self._is_recent = selection.is_recent
        self._index = lru_cache(INDEXES_KEPT)(self._read_index)
        self._unindexed: set[str] = set()

    def find(self, uri: str) -> Iterator[StoredObject]:
        """Looks an input up at once, and lists its images lazily."""
        with _explaining(uri):
            return self._find(manifests.canonical_uri(uri))

    def _find(self, uri: str) -> Iterator[StoredObject]:
        failure = ImageError(ErrorCode.NOT_FOUND, "there is nothing below it")
        if not uri.endswith("/") and not (is_s3(uri) and not split_s3(uri)[1]):
            try:
                return self._read_named(self._store.stat(uri))
            except ImageError as error:
                # S3 refuses an object that it may not show, even if there is none but a folder.
                if error.code not in (ErrorCode.NOT_FOUND, ErrorCode.PERMISSION_DENIED):
                    raise
                failure = error
        # What is there by this very name is meant, even if the name is a pattern too.
        if folders.is_folder(self._store, uri):
            return self._walk(uri)
        if folders.is_pattern(uri):
            files, below = folders.glob(self._store, folders.escaped(self._store, uri))
            if not files and not below:
                raise WrongUse(f"{uri}: nothing matches this pattern; quote it, and check it with a listing")
            return self._read_matches(uri, files, below)
        raise failure

    def _read_named(self, file: StoredObject) -> Iterator[StoredObject]:
        name = file.uri.lower()
        if name.endswith((*IMAGE_SUFFIXES, *archives.SUFFIXES)):
            return self._expand([file])
        if name.endswith(f"/{inventories.NAME}"):
            objects = inventories.read_inventory(self._store, file)
            return self._expand(item for item in objects if _is_found(item.uri) and not is_hidden(item.uri))
        if name.endswith(manifests.SUFFIX):
            return self._expand(self._look_up(manifests.read_csv(self._store, file)), in_manifest=True)
        if name.endswith(rows.SUFFIX):
            return self._read_named_parquet(file)
        known = " ".join((*IMAGE_SUFFIXES, *CONTAINER_SUFFIXES, manifests.SUFFIX))
        raise WrongUse(f"{file.uri} is not named like an input ({known}); rename it or list it in a manifest")

    def _read_named_parquet(self, file: StoredObject) -> Iterator[StoredObject]:
        try:
            parquet = rows.open_parquet(self._store, file)
        except ImageError as failure:
            if failure.code != ErrorCode.CORRUPT:
                raise
            return iter([file])
        if manifests.is_manifest(parquet.schema_arrow):
            images = manifests.read_parquet(file.uri, parquet)
            return self._expand(self._look_up(images), in_manifest=True)
        if rows.image_column(parquet.schema_arrow) is None:
            columns = f"a column {manifests.URI}, or one of image bytes named {' '.join(rows.COLUMN_NAMES)}"
            raise WrongUse(f"{file.uri} names no images; give it {columns}")
        return self._expand([file])

    def _read_matches(
        self, pattern: str, files: Iterable[StoredObject], below: Iterable[str]
    ) -> Iterator[StoredObject]:
        if pattern.lower().endswith(manifests.SUFFIX):
            for file in files:
                yield from self._read_named(file)
        else:
            yield from self._expand(file for file in files if _is_found(file.uri))
        for folder in below:
            yield from self._walk(folder)

    def _walk(self, uri: str) -> Iterator[StoredObject]:
        return self._expand(folders.walk(self._store, self._pool, uri, _is_found))

    def _expand(self, files: Iterable[StoredObject], in_manifest: bool = False) -> Iterator[StoredObject]:
        """Yields images, and the images in archives and Parquet files, several of which are open at once."""
        # Before anything is opened: an old archive costs nothing.
        files = filter(self._is_recent, files)
        while chunk := list(islice(files, CONTAINERS_AT_ONCE)):
            opened: list[StoredObject | Future[list[StoredObject]]] = [
                self._pool.submit(self._open, file, in_manifest) if _needs_look(file) else file
                for file in chunk
            ]
            for item in opened:
                if isinstance(item, Future):
                    yield from item.result()
                else:
                    yield item

    def _open(self, file: StoredObject, in_manifest: bool) -> list[StoredObject]:
        try:
            if in_manifest:
                file = self._store.stat(file.uri)
                if not self._is_recent(file):
                    return []
            images = self._read_container(file, _is_image_member)
        except ImageError:
            return [file]
        if images is None:
            # Tables beside images are common; but what a manifest names must be accounted for.
            return [file] if in_manifest else []
        return images

    def _read_container(
        self, file: StoredObject, is_wanted: Callable[[str], bool]
    ) -> list[StoredObject] | None:
        name = file.uri.lower()
        if name.endswith(archives.SUFFIXES):
            return archives.list_members(self._store, file, is_wanted)
        return rows.list_rows(self._store, file) if name.endswith(rows.SUFFIX) else [file]

    def _look_up(self, images: Iterable[StoredObject]) -> Iterator[StoredObject]:
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
                yield index.get(image.uri, image)
            elif part[0] not in self._unindexed:
                self._unindexed.add(part[0])
                yield StoredObject(part[0], UNKNOWN_VERSION, 0)

    def _read_index(self, uri: str) -> dict[str, StoredObject] | None:
        try:
            images = self._read_container(self._store.stat(uri), lambda name: True)
        except ImageError:
            return None
        return {image.uri: image for image in images or ()}


def _is_found(name: str) -> bool:
    return name.lower().endswith((*IMAGE_SUFFIXES, *CONTAINER_SUFFIXES))


def _is_image_member(name: str) -> bool:
    # Only dots hide members: cameras write `_DSC0001.JPG`, macOS adds `__MACOSX/._DSC0001.JPG`.
    return name.lower().endswith(IMAGE_SUFFIXES) and not folders.is_hidden(name, folder_marks=(".",))


def _needs_look(file: StoredObject) -> bool:
    return file.version == UNKNOWN_VERSION or file.uri.lower().endswith(CONTAINER_SUFFIXES)


def _some(uri: str, images: Iterable[StoredObject], selection: Selection) -> Iterator[StoredObject]:
    """The images of an input. Raises WrongUse if it has none and `since` is not given."""
    is_empty = True
    with _explaining(uri):
        for image in images:
            is_empty = False
            yield image
        if is_empty and selection.since is None:
            known = " ".join((*IMAGE_SUFFIXES, *CONTAINER_SUFFIXES))
            raise WrongUse(f"{uri} holds no images ({known}); hidden files and folders do not count")


@contextmanager
def _explaining(uri: str) -> Iterator[None]:
    """Turns failures to list into one line that names the input and the remedy."""
    try:
        yield
    except WrongUse as error:
        raise WrongUse(str(error) if uri in str(error) else f"{uri}: {error}") from None
    except (ImageError, OSError) as error:
        raise _explained(uri, image_error(error)) from None


def _explained(uri: str, failure: ImageError) -> Exception:
    if failure.code == ErrorCode.NOT_FOUND:
        if "NoSuchBucket" in failure.message:
            bucket = split_s3(manifests.canonical_uri(uri))[0]
            return WrongUse(f"{uri}: bucket {bucket} does not exist; check its name and AWS_ENDPOINT_URL")
        return WrongUse(f"{uri} does not exist; check the spelling ({failure.message})")
    if failure.code == ErrorCode.PERMISSION_DENIED:
        remedy = "grant s3:ListBucket and s3:GetObject" if is_s3(uri) else "grant read permission"
        return WrongUse(f"{uri}: access denied ({failure.message}); {remedy}")
    return ConnectionError(f"{uri} cannot be listed: {failure.message}")


def _batches(images: Iterable[StoredObject]) -> Iterator[pa.RecordBatch]:
    images = iter(images)
    while chunk := list(islice(images, BATCH_ROWS)):
        columns = [pa.array(values) for values in zip(*(image[:3] for image in chunk), strict=True)]
        yield pa.RecordBatch.from_arrays(columns, schema=LISTING)
