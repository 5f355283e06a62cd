"""The pyramid of features that the flow takes: which maps of the backbone make up which level.

The *reduction* of a map is the size of the image at scale 0 divided by that of the map: the stride of its
stage, times 2^s if the image is at scale s.

Dimension letters: H height, W width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

LEAST_INSIDE = 0.5
"""A place of a map lies in the region of interest if at least this share of its pixels does, or as many as of
any place."""


@dataclass(frozen=True)
class Pyramid:
    """Levels: each joins the maps of one reduction along the channels, and halves the one before."""

    reductions: tuple[int, ...]
    """Reduction of each level, largest map first."""
    maps: tuple[tuple[tuple[int, int], ...], ...]
    """For each level, the (scale, stage) of its maps."""

    @classmethod
    def of(cls, stages: Mapping[str, int], scales: int, known_stages: Mapping[str, int]) -> "Pyramid":
        """The levels that these stages give for images of so many scales.

        Args:
            stages: the stride of each stage by its name.
            known_stages: stages to choose from, for the message.

        Raises:
            ValueError: the reductions do not double from one level to the next.
        """
        found: dict[int, list[tuple[int, int]]] = {}
        for scale in range(scales):
            for stage, stride in enumerate(stages.values()):
                found.setdefault(stride << scale, []).append((scale, stage))
        reductions = sorted(found)
        doubled = [reductions[0] << level for level in range(len(reductions))]
        if reductions != doubled:
            raise ValueError(_misfit(stages, scales, reductions, known_stages))
        return cls(tuple(reductions), tuple(tuple(found[reduction]) for reduction in reductions))

    def channels(self, of_stages: Sequence[int]) -> list[int]:
        """Number of channels of each level, given those of the stages."""
        return [sum(of_stages[stage] for _, stage in level) for level in self.maps]

    def join(self, maps: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """The levels (B, C, H, W), given the map (B, C, H, W) of every stage at every scale."""
        levels = [[maps[scale][stage] for scale, stage in level] for level in self.maps]
        return [level[0] if len(level) == 1 else torch.cat(level, dim=1) for level in levels]


def _misfit(
    stages: Mapping[str, int], scales: int, reductions: Sequence[int], known_stages: Mapping[str, int]
) -> str:
    given, fitting = (
        ", ".join(f"{name} ({stride})" for name, stride in some.items()) for some in (stages, known_stages)
    )
    return (
        f"the stages {given} with {scales} scale{'s' * (scales != 1)} give maps reduced by "
        f"{', '.join(map(str, reductions))}, which do not double from one to the next; fill the gap with "
        f"--scales or --cut_after: the stages and strides of this network are {fitting}"
    )


class Region(nn.Module):
    """The places of each map in the region of interest. It has no state, since the architecture tells it."""

    def __init__(self, inside: Sequence[Tensor] | None) -> None:
        """`inside` is, per level, 1 at places in the region and 0 at others, (H, W); None if it is all."""
        super().__init__()
        self.is_all = inside is None
        for level, inside_HW in enumerate(inside or ()):
            self.register_buffer(f"inside_{level}", inside_HW, persistent=False)

    def inside(self, level: int) -> Tensor | None:
        """1 at places of a level in the region and 0 at others, (H, W); None if it is all."""
        return None if self.is_all else self.get_buffer(f"inside_{level}")

    def only(self, x: Tensor, level: int) -> Tensor:
        """A level's maps (…, H, W), with zeros outside."""
        inside_HW = self.inside(level)
        return x if inside_HW is None else x * inside_HW

    def interleaved(self, levels: int) -> "Region":
        """The same for maps (H, W, B, C)."""
        inside = [self.inside(level) for level in range(levels)]
        return Region(None if self.is_all else [i[:, :, None, None] for i in inside if i is not None])


def inside_levels(mask_HW: NDArray[np.bool_], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """For maps of these heights and widths, 1 at places in the region and 0 at others, (H, W), float32.

    Each map has a place in the region, also if the region is smaller than any.
    """
    share_11HW = torch.from_numpy(mask_HW.astype(np.float32))[None, None]
    shares = [F.interpolate(share_11HW, size, mode="area")[0, 0] for size in sizes]
    return [(share_HW >= share_HW.max().clamp(max=LEAST_INSIDE)).float() for share_HW in shares]
