"""The frozen backbone as scoring and feature extraction run it: preprocessing and network for fixed shapes.

On CPUs OpenVINO compiles the network: it folds batch norms, fuses activations and chooses layouts, and is
faster than PyTorch's own kernels (docs/performance.md). On GPUs PyTorch compiles it.

Dimension letters: B batch, C channels, H height, W width.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial

import openvino
import torch
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import Tensor, nn

from csflow.model.compilation import compiled
from csflow.model.detector import Detector

Pass = Callable[[Tensor], Tensor]
"""From normalised pixels (B, H, W, 3), float32, to features (B, C, H / stride, W / stride)."""


class InferenceBackbone:
    """`Detector.features` for batches of one size. The detector stays as it is."""

    def __init__(self, detector: Detector, dtype: torch.dtype, batch_size: int) -> None:
        """Compiles the network, which takes a second or two.

        Args:
            dtype: of convolutions and matrix products: float32 or bfloat16.
        """
        height, width = detector.architecture.image_size
        self.image_shape = (height, width, 3)
        self.batch_size = batch_size
        # Of a row of pixels: three numbers would be too few for vector instructions.
        self._mean_X, self._std_X = (
            255 * detector.get_buffer(name).repeat(width) for name in ("mean", "std")
        )
        layers, device = detector.backbone.layers, self._mean_X.device
        self._is_fixed = device.type == "cpu"
        self._passes: list[Pass]
        scales = detector.architecture.scales
        if self._is_fixed:
            sizes = [(height >> s, width >> s) for s in range(scales)]
            self._passes = _by_openvino(layers, [(batch_size, *size, 3) for size in sizes], dtype)
        else:
            network = _channels_last(layers.to(memory_format=torch.channels_last))
            self._passes = [compiled(network, device, dtype, dynamic=False)] * scales

    @torch.inference_mode()
    def __call__(self, image_BHWC: Tensor) -> list[Tensor]:
        """The flow's input for up to `batch_size` uint8 RGB images, float32 per scale."""
        if image_BHWC.dtype != torch.uint8 or tuple(image_BHWC.shape[1:]) != self.image_shape:
            found = f"{image_BHWC.dtype} of {tuple(image_BHWC.shape)}"
            raise ValueError(f"expected uint8 images of shape (B, *{self.image_shape}), not {found}")
        images = len(image_BHWC)
        pixel_BHX = self.padded(image_BHWC).flatten(2).float().sub_(self._mean_X).div_(self._std_X)
        pixel_BHWC = pixel_BHX.unflatten(2, self.image_shape[1:])
        features = []
        for s, network in enumerate(self._passes):
            pixel_BHWC = _halved(pixel_BHWC) if s else pixel_BHWC
            features.append(network(pixel_BHWC)[:images])
        return features

    def padded(self, image_BHWC: Tensor) -> Tensor:
        """The images and black ones, as many as a pass takes: of few sizes, since each is compiled."""
        images = len(image_BHWC)
        if images > self.batch_size:
            raise ValueError(f"{images} images are more than a batch of {self.batch_size}")
        room = self.batch_size
        while not self._is_fixed and room // 2 >= images:
            room //= 2  # a GPU that had no room for more must not be given more
        if images == room:
            return image_BHWC
        return torch.cat([image_BHWC, image_BHWC.new_zeros((room - images, *image_BHWC.shape[1:]))])


def _halved(x_BHWC: Tensor) -> Tensor:
    """Means of 2 × 2 pixels. `F.avg_pool2d` takes five times as long on three interleaved channels."""
    x_BHWC = x_BHWC[:, 0::2] + x_BHWC[:, 1::2]
    x_BHWC = x_BHWC[:, :, 0::2] + x_BHWC[:, :, 1::2]
    return x_BHWC.mul_(0.25)


def _channels_last(layers: nn.Module) -> Pass:
    """The layers on pixels in the order of image files; to float32."""

    def network(pixel_BHWC: Tensor) -> Tensor:
        features_BCHW: Tensor = layers(pixel_BHWC.permute(0, 3, 1, 2))
        return features_BCHW.float()

    return network


def _by_openvino(layers: nn.Module, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Pass]:
    """A pass for each shape of pixels, of the shape's batch and size alone."""
    height, width = shapes[-1][1:3]
    # The smallest size and one image give the same graph as the largest, in less time, and so does a function
    # in place of a module.
    with torch.no_grad(), warnings.catch_warnings():
        # Of Python's conditions on shapes, and of `torch.export` to come, which bakes in each batch size.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(_channels_last(layers), torch.zeros(1, height, width, 3), check_trace=False)
    decoder = TorchScriptPythonDecoder(traced)  # the frontend reads from it, but does not keep it alive
    frontend = FrontEndManager().load_by_framework("pytorch")
    network = frontend.convert(frontend.load(decoder))
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        # Processes that each choose the same cores to stay on would share them.
        "ENABLE_CPU_PINNING": False,
    }
    core = openvino.Core()
    passes: list[Pass] = []
    for shape in shapes:
        resized = network.clone()
        resized.reshape(openvino.PartialShape(shape))
        request = core.compile_model(resized, "CPU", settings).create_infer_request()
        passes.append(partial(_infer, request))
    return passes


def _infer(request: openvino.InferRequest, pixel_BHWC: Tensor) -> Tensor:
    (features_BCHW,) = request.infer([pixel_BHWC.numpy()], share_inputs=True).to_tuple()
    return torch.from_numpy(features_BCHW)
