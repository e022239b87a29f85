"""What a command is doing while it takes long, how far it is, and how long that still takes.

On a terminal, the last line says it at once and is kept up to date; what is printed meanwhile
appears above it, and nothing of it stays. Elsewhere, in files and pipes, nothing is printed that is
over in ten seconds; what goes on longer has a line every ten seconds. `progress=false` turns it
off, in every command.
"""

import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, TextIO

SECONDS = 10.0  # between two lines that are not on a terminal
REDRAWN = 0.5  # seconds between two looks at the line of a terminal
ERASE = "\r\x1b[K"
BAR = 20  # characters
PARTED = " | "  # what goes on inside of something else stands behind it


class Activity:
    """One thing that goes on: what it is, and since when.

    Args:
        what: such as "loading PyTorch".
    """

    def __init__(self, what: str) -> None:
        self.what, self.started = what, time.monotonic()

    def text(self, now: float) -> str:
        """What is said of it."""
        seconds = now - self.started
        return self.what if seconds < 2 else f"{self.what}: {duration(seconds)}"

    def drawn(self, now: float) -> str:
        """The same on a terminal, if nothing goes on inside of it."""
        return self.text(now)


class StatusLine:
    """Where everything that goes on in this process is told; the innermost comes last.

    There is one for a process, as there is one terminal: see `STATUS`.
    """

    def __init__(self) -> None:
        self.wanted = True
        self._activities: list[Activity] = []
        self._lock = threading.RLock()
        self._told = 0.0
        self._drawn = ""  # what the terminal shows
        self._mid_line = False  # whether somebody has begun a line of the terminal

    def begin(self, activity: Activity) -> None:
        """Tell of an activity until its `end`; at once on a terminal."""
        with self._lock:
            self._activities.append(activity)
            if len(self._activities) == 1:
                self._told = time.monotonic()
                over = threading.Event()
                self._over = over
                threading.Thread(target=self._watch, args=(over,), daemon=True).start()
            self.draw()

    def end(self, activity: Activity) -> None:
        """Tell of it no longer."""
        with self._lock:
            if activity in self._activities:
                self._activities.remove(activity)
            if self._activities:
                self.draw()
            else:
                self._over.set()
                self.erase()

    def told(self) -> None:
        """Somebody has just said how far everything is: the next line has time."""
        self._told = time.monotonic()

    @contextmanager
    def above(self, ends: bool = True) -> Iterator[None]:
        """Surrounds what is printed to the terminal, which then stands above the line.

        Args:
            ends: whether the text ends its line.
        """
        with self._lock:
            self.erase()
            yield
            self._mid_line = not ends
            self.draw()

    def draw(self) -> None:
        """Bring the line of a terminal up to date."""
        with self._lock:
            if self._shown and on_terminal() and not self._mid_line:
                now = time.monotonic()
                *outer, last = self._activities
                parts = [*(activity.text(now) for activity in outer), last.drawn(now)]
                text = fitting(parts, shutil.get_terminal_size().columns - 1)
                if text != self._drawn:
                    print(end=f"\r{text}\x1b[K\r", file=terminal(), flush=True)
                    self._drawn = text

    def erase(self) -> None:
        if self._drawn:
            self._drawn = ""
            print(end=ERASE, file=terminal(), flush=True)

    def tell(self) -> None:
        """Print a line where there is no terminal, if the last one is ten seconds old."""
        with self._lock:
            now = time.monotonic()
            if self._shown and not on_terminal() and now - self._told >= SECONDS:
                self._told = now
                text = PARTED.join(activity.text(now) for activity in self._activities)
                print(text, file=sys.stderr, flush=True)

    @property
    def _shown(self) -> bool:
        return self.wanted and bool(self._activities)

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(min(REDRAWN, SECONDS)):
            with self._lock:
                if not over.is_set():
                    self.draw()
                    self.tell()


STATUS = StatusLine()


def fitting(parts: Sequence[str], width: int) -> str:
    """As many parts as fit into a line, the last ones first; they say most."""
    while len(parts) > 1 and len(PARTED.join(parts)) > width:
        parts = parts[1:]
    return PARTED.join(parts)[:width]


class AboveLine:
    """A stream of the terminal whose text appears above the status line."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with STATUS.above(text.endswith("\n")):
            written = self.stream.write(text)
            self.stream.flush()
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def terminal() -> TextIO:
    """The stream that the status line itself is written to."""
    return sys.stderr.stream if isinstance(sys.stderr, AboveLine) else sys.stderr


def on_terminal() -> bool:
    """Whether a line can be drawn, and drawn again."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def progress_shown(wanted: bool) -> Iterator[None]:
    """Surrounds what may tell how far it is, such as a command: on a terminal in a line of its own.

    Args:
        wanted: False silences what is inside, and what is surrounded inside of it.
    """
    before, STATUS.wanted = STATUS.wanted, STATUS.wanted and wanted
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr") if on_terminal()}
    streams = {
        name: stream
        for name, stream in streams.items()
        if stream.isatty() and not isinstance(stream, AboveLine)
    }
    above = {name: AboveLine(stream) for name, stream in streams.items()}
    for name, stream in above.items():
        setattr(sys, name, stream)
    try:
        yield
    finally:
        STATUS.wanted = before
        for name, stream in above.items():
            if getattr(sys, name) is stream:  # several processes have replaced it by another
                setattr(sys, name, streams[name])


@contextmanager
def doing(what: str, quiet: bool = False) -> Iterator[None]:
    """Say what takes seconds, such as "loading PyTorch", while it lasts.

    Args:
        quiet: say nothing; for all processes of a run but one.
    """
    if quiet:
        yield
        return
    activity = Activity(what)
    STATUS.begin(activity)
    try:
        yield
    finally:
        STATUS.end(activity)


def reading_settings() -> AbstractContextManager[None]:
    """Surrounds the reading of a command's settings, which is said on a terminal only."""
    return doing("reading the settings", quiet=not on_terminal())


@contextmanager
def loading_pytorch() -> Iterator[None]:
    """Surrounds the imports of what works, in the `main` of a command.

    They stand there because PyTorch takes seconds to load: `--help` and a mistyped option, which
    are answered before, need not wait for it. It is said on a terminal only.
    """
    with doing("loading PyTorch", quiet="torch" in sys.modules or not on_terminal()):
        yield


class Steps(Activity):
    """How far a loop is, and how long the rest of it takes: told from here until `close`.

    Args:
        what: plural noun of what is counted, as "steps".
        total: how many there are in all.
        done: how many of them were done before.
        quiet: say nothing; for all processes of a run but one.
        unit: numbers are told in this many, as 10**6 for bytes that are told in MB.
    """

    def __init__(
        self, what: str, total: int, done: int = 0, quiet: bool = False, unit: int = 1
    ) -> None:
        super().__init__(what)
        self.total, self.done, self.quiet, self.unit = total, done, quiet, unit
        self._first, self._last = done, self.started
        if not quiet:
            STATUS.begin(self)

    def __enter__(self) -> "Steps":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Tell of it no longer."""
        if not self.quiet:
            STATUS.end(self)

    def add(self, count: int = 1) -> None:
        """Count what was done since the last call."""
        self.done += count
        self._last = time.monotonic()
        if not self.quiet:
            STATUS.draw()

    def left(self, now: float | None = None) -> str:
        """How long the rest takes if it goes on as it went; empty as long as nothing is done.

        Args:
            now: a time of `time.monotonic`; None asks it.
        """
        if self.done <= self._first:
            return ""
        return f"{duration(max(0.0, self._rest(time.monotonic() if now is None else now)))} left"

    def _rest(self, now: float) -> float:
        """Seconds that are left; negative where the last of them take longer than the others."""
        each = (self._last - self.started) / (self.done - self._first)
        return each * (self.total - self.done) - (now - self._last)

    def text(self, now: float) -> str:
        text = f"{self.done // self.unit} of {self.total // self.unit} {self.what}"
        if self.done >= self.total:
            return text
        if left := self.left(now):
            late = self._rest(now) < -2
            return (
                f"{text}, {duration(now - self._last)} since the last"
                if late
                else f"{text}, {left}"
            )
        seconds = now - self.started
        return text if seconds < 2 else f"{text}, {duration(seconds)}"

    def drawn(self, now: float) -> str:
        full = round(BAR * self.done / max(1, self.total))
        return f"[{'#' * full}{'-' * (BAR - full)}] {self.text(now)}"

    def print(self, text: str) -> None:
        """Print a line on stdout that tells how far the loop is, too."""
        with STATUS.above():
            print(text, flush=True)
        STATUS.told()


def duration(seconds: float) -> str:
    """A time to read: 12 s, 3 min, 2 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
