"""What one scoring worker does per second, and what its set-up gains: memory kept, threads, batch size.

    python benchmarks/worker.py

With training's defaults and random weights. Every variant runs in processes of its own, outside the main
thread as under Ray; variants are interleaved.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import results

VARIANTS = {
    # name: (processes, threads each, batch size, memory kept)
    "1 process of 2 threads, batch 8, memory returned": (1, 2, 8, False),
    "1 process of 2 threads, batch 8": (1, 2, 8, True),
    "2 processes of 1 thread, batch 8, memory returned": (2, 1, 8, False),
    "2 processes of 1 thread, batch 8 (default)": (2, 1, 8, True),
    "2 processes of 1 thread, batch 1": (2, 1, 1, True),
    "2 processes of 1 thread, batch 32": (2, 1, 32, True),
}


def measure(model: str, threads: int, batch_size: int, keeps_memory: bool, images: int) -> None:
    """Prints the images per second of one worker."""
    import torch

    from csflow import process
    from csflow.model import InferenceDetector
    from csflow.model_directory import load_model
    from csflow.storage import Location

    def forward() -> None:
        if keeps_memory:
            process.set_up(threads, gpus=0)
        torch.set_num_threads(threads)
        detector = InferenceDetector(load_model(Location(model)).detector, "auto", batch_size)
        shape = (batch_size, *detector.image_shape)
        pixels_BHWC = torch.randint(0, 256, shape, dtype=torch.uint8)
        for _ in range(max(1, 16 // batch_size)):
            detector(pixels_BHWC)
        started = time.perf_counter()
        for _ in range(images // batch_size):
            detector(pixels_BHWC)
        print(images // batch_size * batch_size / (time.perf_counter() - started))

    thread = threading.Thread(target=forward)
    thread.start()
    thread.join()


def run_variant(model: str, variant: tuple[int, int, int, bool], images: int) -> float:
    """Images per second of all processes of a variant together."""
    processes, *arguments = variant
    command = [sys.executable, __file__, "--images", str(images), "--one", model]
    command += [str(int(argument)) for argument in arguments]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return sum(float(process.communicate()[0]) for process in running)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=192, help="per process and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        model, *numbers = arguments.one
        threads, batch_size, keeps_memory = map(int, numbers)
        measure(model, threads, batch_size, bool(keeps_memory), arguments.images)
        return
    import plant

    rates: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        model = str(plant.write_model(Path(folder) / "model", plant.SETTINGS["light"]))
        for _ in range(arguments.rounds):
            for name, variant in VARIANTS.items():
                rates[name].append(run_variant(model, variant, arguments.images))
    command = f"python benchmarks/worker.py --images {arguments.images} --rounds {arguments.rounds}"
    results.record("One scoring worker, light settings", results.spread("worker", rates), command)


if __name__ == "__main__":
    main()
