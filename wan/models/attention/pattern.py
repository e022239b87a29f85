"""Sparse self-attention with a fixed pattern: which tokens of a (T, H, W) grid see which.

A pattern is written in two forms. `allows` is a rule for any two places, from which FlexAttention
makes the block mask of its GPU kernel. `windows` lists the tokens, so that CPUs gather only these.
Tests compare both with the formula under the dense mask.

B batch, N heads, L tokens (order T, H, W, row-major), K channels of a head; G windows of n queries
and m keys.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.models.attention.exact import sdpa_attention

Grid = tuple[int, int, int]
Windows = list[tuple[Tensor, Tensor]]  # queries (G, n) and the keys (G, m) they see


class Place(NamedTuple):
    """Coordinates of tokens on their grid: three integer tensors of one shape."""

    t: Tensor
    h: Tensor
    w: Tensor


def places(tokens: Tensor, grid: Grid) -> Place:
    _, height, width = grid
    return Place(tokens // (height * width), tokens // width % height, tokens % width)


@dataclass(frozen=True)
class Pattern:
    """A fixed sparse pattern and the attention under it. Subclasses define which keys are seen.

    Attributes:
        DISJOINT: no token is a key in two windows, so gathering copies each token once.
    """

    DISJOINT: ClassVar[bool] = False

    def allows(self, query: Place, key: Place, grid: Grid) -> Tensor:
        """True where a query attends to a key; positions of queries and keys broadcast."""
        raise NotImplementedError

    def windows(self, grid: Grid) -> Windows:
        """The same rule as lists of tokens; every token is a query in exactly one window."""
        raise NotImplementedError

    def of_layer(self, layer: int) -> "Pattern":
        """The pattern in one layer of a network."""
        return self

    def density(self, grid: Grid) -> float:
        """Computed share of dense attention's scores, which is also its share of the FLOPs."""
        seen = sum(queries.numel() * keys.shape[1] for queries, keys in self.windows(grid))
        return seen / math.prod(grid) ** 2

    def mask(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """True where a query attends to a key: (L, L) bool, whatever the values of q and k."""
        tokens = torch.arange(math.prod(grid), device=q.device)
        return self.allows(places(tokens[:, None], grid), places(tokens, grid), grid)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        """(B, N, L, K) three times -> (B, N, L, K).

        GPUs run FlexAttention, which is compiled at the first call for a grid. CPUs, and patterns
        with disjoint windows, run dense attention within each window.
        """
        if q.is_cuda and not self.DISJOINT:
            return attend_blocks(q, k, v, *remembered(block_mask, self, grid, q.device))
        return attend_windows(q, k, v, *remembered(gathered, self, grid, q.device))


def remembered(build: Callable[..., Any], *key: Any) -> Any:
    """Call a cached function, from compiled code too.

    torch.compile ignores `lru_cache`: it would build the mask again in every call of a block.
    """
    if torch.compiler.is_compiling():
        build = torch.compiler.disable(build)
    return build(*key)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # tensors made in inference mode could not be used in training later
def gathered(pattern: Pattern, grid: Grid, device: torch.device) -> tuple[Windows, Tensor]:
    """The windows on a device, and each token's index in the order of their queries, (L,)."""
    windows = [(queries.to(device), keys.to(device)) for queries, keys in pattern.windows(grid)]
    order = torch.cat([queries.flatten() for queries, _ in windows])
    return windows, order.argsort()


def attend_windows(q: Tensor, k: Tensor, v: Tensor, windows: Windows, position: Tensor) -> Tensor:
    """Dense attention within each window; windows of one size run as one batch.

    While tokens are gathered, all heads of a token form one long row: copying such rows, and adding
    them up in the backward pass, is several times faster than indexing single heads.
    """
    heads = q.shape[:2]
    q, k, v = (x.permute(2, 0, 1, 3).flatten(1) for x in (q, k, v))  # (L, B N K)
    parts = []
    for queries, keys in windows:
        rows = (
            F.embedding(index, x).unflatten(2, (heads.numel(), -1)).transpose(1, 2)
            for index, x in ((queries, q), (keys, k), (keys, v))
        )
        part = sdpa_attention(*rows)  # (G, B N, n, K)
        parts.append(part.transpose(1, 2).flatten(2).flatten(0, 1))  # (G n, B N K)
    out = F.embedding(position, torch.cat(parts))  # (L, B N K)
    return out.unflatten(1, (*heads, -1)).permute(1, 2, 0, 3)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def block_mask(pattern: Pattern, grid: Grid, device: torch.device) -> tuple[Any, Tensor, Tensor]:
    """FlexAttention's block mask for tokens ordered by window, that order, and its inverse.

    In this order neighbours share keys, so that few blocks of the kernel are partly empty.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    order = torch.cat([queries.flatten() for queries, _ in pattern.windows(grid)]).to(device)

    def allowed(b: Tensor, n: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return pattern.allows(places(order[query], grid), places(order[key], grid), grid)

    length = len(order)
    mask = create_block_mask(allowed, None, None, length, length, device=device)
    return mask, order, order.argsort()


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    order: Tensor,
    position: Tensor,
    kernel: Callable[..., Tensor] | None = None,
) -> Tensor:
    """FlexAttention (arXiv:2412.05496) on tokens put in `order`.

    Args:
        kernel: replaces FlexAttention where memory is estimated (`wan.pipeline.memory_counts`).
    """
    attend = kernel or flex_kernel()
    return attend(q[:, :, order], k[:, :, order], v[:, :, order], block_mask=mask)[:, :, position]


@cache
def flex_kernel() -> Callable[..., Tensor]:
    """FlexAttention, compiled: without compilation it computes all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
