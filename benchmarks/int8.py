"""The backbone in INT8, as NNCF quantises it after training, beside float32: time and rounding errors.

    pip install nncf
    python benchmarks/int8.py --images cells/functional/train
    python benchmarks/int8.py --images cells/functional/train --backbone tf_efficientnet_b5 --weights b5.pth

Both forms are whole networks that OpenVINO compiles for eight images, in one thread; processor time, medians
of interleaved passes. The errors are root mean squares of each map, relative to its standard deviation.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import nncf
import numpy as np
import openvino
import torch
from torch import Tensor, nn

from csflow.config import parse
from csflow.images import decode
from csflow.model.backbone import stage_maps
from csflow.model.openvino_backbone import _converted, _settings
from csflow.training.config import TrainConfig
from csflow.training.job import build_detector

BATCH, CALIBRATING, ROUNDS = 8, 32, 15


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--backbone")
    parser.add_argument("--weights")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = ["--input", str(arguments.images), "--output", "none", "--image_size", str(arguments.side)]
    for name in ("backbone", "weights"):
        if value := getattr(arguments, name):
            settings += [f"--{name}", value]
    detector = build_detector(parse(TrainConfig, None, settings))
    paths = sorted(arguments.images.iterdir())[:CALIBRATING]
    images = [decode(path.read_bytes(), detector.architecture.preprocessing).pixels_HWC for path in paths]
    pixel_BHWC = detector._normalised(torch.from_numpy(np.stack(images))).permute(0, 2, 3, 1).contiguous()

    def network(pixel_BHWC: Tensor) -> list[Tensor]:
        layers = detector.backbone.layers
        assert isinstance(layers, nn.Sequential)
        return stage_maps(layers, detector.backbone.is_stage, pixel_BHWC.permute(0, 3, 1, 2))

    exact = _converted(network, pixel_BHWC[:1])
    exact.reshape(openvino.PartialShape([1, *pixel_BHWC.shape[1:]]))
    dataset = nncf.Dataset([pixel_1HWC.numpy() for pixel_1HWC in pixel_BHWC.split(1)])
    int8 = nncf.quantize(exact, dataset, subset_size=CALIBRATING, preset=nncf.QuantizationPreset.MIXED)
    requests, maps, seconds = {}, {}, {}
    for name, form in (("float32", exact), ("int8", int8)):
        form.reshape(openvino.PartialShape([BATCH, *pixel_BHWC.shape[1:]]))
        compiled = openvino.Core().compile_model(form, "CPU", _settings(torch.float32))
        requests[name], seconds[name] = compiled.create_infer_request(), []
        maps[name] = [
            map_BCHW.copy() for map_BCHW in requests[name].infer([pixel_BHWC[:BATCH].numpy()]).to_tuple()
        ]
    for _ in range(ROUNDS):
        for name, request in requests.items():
            started = time.process_time()
            request.infer([pixel_BHWC[:BATCH].numpy()])
            seconds[name].append(time.process_time() - started)
    errors = [
        f"{np.sqrt(((a - b) ** 2).mean()) / a.std():.1%}"
        for a, b in zip(maps["float32"], maps["int8"], strict=True)
    ]
    for name, times in seconds.items():
        print(f"{name}: {median(times) / BATCH * 1000:.1f} ms per image")
    print(f"errors of int8: {', '.join(errors)}")


if __name__ == "__main__":
    main()
