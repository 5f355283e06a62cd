"""`csflow-edge`: scores a folder of images, or watches it, and writes Parquet files as the scoring job does.

    csflow-edge cells.onnx --input /line/images --output /line/scores --watch

Each image gives a line of JSON on standard output at once; rows follow every `--write_every` seconds. An
image that has a row is not scored again, so after a crash the same command continues.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from csflow.edge.artefact import Artefact
from csflow.errors import ErrorCode, ExitStatus, Failed, ImageError, WrongUse
from csflow.images import decode
from csflow.output.layout import errors_path, new_run_id, scores_path
from csflow.output.schemas import ERRORS, KEY_COLUMNS, SCORES
from csflow.parquet import write_parquet
from csflow.scoring.rows import ScorableImage, error_row, score_rows

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".j2c", ".jpc"),
)
POLL_S = 0.2
"""Seconds between two looks at a watched folder. A file is read once two looks find it the same."""


class Version(NamedTuple):
    """An image file, with the version that the scoring job would give it."""

    image_uri: str
    image_version: str


class Recorder:
    """Keeps rows, and writes them as files of the output."""

    def __init__(self, output: Path, model_id: str) -> None:
        self._output, self._model_id = output, model_id
        self.run_id = new_run_id(datetime.now(UTC))
        self._scores: list[pa.RecordBatch] = []
        self._errors: list[dict[str, Any]] = []
        self._files = 0

    def known(self) -> set[Version]:
        """The images that have a score or a permanent error in this output already."""
        found: set[Version] = set()
        for path in (scores_path(self._model_id, "*", "*"), errors_path(self._model_id, "*", "*", "*")):
            for file in self._output.glob(path):
                columns = [*KEY_COLUMNS, "is_transient"]  # which only errors have
                rows = pq.read_table(file, columns=[n for n in pq.read_schema(file).names if n in columns])
                if "is_transient" in rows.column_names:
                    rows = rows.filter(pc.invert(rows["is_transient"]))
                found.update(Version(**row) for row in rows.select(KEY_COLUMNS).to_pylist())
        return found

    def add(self, row: pa.RecordBatch) -> None:
        self._scores.append(row)

    def add_error(self, image: Version, error: ImageError) -> None:
        self._errors.append(error_row(*image, error, self.run_id))

    def write(self) -> None:
        """Writes what was added since the last call."""
        day, part = f"{datetime.now(UTC):%Y-%m-%d}", f"{self.run_id}-{self._files:06d}"
        if self._errors:
            table = pa.Table.from_pylist(self._errors, schema=ERRORS)
            _write_whole(self._output / errors_path(self._model_id, day, part, "edge"), table)
        if self._scores:
            table = pa.Table.from_batches(self._scores, SCORES)
            _write_whole(self._output / scores_path(self._model_id, day, part), table)
        self._files += 1
        self._scores, self._errors = [], []


def _write_whole(file: Path, table: pa.Table) -> None:
    """Writes a Parquet file that is never half visible."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("wb") as target:
        write_parquet(table, target)
    temporary.replace(file)


def images_in(folder: Path) -> Iterator[Version]:
    """The images below a folder, in the order of their names, without hidden ones."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                path = Path(place, name)
                try:
                    yield version_of(path)
                except FileNotFoundError:
                    continue  # it has just gone


def version_of(path: Path) -> Version:
    status = path.stat()
    return Version(str(path), f"{status.st_size}-{status.st_mtime_ns}")


def _read(image: Version) -> bytes:
    """The bytes of this version. Raises ImageError."""
    path = Path(image.image_uri)
    try:
        data = path.read_bytes()
        is_same = version_of(path) == image
    except FileNotFoundError:
        raise ImageError(ErrorCode.NOT_FOUND, "there is no such file") from None
    except PermissionError as error:
        raise ImageError(ErrorCode.PERMISSION_DENIED, str(error)) from None
    except OSError as error:
        raise ImageError(ErrorCode.CONNECTION, str(error)) from None
    if not is_same:
        raise ImageError(ErrorCode.CHANGED, "it was replaced while it was read")
    return data


def pause() -> None:
    time.sleep(POLL_S)


def finished(folder: Path, is_watched: bool) -> Iterator[Version | None]:
    """The images of a folder; if it is watched, without end, and None after each look."""
    if not is_watched:
        yield from images_in(folder)
        return
    before: set[Version] = set()
    while True:
        now = set(images_in(folder))
        yield from sorted(now & before)  # others may still be written
        yield None
        before = now
        pause()


def score_image(artefact: Artefact, image: Version, recorder: Recorder, keeps_maps: bool) -> dict[str, Any]:
    """Scores one image, records it, and returns what is said about it."""
    try:
        decoded = decode(_read(image), artefact.preprocessing)
    except ImageError as error:
        recorder.add_error(image, error)
        return {"image_uri": image.image_uri, "error": str(error)}
    judged = artefact.judge(decoded)
    threshold = artefact.metadata["map_threshold"]
    recorder.add(
        score_rows(
            [ScorableImage(*image, decoded)],
            judged,
            run_id=recorder.run_id,
            keeps_maps=keeps_maps,
            map_threshold=threshold,
            region_rule=artefact.region_rule,
        )
    )
    return {
        "image_uri": image.image_uri,
        "anomaly_score": float(judged.anomaly_score_B[0]),
        "p_value": float(judged.p_value_B[0]),
        "is_anomalous": bool(judged.is_anomalous_B[0]),
    }


def run(options: argparse.Namespace) -> None:
    """Scores what is asked for. Raises WrongUse and Failed."""
    folder = options.input.absolute()
    if not folder.is_dir():
        raise WrongUse(f"--input {folder} is no folder")
    artefact = Artefact(options.model, options.threads)
    artefact.check()
    print(f"model {artefact.model_id} with {artefact.runtime}: self-test passed", file=sys.stderr)
    recorder = Recorder(options.output, artefact.model_id)
    known, written_at = recorder.known(), time.monotonic()
    try:
        for image in finished(folder, options.watch):
            if image is not None and image not in known:
                known.add(image)
                print(
                    json.dumps(score_image(artefact, image, recorder, options.maps == "native")), flush=True
                )
            if time.monotonic() - written_at >= options.write_every:
                recorder.write()
                written_at = time.monotonic()
    finally:
        recorder.write()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command, and leaves the process with its exit status."""
    parser = argparse.ArgumentParser("csflow-edge", description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="Artefact that csflow export has written, .onnx or .xml.")
    parser.add_argument("--input", type=Path, required=True, help="Folder of images.")
    parser.add_argument("--output", type=Path, required=True, help="Folder of the scores.")
    parser.add_argument("--watch", action="store_true", help="Go on with images that come; Ctrl-C ends it.")
    parser.add_argument(
        "--write_every", type=float, default=60, help="Seconds between two Parquet files. [default: 60]"
    )
    parser.add_argument("--threads", type=int, default=1, help="Processors to compute on. [default: 1]")
    parser.add_argument("--maps", choices=["native", "none"], default="native", help="Keep maps or not.")
    try:
        run(parser.parse_args(argv))
    except (WrongUse, Failed) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(int(ExitStatus.WRONG_USE if isinstance(error, WrongUse) else ExitStatus.FAILED))
    except KeyboardInterrupt:
        sys.exit(int(ExitStatus.STOPPED))
