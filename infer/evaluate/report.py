"""What reports are made of: numbers with intervals, their table, and panels of them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from infer.evaluate.measure import wilson_interval
from wan.errors import WanError
from wan.miniature.statistics import Estimate

S = TypeVar("S")  # what a row is of

INTERVALS = (
    "Intervals are 95 %: Wilson's for shares, a bootstrap over captions or clips for the rest."
)


def numbers(values: Iterable[float | None]) -> Tensor:
    """One number per clip: (N,) float32, NaN where there is none."""
    return torch.tensor([float("nan") if value is None else float(value) for value in values])


def taken_on(record: Mapping[str, Any]) -> str:
    """What the seconds of a record depend on."""
    return f"{record['device']}, {record['dtype']}, {record['threads']} threads"


def share(right: Tensor) -> Estimate:
    """The share of verdicts (N,) that are 1."""
    return Estimate(float(right.mean()), *wilson_interval(int(right.sum()), len(right)))


def exactly(value: float) -> Estimate:
    """A number without an interval."""
    return Estimate(value, value, value)


@dataclass(frozen=True)
class Column(Generic[S]):
    """One number of a row: its heading, how it is written, and how it is computed."""

    heading: str
    written: str
    compute: Callable[[S, str], Estimate]
    name: str = ""

    def estimate(self, row: S) -> Estimate | None:
        """None where no clip of the row shows what is measured."""
        try:
            return self.compute(row, self.name)
        except WanError:
            return None

    def cell(self, value: Estimate | None) -> str:
        if value is None:
            return "-"
        one, low, high = (format(v, self.written) for v in (value.value, value.low, value.high))
        return one if low == high else f"{one} ({low} to {high})"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@dataclass(frozen=True)
class Point:
    """A number to draw; those of one line are joined. Without an x it is a level of its own."""

    line: str
    x: Estimate | None
    y: Estimate


def draw_panels(
    panels: Mapping[str, Sequence[Point]],
    file: Path,
    x_label: str,
    ticks: Sequence[int] | None = None,
) -> None:
    """A panel per heading, its points with their intervals over a logarithmic x; and the legend.

    Points of equal x stand side by side.

    Args:
        ticks: the only values to mark on the x axis.
    Raises:
        WanError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator
    except ImportError as error:
        raise WanError('the picture needs matplotlib: pip install -e ".[plot]"') from error
    lines = list(dict.fromkeys(point.line for points in panels.values() for point in points))
    columns = math.ceil(math.sqrt(len(panels) + 1))
    rows = math.ceil((len(panels) + 1) / columns)
    figure = Figure(figsize=(4.5 * columns, 3.7 * rows), layout="constrained")
    *places, legend = figure.subplots(rows, columns, squeeze=False).flat
    for place in places[len(panels) :]:
        place.axis("off")
    handles = {}
    for (heading, points), place in zip(panels.items(), places, strict=False):
        for index, line in enumerate(lines):
            style = {"color": f"C{index % 10}", "label": line}
            for level in (p.y.value for p in points if p.line == line and p.x is None):
                handles[line] = place.axhline(level, linestyle="--", linewidth=1, **style)
            known = [
                (p.x, p.y, shown_at)
                for p, shown_at in zip(points, _side_by_side(points), strict=True)
                if p.line == line and p.x is not None
            ]
            if known:
                known.sort(key=lambda triple: triple[0].value)
                xs, ys, shown = zip(*known, strict=True)
                handles[line] = place.errorbar(
                    shown,
                    [y.value for y in ys],
                    xerr=_reach(xs),
                    yerr=_reach(ys),
                    marker="os^vD"[index // 10 % 5],
                    markersize=4,
                    capsize=2,
                    **style,
                )
        place.set_title(heading)
        place.set_xscale("log")
        if ticks is None:
            place.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            place.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        else:
            place.set_xticks(ticks, [str(tick) for tick in ticks])
        place.xaxis.set_minor_locator(NullLocator())
        place.set_xlabel(x_label)
        place.grid(alpha=0.3)
    legend.legend(handles.values(), handles.keys(), loc="center")
    legend.axis("off")
    figure.savefig(file, dpi=110)


def _side_by_side(points: Sequence[Point]) -> list[float]:
    """Where points are drawn on the logarithmic x axis: those of equal x 3 % apart."""
    groups: dict[float, list[int]] = {}
    for index, point in enumerate(points):
        groups.setdefault(0.0 if point.x is None else point.x.value, []).append(index)
    places = [0.0] * len(points)
    for x, group in groups.items():
        for order, index in enumerate(group):
            places[index] = x * 1.03 ** (order - (len(group) - 1) / 2)
    return places


def _reach(estimates: Sequence[Estimate]) -> list[list[float]]:
    """How far the intervals reach down and up."""
    return [
        [max(0.0, e.value - e.low) for e in estimates],
        [max(0.0, e.high - e.value) for e in estimates],
    ]
