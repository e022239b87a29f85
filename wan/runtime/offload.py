"""CPU offload: weights stay on the device, or are copied there for one stage or block only.

With offload "block" the device holds two blocks of a network at most: one computes while the next
is copied. Networks mark the work of a block by `with self.block_at_work(block):`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from wan.errors import WanError

OFFLOAD = ("none", "stage", "block")
Home = tuple[dict[str, Any], str, Tensor]  # a module's dict, the name in it, the tensor


def resolve_device(name: str | torch.device, mps: bool = True) -> torch.device:
    """The device of that name; "auto" is a CUDA device if there is one, else MPS, else the CPU.

    Args:
        mps: whether "auto" may be MPS, the GPU of a Mac.

    Raises:
        WanError: no such device, or this build of PyTorch cannot use it.
    """
    if name == "auto":
        on_mac = mps and torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if on_mac else "cpu"
    try:
        device = torch.device(name)
        known = device.type == "cuda" or (device.type in ("cpu", "mps") and not device.index)
    except RuntimeError:
        known = False
    if not known:
        raise WanError(f"device={name}: choose auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise WanError(f"device={name}: no CUDA device is visible here; use cpu")
        if (device.index or 0) >= count:
            raise WanError(f"device={name}: there are {count}, numbered from 0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise WanError(f"device={name}: not available here; use cpu")
    return device


def homes_of(module: nn.Module, without: nn.Module | None = None) -> list[Home]:
    """Every tensor of a module with the dict that holds it, except those of a part."""
    left_out = set(() if without is None else without.modules())
    return [
        (table, name, tensor)
        for owner in module.modules()
        if owner not in left_out
        for table in (owner._parameters, owner._buffers)
        for name, tensor in table.items()
        if tensor is not None
    ]


def put(home: Home, copy: Tensor) -> None:
    """Put a copy in a tensor's place."""
    table, name, tensor = home
    is_parameter = isinstance(tensor, nn.Parameter)
    table[name] = nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy


@contextmanager
def visiting(
    module: nn.Module, device: torch.device, without: nn.Module | None = None
) -> Iterator[None]:
    """Replace the module's tensors by copies on a device while the context lasts.

    At the end the originals are put back. Nothing is copied back: changes made on the device are
    lost, and weights that are views of a mapped file stay views.

    Args:
        without: a part of the module that stays where it is.
    """
    homes = homes_of(module, without)
    try:
        for home in homes:
            put(home, home[2].detach().to(device))
        yield
    finally:
        for table, name, tensor in homes:
            table[name] = tensor


class BlockStream:
    """Two slots on a device for the blocks of a network, used as `with stream(block):`.

    The first block is copied before it computes. From then on, while a block computes, the next one
    (after the last, the first) is copied from pinned memory on a separate CUDA stream. Only the
    slots are allocated, however far the CPU runs ahead of the GPU.

    Args:
        blocks: the blocks, of equal sizes and dtypes, in the order in which they run.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device) -> None:
        self.device = device
        self._order = {block: i for i, block in enumerate(blocks)}
        self._homes = [homes_of(block) for block in blocks]
        self._slots = [
            [torch.empty_like(tensor, device=device) for _, _, tensor in self._homes[0]]
            for _ in range(min(2, len(blocks)))
        ]
        self._holds: list[int | None] = [None] * len(self._slots)  # block in each slot
        is_cuda = device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if is_cuda else None
        if self._copies is not None:  # queued kernels may still use the slots' memory
            self._copies.wait_stream(torch.cuda.current_stream(device))
        self._arrived: list[Any] = [None] * len(self._slots)  # events on the copies' stream
        self._left: list[Any] = [None] * len(self._slots)  # events on the stream that computes

    @contextmanager
    def __call__(self, block: nn.Module) -> Iterator[None]:
        index = self._order[block]
        if index not in self._holds:
            self._fetch(index, 0)
        slot = self._holds.index(index)
        following = (index + 1) % len(self._homes)
        if following not in self._holds:
            self._fetch(following, 1 - slot)
        if self._copies is not None:
            torch.cuda.current_stream(self.device).wait_event(self._arrived[slot])
        try:
            for home, copy in zip(self._homes[index], self._slots[slot], strict=True):
                put(home, copy)
            yield
        finally:
            for table, name, tensor in self._homes[index]:
                table[name] = tensor
            if self._copies is not None:
                self._left[slot] = torch.cuda.current_stream(self.device).record_event()

    @torch.no_grad()
    def _fetch(self, index: int, slot: int) -> None:
        """Start to copy a block into a slot, once the slot's last user is done."""
        self._holds[slot] = index
        pairs = zip(self._slots[slot], self._homes[index], strict=True)
        if self._copies is None:
            for copy, (_, _, tensor) in pairs:
                copy.copy_(tensor)
            return
        if self._left[slot] is not None:
            self._copies.wait_event(self._left[slot])
        with torch.cuda.stream(self._copies):
            for copy, (_, _, tensor) in pairs:
                copy.copy_(tensor, non_blocking=True)
        self._arrived[slot] = self._copies.record_event()


@contextmanager
def streaming(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Like `visiting`, but the blocks of the module are copied one by one."""
    network: Any = module
    with visiting(module, device, without=network.blocks):
        network.block_at_work = BlockStream(network.blocks, device)
        try:
            yield
        finally:
            network.block_at_work = nullcontext
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # before the slots' memory is used again


def has_blocks(module: nn.Module) -> bool:
    return isinstance(getattr(module, "blocks", None), nn.ModuleList)


@contextmanager
def at_work(module: nn.Module, device: torch.device, offload: str) -> Iterator[None]:
    """A context in which a module can compute on a device, under any kind of offload.

    Raises:
        WanError: before or after, a file that is mapped as the module's weights was overwritten.
    """
    check_mapped_files(module)
    if offload == "none":
        yield
    else:
        by_block = offload == "block" and has_blocks(module)
        with streaming(module, device) if by_block else visiting(module, device):
            yield
    check_mapped_files(module)


def check_mapped_files(module: nn.Module) -> None:
    """Refuse weights that changed in memory with their file; see `wan.weights.safetensors_file`."""
    files: Any = getattr(module, "mapped_files", None)  # networks of other libraries have none
    if files is not None:
        files.check(module.state_dict)


def pin(module: nn.Module) -> None:
    """Keep a module's tensors in pinned memory, from which a GPU copies while it computes."""
    for home in homes_of(module):
        put(home, home[2].detach().pin_memory())


class ExpertSlot:
    """Holds one network on the device at a time: `bring` replaces the one before."""

    def __init__(self, device: torch.device, offload: str) -> None:
        self.device = device
        self.offload = offload
        self._visit = ExitStack()

    def bring(self, network: Any) -> None:
        self._visit.close()
        self._visit.enter_context(at_work(network, self.device, self.offload))

    def close(self) -> None:
        """End the stay of the last network."""
        self._visit.close()
