"""A whole scoring job, S3 to Parquet, against the bare model and against a plain script, on the same cores.

    python benchmarks/pipeline.py --setting light --images 2000
    python benchmarks/pipeline.py --setting paper --images 160

The three take turns; medians of the rounds are printed. *Bare* is the scorer's own forward pass on pixels in
memory, in as many processes of one thread as there are cores. *Steady* is the middle half of a run's images,
without start-up, the workers' uneven beginnings and the end; *whole* is images over seconds of the command.
The S3 server runs on the same cores, for the job and the script alike.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import plant
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import results
import torch

from csflow.cluster import WorkerResources
from csflow.model_directory import load_model
from csflow.output.layout import Output
from csflow.scoring.config import ScoringSettings
from csflow.scoring.scorer import ShardScorer
from csflow.storage import Location


def measure_bare(model: str, images: int) -> None:
    """One process of the bare model: waits for a line on standard input, prints images per second."""
    location = Location(model)
    loaded = load_model(location)
    settings = ScoringSettings(location, Output(location, loaded.model_id), "", True, 0.01, None)
    scorer = ShardScorer(settings, WorkerResources(workers=1, cpus=1, gpus=0))
    detector = scorer._detector
    shape = (detector.form.batch_size, *detector.image_shape)
    pixels_BHWC = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    batches = max(1, images // len(pixels_BHWC))
    detector(pixels_BHWC)
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    for _ in range(batches):
        detector(pixels_BHWC)
    print(batches * len(pixels_BHWC) / (time.perf_counter() - started))


def bare(model: Path, images: int) -> float:
    """Images per second of one process per core together."""
    cores = os.cpu_count() or 1
    command = [sys.executable, __file__, "--bare", str(model), "--images", str(images // cores)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(plant.ROOT)}
    processes = [
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(cores)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    return sum(float(process.communicate("go\n")[0]) for process in processes)


def job(model: Path, images: str, folder: Path, server: plant.S3Server) -> dict[str, float]:
    output = plant.fresh(folder)
    run = plant.run(plant.score_command(model, images, output), server)
    record = plant.run_record(output)
    table = ds.dataset(output / "scores").to_table(columns=["scored_at"])
    return {
        "job, steady": plant.steady_rate(table["scored_at"].cast("int64").to_numpy() / 1e6),
        "job, whole": record["counts"]["scored"] / run.seconds,
        "job, seconds to the first image": record["seconds_to_first_image"],
        "job, cores of the S3 server": run.cpu_seconds["S3 server"] / run.seconds,
    }


def script(model: Path, images: str, folder: Path, server: plant.S3Server) -> dict[str, float]:
    output = plant.fresh(folder)
    run = plant.run([sys.executable, "benchmarks/plain_script.py", str(model), images, str(output)], server)
    scored_at = pq.read_table(output, columns=["scored_at"])["scored_at"].to_numpy()
    return {
        "script, steady": plant.steady_rate(scored_at),
        "script, whole": len(scored_at) / run.seconds,
        "script, cores of the S3 server": run.cpu_seconds["S3 server"] / run.seconds,
    }


def table(values: dict[str, list[float]], images: int) -> str:
    names = ("bare", "job, steady", "job, whole", "script, steady", "script, whole")
    pairs = [
        ("job, steady", "bare"),
        ("job, whole", "bare"),
        ("job, steady", "script, steady"),
        ("job, whole", "script, whole"),
    ]
    ratios = {
        f"{above} / {below}": [a / b for a, b in zip(values[above], values[below], strict=True)]
        for above, below in pairs
    }
    lines = [
        results.spread("images/s", {name: values[name] for name in names}, "median", 2),
        "",
        results.spread("ratio", ratios, "median", 2),
    ]
    rounds = len(values["bare"])
    lines += [
        "",
        f"{images} images, {rounds} rounds. From the command to the job's first scored image "
        f"{statistics.median(values['job, seconds to the first image']):.1f} s. The S3 server took "
        f"{statistics.median(values['job, cores of the S3 server']):.2f} cores during the job, "
        f"{statistics.median(values['script, cores of the S3 server']):.2f} during the script.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setting", choices=plant.SETTINGS, default="light")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        measure_bare(arguments.bare, arguments.images)
        return
    folder = Path(tempfile.mkdtemp(prefix="csflow-pipeline-"))
    values: dict[str, list[float]] = defaultdict(list)
    try:
        model = plant.write_model(folder / "model", plant.SETTINGS[arguments.setting])
        with plant.s3_server() as server:
            images = server.put_photographs("night", arguments.images)
            for _ in range(arguments.rounds):
                values["bare"].append(bare(model, arguments.images // 4))
                for part in (job(model, images, folder, server), script(model, images, folder, server)):
                    for name, value in part.items():
                        values[name].append(value)
                print({name: round(row[-1], 2) for name, row in values.items()}, file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder)
    command = (
        f"python benchmarks/pipeline.py --setting {arguments.setting} --images {arguments.images} "
        f"--rounds {arguments.rounds}"
    )
    results.record(
        f"Whole job, S3 to Parquet: {arguments.setting} settings", table(values, arguments.images), command
    )


if __name__ == "__main__":
    main()
