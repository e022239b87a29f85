"""The processes that torchrun started for a command: which one this is, and what is its share.

    with Processes.started().together() as team:
        names = team.first(list_missing)         # made by the main process, the same in all
        for name in names:
            if team.claim(name):                 # true in one process alone
                make(name)
        failed = team.everyone(own_failures)     # waits for all; only then a report is written

No process group is needed: they meet in the store by which torchrun's processes find each other.
"""

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, TextIO, TypeVar

from wan.errors import WanError

T = TypeVar("T")
PAUSE = 0.05  # seconds between two looks at what another process has done


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
        Raises:
            WanError: it names one GPU for all processes, or there are fewer GPUs than processes.
        """
        if self.size == 1:
            return name
        import torch

        from wan.runtime.offload import resolve_device

        device = resolve_device(name, mps=False)  # several processes share no GPU of a Mac
        if device.type != "cuda":
            return str(device)
        count = torch.cuda.device_count()
        if device.index is not None:
            raise WanError(f"device={name}: of several processes each takes a GPU; device=cuda")
        if self.local_rank >= count:
            raise WanError(
                f"device={name}: process {self.local_rank} of this machine has no GPU, there are "
                f"{count}; start as many processes with torchrun --nproc-per-node {count}"
            )
        return f"cuda:{self.local_rank}"

    @contextmanager
    def together(self, device: str = "cpu") -> Iterator["Team"]:
        """Meet the other processes, to share jobs with them.

        Of several processes the main one alone has a stdout; on stderr, lines begin with the
        process's number. An error that leaves the block ends the others too, where they wait.

        Args:
            device: what they compute on, as a person typed it.
        Raises:
            WanError: see `device`; or, from a call of the team, another process ended early.
        """
        if self.size == 1:
            yield Team()
            return
        if not isinstance(sys.stderr, LabelledLines):
            sys.stderr = LabelledLines(sys.stderr, f"[{self.rank}] ")
        own = self.device(device)
        if own.startswith("cuda"):
            import torch

            torch.cuda.set_device(own)
        with (
            open(os.devnull, "w") as nowhere,
            redirect_stdout(sys.stdout if self.is_main else nowhere),
        ):
            team = SharedTeam(self)
            try:
                yield team
            except BaseException as error:
                team.leave(str(error) or type(error).__name__)
                raise
            team.part()


ALONE = Processes()


class LabelledLines(io.TextIOBase):
    """A text stream whose lines begin with a label; each is written as a whole.

    So lines of several processes on one terminal do not run into each other. It is no terminal:
    bars, which would, are not drawn.
    """

    def __init__(self, stream: TextIO, label: str) -> None:
        self._stream, self._label, self._rest = stream, label, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        if lines:
            self._stream.write("".join(f"{self._label}{line}\n" for line in lines))
            self._stream.flush()
        return len(text)

    def fileno(self) -> int:
        return self._stream.fileno()


class Team:
    """One process, alone: all jobs are its own, and nobody is waited for."""

    processes = ALONE

    def __init__(self) -> None:
        self._tallies: dict[str, int] = {}

    @property
    def size(self) -> int:
        return self.processes.size

    @property
    def is_main(self) -> bool:
        return self.processes.is_main

    def first(self, make: Callable[[], T]) -> T:
        """What the main process makes, of JSON's kinds; all others wait for it."""
        return make()

    def claim(self, job: str) -> bool:
        """Take a job by its name: true in the first process that asks, false in all others."""
        return True

    def tally(self, name: str, amount: int) -> int:
        """Add to a number that all processes share, and return it; none waits for another."""
        self._tallies[name] = self._tallies.get(name, 0) + amount
        return self._tallies[name]

    def everyone(self, value: T, waiting: Callable[[], None] = lambda: None) -> list[T]:
        """The value of every process, by rank, of JSON's kinds; all wait for all.

        Args:
            waiting: called again and again while another process is waited for.
        """
        return [value]


@cache
def common_store() -> Any:
    """The store of a whole run, which the first process or torchrun itself holds."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(iter(rendezvous("env://")))
    return store


class SharedTeam(Team):
    """Several processes that torchrun started. Made by `Processes.together`."""

    def __init__(self, processes: Processes) -> None:
        from torch.distributed import PrefixStore

        self.processes = processes
        store = common_store()
        # Of a sweep, each point is a meeting of its own; all come to them in the same order.
        meeting = store.add(f"meetings of process {processes.rank}", 1)
        self._store = PrefixStore(f"meeting {meeting}", store)
        self._round = 0

    def first(self, make: Callable[[], T]) -> T:
        self._round += 1
        key = f"round {self._round}"
        if self.is_main:
            self._set(key, value := make())
            return json.loads(json.dumps(value))  # lists for tuples, as the others have them
        return self._wait(key, 0, lambda: None)

    def claim(self, job: str) -> bool:
        return self.tally(f"job {job}", 1) == 1

    def tally(self, name: str, amount: int) -> int:
        with self._connected():
            return self._store.add(name, amount)

    def everyone(self, value: T, waiting: Callable[[], None] = lambda: None) -> list[T]:
        self._round += 1
        keys = [f"round {self._round}, process {rank}" for rank in range(self.size)]
        self._set(keys[self.processes.rank], value)
        return [self._wait(key, rank, waiting) for rank, key in enumerate(keys)]

    def part(self) -> None:
        """End the meeting in order; the main process, which may hold the store, goes last."""
        names = [f"process {rank} parted" for rank in range(self.size)]
        self._set(names[self.processes.rank], True)
        if self.is_main:
            for rank, name in enumerate(names):
                self._wait(name, rank, lambda: None)

    def leave(self, reason: str) -> None:
        """Tell the others that this process will not come to what they may wait for."""
        with suppress(WanError), self._connected():
            self._store.set(f"process {self.processes.rank} left", reason)

    def _set(self, key: str, value: Any) -> None:
        with self._connected():
            self._store.set(key, json.dumps(value))

    def _wait(self, key: str, rank: int, waiting: Callable[[], None]) -> Any:
        """What process `rank` has set, or will set, under the key."""
        left = f"process {rank} left"
        while True:
            with self._connected():
                if self._store.check([key]):
                    return json.loads(self._store.get(key))
                if self._store.check([left]):
                    raise WanError(f"process {rank}: {self._store.get(left).decode()}")
            waiting()
            time.sleep(PAUSE)  # a signal is answered in between, as it is not within a C++ call

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Say in one line that there is nobody left to share with."""
        try:
            yield
        except RuntimeError as error:  # torch.distributed's errors
            raise WanError(
                "the other processes cannot be reached any more; what is stored stays, start the "
                "same command again"
            ) from error
