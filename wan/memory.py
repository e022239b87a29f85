"""What a computation needs beside its inputs, counted as it runs: on tensors, or on none at all.

    peak_bytes(lambda: dit(latents, timestep, context))

On the meta device tensors have sizes and no content, so that a network tells its needs at any size
in a moment. Counted are the tensors that PyTorch's operations return, while they live; not what a
kernel takes for itself (a convolution's workspace, a matrix product's).
"""

import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside and still live.

    Attributes:
        live: now.
        peak: the most so far.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch would load its compiler, a second and more, to keep it out of here."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def spike(self, num_bytes: int) -> None:
        """Count memory that is taken and given back between two operations."""
        self.peak = max(self.peak, self.live + num_bytes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._meet(leaf, made_here=False)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._meet(leaf, made_here=True)
        return result

    def _meet(self, tensor: Tensor, made_here: bool) -> None:
        """Follow a tensor's memory, which others may share, to its end."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if made_here else 0
        self._known.add(key)
        weakref.finalize(storage, self._leave, key, size).atexit = False
        self.live += size
        self.spike(0)

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class FusedAttention(TorchFunctionMode):
    """Attention as a fused kernel sees it: only its result is made, with tokens before heads.

    The meta device has no such kernel and would count all scores.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, _, v = args  # as all of `wan` calls it; its options are keywords
        batch, heads, tokens, _ = q.shape
        return q.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)


@torch.no_grad()
def peak_bytes(compute: Callable[[], Any]) -> int:
    """The most bytes of tensors at any time in a computation, its result included."""
    with LiveBytes() as memory:
        result = compute()
    del result
    return memory.peak


def free_bytes(device: torch.device) -> int:
    """What a device has left, by its driver; for a CPU what the system can give."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            rows = dict(line.split(":") for line in file)
        return int(rows["MemAvailable"].split()[0]) * 1024
    except FileNotFoundError:  # not Linux: what there is at all
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
