"""The precision in which a device computes, and the products that a CPU has no fast kernel for.

A CPU without AVX-512 (on ARM: without bfloat16 instructions) multiplies bfloat16 numbers one by
one, five times slower than float32 or more. There, networks whose weights are bfloat16 compute in
float32: `working_dtype` says so, and `linear` and `convolve` restore the weights as they need them,
so that the weights still take half the memory. What a network returns has the dtype of its weights.
"""

import os
import platform
import re
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Numbers of a weight that are restored at a time: 4 MiB in float32, which stays in the cache. More
# pay, up to as many as the input has, where that is larger.
PIECE = 1 << 20
# What these variables allow oneDNN, if they name one of its instruction sets.
ONEDNN_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


def is_fast_in_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are no slower than in float32."""
    return device.type != "cpu" or cpu_is_fast_in_bfloat16()


@cache
def cpu_is_fast_in_bfloat16() -> bool:
    """Whether this CPU, as far as PyTorch and oneDNN may use it, multiplies bfloat16 numbers fast.

    `ATEN_CPU_CAPABILITY=avx2` and `ONEDNN_MAX_CPU_ISA=AVX2` make a CPU with AVX-512 one without it.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    limits = [os.environ[name].upper() for name in ONEDNN_LIMITS if os.environ.get(name)]
    if any(not limit.startswith(("AVX512", "AVX10", "ALL", "DEFAULT")) for limit in limits):
        return False
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if is_x86 and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def default_dtype(device: torch.device) -> torch.dtype:
    """The dtype of weights where none is asked for: bfloat16 on a CUDA device, else float32.

    float32 is fast on every CPU, and results do not depend on which CPU it is.
    """
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def working_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of products with weights of dtype `stored`: float32 where theirs is slow."""
    narrow = stored == torch.bfloat16
    return torch.float32 if narrow and not is_fast_in_bfloat16(device) else stored


# As `torch.compiler.assume_constant_result` marks a function; calling that would import the
# compiler, which takes over a second. Otherwise the compiler could not look into this one.
working_dtype._dynamo_marked_constant = True  # type: ignore[attr-defined]


def precision_note(stored: torch.dtype, device: torch.device) -> str | None:
    """A sentence where weights are computed with in another dtype than theirs; None elsewhere."""
    used = working_dtype(stored, device)
    if used == stored:
        return None
    names = [str(dtype).removeprefix("torch.") for dtype in (stored, used)]
    return f"weights {names[0]}, computed in {names[1]}: this CPU has no fast {names[0]}"


def conv3d_warning(torch_version: str, cudnn: int | None) -> str | None:
    """What is wrong with 3-D convolutions in bfloat16 on a GPU with these versions, if anything.

    cuDNN 9.8 to 9.14 computes some of them wrongly (pytorch/pytorch#163539). PyTorch 2.9.0 leaves
    cuDNN out for all of them from 9.8 on (#163581), 2.9.1 and later for 9.8 to 9.14 only (#166480).
    What it does instead took 17 times the memory in a video encoder (#166643).

    Args:
        torch_version: `torch.__version__`.
        cudnn: `torch.backends.cudnn.version()`, such as 91002; None without cuDNN.
    """
    if cudnn is None or cudnn < 90800:
        return None
    release = tuple(int(number) for number in re.findall(r"\d+", torch_version)[:3])
    about = f"PyTorch {torch_version} with cuDNN {cudnn // 10000}.{cudnn // 100 % 100}"
    slow = "decodes in bfloat16 without cuDNN, which is slow and takes many times the memory"
    if release == (2, 9, 0):
        return f"{about} {slow}: install PyTorch 2.9.1 or later, with cuDNN 9.15 or later"
    if cudnn >= 91500:
        return None
    if release < (2, 9, 0):
        return f"{about} may decode wrongly in bfloat16: install cuDNN 9.15 or later"
    return f"{about} {slow}: install cuDNN 9.15 or later (pip install nvidia-cudnn-cu12)"


# --- products -------------------------------------------------------------------------------------


def under_autocast(x: Tensor) -> bool:
    """Whether autocast chooses the dtype of products with x; meta tensors have no autocast."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    restore: Callable[[Tensor, slice], Tensor] | None = None,
) -> Tensor:
    """x Wᵀ + bias in the dtype of x: (..., in) -> (..., out).

    A weight of another dtype is restored to that of x first: as a whole, or on a CPU in pieces
    where no gradient is needed, which takes neither its memory nor its time.

    Args:
        weight: (out, in), of the dtype of x or a narrower one.
        bias: (out,) or None.
        restore: gives these rows of the weight in the dtype of x; None casts.
    """
    if restore is None and weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    autocast = under_autocast(x)
    if autocast and restore is None:
        return F.linear(x, weight, bias)  # autocast chooses the dtype
    restored = restore or (lambda part, rows: part.to(x.dtype))
    bias = None if bias is None else bias.to(x.dtype)
    in_pieces = x.device.type == "cpu" and not (autocast or torch.is_grad_enabled())
    piece = max(PIECE, x.numel())
    if torch.compiler.is_compiling() or not in_pieces or weight.numel() <= piece:
        return F.linear(x, restored(weight, slice(None)), bias)
    out = x.new_empty(*x.shape[:-1], len(weight))
    step = max(1, piece // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        part = None if bias is None else bias[rows]
        out[..., rows] = F.linear(x, restored(weight[rows], rows), part)
    return out


class Linear(nn.Linear):
    """`nn.Linear` whose result has the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """A 2-D or 3-D convolution in the dtype of x that uses oneDNN wherever it is faster.

    A weight of another dtype is restored to that of x first. In float32 on CPUs, PyTorch uses
    oneDNN only for batches and large inputs (C T H > 20480). Its own loop for all others takes 4 to
    10 times as long with 3-D kernels.
    """
    autocast = under_autocast(x)
    if not autocast:
        weight = weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
    onednn = (
        not torch.compiler.is_compiling()  # first: the compiler cannot look at what follows
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not autocast
    )
    if onednn:
        ones = (1,) * len(stride)
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, ones, 1)
    function = F.conv3d if weight.ndim == 5 else F.conv2d
    return function(x, weight, bias, stride, padding)
