"""Imports a CS-Flow model: a state dict of the official code or a checkpoint of anomalib (docs/import.md)."""

import hashlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from pydantic import Field

import csflow
from csflow.calibration import lowest_rate
from csflow.config import ListingConfig, Locations, ModelName, Side
from csflow.console import say, warn
from csflow.errors import ExitStatus, WrongUse
from csflow.heldout import heldout_calibration
from csflow.importing.checkpoints import (
    SCALES,
    ForeignModel,
    ForeignModelError,
    load_extractor,
    read_foreign,
    tensors_of,
)
from csflow.model import PAPER_STAGE, Architecture, BackboneError, Detector, load_weights
from csflow.model_directory import check_free, save_model
from csflow.storage import Location
from csflow.weights import find_weights, is_inflated, load_pickled

BACKBONES = {"official": "tf_efficientnet_b5", "anomalib": "efficientnet_b5"}
IMAGE_SIZES = {"official": (768, 768), "anomalib": (256, 256)}
"""Default image size of each code base."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Default normalisation of both code bases."""

REPRESENTED = {"Compose", "Normalize", "Resize", "ToDtype", "ToImage"}
"""Transforms that csflow's preprocessing also does."""

CARD = """\
# Imported: {source} CS-Flow, {blocks} coupling blocks, {height} × {width} px

A CS-Flow defect detector that was trained by other code ({source}) and imported by csflow {version}. Score
images with it: `csflow score --model <this folder> --input <images> --output <folder>`.

| | |
|---|---|
| imported from | `{file}`, SHA-256 {digest} |
| backbone | {backbone}, weights: {weights} |
| hidden channels | {hidden_channels} |
| calibration images | {images} |
| calibration score, median | {median:.4f} |
| calibration score, 95 % | {high:.4f} |
| smallest possible p-value | {smallest:g} |

Images of the model's size have the scores of the original; `docs/import.md` tells how resized ones differ.
P-values compare an image's anomaly score with those of the images in
`calibration.parquet`; whether these took no part in training is known to whoever chose them.
"""


class ImportConfig(ListingConfig):
    """Settings of the import."""

    checkpoint: str
    """State dict of the official CS-Flow (.pth, .pt or .safetensors), or checkpoint of anomalib's Csflow
    (.ckpt)."""
    output: str
    """Model directory to write."""
    calibrate: Locations
    """Normal images from which to compute p-values; the model must not have been trained on them. One or more
    folders, files, archives or manifests."""
    name: ModelName | None = None
    """What to call the model, usually the product or the camera that it is for. The name is stored with every
    score."""
    backbone: str | None = None
    """Feature extractor: name of a timm network. [default: the EfficientNet-B5 of the code that trained the
    flow]"""
    cut_after: str | None = Field(None, min_length=1)
    """Module after which the backbone ends. [default: blocks.5 (stage 6) of an EfficientNet]"""
    weights: str | None = None
    """Weights of the backbone that the flow was trained on: a file's path or URL, an installed package, or
    `timm` (downloads). [default: those in the checkpoint; required if it has none, or with
    --backbone]"""
    image_size: list[Side] | None = Field(None, min_length=1, max_length=2)
    """Size of the images that the model was trained on, in pixels: one side, or height and width; at
    most 8192. [default: what the checkpoint says, else 768 for official and 256 for anomalib]"""
    overwrite: bool = False
    """Replace a model that --output already holds."""


def import_model(config: ImportConfig) -> ExitStatus:
    """Converts, calibrates and saves. Raises WrongUse if a setting or the checkpoint is wrong."""
    output = Location(config.output, config.storage_options)
    check_free(output, config.overwrite)
    output.check_writable()
    location = Location(config.checkpoint, config.storage_options)
    data = _read(location)
    try:
        foreign = read_foreign(_load(location, data))
        detector, weights = build_detector(foreign, config)
    except ForeignModelError as error:
        raise WrongUse(f"--checkpoint {location}: {error}") from None
    height, width = detector.architecture.image_size
    say(f"{foreign.source} flow of {len(foreign.kernel_sizes)} coupling blocks, {height} x {width} px")
    for name in foreign.preprocessing.keys() - REPRESENTED:
        warn(f"the model was trained on images after {name}, which csflow does not do")
    result = heldout_calibration(detector, config.calibrate, config, "--calibrate")
    if result is None:
        return ExitStatus.INCOMPLETE
    calibration, unreadable = result
    origin = {
        "imported_from": foreign.source,
        "file": location.name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "weights": weights,
    }
    model_id = save_model(
        output,
        detector,
        calibration,
        name=config.name,
        training=origin,
        data={"calibration_images": calibration.num_rows, "unreadable_images": unreadable},
        metrics={},
        card={"README.md": _card(detector, calibration, origin).encode()},
    )
    print(f"model {model_id} written to {output}, calibrated on {calibration.num_rows} images")
    return ExitStatus.DONE


def build_detector(foreign: ForeignModel, config: ImportConfig) -> tuple[Detector, str]:
    """A detector with the foreign flow, and the origin of its backbone's weights.

    Raises:
        WrongUse: backbone, weights or image size do not fit.
        ForeignModelError: the feature extractor in the checkpoint is of another architecture.
    """
    size = config.image_size or foreign.image_size or IMAGE_SIZES[foreign.source]
    backbone = config.backbone or BACKBONES[foreign.source]
    architecture = Architecture(
        backbone=backbone,
        image_size=(size[0], size[-1]),
        cut_after=config.cut_after or (PAPER_STAGE if "efficientnet" in backbone else None),
        scales=SCALES,
        hidden_channels=foreign.hidden_channels,
        kernel_sizes=foreign.kernel_sizes,
        subsampling="first",
        static_padding=foreign.source == "official" and backbone.startswith("tf_efficientnet"),
    )
    is_own = bool(foreign.extractor) and config.weights is None and config.backbone is None
    try:
        detector = Detector(architecture)
        (channels,) = detector.backbone.channels
        if channels != foreign.channels:
            raise WrongUse(
                f"--backbone {architecture.backbone} gives {channels} channels, the flow "
                f"takes {foreign.channels}; name the backbone it was trained on, and --cut_after"
            )
        if is_own:
            load_extractor(detector.backbone, foreign.extractor)
        elif config.weights is None:
            # No default: on the features of other weights a flow is worth nothing, and nobody would notice.
            raise WrongUse(
                "--weights is required, since the checkpoint holds no feature extractor: name the file of "
                "the weights that the flow was trained on"
            )
        else:
            weights = find_weights(config.weights, architecture.backbone, config.storage_options)
            load_weights(detector.backbone, weights)
    except BackboneError as error:
        raise WrongUse(f"--{error.setting}: {error}") from None
    except ForeignModelError:
        raise
    except ValueError as error:
        raise WrongUse(f"--image_size: {error}") from None
    detector.flow = foreign.flow
    normalization = foreign.preprocessing.get("Normalize", {})
    for name, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        detector.get_buffer(name).copy_(torch.tensor(normalization.get(name, default)))
    return detector.eval(), config.weights or "those of the checkpoint"


def _read(location: Location) -> bytes:
    try:
        return location.read()
    except (FileNotFoundError, NotADirectoryError):
        raise WrongUse(f"--checkpoint {location} does not exist") from None
    except Exception as error:
        raise WrongUse(f"--checkpoint {location} cannot be read: {type(error).__name__}: {error}") from None


def _load(location: Location, data: bytes) -> Mapping[str, Any]:
    """The tensors and plain containers of a file; no pickled code in it is executed."""
    try:
        if location.url.endswith(".safetensors"):
            return safetensors.torch.load(data)
        loaded = load_pickled(data)
    except Exception as error:
        objects = _foreign_objects(data)
        if not objects:
            raise WrongUse(
                f"--checkpoint {location} is no readable checkpoint: {type(error).__name__}"
            ) from None
        raise WrongUse(
            f"--checkpoint {location} holds pickled objects ({', '.join(objects[:3])}), and csflow executes "
            "none. Where it was trained, keep its tensors alone: for a whole model "
            "torch.save(torch.load(path, weights_only=False).state_dict(), 'flow.pth'), for a Lightning "
            "checkpoint torch.save(torch.load(path, weights_only=False)['state_dict'], 'flow.pth')"
        ) from None
    if not isinstance(loaded, Mapping):
        raise WrongUse(f"--checkpoint {location} is no state dict; save model.state_dict()")
    if is_inflated(tensors_of(loaded).values(), len(data)):
        raise WrongUse(f"--checkpoint {location} describes tensors of more bytes than it has; save them anew")
    return loaded


def _foreign_objects(data: bytes) -> list[str]:
    """Names of the classes and functions that loading the file would import."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data)))
    except Exception:  # no checkpoint at all, in one of many ways
        return []


def _card(detector: Detector, calibration: pa.Table, origin: Mapping[str, str]) -> str:
    architecture, scores = detector.architecture, calibration["anomaly_score"].to_numpy()
    return CARD.format(
        source=origin["imported_from"],
        blocks=len(architecture.kernel_sizes),
        height=architecture.image_size[0],
        width=architecture.image_size[1],
        version=csflow.__version__,
        file=origin["file"],
        digest=origin["sha256"],
        backbone=architecture.backbone,
        weights=origin["weights"],
        hidden_channels=architecture.hidden_channels,
        images=len(scores),
        median=np.median(scores),
        high=np.quantile(scores, 0.95),
        smallest=lowest_rate(len(scores)),
    )
