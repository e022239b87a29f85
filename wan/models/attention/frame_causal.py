"""Attention to the present and earlier frames, as in a model that makes video frame by frame."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wan.models.attention.pattern import Grid, Pattern, Place, Windows


@dataclass(frozen=True)
class FrameCausal(Pattern):
    """A token attends to its own and all earlier frames: (T + 1) / (2 T) of the scores."""

    def allows(self, query: Place, key: Place, grid: Grid) -> Tensor:
        return key.t <= query.t

    def windows(self, grid: Grid) -> Windows:
        frames = torch.arange(math.prod(grid)).view(grid[0], 1, -1)  # (T, 1, H W)
        return [(frames[t], frames[: t + 1].reshape(1, -1)) for t in range(grid[0])]
