"""CPU milliseconds to decode and resize a photograph to 256 px: csflow's way and others.

    pip install simplejpeg    # if it is to be compared
    python benchmarks/decoding.py

The JPEGs are photographs of the package elpv-dataset, enlarged, with noise, in 4:2:0 at quality 92.
"""

import importlib.util
import io
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import results
import torch
from numpy.typing import NDArray
from PIL import Image, features
from torchvision.io import decode_jpeg

from csflow.demo import photographs
from csflow.images import decode

SIDE = 256
SIDES = (768, 1500, 3000)
PHOTOGRAPHS, ROUNDS = 3, 5
Pixels = NDArray[np.uint8]


def jpegs(side: int) -> list[bytes]:
    generator = np.random.default_rng(0)
    found = []
    for path, _, _ in sorted(photographs())[:PHOTOGRAPHS]:
        grey_HW = Image.open(path).convert("L").resize((side, side), Image.Resampling.BICUBIC)
        noisy_HWC = np.asarray(grey_HW)[..., None] + generator.normal(0, 4, (side, side, 3))
        file = io.BytesIO()
        pixels_HWC = noisy_HWC.clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels_HWC).save(file, "JPEG", quality=92, subsampling=2)
        found.append(file.getvalue())
    return found


def resized(pixels_HWC: Pixels) -> Pixels:
    return np.asarray(Image.fromarray(pixels_HWC).resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def with_torchvision(data: bytes) -> Pixels:
    pixels_CHW = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return resized(pixels_CHW.permute(1, 2, 0).numpy())


def with_simplejpeg(data: bytes) -> Pixels:
    import simplejpeg

    side = int(1.5 * SIDE)  # as csflow's margin
    return resized(simplejpeg.decode_jpeg(data, "RGB", min_height=side, min_width=side, min_factor=1))


def main() -> None:
    torch.set_num_threads(1)
    ways: dict[str, Callable[[bytes], Pixels]] = {
        "csflow: Pillow, reduced by the codec": lambda data: decode(data, (SIDE, SIDE)).pixels_HWC,
        "Pillow in full size": lambda data: resized(decode(data).pixels_HWC),
        "torchvision in full size": with_torchvision,
    }
    if importlib.util.find_spec("simplejpeg"):
        ways["simplejpeg, reduced by the codec"] = with_simplejpeg
    spent: dict[tuple[str, int], list[float]] = defaultdict(list)
    for side in SIDES:
        files = jpegs(side)
        for _ in range(ROUNDS):
            for name, way in ways.items():
                started = time.thread_time()
                for data in files:
                    way(data)
                spent[name, side].append(1000 * (time.thread_time() - started) / len(files))
    lines = [f"| CPU ms an image | {' | '.join(f'{s} px' for s in SIDES)} |", "|---|---|---|---|"]
    for name in ways:
        row = (f"{statistics.median(spent[name, side]):.1f}" for side in SIDES)
        lines.append(f"| {name} | {' | '.join(row)} |")
    lines += ["", f"Pillow's codec is libjpeg-turbo {features.version_feature('libjpeg_turbo')}."]
    results.record("Decoding", "\n".join(lines), "python benchmarks/decoding.py")


if __name__ == "__main__":
    main()
