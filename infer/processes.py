"""The processes that torchrun started for a command: which one this is, and what is its share."""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Processes:
    """This process among those of one command; started plainly, a command is alone.

    Attributes:
        rank: this process's number, from 0.
        size: how many there are.
        local_rank: its number on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def started(cls, environment: Mapping[str, str] = os.environ) -> "Processes":
        """The processes as torchrun's environment variables describe them."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if environment.get("WORLD_SIZE", "1") == "1":
            return cls()
        return cls(*(int(environment[name]) for name in names))

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints what belongs to all."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device of that name for this process: of several GPUs its own.

        Args:
            name: as a person typed it; "auto" and "cuda" mean this process's GPU.
        """
        return f"cuda:{self.local_rank}" if self.size > 1 and name == "cuda" else name
