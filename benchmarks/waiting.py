"""Training steps of two threads beside busy processes: threads that wait spin, or sleep.

    python benchmarks/waiting.py

A flow of training's defaults is trained on random features, in a process of its own per variant; variants
take turns. The busy processes keep one core each.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import results

POLICIES = {
    "default": {},
    "GOMP_SPINCOUNT=30000": {"GOMP_SPINCOUNT": "30000"},
    "GOMP_SPINCOUNT=3000": {"GOMP_SPINCOUNT": "3000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
BUSY = (0, 1, 2)


def measure(seconds: float) -> None:
    """Prints seconds on the clock and of processors for a training step."""
    import torch

    from csflow.model import CrossScaleFlow, negative_log_likelihood
    from csflow.training.step import new_optimizer, optimizer_step

    torch.set_num_threads(2)
    torch.manual_seed(0)
    flow = CrossScaleFlow(320, 3, 256, (3,), 0)
    y = [torch.randn(16, 320, side, side) for side in (8, 4, 2)]
    optimizer = new_optimizer(flow.parameters(), 2e-4)

    def step() -> None:
        negative_log_likelihood(flow(y)).mean().backward()
        optimizer_step(flow.parameters(), optimizer)

    step()
    steps, started, cpu_started = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        step()
        steps += 1
    print((time.perf_counter() - started) / steps, (time.process_time() - cpu_started) / steps)


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keeps so many processors busy."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5, help="per variant and round")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measure(arguments.seconds)
        return
    command = [sys.executable, __file__, "--one", "--seconds", str(arguments.seconds)]
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    for _ in range(arguments.rounds):
        for processes in BUSY:
            for policy, variables in POLICIES.items():
                with busy(processes):
                    ended = subprocess.run(
                        command, env=environment | variables, capture_output=True, text=True, check=True
                    )
                clock, cpu = map(float, ended.stdout.split())
                found.setdefault((processes, policy), []).append((clock, cpu))
    lines = [
        "| busy processes | threads that wait | ms a step, median | ms of CPU a step |",
        "|---|---|---|---|",
    ]
    for (processes, policy), values in found.items():
        clock, cpu = (1000 * median(column) for column in zip(*values, strict=True))
        lines.append(f"| {processes} | {policy} | {clock:.0f} | {cpu:.0f} |")
    called = f"python benchmarks/waiting.py --rounds {arguments.rounds} --seconds {arguments.seconds:g}"
    results.record("Threads that wait", "\n".join(lines), called)


if __name__ == "__main__":
    main()
