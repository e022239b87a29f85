"""3-D rotary position embedding: queries and keys are rotated by angles that depend on (t, h, w).

The channels of a head are divided among the axes, T first, then H, then W. Each axis has its own
frequencies theta^(-2j / channels of the axis). Neighbouring channels (2j, 2j + 1) form the pairs
that are rotated. A rotation's inverse is its transpose, so a score q·k depends on the offset of two
tokens only. Source: RoFormer, arXiv:2104.09864, eq. 34; Wan, arXiv:2503.20314.

Letters: B batch, N heads, L tokens (order T, H, W, row-major), K channels of a head.
"""

import torch
from torch import Tensor

from wan.errors import WanError


def axis_channels(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that follow T, H and W: (44, 42, 42) for 128. T takes the remainder.

    Raises:
        WanError: `head_dim` is odd or too small for one pair per axis.
    """
    if head_dim < 6 or head_dim % 2:
        raise WanError(f"head_dim={head_dim}: rotary embedding needs an even number of at least 6")
    space = 2 * (head_dim // 6)
    return head_dim - 2 * space, space, space


def rope_table(
    grid: tuple[int, int, int],
    head_dim: int,
    theta: float = 10000.0,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle of every token and pair: two (L, head_dim / 2) float32 tensors.

    Angles, cosines and sines are computed in float64 on the CPU, because not every device has
    float64: a few thousand numbers per axis. Only the expansion to the grid runs on `device`.

    Args:
        grid: tokens along T, H and W, counted from 0.
        head_dim: channels of one head.
        theta: base of the frequencies.
        device: device of the tables.
    """
    cosines, sines = [], []
    for axis, (size, channels) in enumerate(zip(grid, axis_channels(head_dim), strict=True)):
        exponent = torch.arange(0, channels, 2, dtype=torch.float64) / channels
        angle = torch.outer(torch.arange(size, dtype=torch.float64), 1.0 / theta**exponent)
        # The angles of one axis are constant along the other two.
        shape = [1, 1, 1, channels // 2]
        shape[axis] = size
        cosines.append(angle.cos().float().to(device).view(shape).expand(*grid, -1))
        sines.append(angle.sin().float().to(device).view(shape).expand(*grid, -1))
    return torch.cat(cosines, dim=-1).flatten(0, 2), torch.cat(sines, dim=-1).flatten(0, 2)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (a, b) of channels to (a cos - b sin, a sin + b cos).

    (B, N, L, K) with two (L, K / 2) tables -> (B, N, L, K); float32 inside, then the dtype of x.
    """
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # (B, N, L, K / 2)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)
