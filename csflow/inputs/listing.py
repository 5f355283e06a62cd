"""Lists the images behind the locations that a job is given."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from csflow.errors import OF_CONTENT, ErrorCode, ImageError, WrongUse
from csflow.inputs import archives, containers, folders, inventories, manifests, rows
from csflow.inputs.containers import Containers
from csflow.inputs.local_folders import fixed_part
from csflow.inputs.names import IMAGE_SUFFIXES, Takes, left_out, suffix, takes_of
from csflow.inputs.objects import ObjectStore, StoredObject
from csflow.inputs.parquet_files import ParquetFiles
from csflow.inputs.selection import EVERYTHING, Selection
from csflow.inputs.store_errors import image_error
from csflow.inputs.unlisted import Reason, Unlistable, Unlisted
from csflow.inputs.uris import as_text, is_s3, scheme_of, split_s3
from csflow.storage import refuse_chain

LISTING = pa.schema(
    [
        pa.field("image_uri", pa.string(), nullable=False),
        pa.field("image_version", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("image_modified_at", pa.timestamp("us", tz="UTC")),
    ]
)
"""Schema of a listing. `size_bytes` is 0 if a manifest does not say, and an average for Parquet rows.
`image_modified_at` is null if nothing says when the image was last changed."""

FOUND_SUFFIXES = (*IMAGE_SUFFIXES, *containers.SUFFIXES)
BATCH_ROWS = 10_000
THREADS = 16
DEADLINE_S = 60.0


def list_images(
    inputs: Sequence[str],
    storage_options: Mapping[str, Any],
    selection: Selection = EVERYTHING,
    unlisted: Unlisted | None = None,
) -> Iterator[pa.RecordBatch]:
    """Every selected image behind the inputs, in batches of schema `LISTING`, always in the same order.

    If inputs overlap or a manifest repeats an image, the image appears several times. An archive or Parquet
    file that cannot be listed is one row under its own URI; reading it raises the reason. All inputs are
    looked up before the first image is listed.

    Args:
        unlisted: is told of folders below the inputs, and of manifests and inputs among several, that cannot
            be listed, and of everything that is not taken.

    Raises:
        WrongUse: an input does not exist, is not understood or holds no image (with `since`, it may hold
            none), the only input is refused or damaged, or a manifest names a scheme that it may not.
        ConnectionError: the store failed for longer than the listing retries.
    """
    store = ObjectStore(storage_options, DEADLINE_S)
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(THREADS, thread_name_prefix="listing"))
        listing = _Listing(store, pool, inputs, selection, unlisted or Unlisted())
        stack.callback(listing.close)
        looked_up = [(uri, listing.find(uri)) for uri in inputs]
        found = [(uri, images) for uri, images in looked_up if images is not None]
        yield from _batches(image for uri, images in found for image in listing.selected(uri, images))


def list_table(
    inputs: Sequence[str],
    storage_options: Mapping[str, Any],
    selection: Selection = EVERYTHING,
    unlisted: Unlisted | None = None,
) -> pa.Table:
    """The listing as one table in memory, each URI once, where it is first found; as `list_images`."""
    table = pa.Table.from_batches(list_images(inputs, storage_options, selection, unlisted), LISTING)
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
        with closing(ParquetFiles(store)) as parquet:
            try:
                outline = parquet.outline(file)
                if not manifests.is_manifest(outline.column_names):
                    raise WrongUse(f"{file.uri} has no column {manifests.URI}; name the images in one")
                return [image.uri for image in manifests.read_parquet(file.uri, parquet.manifest(file))]
            except ImageError as failure:
                if failure.code not in OF_CONTENT:
                    raise
                raise WrongUse(f"{file.uri} cannot be read as a manifest: {failure.message}") from None


class _Listing:
    """Finds out what a location is, and lists the images in it."""

    def __init__(
        self,
        store: ObjectStore,
        pool: ThreadPoolExecutor,
        inputs: Sequence[str],
        selection: Selection,
        unlisted: Unlisted,
    ) -> None:
        self._store = store
        self._pool = pool
        self._selection = selection
        self._unlisted = unlisted
        self._is_alone = len(inputs) == 1
        """Whether there is a single input, so that nothing is left to list if it cannot be."""
        self._schemes = {scheme_of(f"{name}://") for name in selection.allow_schemes}
        self._schemes |= set(map(scheme_of, inputs))
        self._parquet = ParquetFiles(store, selection.image_column)
        self._containers = Containers(store, pool, selection, unlisted, self._parquet)

    def close(self) -> None:
        self._parquet.close()

    def find(self, uri: str) -> Iterator[StoredObject] | None:
        """Looks an input up at once, and lists its images lazily; None if it cannot be listed."""
        uri = as_text(uri)
        refuse_chain(uri)
        try:
            with _explaining(uri):
                return self._find(manifests.canonical_uri(uri))
        except (Unlistable, ConnectionError) as error:
            self._fail(uri, error)
            return None

    def selected(self, uri: str, images: Iterator[StoredObject]) -> Iterator[StoredObject]:
        """The images of an input whose names are selected.

        Raises:
            WrongUse: it has no images, nothing failed to be listed, and `since` is not given.
        """
        is_empty = True
        try:
            with _explaining(uri):
                for image in images:
                    is_empty = False
                    if self._selection.takes_name(image.uri):
                        yield image
                    else:
                        self._unlisted.skip(Reason.NOT_SELECTED, suffix(image.uri))
        except (Unlistable, ConnectionError) as error:
            self._fail(uri, error)
        if is_empty and self._selection.since is None and not self._unlisted.failed:
            known = " ".join(FOUND_SUFFIXES)
            raise WrongUse(f"{uri} holds no images ({known}); hidden files and folders do not count")

    def _fail(self, uri: str, error: Exception) -> None:
        """Notes an input that cannot be listed. Raises the error if there is no other input."""
        if self._is_alone:
            raise error
        self._unlisted.fail(uri, _reason(uri, error))

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
            pattern, failed = folders.escaped(self._store, uri), self._unlisted.failed
            files, below = folders.glob(self._store, pattern, self._takes_match(pattern), self._unlisted)
            if not files and not below and failed == self._unlisted.failed:
                raise WrongUse(f"{uri}: nothing matches this pattern; quote it, and check it with a listing")
            return self._read_matches(uri, files, below)
        raise failure

    def _read_named(self, file: StoredObject) -> Iterator[StoredObject]:
        name = file.uri.lower()
        if name.endswith((*IMAGE_SUFFIXES, *archives.SUFFIXES)):
            return self._containers.expand([file])
        if name.endswith(f"/{inventories.NAME}"):
            objects = inventories.read_inventory(self._store, file)
            return self._containers.expand(self._taken(objects))
        if name.endswith(manifests.SUFFIX):
            return self._expand_manifest(file.uri, manifests.read_csv(self._store, file))
        if name.endswith(rows.SUFFIX):
            return self._read_named_parquet(file)
        known = " ".join((*FOUND_SUFFIXES, manifests.SUFFIX))
        raise WrongUse(f"{file.uri} is not named like an input ({known}); rename it or list it in a manifest")

    def _read_named_parquet(self, file: StoredObject) -> Iterator[StoredObject]:
        try:
            outline = self._parquet.outline(file)
        except ImageError as failure:
            if failure.code not in OF_CONTENT:
                raise
            return iter([file])
        if manifests.is_manifest(outline.column_names):
            return self._expand_manifest(
                file.uri, manifests.read_parquet(file.uri, self._parquet.manifest(file))
            )
        if outline.column is None:
            columns = ", ".join(outline.column_names)[:200]
            raise Unlistable(
                f"{file.uri} names no images: of its columns ({columns}) none is {manifests.URI}, or plainly "
                "one of image bytes; name one with --image_column"
            )
        return self._containers.expand([file])

    def _expand_manifest(self, uri: str, images: Iterable[StoredObject]) -> Iterator[StoredObject]:
        allowed = self._allowed(uri, images)
        return self._containers.expand(self._containers.look_up(allowed), in_manifest=True)

    def _allowed(self, manifest: str, images: Iterable[StoredObject]) -> Iterator[StoredObject]:
        """The images, if the manifest may name their schemes: its author decides what the job reads."""
        for image in images:
            if (scheme := scheme_of(image.uri)) not in self._schemes:
                raise WrongUse(
                    f"{manifest} names {image.uri}, whose scheme {scheme} is that of no input; if the "
                    f"manifest may, pass --allow_schemes {scheme}"
                )
            yield image

    def _read_matches(
        self, pattern: str, files: Iterable[StoredObject], below: Iterable[str]
    ) -> Iterator[StoredObject]:
        if pattern.lower().endswith(manifests.SUFFIX):
            for file in files:
                yield from self._noting_failure(file.uri, partial(self._read_named, file))
        else:
            yield from self._containers.expand(files)
        for folder in below:
            yield from self._noting_failure(f"{folder}/", partial(self._walk, folder))

    def _noting_failure(
        self, uri: str, images: Callable[[], Iterator[StoredObject]]
    ) -> Iterator[StoredObject]:
        """The images of one match of a pattern, as far as it can be listed."""
        try:
            with _explaining(uri):
                yield from images()
        except (Unlistable, ConnectionError) as error:
            self._unlisted.fail(uri, _reason(uri, error))

    def _walk(self, uri: str) -> Iterator[StoredObject]:
        takes = self._takes(f"{uri.rstrip('/')}/")
        return self._containers.expand(folders.walk(self._store, self._pool, uri, takes, self._unlisted))

    def _taken(self, objects: Iterable[StoredObject]) -> Iterator[StoredObject]:
        """The objects of an inventory that are taken, by their names below the bucket."""
        for item in objects:
            bucket, key = split_s3(item.uri)
            if not key.endswith("/") and self._takes(f"s3://{bucket}/")(key):
                yield item

    def _takes(self, root: str) -> Takes:
        return takes_of(root, FOUND_SUFFIXES, self._unlisted, tuple(self._selection.skip_folders))

    def _takes_match(self, pattern: str) -> Takes:
        """Takes what matches a pattern: also what is hidden or skipped if the pattern names such a thing."""
        root = fixed_part(pattern)
        skipped = tuple(self._selection.skip_folders)
        suffixes = ("",) if pattern.lower().endswith(manifests.SUFFIX) else FOUND_SUFFIXES
        if left_out(pattern[len(root) :], skipped):
            return takes_of(root, suffixes, self._unlisted, (), ())
        return takes_of(root, suffixes, self._unlisted, skipped)


@contextmanager
def _explaining(uri: str) -> Iterator[None]:
    """Turns failures to list into one line that names the input and the remedy."""
    try:
        yield
    except WrongUse as error:
        raise type(error)(str(error) if uri in str(error) else f"{uri}: {error}") from None
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
        return Unlistable(f"{uri}: access denied ({failure.message}); {remedy}")
    return ConnectionError(f"{uri} cannot be listed: {failure.message}")


def _reason(uri: str, error: Exception) -> str:
    """The message of an error without the name of the input at its start."""
    return str(error).removeprefix(uri).lstrip(": ")


def _batches(images: Iterable[StoredObject]) -> Iterator[pa.RecordBatch]:
    images = iter(images)
    while chunk := list(islice(images, BATCH_ROWS)):
        uris, versions, sizes, seconds = zip(*chunk, strict=True)
        columns = [*map(pa.array, (uris, versions, sizes)), _timestamps(seconds)]
        yield pa.RecordBatch.from_arrays(columns, schema=LISTING)


def _timestamps(seconds: Sequence[float]) -> pa.Array:
    """Times since 1970 as timestamps; null for NaN and for what no calendar has."""
    microseconds = 1e6 * np.array(seconds)
    is_known = np.abs(microseconds) < 2.5e17  # within 8,000 years, which Python's datetime and SQL can hold
    whole = np.where(is_known, microseconds, 0).round().astype(np.int64)
    return pc.cast(pa.array(whole, mask=~is_known), LISTING.field("image_modified_at").type)
