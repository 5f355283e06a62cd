"""What lies below inputs and is not listed: it is named or counted, and the rest is listed."""

import io
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from test_inputs import contents, failure, parquet_of, png, tar_of, write, zip_of

from csflow.errors import ErrorCode, StorageFailed, WrongUse
from csflow.inputs.listing import LISTING, list_images
from csflow.inputs.selection import EVERYTHING, Selection
from csflow.inputs.unlisted import Reason, Unlisted, in_words


def listed(
    *inputs: object, unlisted: Unlisted | None = None, selection: Selection = EVERYTHING
) -> dict[str, str]:
    batches = list_images([str(one) for one in inputs], {}, selection, unlisted)
    return {
        row["image_uri"]: row["image_version"] for row in pa.Table.from_batches(batches, LISTING).to_pylist()
    }


def skipped(unlisted: Unlisted) -> dict[tuple[Reason, str], int]:
    return {(one.reason, one.kind): one.number for one in unlisted.skipped}


AS_NOBODY = """
import os, sys
from csflow.inputs.listing import list_images
from csflow.inputs.selection import Selection
from csflow.inputs.unlisted import Unlisted
os.setgid(65534); os.setuid(65534)
selection = Selection(exclude=sys.argv[2:])
unlisted = Unlisted(selection.leaves_out)
for batch in list_images([sys.argv[1]], {}, selection, unlisted):
    print(*batch["image_uri"].to_pylist(), sep="\\n")
for uri, reason in unlisted.failures.items():
    print("FAILED", uri, reason)
"""


def listed_by_nobody(uri: object, *exclude: str) -> list[str]:
    """A listing by a user who may not read everything, as root may: the lines that it prints."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    command = [sys.executable, "-c", AS_NOBODY, str(uri), *exclude]
    job = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return job.stdout.splitlines() or job.stderr.splitlines()[-1:]


@pytest.fixture
def partly_readable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shared")
    for name in ("a.png", "private/b.png", "d/c.png", "d/lost+found/d.png"):
        write(root / name, png(1))
    for folder in (root, *root.parents):
        folder.chmod(folder.stat().st_mode | 0o055)
    (root / "private").chmod(0o700)
    (root / "d" / "lost+found").chmod(0o700)
    return root


@pytest.mark.parametrize("pattern", ["", "/**/*.png", "/*"])
def test_an_unreadable_folder_is_named_and_the_rest_is_listed(partly_readable: Path, pattern: str) -> None:
    *images, failed = sorted(listed_by_nobody(f"{partly_readable}{pattern}"), key=lambda line: line[0] == "F")
    assert images == [f"{partly_readable}/a.png", f"{partly_readable}/d/c.png"]
    assert failed.startswith(f"FAILED {partly_readable}/private/ ")
    assert "reading is not permitted" in failed


def test_an_unreadable_folder_may_be_excluded(partly_readable: Path) -> None:
    for pattern in ("*/private", "*/private/*"):
        assert not [line for line in listed_by_nobody(partly_readable, pattern) if "FAILED" in line]


def test_a_pattern_that_cannot_match_below_an_unreadable_folder_does_not_name_it(
    partly_readable: Path,
) -> None:
    assert listed_by_nobody(f"{partly_readable}/d*/*.png") == [f"{partly_readable}/d/c.png"]


def test_an_input_that_may_not_be_read_is_wrong_use(partly_readable: Path) -> None:
    (line,) = listed_by_nobody(partly_readable / "private")
    assert "access denied" in line


@pytest.mark.parametrize("pattern", ["", "/**/*.png"])
def test_a_link_to_itself_is_named_and_the_rest_is_listed(tmp_path: Path, pattern: str) -> None:
    write(tmp_path / "a.png", png(1))
    (tmp_path / "loop").symlink_to("loop")
    unlisted = Unlisted()
    assert list(listed(f"{tmp_path}{pattern}", unlisted=unlisted)) == [f"{tmp_path}/a.png"]
    assert list(unlisted.failures) == [f"{tmp_path}/loop"]
    assert "loop" in next(unlisted.lines())
    with pytest.raises(StorageFailed, match="--exclude"):
        unlisted.check()


def test_everything_that_is_not_taken_is_counted_by_suffix_and_reason(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.jfif", "a.jpe", "x.tar.gz", "n.txt", "m.TXT", "README", ".hidden.jpg"):
        write(tmp_path / name, png(1))
    for name in ("_runs/a.jpg", "_runs/b.jpg", "@eaDir/a.jpg/SYNOPHOTO_THUMB_XL.jpg", "$Recycle.Bin/a.jpg"):
        write(tmp_path / name, png(2))
    write(tmp_path / "t.parquet", parquet_of({"label": [1, 2]}))
    write(tmp_path / "p.zip", zip_of({"m.png": png(3), "note.txt": b"", "@eaDir/m.png": png(4)}))
    os.mkfifo(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "s.png"))
    unlisted = Unlisted()
    found = listed(tmp_path, unlisted=unlisted)
    assert [uri.removeprefix(f"{tmp_path}/") for uri in found] == ["a.jfif", "a.jpe", "a.jpg", "p.zip!/m.png"]
    assert skipped(unlisted) == {
        (Reason.OTHER_FORMAT, ".txt"): 3,
        (Reason.OTHER_FORMAT, ".tar.gz"): 1,
        (Reason.OTHER_FORMAT, ""): 1,
        (Reason.HIDDEN, ".jpg"): 1,
        (Reason.HIDDEN, "_runs/"): 1,
        (Reason.SKIPPED_FOLDER, "@eaDir/"): 2,
        (Reason.SKIPPED_FOLDER, "$Recycle.Bin/"): 1,
        (Reason.NO_IMAGE_COLUMN, ".parquet"): 1,
        (Reason.NO_REGULAR_FILE, ".jpg"): 1,
        (Reason.NO_REGULAR_FILE, ".png"): 1,
    }
    assert "3 .txt, 1 without a suffix, 1 .tar.gz (no kind of input)" in in_words(unlisted.skipped)
    assert not unlisted.failed


def test_folders_that_are_skipped_can_be_chosen_and_named_outright(tmp_path: Path) -> None:
    thumbnail = write(tmp_path / "@eaDir" / "a.png", png(1))
    kept = write(tmp_path / "raw" / "b.png", png(2))
    assert list(listed(tmp_path)) == [str(kept)]
    assert list(listed(tmp_path, selection=Selection(skip_folders=["RAW"]))) == [str(thumbnail)]
    assert list(listed(tmp_path, selection=Selection(skip_folders=[""]))) == [str(thumbnail), str(kept)]
    assert list(listed(tmp_path / "@eaDir")) == [str(thumbnail)]
    assert list(listed(f"{tmp_path}/@eaDir/*.png")) == [str(thumbnail)]


def test_deselected_images_are_counted(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.jpg"):
        write(tmp_path / name, png(1))
    unlisted = Unlisted()
    listed(tmp_path, unlisted=unlisted, selection=Selection(include=["*.jpg"]))
    assert skipped(unlisted) == {(Reason.NOT_SELECTED, ".png"): 2}


def test_a_pipe_that_a_manifest_names_is_an_error_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    ((uri, version),) = listed(write(tmp_path / "m.csv", b"image_uri\npipe.jpg\n")).items()
    assert failure(uri, version).code == ErrorCode.NOT_FOUND
    status = (tmp_path / "pipe.jpg").stat()
    assert failure(uri, f"0-{status.st_mtime_ns}").code == ErrorCode.NOT_FOUND


BAD_MANIFESTS = {
    "utf16.csv": "image_uri\na.png\n".encode("utf-16"),
    "nul.csv": b"\0" * 100,
    "semicolon.csv": b"image_uri;x\na.png;1\n",
    "ragged.csv": b"image_uri,x\na.png,1\nb.png,2,3\n",
    "empty.csv": b"",
    "gap.csv": b"image_uri,x\n,2\n",
    "secret.csv": b"image_uri\nhttps://user:pw@host/a.png\n",
}


@pytest.mark.parametrize("name", BAD_MANIFESTS)
def test_a_bad_manifest_among_many_inputs_is_named_and_the_others_are_listed(
    tmp_path: Path, name: str
) -> None:
    image = write(tmp_path / "in" / "a.png", png(1))
    bad = write(tmp_path / "manifests" / name, BAD_MANIFESTS[name])
    good = write(tmp_path / "manifests" / "z.csv", b"image_uri\n../in/a.png\n")
    for inputs in ([bad, good], [f"{tmp_path}/manifests/*.csv"]):
        unlisted = Unlisted()
        assert list(listed(*inputs, unlisted=unlisted)) == [str(image)]
        assert list(unlisted.failures) == [str(bad)]
    with pytest.raises(WrongUse) as caught:
        listed(bad)
    assert str(bad) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_with_odd_names_are_rows(tmp_path: Path) -> None:
    write(tmp_path / "~1.png", png(1))
    latin = "image_uri,note\n~1.png,café\n~nobody-here/x.png,1\nprüfung.png,2\n".encode("latin-1")
    found = listed(write(tmp_path / "m.csv", latin))
    assert list(found) == [
        f"{tmp_path}/~1.png",
        f"{tmp_path}/~nobody-here/x.png",
        f"{tmp_path}/pr\\udcfcfung.png",
    ]
    (image, *others) = found.items()
    assert contents(dict([image])) == {image[0]: png(1)}
    assert {failure(*other).code for other in others} == {ErrorCode.NOT_FOUND}


def test_an_input_whose_name_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match="does not exist"):
        listed(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))


def test_hard_links_in_a_tar_are_images_and_other_links_are_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        member = tarfile.TarInfo("a.png")
        member.size = len(png(1))
        archive.addfile(member, io.BytesIO(png(1)))
        for kind, name, target in (
            (tarfile.LNKTYPE, "hard.png", "a.png"),
            (tarfile.LNKTYPE, "lost.png", "nothing.png"),
            (tarfile.SYMTYPE, "soft.png", "a.png"),
        ):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            archive.addfile(link)
    unlisted = Unlisted()
    found = listed(tmp_path / "x.tar", unlisted=unlisted)
    assert contents(found) == {f"{tmp_path}/x.tar!/{name}.png": png(1) for name in ("a", "hard")}
    assert skipped(unlisted) == {(Reason.NO_REGULAR_FILE, ".png"): 2}


def test_tars_that_were_joined_are_listed_to_the_end(tmp_path: Path) -> None:
    joined = b"".join(tar_of({f"{n}.png": png(n)}) for n in (1, 2, 3))
    found = contents(listed(write(tmp_path / "x.tar", joined + b"rubbish behind the last one" * 100)))
    assert found == {f"{tmp_path}/x.tar!/{n}.png": png(n) for n in (1, 2, 3)}
