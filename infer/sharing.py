"""How the processes of one command share its videos: each made by all, or each by one.

Nothing here but `join` needs PyTorch.
"""

import atexit
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TextIO

from configs.schema import SampleConfig, SharingConfig
from infer.processes import Processes, Team
from wan.errors import WanError

PATIENCE = timedelta(minutes=30)  # of a process for another one's part of a step
GRACE = 5  # seconds in which torchrun ends the processes after the first error


@dataclass(frozen=True)
class Sharing:
    """What the processes of a command do.

    Attributes:
        team: the processes.
        together: all make each video together; if not, each makes videos of its own.
        config: what was asked for.
    """

    team: Team = field(default_factory=Team)
    together: bool = False
    config: SharingConfig = field(default_factory=SharingConfig)

    @property
    def size(self) -> int:
        """How many processes make one video."""
        return self.team.size if self.together else 1

    @property
    def on_this_machine(self) -> int:
        """How many processes share the memory of this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.team.size))

    @property
    def helps(self) -> bool:
        """Whether this process helps to make videos that the main one writes."""
        return self.together and not self.team.is_main

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the transformers' weights."""
        return self.together and self.config.weights == "sharded"

    def halved(self, guided: bool) -> bool:
        """Whether two halves of the processes compute guidance's two forwards."""
        return guided and self.config.guidance and self.size % 2 == 0

    def __str__(self) -> str:
        rule = "one video" if self.together else "several videos"
        why = f"auto, {rule}" if self.config.mode == "auto" else self.config.mode
        does = "each makes videos of its own"
        if self.together:
            does = f"all make each video together, weights {self.config.weights}"
        return f"{self.team.size} processes: {does} (parallel.mode={why})"


def makes_together(
    config: SampleConfig, sources: Mapping[str, str], num_videos: int, processes: Processes
) -> bool:
    """Whether all processes make each video together.

    Warns of what has no effect: options for several processes in one, or those for videos that are
    made together where each process makes its own.
    """
    given = {
        name: getattr(config.parallel, name)
        for name in ("mode", "weights", "guidance")
        if sources[f"parallel.{name}"] != "default"
    }
    mode = config.parallel.mode
    together = processes.size > 1 and (mode == "video" or (mode == "auto" and num_videos == 1))
    unused = given if processes.size == 1 else {} if together else {**given, "mode": None}
    for name, value in unused.items():
        if value is None:
            continue
        why = "this is one process: start more with torchrun --nproc-per-node N -m infer.sample"
        if processes.size > 1:
            why = "each process makes videos of its own; parallel.mode=video makes each by all"
        text = str(value).lower() if isinstance(value, bool) else value
        warnings.warn(f"parallel.{name}={text} has no effect: {why}", stacklevel=2)
    return together


def join(device_type: str) -> None:
    """Begin `torch.distributed`, once in a command, for videos that all processes make together.

    Raises:
        WanError: it cannot serve that device.
    """
    import torch.distributed as dist

    backends = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
    if device_type not in backends:
        raise WanError(f"device={device_type}: many processes compute on cpu or cuda")
    if not dist.is_initialized():
        dist.init_process_group(backends[device_type], timeout=PATIENCE)
        atexit.register(leave)


def leave() -> None:
    """End `torch.distributed` in order."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def printing(sharing: Sharing, stdout: TextIO, stderr: TextIO) -> Iterator[None]:
    """Let each process print what it alone has to say.

    Where all make each video together, the main one prints as if it were alone, and the others
    nothing. Where each makes videos of its own, each names them on stdout.
    """
    if sharing.team.size == 1:
        yield
        return
    if not sharing.together:
        with redirect_stdout(stdout):
            yield
        return
    with open(os.devnull, "w") as nowhere:
        streams = (nowhere, nowhere) if sharing.helps else (stdout, stderr)
        with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
            yield


@contextmanager
def told_once(team: Team) -> Iterator[None]:
    """Let the main process tell the errors that all find: it ends, and torchrun ends the others.

    An error of another process alone comes a few seconds later.
    """
    try:
        yield
    except (WanError, OSError):
        if not team.is_main:
            time.sleep(GRACE)
        raise
