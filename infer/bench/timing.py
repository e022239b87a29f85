"""Time and memory of functions that take turns, and a table of them.

Turns make the comparison fair on a machine whose speed changes while it is measured: what slows one
side slows the other. A row shows medians, and as spread the middle half of all calls.
"""

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PROC = Path("/proc/self")
SAME = 0.05  # relative rms up to which two sides did the same work, in bfloat16 too


@dataclass(frozen=True)
class Contest:
    """One thing, done in several ways.

    Attributes:
        target, what: of its row.
        sides: name -> the call that is timed. The first is ours, and is compared with the last.
        goal: times as fast as the last side that the first should be.
        flops: of one call, or None.
        memory_goal: how much of the last side's peak the first may take, at most.
        note: what a reader of the row must know besides, such as the kernel that ran.
    """

    target: str
    what: str
    sides: Mapping[str, Callable[[], Any]]
    goal: float | None = None
    flops: float | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    memory_goal: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Timing:
    """One side: seconds on the wall and of all threads, per call, and bytes at the peak.

    `first` is the first call's time on the wall: what is compiled is compiled in it.
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
        memory_goal, note: see `Contest`.
        weights_bytes: of the weights, if the peaks include them; None where peaks are beside them.
        goal_seconds: that the first side should take, at most.
        phases: side -> what it does -> seconds, where that was asked for.
    """

    target: str
    what: str
    sides: dict[str, Timing]
    goal: float | None = None
    flops: float | None = None
    difference: float | None = None
    memory_goal: float | None = None
    weights_bytes: int | None = None
    goal_seconds: float | None = None
    note: str = ""
    phases: dict[str, dict[str, float]] = field(default_factory=dict)

    def ratio(self, clock: str) -> float | None:
        """How many times as fast the first side is as the last."""
        sides = list(self.sides.values())
        if len(sides) < 2:
            return None
        return sides[-1].median(clock) / sides[0].median(clock)

    def memory_ratio(self) -> float | None:
        """The first side's peak over the weights that it includes, else over the last side's."""
        peaks = [side.peak_bytes for side in self.sides.values()]
        limit = peaks[-1] if self.weights_bytes is None else self.weights_bytes
        return peaks[0] / limit if peaks[0] is not None and limit else None

    def misses(self, clock: str) -> list[str]:
        """Every aim that was not reached, in words."""
        missed = []
        seconds = next(iter(self.sides.values())).median(clock)
        ratio, memory = self.ratio(clock), self.memory_ratio()
        if self.goal is not None and ratio is not None and ratio < self.goal:
            missed.append(f"{ratio:.2f}x of {self.goal:g}x")
        if self.goal_seconds is not None and seconds > self.goal_seconds:
            missed.append(f"{seconds:.3g} s, the aim is {self.goal_seconds:g} s")
        if self.memory_goal is not None and memory is not None and memory > self.memory_goal:
            whose = "the reference's" if self.weights_bytes is None else "the weights"
            missed.append(f"peak memory {memory:.2f}x {whose}, the aim is {self.memory_goal:g}x")
        if self.difference is not None and not self.difference <= SAME:  # NaN is not
            missed.append(f"results differ by {self.difference:.0e} of their rms")
        return [f"{self.target}, {self.what}: {text}" for text in missed]

    def goals(self) -> str:
        """The aims, as the table shows them."""
        aims = (
            (self.goal, "{:g}x"),
            (self.goal_seconds, "{:g} s"),
            (self.memory_goal, "memory {:g}x"),
        )
        return ", ".join(text.format(value) for value, text in aims if value is not None)

    def as_json(self) -> dict[str, Any]:
        clocks = ("wall", "cpu")
        sides = {
            name: asdict(side)
            | {f"{clock}_median": side.median(clock) for clock in clocks}
            | {f"{clock}_spread": side.spread(clock) for clock in clocks}
            for name, side in self.sides.items()
        }
        ratios = {f"{clock}_ratio": self.ratio(clock) for clock in clocks}
        return {**vars(self), "sides": sides, **ratios, "memory_ratio": self.memory_ratio()}


def run_contest(contest: Contest, repeats: int, warmup: int) -> Outcome:
    """Warm up, compare the results, measure memory, then time the sides in turns."""
    order = list(contest.sides)
    results, first = {}, {}
    for name in reversed(order):  # the first side last: libraries have been set up by then
        started = time.perf_counter()
        results[name] = contest.sides[name]()
        synchronize(contest.device)
        first[name] = time.perf_counter() - started
    difference = None
    if len(order) > 1:
        difference = relative_rms(results[order[0]], results[order[-1]])
    results.clear()
    for _ in range(warmup - 1):
        for run in contest.sides.values():
            run()
    peaks = {name: median_peak(run, contest.device) for name, run in contest.sides.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contest.sides}
    for _ in range(repeats):
        for name in order:
            times[name].append(timed(contest.sides[name], contest.device))
        order.reverse()
    timings = {
        name: Timing(
            [wall for wall, _ in taken], [cpu for _, cpu in taken], peaks[name], first[name]
        )
        for name, taken in times.items()
    }
    return Outcome(
        contest.target,
        contest.what,
        timings,
        contest.goal,
        contest.flops,
        difference,
        contest.memory_goal,
        note=contest.note,
    )


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
    """The most memory that a call takes beside what was there before; None where none can tell."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    resting = reset_resident_peak()
    run()
    peak = resident_peak()
    return None if resting is None or peak is None else max(0, peak - resting)


def median_peak(run: Callable[[], Any], device: torch.device, calls: int = 5) -> int | None:
    """Of several calls: what the CPU's allocator keeps or gives back changes between them.

    PyTorch counts a GPU's memory itself, so that one call tells.
    """
    if device.type == "cuda":
        return peak_bytes(run, device)
    peaks = [peak for _ in range(calls) if (peak := peak_bytes(run, device)) is not None]
    return int(statistics.median(peaks)) if peaks else None


def reset_resident_peak() -> int | None:
    """Resident bytes of this process now, from where the next peak counts (Linux only)."""
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


def resident_peak() -> int | None:
    return resident("VmHWM") if sys.platform.startswith("linux") else None


def resident(entry: str) -> int:
    line = next(x for x in (PROC / "status").read_text().splitlines() if x.startswith(entry))
    return int(line.split()[1]) * 1024


def relative_rms(ours: Tensor, theirs: Tensor) -> float:
    theirs = theirs.float()
    distance = (ours.float() - theirs).square().mean().sqrt()
    return float(distance / theirs.square().mean().sqrt())


def named(what: str, dtype: torch.dtype) -> str:
    return f"{what}, {str(dtype).removeprefix('torch.')}"


# --- what is shown --------------------------------------------------------------------------------

HEADER = (
    *("target", "side", "first call", "seconds", "spread", "peak MB"),
    *("TFLOP/s", "floor", "faster", "goal", "differs"),
)


def table(outcomes: Sequence[Outcome], clock: str, peak_tflops: float | None = None) -> str:
    """A line per side; `floor` is the time that a row's FLOPs need at `peak_tflops`."""
    lines: list[tuple[str, ...]] = [HEADER]
    for outcome in outcomes:
        for place, (name, side) in enumerate(outcome.sides.items()):
            seconds, ratio, flops = side.median(clock), outcome.ratio(clock), outcome.flops
            floor = f"{flops / peak_tflops / 1e12:.3g}" if flops and peak_tflops else ""
            faster = "" if ratio is None else f"{ratio:.2f}x"
            differs = "" if outcome.difference is None else f"{outcome.difference:.0e}"
            lines.append(
                (
                    f"{outcome.target}: {outcome.what}" if place == 0 else "",
                    name,
                    "" if side.first is None else f"{side.first:.3g}",
                    f"{seconds:.4g}",
                    f"{side.spread(clock):.0%}",
                    peak_text(side.peak_bytes, outcome.weights_bytes),
                    f"{flops / seconds / 1e12:.3g}" if flops else "",
                    *((floor, faster, outcome.goals(), differs) if place == 0 else [""] * 4),
                )
            )
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


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
