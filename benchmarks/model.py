"""Images per second of the bare model: the inference form, the trained form and anomalib's CsflowModel.

    python benchmarks/model.py --image_size 256 --anomalib_python /path/to/env/bin/python
    python benchmarks/model.py --accuracy_model demo/model --cells demo/cells

The paper's settings (EfficientNet-B5, four coupling blocks of 1,024 hidden channels) with random weights.
Each variant lives in a process of its own, or two; they take turns, some batches each. A process needs 2 to
3 GB, all of them 40: `--only` names those that the machine has room for. The median of the rounds is
printed and kept in benchmarks/results.md. anomalib 2.7.0 needs an environment of its own. The share of the
peak is that of the rate of a large matrix product in the same process and precision (bfloat16 for the mixed
backbone, part of which is float32), with the multiplications of the trained form counted: more than 100 %
is possible for the flow, whose inference form leaves some out. `--accuracy_model` compares the precisions
on the demo's photographs instead.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from results import record

THREADS = 2
VARIANTS = {
    # name: (program, precision, processes that share the threads)
    "inference form, mixed, 1 thread each (default)": ("inference", "mixed", THREADS),
    "inference form, mixed": ("inference", "mixed", 1),
    "inference form, bfloat16, 1 thread each": ("inference", "bfloat16", THREADS),
    "inference form, bfloat16": ("inference", "bfloat16", 1),
    "inference form, float32": ("inference", "float32", 1),
    "trained form, float32": ("trained", "float32", 1),
    "trained form, bfloat16 autocast": ("trained", "bfloat16", 1),
    "anomalib, float32": ("anomalib", "float32", 1),
    "anomalib, float32, 1 thread each": ("anomalib", "float32", THREADS),
    "anomalib, bfloat16 autocast": ("anomalib", "bfloat16", 1),
    "anomalib, bfloat16 autocast, 1 thread each": ("anomalib", "bfloat16", THREADS),
}
MATRIX_SIDE = 2048
BATCHES = 3
"""Of a turn, behind one that is not counted."""


def serve(program: str, precision: str, threads: int, image_size: int, batch: int) -> None:
    """Builds a variant, then times what it is told to on standard input, one line each."""
    import torch

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    builder = {"inference": _inference, "trained": _trained, "anomalib": _anomalib}[program]
    parts = builder(precision, image_size, batch)
    # The mixed backbone is measured by the faster of its two precisions.
    parts["peak"] = _product(torch.float32 if precision == "float32" else torch.bfloat16)
    is_autocast = program != "inference" and precision == "bfloat16"
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        for part in parts.values():
            _seconds(part)
        print(" ".join(parts), flush=True)
        for line in sys.stdin:
            print(_seconds(parts[line.strip()]), flush=True)


def _seconds(part: Callable[[], Any]) -> float:
    """Of one call."""
    part()  # after the other variants' turns, caches hold their data
    started = time.perf_counter()
    for _ in range(BATCHES):
        part()
    return (time.perf_counter() - started) / BATCHES


def _product(dtype: Any) -> Callable[[], Any]:
    """A large matrix product by the faster of PyTorch's default and oneDNN with packed weights.

    PyTorch's default is MKL for float32, which on other makers' processors leaves AVX-512 alone.
    """
    import torch

    matrix = torch.randn(MATRIX_SIDE, MATRIX_SIDE).to(dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(matrix)
    products = [
        lambda: matrix @ matrix,
        lambda: torch.ops.mkldnn._linear_pointwise(matrix, packed, None, "none", [], ""),
    ]
    return min(products, key=_seconds)


def _pixels(image_size: int, batch: int) -> Any:
    import torch

    return torch.randint(0, 256, (batch, image_size, image_size, 3), dtype=torch.uint8)


def _detector(image_size: int) -> Any:
    from csflow.model import Architecture, Detector

    detector = Detector(Architecture("tf_efficientnet_b5", (image_size, image_size)))
    draw_gammas(detector.flow, 0.1, 0.3)
    detector.measure_rounding(_pixels(image_size, 1))
    return detector.eval().requires_grad_(False)


def _inference(precision: str, image_size: int, batch: int) -> dict[str, Any]:
    import torch

    from csflow import process
    from csflow.model import InferenceDetector

    process.set_up(torch.get_num_threads(), gpus=0)
    return _parts(InferenceDetector(_detector(image_size), precision, batch), image_size, batch)


def _trained(precision: str, image_size: int, batch: int) -> dict[str, Any]:
    return _parts(_detector(image_size), image_size, batch)


def _parts(detector: Any, image_size: int, batch: int) -> dict[str, Any]:
    pixels_BHWC = _pixels(image_size, batch)
    y = detector.features(pixels_BHWC)
    return {
        "whole": lambda: detector(pixels_BHWC),
        "backbone": lambda: detector.features(pixels_BHWC),
        "flow": lambda: detector.score_features(y),
    }


def _anomalib(precision: str, image_size: int, batch: int) -> dict[str, Any]:
    model = anomalib_model((image_size, image_size), 1024).eval()
    image_BCHW = _pixels(image_size, batch).permute(0, 3, 1, 2).float() / 255
    draw_gammas(model, 0.1, 0.3)
    return {"whole": lambda: model(image_BCHW)}


def anomalib_model(*arguments: Any) -> Any:
    """anomalib's `CsFlowModel`. Its backbone has random weights: others are a download, and as fast."""
    from anomalib.models.image.csflow import torch_model

    build = torch_model.efficientnet_b5
    torch_model.efficientnet_b5 = lambda weights: build(weights=None)
    try:
        return torch_model.CsFlowModel(*arguments)
    finally:
        torch_model.efficientnet_b5 = build


def draw_gammas(flow: Any, low: float, high: float) -> None:
    """Draws every γ of a flow, csflow's or anomalib's: at 0, as before training, its blocks do nothing."""
    import torch

    for name, value in flow.named_parameters():
        if "gamma" in name:
            torch.nn.init.uniform_(value, low, high)


def multiplications(detector: Any, image_BHWC: Any) -> dict[str, float]:
    """Multiply-adds of the trained form's convolutions for this image, backbone and flow."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counts = {}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        y = detector.features(image_BHWC)
    counts["backbone"] = counter.get_total_flops() / 2
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        detector.score_features(y)
    counts["flow"] = counter.get_total_flops() / 2
    return counts


def answers(processes: list[Any]) -> list[str]:
    """A line from each."""
    return [process.stdout.readline() for process in processes]


def speed(arguments: argparse.Namespace) -> list[str]:
    """Lines of a table: a row per variant."""
    counts = multiplications(_detector(arguments.image_size), _pixels(arguments.image_size, 1))
    servers = {}
    for name, (program, precision, count) in VARIANTS.items():
        python = arguments.anomalib_python if program == "anomalib" else sys.executable
        if python and (not arguments.only or name in arguments.only):
            command = [python, __file__, "--serve", program, precision, str(THREADS // count)]
            command += ["--image_size", str(arguments.image_size), "--batch_size", str(arguments.batch_size)]
            servers[name] = [
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
                for _ in range(count)
            ]
    # A part's name is sent to all processes of a variant, which answer with their seconds.
    seconds: dict[str, dict[str, list[float]]] = {
        name: {part: [] for part in answers(processes)[0].split()} for name, processes in servers.items()
    }
    for _ in range(arguments.rounds):
        for name, processes in servers.items():
            for part, values in seconds[name].items():
                for process in processes:
                    process.stdin.write(part + "\n")
                values.append(max(map(float, answers(processes))) / len(processes))
    for processes in servers.values():
        for process in processes:
            process.communicate()
    rows = [
        "| variant | images/s | backbone | flow | peak, GFLOP/s | backbone's share | flow's |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, parts in seconds.items():
        median = {part: statistics.median(values) for part, values in parts.items()}
        rate = {p: arguments.batch_size / t for p, t in median.items()}
        cells = [f"{rate['whole']:.2f}"]
        cells += [f"{rate[part]:.1f}" if part in rate else "" for part in counts]
        peak = MATRIX_SIDE**3 / median["peak"]
        cells.append(f"{2 * peak / 1e9:.0f}")
        cells += [f"{rate[part] * counts[part] / peak:.0%}" if part in rate else "" for part in counts]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def accuracy(arguments: argparse.Namespace) -> list[str]:
    """Lines of a table: AUROC on labelled cells and the largest difference of a score, by precision."""
    import numpy as np
    import torch
    from sklearn.metrics import roc_auc_score

    from csflow.images import decode
    from csflow.model import InferenceDetector
    from csflow.model_directory import load_model
    from csflow.storage import Location

    detector = load_model(Location(arguments.accuracy_model)).detector
    folder = Path(arguments.cells)
    with (folder / "labels.csv").open() as file:
        labels = [(row["image_uri"], int(row["label"])) for row in csv.DictReader(file)][:: arguments.every]
    forms: dict[str, Callable[[Any], Any]] = {"trained form, float32": detector}
    for precision in ("float32", "mixed", "bfloat16"):
        forms[f"inference form, {precision}"] = InferenceDetector(detector, precision, 8)
    scores: dict[str, list[Any]] = {name: [] for name in forms}
    size = detector.architecture.preprocessing
    for start in range(0, len(labels), 8):
        group = [decode((folder / uri).read_bytes(), size).pixels_HWC for uri, _ in labels[start : start + 8]]
        pixels_BHWC = torch.from_numpy(np.stack(group))
        for name, form in forms.items():
            scores[name].append(form(pixels_BHWC).anomaly_score_B.numpy())
    truth = [label for _, label in labels]
    exact = np.concatenate(scores["trained form, float32"])
    rows = [f"| {len(labels)} cells | AUROC | largest difference of a score |", "|---|---|---|"]
    for name, values in scores.items():
        found = np.concatenate(values)
        rows.append(f"| {name} | {roc_auc_score(truth, found):.5f} | {np.abs(found / exact - 1).max():.3%} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--anomalib_python", help="of an environment with anomalib 2.7.0")
    parser.add_argument("--only", action="append", help="variant; more than one may be named")
    parser.add_argument("--accuracy_model", help="model directory of the demo")
    parser.add_argument("--cells", default="demo/cells")
    parser.add_argument("--every", type=int, default=1, help="take every so many labelled cells")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        program, precision, threads = arguments.serve
        serve(program, precision, int(threads), arguments.image_size, arguments.batch_size)
        return
    words = ["…/python" if word == arguments.anomalib_python else word for word in sys.argv[1:]]
    command = " ".join(["python benchmarks/model.py", *words])
    if arguments.accuracy_model:
        record("Precision of the model", "\n".join(accuracy(arguments)), command)
    else:
        title = f"Bare model, paper's settings, {arguments.image_size} px, batch {arguments.batch_size}"
        record(title, "\n".join(speed(arguments)), command)


if __name__ == "__main__":
    main()
