"""S3 Inventory: S3's own daily listing of a bucket, which saves listing the bucket again.

The `manifest.json` of an inventory names its data files and their columns (Amazon S3 User Guide, "Cataloging
and analyzing your data with S3 Inventory").
"""

import json
import re
from collections.abc import Iterator
from urllib.parse import unquote_plus

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv, orc

from csflow.errors import WrongUse
from csflow.inputs.objects import ObjectStore, StoredObject

NAME = "manifest.json"
READ_AHEAD = 8 << 20
BATCH_ROWS = 10_000
TIME = pa.timestamp("us", "UTC")

COLUMNS = {
    "Bucket": "bucket",
    "Key": "key",
    "IsLatest": "is_latest",
    "IsDeleteMarker": "is_delete_marker",
    "Size": "size",
    "LastModifiedDate": "last_modified_date",
    "ETag": "e_tag",
}
"""Names of columns in the manifest of a CSV inventory (CSV has no header), and in Parquet and ORC."""


def read_inventory(store: ObjectStore, manifest: StoredObject) -> Iterator[StoredObject]:
    """The current objects of an inventory, in its order. Reads the manifest at once, and the rest lazily.

    Raises:
        WrongUse: it is no S3 Inventory, or lacks keys or ETags.
        ImageError: as `ObjectStore.fetch`.
    """
    try:
        content = json.loads(store.fetch(manifest.uri, manifest.version))
        file_format, schema = content["fileFormat"].upper(), content["fileSchema"]
        # The inventory may lie elsewhere by now than S3 put it, but not by itself.
        bucket = content["destinationBucket"].rpartition(":")[2]
        uris = [f"s3://{bucket}/{file['key']}" for file in content["files"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WrongUse(f"{manifest.uri} is no manifest of an S3 Inventory ({error!r})") from None
    fields = re.findall(r"\w+", schema)
    missing = [name for name in ("Bucket", "Key", "ETag") if not {name, COLUMNS[name]} & set(fields)]
    if missing:
        raise WrongUse(f"{manifest.uri} lacks {', '.join(missing)}; add these fields to the inventory")
    return _objects(store, uris, file_format, fields)


def _objects(
    store: ObjectStore, uris: list[str], file_format: str, fields: list[str]
) -> Iterator[StoredObject]:
    for uri in uris:
        file = store.stat(uri)
        try:
            for batch in _batches(store, file, file_format, fields):
                yield from _current_objects(batch, is_encoded=file_format == "CSV")
        except (pa.ArrowException, UnicodeError) as error:
            raise WrongUse(f"{uri} cannot be read as an inventory: {' '.join(str(error).split())}") from None


def _batches(
    store: ObjectStore, file: StoredObject, file_format: str, fields: list[str]
) -> Iterator[pa.RecordBatch]:
    """The columns of a file that are in `COLUMNS`, named as in Parquet and ORC."""
    source = store.open(file, READ_AHEAD)
    if file_format == "CSV":
        names = [COLUMNS.get(name, name) for name in fields]
        columns = [name for name in names if name in COLUMNS.values()]
        convert = csv.ConvertOptions(
            include_columns=columns, column_types=dict.fromkeys(columns, pa.string())
        )
        text = pa.CompressedInputStream(pa.PythonFile(source, mode="r"), "gzip")
        yield from csv.open_csv(text, csv.ReadOptions(column_names=names), convert_options=convert)
        return
    columns = [name for name in fields if name in COLUMNS.values()]
    if file_format == "PARQUET":
        yield from pq.ParquetFile(source).iter_batches(BATCH_ROWS, columns=columns)
    else:
        stripes = orc.ORCFile(pa.PythonFile(source, mode="r"))
        for number in range(stripes.nstripes):
            yield stripes.read_stripe(number, columns=columns)


def _current_objects(batch: pa.RecordBatch, is_encoded: bool) -> Iterator[StoredObject]:
    """The current version of each object, without older versions and delete markers."""
    rows = batch.num_rows
    nothing = pa.nulls(rows)

    def column(name: str) -> pa.Array:
        return batch[name] if name in batch.schema.names else nothing

    times = column("last_modified_date").cast(TIME).cast(pa.int64()).to_pylist()
    values = [column(name).to_pylist() for name in ("bucket", "key", "e_tag", "size")]
    marks = [column(name).cast(pa.string()).to_pylist() for name in ("is_latest", "is_delete_marker")]
    for bucket, key, etag, size, time_us, is_latest, is_deleted in zip(*values, times, *marks, strict=True):
        if is_latest == "false" or is_deleted == "true":
            continue
        name = unquote_plus(key) if is_encoded else key
        modified_at = float("nan") if time_us is None else time_us / 1e6
        yield StoredObject(f"s3://{bucket}/{name}", etag.strip('"'), int(size or 0), modified_at)
