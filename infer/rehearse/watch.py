"""What a process takes while it runs, looked up from outside; on Linux."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

SECONDS = 0.02  # between two looks
PROC = Path("/proc")


@dataclass(frozen=True)
class Look:
    """A process at one moment, in bytes.

    Attributes:
        at: Unix time.
        held: resident memory that only the process has: it can't be dropped, only swapped out.
        mapped: resident pages of files, which the system drops when it needs room.
        read: bytes that the disk has delivered to the process so far.
    """

    at: float
    held: int
    mapped: int
    read: int


def look_at(pid: int) -> Look | None:
    """A process now; None if it is gone or this is not Linux."""
    try:
        status = (PROC / str(pid) / "status").read_text(encoding="ascii", errors="replace")
        disk = (PROC / str(pid) / "io").read_text(encoding="ascii")
    except OSError:
        return None
    sizes = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    if "RssAnon" not in sizes:
        return None
    held, mapped = (int(sizes[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))
    counts = dict(line.split(":", 1) for line in disk.splitlines())
    return Look(time.time(), held, mapped, int(counts["read_bytes"]))


@dataclass(frozen=True)
class StageUse:
    """What a stage took.

    Attributes:
        seconds: how long it was.
        held, mapped: most bytes at a time, see `Look`; `held` beyond what the process had before
            its first stage. None where no one could look.
        read: bytes from the disk.
    """

    seconds: float
    held: int | None = None
    mapped: int | None = None
    read: int | None = None


class Watch:
    """Looks at a process again and again, in a thread, while the context lasts."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.looks: list[Look] = []

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(SECONDS):
            look = look_at(self._pid)
            if look is not None:
                self.looks.append(look)

    def stages(
        self, begun: Mapping[str, float], seconds: Mapping[str, float]
    ) -> dict[str, StageUse]:
        """What each stage took, by the times at which they began and their lengths."""
        found = {}
        before = [look for look in self.looks if look.at < min(begun.values())]
        resting = before[-1].held if before else 0
        for name, start in begun.items():
            end = start + seconds[name]
            within = [look for look in self.looks if start <= look.at <= end + SECONDS]
            if not within:
                found[name] = StageUse(seconds[name])
                continue
            earlier = [look for look in self.looks if look.at < start]
            found[name] = StageUse(
                seconds[name],
                max(look.held for look in within) - resting,
                max(look.mapped for look in within),
                within[-1].read - (earlier[-1].read if earlier else 0),
            )
        return found
