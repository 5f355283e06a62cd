"""Parquet files of images: columns of every kind, and files that are hostile to whoever opens them."""

import base64
import os
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest
from small_models import save_small
from test_inputs import contents, failure, parquet_of, png, write
from test_unlisted import listed

from csflow.errors import ErrorCode, ImageError, WrongUse
from csflow.evaluation.labels import read_labels
from csflow.inputs import rows
from csflow.inputs.child_process import Child, ChildDied
from csflow.inputs.reading import ImageReader
from csflow.inputs.selection import Selection
from csflow.inputs.unlisted import Reason, Unlisted
from csflow.model_directory import read_model
from csflow.storage import Location

IMAGES = [png(1), png(2), png(1)]
BYTES = pa.array(IMAGES, pa.binary())
LENGTH = len(png(1))
STRUCT = pa.StructArray.from_arrays([BYTES, pa.array(["a"] * 3)], ["raw", "path"])


class PlainKeys(pe.KmsClient):  # type: ignore[misc]
    def wrap_key(self, key: bytes, _: str) -> bytes:
        return base64.b64encode(key)

    def unwrap_key(self, key: bytes, _: str) -> bytes:
        return base64.b64decode(key)


def with_encrypted_columns(path: Path, column: str = "image", **others: list[int]) -> Path:
    """Its footer is plain, but says of the column only that it is encrypted: pyarrow ends the process."""
    configuration = pe.EncryptionConfiguration(
        footer_key="f", column_keys={"c": [column]}, plaintext_footer=True
    )
    factory = pe.CryptoFactory(lambda _: PlainKeys())
    properties = factory.file_encryption_properties(pe.KmsConnectionConfig(), configuration)
    table = pa.table({column: BYTES if column == "image" else ["a.png"] * 3} | others)
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as file:
        file.write_table(table)
    return path


def test_a_file_that_kills_who_opens_it_is_crashed_and_the_rest_is_listed(tmp_path: Path) -> None:
    bad = with_encrypted_columns(tmp_path / "bad.parquet")
    good = write(tmp_path / "good.parquet", parquet_of({"image": IMAGES}))
    for inputs in ([tmp_path], [bad, good]):
        found = listed(*inputs)
        error = failure(str(bad), found.pop(str(bad)))
        assert error.code == ErrorCode.CRASHED
        assert list(contents(found).values()) == IMAGES


def test_a_model_and_a_label_table_with_such_a_file_are_refused_in_one_line(tmp_path: Path) -> None:
    with_encrypted_columns(Path(save_small(tmp_path / "model").path) / "calibration.parquet", "anomaly_score")
    with pytest.raises(WrongUse, match=r"^model .* is damaged \(OSError: Cannot decrypt ColumnMetadata"):
        read_model(str(tmp_path / "model"))
    with_encrypted_columns(tmp_path / "labels.parquet", "image_uri", label=[0, 1, 0])
    with pytest.raises(WrongUse, match=r"^--labels .* cannot be read: Cannot decrypt ColumnMetadata"):
        read_labels(Location(str(tmp_path / "labels.parquet")))


def test_an_image_of_such_a_file_that_a_manifest_names_is_crashed(tmp_path: Path) -> None:
    bad = with_encrypted_columns(tmp_path / "bad.parquet")
    ((uri, version),) = listed(
        write(tmp_path / "m.csv", b"image_uri\nbad.parquet#0\nbad.parquet#1\n")
    ).items()
    assert uri == str(bad)
    assert failure(uri, version).code == ErrorCode.CRASHED


def test_a_child_that_is_killed_is_said_to_have_died_and_others_go_on() -> None:
    child = Child(os.getpid())
    assert child.call(divmod, 1) == divmod(os.getpid(), 1)
    with pytest.raises(ZeroDivisionError):
        child.call(divmod, 0)
    with pytest.raises(ChildDied):
        child.call(_kill_own_process)
    with pytest.raises(ChildDied):
        child.call(divmod, 1)


def _kill_own_process(parent: int) -> None:
    assert os.getpid() != parent
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "columns",
    [
        {"image": BYTES.dictionary_encode()},
        {"Image": BYTES, "thumb": BYTES},
        {"jpg": BYTES, "sha256": pa.array([b"x" * 32] * 3, pa.binary())},
        {"photo": BYTES, "sha256": pa.array([b"x" * 32] * 3, pa.binary(32))},
        {"photo": STRUCT, "n": [1, 2, 3]},
        {"image": pa.array([png(1), None, png(1)], pa.binary(LENGTH))},
        {"image.bytes": BYTES},
        {"x": pa.array(IMAGES, pa.large_binary())},
        {"x": pa.array(IMAGES, pa.binary_view())},
    ],
)
def test_columns_of_image_bytes_of_every_kind_are_read(tmp_path: Path, columns: dict[str, Any]) -> None:
    found = listed(write(tmp_path / "r.parquet", parquet_of(columns)))
    if columns.keys() == {"image"} and pa.types.is_fixed_size_binary(columns["image"].type):
        assert failure(*list(found.items())[1]).code == ErrorCode.EMPTY
        found.pop(list(found)[1])
    assert set(contents(found).values()) <= set(IMAGES)
    assert len(found) >= 2


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        ({"a": BYTES, "b": BYTES}, "b"),
        ({"digest": pa.array([png(1)], pa.binary(LENGTH))}, "digest"),
        (
            {"sample": pa.StructArray.from_arrays([STRUCT, pa.array([1, 2, 3])], ["image", "n"])},
            "sample.image.raw",
        ),
        ({"image": [b"thumbnail"] * 3, "full": BYTES}, "full"),
    ],
)
def test_the_column_of_images_can_be_chosen(tmp_path: Path, columns: dict[str, Any], chosen: str) -> None:
    file = write(tmp_path / "r.parquet", parquet_of(columns))
    selection = Selection(image_column=chosen)
    found = listed(tmp_path, selection=selection)
    assert list(contents(found).values()) == IMAGES[: len(found)]
    # Images of another column are other images.
    assert all(version.endswith(f":column={chosen}") for version in found.values())
    named = listed(write(tmp_path / "m.csv", b"image_uri\nr.parquet#0\n"), selection=selection)
    assert contents(named) == {f"{file}#0": IMAGES[0]}


def test_to_choose_the_column_that_is_taken_anyway_changes_no_version(tmp_path: Path) -> None:
    write(tmp_path / "r.parquet", parquet_of({"image": IMAGES}))
    assert listed(tmp_path, selection=Selection(image_column="image")) == listed(tmp_path)


@pytest.mark.parametrize(
    "columns",
    [
        {"images": pa.array([[png(1), png(2)]], pa.list_(pa.binary()))},
        {"sha256": pa.array([b"x" * 32], pa.binary(32))},
        {"a": BYTES, "b": BYTES},
        {"image": [base64.b64encode(png(1)).decode()]},
    ],
)
def test_files_without_a_plain_column_of_images_are_counted(tmp_path: Path, columns: dict[str, Any]) -> None:
    file = write(tmp_path / "r.parquet", parquet_of(columns))
    write(tmp_path / "a.png", png(1))
    unlisted = Unlisted()
    assert list(listed(tmp_path, unlisted=unlisted)) == [f"{tmp_path}/a.png"]
    assert [(one.reason, one.kind) for one in unlisted.skipped] == [(Reason.NO_IMAGE_COLUMN, ".parquet")]
    with pytest.raises(WrongUse, match=f"{next(iter(columns))}.*--image_column"):
        listed(file)


def test_a_file_of_too_many_rows_is_too_large_and_takes_no_memory(tmp_path: Path) -> None:
    file = tmp_path / "r.parquet"
    pq.write_table(pa.table({"image": pa.nulls(rows.MAX_ROWS + 1, pa.binary())}), file)
    assert file.stat().st_size < 1 << 20
    ((uri, version),) = listed(tmp_path).items()
    assert failure(uri, version).code == ErrorCode.TOO_LARGE


def test_a_row_group_that_unpacks_to_too_much_is_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = bytes(1 << 20)
    write(tmp_path / "r.parquet", parquet_of({"image": [image] * 64}, row_group_size=64))
    assert (tmp_path / "r.parquet").stat().st_size < 1 << 20
    found = listed(tmp_path)
    assert contents(dict(list(found.items())[:1])) == {f"{tmp_path}/r.parquet#0": image}
    monkeypatch.setattr(rows, "MAX_RANGE_BYTES", 32 << 20)
    reader = ImageReader({}, deadline_s=5)
    for uri, version in list(found.items())[:3]:
        with pytest.raises(ImageError, match="row group unpacks to more"):
            reader.read(uri, version)
        # It is unpacked once for all its rows.
        (tmp_path / "r.parquet").unlink(missing_ok=True)
    monkeypatch.undo()
    write(tmp_path / "r.parquet", parquet_of({"image": [image] * 64}, row_group_size=64))
    found = listed(tmp_path)
    assert failure(*next(iter(found.items())), max_bytes=1000).code == ErrorCode.TOO_LARGE


def test_parquet_manifests_are_read_to_the_end_in_pieces(tmp_path: Path) -> None:
    uris = [f"{number}.png" for number in range(25_000)]
    pq.write_table(pa.table({"image_uri": uris, "image_version": ["1"] * len(uris)}), tmp_path / "m.parquet")
    assert list(listed(tmp_path / "m.parquet")) == [f"{tmp_path}/{uri}" for uri in uris]


@pytest.mark.parametrize("data", [b"PAR1", b"", b"\xff" * 1000])
def test_a_damaged_parquet_file_named_as_an_input_is_one_error(tmp_path: Path, data: bytes) -> None:
    bad = write(tmp_path / "m.parquet", data)
    image = write(tmp_path / "a.png", png(1))
    found = listed(bad, image)
    assert failure(str(bad), found.pop(str(bad))).code == ErrorCode.CORRUPT
    assert list(found) == [str(image)]


def test_a_manifest_that_kills_who_opens_it_is_crashed(tmp_path: Path) -> None:
    bad = with_encrypted_columns(tmp_path / "m.parquet", "image_uri")
    image = write(tmp_path / "a.png", png(1))
    unlisted = Unlisted()
    found = listed(bad, image, unlisted=unlisted)
    assert str(image) in found
    assert str(bad) in {*found, *unlisted.failures}
