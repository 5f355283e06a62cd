"""Converts CS-Flow models of other code bases to the names and layout of csflow's flow and backbone.

*Official* is marco-rudolph/cs-flow. No checkpoint has its permutations: block k draws those of its three
scales one after the other from NumPy's legacy generator, seeded with k. *anomalib* draws one permutation for
all scales from NumPy's new generator, seeded with k. Otherwise both flows are like csflow's: the first half
of the channels is transformed first, upsampling is bilinear, the clamp is 3.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from csflow.model import Backbone, CrossScaleFlow
from csflow.model.flow import SOFT_CLAMP

SCALES = 3

_TORCHVISION_EPS = 1e-3
"""ε of the batch norms in torchvision's EfficientNet-B5, which anomalib uses."""

_FLOW_TENSOR = re.compile(
    r"(?:.*\.)?module_list\.(?P<node>\d+)\."
    r"(?P<subnetwork>s1|s2|cross_convolution1|cross_convolution2)\.(?P<tensor>.+)"
)
_EXTRACTOR_TENSOR = re.compile(r"(?P<network>.*feature_extractor\.(?:.*\.)?)features\.(?P<stage>[0-6])\..+")

_LAYERS = {
    "enter": ("conv_scale0_0", "conv_scale1_0", "conv_scale2_0"),
    "same": ("conv_scale0_1", "conv_scale1_1", "conv_scale2_1"),
    "down": ("down_conv01", "down_conv12"),
    "up": ("up_conv10", "up_conv21"),
}


class ForeignModelError(ValueError):
    """The tensors are not a known CS-Flow model, or csflow cannot represent it."""


@dataclass(frozen=True)
class ForeignModel:
    """A trained flow of another code base, and what else its checkpoint says."""

    source: str
    """`official` or `anomalib`."""
    flow: CrossScaleFlow
    channels: int
    hidden_channels: int
    kernel_sizes: tuple[int, ...]
    extractor: Mapping[str, Tensor]
    """The feature extractor's tensors in torchvision's order; empty if the checkpoint has none."""
    preprocessing: Mapping[str, Mapping[str, Any]]
    """anomalib's preprocessing: arguments by name of the transform; empty if the checkpoint does not say."""

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width; None if the checkpoint does not say."""
        size: Any = self.preprocessing.get("Resize", {}).get("size")
        is_pair = isinstance(size, Sequence) and len(size) == 2 and all(isinstance(n, int) for n in size)
        return (size[0], size[1]) if is_pair else None


def read_foreign(checkpoint: Mapping[str, Any]) -> ForeignModel:
    """The flow of a state dict, or of a Lightning checkpoint around one. Raises ForeignModelError."""
    state = tensors_of(checkpoint)
    blocks = _blocks(state)
    source = "anomalib" if "cross_convolution1.gamma0" in blocks[0] else "official"
    _check_clamp(checkpoint.get("hyper_parameters"))
    try:
        entering = [[tensors[f"{n}.conv_scale0_0.weight"] for n in _names(tensors)] for tensors in blocks]
        if not all(weight.numel() for weight in entering[0]):
            raise ValueError("weights without values")
        kernel_sizes = tuple(weights[0].shape[2] for weights in entering)
        hidden_channels, channels = entering[0][0].shape[0], sum(weight.shape[1] for weight in entering[0])
        # Without memory: the sizes are those of single tensors, and need not fit the others.
        with torch.device("meta"):
            flow = CrossScaleFlow(channels, SCALES, hidden_channels, kernel_sizes)
        flow.load_state_dict(
            {
                f"blocks.{b}.{name}": value
                for b, tensors in enumerate(blocks)
                for name, value in _convert_block(tensors, permutations(source, b, channels)).items()
            },
            assign=True,
        )
    except (IndexError, KeyError, RuntimeError, ValueError) as error:
        raise ForeignModelError(f"its tensors are not those of a three-scale CS-Flow: {error}") from None
    _check_gamma(flow)
    return ForeignModel(
        source,
        flow,
        channels,
        hidden_channels,
        kernel_sizes,
        extractor=_extractor(state),
        preprocessing=_transforms(checkpoint.get("anomalib_pre_processor_config")),
    )


def permutations(source: str, block: int, channels: int) -> list[Tensor]:
    """A coupling block's permutation of each scale: output channel j takes input channel p[j]."""
    if source == "anomalib":
        drawn = [np.random.default_rng(block).permutation(channels)] * SCALES
    else:
        legacy = np.random.RandomState(block)
        drawn = [legacy.permutation(channels) for _ in range(SCALES)]
    return [torch.from_numpy(permutation_C.astype(np.int64)) for permutation_C in drawn]


def load_extractor(backbone: Backbone, extractor: Mapping[str, Tensor]) -> None:
    """Loads torchvision's EfficientNet-B5 into timm's `efficientnet_b5`, both cut after the sixth stage.

    Raises:
        ForeignModelError: the weights belong to another architecture.
    """
    own = backbone.layers.state_dict()
    fits = len(own) == len(extractor) and all(
        a.shape == b.shape for a, b in zip(own.values(), extractor.values(), strict=True)
    )
    if not fits:
        raise ForeignModelError(f"its feature extractor is not a {backbone.name} up to {backbone.cut_after}")
    backbone.layers.load_state_dict(dict(zip(own, extractor.values(), strict=True)))
    for module in backbone.layers.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
            # 1 / √(σ² + ε) is the same with the difference of both ε added to σ².
            module.running_var += _TORCHVISION_EPS - module.eps


def tensors_of(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, or of that in a Lightning checkpoint. Raises ForeignModelError."""
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, Mapping):
        raise ForeignModelError("its state_dict is none")
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def _blocks(state: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of each coupling block. The original's graph has other nodes between the blocks."""
    nodes: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, value in state.items():
        if match := _FLOW_TENSOR.fullmatch(name):
            nodes[int(match["node"])][f"{match['subnetwork']}.{match['tensor']}"] = value
    if not nodes:
        raise ForeignModelError(
            "it holds no tensors of a flow (module_list.<n>.s1.… of the official code, or "
            "model.graph.graph.module_list.<n>.cross_convolution1.… of anomalib)"
        )
    return [nodes[node] for node in sorted(nodes)]


def _names(tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """The code base's names of the subnetworks that transform the first and the second half."""
    # 1 and 2 name the half that is read: what reads the second half transforms the first.
    if "cross_convolution1.gamma0" in tensors:
        return "cross_convolution2", "cross_convolution1"
    return "s2", "s1"


def _convert_block(tensors: Mapping[str, Tensor], drawn: Sequence[Tensor]) -> dict[str, Tensor]:
    """The state dict of csflow's `CouplingBlock`."""
    converted = {f"permutation_{s}": permutation_C for s, permutation_C in enumerate(drawn)}
    for ours, theirs in zip(("subnetwork_first", "subnetwork_second"), _names(tensors), strict=True):
        gamma = [tensors[f"{theirs}.gamma{s}"].float().reshape(()) for s in range(SCALES)]
        converted[f"{ours}.gamma_S"] = torch.stack(gamma)
        for layer, names in _LAYERS.items():
            for s, name in enumerate(names):
                for kind in ("weight", "bias"):
                    converted[f"{ours}.{layer}.{s}.{kind}"] = tensors[f"{theirs}.{name}.{kind}"].float()
    return converted


def _check_clamp(settings: Any) -> None:
    clamp = settings.get("clamp", SOFT_CLAMP) if isinstance(settings, Mapping) else SOFT_CLAMP
    if not isinstance(clamp, int | float) or clamp != SOFT_CLAMP:
        raise ForeignModelError(f"it was trained with clamp {clamp}; csflow's flow has {SOFT_CLAMP:g}")


def _check_gamma(flow: CrossScaleFlow) -> None:
    gammas = [value for name, value in flow.state_dict().items() if name.endswith("gamma_S")]
    if not any(gamma_S.any() for gamma_S in gammas):
        raise ForeignModelError(
            "every γ is 0: it is untrained, or was trained with use_gamma = False, which csflow does not have"
        )


def _extractor(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    networks: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, value in state.items():
        if match := _EXTRACTOR_TENSOR.fullmatch(name):
            # anomalib keeps the network twice, whole and cut; both are the same tensors.
            networks[match["network"]][name] = value
    return next(iter(networks.values()), {})


def _transforms(config: Any) -> dict[str, Mapping[str, Any]]:
    """All transforms that a stored preprocessing describes."""
    found: dict[str, Mapping[str, Any]] = {}
    waiting, seen = [config], set()
    while waiting:
        value = waiting.pop()
        # A pickle may hold one list a thousand times in another, and so on.
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            if "class_path" in value and isinstance(value.get("init_args"), Mapping):
                found.setdefault(str(value["class_path"]).rpartition(".")[2], value["init_args"])
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return found
