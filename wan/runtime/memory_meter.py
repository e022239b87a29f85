"""Count the memory that a computation needs beside its inputs, while it runs.

    peak_bytes(lambda: dit(latents, timestep, context))

On the meta device tensors have sizes but no content, so the memory of a network at any size is
counted within a moment. `LiveBytes` counts the tensors that PyTorch's operations return, as long as
they live. It counts neither the memory that libraries keep for themselves nor the workspaces of a
GPU's convolutions and matrix products.
"""

import ctypes
import re
import subprocess
import sys
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

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# Linux lists here the free memory, this process's control groups, and the limits of these.
MEMINFO, OWN_CGROUPS, CGROUPS = map(Path, ("/proc/meminfo", "/proc/self/cgroup", "/sys/fs/cgroup"))
CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.mkldnn_convolution.default)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside this context and are still alive.

    Attributes:
        live: bytes at this moment.
        peak: the largest number of bytes so far.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """With True, PyTorch would import its compiler here, which takes over a second."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def spike(self, num_bytes: int) -> None:
        """Count memory that is allocated and freed again between two operations."""
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
        return result

    def _meet(self, tensor: Tensor, made_here: bool) -> None:
        """Count a tensor's storage once, however many tensors share it, until it is freed."""
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
    """Counts attention as a fused kernel: it allocates only its result, tokens before heads.

    The meta device has no such kernel and would allocate all scores. No device has one for channels
    that are not innermost; there the scores are counted. A mask is copied if its keys are not
    innermost.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args  # all calls in `wan` pass the options as keywords
        if any(x.stride(-1) != 1 for x in (q, k, v)):
            return func(*args, **(kwargs or {}))
        mask = (kwargs or {}).get("attn_mask")
        mask = mask if mask is None else mask.contiguous()
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
    """Free bytes of a device; for a CPU, what the system and its container can still allocate.

    On macOS these are the free pages and those that hold nothing that is not on the disk too.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if resource is None:
        return int(asked_of_windows("GlobalMemoryStatusEx", SystemMemory()).available_physical)
    if sys.platform == "darwin":
        done = subprocess.run(["/usr/bin/vm_stat"], capture_output=True, text=True, check=True)
        return available_on_macos(done.stdout)
    rows = dict(line.split(":") for line in MEMINFO.read_text("ascii").splitlines())
    return min([int(rows["MemAvailable"].split()[0]) * 1024, *left_in_cgroups()])


def peak_memory(device: torch.device) -> dict[str, int]:
    """Most bytes that this process has held so far: "process", and "cuda" on a GPU."""
    if resource is None:
        own = asked_of_windows("K32GetProcessMemoryInfo", ProcessMemory(), of_process=True)
        peak = {"process": int(own.peak_working_set)}
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes, Linux in KiB
        peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["cuda"] = torch.cuda.max_memory_allocated(device)
    return peak


class SystemMemory(ctypes.Structure):
    """Windows' MEMORYSTATUSEX."""

    _fields_ = (
        *(("size", ctypes.c_uint32), ("load", ctypes.c_uint32)),
        *(("total_physical", ctypes.c_uint64), ("available_physical", ctypes.c_uint64)),
        ("others", ctypes.c_uint64 * 5),
    )


class ProcessMemory(ctypes.Structure):
    """Windows' PROCESS_MEMORY_COUNTERS."""

    _fields_ = (
        *(("size", ctypes.c_uint32), ("page_faults", ctypes.c_uint32)),
        *(("peak_working_set", ctypes.c_size_t), ("working_set", ctypes.c_size_t)),
        ("others", ctypes.c_size_t * 6),
    )


def asked_of_windows(question: str, answer: Any, of_process: bool = False) -> Any:
    """A structure that a function of kernel32 fills.

    Args:
        answer: its first field is its size.
        of_process: the function takes this process before the structure, and its size after it.
    Raises:
        OSError: the function failed.
    """
    kernel: Any = ctypes.windll.kernel32  # type: ignore[attr-defined]
    answer.size = ctypes.sizeof(answer)
    arguments: list[Any] = [ctypes.byref(answer)]
    if of_process:
        kernel.GetCurrentProcess.restype = ctypes.c_void_p
        process = ctypes.c_void_p(kernel.GetCurrentProcess())
        arguments = [process, *arguments, ctypes.c_uint32(answer.size)]
    if not getattr(kernel, question)(*arguments):
        raise OSError(f"Windows does not answer {question}")
    return answer


def available_on_macos(vm_stat: str) -> int:
    """Bytes that macOS can hand out, from what `vm_stat` prints."""
    page = int(re.findall(r"page size of (\d+) bytes", vm_stat)[0])
    counts = dict(re.findall(r"Pages (\w+): +(\d+)\.", vm_stat))
    return page * sum(int(counts[name]) for name in ("free", "inactive", "speculative"))


def left_in_cgroups() -> list[int]:
    """Bytes that each limited control group leaves; its inactive file cache counts as free."""
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
