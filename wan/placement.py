"""Where a module is while it works: permanently on the device, or only for its stage."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wan.errors import WanError

OFFLOAD = ("none", "stage")


def resolve_device(name: str | torch.device) -> torch.device:
    """A device that exists here.

    Raises:
        WanError: no such device, or this build of PyTorch cannot use it.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise WanError(f"device={name}: choose cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise WanError(f"device={name}: no CUDA device is visible here; use cpu")
        if (device.index or 0) >= count:
            raise WanError(f"device={name}: there are {count}, numbered from 0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise WanError(f"device={name}: not available here; use cpu")
    return device


@contextmanager
def visiting(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Copies of the module's tensors on a device, in their place for a while.

    At the end the originals are back, so nothing is copied home, and weights that are views of a
    mapped file stay so. What was changed on the device meanwhile is lost.
    """
    homes: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for owner in module.modules():
            tables: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
            for table in tables:
                for name, tensor in table.items():
                    if tensor is None:
                        continue
                    homes.append((table, name, tensor))
                    copy = tensor.detach().to(device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    table[name] = nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy
        yield
    finally:
        for table, name, tensor in homes:
            table[name] = tensor


class ExpertSlot:
    """Room on the device for one network at a time: `bring` one, and the one before leaves."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._visit = ExitStack()

    def bring(self, network: nn.Module) -> None:
        self._visit.close()
        self._visit.enter_context(visiting(network, self.device))

    def close(self) -> None:
        """Send the last one home."""
        self._visit.close()
