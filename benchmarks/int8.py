"""An exported model in INT8, as NNCF quantises it after training, beside float32: what it gains and loses.

    pip install 'csflow[int8]'
    csflow export demo/model --to onnx --output edge/cells.onnx
    taskset -c 0 python benchmarks/int8.py --artefact edge/cells.onnx --model demo/model \\
        --good demo/cells/functional/train --labels demo/cells/labels.csv --images 500

The convolutions of the backbone, of the flow, of both, or all but the first two by depth are quantised by
good images; everything else stays in float32. Processor time of passes of one image in one thread, one form
after the other for every image.
"""

import argparse
import logging
import random
import time
from pathlib import Path
from statistics import median

import nncf
import numpy as np
import onnx
import openvino
from scipy.stats import spearmanr

from csflow.evaluation.labels import read_labels
from csflow.evaluation.ranking import Ranking, bootstrap_intervals
from csflow.exporting.int8 import by_depth
from csflow.images import decode
from csflow.model_directory import load_model
from csflow.storage import Location

CALIBRATING, RESAMPLES = 200, 1000
PRODUCTS = {"Convolution", "GroupConvolution", "MatMul"}


def quantised(network: openvino.Model, chosen: set[str], images: list[np.ndarray]) -> openvino.Model:
    """The network with these products in INT8."""
    types = {op.get_type_name() for op in network.get_ops()} - PRODUCTS
    products = [op.get_friendly_name() for op in network.get_ops() if op.get_type_name() in PRODUCTS]
    # A convolution with a bias becomes two operators, `name/WithoutBiases` and the sum.
    others = [name for name in products if name.split("/")[0] not in chosen]
    return nncf.quantize(
        network,
        nncf.Dataset(images),
        subset_size=len(images),
        preset=nncf.QuantizationPreset.MIXED,
        ignored_scope=nncf.IgnoredScope(names=others, types=sorted(types), validate=False),
        # As csflow export does it: weights of 7 bits, which give the same scores on processors without VNNI.
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artefact", type=Path, required=True, help="the model, exported to ONNX")
    parser.add_argument("--model", required=True)
    parser.add_argument("--good", type=Path, required=True, help="a folder of images to quantise by")
    parser.add_argument("--labels", required=True)
    parser.add_argument("--images", type=int, default=500, help="number of labelled images of each class")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="these rows of the table, beside float32")
    arguments = parser.parse_args()
    nncf.set_log_level(logging.ERROR)
    preprocessing = load_model(Location(arguments.model)).detector.architecture.preprocessing

    def pixels(file: Path) -> np.ndarray:
        return decode(file.read_bytes(), preprocessing).pixels_HWC[None]

    good = sorted(arguments.good.iterdir())
    calibrating = [pixels(file) for file in good[:: max(1, len(good) // CALIBRATING)][:CALIBRATING]]
    labels = read_labels(Location(arguments.labels))
    drawn = random.Random(0)
    chosen = [
        uri
        for is_defective in (True, False)
        for uri in drawn.sample(
            sorted(uri for uri, label in labels.items() if label.is_defective == is_defective),
            arguments.images,
        )
    ]
    nodes = [node for node in onnx.load(arguments.artefact).graph.node if node.op_type == "Conv"]
    convolutions = [node.name for node in nodes]
    # As csflow export takes them. The first two are the stems, of the two sizes in which an image is seen.
    core = openvino.Core()
    deeper = by_depth(core.read_model(arguments.artefact))[2:]
    of_backbone = {node.name for node in nodes if ".backbone." in node.input[1]}  # the name of its weight
    parts = {
        "float32": set(),
        "backbone in INT8": of_backbone,
        "flow in INT8": set(convolutions) - of_backbone,
        "both in INT8": set(convolutions),
        "all but the first two in INT8": {name.split("/")[0] for name in deeper},
    }
    if arguments.only:
        parts = {name: parts[name] for name in ("float32", *arguments.only)}
    requests, scores, seconds = {}, {}, {}
    for name, products in parts.items():
        network = core.read_model(arguments.artefact)
        if products:
            network = quantised(network, products, calibrating)
        network.reshape([1, *preprocessing.image_size, 3])
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
        requests[name] = core.compile_model(network, "CPU", settings).create_infer_request()
        scores[name], seconds[name] = [], []
    for uri in chosen:
        image = pixels(Path(uri))
        for name, request in requests.items():
            started = time.process_time()
            scores[name].append(float(np.array(request.infer([image])["anomaly_score"])[0]))
            seconds[name].append(time.process_time() - started)
    print("| | AUROC | 95 % interval | rank correlation with float32 | images/s |\n|---|---|---|---|---|")
    for name, found in scores.items():
        ranking = Ranking.of([labels[uri].is_defective for uri in chosen], found)
        low, high = bootstrap_intervals(ranking, RESAMPLES)["image_auroc"]
        correlation = spearmanr(scores["float32"], found)[0]
        print(
            f"| {name} | {ranking.metrics()['image_auroc']:.3f} | {low:.3f} to {high:.3f} | "
            f"{correlation:.3f} | {1 / median(seconds[name]):.1f} |"
        )


if __name__ == "__main__":
    main()
