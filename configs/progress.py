"""What a command is doing, while it takes long.

On a terminal, what takes seconds is named at once and erased when it is done, and a loop has a bar.
Elsewhere, in files and pipes, nothing is printed that is over in ten seconds; what goes on longer
has a line every ten seconds.
"""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from tqdm import tqdm

SECONDS = 10.0  # between two lines that are not on a terminal
ERASE = "\r\x1b[K"


@contextmanager
def doing(what: str, quiet: bool = False) -> Iterator[None]:
    """Say what takes seconds, such as "loading PyTorch", while it lasts.

    Args:
        quiet: say nothing; for all processes of a run but one.
    """
    if quiet:
        yield
        return
    if sys.stderr.isatty():
        print(what, end="\r", file=sys.stderr, flush=True)
        try:
            yield
        finally:
            print(end=ERASE, file=sys.stderr, flush=True)
        return
    over = threading.Event()
    started = time.monotonic()

    def tell() -> None:
        while not over.wait(SECONDS):
            print(f"{what}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def loading_pytorch() -> Iterator[None]:
    """Surrounds the imports of what works, in the `main` of a command.

    They stand there because PyTorch takes seconds to load: `--help` and a mistyped option, which
    are answered before, need not wait for it. It is said on a terminal only.
    """
    if "torch" in sys.modules or not sys.stderr.isatty():
        yield
        return
    with doing("loading PyTorch"):
        yield


class Steps:
    """How far a loop is: a bar on a terminal, elsewhere a line every ten seconds.

    Args:
        what: plural noun of what is counted, as "steps".
        total: how many there are in all.
        done: how many of them were done before.
        quiet: print nothing; for all processes of a run but one.
    """

    def __init__(self, what: str, total: int, done: int = 0, quiet: bool = False) -> None:
        self.what, self.total, self.done, self.quiet = what, total, done, quiet
        self._bar = None
        if sys.stderr.isatty() and not quiet:
            self._bar = tqdm(total=total, initial=done, desc=what, unit=" " + what, leave=False)
        self._started = self._told = time.monotonic()
        self._first = done

    def __enter__(self) -> "Steps":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, count: int = 1) -> None:
        """Count what was done since the last call."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if self.quiet or now - self._told < SECONDS or self.done >= self.total:
            return
        self._told = now
        left = (now - self._started) / (self.done - self._first) * (self.total - self.done)
        line = f"{self.done} of {self.total} {self.what}, {duration(left)} left"
        print(line, file=sys.stderr, flush=True)

    def print(self, text: str) -> None:
        """Print a line on stdout, above the bar."""
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)
        if self._bar is not None:
            self._bar.refresh()
        self._told = time.monotonic()  # a line that tells how far the loop is


def duration(seconds: float) -> str:
    """A time to read: 12 s, 3 min, 2 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
