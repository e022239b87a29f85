"""Attention by name: exact functions, kernels, and approximations for tokens on a grid.

`exact` holds the formula and functions that equal it, `kernels` single kernels. The approximations
have a file each. They are for self-attention and know the (T, H, W) grid of the tokens. `choice`
turns a name or an `AttentionConfig` into the function that each layer of a network calls.
"""

from wan.models.attention.choice import (
    ATTENTION,
    BACKENDS,
    SPARSE,
    AttentionChoice,
    GridAttention,
    LayerAttention,
    NetworkAttention,
    build_attention,
    network_attention,
    verified_attention,
)
from wan.models.attention.exact import (
    AttentionFunction,
    math_attention,
    sdpa_attention,
    sliced_attention,
)
from wan.models.attention.pattern import Grid
from wan.models.attention_config import AttentionConfig

__all__ = [
    "ATTENTION",
    "BACKENDS",
    "SPARSE",
    "AttentionChoice",
    "AttentionConfig",
    "AttentionFunction",
    "Grid",
    "GridAttention",
    "LayerAttention",
    "NetworkAttention",
    "build_attention",
    "math_attention",
    "network_attention",
    "sdpa_attention",
    "sliced_attention",
    "verified_attention",
]
