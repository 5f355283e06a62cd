"""What a scoring actor gains by overlapping shards, near a store and far from one.

    python benchmarks/overlap.py

As many actors of one thread as there are cores score shards of photographs from an S3 server, without Ray.
Variants take turns within the same processes. *Far* adds 50 ms to each read, as an object store would.
"""

import argparse
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import plant
import results

from csflow.cluster import WorkerResources
from csflow.inputs.listing import list_images
from csflow.inputs.loading import ImageLoader
from csflow.inputs.reading import ImageReader
from csflow.model_directory import load_model
from csflow.output.layout import Output
from csflow.scoring.config import ScoringSettings
from csflow.scoring.frozen_listing import Listing
from csflow.scoring.outcomes import OutcomeReader
from csflow.scoring.plan import make_plan
from csflow.scoring.plan_log import SHARD_STEP
from csflow.scoring.scorer import READ_THREADS, ShardScorer
from csflow.storage import Location

SHARDS = 6
SWITCH_SECONDS = sys.getswitchinterval()
VARIANTS = {
    # name: (calls at once, threads that read, seconds between switches of Python's threads, seconds a read)
    "near, one shard at a time": (1, READ_THREADS, SWITCH_SECONDS, 0.0),
    "near, two shards (default)": (2, READ_THREADS, SWITCH_SECONDS, 0.0),
    "near, two shards, 2 reading threads": (2, 2, SWITCH_SECONDS, 0.0),
    "near, two shards, switching every 0.5 ms": (2, READ_THREADS, 0.0005, 0.0),
    "far, one shard at a time": (1, READ_THREADS, SWITCH_SECONDS, 0.05),
    "far, two shards (default)": (2, READ_THREADS, SWITCH_SECONDS, 0.05),
}


class FarReader(ImageReader):
    seconds = 0.0

    def read(self, image_uri: str, image_version: str) -> bytes:
        time.sleep(self.seconds)
        return super().read(image_uri, image_version)


def work(model: str, images: str) -> None:
    """One process: for each variant named on standard input, prints the seconds that all shards took."""
    location = Location(model)
    model_id = load_model(location).model_id
    settings = ScoringSettings(location, Output(location, model_id), "", True, 0.01, None)
    scorer = ShardScorer(settings, WorkerResources(workers=1, cpus=1, gpus=0))
    reader = FarReader({})
    print("ready", flush=True)
    for line in sys.stdin:
        calls, threads, switch_seconds, reader.seconds = VARIANTS[line.strip()]
        sys.setswitchinterval(switch_seconds)
        folder = Location(tempfile.mkdtemp(dir=Path(model).parent))
        output = Output(folder, model_id)
        listing = Listing.freeze(folder / "listing", list_images([images], {}), None)
        shards = make_plan(listing, OutcomeReader(output), "run", retry_errors=False)
        scorer._settings = replace(settings, output=output)
        scorer._loader = ImageLoader(reader, plant.SETTINGS["light"].preprocessing, threads)
        rows = [{name: np.array([value]) for name, value in shard.to_row().items()} for shard in shards]
        started = time.perf_counter()
        with ThreadPoolExecutor(calls) as pool:
            scored = sum(result["scored"][0].as_py() for result in pool.map(scorer, rows))
        print(scored / (time.perf_counter() - started), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(*arguments.work)
        return
    folder = Path(tempfile.mkdtemp(prefix="csflow-overlap-"))
    rates: dict[str, list[float]] = defaultdict(list)
    try:
        model = plant.write_model(folder / "model", plant.SETTINGS["light"])
        with plant.s3_server() as server:
            images = server.put_photographs(secrets.token_hex(4), SHARD_STEP * SHARDS)
            command = [sys.executable, __file__, "--work", str(model), images]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(plant.ROOT)}
            pipe = subprocess.PIPE
            processes = [
                subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
                for _ in range(os.cpu_count() or 1)
            ]
            for process in processes:
                assert process.stdout and process.stdout.readline() == "ready\n"
            for _ in range(arguments.rounds):
                for name in VARIANTS:
                    for process in processes:
                        assert process.stdin
                        print(name, file=process.stdin, flush=True)
                    rates[name].append(sum(float(p.stdout.readline()) for p in processes if p.stdout))
            for process in processes:
                process.communicate()
    finally:
        shutil.rmtree(folder)
    command_line = f"python benchmarks/overlap.py --rounds {arguments.rounds}"
    results.record("Overlapping shards in a scoring actor", results.spread("actors", rates), command_line)


if __name__ == "__main__":
    main()
