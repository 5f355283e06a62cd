"""The frozen feature extractor: a timm network whose stages give maps, which are the features."""

import copy
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from csflow.model.light_timm import import_timm
from csflow.preprocessing import Interpolation

PAPER_STAGE = "blocks.5"
"""The sixth stage of an EfficientNet, where the paper cuts its B5."""

DEFAULT_STAGES: Mapping[str, tuple[str, ...]] = {"EfficientNet": (PAPER_STAGE,)}
"""Default stages by the name of a timm network's class; other networks have their last feature level."""

PROBE_SIDE = 128
"""Side of the image that determines the maps of a chain; a multiple of every usual stride."""


Setting = Literal["backbone", "cut_after", "weights"]


class BackboneError(ValueError):
    """The network, a stage to cut it after, or the weights cannot serve as a backbone."""

    def __init__(self, message: str, setting: Setting) -> None:
        """`setting` is the one to change."""
        super().__init__(message)
        self.setting = setting


class Backbone(nn.Module):
    """A timm network up to a stage, always in eval mode and without gradients.

    Most networks are a chain of modules up to the cut. Others, such as vision transformers, give their maps
    through timm's `forward_intermediates`.
    """

    def __init__(
        self,
        name: str,
        cut_after: Sequence[str] | str | None = None,
        is_proven: bool = False,
    ) -> None:
        """Builds the network with random weights; downloads nothing.

        Args:
            name: name of a timm model.
            cut_after: stages whose maps are wanted: modules such as `blocks.5` or `layer3`, one or several in
                any order. The network ends after the deepest stage. By default `default_stages`.
            is_proven: whether this backbone was built before, so that the pass through the whole network that
                proves the cut right can be left out.

        Raises:
            BackboneError: timm knows no such network, or the network gives no maps of these stages.
        """
        super().__init__()
        network = _create(name)
        from timm.data.config import resolve_data_config  # only now, since `import_timm` must come first

        self.name = name
        published = resolve_data_config(pretrained_cfg=network.pretrained_cfg)
        self.mean: tuple[float, ...] = tuple(published["mean"])
        self.std: tuple[float, ...] = tuple(published["std"])
        self.interpolation: Interpolation = (
            "bilinear" if published["interpolation"] == "bilinear" else "bicubic"
        )
        """The resizing filter that the network was tested with; timm uses these two."""
        self.native_side: int = published["input_size"][-1]
        """Side of the images that the network was trained on, in pixels."""
        self.known_stages = {level["module"]: level["reduction"] for level in _levels(network)}
        """The stages that timm names, with their strides."""
        parents = {stage.rpartition(".")[0] for stage in self.known_stages} - {""}
        self._stage_names = [
            name
            for name, _ in network.named_modules()
            if name in self.known_stages or name.rpartition(".")[0] in parents
        ]
        """The stages for messages: timm names only the last one of each size."""
        wanted = (cut_after,) if isinstance(cut_after, str) else cut_after or default_stages(network)
        self._cut: Setting = "cut_after" if cut_after else "backbone"
        """The setting that decides the stages."""
        self.layers: nn.Module
        self.stages: tuple[str, ...]
        """The stages, from shallow to deep."""
        self.is_stage: tuple[bool, ...] = ()
        """For each layer of a chain, whether it is a stage."""
        try:
            shapes = self._take_chain(network, wanted)
        except BackboneError:
            if not (hasattr(network, "forward_intermediates") and self.known_stages.keys() >= set(wanted)):
                raise
            shapes = self._take_intermediates(wanted)
        self.channels: tuple[int, ...] = tuple(channels for channels, _ in shapes)
        """Number of channels of each stage's map."""
        self.strides: tuple[int, ...] = tuple(stride for _, stride in shapes)
        """Stride of each stage's map: height and width of the image divided by those of the map."""
        self.requires_grad_(False)
        self.eval()
        if self.is_chain and not is_proven:
            self._prove(network)

    @property
    def cut_after(self) -> tuple[str, ...] | str:
        """The stages as settings name them; a single stage is a string, not a tuple."""
        return self.stages[0] if len(self.stages) == 1 else self.stages

    @property
    def is_chain(self) -> bool:
        """Whether `layers` are a chain of modules, and not one `IntermediateMaps`."""
        return isinstance(self.layers, nn.Sequential)

    def forward(self, image_BCHW: Tensor) -> list[Tensor]:
        """The feature map (B, channels, H / stride, W / stride) of normalised images, per stage."""
        if isinstance(self.layers, nn.Sequential):
            return stage_maps(self.layers, self.is_stage, image_BCHW)
        return cast(list[Tensor], self.layers(image_BCHW))

    def pad_statically(self) -> None:
        """Pads strided convolutions as for images of `native_side`, as the package efficientnet_pytorch does.

        A `tf_…` network pads as TensorFlow does, by the size of the map: of an odd one, both sides alike, and
        of an even one, such as all are in images that a detector takes, one side more.
        """
        from timm.layers.conv2d_same import Conv2dSame  # only now, since `import_timm` must come first

        side = self.native_side
        for name, convolution in list(self.layers.named_modules()):
            if not isinstance(convolution, Conv2dSame) or convolution.stride[0] == 1:
                continue
            if side % 2:
                parent, _, child = name.rpartition(".")
                self.layers.get_submodule(parent).set_submodule(child, _padded_alike(convolution))
            side = math.ceil(side / convolution.stride[0])

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in eval mode, since a pass in train mode would change the batch-norm statistics."""
        return super().train(False)

    def takes(self, height: int, width: int) -> bool:
        """Whether images of this size give maps whose size is that size divided by the strides."""
        try:
            maps = self._maps_on_meta(height, width)
        except Exception:  # networks complain in ways of their own
            return False
        sizes = [(height // stride, width // stride) for stride in self.strides]
        return [tuple(map_BCHW.shape[2:]) for map_BCHW in maps] == sizes

    def _take_chain(self, network: nn.Module, wanted: Sequence[str]) -> list[tuple[int, int]]:
        """Takes the modules on the way to the stages; returns the stages' channels and strides."""
        chain = dict(_chain(network, wanted))
        self.stages = tuple(path for path in chain if path in wanted)
        for lost in sorted(set(wanted) - chain.keys()):
            raise BackboneError(
                f"{lost} holds another of the stages {', '.join(wanted)}; name one of the two", "cut_after"
            )
        # Sequential names cannot hold the dots of the path.
        self.layers = nn.Sequential()
        for path, layer in chain.items():
            self.layers.add_module(_layer_name(path), layer)
        self.is_stage = tuple(path in wanted for path in chain)
        self.eval()
        try:
            # A pass with numbers, which is short: without them PyTorch loads its compiler (`light_timm`).
            with torch.inference_mode():
                maps = self(torch.zeros(1, 3, PROBE_SIDE, PROBE_SIDE))
        except Exception as error:
            raise self._no_cut(error) from None
        for stage, features in zip(self.stages, maps, strict=True):
            is_map = (
                isinstance(features, Tensor) and features.ndim == 4 and PROBE_SIDE % features.shape[2] == 0
            )
            if not is_map or getattr(network, "output_fmt", "NCHW") != "NCHW":
                raise self._no_chain(stage)
        return [(features.shape[1], PROBE_SIDE // features.shape[2]) for features in maps]

    def _take_intermediates(self, wanted: Sequence[str]) -> list[tuple[int, int]]:
        """Takes the network itself; returns the stages' channels and strides."""
        network = _create_flexible(self.name)
        self.stages = tuple(name for name in self.known_stages if name in wanted)
        indices = {level["module"]: index for index, level in enumerate(_levels(network))}
        self.layers = IntermediateMaps(network, [indices[stage] for stage in self.stages])
        self.is_stage = ()
        self.eval()
        try:
            maps = self._maps_on_meta(self.native_side, self.native_side)
        except Exception as error:
            raise self._no_cut(error) from None
        strides = [self.known_stages[stage] for stage in self.stages]
        for stage, stride, map_BCHW in zip(self.stages, strides, maps, strict=True):
            if map_BCHW.shape[2] * stride != self.native_side:
                raise BackboneError(
                    f"backbone {self.name} gives no map after {stage} whose side divides that of the image; "
                    "choose another cut or network",
                    self._cut,
                )
        return [(map_BCHW.shape[1], stride) for map_BCHW, stride in zip(maps, strides, strict=True)]

    def _maps_on_meta(self, height: int, width: int) -> list[Tensor]:
        """The maps of an image of this size on the meta device: shapes without numbers, which is fast."""
        state = [*self.named_parameters(), *self.named_buffers()]
        image_BCHW = torch.empty(1, 3, height, width, device="meta")
        with torch.inference_mode(), torch.device("meta"):
            on_meta = {name: tensor.to("meta") for name, tensor in state}
            return cast(list[Tensor], torch.func.functional_call(self, on_meta, image_BCHW))

    def _prove(self, network: nn.Module) -> None:
        """Proves that the chain computes what the network computes."""
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
                for hook in hooks:
                    hook.remove()  # chain and network have the same modules
                maps = self(image_BCHW)
        except Exception as error:
            raise self._no_cut(error) from None
        for stage, features_BCHW in zip(self.stages, maps, strict=True):
            if not torch.allclose(features_BCHW, expected[stage], atol=1e-5):
                raise self._no_chain(stage)

    def _no_cut(self, error: Exception) -> BackboneError:
        return BackboneError(
            f"backbone {self.name} cannot be cut after {' and '.join(self.stages)}: {error}; "
            f"its stages are {', '.join(self._stage_names)}",
            self._cut,
        )

    def _no_chain(self, stage: str) -> BackboneError:
        return BackboneError(
            f"backbone {self.name} is no chain of convolutional layers up to {stage}; "
            f"its stages are {', '.join(self._stage_names)}",
            self._cut,
        )


class IntermediateMaps(nn.Module):
    """A network that returns its own maps, without the modules behind the deepest map.

    timm's `forward_intermediates` knows where each architecture keeps its tokens: it drops class and register
    tokens, and lays out patch tokens with channels first.
    """

    def __init__(self, network: nn.Module, indices: Sequence[int]) -> None:
        """`indices` are the ascending positions of the maps in the network's `feature_info`."""
        super().__init__()
        self.indices = list(indices)
        cast(Any, network).prune_intermediate_layers(self.indices, prune_norm=True)
        self.network = network

    def forward(self, image_BCHW: Tensor) -> list[Tensor]:
        """Each map (B, C, H, W)."""
        maps = cast(Any, self.network).forward_intermediates(
            image_BCHW, indices=self.indices, intermediates_only=True, output_fmt="NCHW"
        )
        return list(maps)

    def at_size(self, height: int, width: int) -> "IntermediateMaps":
        """Prepares for images of one size: resamples position embeddings now, not for every image."""
        network: Any = self.network
        if not (
            getattr(network, "dynamic_img_size", False) and getattr(network, "pos_embed", None) is not None
        ):
            return self
        fixed = copy.deepcopy(self)
        cast(Any, fixed.network).set_input_size((height, width))
        return fixed


def _padded_alike(convolution: nn.Conv2d) -> nn.Conv2d:
    """The same convolution with as many zeros on each side."""
    height, width = (size // 2 for size in convolution.kernel_size)
    alike = nn.Conv2d(
        convolution.in_channels,
        convolution.out_channels,
        (convolution.kernel_size[0], convolution.kernel_size[1]),
        (convolution.stride[0], convolution.stride[1]),
        (height, width),
        groups=convolution.groups,
        bias=convolution.bias is not None,
    )
    alike.weight, alike.bias = convolution.weight, convolution.bias
    return alike.train(convolution.training)


def stage_maps(layers: nn.Sequential, is_stage: Sequence[bool], x_BCHW: Tensor) -> list[Tensor]:
    """The outputs (B, C, H, W) of those layers that are stages."""
    maps = []
    for layer, is_wanted in zip(layers, is_stage, strict=True):
        x_BCHW = layer(x_BCHW)
        if is_wanted:
            maps.append(x_BCHW)
    return maps


def _levels(network: nn.Module) -> list[dict[str, Any]]:
    """timm's description of the network's stages, from shallow to deep."""
    return list(cast(Any, network.feature_info))


def default_stages(network: nn.Module) -> tuple[str, ...]:
    """The stages whose maps are the features by default, from shallow to deep."""
    modules = dict(network.named_modules())
    for family, stages in DEFAULT_STAGES.items():
        if family in type(network).__name__ and modules.keys() >= set(stages):
            return stages
    return (str(_levels(network)[-1]["module"]),)


def load_weights(backbone: Backbone, weights: Mapping[str, Tensor]) -> None:
    """Loads the published weights of the whole network into the cut backbone.

    Tensors with other names are accepted if they have the same order and shapes, as in the EfficientNet
    packages.

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
            raise BackboneError(
                f"the weights are not those of a {backbone.name}; name its own, or the backbone they are of",
                "weights",
            )
        weights = dict(zip(own, weights.values(), strict=True))
    network.load_state_dict(weights)
    if isinstance(backbone.layers, IntermediateMaps):
        kept, whole = backbone.layers.network, network.state_dict()
        kept.load_state_dict({name: whole[name] for name in kept.state_dict()})
        return
    backbone.layers.load_state_dict(
        {
            f"{_layer_name(path)}.{name}": tensor
            for path, layer in _chain(network, backbone.stages)
            for name, tensor in layer.state_dict().items()
        }
    )


def _create(name: str, pretrained: bool = False) -> nn.Module:
    timm = import_timm()
    try:
        # Else timm would go to the network or a disk for names such as `hf-hub:…`, with the machine's token.
        if not timm.is_model(name):
            raise RuntimeError("not one of timm's own architectures")
        network: nn.Module = timm.create_model(name, pretrained=pretrained)
    except RuntimeError:
        close = ", ".join(_nearest(name.partition(".")[0].lower())) or "those of timm.list_models()"
        raise BackboneError(f"{name!r} is not a timm model; try one of: {close}", "backbone") from None
    return network


def _nearest(name: str, count: int = 5) -> list[str]:
    """The names of timm models that have all letters of this one in their order, else those most like it."""
    timm = import_timm()

    def has_all_letters(other: str) -> bool:
        letters = iter(other)
        return all(letter in letters for letter in name)

    models = timm.list_models() if name else []
    longer = sorted(filter(has_all_letters, models), key=len)
    return longer[:count] or difflib.get_close_matches(name, models, count)


def _create_flexible(name: str) -> nn.Module:
    """Builds the network for images of any size, if it allows that."""
    timm = import_timm()
    try:
        network: nn.Module = timm.create_model(name, dynamic_img_size=True)
    except TypeError:
        network = timm.create_model(name)
    return network


def download_weights(name: str) -> Mapping[str, Tensor]:
    """The pretrained weights that timm publishes for this network."""
    return _create(name, pretrained=True).state_dict()


def _layer_name(path: str) -> str:
    return path.replace(".", "_")


def _chain(
    module: nn.Module, stages: Sequence[str], prefix: str = "", goes_on: bool = False
) -> Iterator[tuple[str, nn.Module]]:
    """The modules in order up to the deepest stage. Opens only containers that have a stage inside.

    Args:
        goes_on: whether a deeper stage lies behind this module, so that all of the module is on the way.
    """
    children = dict(module.named_children())
    parts = [stage.partition(".") for stage in stages]
    left = {head for head, _, _ in parts}
    for missing in sorted(left - children.keys()):
        names = ", ".join(prefix + name for name in children)
        raise BackboneError(
            f"the backbone has no module {prefix}{missing} to cut after; it has {names}", "cut_after"
        )
    for name, child in children.items():
        left.discard(name)
        within = [rest for head, _, rest in parts if head == name and rest]
        if within:
            yield from _chain(child, within, f"{prefix}{name}.", goes_on or bool(left))
        else:
            yield prefix + name, child
        if not left and not goes_on:
            return
