"""What the model does on a GPU: exactness, images per second, training steps per second, decoding.

    python benchmarks/gpu.py                                    # about five minutes; writes benchmarks/gpu.md
    python benchmarks/gpu.py --weights lite0.pth --good cells/functional --bad cells/defective
    python benchmarks/gpu.py --tiny                             # on any machine, without figures of interest

Needs a GPU, PyTorch, timm, NumPy, safetensors and Pillow; no Ray, OpenVINO, object store or network. The
paper's settings are EfficientNet-B5, 4 coupling blocks of 1,024 hidden channels; the default's are those of
`jobs/train.py`. Speed does not depend on weights, which are random there. anomalib's model is measured on
the same card if its package can be imported. Rates are medians of rounds, in which the models of a size take
turns. Each part stands alone: one that fails says why, and the others go on.
"""

import argparse
import copy
import io
import os
import platform
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model import anomalib_model, draw_gammas, multiplications
from PIL import Image
from torch import Tensor

from csflow.images import decode
from csflow.model import (
    Architecture,
    Detector,
    InferenceDetector,
    Moments,
    Scores,
    energies,
    fit_latents,
    fitted_statistic,
    gaussians_of,
    load_weights,
    negative_log_likelihood,
    new_flow,
)
from csflow.model.fallbacks import Fallbacks
from csflow.model.gpu import GpuDetector, GpuFeatures, Recorded
from csflow.preprocessing import Preprocessing
from csflow.training.step import new_optimizer, optimizer_step

RESULTS = Path(__file__).with_name("gpu.md")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS, SECONDS = 3, 0.4
"""Rounds of a measurement, and how long one lasts."""
PAPER, DEFAULT = "paper's settings", "default"


def architecture(setting: str, side: int) -> Architecture:
    if setting == PAPER:
        return Architecture("tf_efficientnet_b5", (side, side))
    stages = ("blocks.2", "blocks.4", "blocks.5")
    return Architecture(
        "tf_efficientnet_lite0",
        (side, side),
        stages,
        2,
        hidden_channels=192,
        kernel_sizes=(3, 1),
        whitening=True,
        latent_window=3,
    )


def detector(setting: str, side: int) -> Detector:
    """With random weights, on the device."""
    torch.manual_seed(0)
    model = Detector(architecture(setting, side)).requires_grad_(False)
    draw_gammas(model.flow, 0.2, 0.5)
    return model.to(DEVICE)


def pixels(batch: int, side: int) -> Tensor:
    return torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8, device=DEVICE)


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def rates(functions: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median calls per second of each function; they take turns."""
    calls = {}
    for name, function in functions.items():
        function()
        synchronize()
        started = time.perf_counter()
        function()
        synchronize()
        calls[name] = max(1, round(SECONDS / max(time.perf_counter() - started, 1e-6)))
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            started = time.perf_counter()
            for _ in range(calls[name]):
                function()
            synchronize()
            found[name].append(calls[name] / (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in found.items()}


def peak(tiny: bool) -> Iterator[str]:
    """Rate of a large matrix product and of a copy, the card's limits."""
    side = 256 if tiny else 8192
    matrices = {
        str(dtype).removeprefix("torch."): torch.randn(side, side, device=DEVICE, dtype=dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
    }
    products = {name: partial(torch.mm, matrix, matrix) for name, matrix in matrices.items()}
    source = torch.empty(side * side * 8, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    found = rates({**products, "copy": lambda: target.copy_(source)})
    for name in matrices:
        teraflops = 2 * side**3 * found[name] / 1e12
        yield f"- a product of two {side} x {side} matrices, {name}: {teraflops:.0f} TFLOP/s"
    yield f"- a copy of {source.nbytes / 1e6:.0f} MB: {2 * source.nbytes * found['copy'] / 1e12:.2f} TB/s"


def photographs(folder: str | None, number: int, side: int, seed: int) -> Tensor:
    """Images of the folder; smooth random ones if there is none."""
    if folder is None:
        small = torch.rand(number, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        large = torch.nn.functional.interpolate(small, (side, side), mode="bicubic").clamp(0, 1)
        return (255 * large).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    paths = sorted(path for path in Path(folder).iterdir() if path.is_file())[:number]
    size = Preprocessing((side, side), "stretch", "bicubic")
    return torch.from_numpy(np.stack([decode(path.read_bytes(), size).pixels_HWC for path in paths]))


def fitted(weights: str | None, train: Tensor, usual: Tensor, side: int) -> Detector:
    """The default model as a training leaves it, but for the flow, whose weights are random."""
    model = detector(DEFAULT, side)
    if weights:
        load_weights(model.backbone, torch.load(weights, map_location=DEVICE))
    fit(model, features_of(model, train), features_of(model, usual))
    return model


def fit(model: Detector, y_training: Sequence[Tensor], y_usual: Sequence[Tensor]) -> None:
    """Fits whitening, Gaussians and statistic to features, as a training leaves them."""
    moments = [Moments.around(y_BCHW).with_images(y_BCHW) for y_BCHW in y_training]
    gaussians = gaussians_of(moments).to(y_training[0].device)
    moments = []
    for z_BCHW in model.flow(gaussians.whitening(y_training)).z:
        zero_C = z_BCHW.new_zeros(z_BCHW.shape[1], dtype=torch.float64)
        moments.append(Moments.about(zero_C, z_BCHW.shape[1:]).with_images(z_BCHW))
    fit_latents(gaussians.latents, moments)
    model.gaussians = gaussians
    usual = energies(gaussians, model.flow, y_usual, model.architecture.latent_window)
    model.statistic = fitted_statistic(usual, model.feature_shapes)


def features_of(model: Detector, images: Tensor) -> list[Tensor]:
    parts = [model.features(part.to(DEVICE)) for part in images.split(16)]
    return [torch.cat(level) for level in zip(*parts, strict=True)]


def exactness(arguments: argparse.Namespace) -> Iterator[str]:
    """Differences of scores from those of the trained form on the CPU, in float32."""
    side, count = (64, 8) if arguments.tiny else (256, 192)
    good = photographs(arguments.good, count, side, seed=0)
    bad = photographs(arguments.bad, count // 6, side, seed=1)
    model = fitted(arguments.weights, good[: count * 2 // 3], good[count // 3 : count * 2 // 3], side)
    tested = torch.cat([good[count * 5 // 6 :], bad])
    on_cpu = copy.deepcopy(model).to("cpu")
    exact = Scores(*map(torch.cat, zip(*(on_cpu(part) for part in tested.split(16)), strict=True)))
    yield f"{len(tested)} images, half of them {'defective' if arguments.bad else 'of another kind'}.\n"
    yield "| form | anomaly_score, largest | root mean square | mean | local_score, largest | map, largest |"
    yield "|---|---|---|---|---|---|"
    for precision in ("float32", "float16", "bfloat16"):
        if DEVICE.type == "cpu" and precision != "float32":
            continue
        form = InferenceDetector(model, precision, 16)
        parts = [[value.cpu() for value in form(part)] for part in tested.split(16)]
        found = Scores(*map(torch.cat, zip(*parts, strict=True)))
        off_B = found.anomaly_score_B.double() / exact.anomaly_score_B - 1
        local = (found.local_score_B / exact.local_score_B - 1).abs().max()
        of_map = (found.anomaly_map_BHW - exact.anomaly_map_BHW).abs().max() / exact.anomaly_map_BHW.max()
        yield (
            f"| {precision}{fused(form)} | {off_B.abs().max():.3%} | {off_B.square().mean().sqrt():.3%} "
            f"| {off_B.mean():+.3%} | {local:.3%} | {of_map:.3%} |"
        )


def fused(form: InferenceDetector) -> str:
    is_fused = isinstance(form.features, GpuFeatures) and not form.form.fallbacks
    return ", fused blocks" if is_fused and form.form.precision != "float32" else ""


def capturing(arguments: argparse.Namespace) -> Iterator[str]:
    """A form recorded in a side thread, and used by two threads that take turns."""
    side = 64 if arguments.tiny else 256
    model = detector(DEFAULT, side)
    precision = "float16" if DEVICE.type == "cuda" else "float32"
    batches = [pixels(8, side).cpu() for _ in range(4)]
    forms: list[InferenceDetector] = []
    maker = threading.Thread(target=lambda: forms.append(InferenceDetector(model, precision, 8)))
    maker.start()
    maker.join()
    form, lock = forms[0], threading.Lock()
    expected = [form(batch).anomaly_score_B.cpu() for batch in batches]
    wrong: list[int] = []

    def work() -> None:
        for number in range(40):
            with lock:
                found = form(batches[number % 4]).anomaly_score_B.cpu()
            if not torch.equal(found, expected[number % 4]):
                wrong.append(number)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    yield f"- in a side thread: {form.form}"
    yield f"- scores that differed between two threads that take turns: {len(wrong)} of 80"
    small = form(batches[0][:3]).anomaly_score_B.cpu()
    yield f"- a batch of 3 in place of 8 gives the same scores: {torch.equal(small, expected[0][:3])}"


def anomalib_pass(model: Any, image_BCHW: Tensor, dtype: torch.dtype | None) -> None:
    torch.backends.cudnn.allow_tf32 = True  # PyTorch's default, which anomalib keeps
    with torch.autocast(DEVICE.type, dtype, enabled=dtype is not None):
        model(image_BCHW)
    torch.backends.cudnn.allow_tf32 = False


def speed(setting: str, side: int, batches: Sequence[int], with_anomalib: bool) -> Iterator[str]:
    """Images per second of the bare model, pixels and scores staying on the card."""
    model = detector(setting, side)
    counts = multiplications(model, pixels(1, side))
    gigaflops = {part: 2 * count / 1e9 for part, count in counts.items()}
    yield (
        " and ".join(f"{count:.1f} GFLOP an image in the {part}" for part, count in gigaflops.items()) + ".\n"
    )
    yield "| batch | model | images/s | TFLOP/s | backbone, images/s | TFLOP/s | flow, images/s | TFLOP/s |"
    yield "|---|---|---|---|---|---|---|---|"
    precision = "float16" if DEVICE.type == "cuda" else "float32"
    other = None
    if with_anomalib:
        other = anomalib_model((side, side), 1024).eval().to(DEVICE)
        draw_gammas(other, 0.1, 0.3)
    for batch in batches:
        image_BHWC = pixels(batch, side)
        form = InferenceDetector(model, precision, batch)
        if form.form.batch_size < batch:
            yield f"| {batch} | no room | | | | | | |"
            break
        functions: dict[str, Callable[[], Any]] = {"whole": partial(form, image_BHWC)}
        if isinstance(form.features, GpuFeatures):
            functions |= recorded_parts(form, image_BHWC)
        if other is not None:
            image_BCHW = torch.rand(batch, 3, side, side, device=DEVICE)
            functions["anomalib, float32"] = partial(anomalib_pass, other, image_BCHW, None)
            functions["anomalib, bfloat16 autocast"] = partial(
                anomalib_pass, other, image_BCHW, torch.bfloat16
            )
        found = {name: batch * rate for name, rate in rates(functions).items()}
        cells = [f"{found['whole']:.0f}", f"{found['whole'] * sum(gigaflops.values()) / 1e3:.0f}"]
        for part, count in gigaflops.items():
            cells += [f"{found[part]:.0f}", f"{found[part] * count / 1e3:.0f}"] if part in found else ["", ""]
        yield f"| {batch} | csflow, {precision}{fused(form)} | {' | '.join(cells)} |"
        for name, rate in found.items():
            if name.startswith("anomalib"):
                times = f"{found['whole'] / rate:.1f} times as slow"
                yield f"| {batch} | {name} ({times}) | {rate:.0f} | | | | | |"
        del form, functions
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


def recorded_parts(form: InferenceDetector, image_BHWC: Tensor) -> dict[str, Callable[[], Any]]:
    """Backbone and flow of a form for GPUs, each recorded by itself."""
    y = [y_BCHW.clone() for y_BCHW in form.features(image_BHWC)]
    backbone = Recorded(form.features, image_BHWC, Fallbacks())
    flow = Recorded(lambda _: form.score_features(y), image_BHWC, Fallbacks())
    return {"backbone": partial(backbone, image_BHWC), "flow": partial(flow, image_BHWC)}


def kernels(arguments: argparse.Namespace) -> Iterator[str]:
    """The kernels that take longest, paper's settings."""
    side, batch = (128, 2) if arguments.tiny else (768, 16)
    dtype = torch.float16 if DEVICE.type == "cuda" else torch.float32
    setting = DEFAULT if arguments.tiny else PAPER
    model = GpuDetector(detector(setting, side), dtype, Fallbacks())
    image_BHWC = pixels(batch, side)
    model(image_BHWC)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if DEVICE.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        model(image_BHWC)
        synchronize()
    events = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    total = sum(event.self_device_time_total for event in events)
    yield f"{total / 1e3:.1f} ms for {batch} images of {side} px.\n"
    for event in sorted(events, key=lambda event: -event.self_device_time_total)[:14]:
        yield f"- {event.self_device_time_total / total:.1%}, {event.count} calls: `{event.key[:90]}`"


def training(arguments: argparse.Namespace) -> Iterator[str]:
    """Steps of the flow per second, bfloat16 autocast, features in memory."""
    yield "| flow | batch | layout | steps/s | images/s |"
    yield "|---|---|---|---|---|"
    cases = [(DEFAULT, 64, 2)] if arguments.tiny else [(PAPER, 768, 16), (PAPER, 256, 16), (DEFAULT, 256, 8)]
    for setting, side, batch in cases:
        shapes = detector(setting, side).feature_shapes
        steps: dict[str, Callable[[], Any]] = {}
        for layout in (torch.contiguous_format, torch.channels_last):
            flow = new_flow(architecture(setting, side), shapes)
            flow = flow.to(DEVICE, memory_format=layout)
            y = [
                torch.randn(batch, *shape, device=DEVICE).contiguous(memory_format=layout) for shape in shapes
            ]
            optimizer = new_optimizer(flow.parameters(), 1e-4)
            steps[str(layout).removeprefix("torch.")] = partial(step, flow, y, optimizer)
        for layout_name, rate in rates(steps).items():
            yield f"| {setting}, {side} px | {batch} | {layout_name} | {rate:.1f} | {rate * batch:.0f} |"


def step(flow: torch.nn.Module, y: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
    with torch.enable_grad():
        with torch.autocast(DEVICE.type, torch.bfloat16):
            output = flow(y)
        negative_log_likelihood(output).mean().backward()
        optimizer_step(flow.parameters(), optimizer)


def jpegs(number: int, side: int) -> list[bytes]:
    files = []
    for image_HWC in photographs(None, number, side, seed=2).numpy():
        noisy_HWC = image_HWC + np.random.default_rng(0).integers(0, 24, image_HWC.shape, dtype=np.uint8) // 2
        buffer = io.BytesIO()
        Image.fromarray(noisy_HWC).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def decoded(size: Preprocessing, data: bytes) -> Any:
    return decode(data, size).pixels_HWC


def decoding(arguments: argparse.Namespace) -> Iterator[str]:
    """Images per second of decoding JPEGs, by the processor and by the card."""
    number, workers = (8, 2) if arguments.tiny else (256, os.cpu_count() or 1)
    yield "| JPEG | decoded by | images/s |"
    yield "|---|---|---|"
    for side in (64,) if arguments.tiny else (256, 768):
        files, size = jpegs(number, side), Preprocessing((side, side), "stretch", "bicubic")
        pools: list[tuple[str, Executor]] = [
            ("threads", ThreadPoolExecutor(workers)),
            ("processes", ProcessPoolExecutor(workers, mp_context=get_context("spawn"))),
        ]
        for name, pool in pools:
            with pool:
                # Until every worker has started, and imported what it needs.
                busy = [pool.submit(time.sleep, 1.0) for _ in range(workers)]
                for task in busy:
                    task.result()
                started = time.perf_counter()
                list(pool.map(partial(decoded, size), files, chunksize=4))
                rate = number / (time.perf_counter() - started)
            yield f"| {side} px, {len(files[0]) / 1e3:.0f} kB | {workers} {name} | {rate:.0f} |"
        if DEVICE.type == "cuda":
            from torchvision.io import decode_jpeg

            tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
            found = rates({"card": lambda tensors=tensors: decode_jpeg(tensors, device=DEVICE)})
            yield f"| {side} px | the card, torchvision | {number * found['card']:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", help="file of lite0's weights; random without")
    parser.add_argument("--good", help="folder of good images, for exactness")
    parser.add_argument("--bad", help="folder of defective images")
    parser.add_argument("--tiny", action="store_true", help="small images and models, for tests on a CPU")
    parser.add_argument("--only", help="parts whose title has this in it")
    parser.add_argument("--output", default=str(RESULTS))
    arguments = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # as in csflow's workers
    torch.set_grad_enabled(False)
    tiny = arguments.tiny
    try:
        import anomalib.models.image.csflow.torch_model  # noqa: F401

        with_anomalib = True
    except ImportError:
        with_anomalib = False
    parts: dict[str, Callable[[], Iterator[str]]] = {
        "Limits of the card": partial(peak, tiny),
        "Exactness": partial(exactness, arguments),
        "Recording": partial(capturing, arguments),
        "Kernels": partial(kernels, arguments),
    }
    sizes = (
        [(DEFAULT, 64, (2,))]
        if tiny
        else [
            (PAPER, 768, (8, 32)),
            (PAPER, 256, (8, 32, 128)),
            (DEFAULT, 256, (8, 32, 128)),
            (DEFAULT, 768, (8, 32)),
        ]
    )
    for setting, side, batches in sizes:
        is_theirs = with_anomalib and setting == PAPER
        parts[f"Speed: {setting}, {side} px"] = partial(speed, setting, side, batches, is_theirs)
    parts["Training"] = partial(training, arguments)
    parts["Decoding"] = partial(decoding, arguments)
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor()
    command = " ".join(["python benchmarks/gpu.py", *sys.argv[1:]])
    head = f"# Figures of a GPU\n\n`{command}`\n\n{name}, {os.cpu_count()} CPUs, PyTorch {torch.__version__}"
    lines = [head]
    print(head, flush=True)
    for title, part in parts.items():
        if arguments.only and arguments.only not in title:
            continue
        started = time.perf_counter()
        print(f"\n## {title}\n", flush=True)
        lines.append(f"\n## {title}\n")
        try:
            for line in part():
                print(line, flush=True)
                lines.append(line)
        except Exception:
            traceback.print_exc()
            lines.append("failed: " + traceback.format_exc().strip().splitlines()[-1])
        print(f"\n({time.perf_counter() - started:.0f} s)", flush=True)
        Path(arguments.output).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
