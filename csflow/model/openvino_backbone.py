"""The backbone on CPUs: OpenVINO compiles the network for fixed shapes.

It folds batch norms, fuses activations and chooses layouts, and is faster than PyTorch's own kernels
(docs/performance.md).

The network runs in two parts: layers of large maps, then layers of small maps. Roundings in the first part
grow on their way through the second, so `mixed` precision is float32 in the first and bfloat16 in the second.
Large maps go through in small batches, so that they stay in a CPU's cache. A network that is no chain of
layers, such as a vision transformer, runs as a whole, and in float32 if `mixed`.

Dimension letters: B batch, C channels, H height, W width.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import openvino
import torch
from openvino import opset15
from torch import Tensor, nn

from csflow.model.backbone import Backbone, IntermediateMaps, stage_maps
from csflow.model.detector import Detector
from csflow.model.fallbacks import Fallbacks
from csflow.model.rounding import Layers, without_shifts
from csflow.precision import Precision

CACHED_PIXELS = 256 * 256
"""Most pixels that go through the layers of large maps at a time, as one image or several."""
WHOLE_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Largest error of maps of a network that OpenVINO runs as a whole, relative to the largest activation."""
SMALL_MAPS_STRIDE = 16
"""Maps of at least this reduction are small. They take two thirds of an EfficientNet's products."""
BEYOND = 1e30
"""A bound that no activation reaches."""

Pass = Callable[[Tensor], list[Tensor]]
"""Turns normalised float32 pixels (B, H, W, 3) into each stage's map (B, C, H / stride, W / stride)."""


class OpenvinoPass:
    """A `Pass` for one number and size of images: a network, or one for large maps and one for small maps."""

    def __init__(
        self,
        networks: Sequence[openvino.CompiledModel],
        dtypes: Sequence[torch.dtype],
        shapes: Sequence[Sequence[int]],
        at_once: int,
        stages_in_first: int,
    ) -> None:
        """
        Args:
            dtypes: of the networks' products.
            shapes: of the first network's maps, of all images.
            at_once: number of images that the first network takes.
            stages_in_first: number of its maps that belong to stages.
        """
        self._networks, self._dtypes = networks, dtypes
        self._shapes, self._at_once, self._stages_in_first = shapes, at_once, stages_in_first
        self._first, *self._rest = (network.create_infer_request() for network in networks)

    def __call__(self, pixel_BHWC: Tensor) -> list[Tensor]:
        maps = [np.empty(shape, np.float32) for shape in self._shapes]
        for start in range(0, len(pixel_BHWC), self._at_once):
            some = slice(start, start + self._at_once)
            outputs = self._first.infer([pixel_BHWC[some].numpy()], share_inputs=True, share_outputs=True)
            for map_BCHW, of_some_BCHW in zip(maps, outputs.to_tuple(), strict=True):
                map_BCHW[some] = of_some_BCHW
        behind: list[np.ndarray] = []
        for request in self._rest:
            behind += request.infer([maps[-1]], share_inputs=True).to_tuple()
        return [torch.from_numpy(map_BCHW) for map_BCHW in (*maps[: self._stages_in_first], *behind)]

    def saved(self) -> tuple[dict[str, Any], list[bytes]]:
        """What `restored` takes: values for JSON, and the compiled networks."""
        description = {
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in self._dtypes],
            "shapes": [list(shape) for shape in self._shapes],
            "at_once": self._at_once,
            "stages_in_first": self._stages_in_first,
        }
        return description, [network.export_model().getvalue() for network in self._networks]

    @classmethod
    def restored(cls, description: Mapping[str, Any], networks: Sequence[bytes]) -> "OpenvinoPass":
        """The pass that was saved on a CPU of this kind, by this version of OpenVINO."""
        dtypes = [getattr(torch, name) for name in description["dtypes"]]
        compiled = [
            openvino.Core().import_model(network, "CPU", _settings(dtype))
            for network, dtype in zip(networks, dtypes, strict=True)
        ]
        others = {name: value for name, value in description.items() if name != "dtypes"}
        return cls(compiled, dtypes, **others)


def openvino_passes(
    detector: Detector,
    precision: Precision,
    sizes: Sequence[tuple[int, int]],
    batch: int,
    fallbacks: Fallbacks,
) -> list[Pass]:
    """A pass for each of these heights and widths, and for this number of images only."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    # Where it is not known what rounding shifts, `mixed` leaves the small maps in float32 too.
    is_split = precision == "mixed" and bool(detector.rounding_shifts)
    dtypes = dtype, torch.bfloat16 if is_split else dtype
    parts = _Parts.of(detector.backbone, detector.rounding_shifts, dtypes)
    if detector.backbone.is_chain:
        return _chain_passes(parts, sizes, batch)
    return [_whole_pass(parts.large, (batch, *size, 3), fallbacks) for size in sizes]


@torch.no_grad()
def _split(layers: nn.Sequential) -> tuple[nn.Sequential, nn.Sequential]:
    """The layers of large maps, and the layers behind them."""
    side = 2 * SMALL_MAPS_STRIDE
    x_BCHW = next(layers.parameters()).new_zeros(1, 3, side, side)
    large = 0
    while large < len(layers) and x_BCHW.shape[2] * SMALL_MAPS_STRIDE > side:
        x_BCHW = layers[large](x_BCHW)
        large += 1
    return layers[:large], layers[large:]


class _Part(nn.Module):
    """Some layers of the backbone, or the whole backbone, with their maps."""

    def __init__(self, layers: nn.Module, dtype: torch.dtype, is_wanted: Sequence[bool] = ()) -> None:
        """`is_wanted` tells for each layer of a chain whether to return its map."""
        super().__init__()
        self.layers, self.dtype, self.is_wanted = layers, dtype, is_wanted

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        if isinstance(self.layers, nn.Sequential):
            return stage_maps(self.layers, self.is_wanted, x_BCHW)
        return cast(list[Tensor], self.layers(x_BCHW))


class _Parts(NamedTuple):
    """The two parts of a chain. A backbone that is no chain is all in `large`, in one precision."""

    large: _Part
    """The layers of large maps; their last map is the input of `small`."""
    stages_in_large: int
    """Number of maps of `large` that belong to stages."""
    small: _Part | None
    """The layers of small maps; None if no stage lies behind `large`."""

    @classmethod
    def of(
        cls, backbone: Backbone, shifts: Mapping[str, Tensor], dtypes: tuple[torch.dtype, torch.dtype]
    ) -> "_Parts":
        def rounded(layers: Layers, dtype: torch.dtype) -> Layers:
            return without_shifts(layers, shifts) if dtype == torch.bfloat16 else layers

        if not isinstance(backbone.layers, nn.Sequential):
            return cls(_Part(rounded(backbone.layers, dtypes[0]), dtypes[0]), len(backbone.stages), None)
        first, rest = _split(backbone.layers)
        is_stage, border = backbone.is_stage, len(first)
        large = _Part(rounded(first, dtypes[0]), dtypes[0], (*is_stage[: border - 1], True))
        small = _Part(rounded(rest, dtypes[1]), dtypes[1], is_stage[border:]) if len(rest) else None
        return cls(large, sum(is_stage[:border]), small)


def _from_pixels(network: Callable[[Tensor], list[Tensor]]) -> Pass:
    def run(pixel_BHWC: Tensor) -> list[Tensor]:
        return network(pixel_BHWC.permute(0, 3, 1, 2))

    return run


def _chain_passes(parts: _Parts, sizes: Sequence[tuple[int, int]], batch: int) -> list[Pass]:
    # The smallest size and one image give the same graph as the largest, in less time.
    pixel_BHWC = torch.zeros(1, *sizes[-1], 3)
    with torch.no_grad():
        border_BCHW = _from_pixels(parts.large)(pixel_BHWC)[-1]
    large = _converted(_from_pixels(parts.large), pixel_BHWC)
    small = _converted(parts.small, border_BCHW) if parts.small else None
    passes: list[Pass] = []
    for height, width in sizes:
        few = range(1, max(1, CACHED_PIXELS // (height * width)) + 1)
        at_once = max(images for images in few if batch % images == 0)
        networks, dtypes = (
            [_compiled(large, (at_once, height, width, 3), parts.large.dtype)],
            [parts.large.dtype],
        )
        shapes = [(batch, *output.shape[1:]) for output in networks[0].outputs]
        if parts.small and small:
            networks.append(_compiled(small, shapes[-1], parts.small.dtype))
            dtypes.append(parts.small.dtype)
        passes.append(OpenvinoPass(networks, dtypes, shapes, at_once, parts.stages_in_large))
    return passes


@torch.no_grad()
def _whole_pass(part: _Part, shape: tuple[int, int, int, int], fallbacks: Fallbacks) -> Pass:
    """A pass through a network that is no chain, for pixels of this shape; by PyTorch if OpenVINO fails.

    OpenVINO turns values that depend on the image size into constants, or fails. So results are compared.
    """
    network = _from_pixels(cast(IntermediateMaps, part.layers).at_size(*shape[1:3]))
    pixel_BHWC = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = network(pixel_BHWC)
    try:
        compiled = _compiled(_converted(network, pixel_BHWC), shape, part.dtype)
        shapes = [tuple(map_BCHW.shape) for map_BCHW in expected]
        run = OpenvinoPass([compiled], [part.dtype], shapes, shape[0], len(shapes))
        off = max(
            (actual_BCHW - exact_BCHW).abs().max().item() / exact_BCHW.abs().max().item()
            for actual_BCHW, exact_BCHW in zip(run(pixel_BHWC), expected, strict=True)
        )
    except Exception as error:  # whatever conversion and compilation stumble over
        problem = f"{type(error).__name__}: {error}".partition("\n")[0]
    else:
        if off <= WHOLE_TOLERANCES[part.dtype]:
            return run
        problem = f"its maps are off by {off:.1e}"
    fallbacks.add("the backbone runs without OpenVINO", problem)
    return network


def _converted(network: Callable[[Tensor], list[Tensor]], example: Tensor) -> openvino.Model:
    # Only where it is needed: it takes a while to import.
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with torch.no_grad(), warnings.catch_warnings():
        # Of Python's conditions on shapes, and of `torch.export` to come, which bakes in each batch size.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(network, example, check_trace=False)
    decoder = TorchScriptPythonDecoder(traced)  # the frontend reads from it, but does not keep it alive
    frontend = FrontEndManager().load_by_framework("pytorch")
    return frontend.convert(frontend.load(decoder))


def _compiled(network: openvino.Model, shape: Sequence[int], dtype: torch.dtype) -> openvino.CompiledModel:
    """The network, compiled for input of one shape."""
    resized = network.clone()
    resized.reshape(openvino.PartialShape(list(shape)))
    if dtype == torch.bfloat16:
        _keep_biases(resized)
    return openvino.Core().compile_model(resized, "CPU", _settings(dtype))


def _settings(dtype: torch.dtype) -> dict[str, Any]:
    """How OpenVINO runs a network."""
    return {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        # Processes that each choose the same cores to stay on would share them.
        "ENABLE_CPU_PINNING": False,
    }


def _keep_biases(network: openvino.Model) -> None:
    """Keeps additions behind convolutions in float32.

    OpenVINO would make them the convolution's bias and round it to bfloat16, which causes half of all that
    bfloat16 moves scores by. A clamp in between, which clamps nothing, prevents this at no cost.
    """
    for operation in network.get_ops():
        if operation.get_type_name() in {"Add", "BatchNormInference"}:
            for operand in operation.inputs():
                producer = operand.get_source_output().get_node()
                if producer.get_type_name() in {"Convolution", "GroupConvolution"}:
                    clamped = opset15.clamp(producer, -BEYOND, BEYOND)
                    operand.replace_source_output(clamped.output(0))
