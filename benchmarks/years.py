"""How planning and accounting grow with the nights that an output has behind it.

    python benchmarks/years.py --nights 1 30 365 1095

Every night 1,000 images are new, in a folder of their own. Plans and outcome files are written by the job's
own code in an S3 protocol server; the shards are filled with rows as a finished run leaves them, without
scoring. After some of the nights three runs with nothing new to score are measured, each in a process of its
own: over the night's own folder, over the whole archive, and, up to 365 nights, over the whole archive of an
output that an earlier csflow left, which has none of the files that make this cheap. Requests are counted in
the server's log.
"""

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
from results import record

from csflow.inputs.listing import LISTING
from csflow.output.layout import Output, ShardFile
from csflow.output.schemas import SCORES
from csflow.process import peak_memory_bytes
from csflow.scoring import outcomes, plan_log
from csflow.scoring.frozen_listing import Listing
from csflow.scoring.outcomes import OutcomeReader
from csflow.scoring.plan import account, make_plan
from csflow.scoring.plan_log import PlanLog
from csflow.storage import Location, to_parquet

IMAGES = 1000
NIGHTS_READ_ANEW = 365
"""Largest number of nights over which a run without outcome files is measured: it takes over four minutes."""
OUTPUT = Output(Location("s3://years/output"), "0" * 16)
ROW = {field.name: None if field.nullable else 0 for field in SCORES} | {
    "scale_scores": [0.0] * 3,
    "anomaly_map": [0.0] * 16,
    "run_id": "night",
    "is_anomalous": False,
}


class Calendar:
    """Stands for `datetime` where a plan gets its day."""

    today = datetime(2026, 1, 1, 2, tzinfo=UTC)

    @classmethod
    def now(cls, timezone: object) -> datetime:
        return cls.today


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nights", type=int, nargs="*", default=[1, 30, 365, 1095])
    parser.add_argument("--run", type=int, nargs=2, metavar=("FIRST", "LAST"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run(range(arguments.run[0], arguments.run[1] + 1))))
        return
    lines = [
        "| nights | run over | GET | HEAD | LIST | others | s | driver MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with server() as log:
        boto3.client("s3").create_bucket(Bucket="years")
        plan_log.datetime = Calendar  # type: ignore[attr-defined,assignment]
        written = WrittenNights()
        for night in range(1, max(arguments.nights) + 1):
            written.score(night)
            Calendar.today += timedelta(days=1)
            if night in arguments.nights:
                written.settle()
                lines.append(measured("the night's folder", night, night, log))
                print(lines[-1], flush=True)
                lines.append(measured("the whole archive", 1, night, log))
                print(lines[-1], flush=True)
                if night <= NIGHTS_READ_ANEW:
                    forget()
                    lines.append(measured("the whole archive, first time", 1, night, log))
                    print(lines[-1], flush=True)
    nights = " ".join(map(str, arguments.nights))
    record("Years: runs with nothing new", "\n".join(lines), f"python benchmarks/years.py --nights {nights}")


@contextmanager
def server() -> Iterator[Path]:
    """An S3 protocol server in a process of its own; yields its log, which has a line for each request."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        os.environ |= {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }
        with log.open("w") as out:
            command = [sys.executable, "-m", "moto.server", "--port", "0"]
            process = subprocess.Popen(command, stdout=out, stderr=out)
        try:
            while not (address := re.search(r"Running on (http://\S+)", log.read_text())):
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            os.environ["AWS_ENDPOINT_URL"] = address[1]
            yield log
        finally:
            process.kill()
            process.wait()


def listing(nights: range) -> Listing:
    """The frozen listing of the images of some nights, on the local disk."""
    return Listing.freeze(Location(tempfile.mkdtemp()), map(images_of, nights), None)


def images_of(night: int) -> pa.RecordBatch:
    """The images of one night, in the `LISTING` schema."""
    uris = [f"s3://years/images/{night:04d}/{n:04d}.jpg" for n in range(IMAGES)]
    rows = [{"image_uri": uri, "image_version": "1", "size_bytes": 1} for uri in uris]
    return pa.RecordBatch.from_pylist(rows, LISTING)


class WrittenNights:
    """Fills the output. Remembers what it wrote, since reading all of it would take hours."""

    def __init__(self) -> None:
        self._log = PlanLog(OUTPUT)
        self._reader = OutcomeReader(OUTPUT)
        self._images: dict[str, pa.RecordBatch] = {}
        """The images of each scores file that no outcome file stands for yet."""

    def score(self, night: int) -> None:
        """Plans a night and fills its shards."""
        plan = self._log.append(f"run-{night}", listing(range(night, night + 1)).batches(), IMAGES)
        self._log._plans[plan.number] = plan  # in place of a listing of all plans
        part = pq.ParquetFile(io.BytesIO(OUTPUT.plan_part(plan.folder, 0).read()))

        def fill(shard: plan_log.PlannedShard) -> None:
            images = part.read_row_group(shard.row_group, ["image_uri", "image_version"])
            table = pa.Table.from_pylist([ROW | image for image in images.to_pylist()], schema=SCORES)
            file = OUTPUT.scores_file(shard.name, shard.date)
            file.create(to_parquet(table))
            (self._images[file.url],) = images.to_batches()

        for shard in plan.planned_shards(OUTPUT):
            fill(shard)

    def settle(self) -> None:
        """Writes the outcome files of all nights since the last time."""

        def known(files: Sequence[ShardFile]) -> Iterator[pa.RecordBatch]:
            yield from (self._images.pop(file.location.url) for file in files)

        read, outcomes.scored_images = outcomes.scored_images, known  # type: ignore[assignment]
        plans = self._reader.log.read()
        assert not self._reader.read(plans, plans).unfinished
        outcomes.scored_images = read
        assert not self._images


def run(nights: range) -> dict[str, float]:
    """Planning and accounting of a run over these nights that has nothing to score."""
    images = listing(nights)
    started = time.perf_counter()
    outcomes = OutcomeReader(OUTPUT)
    assert not make_plan(images, outcomes, "run", retry_errors=False)
    assert account(images, outcomes).scored == images.images
    return {"seconds": time.perf_counter() - started, "megabytes": peak_memory_bytes() / 1e6}


def measured(title: str, first: int, last: int, log: Path) -> str:
    """A row of the table: a run over these nights, in a process of its own."""
    before = requests(log)
    command = [sys.executable, __file__, "--run", str(first), str(last)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, Any] = json.loads(output)
    made = requests(log) - before
    others = made.total() - made["GET"] - made["HEAD"] - made["LIST"]
    counts = f"{made['GET']:,} | {made['HEAD']:,} | {made['LIST']:,} | {others:,}"
    return f"| {last:,} | {title} | {counts} | {result['seconds']:.1f} | {result['megabytes']:.0f} |"


def requests(log: Path) -> Counter[str]:
    """Number of requests so far, by method; listings apart."""
    # The server colours some of its lines.
    methods = re.findall(
        r"\b(GET|HEAD|PUT|POST|DELETE) (\S+) HTTP", re.sub(r"\x1b\[\d*m", " ", log.read_text())
    )
    return Counter("LIST" if "list-type=2" in path else method for method, path in methods)


def forget() -> None:
    """Deletes what an earlier csflow did not write."""
    folder = OUTPUT.folder("_plans")
    for file in folder.find(""):
        if file.name.startswith("outcome-") or file.name.endswith(".jsonl"):
            file.remove()


if __name__ == "__main__":
    main()
