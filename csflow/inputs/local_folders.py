"""Walks local folders and glob patterns. What cannot be read is reported, and the walk goes on."""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from fsspec.utils import glob_translate

from csflow.errors import WrongUse
from csflow.inputs.names import Takes, suffix
from csflow.inputs.objects import UNKNOWN_VERSION, StoredObject, local_version
from csflow.inputs.store_errors import image_error
from csflow.inputs.unlisted import Reason, Unlisted
from csflow.inputs.uris import as_text

FIXED_PART = re.compile(r"[^*?\[]*/")


def walk(root: str, takes: Takes, unlisted: Unlisted) -> Iterator[StoredObject]:
    """The files below a folder, in the order of their names.

    A symbolic link back to a folder that is being walked is not followed.

    Raises:
        OSError: the folder itself cannot be read.
    """
    root = root.rstrip("/") + "/"
    for path, is_directory in _descend(root, takes, unlisted):
        if not is_directory:
            yield from _file(path, unlisted)


def glob(pattern: str, takes: Takes, unlisted: Unlisted) -> tuple[list[StoredObject], list[str]]:
    """Files and folders that match a pattern, each sorted; `**` matches files only.

    What cannot be read is reported if something below it may match. `takes` sees names relative to the part
    of the pattern before its first mark.

    Raises:
        WrongUse: the pattern is not understood.
    """
    root = fixed_part(pattern)
    if not Path(root).is_dir():
        return [], []
    names = pattern[len(root) :].rstrip("/").split("/")
    is_deep = "**" in names
    try:
        matches = re.compile(glob_translate(pattern.rstrip("/"))).match
        levels = [re.compile(glob_translate(root + "/".join(names[: i + 1]))) for i in range(len(names))]
    except ValueError as error:
        raise WrongUse(f"{pattern}: {error}") from None

    def may_lead_to_a_match(name: str) -> bool:
        is_folder = name.endswith("/")
        depth = name.count("/") - is_folder
        matcher = matches if not is_folder or is_deep else levels[depth].match
        return bool((is_folder and is_deep) or matcher(root + name.rstrip("/"))) and takes(name)

    files: list[StoredObject] = []
    folders: list[str] = []
    for path, is_directory in _descend(root, may_lead_to_a_match, unlisted, None if is_deep else len(names)):
        if not is_directory:
            files += _file(path, unlisted)
        elif not is_deep and matches(path.rstrip("/")):
            folders.append(path.rstrip("/"))
    return files, folders


def fixed_part(pattern: str) -> str:
    """The folder of a pattern before its first mark, with a slash at its end."""
    match = FIXED_PART.match(pattern)
    return match[0] if match else "/"


def _descend(
    root: str, takes: Takes, unlisted: Unlisted, levels: int | None = None
) -> Iterator[tuple[str, bool]]:
    """Wanted paths below a folder, and whether each is a folder, which ends in /.

    Without recursion, since a path may have more folders than Python has frames.

    Args:
        levels: how many levels to look at; all by default.
    """
    above = [_identity(root)]
    stack = [_entries(root)]
    while stack:
        entry = next(stack[-1], None)
        if entry is None:
            stack.pop()
            above.pop()
            continue
        try:
            is_directory = entry.is_dir()
        except OSError as error:  # a link to itself, which may stand for a folder
            if takes(f"{entry.path[len(root) :]}/"):
                _fail(unlisted, entry.path, error)
            continue
        path = f"{entry.path}/" if is_directory else entry.path
        if not takes(path[len(root) :]):
            continue
        yield path, is_directory
        if is_directory and (levels is None or len(stack) < levels):
            try:
                identity = _identity(path)
                if identity not in above:
                    stack.append(_entries(path))
                    above.append(identity)
            except OSError as error:
                _fail(unlisted, path, error)


def _identity(folder: str) -> tuple[int, int]:
    status = Path(folder).stat()
    return status.st_dev, status.st_ino


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return iter(sorted(entries, key=lambda entry: entry.name))


def _file(path: str, unlisted: Unlisted) -> Iterator[StoredObject]:
    """The file at a path, unless it is a pipe or a device, which reading could wait for without end.

    A link that leads nowhere is described, too, so that it is accounted for: reading it raises NOT_FOUND.
    """
    try:
        status = Path(path).stat()
    except FileNotFoundError:
        yield StoredObject(as_text(path), UNKNOWN_VERSION, 0)
    except OSError as error:
        _fail(unlisted, path, error)
    else:
        if stat.S_ISREG(status.st_mode):
            yield StoredObject(as_text(path), local_version(status), status.st_size, status.st_mtime)
        else:
            unlisted.skip(Reason.NO_REGULAR_FILE, suffix(path))


def _fail(unlisted: Unlisted, path: str, error: OSError) -> None:
    unlisted.fail(as_text(path), image_error(error).message)
