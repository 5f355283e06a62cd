"""Where the time of a pass goes with the default model, on one core of a CPU.

    python benchmarks/parts.py

The network has random weights; whitening and Gaussians are fitted to random images. Parts take turns. Medians
are printed, in milliseconds per image, with the share of the whole pass.
"""

import argparse
from collections.abc import Callable
from typing import Any

import gpu
import torch

from csflow import process
from csflow.model import InferenceDetector
from csflow.model.inference import CPU_BATCH_SIZE
from csflow.model.interleaved_flow import InterleavedFlow
from csflow.precision import resolved


@torch.inference_mode()
def measure(side: int, batch: int) -> None:
    model = gpu.fitted(None, gpu.photographs(None, 24, side, 0), gpu.photographs(None, 12, side, 1), side)
    images = gpu.photographs(None, batch, side, 2)
    precision = resolved("auto", torch.device("cpu"))
    form = InferenceDetector(model, precision, batch)
    sizes = [(batch, height, width) for _, height, width in model.feature_shapes]
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    flow = InterleavedFlow(model.gaussians, model.flow, model.architecture.latent_window, dtype, sizes)
    assert flow.gaussians is not None
    y = [y_BCHW.clone() for y_BCHW in form.features(images)]
    x = [y_BCHW.permute(2, 3, 0, 1) for y_BCHW in y]
    whitened = flow.gaussians.whitening(x)
    energies = flow(y)
    parts: dict[str, Callable[[], Any]] = {
        "whole pass": lambda: form(images),
        "backbone": lambda: form.features(images),
        "whitening": lambda: flow.gaussians.whitening(x),
        "Gaussian of each position": lambda: flow.gaussians.positions(whitened),
        "whitening, Gaussian, flow and energies": lambda: flow(y),
        "statistic": lambda: model.statistic(energies),
    }
    seconds = {name: 1 / rate for name, rate in gpu.rates(parts).items()}
    print(f"default model, {side} px, batch {batch}, {precision}, one thread\n")
    print("| part | ms per image | of the pass |\n|---|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {1000 * value / batch:.2f} | {value / seconds['whole pass']:.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=256, help="of images in pixels")
    parser.add_argument("--batch", type=int, default=CPU_BATCH_SIZE)
    arguments = parser.parse_args()
    process.set_up(1, gpus=0)
    measure(arguments.side, arguments.batch)


if __name__ == "__main__":
    main()
