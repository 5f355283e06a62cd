"""Recipes: training settings that belong together, and constants that no flag changes."""

import math
from dataclasses import dataclass
from typing import Any, Literal

RecipeName = Literal["default", "paper"]


@dataclass(frozen=True)
class Recipe:
    """A recipe; docs/method.md says why the default differs from the paper."""

    settings: dict[str, Any]
    """Defaults of settings."""
    fewest_epochs: int
    passes: int
    """Smallest number of images that the flow is shown, summed over epochs."""
    checkpoint_images: int
    """Number of images that the flow is shown between two checkpoints, unless an epoch has more."""
    fewest_checkpoint_epochs: int
    efficientnet_stages: tuple[str, ...]
    """Stages of an EfficientNet whose maps are the features; other backbones have their last level."""
    whitening: bool
    latent_window: int
    kernel_size: tuple[int, int, int]
    """Kernel size of the first coupling block, of the blocks after it, and of the last of several."""
    most_dropout: float
    """Limit of the dropout for ever fewer images."""
    adam_epsilon: float
    is_annealed: bool
    """Whether the learning rate falls to 0 along a cosine; otherwise it is constant."""

    def epochs(self, training_images: int) -> int:
        """Default of `--epochs`, which is larger for few images."""
        return max(self.fewest_epochs, math.ceil(self.passes / training_images))

    def checkpoint_epochs(self, training_images: int) -> int:
        """Default of `--checkpoint_epochs`, which is larger for few images, whose epochs take moments."""
        return max(self.fewest_checkpoint_epochs, math.ceil(self.checkpoint_images / training_images))

    def dropout(self, training_images: int) -> float:
        """Share of the subnetworks' hidden channels that each image does without in a training step.

        It is 0 for many images, of which the flow learns none by heart, and larger the fewer they are.
        """
        return self.most_dropout * (1 - self.fewest_epochs / self.epochs(training_images))

    def kernel_sizes(self, blocks: int) -> list[int]:
        """Default of `--kernel_sizes`, one for each block."""
        first, middle, last = self.kernel_size
        return [first, *[middle] * (blocks - 2), *[last] * (blocks > 1)]

    def stages(self, backbone: str) -> tuple[str, ...] | None:
        """Default of `--cut_after`; None for the default of the network."""
        return self.efficientnet_stages if "efficientnet" in backbone else None


RECIPES: dict[RecipeName, Recipe] = {
    "default": Recipe(
        settings={
            "coupling_blocks": 2,
            "hidden_channels": 192,
            "patience": 10,
            "learning_rate": 3e-3,
        },
        fewest_epochs=6,
        passes=4200,
        checkpoint_images=700,
        fewest_checkpoint_epochs=1,
        efficientnet_stages=("blocks.2", "blocks.4", "blocks.5"),
        whitening=True,
        latent_window=3,
        kernel_size=(3, 1, 1),
        most_dropout=0.5,
        adam_epsilon=1e-8,
        is_annealed=True,
    ),
    "paper": Recipe(
        settings={
            "coupling_blocks": 4,
            "hidden_channels": 1024,
            "patience": 240,
            "learning_rate": 2e-4,
        },
        fewest_epochs=240,
        passes=0,
        checkpoint_images=0,
        fewest_checkpoint_epochs=10,
        efficientnet_stages=("blocks.5",),
        whitening=False,
        latent_window=1,
        kernel_size=(3, 3, 5),
        most_dropout=0.0,
        adam_epsilon=1e-4,
        is_annealed=False,
    ),
}
