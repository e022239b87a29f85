"""Attention kernels by name, for self-attention: (q, k, v), each (B, N, L, K), -> (B, N, L, K).

`sdpa` lets PyTorch choose a kernel. Each function here runs one kernel, or raises a WanError where
it is missing. They take no bias. `sage` is not exact: it multiplies queries and keys in 8 bits
(arXiv:2410.02367).

B batch, N heads, L tokens, K channels of a head.
"""

import importlib
from types import ModuleType

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan.errors import WanError


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """NVIDIA's cuDNN, the fastest kernel for Hopper that comes with PyTorch."""
    return _kernel("cudnn", SDPBackend.CUDNN_ATTENTION, q, k, v)


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's FlashAttention-2 (arXiv:2307.08691); on CPUs its tiled kernel."""
    return _kernel("flash", SDPBackend.FLASH_ATTENTION, q, k, v)


def flash3_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-3 (arXiv:2407.08608) for Hopper, from its own package."""
    package = _package("flash3", "flash_attn_interface", "FlashAttention-3 (hopper/)", q)
    # Its layout is (B, L, N, K). Early versions return (out, log-sum-exp).
    out = package.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def sage_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SageAttention, from its own package: quantised, and without a backward pass."""
    if q.requires_grad or k.requires_grad or v.requires_grad:
        raise WanError("attention=sage has no backward pass: train with sdpa, cudnn or flash")
    package = _package("sage", "sageattention", "SageAttention", q)
    return package.sageattn(q, k, v, tensor_layout="HND", is_causal=False)


def _kernel(name: str, backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Run one of PyTorch's kernels; raise a WanError that names it where it is missing.

    PyTorch's own error says only that no kernel is available.
    """
    try:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)
    except RuntimeError as error:
        if not str(error).startswith(("No viable backend", "No available kernel")):
            raise
        raise WanError(
            f"attention={name}: PyTorch has no such kernel for {q.dtype} on {q.device.type} with "
            f"{q.shape[-1]} channels per head; choose sdpa, or dtype=bfloat16 on a GPU that has it"
        ) from error


def _package(name: str, module: str, title: str, q: Tensor) -> ModuleType:
    """Import an optional package at its first use."""
    if q.device.type != "cuda":
        raise WanError(f"attention={name} runs on CUDA GPUs, not on {q.device.type}; choose sdpa")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise WanError(
            f"attention={name}: the package {module} is not installed; install {title}, or choose "
            "cudnn, flash or sdpa"
        ) from error
