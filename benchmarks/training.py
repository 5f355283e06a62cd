"""Seconds per epoch of training: csflow against a plain PyTorch loop, and against anomalib's `Csflow`.

    python benchmarks/training.py --blocks 1 --hidden 128 --backbone tf_efficientnet_lite0 --images 320
    python benchmarks/training.py --blocks 4 --hidden 1024 --images 32 --one_worker \
        --anomalib /path/to/env/bin/python

All contenders train a flow of the same shape on the same number of images, size and batch, on the same cores.
Their epochs take turns: each contender is a process of its own that trains one epoch when told to, and the
others wait. The first epoch of each is not counted. CPU seconds, over all threads and processes, are printed
beside those of the clock: on a machine that is busy otherwise they are the ones to compare. All contenders
are in memory at once, about 6 GB each with the paper's settings.

- *plain*: one process with all threads, float32, PyTorch's default Adam, features in memory.
- *csflow*: the loop of `jobs/train.py`, as one worker with all threads or as several of one thread each.
- *anomalib*: the `Csflow` of anomalib 2.7.0 with its backbone (EfficientNet-B5, as for the others in this
  case), its loss and optimiser, called without Lightning, so without its overhead. `--anomalib` names the
  Python of an environment that has anomalib. Weights are random: they do not change the time.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from model import anomalib_model
from results import record

from csflow.training.recipe import RECIPES

CHANNELS = {"tf_efficientnet_lite0": 192, "tf_efficientnet_b5": 304}
STRIDE = 32
SCALES = 3


def feature_shapes(arguments: argparse.Namespace) -> list[tuple[int, int, int]]:
    sides = (arguments.size // STRIDE >> s for s in range(SCALES))
    return [(CHANNELS[arguments.backbone], side, side) for side in sides]


def plain(arguments: argparse.Namespace) -> Callable[[], None]:
    """What one would write in an afternoon."""
    from csflow.model import CrossScaleFlow, negative_log_likelihood

    torch.set_num_threads(arguments.threads)
    features = [torch.randn(arguments.images, *shape) for shape in feature_shapes(arguments)]
    flow = CrossScaleFlow(
        features[0].shape[1], SCALES, arguments.hidden, RECIPES["paper"].kernel_sizes(arguments.blocks)
    )
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-4, eps=1e-4, weight_decay=1e-5)

    def epoch() -> None:
        for batch in torch.randperm(arguments.images).split(arguments.batch):
            loss = negative_log_likelihood(flow([y_BCHW[batch] for y_BCHW in features])).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
            optimizer.step()

    return epoch


def csflow(arguments: argparse.Namespace, rank: int = 0, workers: int = 1) -> Callable[[], None]:
    """The parts of the job: its trainer, resident features, and set-up of a worker."""
    from csflow import process
    from csflow.model import Architecture
    from csflow.storage import Location
    from csflow.training.cache import FeatureCache
    from csflow.training.loop import LoopSettings, Trainer, Worker
    from csflow.training.sources import ResidentFeatures

    process.set_up(arguments.threads // workers, gpus=0)
    cache = FeatureCache(Location("/nowhere"), feature_shapes(arguments))
    features_ND = torch.randn(arguments.images, sum(cache.sizes)).half()
    architecture = Architecture(
        arguments.backbone,
        (arguments.size, arguments.size),
        hidden_channels=arguments.hidden,
        kernel_sizes=tuple(RECIPES["paper"].kernel_sizes(arguments.blocks)),
    )
    loop = LoopSettings(
        architecture,
        epochs=1000,
        patience=1000,
        batch_size=arguments.batch,
        micro_batch_size=None,
        learning_rate=2e-4,
        is_annealed=False,
        adam_epsilon=1e-4,
        dropout=0.0,
        precision=arguments.precision,
    )
    worker = Worker(rank, workers, torch.device("cpu"))
    training, validation = (
        ResidentFeatures(cache, part_ND, worker.device) for part_ND in (features_ND, features_ND[:0])
    )
    trainer = Trainer(loop, worker, training, validation)

    def epoch() -> None:
        trainer.run_epoch()

    return epoch


def anomalib(arguments: argparse.Namespace) -> Callable[[], None]:
    """anomalib's model, loss and optimiser as its Lightning module uses them."""
    from anomalib.models.image.csflow.loss import CsFlowLoss

    torch.set_num_threads(arguments.threads)
    size = (arguments.size, arguments.size)
    model = anomalib_model(size, arguments.hidden, arguments.blocks).train()
    model.feature_extractor.eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4, eps=1e-4, weight_decay=1e-5, betas=(0.5, 0.9))
    images = torch.rand(arguments.images, 3, *size)

    def epoch() -> None:
        for batch in torch.randperm(arguments.images).split(arguments.batch):
            loss = CsFlowLoss.forward(*model(images[batch]))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    return epoch


def contend(arguments: argparse.Namespace) -> None:
    """One process: trains an epoch for each line on standard input, and prints its seconds."""
    name, rank, workers = arguments.contender
    rank, workers = int(rank), int(workers)
    if workers > 1:
        rendezvous = f"file://{arguments.rendezvous}"
        torch.distributed.init_process_group("gloo", rendezvous, rank=rank, world_size=workers)
    epoch = csflow(arguments, rank, workers) if name == "csflow" else globals()[name](arguments)
    print("ready", flush=True)
    for _ in sys.stdin:
        started, cpu_started = time.perf_counter(), time.process_time()
        epoch()
        print(time.perf_counter() - started, time.process_time() - cpu_started, flush=True)


class Contender:
    """The processes of one contender."""

    def __init__(self, arguments: argparse.Namespace, name: str, workers: int, python: str) -> None:
        rendezvous = tempfile.mktemp(prefix="csflow-benchmark-")
        flags = [f"--{flag}={getattr(arguments, flag)}" for flag in FLAGS]
        command = [python, __file__, *flags, "--rendezvous", rendezvous, "--contender", name]
        self._processes = [
            subprocess.Popen(
                [*command, str(rank), str(workers)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": str(arguments.threads // workers)},
            )
            for rank in range(workers)
        ]
        for line in self._lines():
            if line != "ready":
                raise RuntimeError(f"{name} did not start")

    def epoch(self) -> tuple[float, float]:
        """Seconds of the slowest process, and CPU seconds of all."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("epoch\n")
            process.stdin.flush()
        seconds, cpu_seconds = zip(*(map(float, line.split()) for line in self._lines()), strict=True)
        return max(seconds), sum(cpu_seconds)

    def close(self) -> None:
        for process in self._processes:
            process.communicate()

    def _lines(self) -> Iterator[str]:
        for process in self._processes:
            assert process.stdout is not None
            yield process.stdout.readline().strip()


FLAGS = ("backbone", "size", "images", "batch", "blocks", "hidden", "threads", "precision")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="tf_efficientnet_b5", choices=list(CHANNELS))
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--images", type=int, default=64, help="in the training set")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--epochs", type=int, default=4, help="of each contender, the first not counted")
    parser.add_argument("--one_worker", action="store_true", help="leave out csflow with several workers")
    parser.add_argument("--anomalib", help="Python of an environment with anomalib")
    parser.add_argument("--contender", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--rendezvous", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.contender:
        contend(arguments)
        return
    kinds: dict[str, tuple[Any, ...]] = {
        f"plain, {arguments.threads} threads": ("plain", 1, sys.executable),
        f"csflow, 1 worker of {arguments.threads} threads": ("csflow", 1, sys.executable),
    }
    if arguments.threads > 1 and not arguments.one_worker:
        workers = f"csflow, {arguments.threads} workers of 1 thread"
        kinds[workers] = ("csflow", arguments.threads, sys.executable)
    if arguments.anomalib:
        if arguments.backbone != "tf_efficientnet_b5":
            raise SystemExit(
                "error: anomalib's backbone is EfficientNet-B5; pass --backbone tf_efficientnet_b5"
            )
        kinds[f"anomalib, {arguments.threads} threads"] = ("anomalib", 1, arguments.anomalib)
    contenders = {name: Contender(arguments, *kind) for name, kind in kinds.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(arguments.epochs):
        for name, contender in contenders.items():
            seconds[name].append(contender.epoch())
    for contender in contenders.values():
        contender.close()
    lines = [
        "| contender | s per epoch, median | minimum | maximum | CPU s, median | minimum | maximum |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, values in seconds.items():
        columns = []
        for column in zip(*values[1:], strict=True):
            columns += [f"{statistics.median(column):.2f}", f"{min(column):.2f}", f"{max(column):.2f}"]
        lines.append(f"| {name} | {' | '.join(columns)} |")
    flags = [f"--{flag} {getattr(arguments, flag)}" for flag in (*FLAGS, "epochs")]
    flags += ["--one_worker"] if arguments.one_worker else []
    flags += ["--anomalib …/python"] if arguments.anomalib else []
    title = f"Training: {arguments.backbone}, {arguments.blocks} blocks, {arguments.hidden} hidden channels"
    record(title, "\n".join(lines), " ".join(["python benchmarks/training.py", *flags]))


if __name__ == "__main__":
    main()
