"""Block-sparse attention to the tiles that matter most, chosen by their means.

Source: the fine stage of VSA, arXiv:2505.13389, section 2; MoBA, arXiv:2502.13189, chooses alike.
The coarse stage of VSA, whose output is added through a gate, needs weights trained for it.

B batch, N heads, L tokens, K channels of a head; M tiles of up to P tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.errors import WanError
from wan.models.attention.pattern import Grid, flex_kernel, remembered
from wan.models.attention.sliding_tile import check_triple, spans

FLEX_BLOCK = 128  # tokens of a block in FlexAttention's kernels


class Tiling(NamedTuple):
    """The tokens of each tile. Smaller tiles at the far borders are padded, which `real` marks."""

    tokens: Tensor  # (M, P), token 0 as padding
    real: Tensor  # (M, P) bool, False at padding
    position: Tensor  # (L,), index of each token in the flattened (M P)
    full: bool  # no tile is padded


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # tensors made in inference mode could not be used in training later
def tiling(grid: Grid, tile: tuple[int, int, int], device: torch.device) -> Tiling:
    """Cut a grid into tiles, in row-major order."""
    tokens = torch.arange(math.prod(grid)).view(grid)
    axes = [[q for q, _ in spans(n, p, 1)] for n, p in zip(grid, tile, strict=True)]
    tiles = [tokens[t, h, w].flatten() for t in axes[0] for h in axes[1] for w in axes[2]]
    padded = torch.nn.utils.rnn.pad_sequence(tiles, batch_first=True, padding_value=-1)
    real = padded >= 0
    position = padded[real].argsort()  # of each token among the real ones
    position = real.flatten().nonzero()[:, 0][position]
    padded = padded.clamp(min=0)
    full = bool(real.all())
    return Tiling(padded.to(device), real.to(device), position.to(device), full)


@dataclass(frozen=True)
class TopK:
    """Each tile of queries attends to the tiles of keys that fit it best.

    These are the tiles whose mean key has the largest dot product with the tile's mean query. Each
    head chooses in every call. The choice has no gradient.

    Attributes:
        tile: tokens along T, H and W. On GPUs their product must be a multiple of 128.
        keep: share of the tiles that are seen, rounded up.
    """

    tile: tuple[int, int, int] = (4, 4, 8)
    keep: float = 0.2

    def __post_init__(self) -> None:
        check_triple("tile", self.tile)
        if not 0 < self.keep <= 1:
            raise WanError(f"attention.keep={self.keep}: a share of the tiles, above 0, up to 1")

    def of_layer(self, layer: int) -> "TopK":
        return self

    def num_kept(self, num_tiles: int) -> int:
        return math.ceil(self.keep * num_tiles - 1e-9)  # 0.2 x 15 is 3, not 3.0000000000000004

    def density(self, grid: Grid) -> float:
        """Share of the tiles that are seen; also of the scores, where the tile divides the grid."""
        num_tiles = math.prod(-(-n // p) for n, p in zip(grid, self.tile, strict=True))
        return self.num_kept(num_tiles) / num_tiles

    @torch.no_grad()
    def choose(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """The tiles that each tile attends to: (B, N, M, kept) int64 indices, best first."""
        tiles = remembered(tiling, grid, self.tile, q.device)
        real = tiles.real[:, :, None]  # (M, P, 1)
        mean_q, mean_k = (
            (x[:, :, tiles.tokens].float() * real).sum(dim=3) / real.sum(dim=1) for x in (q, k)
        )  # (B, N, M, K)
        scores = mean_q @ mean_k.transpose(-1, -2)  # (B, N, M, M)
        return scores.topk(self.num_kept(len(tiles.tokens)), dim=-1).indices

    def mask(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """True where a query attends to a key: (B, N, L, L) bool, chosen from these q and k."""
        tiles = remembered(tiling, grid, self.tile, q.device)
        tile_of = tiles.position // tiles.tokens.shape[1]  # (L,)
        seen = as_mask(self.choose(q, k, grid))
        return seen[:, :, tile_of][:, :, :, tile_of]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        """(B, N, L, K) three times -> (B, N, L, K).

        Raises:
            WanError: on a GPU, a tile that is no multiple of the kernel's block.
        """
        return self._attend(
            q, k, v, grid, self._attend_blocks if q.is_cuda else self._attend_gathered
        )

    def on_gpu(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, kernel: Callable[..., Tensor]
    ) -> Tensor:
        """Run the GPU path on any device, with `kernel` in place of FlexAttention."""
        return self._attend(q, k, v, grid, partial(self._attend_blocks, kernel=kernel))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, attend: Callable[..., Tensor]
    ) -> Tensor:
        tiles = remembered(tiling, grid, self.tile, q.device)
        chosen = self.choose(q, k, grid)
        q, k, v = (x[:, :, tiles.tokens] for x in (q, k, v))  # (B, N, M, P, K)
        out = attend(q, k, v, chosen, tiles)
        return out.flatten(2, 3)[:, :, tiles.position]

    def _attend_gathered(
        self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, tiles: Tiling
    ) -> Tensor:
        """The CPU path: copy the chosen tiles of keys for each tile of queries."""
        heads, num_tiles = q.shape[1:3]
        first = torch.arange(0, q.shape[:3].numel(), num_tiles, device=q.device)
        rows = chosen + first.view(-1, heads, 1, 1)  # in (B N M)
        k, v = (
            F.embedding(rows, x.flatten(3).flatten(0, 2))  # (B, N, M, kept, P K)
            .unflatten(4, x.shape[3:])
            .flatten(3, 4)
            .flatten(1, 2)  # (B, N M, kept P, K)
            for x in (k, v)
        )
        mask = None if tiles.full else tiles.real[chosen].flatten(1, 2).flatten(2, 3).unsqueeze(2)
        out = F.scaled_dot_product_attention(q.flatten(1, 2), k, v, attn_mask=mask)
        return out.unflatten(1, (heads, num_tiles))

    def _attend_blocks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        chosen: Tensor,
        tiles: Tiling,
        kernel: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """The GPU path: FlexAttention, where each chosen block is a tile."""
        size = q.shape[3]
        if size % FLEX_BLOCK:
            raise WanError(
                f"attention.tile={list(self.tile)}: {size} tokens; on GPUs a tile must hold a "
                f"multiple of {FLEX_BLOCK}, for example [4, 4, 8]"
            )
        mask = chosen_blocks(chosen, tiles.real.flatten(), size)
        attend = kernel or flex_kernel()
        out = attend(*(x.flatten(2, 3) for x in (q, k, v)), block_mask=mask)
        return out.unflatten(2, (-1, size))


def as_mask(chosen: Tensor) -> Tensor:
    """Chosen tiles (B, N, M, kept) -> (B, N, M, M) bool."""
    num_tiles = chosen.shape[2]
    seen = chosen.new_zeros(*chosen.shape[:3], num_tiles, dtype=torch.bool)
    return seen.scatter_(3, chosen, True)


def chosen_blocks(chosen: Tensor, real: Tensor, size: int) -> Any:
    """FlexAttention's block mask of chosen tiles (B, N, M, kept), without the padding keys."""
    from torch.nn.attention.flex_attention import BlockMask

    num_tiles, kept = chosen.shape[2:]
    seen = as_mask(chosen)

    def allowed(b: Tensor, n: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return seen[b, n, query // size, key // size] & real[key]

    counts = torch.full_like(chosen[..., 0], kept, dtype=torch.int32)
    # The kernel expects as many indices as there are tiles, and reads the first `kept` of them.
    indices = F.pad(chosen, (0, num_tiles - kept)).int()
    length = num_tiles * size
    return BlockMask.from_kv_blocks(
        counts, indices, BLOCK_SIZE=size, mask_mod=allowed, seq_lengths=(length, length)
    )
