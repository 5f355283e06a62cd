"""Reads and writes whole files in local folders and object stores. No file is ever half visible."""

import io
import itertools
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from csflow.errors import StorageFailed, WrongUse
from csflow.literal_paths import remove_folder
from csflow.parquet import write_parquet

CONFLICT_RETRIES = 5
NO_GCSFS = "install csflow[gcs]"
CHAIN = re.compile(r"[\w+.-]+(://[^:]*)?::[A-Za-z][\w+.-]*://")
"""A URL of several file systems, such as `simplecache::s3://…`: writes to it are not create-only."""
READS_AT_ONCE = 16
"""Number of files that are read at a time where many are to be read."""


def filesystem(
    url: str, storage_options: Mapping[str, Any] | None = None
) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL, and the path inside it.

    Raises:
        WrongUse: a scheme without a driver, or a chain of schemes.
    """
    refuse_chain(url)
    options: dict[str, Any] = {}
    if "://" in url and not url.startswith("file://"):
        # Listings are planning input: a cached one would hide what other processes wrote.
        options = dict(storage_options or {}) | {"use_listings_cache": False}
        # gcsfs's own choice asks by gRPC what kind each bucket is, a minute long where only HTTP is answered.
        for scheme in ("gs", "gcs"):
            fsspec.register_implementation(scheme, "gcsfs.core.GCSFileSystem", clobber=True, errtxt=NO_GCSFS)
    try:
        # In a name, too, fsspec would take `::` for a chain.
        fs, path = fsspec.core.url_to_fs(url.partition("::")[0], **options)
    except (ValueError, ImportError) as error:
        raise WrongUse(f"{url}: {error}") from None
    return fs, path if "::" not in url else str(fs._strip_protocol(url))


def refuse_chain(url: str) -> None:
    """Raises WrongUse for what fsspec calls a chained URL."""
    if CHAIN.match(url):
        raise WrongUse(f"{url} chains file systems (::), which csflow does not; name the store's own URL")


@dataclass(frozen=True)
class Location:
    """A folder or file, local or in an object store. It is small and picklable, so it can go to workers."""

    url: str
    """URL or local path. A path is made absolute, since workers have other working folders."""
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if "://" not in self.url:
            object.__setattr__(self, "url", str(Path(self.url).absolute()))

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "Location":
        return Location(f"{self.url.rstrip('/')}/{name}", self.storage_options)

    @property
    def parent(self) -> "Location":
        return Location(self.url.rstrip("/").rpartition("/")[0] or "/", self.storage_options)

    @property
    def name(self) -> str:
        """The last part of the location's path."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        return filesystem(self.url, self.storage_options)[0]

    @property
    def path(self) -> str:
        """The path inside the file system, without the scheme."""
        return filesystem(self.url, self.storage_options)[1]

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def exists(self) -> bool:
        with _naming(self.url, "looked up"):
            return bool(self.fs.exists(self.path))

    def read(self) -> bytes:
        """The content. Raises FileNotFoundError if there is no such file, StorageFailed if reading fails."""
        with _naming(self.url, "read"):
            return bytes(self.fs.cat_file(self.path))

    def write(self, data: bytes) -> None:
        """Writes a file whole, replacing an existing one. Raises StorageFailed if that fails."""
        with _naming(self.url, "written"):
            if self.is_local:
                temporary = _write_temporary(self.path, data)
                temporary.replace(self.path)
            else:
                self.fs.pipe_file(self.path, data)

    def create(self, data: bytes) -> None:
        """Creates a file whole, or raises FileExistsError if it exists; StorageFailed if that fails.

        Of several writers exactly one succeeds, on one machine or many: by a hard link on local disks, by a
        conditional PUT (If-None-Match) on S3.
        """
        with _naming(self.url, "written"):
            if self.is_local:
                temporary = _write_temporary(self.path, data)
                try:
                    os.link(temporary, self.path)
                finally:
                    temporary.unlink()
            else:
                self._create_remote(data)

    def remove(self) -> None:
        """Removes a file. Raises StorageFailed if that fails."""
        with _naming(self.url, "removed"):
            self.fs.rm_file(self.path)

    def remove_folder(self) -> None:
        """Removes all files below this folder. Raises StorageFailed if that fails."""
        with _naming(self.url, "removed"):
            remove_folder(self.fs, self.path)

    def _create_remote(self, data: bytes) -> None:
        for attempt in itertools.count():
            try:
                self.fs.pipe_file(self.path, data, mode="create")
                return
            except OSError as error:
                status = _http_status(error)
                if status == 412:
                    # The client knows this answer by a detail that not every store sends.
                    raise FileExistsError(f"{self.url} exists") from error
                if status != 409 or attempt == CONFLICT_RETRIES:
                    raise
                # S3 answers 409 while another conditional PUT of the same key is under way.
                time.sleep(0.1 * 2**attempt)

    def _refuses_a_second_create(self) -> bool:
        try:
            self.create(b"")
        except FileExistsError:
            return True
        return False

    def find(self, suffix: str) -> list["Location"]:
        """All files below this folder with this ending, sorted; none if the folder does not exist."""
        return [file.location for file in self.find_details(suffix)]

    def find_details(self, suffix: str) -> list["FoundFile"]:
        """All files below this folder with this ending, sorted, with what the listing says of each."""
        fs, root = filesystem(self.url, self.storage_options)
        with _naming(self.url, "listed"):
            found = _find_local(root) if isinstance(fs, LocalFileSystem) else fs.find(root, detail=True)
            paths = sorted(path for path in found if path.endswith(suffix) and not _is_temporary(path))
            return [
                FoundFile(
                    self / path[len(root.rstrip("/")) + 1 :], _version(found[path]), int(found[path]["size"])
                )
                for path in paths
            ]

    def sizes(self, suffix: str) -> dict[str, int]:
        """Sizes in bytes of all files in this very folder with this ending, by name."""
        fs, root = filesystem(self.url, self.storage_options)
        with _naming(self.url, "listed"):
            found = fs.ls(root, detail=True) if fs.exists(root) else []
        names = ((info["name"].rpartition("/")[2], info["size"]) for info in found if info["type"] == "file")
        return {name: size for name, size in names if name.endswith(suffix) and not _is_temporary(name)}

    def check_writable(self, exclusively: bool = False) -> None:
        """Raises WrongUse if this folder refuses files or, if asked for, does not support `create`."""
        probe = self / f"_writable-{uuid.uuid4().hex}"
        try:
            probe.write(b"")
            is_exclusive = not exclusively or probe._refuses_a_second_create()
            probe.fs.rm_file(probe.path)
        except WrongUse:
            raise
        except Exception as error:
            raise WrongUse(
                f"{self.url} cannot be written to ({_reason(error.__cause__ or error)}); create it or grant "
                "write permission"
            ) from None
        if not is_exclusive:
            raise WrongUse(
                f"{self.url} is in a store without conditional writes (If-None-Match), by which every image "
                "is kept to one row; choose another store"
            )


@dataclass(frozen=True)
class FoundFile:
    """A file, and what a listing says of its content."""

    location: Location
    version: str | None
    """Differs for another content; None if the store's listing has none."""
    size: int
    """In bytes."""

    def read(self) -> bytes:
        """The content by one request. S3's client would first ask for the size."""
        with _naming(self.location.url, "read"):
            fs, path = filesystem(self.location.url, self.location.storage_options)
            return bytes(fs.cat_file(path, start=0, end=self.size)) if self.size else b""


def to_parquet(table: pa.Table) -> bytes:
    """A Parquet file in memory, so that its size is known and it is published whole."""
    buffer = io.BytesIO()
    write_parquet(table, buffer)
    return buffer.getvalue()


def read_parquet(location: Location, schema: pa.Schema | None = None) -> pa.Table:
    """A whole Parquet file; raises pa.ArrowException if it is damaged or of another schema."""
    data = io.BytesIO(location.read())
    try:
        return pq.read_table(data, schema=schema)
    except OSError as error:  # which is what pyarrow raises for some damage
        raise pa.ArrowInvalid(str(error)) from error


def read_all(files: Iterable[FoundFile]) -> Iterator[bytes]:
    """The contents of many files in their order, a few of which are read at a time."""
    waiting = iter(files)
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        while some := list(itertools.islice(waiting, READS_AT_ONCE)):
            yield from pool.map(FoundFile.read, some)


def _find_local(folder: str) -> dict[str, dict[str, Any]]:
    """All files below a folder. Raises errors of unreadable folders, which fsspec would hide."""

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    found: dict[str, dict[str, Any]] = {}
    for parent, _, names in os.walk(folder, onerror=fail):
        for path in (f"{parent}/{name}" for name in names):
            with suppress(FileNotFoundError):  # a temporary file that has its final name now
                status = Path(path).lstat()
                found[path] = {"size": status.st_size, "mtime": status.st_mtime_ns}
    return found


def _version(info: Mapping[str, Any]) -> str | None:
    """What a listing says of a file's content: a tag of the store, or size and time of a local file."""
    tag = info.get("ETag") or info.get("etag")
    if tag:
        return str(tag)
    return f"{info['size']} {info['mtime']}" if isinstance(info.get("mtime"), int) else None


@contextmanager
def _naming(url: str, done: str) -> Iterator[None]:
    """Adds the file's name to errors that need it, which may be any errors of a store's client."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, NotADirectoryError, WrongUse):
        raise
    except Exception as error:
        raise StorageFailed(
            f"{url} cannot be {done} ({_reason(error)}); the same command continues"
        ) from error


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _http_status(error: OSError) -> int | None:
    response = getattr(error.__cause__, "response", None) or {}
    status: int | None = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status


def _write_temporary(path: str, data: bytes) -> Path:
    """Writes to disk beside the final file, under a name that no reader takes for data."""
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        # Not the error that says that the target exists.
        raise NotADirectoryError(f"{target.parent} is a file, a folder is needed") from None
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _is_temporary(path: str) -> bool:
    name = path.rpartition("/")[2]
    return name.startswith((".", "_writable-"))
