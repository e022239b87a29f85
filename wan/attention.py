"""Attention over a set of keys: softmax(q kᵀ / √K + bias) v, in variants that give the same result.

A variant is a function (q, k, v, bias=None) -> out, chosen by name once, when a model is built.

Letters: B batch, N heads, L queries, S keys, K channels of a head.
"""

import difflib
import inspect
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.errors import WanError

AttentionFunction = Callable[..., Tensor]


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

    Arguments as for `sdpa_attention`.
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


ATTENTION: dict[str, AttentionFunction] = {
    "sdpa": sdpa_attention,
    "math": math_attention,
    "sliced": sliced_attention,
}


def build_attention(name: str, **options: int) -> AttentionFunction:
    """The attention function called `name`, with its options bound.

    Raises:
        WanError: no such variant, or it lacks one of the options.
    """
    if name not in ATTENTION:
        near = difflib.get_close_matches(name, ATTENTION, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise WanError(f"attention={name!r}: choose one of {', '.join(ATTENTION)}{hint}")
    function = ATTENTION[name]
    allowed = [
        p for p in inspect.signature(function).parameters if p not in ("q", "k", "v", "bias")
    ]
    if unknown := sorted(set(options) - set(allowed)):
        raise WanError(
            f"attention={name!r} has no option {', '.join(unknown)}; "
            f"it takes {', '.join(allowed) or 'none'}"
        )
    if any(value < 1 for value in options.values()):
        raise WanError(f"attention={name!r}: {options} must be at least 1")
    return partial(function, **options) if options else function
