"""What names tell: which files may hold images, and what is hidden or in a folder that is not looked into."""

import re
from collections.abc import Callable
from fnmatch import translate
from functools import lru_cache

from csflow.inputs.unlisted import Reason, Unlisted

Takes = Callable[[str], bool]
"""Whether a file or folder (which ends in /) is wanted, by its name relative to the start of a walk."""

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".j2c", ".jpc"),
)

SKIPPED_FOLDERS = (
    # Synology and QNAP: thumbnails, recycle bins, snapshots
    *("@eaDir", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", ".@__thumb"),
    # Windows: recycle bins and restore points of shared disks
    *("$RECYCLE.BIN", "RECYCLER", "RECYCLED", "System Volume Information"),
    # macOS on shared disks, Linux desktops, NetApp, ZFS, ext4
    *("Network Trash Folder", "Temporary Items", ".Trashes", ".Trash*", ".thumbnails"),
    *(".snapshot", ".snapshots", "~snapshot", ".zfs", "lost+found"),
)
"""Folders in which storage and operating systems keep thumbnails, deleted files and snapshots."""

FOLDER_MARKS = (".", "_")
"""How names of hidden folders begin. Jobs write folders like `_runs`, cameras files like `_DSC0001.JPG`."""

_SUFFIX = re.compile(r"(?i)(?:\.tar)?\.[a-z0-9]{1,12}$")


def takes_of(
    root: str,
    suffixes: tuple[str, ...],
    unlisted: Unlisted,
    skipped: tuple[str, ...],
    folder_marks: tuple[str, ...] = FOLDER_MARKS,
) -> Takes:
    """Takes files with these suffixes, and folders, that `left_out` does not leave out; counts all others.

    Args:
        root: the URI that names are relative to.
    """

    def takes(name: str) -> bool:
        if found := left_out(name, skipped, folder_marks):
            reason, part = found
            if part.endswith("/"):
                unlisted.skip_folder(reason, root + part)
            else:
                unlisted.skip(reason, suffix(part))
            return False
        if name.endswith("/") or name.lower().endswith(suffixes):
            return True
        unlisted.skip(Reason.OTHER_FORMAT, suffix(name))
        return False

    return takes


def left_out(
    name: str, skipped: tuple[str, ...], folder_marks: tuple[str, ...] = FOLDER_MARKS
) -> tuple[Reason, str] | None:
    """Why a relative name is left out, and the part of it that is; None if it is not.

    Args:
        name: of a file, or of a folder, which ends in /.
        skipped: patterns of whole folder names, in any case: Windows writes `$Recycle.Bin`, too.
        folder_marks: how names of hidden folders begin. Hidden files begin with a dot.
    """
    folders, _, file = name.rpartition("/")
    found = _folder_left_out(folders, skipped, folder_marks) if folders else None
    return found or ((Reason.HIDDEN, name) if file.startswith(".") else None)


def suffix(name: str) -> str:
    """The suffix of a name in lower case, such as `.jpg` or `.tar.gz`; empty if it has none."""
    match = _SUFFIX.search(name.rpartition("/")[2])
    return match[0].lower() if match else ""


@lru_cache(4096)  # files of a folder come one after the other
def _folder_left_out(
    folders: str, skipped: tuple[str, ...], folder_marks: tuple[str, ...]
) -> tuple[Reason, str] | None:
    parts = folders.split("/")
    for depth, folder in enumerate(parts, start=1):
        path = "/".join(parts[:depth]) + "/"
        if skipped and folder and _pattern(skipped).fullmatch(folder):
            return Reason.SKIPPED_FOLDER, path
        if folder.startswith(folder_marks) and folder not in (".", ".."):
            return Reason.HIDDEN, path
    return None


@lru_cache
def _pattern(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, patterns)), re.IGNORECASE)
