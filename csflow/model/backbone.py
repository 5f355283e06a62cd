"""The frozen feature extractor: a timm network whose maps behind some stages are the features."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from csflow.preprocessing import Interpolation

PAPER_STAGE = "blocks.5"
"""The sixth stage of an EfficientNet, where the paper cuts its B5."""

DEFAULT_STAGES: Mapping[str, tuple[str, ...]] = {"EfficientNet": (PAPER_STAGE,)}
"""By what a timm network's class is called; of other networks it is the last feature level."""

PROBE_SIDE = 128
"""Of the image that finds out what a backbone's maps are like."""


class BackboneError(ValueError):
    """The network or the weights cannot serve as a backbone."""


class Backbone(nn.Module):
    """A timm network up to a stage; always in eval mode and without gradients."""

    def __init__(
        self,
        name: str,
        cut_after: Sequence[str] | str | None = None,
        is_proven: bool = False,
    ) -> None:
        """Builds the network with random weights, and no download.

        Args:
            name: of a timm model.
            cut_after: stages whose maps are wanted: modules such as `blocks.5` or `layer3`, one or
                several in any order. The network ends after the deepest. By default `default_stages`.
            is_proven: this backbone was built before. Spares the pass through the whole network that proves
                the cut right.

        Raises:
            BackboneError: timm knows no such network, or it is no chain of modules up to the cut.
        """
        super().__init__()
        network = _create(name)
        self.name = name
        published = cast(dict[str, Any], network.pretrained_cfg)
        self.mean: tuple[float, ...] = tuple(published["mean"])
        self.std: tuple[float, ...] = tuple(published["std"])
        self.interpolation: Interpolation = (
            "bilinear" if published.get("interpolation") == "bilinear" else "bicubic"
        )
        """The filter of resizing with which the network was tested: timm has these two."""
        self.known_stages = {
            level["module"]: level["reduction"] for level in cast(list[dict[str, Any]], network.feature_info)
        }
        """Stages that timm names, with their strides."""
        wanted = (cut_after,) if isinstance(cut_after, str) else cut_after or default_stages(network)
        chain = dict(_chain(network, wanted))
        self.stages = tuple(path for path in chain if path in wanted)
        """From shallow to deep."""
        for lost in sorted(set(wanted) - chain.keys()):
            raise BackboneError(
                f"{lost} holds another of the stages {', '.join(wanted)}; name one of the two"
            )
        # Sequential names cannot hold the dots of the path.
        self.layers = nn.Sequential()
        for path, layer in chain.items():
            self.layers.add_module(_layer_name(path), layer)
        self.is_stage = tuple(path in wanted for path in chain)
        """Of each layer."""
        self.requires_grad_(False)
        self.eval()
        shapes = self._shapes() if is_proven else self._probe(network)
        self.channels: tuple[int, ...] = tuple(channels for channels, _, _ in shapes)
        """Of each stage's map."""
        self.strides: tuple[int, ...] = tuple(PROBE_SIDE // height for _, height, _ in shapes)
        """Of each stage's map: height and width of the image are so many times its own."""

    @property
    def cut_after(self) -> tuple[str, ...] | str:
        """The stages as settings name them: a single one by itself."""
        return self.stages[0] if len(self.stages) == 1 else self.stages

    def forward(self, image_BCHW: Tensor) -> list[Tensor]:
        """Per stage the feature map (B, channels, H / stride, W / stride) of normalised images."""
        return stage_maps(self.layers, self.is_stage, image_BCHW)

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in eval mode: a pass in train mode would move the batch-norm statistics."""
        return super().train(False)

    def _shapes(self) -> list[torch.Size]:
        """Per stage (channels, height, width) for the probing image, without computing any number."""
        state = [*self.named_parameters(), *self.named_buffers()]
        image_BCHW = torch.empty(1, 3, PROBE_SIDE, PROBE_SIDE, device="meta")
        with torch.inference_mode():
            on_meta = {name: tensor.to("meta") for name, tensor in state}
            maps = cast(list[Tensor], torch.func.functional_call(self, on_meta, image_BCHW))
        return [features_BCHW.shape[1:] for features_BCHW in maps]

    def _probe(self, network: nn.Module) -> list[torch.Size]:
        """As `_shapes`, and proves that the chain computes what the network computes."""
        image_BCHW = torch.rand(1, 3, PROBE_SIDE, PROBE_SIDE, generator=torch.Generator().manual_seed(0))
        expected: dict[str, Tensor] = {}
        hooks = [
            network.get_submodule(stage).register_forward_hook(
                lambda module, inputs, output, stage=stage: expected.update({stage: output})
            )
            for stage in self.stages
        ]
        try:
            with torch.inference_mode():
                network.eval()(image_BCHW)
                maps = dict(zip(self.stages, self(image_BCHW), strict=True))
        except Exception as error:
            raise BackboneError(
                f"backbone {self.name} cannot be cut after {' and '.join(self.stages)}: {error}"
            ) from None
        finally:
            for hook in hooks:
                hook.remove()
        for stage, features in maps.items():
            is_map = (
                isinstance(features, Tensor) and features.ndim == 4 and PROBE_SIDE % features.shape[2] == 0
            )
            if not is_map or not torch.allclose(features, expected[stage], atol=1e-5):
                raise BackboneError(
                    f"backbone {self.name} is no chain of convolutional layers up to {stage}; "
                    "choose another cut or network"
                )
        return [features_BCHW.shape[1:] for features_BCHW in maps.values()]


def stage_maps(layers: nn.Sequential, is_stage: Sequence[bool], x_BCHW: Tensor) -> list[Tensor]:
    """What comes out of those layers that are stages, (B, C, H, W) each."""
    maps = []
    for layer, is_wanted in zip(layers, is_stage, strict=True):
        x_BCHW = layer(x_BCHW)
        if is_wanted:
            maps.append(x_BCHW)
    return maps


def default_stages(network: nn.Module) -> tuple[str, ...]:
    """The stages whose maps are the features where nothing else is wished, from shallow to deep."""
    modules = dict(network.named_modules())
    for family, stages in DEFAULT_STAGES.items():
        if family in type(network).__name__ and modules.keys() >= set(stages):
            return stages
    return (str(cast(Any, network.feature_info)[-1]["module"]),)


def load_weights(backbone: Backbone, weights: Mapping[str, Tensor]) -> None:
    """Takes the weights of the whole network, as published, into the cut backbone.

    Names of another code base are accepted when its tensors come in the same order with the same
    shapes, as those of the EfficientNet packages do.

    Raises:
        BackboneError: the weights belong to another architecture.
    """
    network = _create(backbone.name)
    own = network.state_dict()
    if own.keys() != weights.keys():
        shapes_match = len(own) == len(weights) and all(
            a.shape == b.shape for a, b in zip(own.values(), weights.values(), strict=True)
        )
        if not shapes_match:
            raise BackboneError(f"the weights are not those of a {backbone.name}")
        weights = dict(zip(own, weights.values(), strict=True))
    network.load_state_dict(weights)
    backbone.layers.load_state_dict(
        {
            f"{_layer_name(path)}.{name}": tensor
            for path, layer in _chain(network, backbone.stages)
            for name, tensor in layer.state_dict().items()
        }
    )


def _create(name: str, pretrained: bool = False) -> nn.Module:
    try:
        network: nn.Module = timm.create_model(name, pretrained=pretrained)
    except RuntimeError:
        close = ", ".join(timm.list_models(f"*{name.split('.')[0][-8:]}*")[:5]) or "timm.list_models()"
        raise BackboneError(f"backbone {name} is not a timm model; try one of: {close}") from None
    return network


def download_weights(name: str) -> Mapping[str, Tensor]:
    """The pretrained weights that timm publishes for this network."""
    return _create(name, pretrained=True).state_dict()


def _layer_name(path: str) -> str:
    return path.replace(".", "_")


def _chain(
    module: nn.Module, stages: Sequence[str], prefix: str = "", goes_on: bool = False
) -> Iterator[tuple[str, nn.Module]]:
    """The modules in order up to the deepest stage; only containers that a stage lies within are opened.

    Args:
        goes_on: a deeper stage lies behind this module, so that all of it is on the way.
    """
    children = dict(module.named_children())
    parts = [stage.partition(".") for stage in stages]
    left = {head for head, _, _ in parts}
    for missing in sorted(left - children.keys()):
        names = ", ".join(prefix + name for name in children)
        raise BackboneError(f"the backbone has no module {prefix}{missing} to cut after; it has {names}")
    for name, child in children.items():
        left.discard(name)
        within = [rest for head, _, rest in parts if head == name and rest]
        if within:
            yield from _chain(child, within, f"{prefix}{name}.", goes_on or bool(left))
        else:
            yield prefix + name, child
        if not left and not goes_on:
            return
