"""The backbone on CPUs: preprocessing, and passes of OpenVINO for each scale.

Dimension letters: B batch, C channels, H height, W width.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from csflow.model.detector import Detector, Head
from csflow.model.fallbacks import Fallbacks
from csflow.model.pyramid import Pyramid
from csflow.precision import Precision

if TYPE_CHECKING:
    from csflow.model.openvino_backbone import Pass


class SavedBackbone(NamedTuple):
    """A compiled backbone outside of its process."""

    description: dict[str, Any]
    """Values that JSON has."""
    networks: list[bytes]


class CpuBackbone:
    """`Detector.features` on a CPU, for exactly as many images as it was built for."""

    def __init__(self, head: Head, pyramid: Pyramid, passes: Sequence["Pass"]) -> None:
        """`passes` are those for each scale."""
        _, width = head.architecture.image_size
        # Of a row of pixels: three numbers would be too few for vector instructions.
        self._mean_X, self._std_X = (255 * head.get_buffer(name).repeat(width) for name in ("mean", "std"))
        self._pyramid, self._passes = pyramid, passes
        self._halved = _means if head.architecture.subsampling == "mean" else _first_pixels

    @classmethod
    def of(
        cls, detector: Detector, precision: Precision, batch_size: int, fallbacks: Fallbacks
    ) -> "CpuBackbone":
        """Compiles the backbone of a detector."""
        # Only where it is needed: it takes a while to import.
        from csflow.model.openvino_backbone import openvino_passes

        height, width = detector.architecture.image_size
        sizes = [(height >> s, width >> s) for s in range(detector.architecture.scales)]
        passes = openvino_passes(detector, precision, sizes, batch_size, fallbacks)
        return cls(detector, detector.pyramid, passes)

    @classmethod
    def restored(cls, head: Head, saved: SavedBackbone) -> "CpuBackbone":
        """The backbone that was saved on a CPU of this kind, by the same versions of all that made it."""
        from csflow.model.openvino_backbone import OpenvinoPass

        networks = list(saved.networks)
        passes = [
            OpenvinoPass.restored(of_pass, [networks.pop(0) for _ in of_pass["dtypes"]])
            for of_pass in saved.description["passes"]
        ]
        pyramid = saved.description["pyramid"]
        maps = tuple(tuple((scale, stage) for scale, stage in level) for level in pyramid["maps"])
        return cls(head, Pyramid(tuple(pyramid["reductions"]), maps), passes)

    def saved(self) -> SavedBackbone | None:
        """What `restored` takes; None if PyTorch runs the network, since OpenVINO could not."""
        from csflow.model.openvino_backbone import OpenvinoPass

        descriptions, networks = [], []
        for of_scale in self._passes:
            if not isinstance(of_scale, OpenvinoPass):
                return None
            description, of_pass = of_scale.saved()
            descriptions.append(description)
            networks += of_pass
        return SavedBackbone({"pyramid": asdict(self._pyramid), "passes": descriptions}, networks)

    def __call__(self, image_BHWC: Tensor) -> list[Tensor]:
        """The flow's input for uint8 RGB images, float32 per level."""
        pixel_BHX = image_BHWC.flatten(2).float().sub_(self._mean_X).div_(self._std_X)
        pixel_BHWC = pixel_BHX.unflatten(2, image_BHWC.shape[2:])
        maps = []
        for s, network in enumerate(self._passes):
            pixel_BHWC = self._halved(pixel_BHWC) if s else pixel_BHWC
            maps.append(network(pixel_BHWC))
        return self._pyramid.join(maps)


def _first_pixels(x_BHWC: Tensor) -> Tensor:
    """The first of each 2 × 2 pixels."""
    return x_BHWC[:, ::2, ::2].contiguous()


def _means(x_BHWC: Tensor) -> Tensor:
    """Means of 2 × 2 pixels, since `F.avg_pool2d` takes five times as long on three interleaved channels."""
    x_BHWC = x_BHWC[:, 0::2] + x_BHWC[:, 1::2]
    x_BHWC = x_BHWC[:, :, 0::2] + x_BHWC[:, :, 1::2]
    return x_BHWC.mul_(0.25)
