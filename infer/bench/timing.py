"""Time and memory of functions that take turns, and a table of them.

Turns make the comparison fair on a machine whose speed changes while it is measured: what slows one
side slows the other. A line of the table shows medians, and as spread the middle half of all calls.
"""

import ctypes
import gc
import math
import operator
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from infer.parity.tolerance import aligned, distance

T = TypeVar("T")
CPU = torch.device("cpu")
PROC = Path("/proc/self")
SAME = 0.05  # relative rms up to which two sides did the same work, in bfloat16 too
CLOCKS = ("wall", "cpu")


@dataclass(frozen=True)
class Task:
    """What is timed, and what to aim for.

    Attributes:
        target, what: its name in the table.
        goal: times as fast as the last side that the first should be.
        goal_seconds: that the first side should take, at most.
        memory_goal: the first side's peak, at most: times the last side's, or times the weights if
            peaks include those.
        flops: of one call, or None.
        note: what a reader must know besides, such as the kernel that ran.
    """

    target: str
    what: str
    goal: float | None = None
    goal_seconds: float | None = None
    memory_goal: float | None = None
    flops: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Contest:
    """A task, done in several ways.

    Attributes:
        sides: name -> the call that is timed. The first is ours, and is compared with the last.
    """

    task: Task
    sides: Mapping[str, Callable[[], Any]]
    device: torch.device = CPU


@dataclass(frozen=True)
class Timing:
    """One side: seconds per call, on the wall and summed over all threads, and bytes at the peak.

    `first` is the first call's time on the wall, which includes compiling.
    """

    wall: list[float]
    cpu: list[float]
    peak_bytes: int | None
    first: float | None = None

    def median(self, clock: str) -> float:
        return statistics.median(getattr(self, clock))

    def spread(self, clock: str) -> float:
        """The interquartile range as a share of the median."""
        low, _, high = statistics.quantiles(getattr(self, clock), n=4, method="inclusive")
        return (high - low) / self.median(clock)


@dataclass(frozen=True)
class Outcome:
    """A finished contest.

    Attributes:
        difference: relative rms of the first and the last side's results, or None.
        weights_bytes: of the weights, if the peaks include them; None if peaks are on top of them.
        phases: side -> phase of its work -> seconds, if that was asked for.
    """

    task: Task
    sides: dict[str, Timing]
    difference: float | None = None
    weights_bytes: int | None = None
    phases: dict[str, dict[str, float]] = field(default_factory=dict)

    def ratio(self, clock: str) -> float | None:
        """How many times as fast the first side is as the last."""
        first, *others = (side.median(clock) for side in self.sides.values())
        return others[-1] / first if others else None

    def tflops_per_second(self, side: Timing, clock: str) -> float | None:
        """What a side achieves; None if the FLOPs are not counted."""
        flops = self.task.flops
        return None if flops is None else flops / side.median(clock) / 1e12

    def memory_ratio(self) -> float | None:
        """The first side's peak over the weights that it includes, else over the last side's."""
        peaks = [side.peak_bytes for side in self.sides.values()]
        limit = peaks[-1] if self.weights_bytes is None else self.weights_bytes
        return peaks[0] / limit if peaks[0] is not None and limit else None

    def aims(self, clock: str) -> dict[str, str | None]:
        """Each aim as the table shows it, and how it was missed, in words, or None."""
        task, seconds = self.task, next(iter(self.sides.values())).median(clock)
        whose = "the reference's" if self.weights_bytes is None else "the weights"
        memory = f"peak memory {{:.2f}}x {whose}, the aim is {{:g}}x"
        aims: dict[str, str | None] = {}
        for goal, aim, value, fails, text in (
            (task.goal, "{:g}x", self.ratio(clock), operator.lt, "{:.2f}x of {:g}x"),
            (task.goal_seconds, "{:g} s", seconds, operator.gt, "{:.3g} s, the aim is {:g} s"),
            (task.memory_goal, "memory {:g}x", self.memory_ratio(), operator.gt, memory),
        ):
            if goal is not None:
                missed = value is not None and fails(value, goal)
                aims[aim.format(goal)] = text.format(value, goal) if missed else None
        return aims

    def misses(self, clock: str) -> list[str]:
        """Every aim that was not reached, in words."""
        missed = [text for text in self.aims(clock).values() if text is not None]
        if self.difference is not None and not self.difference <= SAME:  # NaN is not
            missed.append(f"results differ by {self.difference:.0e} of their rms")
        return [f"{self.task.target}, {self.task.what}: {text}" for text in missed]

    def as_json(self) -> dict[str, Any]:
        sides = {
            name: asdict(side)
            | {f"{clock}_median": side.median(clock) for clock in CLOCKS}
            | {f"{clock}_spread": side.spread(clock) for clock in CLOCKS}
            | {"tflops_per_second": self.tflops_per_second(side, "wall")}
            for name, side in self.sides.items()
        }
        ratios = {f"{clock}_ratio": self.ratio(clock) for clock in CLOCKS}
        own = {name: value for name, value in vars(self).items() if name != "task"}
        if self.difference is not None and not math.isfinite(self.difference):
            own["difference"] = str(self.difference)  # JSON has no NaN
        ratios["memory_ratio"] = self.memory_ratio()
        return {**asdict(self.task), **own, "sides": sides, **ratios}


def take_turns(
    sides: Sequence[str], rounds: int, measure: Callable[[str], T]
) -> dict[str, list[T]]:
    """Measure every side once a round; the order is reversed after each."""
    taken: dict[str, list[T]] = {name: [] for name in sides}
    order = list(sides)
    for _ in range(rounds):
        for name in order:
            taken[name].append(measure(name))
        order.reverse()
    return taken


class TooSlowError(Exception):
    """One call takes longer than a contest may; says which and how long."""


def num_calls(contest: Contest, repeats: int, warmup: int) -> int:
    """How many calls `run_contest` makes, of all sides together."""
    return len(contest.sides) * (warmup + memory_calls(contest.device) + repeats)


def run_contest(
    contest: Contest,
    repeats: int,
    warmup: int,
    most_seconds: float = math.inf,
    called: Callable[[], None] = lambda: None,
) -> Outcome:
    """Warm up, compare the results, measure memory, then time the sides in turns.

    Args:
        most_seconds: that the first call of a side may take, unless it compiles.
        called: called after each call of a side.

    Raises:
        TooSlowError: a call took longer, and so none is made again.
    """
    sides, device = {name: told(run, called) for name, run in contest.sides.items()}, contest.device
    results, first = {}, {}
    for name in reversed(list(sides)):  # the first side last: libraries have been set up by then
        started = time.perf_counter()
        results[name] = sides[name]()
        synchronize(device)
        first[name] = time.perf_counter() - started
        if first[name] > most_seconds and name != "compiled":
            raise TooSlowError(f"one call of {name} took {first[name]:.2g} s")
    difference = None
    if len(sides) > 1:
        ours, *_, theirs = (results[name] for name in sides)
        difference = distance(ours, theirs)[1]
        del ours, theirs
    results.clear()
    for _ in range(warmup - 1):
        for run in sides.values():
            run()
    peaks = {name: median_peak(run, device) for name, run in sides.items()}
    taken = take_turns(list(sides), repeats, lambda name: timed(sides[name], device))
    timings = {}
    for name, calls in taken.items():
        wall, cpu = (list(seconds) for seconds in zip(*calls, strict=True))
        timings[name] = Timing(wall, cpu, peaks[name], first[name])
    return Outcome(contest.task, timings, difference)


def told(run: Callable[[], T], called: Callable[[], None]) -> Callable[[], T]:
    """A function that calls `called` after `run`."""

    def run_and_tell() -> T:
        result = run()
        called()
        return result

    return run_and_tell


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """(wall, CPU) seconds of one call, until the device has finished."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """The most memory that a call takes on top of what was there; None if it cannot be measured."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    resting = reset_resident_peak()
    run()
    return None if resting is None else max(0, resident("VmHWM") - resting)


def memory_calls(device: torch.device) -> int:
    """Calls by which a peak is measured; PyTorch counts a GPU's memory itself, so one is enough."""
    return 1 if device.type == "cuda" else 5


def median_peak(run: Callable[[], Any], device: torch.device) -> int | None:
    """The median of several calls: the CPU's allocator keeps or gives back memory between them."""
    calls = range(memory_calls(device))
    peaks = [peak for _ in calls if (peak := peak_bytes(run, device)) is not None]
    return int(statistics.median(peaks)) if peaks else None


def product_rate(device: torch.device, size: int = 1536) -> float:
    """FLOP/s of the machine's own matrix product in float32: the best of several square ones.

    It is what convolutions and attention can be held against, whatever the machine.
    """
    a, b = (torch.ones(size, size, device=device) for _ in range(2))
    taken = [timed(lambda: a @ b, device)[0] for _ in range(6)]
    return 2 * size**3 / min(taken)


def reset_resident_peak() -> int | None:
    """Let the peak count from now on; resident bytes of this process now (None if not Linux)."""
    gc.collect()
    if not sys.platform.startswith("linux"):
        return None
    with suppress(OSError, AttributeError):  # another C library: its free lists stay as they are
        ctypes.CDLL(None).malloc_trim(0)
    try:
        (PROC / "clear_refs").write_text("5")
    except OSError:
        return None
    return resident("VmRSS")


def resident(entry: str) -> int:
    """Bytes by an entry of Linux's status file: VmRSS (now) or VmHWM (the peak)."""
    line = next(x for x in (PROC / "status").read_text().splitlines() if x.startswith(entry))
    return int(line.split()[1]) * 1024


def named(what: str, dtype: torch.dtype) -> str:
    return f"{what}, {str(dtype).removeprefix('torch.')}"


# --- the table ------------------------------------------------------------------------------------

HEADER = (
    *("target", "side", "first call", "seconds", "spread", "peak MB"),
    *("TFLOP/s", "floor", "faster", "goal", "differs"),
)


def table(outcomes: Sequence[Outcome], clock: str, peak_tflops: float | None = None) -> str:
    """A line per side; `floor` is the time that a task's FLOPs need at `peak_tflops`."""
    lines: list[tuple[str, ...]] = [HEADER]
    for outcome in outcomes:
        task, flops, ratio = outcome.task, outcome.task.flops, outcome.ratio(clock)
        once = (
            f"{flops / peak_tflops / 1e12:.3g}" if flops and peak_tflops else "",
            "" if ratio is None else f"{ratio:.2f}x",
            ", ".join(outcome.aims(clock)),
            "" if outcome.difference is None else f"{outcome.difference:.0e}",
        )
        for place, (name, side) in enumerate(outcome.sides.items()):
            achieved = outcome.tflops_per_second(side, clock)
            lines.append(
                (
                    f"{task.target}: {task.what}" if place == 0 else "",
                    name,
                    "" if side.first is None else f"{side.first:.3g}",
                    f"{side.median(clock):.4g}",
                    f"{side.spread(clock):.0%}",
                    peak_text(side.peak_bytes, outcome.weights_bytes),
                    "" if achieved is None else f"{achieved:.3g}",
                    *(once if place == 0 else [""] * len(once)),
                )
            )
    return aligned(lines, left=(0, 1))


def peak_text(peak: int | None, weights: int | None) -> str:
    if peak is None:
        return ""
    return f"{peak / 1e6:.0f} {'+ weights' if weights is None else 'with weights'}"


def profile(run: Callable[[], Any], device: torch.device, num_rows: int = 25) -> str:
    """Where a call's time goes, operation by operation."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as taken:
        run()
        synchronize(device)
    order = f"self_{device.type}_time_total"
    return taken.key_averages().table(sort_by=order, row_limit=num_rows, max_name_column_width=48)
