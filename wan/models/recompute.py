"""Activation checkpointing: what a block keeps for its backward pass, and what it recomputes.

Every variant runs block(*arguments); outputs and gradients equal those of the plain call.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

# The fused attention kernels; each device has its own. Their outputs are half of the
# residual stream's size and cost half of a block's time at full length.
ATTENTION_KERNELS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)


def keep_all(block: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Keep all activations: the most memory, no second forward pass."""
    return block(*arguments)


def keep_input(block: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Keep the block's input: the least memory, the whole block runs again."""
    if not torch.is_grad_enabled():
        return block(*arguments)
    return checkpoint(block, *arguments, use_reentrant=False)


def keep_attention(block: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Keep the outputs of attention too; the rest of the block runs again.

    Only outputs of fused kernels are kept: attention="math" is recomputed like the rest.
    """
    if not torch.is_grad_enabled():
        return block(*arguments)
    contexts = partial(create_selective_checkpoint_contexts, attention_is_kept)
    return checkpoint(block, *arguments, use_reentrant=False, context_fn=contexts)


def attention_is_kept(context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    """PyTorch's policy for one operation: keep the results of attention kernels only."""
    kept = any(op is getattr(torch.ops.aten, name).default for name in ATTENTION_KERNELS)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINT_BLOCKS: dict[str, Callable[..., Tensor]] = {
    "none": keep_all,
    "full": keep_input,
    "selective": keep_attention,
}
