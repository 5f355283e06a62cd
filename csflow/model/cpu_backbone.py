"""The backbone on CPUs: preprocessing, and passes of OpenVINO for each scale.

Dimension letters: B batch, C channels, H height, W width.
"""

from torch import Tensor

from csflow.model.detector import Detector
from csflow.model.fallbacks import Fallbacks
from csflow.precision import Precision


class CpuBackbone:
    """`Detector.features` on a CPU, for exactly as many images as it was built for."""

    def __init__(
        self, detector: Detector, precision: Precision, batch_size: int, fallbacks: Fallbacks
    ) -> None:
        # Only where it is needed: it takes a while to import.
        from csflow.model.openvino_backbone import openvino_passes

        height, width = detector.architecture.image_size
        # Of a row of pixels: three numbers would be too few for vector instructions.
        self._mean_X, self._std_X = (
            255 * detector.get_buffer(name).repeat(width) for name in ("mean", "std")
        )
        sizes = [(height >> s, width >> s) for s in range(detector.architecture.scales)]
        self._passes = openvino_passes(detector, precision, sizes, batch_size, fallbacks)
        self._join = detector.pyramid.join

    def __call__(self, image_BHWC: Tensor) -> list[Tensor]:
        """The flow's input for uint8 RGB images, float32 per level."""
        pixel_BHX = image_BHWC.flatten(2).float().sub_(self._mean_X).div_(self._std_X)
        pixel_BHWC = pixel_BHX.unflatten(2, image_BHWC.shape[2:])
        maps = []
        for s, network in enumerate(self._passes):
            pixel_BHWC = _halved(pixel_BHWC) if s else pixel_BHWC
            maps.append(network(pixel_BHWC))
        return self._join(maps)


def _halved(x_BHWC: Tensor) -> Tensor:
    """Means of 2 × 2 pixels, since `F.avg_pool2d` takes five times as long on three interleaved channels."""
    x_BHWC = x_BHWC[:, 0::2] + x_BHWC[:, 1::2]
    x_BHWC = x_BHWC[:, :, 0::2] + x_BHWC[:, :, 1::2]
    return x_BHWC.mul_(0.25)
