"""Attention within frames, along time, or the two in turn (as in TimeSformer, arXiv:2102.05095)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from wan.errors import WanError
from wan.models.attention.pattern import Grid, Pattern, Place, Windows

ALTERNATES = "attention=factorised is spatial or temporal by layer: call of_layer(i), or choose one"


@dataclass(frozen=True)
class Spatial(Pattern):
    """A token attends to its own frame: 1 / T of the scores are computed."""

    DISJOINT: ClassVar[bool] = True

    def allows(self, query: Place, key: Place, grid: Grid) -> Tensor:
        return query.t == key.t

    def windows(self, grid: Grid) -> Windows:
        frames = torch.arange(math.prod(grid)).view(grid[0], -1)  # (T, H W)
        return [(frames, frames)]


@dataclass(frozen=True)
class Temporal(Pattern):
    """A token attends to its own place in all frames: 1 / (H W) of the scores are computed."""

    DISJOINT: ClassVar[bool] = True

    def allows(self, query: Place, key: Place, grid: Grid) -> Tensor:
        return (query.h == key.h) & (query.w == key.w)

    def windows(self, grid: Grid) -> Windows:
        columns = torch.arange(math.prod(grid)).view(grid[0], -1).T  # (H W, T)
        return [(columns, columns)]


@dataclass(frozen=True)
class Factorised(Pattern):
    """`Spatial` in even layers, `Temporal` in odd ones; two layers connect any two tokens."""

    def of_layer(self, layer: int) -> Pattern:
        return Temporal() if layer % 2 else Spatial()

    def allows(self, query: Place, key: Place, grid: Grid) -> Tensor:
        raise WanError(ALTERNATES)

    def windows(self, grid: Grid) -> Windows:
        raise WanError(ALTERNATES)
