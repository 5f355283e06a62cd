"""The edge runtime beside PyTorch, on one core: start-up to the first score, memory, images per second.

Times are of the processor, which other work on the machine changes least.

    csflow export demo/model --to onnx --output edge/cells.onnx
    csflow export demo/model --to openvino --output edge/cells.xml
    taskset -c 0 python benchmarks/edge.py --model demo/model --artefacts edge/cells.onnx edge/cells.xml \\
        --images demo/cells/defective

With `--paper`, both are models of the paper's size with random weights, which the script makes and exports
itself: csflow's, and anomalib's `Csflow` as its own OpenVINO export has it. The latter needs anomalib:

    taskset -c 0 anomalib-env/bin/python benchmarks/edge.py --paper --images demo/cells/defective

Each row is the median of several processes, one form after the other in every round. A process imports,
loads, scores its first image, then scores the others one by one, reading and decoding included.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

FORMS = ("PyTorch, scoring form", "PyTorch, trained form")
ANOMALIB = "anomalib.xml"
SIDE = 256


def anomalib_scorer(file: Path) -> Callable[[Path], float]:
    """anomalib's exported model, which resizes and normalises itself; decoding is Pillow's."""
    import numpy as np
    import openvino
    from PIL import Image

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    request = openvino.Core().compile_model(file, "CPU", settings).create_infer_request()

    def score(path: Path) -> float:
        pixels_HWC = np.asarray(Image.open(path).convert("RGB").resize((SIDE, SIDE)), np.float32) / 255
        return float(request.infer([pixels_HWC.transpose(2, 0, 1)[None]])["pred_score"].item())

    return score


def write_paper_models(folder: Path, image: Path) -> tuple[Path, list[str]]:
    """csflow's model of the paper's settings and its artefact, and anomalib's export of its own."""
    import model as bare_model
    import openvino
    import plant
    import torch

    written = plant.write_model(folder / "model", plant.SETTINGS["paper"])
    artefact = folder / "csflow.xml"
    words = ["export", str(written), "--to", "openvino", "--output", str(artefact), "--self_test", str(image)]
    subprocess.run([sys.executable, "-m", "csflow.cli", *words], check=True)
    theirs = bare_model.anomalib_model((SIDE, SIDE), 1024).eval()
    bare_model.draw_gammas(theirs, 0.1, 0.3)
    onnx = folder / "anomalib.onnx"
    pixels = torch.rand(1, 3, SIDE, SIDE)
    names = {"input_names": ["input"], "output_names": ["pred_score", "anomaly_map"]}
    torch.onnx.export(theirs, (pixels,), onnx, dynamo=False, **names)
    openvino.save_model(openvino.convert_model(onnx), folder / ANOMALIB, compress_to_fp16=False)
    return written, [str(artefact), str(folder / ANOMALIB)]


def scorer(form: str, model: Path) -> Callable[[Path], float]:
    """A function that scores one image file."""
    if form == FORMS[0]:
        import csflow

        loaded = csflow.load(model, precision="float32", device="cpu")
        return lambda path: loaded.score(path).anomaly_score
    if form.endswith(ANOMALIB):
        return anomalib_scorer(Path(form))
    from csflow.images import decode

    if form == FORMS[1]:
        import torch

        from csflow.model_directory import load_model
        from csflow.storage import Location

        detector = load_model(Location(str(model))).detector

        @torch.inference_mode()
        def score(path: Path) -> float:
            pixels_HWC = decode(path.read_bytes(), detector.architecture.preprocessing).pixels_HWC
            return float(detector(torch.from_numpy(pixels_HWC)[None]).anomaly_score_B.item())

        return score
    from csflow.edge.artefact import Artefact

    artefact = Artefact(Path(form))
    artefact.check()
    return lambda path: float(
        artefact.judge(decode(path.read_bytes(), artefact.preprocessing)).anomaly_score_B[0]
    )


def measure(form: str, model: Path, images: list[Path]) -> None:
    """Prints what one process of this form needs, as JSON."""
    from csflow.process import peak_memory_bytes

    score = scorer(form, model)
    first = score(images[0])
    start_s = time.process_time()
    for path in images:
        score(path)
    rate = len(images) / (time.process_time() - start_s)
    print(json.dumps({"start_s": start_s, "rate": rate, "memory": peak_memory_bytes(), "score": first}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--artefacts", nargs="+")
    parser.add_argument("--paper", action="store_true", help="models of the paper's size, and anomalib's")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--form", help=argparse.SUPPRESS)
    options = parser.parse_args()
    images = sorted(options.images.iterdir())[: options.count]
    if options.form:
        measure(options.form, options.model, images)
        return
    if options.paper:
        with tempfile.TemporaryDirectory() as folder:
            options.model, options.artefacts = write_paper_models(Path(folder), images[0])
            compare(options)
    elif options.model and options.artefacts:
        compare(options)
    else:
        parser.error("give --model and --artefacts, or --paper")


def compare(options: argparse.Namespace) -> None:
    """Runs each form in processes of its own, and prints their medians."""
    found = defaultdict(list)
    for _ in range(options.rounds):
        for form in (*FORMS, *options.artefacts):
            words = [sys.executable, __file__, "--images", str(options.images), "--count", str(options.count)]
            words += ["--model", str(options.model), "--form", form]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
            found[form].append(json.loads(done.stdout.splitlines()[-1]))
    print("| form | first score after | peak memory | images/s | score of the first image |")
    print("|---|---|---|---|---|")
    for form, runs in found.items():
        start_s, rate, memory = (statistics.median(r[n] for r in runs) for n in ("start_s", "rate", "memory"))
        score = runs[0]["score"]
        print(f"| {form} | {start_s:.1f} s | {memory / 1e6:,.0f} MB | {rate:.1f} | {score:.7g} |")


if __name__ == "__main__":
    main()
