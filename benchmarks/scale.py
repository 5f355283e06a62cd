"""How time and memory of a scoring run grow with the archive.

    python benchmarks/scale.py --model demo/model

Planning: archives of tiny images (links to one file) are listed, frozen and planned, the shards are filled
with rows as a finished run leaves them, and the job itself runs over the complete output. Scoring: the job
scores whole archives. Every figure comes from a process of its own.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from results import record

from csflow.inputs.listing import list_images
from csflow.model_directory import read_model
from csflow.process import peak_memory_bytes
from csflow.scores import SCORES
from csflow.scoring.listing import Listing
from csflow.scoring.output import Output
from csflow.scoring.plan import make_plan
from csflow.storage import Location, to_parquet

ROOT = Path(__file__).parent.parent
FILES_PER_FOLDER = 1000
MAP_SIDE = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--planned", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--scored", type=int, nargs="*", default=[1_000, 10_000])
    parser.add_argument("--plan", nargs=2, metavar=("ARCHIVE", "OUTPUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plan:
        print(json.dumps(plan(arguments.model, *arguments.plan)))
        return
    lines = [
        "| images planned | list s | plan s | MB | run with nothing new: list s | plan s | account s | MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for images in arguments.planned:
        with tempfile.TemporaryDirectory() as folder:
            archive, output = make_archive(Path(folder), images), f"{folder}/output"
            command = [sys.executable, __file__, "--model", arguments.model, "--plan", str(archive), output]
            first = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            run = score(arguments.model, archive, output)
            assert run["counts"]["scored"] == images and not run["counts"]["scored_in_this_run"]
            again = run["seconds"]
            lines.append(
                f"| {images:,} | {first['list']:.1f} | {first['plan']:.1f} | {first['peak_bytes'] / 1e6:.0f} "
                f"| {again['list']:.1f} | {again['plan']:.1f} | {again['account']:.1f} "
                f"| {run['peak_memory_bytes']['driver'] / 1e6:.0f} |"
            )
            print(lines[-1], flush=True)
    lines.append("\n| images scored | s per 1000 images | driver MB | worker MB |\n|---|---|---|---|")
    for images in arguments.scored:
        with tempfile.TemporaryDirectory() as folder:
            archive = make_archive(Path(folder), images)
            run = score(arguments.model, archive, f"{folder}/output")
            assert run["counts"]["scored_in_this_run"] == images
            memory = run["peak_memory_bytes"]
            lines.append(
                f"| {images:,} | {run['seconds']['score'] / images * 1000:.2f} "
                f"| {memory['driver'] / 1e6:.0f} | {memory['worker'] / 1e6:.0f} |"
            )
            print(lines[-1], flush=True)
    record("Scale", "\n".join(lines), "python benchmarks/scale.py --model demo/model")


def make_archive(folder: Path, images: int) -> Path:
    archive = folder / "archive"
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
    frozen = output.location / "_runs" / "first" / "listing"
    listing = Listing.freeze(frozen, list_images([archive], {}), None)
    listed = time.perf_counter()
    shards = make_plan(listing, output, "first", retry_errors=False)
    planned = time.perf_counter()
    peak_bytes = peak_memory_bytes()
    for shard in shards:
        rows = [dict.fromkeys(SCORES.names, 0) | row for row in shard.images().to_pylist()]
        columns = {"scale_scores": [0.0] * 3, "anomaly_map": [0.0] * MAP_SIDE**2}
        columns |= {"run_id": "first", "is_anomalous": False}
        table = pa.Table.from_pylist([row | columns for row in rows], schema=SCORES)
        output.scores_file(shard.name, shard.date).create(to_parquet(table))
    return {"list": listed - started, "plan": planned - listed, "peak_bytes": peak_bytes}


def score(model: str, archive: Path, output: str) -> dict[str, object]:
    """The job in a process of its own; returns its run.json."""
    command = [sys.executable, str(ROOT / "jobs" / "score.py"), "--model", model]
    command += ["--input", str(archive), "--output", output]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(max(Path(output).glob("_runs/*/run.json")).read_text())


if __name__ == "__main__":
    main()
