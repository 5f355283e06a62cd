"""The detector: turns a batch of uint8 images into anomaly scores and maps.

Dimension letters: B batch, C channels, H height, W width, S levels of the pyramid (scales of the flow).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csflow.interest import from_text
from csflow.model.backbone import Backbone
from csflow.model.flow import CrossScaleFlow
from csflow.model.pyramid import Pyramid, inside_levels
from csflow.model.rounding import rounding_shifts
from csflow.model.statistic import PlainStatistic, Scores, StandardisedStatistic, energy_map
from csflow.model.whitening import Gaussians
from csflow.precision import PrecisionSetting
from csflow.preprocessing import DECODING_VERSION, Fit, Interpolation, Preprocessing, Tiling

Subsampling = Literal["mean", "first"]

OLD_DEFAULTS: dict[str, Any] = {
    "fit": "stretch",
    "interpolation": "bilinear",
    "whitening": False,
    "latent_window": 1,
    "precision": "auto",
    "decoding_version": 1,
    "tiling": None,
    "mask": None,
    "subsampling": "mean",
    "static_padding": False,
}
"""Values for models whose config.json does not have these keys."""


@dataclass(frozen=True)
class Architecture:
    """Everything that defines a detector but its weights; the `architecture` of a model's config.json."""

    backbone: str
    """Name of a timm network."""
    image_size: tuple[int, int]
    """Height and width in pixels of the images, or of their tiles, at scale 0."""
    cut_after: tuple[str, ...] | str | None = None
    """Stages of the backbone whose maps are the features; None for the default of the network."""
    scales: int = 3
    """Number of sizes in which the backbone sees an image; each is half the one before."""
    hidden_channels: int = 1024
    kernel_sizes: tuple[int, ...] = (3, 3, 3, 5)
    """Kernel size of each coupling block."""
    seed: int = 0
    """Seed of the channel permutations and the initial weights."""
    fit: Fit = "stretch"
    """How images of another aspect ratio are resized. The default is for models that do not say."""
    interpolation: Interpolation = "bilinear"
    """The resizing filter, with a default for models that do not say."""
    whitening: bool = False
    """Whether features are whitened before the flow and scores standardised; default as above."""
    latent_window: int = 1
    """Side in places of the windows over which latents are averaged for scores; default as above."""
    precision: PrecisionSetting = "auto"
    """In which precision to score if nothing else is asked for: float32 if rounding would move p-values."""
    decoding_version: int = DECODING_VERSION
    """How files become pixels; 1 for models that do not say."""
    tiling: Tiling | None = None
    """How images are cut into tiles, which only a detector with whitening can see; None for whole images."""
    mask: str | None = None
    """The region of interest, which only a detector with whitening of whole images can have; None for all."""
    subsampling: Subsampling = "mean"
    """How smaller scales are made of an image: of the mean of each square of pixels, or of its first pixel,
    as in the original code, which aliases fine structure."""
    static_padding: bool = False
    """Whether convolutions of a `tf_…` network are padded as for images of its native side, whatever the
    image's: see `Backbone.pad_statically`."""

    def __post_init__(self) -> None:
        if self.subsampling not in get_args(Subsampling):
            raise ValueError(f"subsampling {self.subsampling!r}")
        # A single stage is a string, as it always was: the id of a model depends on it.
        if not isinstance(self.cut_after, str | None):
            single = len(self.cut_after) == 1
            object.__setattr__(self, "cut_after", self.cut_after[0] if single else tuple(self.cut_after))

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become the pixels that the detector takes."""
        return Preprocessing(
            *(self.image_size, self.fit, self.interpolation, self.decoding_version, self.tiling, self.mask)
        )

    def inside(self, feature_shapes: Sequence[Sequence[int]]) -> list[Tensor] | None:
        """For each level, 1 at places in the region of interest and 0 at others, (H, W); None for all."""
        if self.mask is None:
            return None
        with torch.device("cpu"):
            return inside_levels(
                from_text(self.mask, *self.image_size), [(h, w) for _, h, w in feature_shapes]
            )

    @property
    def has_foreign_features(self) -> bool:
        """Whether features are those of other code, as of an imported model."""
        return self.subsampling != "mean" or self.static_padding

    def to_json(self) -> dict[str, Any]:
        values = asdict(self) | {
            "image_size": list(self.image_size),
            "kernel_sizes": list(self.kernel_sizes),
        }
        # What older models do not say is left unsaid where it is the same, so that their ids stay.
        return {name: value for name, value in values.items() if OLD_DEFAULTS.get(name, object()) != value}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Architecture":
        parsed: dict[str, Any] = {name: tuple(values[name]) for name in ("image_size", "kernel_sizes")}
        if values.get("tiling"):
            parsed["tiling"] = Tiling(**values["tiling"])
        return cls(**(OLD_DEFAULTS | values | parsed))


class Head(nn.Module):
    """A detector without its backbone: flow and score, and the mean and std of pixels."""

    def __init__(self, architecture: Architecture, feature_shapes: Sequence[Sequence[int]]) -> None:
        """Builds the head with random weights.

        Args:
            feature_shapes: per level (channels, height, width) of the features.

        Raises:
            ValueError: a flow setting is out of range.
        """
        super().__init__()
        self.architecture = architecture
        self.feature_shapes = [(channels, height, width) for channels, height, width in feature_shapes]
        """Per level (channels, height, width) of the features."""
        self.flow = new_flow(architecture, self.feature_shapes)
        is_tiled, inside = architecture.tiling is not None, architecture.inside(self.feature_shapes)
        self.gaussians = Gaussians(self.feature_shapes, is_tiled, inside) if architecture.whitening else None
        self.statistic: PlainStatistic | StandardisedStatistic = (
            StandardisedStatistic(self.feature_shapes, is_tiled)
            if architecture.whitening
            else PlainStatistic(self.feature_shapes)
        )
        for name in ("mean", "std"):
            self.register_buffer(name, torch.zeros(3))

    @torch.no_grad()
    def score_features(self, y: Sequence[Tensor]) -> Scores:
        """Scores of images, given their features."""
        scores: Scores = self.statistic(
            energies(self.gaussians, self.flow, y, self.architecture.latent_window)
        )
        return scores


class Detector(Head):
    """Backbone, flow and score, with the preprocessing inside, so that training and scoring share it."""

    def __init__(
        self, architecture: Architecture, feature_shapes: Sequence[Sequence[int]] | None = None
    ) -> None:
        """Builds the detector with random weights; downloads nothing.

        Args:
            feature_shapes: those of an earlier detector of this architecture, if any; with them, `Backbone`
                skips the proof of its cut.

        Raises:
            BackboneError: see `Backbone`.
            ValueError: the image size does not fit the backbone, or the overlap of tiles the image size, or a
                flow setting is out of range.
        """
        is_proven = feature_shapes is not None
        with torch.device("cpu"):  # never without memory: a pass through it tells its maps
            backbone = Backbone(architecture.backbone, architecture.cut_after, is_proven)
        if architecture.static_padding:
            backbone.pad_statically()
        strides = dict(zip(backbone.stages, backbone.strides, strict=True))
        pyramid = Pyramid.of(strides, architecture.scales, backbone.known_stages)
        _check_size(architecture, backbone, pyramid, is_proven)
        if architecture.tiling:
            _check_overlap(architecture.tiling.overlap, architecture, pyramid.reductions[0])
        super().__init__(architecture, _feature_shapes(architecture, backbone, pyramid))
        self.backbone, self.pyramid = backbone, pyramid
        for name in ("mean", "std"):
            self.get_buffer(name).copy_(torch.tensor(getattr(backbone, name)))
        self.rounding_shifts: dict[str, Tensor] = {}
        """Shifts of the backbone's convolutions in bfloat16; empty before `measure_rounding`."""

    def measure_rounding(self, image_BHWC: Tensor) -> None:
        """Measures the `rounding_shifts` on some normal uint8 RGB images of `image_size`."""
        self.rounding_shifts = rounding_shifts(self.backbone.layers, self._normalised(image_BHWC))

    @torch.no_grad()
    def features(self, image_BHWC: Tensor) -> list[Tensor]:
        """The input of the flow: for each level of the pyramid, the backbone's maps of that size.

        The backbone sees the image at each scale, reduced by 2^scale.

        Args:
            image_BHWC: uint8 RGB images of `image_size`.
        """
        pixel_BCHW = self._normalised(image_BHWC)
        return self.pyramid.join([self.backbone(scale) for scale in scales(pixel_BCHW, self.architecture)])

    def _normalised(self, image_BHWC: Tensor) -> Tensor:
        """The normalised pixels (B, C, H, W) that the backbone takes."""
        check_pixels(image_BHWC, (*self.architecture.image_size, 3))
        pixel_BHWC = image_BHWC.float() / 255
        pixel_BHWC = (pixel_BHWC - self.get_buffer("mean")) / self.get_buffer("std")
        return pixel_BHWC.permute(0, 3, 1, 2)

    def forward(self, image_BHWC: Tensor) -> Scores:
        """Scores of uint8 RGB images of `image_size`."""
        return self.score_features(self.features(image_BHWC))


def scales(pixel_BCHW: Tensor, architecture: Architecture) -> list[Tensor]:
    """The images in each size in which the backbone sees them, largest first."""
    sizes = [pixel_BCHW]
    for _ in range(1, architecture.scales):
        is_mean = architecture.subsampling == "mean"
        sizes.append(F.avg_pool2d(sizes[-1], 2) if is_mean else sizes[-1][..., ::2, ::2])
    return sizes


def check_pixels(image_BHWC: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless these are uint8 images of this height, width and number of channels."""
    if image_BHWC.dtype != torch.uint8 or tuple(image_BHWC.shape[1:]) != shape:
        found = f"{image_BHWC.dtype} of {tuple(image_BHWC.shape)}"
        raise ValueError(f"expected uint8 images of shape (B, *{shape}), not {found}")


def energies(
    gaussians: Gaussians | None, flow: CrossScaleFlow, y: Sequence[Tensor], latent_window: int
) -> list[Tensor]:
    """The input of the statistic, given features: energy maps (B, H, W) of each level.

    If features are whitened, those of the Gaussian at each position come first, then those of the latents.
    """
    x = gaussians.whitening(y) if gaussians else y
    return energies_of(gaussians, x, flow(x).z, latent_window)


def energies_of(
    gaussians: Gaussians | None, x: Sequence[Tensor], z: Sequence[Tensor], latent_window: int
) -> list[Tensor]:
    """`energies`, given the input and the output of the flow.

    Windows are of the flow's own latents. Behind the last layer they tell no more (benchmarks/statistic.py),
    and its matrices of each position would take as long as the Gaussian's, and as much memory.
    """
    read: Sequence[Tensor] = []
    if gaussians is not None:
        read = gaussians.positions(x)
        if latent_window == 1:
            z = gaussians.latents(z)
    return [*map(energy_map, read), *(energy_map(z_BCHW, latent_window) for z_BCHW in z)]


def new_flow(architecture: Architecture, feature_shapes: Sequence[Sequence[int]]) -> CrossScaleFlow:
    """An untrained flow for levels of these shapes; the same seed gives the same weights."""
    channels = [shape[0] for shape in feature_shapes]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(architecture.seed)
        return CrossScaleFlow(
            channels,
            len(channels),
            architecture.hidden_channels,
            architecture.kernel_sizes,
            architecture.seed,
            architecture.inside(feature_shapes),
        )


def _check_size(architecture: Architecture, backbone: Backbone, pyramid: Pyramid, is_proven: bool) -> None:
    """Raises ValueError with the nearest sizes that fit, if the image size does not fit.

    A side must be a multiple of the coarsest level's reduction, so that levels align. A network that is no
    chain of convolutions may need more, for instance whole windows.
    """
    scales, multiple = architecture.scales, pyramid.reductions[-1]

    def fits(height: int, width: int) -> bool:
        if height % multiple or width % multiple or min(height, width) < multiple:
            return False
        asks = not (backbone.is_chain or is_proven)
        return not asks or all(backbone.takes(height >> s, width >> s) for s in range(scales))

    height, width = architecture.image_size
    if fits(height, width):
        return
    side = next((side for side in (height, width) if not fits(side, side)), height)
    most = max(2 * side, backbone.native_side << (scales - 1)) + multiple
    ways = (
        range(side - side % multiple, 0, -multiple),
        range(side - side % multiple + multiple, most, multiple),
    )
    nearest = [next((s for s in way if s != side and fits(s, s)), None) for way in ways]
    found = " or ".join(str(s) for s in nearest if s) or "none; choose fewer scales or another network"
    raise ValueError(
        f"image size {side} does not fit: with backbone {architecture.backbone} and {scales} "
        f"scale{'s' * (scales != 1)}, height and width must be multiples of {multiple}"
        f"{'' if backbone.is_chain else ' that the network takes'} (nearest: {found})"
    )


def _check_overlap(overlap: int, architecture: Architecture, reduction: int) -> None:
    """Raises ValueError unless the cells of neighbouring tiles, and of the image in its padding, coincide.

    Args:
        reduction: side of a map's cell in pixels.
    """
    multiple, most = 2 * reduction, min(architecture.image_size) // 2
    if overlap % multiple == 0 and overlap <= most:
        return
    below = min(overlap, most) // multiple * multiple
    nearest = " or ".join(str(size) for size in (below, below + multiple) if size <= most)
    raise ValueError(
        f"--overlap {overlap} does not fit: with backbone {architecture.backbone} and tiles of "
        f"{min(architecture.image_size)} pixels it must be a multiple of {multiple}, and at most {most} "
        f"(nearest: {nearest})"
    )


def _feature_shapes(
    architecture: Architecture, backbone: Backbone, pyramid: Pyramid
) -> list[tuple[int, int, int]]:
    """Per level (channels, height, width) of the features."""
    height, width = architecture.image_size
    channels = pyramid.channels(backbone.channels)
    return [(c, height // r, width // r) for c, r in zip(channels, pyramid.reductions, strict=True)]
