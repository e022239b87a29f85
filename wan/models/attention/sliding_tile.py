"""Sliding tile attention in three dimensions. Source: arXiv:2502.04507.

The grid is cut into tiles. All tokens of a tile see the same window of whole tiles around it,
so that no block of scores is partly masked. At the borders the window moves inwards instead of
being cut. Tiles at the far borders are smaller where the grid is no multiple of the tile.
"""

import itertools
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from wan.errors import WanError
from wan.models.attention.pattern import Grid, Pattern, Place, Windows


def check_triple(name: str, value: tuple[int, int, int]) -> None:
    """Refuse an option that is not three whole numbers above 0."""
    if len(value) != 3 or not all(isinstance(n, int) and n > 0 for n in value):
        raise WanError(f"attention.{name}={list(value)}: need three numbers above 0, for T, H, W")


@dataclass(frozen=True)
class SlidingTile(Pattern):
    """The queries of a tile attend to a box of `window` tiles around it.

    Attributes:
        tile: tokens along T, H and W.
        window: odd numbers of tiles along T, H and W; (3, 3, 3) sees one neighbour on each side.
    """

    tile: tuple[int, int, int] = (4, 4, 8)
    window: tuple[int, int, int] = (3, 3, 3)

    def __post_init__(self) -> None:
        check_triple("tile", self.tile)
        check_triple("window", self.window)
        if not all(n % 2 for n in self.window):
            raise WanError(
                f"attention.window={list(self.window)}: odd numbers only, the tile itself is in "
                "the middle"
            )

    def allows(self, query: Place, key: Place, grid: Grid) -> Tensor:
        t, h, w = (
            in_window(*axis) for axis in zip(query, key, grid, self.tile, self.window, strict=True)
        )
        return t & h & w

    def windows(self, grid: Grid) -> Windows:
        axes = [spans(*sizes) for sizes in zip(grid, self.tile, self.window, strict=True)]
        tokens = torch.arange(grid[0] * grid[1] * grid[2]).view(grid)
        # Windows of equal sizes are stacked, so that they run as one batch.
        alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parts in itertools.product(*axes):
            tile, seen = (tokens[box].flatten() for box in zip(*parts, strict=True))
            alike[len(tile), len(seen)].append((tile, seen))
        return [
            (torch.stack([q for q, _ in group]), torch.stack([k for _, k in group]))
            for group in alike.values()
        ]


def in_window(query: Tensor, key: Tensor, length: int, size: int, reach: int) -> Tensor:
    """Whether, along one axis, the key lies in the window of the query's tile."""
    tiles = -(-length // size)
    first = (query // size - reach // 2).clamp(0, max(tiles - reach, 0)) * size
    return (key >= first) & (key < first + reach * size)


def spans(length: int, size: int, reach: int) -> list[tuple[slice, slice]]:
    """The tokens of each tile and the tokens of its window, along one axis."""
    tiles = -(-length // size)
    pairs = []
    for i in range(tiles):
        first = min(max(i - reach // 2, 0), max(tiles - reach, 0))
        last = min((first + reach) * size, length)
        pairs.append((slice(i * size, min((i + 1) * size, length)), slice(first * size, last)))
    return pairs
