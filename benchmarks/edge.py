"""The edge runtime beside PyTorch, on one core: start-up to the first score, memory, images per second.

Times are of the processor, which other work on the machine changes least.

    csflow export demo/model --to onnx --output edge/cells.onnx
    csflow export demo/model --to openvino --output edge/cells.xml
    taskset -c 0 python benchmarks/edge.py --model demo/model --artefacts edge/cells.onnx edge/cells.xml \\
        --images demo/cells/defective

Each row is the median of several processes, one form after the other in every round. A process imports,
loads, scores its first image, then scores the others one by one, reading and decoding included.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

FORMS = ("PyTorch, scoring form", "PyTorch, trained form")


def scorer(form: str, model: Path) -> Callable[[Path], float]:
    """A function that scores one image file."""
    if form == FORMS[0]:
        import csflow

        loaded = csflow.load(model, precision="float32", device="cpu")
        return lambda path: loaded.score(path).anomaly_score
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
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--artefacts", nargs="+", required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--form", help=argparse.SUPPRESS)
    options = parser.parse_args()
    images = sorted(options.images.iterdir())[: options.count]
    if options.form:
        measure(options.form, options.model, images)
        return
    found = defaultdict(list)
    for _ in range(options.rounds):
        for form in (*FORMS, *options.artefacts):
            words = [sys.executable, __file__, *sys.argv[1:], "--form", form]
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
