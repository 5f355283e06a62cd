"""The frozen feature extractor: a timm network cut after a chosen stage."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from csflow.preprocessing import Interpolation

PAPER_STAGE = "blocks.5"
"""The sixth stage of an EfficientNet, where the paper cuts its B5."""


class BackboneError(ValueError):
    """The network or the weights cannot serve as a backbone."""


class Backbone(nn.Module):
    """A timm convolutional network up to a stage; always in eval mode and without gradients."""

    def __init__(
        self, name: str, cut_after: str | None = None, channels_and_stride: tuple[int, int] | None = None
    ) -> None:
        """Builds the network with random weights, and no download.

        Args:
            name: of a timm model.
            cut_after: module after which the network ends, such as `blocks.5` or `layer3`; by default
                the sixth stage of an EfficientNet and the last feature level of any other network.
            channels_and_stride: of its feature map, if they are known; else they are found, and the cut is
                proven right, by a pass through the network.

        Raises:
            BackboneError: timm knows no such network, or it is no chain of modules up to the cut.
        """
        super().__init__()
        network = _create(name)
        self.name = name
        self.cut_after = cut_after or _default_cut(network)
        published = cast(dict[str, Any], network.pretrained_cfg)
        self.mean: tuple[float, ...] = tuple(published["mean"])
        self.std: tuple[float, ...] = tuple(published["std"])
        self.interpolation: Interpolation = (
            "bilinear" if published.get("interpolation") == "bilinear" else "bicubic"
        )
        """The filter of resizing with which the network was tested: timm has these two."""
        chain = dict(_chain(network, self.cut_after))
        # Sequential names cannot hold the dots of the path.
        self.layers = nn.Sequential()
        for path, layer in chain.items():
            self.layers.add_module(path.replace(".", "_"), layer)
        self.requires_grad_(False)
        self.eval()
        self.channels, self.stride = channels_and_stride or self._probe(network)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Feature map (B, channels, H / stride, W / stride) of normalised images."""
        features_BCHW: Tensor = self.layers(image_BCHW)
        return features_BCHW

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in eval mode: a pass in train mode would move the batch-norm statistics."""
        return super().train(False)

    def _probe(self, network: nn.Module) -> tuple[int, int]:
        """Finds channels and stride, and proves that the chain computes what the network computes."""
        side = 128
        image_BCHW = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        expected: list[Tensor] = []
        hook = network.get_submodule(self.cut_after).register_forward_hook(
            lambda module, inputs, output: expected.append(output)
        )
        try:
            with torch.inference_mode():
                network.eval()(image_BCHW)
                features = self(image_BCHW)
        except Exception as error:
            raise BackboneError(
                f"backbone {self.name} cannot be cut after {self.cut_after}: {error}"
            ) from None
        finally:
            hook.remove()
        is_map = isinstance(features, Tensor) and features.ndim == 4 and side % features.shape[2] == 0
        if not is_map or not torch.allclose(features, expected[0], atol=1e-5):
            raise BackboneError(
                f"backbone {self.name} is no chain of convolutional layers up to {self.cut_after}; "
                "choose another cut or network"
            )
        return features.shape[1], side // features.shape[2]


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
    chain = _chain(network, backbone.cut_after)
    backbone.layers.load_state_dict(
        {
            f"{path.replace('.', '_')}.{name}": tensor
            for path, layer in chain
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


def _default_cut(network: nn.Module) -> str:
    if "EfficientNet" in type(network).__name__ and any(n == PAPER_STAGE for n, _ in network.named_modules()):
        return PAPER_STAGE
    return str(cast(Any, network.feature_info)[-1]["module"])


def _chain(module: nn.Module, cut_after: str, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules in order up to the cut; only the containers on the way to it are opened."""
    head, _, rest = cut_after.partition(".")
    for name, child in module.named_children():
        if name != head:
            yield prefix + name, child
        elif rest:
            yield from _chain(child, rest, f"{prefix}{name}.")
            return
        else:
            yield prefix + name, child
            return
    names = ", ".join(prefix + name for name, _ in module.named_children())
    raise BackboneError(f"the backbone has no module {prefix}{head} to cut after; it has {names}")
