"""What a computation needs beside its inputs, counted as it runs: on tensors, or on none at all.

    peak_bytes(lambda: dit(latents, timestep, context))

On the meta device tensors have sizes and no content, so that a network tells its needs at any size
in a moment. `LiveBytes` counts the tensors that PyTorch's operations return, while they live: what
every device needs. `ProcessBytes` adds what a CPU takes besides, so that it tells the resident
memory of a process. Neither counts the few MiB per thread that libraries keep for themselves, nor
the workspaces of a GPU's convolutions and matrix products.
"""

import os
import weakref
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# From which size on glibc's malloc leaves blocks to mmap: at first, and at most. In between it is
# the largest of those blocks that was given back so far.
MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD = 128 << 10, 32 << 20
# Where Linux tells what is free, which control groups this process is in, and what these may take.
MEMINFO, OWN_CGROUPS, CGROUPS = map(Path, ("/proc/meminfo", "/proc/self/cgroup", "/sys/fs/cgroup"))
CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.mkldnn_convolution.default)


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
        if func in CONVOLUTIONS and result.is_meta:
            # Other devices keep the order of the input's axes in memory; meta forgets it in 3-D,
            # and attention is fused in some orders only.
            order = suggest_memory_format(args[0])
            result = torch.empty_like(result, memory_format=order)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._meet(leaf, made_here=True)
        self._ran(func, args, result)
        return result

    def _ran(self, func: Any, args: Any, result: Any) -> None:
        """An operation is over, and what it was given and has made still lives."""

    def _meet(self, tensor: Tensor, made_here: bool) -> None:
        """Follow a tensor's memory, which others may share, to its end."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if made_here else 0
        self._known.add(key)
        weakref.finalize(storage, self._leave, key, size).atexit = False
        self._take(key, size)
        self.spike(0)

    def _take(self, key: int, size: int) -> None:
        self.live += size

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class ProcessBytes(LiveBytes):
    """What a process on the CPU takes meanwhile: with its kernels' copies, and what malloc keeps.

    Blocks that glibc's malloc leaves to mmap are given back at once. The others lie on a heap that
    stays as large as it ever was, and whose holes are seldom used again: PyTorch asks for 64-byte
    alignment, for which malloc seeks 96 bytes more than it then takes (until glibc 2.38), so that
    no block fits into the hole of one of its size; and what was left over, 96 bytes that wait in
    malloc's cache, keeps neighbouring holes apart.

    Args:
        holes: what they add to the most that was ever in use of the heap, as a share of it. None is
            a malloc that keeps nothing.
    """

    def __init__(self, holes: float | None) -> None:
        super().__init__()
        self.holes = holes
        self._threshold = MMAP_THRESHOLD
        self._heap = self._heap_peak = 0
        self._on_heap: set[int] = set()

    def spike(self, num_bytes: int) -> None:
        if self.holes is not None:
            num_bytes += int((1 + self.holes) * self._heap_peak) - self._heap
        super().spike(num_bytes)

    def _ran(self, func: Any, args: Any, result: Any) -> None:
        self.spike(copied_bytes(func, args, result))

    def _take(self, key: int, size: int) -> None:
        super()._take(key, size)
        if size < self._threshold:
            self._on_heap.add(key)
            self._heap += size
            self._heap_peak = max(self._heap_peak, self._heap)

    def _leave(self, key: int, size: int) -> None:
        super()._leave(key, size)
        if key in self._on_heap:
            self._on_heap.remove(key)
            self._heap -= size
        elif size < LARGEST_MMAP_THRESHOLD:
            self._threshold = max(self._threshold, size + 1)


def copied_bytes(func: Any, args: Any, result: Any) -> int:
    """What an operation on the CPU copies of its operands, for as long as it runs.

    oneDNN wants the weights of a convolution in an order of its own, at every call: once more if
    channels are innermost in the input, else the input too. And where a GPU's kernel converts what
    it reads, one on the CPU has operands of another dtype than the result's converted as a whole.
    """
    operands = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    if func in CONVOLUTIONS:
        x, weight = operands[:2]
        planes = suggest_memory_format(x) == torch.contiguous_format
        return weight.nbytes + (x if planes else weight).nbytes
    converts = torch.Tag.pointwise in func.tags or func is torch.ops.aten.linalg_vector_norm.default
    if not (converts and isinstance(result, Tensor) and result.is_floating_point()):
        return 0
    return sum(
        x.numel() * result.itemsize
        for x in operands
        if x.dtype != result.dtype and x.is_floating_point()
    )


class FusedAttention(TorchFunctionMode):
    """Attention as a fused kernel sees it: only its result is made, with tokens before heads.

    The meta device has no such kernel and would count all scores. Where channels are not innermost
    no device has one, and the scores are counted. A mask is copied if keys are not innermost.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args  # as all of `wan` calls it; its options are keywords
        if any(x.stride(-1) != 1 for x in (q, k, v)):
            return func(*args, **(kwargs or {}))
        mask = (kwargs or {}).get("attn_mask")
        mask = mask if mask is None else mask.contiguous()
        batch, heads, tokens, _ = q.shape
        return q.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)


@torch.no_grad()
def peak_bytes(compute: Callable[[], Any], memory: LiveBytes | None = None) -> int:
    """The most bytes of tensors at any time in a computation, its result included.

    Args:
        memory: what counts, or None for the tensors alone.
    """
    with LiveBytes() if memory is None else memory as memory:
        result = compute()
    del result
    return memory.peak


def free_bytes(device: torch.device) -> int:
    """What a device has left, by its driver; for a CPU what the system and a container can give."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        rows = dict(line.split(":") for line in MEMINFO.read_text("ascii").splitlines())
        return min([int(rows["MemAvailable"].split()[0]) * 1024, *left_in_cgroups()])
    except FileNotFoundError:  # not Linux: what there is at all
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def left_in_cgroups() -> list[int]:
    """What each limited control group around this process leaves, file cache counted as free."""
    left = []
    for line in OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            root, names = CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif controllers == "memory":
            root = CGROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = PurePosixPath(path)
        for group in (own, *own.parents):
            folder = root / group.relative_to("/")
            try:
                limit, used = ((folder / name).read_text().strip() for name in names[:2])
                stat = (folder / "memory.stat").read_text()
            except OSError:  # the root group has no limit; a container does not see its parents
                continue
            if limit != "max":
                rows = dict(row.split() for row in stat.splitlines())
                left.append(max(0, int(limit) - int(used) + int(rows.get(names[2], 0))))
    return left
