"""Recipes: settings of a training that belong together, and what no flag changes."""

import math
from dataclasses import dataclass
from typing import Any, Literal

RecipeName = Literal["default", "paper"]


@dataclass(frozen=True)
class Recipe:
    """Why the default differs from the paper is told in docs/method.md."""

    settings: dict[str, Any]
    """Values of settings that are not given."""
    fewest_epochs: int
    passes: int
    """Images that the flow is shown at least, each of them in every epoch."""
    efficientnet_stages: tuple[str, ...]
    """Of other backbones the features are the last level."""
    whitening: bool
    adam_epsilon: float
    is_annealed: bool
    """The learning rate falls to 0 along a cosine; else it stays."""

    def epochs(self, training_images: int) -> int:
        """How many there are at most where `--epochs` does not say: of few images more."""
        return max(self.fewest_epochs, math.ceil(self.passes / training_images))

    def stages(self, backbone: str) -> tuple[str, ...] | None:
        """Whose maps are the features if `--cut_after` is not given; None for the default of the network."""
        return self.efficientnet_stages if "efficientnet" in backbone else None


RECIPES: dict[RecipeName, Recipe] = {
    "default": Recipe(
        settings={
            "coupling_blocks": 1,
            "hidden_channels": 256,
            "patience": 10,
            "learning_rate": 3e-3,
        },
        fewest_epochs=6,
        passes=4200,
        efficientnet_stages=("blocks.2", "blocks.4", "blocks.5"),
        whitening=True,
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
        efficientnet_stages=("blocks.5",),
        whitening=False,
        adam_epsilon=1e-4,
        is_annealed=False,
    ),
}
