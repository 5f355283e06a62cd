"""The inference form: a trained detector rebuilt for scoring alone, with the same scores."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from csflow.model.cpu_backbone import CpuBackbone, SavedBackbone
from csflow.model.detector import Detector, Head, check_pixels
from csflow.model.fallbacks import Fallbacks
from csflow.model.interleaved_flow import InterleavedFlow
from csflow.model.statistic import Scores
from csflow.precision import Precision, PrecisionSetting, multiplies_bfloat16, resolved

if TYPE_CHECKING:  # a CPU needs none of it, nor timm, which comes with it
    from csflow.model.gpu import Recorded

CPU_BATCH_SIZE = 8
"""Default number of images per pass on a CPU. More is slower: early activations leave the cache."""
GPU_BATCH_PIXELS, GPU_BATCH_SIZE = 1 << 24, 128
"""Default number of pixels, and largest number of images, per pass on a GPU (benchmarks/gpu.md)."""


def default_batch_size(image_size: tuple[int, int], device: torch.device) -> int:
    """Number of images per pass."""
    if device.type == "cpu":
        return CPU_BATCH_SIZE
    return min(GPU_BATCH_SIZE, max(1, GPU_BATCH_PIXELS // math.prod(image_size)))


@dataclass(frozen=True)
class Form:
    """How a model is computed."""

    device: str
    """Name of the GPU, or `cpu`."""
    precision: Precision
    batch_size: int
    """Number of images in a pass."""
    fallbacks: tuple[str, ...]
    """What runs more slowly than it could, and why."""


class InferenceBackbone:
    """`Detector.features` for batches of one size. The detector itself is not changed."""

    def __init__(self, detector: Detector, precision: Precision, batch_size: int) -> None:
        """Compiles the network, which takes a second or two.

        Args:
            batch_size: number of images in a pass. A GPU without room for them gets fewer: see `batch_size`.
        """
        self._batches, fallbacks = _Batches(detector, batch_size), Fallbacks()
        self._pass: Callable[[Tensor], Sequence[Tensor]]
        if self._batches.device.type == "cpu":
            backbone = CpuBackbone.of(detector, precision, batch_size, fallbacks)
            self._pass = _padded(backbone, batch_size)
        else:
            from csflow.model.gpu import GpuFeatures

            form = GpuFeatures(detector, getattr(torch, precision), fallbacks)
            self._pass = _recorded(form, self._batches, fallbacks)

    @property
    def batch_size(self) -> int:
        """Largest number of images in a call."""
        return self._batches.size

    @torch.inference_mode()
    def __call__(self, image_BHWC: Tensor) -> list[Tensor]:
        """The flow's input for up to `batch_size` uint8 RGB images, float32 per level."""
        self._batches.check(image_BHWC)
        return list(self._pass(image_BHWC))


class InferenceDetector:
    """A trained detector without what only training needs. The detector itself is not changed."""

    def __init__(
        self,
        detector: Head,
        precision: PrecisionSetting,
        batch_size: int,
        saved: SavedBackbone | CpuBackbone | None = None,
    ) -> None:
        """Compiles the detector for batches of one size; a smaller batch takes as long.

        Args:
            detector: a `Detector`, or with `saved` its head alone.
            precision: `auto` is what the model asks for; else float16 on GPUs, and on CPUs `mixed` if they
                multiply matrices in bfloat16, else `float32`.
            batch_size: as for `InferenceBackbone`.
            saved: what `saved` gave for this detector and these settings on a CPU of this kind; or the
                `backbone` of a form with the same settings, of a model with the same backbone. Forms with one
                backbone must not compute at the same time.

        Raises:
            ValueError: the device does not compute in this precision.
        """
        self._batches, fallbacks = _Batches(detector, batch_size), Fallbacks()
        self.image_shape = self._batches.image_shape
        self.architecture, self.statistic = detector.architecture, detector.statistic
        self.device = device = self._batches.device
        chosen = resolved(detector.architecture.precision if precision == "auto" else precision, device)
        self.backbone: CpuBackbone | None = None
        """The compiled backbone, on CPUs."""
        self.features: Callable[[Tensor], Sequence[Tensor]]
        self._score: Callable[[Sequence[Tensor]], Scores]
        self._pass: Callable[[Tensor], Sequence[Tensor]]
        if device.type == "cpu":
            if chosen != "float32" and not multiplies_bfloat16(device):
                reason = "this processor does not multiply bfloat16; leave it out"
                # No surprise: training measures in `mixed` what rounding would do, wherever it runs.
                fallbacks.add(f"--precision {chosen}", reason, is_logged=False)
            self.backbone = _cpu_backbone(detector, chosen, batch_size, saved, fallbacks)
            self.features, statistic = self.backbone, detector.statistic
            sizes = [(batch_size, height, width) for _, height, width in detector.feature_shapes]
            dtype = torch.float32 if chosen == "float32" else torch.bfloat16
            window = detector.architecture.latent_window
            flow = InterleavedFlow(detector.gaussians, detector.flow, window, dtype, sizes)
            self._score = lambda y: statistic(flow(y))
            self._pass = _padded(lambda image_BHWC: self._score(self.features(image_BHWC)), batch_size)
        else:
            from csflow.model.gpu import GpuDetector

            assert isinstance(detector, Detector)
            form = GpuDetector(detector, getattr(torch, chosen), fallbacks)
            self.features, self._score = form.features, form.score_features
            self._pass = _recorded(form, self._batches, fallbacks)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self.form = Form(name, chosen, self._batches.size, tuple(fallbacks.messages))

    @torch.inference_mode()
    def __call__(self, image_BHWC: Tensor) -> Scores:
        """Scores, on the device, of up to `form.batch_size` uint8 RGB images of `image_size`."""
        self._batches.check(image_BHWC)
        return Scores(*self._pass(image_BHWC))

    @torch.inference_mode()
    def submit(self, image_BHWC: Tensor) -> Callable[[], Scores]:
        """Begins to score images; the function that is returned waits for the scores, on the CPU.

        A GPU works while its host does other things, if the images are in pinned memory.
        """
        scores = self(image_BHWC)
        if self._batches.device.type == "cpu":
            return lambda: scores
        # Copied now: a later copy would wait for the batches that were submitted since.
        on_host = [torch.empty(value.shape, dtype=value.dtype, pin_memory=True) for value in scores]
        for host, value in zip(on_host, scores, strict=True):
            host.copy_(value, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def result() -> Scores:
            done.synchronize()
            return Scores(*on_host)

        return result

    def saved(self) -> SavedBackbone | None:
        """What spares another process the compilation of the backbone; None if nothing can."""
        return self.backbone.saved() if self.backbone else None

    @torch.inference_mode()
    def score_features(self, y: Sequence[Tensor]) -> Scores:
        """Scores of images, given their features."""
        return self._score(y)


def _cpu_backbone(
    detector: Head,
    precision: Precision,
    batch_size: int,
    saved: SavedBackbone | CpuBackbone | None,
    fallbacks: Fallbacks,
) -> CpuBackbone:
    if isinstance(saved, CpuBackbone):
        return saved
    if saved:
        return CpuBackbone.restored(detector, saved)
    assert isinstance(detector, Detector)
    return CpuBackbone.of(detector, precision, batch_size, fallbacks)


class _Batches:
    """The batches that a form takes."""

    def __init__(self, detector: Head, size: int) -> None:
        self.device = detector.get_buffer("mean").device
        self.image_shape = (*detector.architecture.image_size, 3)
        self.size = size

    def check(self, image_BHWC: Tensor) -> None:
        check_pixels(image_BHWC, self.image_shape)
        if len(image_BHWC) > self.size:
            raise ValueError(f"{len(image_BHWC)} images are more than a batch of {self.size}")


@torch.inference_mode()
def _recorded(form: nn.Module, batches: _Batches, fallbacks: Fallbacks) -> "Recorded":
    """The form, recorded for batches as large as the GPU has room for; tells `batches` how large."""
    from csflow.model.gpu import Recorded

    while True:
        shape = (batches.size, *batches.image_shape)
        try:
            return Recorded(form, torch.zeros(shape, dtype=torch.uint8, device=batches.device), fallbacks)
        except torch.OutOfMemoryError as error:
            if batches.size == 1:
                raise
            batches.size //= 2
            fallbacks.add(f"batches have {batches.size} images", error)
            torch.cuda.empty_cache()


def _padded(
    function: Callable[[Tensor], Sequence[Tensor]], batch_size: int
) -> Callable[[Tensor], Sequence[Tensor]]:
    """A function of up to `batch_size` images, made of one of exactly so many."""

    def run(image_BHWC: Tensor) -> Sequence[Tensor]:
        images, *shape = image_BHWC.shape
        if images < batch_size:
            image_BHWC = torch.cat([image_BHWC, image_BHWC.new_zeros((batch_size - images, *shape))])
        return [value[:images] for value in function(image_BHWC)]

    return run
