"""Where a module is while it works: permanently on the device, or only for its stage."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

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
    """The module's tensors on a device for a while.

    At the end they are the tensors they were before, so nothing is copied back, and weights that
    are views of a mapped file stay so. What was changed on the device meanwhile is lost.
    """
    tensors = [*module.parameters(), *module.buffers()]
    homes = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = home


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
