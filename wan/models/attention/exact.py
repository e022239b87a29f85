"""Exact attention: softmax(q kᵀ / √K + bias) v, in variants that differ in time and memory.

Letters: B batch, N heads, L queries, S keys, K channels of a head.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

AttentionFunction = Callable[..., Tensor]  # (q, k, v, bias=None) -> out


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """PyTorch's fused kernels: linear memory where the device has a flash kernel.

    Args:
        q: (B, N, L, K); k and v: (B, N, S, K), all of one dtype, which the result keeps.
        bias: (S,) added to the scores of every query, or None.
    """
    mask = None if bias is None else bias.to(q.dtype).view(1, 1, 1, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def math_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula as written, all in float32: (L, S) scores per head in memory.

    The other functions are compared with this one. Under autocast its products run in bfloat16. On
    CPUs `sdpa` is 1.2 to 1.9 times faster at the miniature's 80 tokens, but not in training: a step
    in bfloat16 took 0.30 s with this function and 0.70 s with `sdpa`.

    Arguments as for `sdpa_attention`, except that `bias` may have any shape that broadcasts to
    (B, N, L, S).
    """
    scores = q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, N, L, S)
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(dim=-1) @ v.float()).to(v.dtype)


def sliced_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, slice_size: int = 1024
) -> Tensor:
    """`math_attention` over `slice_size` queries at a time: bounded memory on any device.

    Exact, because each query has a softmax of its own. Other arguments as for `sdpa_attention`.
    """
    slices = q.split(slice_size, dim=2)
    return torch.cat([math_attention(part, k, v, bias) for part in slices], dim=2)
