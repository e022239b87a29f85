"""Attention as a loop over batch, heads and queries."""

import math

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, N, L, K), two of (B, N, S, K) and an optional (S,) -> (B, N, L, K)."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b in range(q.shape[0]):
        for n in range(q.shape[1]):
            for i in range(q.shape[2]):
                scores = [float(q[b, n, i] @ key) / math.sqrt(q.shape[-1]) for key in k[b, n]]
                if bias is not None:
                    scores = [s + float(extra) for s, extra in zip(scores, bias, strict=True)]
                weights = [math.exp(s) for s in scores]
                for weight, value in zip(weights, v[b, n], strict=True):
                    out[b, n, i] += weight / sum(weights) * value
    return out
