"""How time and memory of a scoring run grow with the archive.

    python benchmarks/scale.py
    python benchmarks/scale.py --planned --scored 1000 10000 100000
    python benchmarks/scale.py --planned --scored 1000 10000 --setting light
    python benchmarks/scale.py --planned --scored --generated 1000000 10000000

Planning: archives of tiny images (links to one file) are listed, frozen and planned, the shards are filled
with rows as a finished run leaves them, and the job itself runs over the complete output. Scoring: the job
scores whole archives, by default with a small model (128 px, random weights), so that costs beside the model
would be seen if they grew. Generated: a listing without any files is frozen and planned, for archives that no
disk here could hold. Every figure comes from a process of its own.
Those that plan do not import torch, as the job's driver does not: `plant` does.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from PIL import Image
from results import record

from csflow.inputs.listing import BATCH_ROWS, LISTING, list_images
from csflow.model_directory import read_model
from csflow.output.layout import Output, listing_folder
from csflow.output.schemas import SCORES
from csflow.process import peak_memory_bytes
from csflow.scoring.frozen_listing import Listing
from csflow.scoring.outcomes import OutcomeReader
from csflow.scoring.plan import make_plan
from csflow.storage import Location, to_parquet

FILES_PER_FOLDER = 1000
MAP_SIDE = 4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--planned", type=int, nargs="*", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--scored", type=int, nargs="*", default=[1_000, 10_000])
    parser.add_argument("--generated", type=int, nargs="*", default=[])
    parser.add_argument("--setting", choices=["small", "light", "paper"], default="small", help="of scoring")
    parser.add_argument("--rounds", type=int, default=3, help="of scoring; medians are printed")
    parser.add_argument("--plan", nargs=3, metavar=("MODEL", "ARCHIVE", "OUTPUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plan:
        model, archive, output = arguments.plan
        planned = (
            plan_generated(model, int(archive), output) if archive.isdigit() else plan(model, archive, output)
        )
        print(json.dumps(planned))
        return
    import plant

    from csflow.model import Architecture

    small = Architecture("tf_efficientnet_lite0", (128, 128), hidden_channels=64, kernel_sizes=(3,))
    architecture = plant.SETTINGS.get(arguments.setting, small)
    with tempfile.TemporaryDirectory() as folder:
        model = str(plant.write_model(Path(folder) / "model", architecture))
        if arguments.planned:
            measure_planning(model, arguments.planned)
        if arguments.scored:
            measure_scoring(model, arguments)
        if arguments.generated:
            measure_generated(model, arguments.generated)


def measure_planning(model: str, archives: Sequence[int]) -> None:
    lines = [
        "| images planned | list s | plan s | MB | run with nothing new: list s | plan s | account s | MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for images in archives:
        with tempfile.TemporaryDirectory() as folder:
            archive, output = make_archive(Path(folder), images), f"{folder}/output"
            command = [sys.executable, __file__, "--plan", model, str(archive), output]
            first = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            run = score(model, archive, output)
            assert run["counts"]["scored"] == images and not run["counts"]["scored_in_this_run"]
            again = run["seconds"]
            lines.append(
                f"| {images:,} | {first['list']:.1f} | {first['plan']:.1f} | {first['peak_bytes'] / 1e6:.0f} "
                f"| {again['list']:.1f} | {again['plan']:.1f} | {again['account']:.1f} "
                f"| {run['peak_memory_bytes']['driver'] / 1e6:.0f} |"
            )
            print(lines[-1], flush=True)
    numbers = " ".join(map(str, archives))
    record("Scale: planning", "\n".join(lines), f"python benchmarks/scale.py --planned {numbers} --scored")


def measure_generated(model: str, numbers: Sequence[int]) -> None:
    lines = [
        "| images | freeze s | plan s | shards | peak MB | MB on the output | MB in TMPDIR |",
        "|---|" + "---|" * 6,
    ]
    for images in numbers:
        with tempfile.TemporaryDirectory() as output, tempfile.TemporaryDirectory() as temporary:
            command = [sys.executable, __file__, "--plan", model, str(images), output]
            variables = os.environ | {"TMPDIR": temporary}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=variables)
        one = json.loads(done.stdout)
        cells = f"{images:,} | {one['list']:.0f} | {one['plan']:.0f} | {one['shards']:,}"
        cells += (
            f" | {one['peak_bytes'] / 1e6:.0f} | {one['written'] / 1e6:.0f} | {one['temporary'] / 1e6:.0f}"
        )
        lines.append(f"| {cells} |")
        print(lines[-1], flush=True)
    command = f"python benchmarks/scale.py --planned --scored --generated {' '.join(map(str, numbers))}"
    record("Scale: planning of generated listings", "\n".join(lines), command)


def measure_scoring(model: str, arguments: argparse.Namespace) -> None:
    measured: dict[int, list[tuple[float, ...]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folders = {images: make_archive(Path(name) / str(images), images) for images in arguments.scored}
        for _ in range(arguments.rounds):
            for images, archive in folders.items():
                with tempfile.TemporaryDirectory() as output:
                    row = _scored(model, archive, output)
                print(images, *(f"{value:.2f}" for value in row), file=sys.stderr, flush=True)
                measured[images].append(row)
    lines = [
        "| images scored | ms an image, steady | ms of the workers' CPU | s | s to the first image "
        "| driver MB | worker MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for images, runs in measured.items():
        steady, cpu, *whole = (statistics.median(column) for column in zip(*runs, strict=True))
        cells = [f"{steady:.2f}", f"{cpu:.2f}", *(f"{value:.0f}" for value in whole)]
        lines.append(f"| {images:,} | {' | '.join(cells)} |")
    lines += ["", f"Medians of {arguments.rounds} interleaved rounds."]
    numbers = " ".join(map(str, arguments.scored))
    command = f"python benchmarks/scale.py --planned --scored {numbers} --setting {arguments.setting}"
    title = f"Scale: scoring, {arguments.setting} settings"
    record(title, "\n".join(lines), f"{command} --rounds {arguments.rounds}")


def _scored(model: str, archive: Path, output: str) -> tuple[float, ...]:
    """The columns of a row, of one run."""
    import plant

    run = score(model, archive, output)
    images = run["counts"]["scored_in_this_run"]
    assert images == run["counts"]["listed"]
    table = ds.dataset(f"{output}/scores").to_table(columns=["scored_at"])
    rate = plant.steady_rate(table["scored_at"].cast("int64").to_numpy() / 1e6)
    spent = sum(seconds for stage, seconds in run["cpu_seconds_in_workers"].items() if stage != "start")
    seconds = sum(run["seconds"].values()), run["seconds_to_first_image"]
    memory = (run["peak_memory_bytes"][process] / 1e6 for process in ("driver", "worker"))
    return 1000 / rate, 1000 * spent / images, *seconds, *memory


def make_archive(folder: Path, images: int) -> Path:
    archive = folder / "archive"
    archive.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "image.jpg")
    # A file has at most 65,000 names on some file systems.
    for number in range(images):
        parent = archive / f"{number // FILES_PER_FOLDER:06d}"
        if number % FILES_PER_FOLDER == 0:
            parent.mkdir(parents=True)
            source = parent / "000000.jpg"
            shutil.copyfile(folder / "image.jpg", source)
        else:
            os.link(source, parent / f"{number % FILES_PER_FOLDER:06d}.jpg")
    return archive


def plan(model: str, archive: str, output_folder: str) -> dict[str, float]:
    """Lists and plans as the job does, then fills the shards; seconds by step and peak memory before that."""
    output = Output(Location(output_folder), read_model(Location(model)).model_id)
    started = time.perf_counter()
    listing = Listing.freeze(listing_folder(output.location, "first"), list_images([archive], {}), None)
    listed = time.perf_counter()
    shards = make_plan(listing, OutcomeReader(output), "first", retry_errors=False)
    planned = time.perf_counter()
    peak_bytes = peak_memory_bytes()
    for shard in shards:
        rows = [
            dict.fromkeys(SCORES.names, 0) | {"model_name": ""} | row for row in shard.images().to_pylist()
        ]
        columns = {"scale_scores": [0.0] * 3, "anomaly_map": [0.0] * MAP_SIDE**2}
        columns |= {"run_id": "first", "is_anomalous": False, "map_box": None}
        table = pa.Table.from_pylist([row | columns for row in rows], schema=SCORES)
        output.scores_file(shard.name, shard.date).create(to_parquet(table))
    return {"list": listed - started, "plan": planned - listed, "peak_bytes": peak_bytes}


def generated(images: int) -> Iterator[pa.RecordBatch]:
    """A listing of so many images that are nowhere, in folders of a day each."""
    at = datetime(2026, 11, 27, tzinfo=UTC)
    for start in range(0, images, BATCH_ROWS):
        numbers = range(start, min(start + BATCH_ROWS, images))
        uris = [f"s3://plant/line-3/{n // 100_000:05d}/camera-1/{n:012d}.jpg" for n in numbers]
        etags = [f"{n:032x}" for n in numbers]
        columns = [
            pa.array(uris),
            pa.array(etags),
            pa.array([100_000] * len(uris)),
            pa.array([at] * len(uris)),
        ]
        yield pa.RecordBatch.from_arrays(
            [c.cast(t) for c, t in zip(columns, LISTING.types, strict=True)], schema=LISTING
        )


def plan_generated(model: str, images: int, folder: str) -> dict[str, float]:
    """Freezes and plans a generated listing; seconds by step, peak memory, and bytes written."""
    output = Output(Location(folder), read_model(Location(model)).model_id)
    started = time.perf_counter()
    listing = Listing.freeze(listing_folder(output.location, "first"), generated(images), None)
    listed = time.perf_counter()
    shards = make_plan(listing, OutcomeReader(output), "first", retry_errors=False)
    planned = time.perf_counter()
    written = sum(path.stat().st_size for path in Path(folder).rglob("*.parquet"))
    temporary = sum(path.stat().st_size for path in Path(tempfile.gettempdir()).glob("csflow-*/*"))
    times = {"list": listed - started, "plan": planned - listed}
    return times | {
        "shards": len(shards),
        "peak_bytes": peak_memory_bytes(),
        "written": written,
        "temporary": temporary,
    }


def score(model: str, archive: Path, output: str) -> dict[str, Any]:
    """The job in a process of its own; returns its run.json."""
    import plant

    command = plant.score_command(Path(model), str(archive), output)
    subprocess.run(command, cwd=plant.ROOT, check=True, stdout=subprocess.DEVNULL)
    return plant.run_record(Path(output))


if __name__ == "__main__":
    main()
