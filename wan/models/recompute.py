"""What a block keeps for its backward pass, and what it computes a second time instead.

A variant runs block(*arguments) and gives the same numbers as that, gradients too.
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

# The fused attention kernels, of which each device has its own. Their outputs are a quarter of the
# residual stream's size and cost half of a block's time at full length.
ATTENTION_KERNELS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)


def keep_all(block: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """The most memory and no second forward pass."""
    return block(*arguments)


def keep_input(block: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """The least memory: the whole block runs again."""
    if not torch.is_grad_enabled():
        return block(*arguments)
    return checkpoint(block, *arguments, use_reentrant=False)


def keep_attention(block: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """The block runs again but for attention, whose outputs are kept.

    Only of fused kernels: attention="math" is recomputed like the rest.
    """
    if not torch.is_grad_enabled():
        return block(*arguments)
    contexts = partial(create_selective_checkpoint_contexts, attention_is_kept)
    return checkpoint(block, *arguments, use_reentrant=False, context_fn=contexts)


def attention_is_kept(context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    kept = any(op is getattr(torch.ops.aten, name).default for name in ATTENTION_KERNELS)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINT_BLOCKS: dict[str, Callable[..., Tensor]] = {
    "none": keep_all,
    "full": keep_input,
    "selective": keep_attention,
}
