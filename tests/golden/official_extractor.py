"""Writes what the official code's feature extractor gives, for tests/test_import.py.

    pip install efficientnet_pytorch==0.7.1
    python tests/golden/official_extractor.py

The official code takes the output of block 35 of `efficientnet-b5`, at three scales of `F.interpolate`.
"""

from pathlib import Path

import extractors
import numpy as np
import torch
import torch.nn.functional as F
from efficientnet_pytorch import EfficientNet
from torch import Tensor

LAST_BLOCK = 35
MEAN, STD = (torch.tensor(values) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def features(network: EfficientNet, x_BCHW: Tensor) -> Tensor:
    x_BCHW = network._swish(network._bn0(network._conv_stem(x_BCHW)))
    for block in network._blocks[: LAST_BLOCK + 1]:
        x_BCHW = block(x_BCHW)
    return x_BCHW


@torch.no_grad()
def main() -> None:
    network = EfficientNet.from_name("efficientnet-b5").eval()
    network.load_state_dict(extractors.weights(network.state_dict()))
    pixel_BHWC = (torch.from_numpy(extractors.images()).float() / 255 - MEAN) / STD
    pixel_BCHW = pixel_BHWC.permute(0, 3, 1, 2)
    found = {}
    for s in range(3):
        side = extractors.SIDE // 2**s
        scale = F.interpolate(pixel_BCHW, size=(side, side)) if s else pixel_BCHW
        found[f"scale{s}"] = features(network, scale).numpy()
    np.savez_compressed(Path(__file__).with_name("efficientnet_pytorch.npz"), **found)


if __name__ == "__main__":
    main()
