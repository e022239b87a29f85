"""A report on several settings: their numbers with intervals, as a table and as panels."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infer.evaluate.measure import wilson_interval
from wan.errors import WanError
from wan.files import MAX_RECORD_BYTES, read_json, written_beside
from wan.miniature.statistics import Estimate, mean, ratio

INTERVALS = (
    "Intervals are 95 %: Wilson's for shares, a bootstrap over captions or clips for the rest."
)
AT_ONCE = " at once"
Values = Mapping[str, Tensor]  # measure -> one number per clip or caption (N,), NaN for none
Compute = Callable[[Values], Estimate]


def numbers(values: Iterable[float | None]) -> Tensor:
    """One number per clip: (N,) float32, NaN where there is none."""
    return torch.tensor([float("nan") if value is None else float(value) for value in values])


def taken_on(record: Mapping[str, Any]) -> str:
    """What the seconds of a record depend on."""
    place = f"{record['device']}, {record['dtype']}, {record['threads']} threads"
    numbers = sorted({clip.get("processes", 1) for clip in record["clips"]})
    if numbers == [1]:
        return place
    return f"{place}, {' or '.join(map(str, numbers))} processes{AT_ONCE}"


def about_seconds(machines: Sequence[str]) -> str:
    """What a reader of seconds must know of the machines (`taken_on`) that they were taken on."""
    if not any(place.endswith(AT_ONCE) for place in machines):
        return "; ".join(machines) + "."
    return (
        f"{'; '.join(machines)}. Processes at once on one machine slow each other down: their "
        "seconds are more than one alone takes, and only settings of one report compare."
    )


HOLDS = "holds"  # of results.json: what its report is about


def free_place(folder: Path, holds: Mapping[str, int]) -> str:
    """What the names of a new report's files end in, so that it replaces none that says more.

    Args:
        holds: the number of clips by the keys of what the report is about.
    Returns:
        "" for report.md, results.json and so on, where there are none or where the new one holds
        all that they hold; otherwise "-2" or the next number for which that is so.
    """
    number = 1
    while True:
        place = f"-{number}" if number > 1 else ""
        results, report = folder / f"results{place}.json", folder / f"report{place}.md"
        if not results.exists() and not report.exists():
            return place
        try:
            before = read_json(results, MAX_RECORD_BYTES).get(HOLDS)
        except (WanError, OSError):  # damaged, or of a study of an older release
            before = None
        if isinstance(before, dict) and all(holds.get(key, -1) >= n for key, n in before.items()):
            return place
        number += 1


def exactly(value: float) -> Estimate:
    """A number without an interval."""
    return Estimate(value, value, value)


# --- how a column is computed ---------------------------------------------------------------------


def share_of(name: str) -> Compute:
    """The share of verdicts that are 1."""

    def compute(values: Values) -> Estimate:
        right = values[name]
        return Estimate(float(right.mean()), *wilson_interval(int(right.sum()), len(right)))

    return compute


def mean_of(name: str) -> Compute:
    return lambda values: mean(values[name])


def ratio_of(name: str, other: str) -> Compute:
    """The ratio of two means over the same clips."""
    return lambda values: ratio(values[name], values[other])


@dataclass(frozen=True)
class Column:
    """One number of every row: its heading, how it is written, and how it is computed.

    Attributes:
        each: where a single clip has such a number: the measure's name, or two of a ratio.
    """

    heading: str
    written: str
    compute: Compute
    each: tuple[str, ...] = ()

    def of_clip(self, values: Mapping[str, float | None]) -> float | None:
        """The number of one clip, from its measures by name; None if it has none."""
        found = [values.get(name) for name in self.each]
        if not found or found[0] is None or None in found:
            return None
        return float(found[0]) if len(found) == 1 else found[0] / found[1] if found[1] else None

    def estimate(self, values: Values) -> Estimate | None:
        """None where no clip shows what is measured."""
        try:
            return self.compute(values)
        except WanError:
            return None

    def cell(self, value: Estimate | None) -> str:
        if value is None:
            return "-"
        one, low, high = (format(v, self.written) for v in (value.value, value.low, value.high))
        return one if low == high else f"{one} ({low} to {high})"


@dataclass(frozen=True)
class Row:
    """The results of one setting.

    Attributes:
        label: names the setting in the table.
        line: the settings of one line are joined in the picture.
        plan: how a model made the clips (`queue.plan_record`); None if no model did.
        machines: what the clips were made on (`taken_on`).
        values: what the columns are computed from; features are (N, D).
    """

    label: str
    line: str
    plan: dict[str, Any] | None
    machines: list[str]
    values: Values


@dataclass(frozen=True)
class Report:
    """Rows with their columns computed."""

    rows: Sequence[Row]
    columns: Sequence[Column]

    @cached_property
    def estimates(self) -> list[list[Estimate | None]]:
        """A number per row and column."""
        return [[column.estimate(row.values) for column in self.columns] for row in self.rows]

    @property
    def machines(self) -> list[str]:
        return sorted({machine for row in self.rows for machine in row.machines})

    def line(self, values: Sequence[Estimate | None]) -> dict[str, float | None]:
        """The numbers of a row by the columns' headings, each with its interval."""
        found: dict[str, float | None] = {}
        for column, value in zip(self.columns, values, strict=True):
            known = {} if value is None else asdict(value)
            found[column.heading] = known.get("value")
            found |= {f"{column.heading}, {part}": known.get(part) for part in ("low", "high")}
        return found

    def table(
        self,
        before: Mapping[str, Callable[[Row], str]],
        after: Mapping[str, Callable[[Row], str]],
    ) -> str:
        """Markdown, a line per row.

        Args:
            before, after: heading -> text, for what stands left and right of the numbers.
        """
        headings = [column.heading for column in self.columns]
        head = ["setting", *before, *headings, *after]
        lines = [head, ["---"] * len(head)]
        for row, values in zip(self.rows, self.estimates, strict=True):
            cells = [c.cell(value) for c, value in zip(self.columns, values, strict=True)]
            left, right = ([text(row) for text in side.values()] for side in (before, after))
            lines.append([row.label, *left, *cells, *right])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def draw(
        self,
        file: Path,
        x_label: str,
        xs: Sequence[Estimate | None],
        num_panels: int,
        ticks: Sequence[int] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        """Draw a panel for each of the first columns over a logarithmic x axis, and a legend.

        Args:
            xs: for each row; None draws a horizontal line.
            ticks: the only values to mark on the x axis.
            names: for each row, what is written at its points.
        Raises:
            WanError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise WanError('the picture needs matplotlib: pip install -e ".[plot]"') from error
        across = math.ceil(math.sqrt(num_panels + 1))
        down = math.ceil((num_panels + 1) / across)
        figure = Figure(figsize=(4.5 * across, 3.7 * down), layout="constrained")
        *places, legend = figure.subplots(down, across, squeeze=False).flat
        lines = list(dict.fromkeys(row.line for row in self.rows))
        handles: dict[str, Any] = {}
        for index, column in enumerate(self.columns[:num_panels]):
            place = places[index]
            points = [
                (row.line, x, values[index], name)
                for row, x, values, name in zip(
                    self.rows, xs, self.estimates, names or [""] * len(xs), strict=True
                )
                if values[index] is not None
            ]
            handles |= draw_points(place, points, lines)
            place.set_title(column.heading)
            scale_axis(place, x_label, ticks)
        for place in [*places[num_panels:], legend]:
            place.axis("off")
        drawn = [line for line in lines if line in handles]
        legend.legend([handles[line] for line in drawn], drawn, loc="center")
        with written_beside(file) as beside:
            figure.savefig(beside, dpi=110, format=file.suffix[1:])


# --- the picture ----------------------------------------------------------------------------------


Point = tuple[str, Estimate | None, Any, str]  # line, x, y and what is written beside


def draw_points(place: Any, points: Sequence[Point], lines: Sequence[str]) -> dict[str, Any]:
    """Draw points with their intervals into matplotlib axes.

    The points of a line are joined; one without an x is a horizontal line. Points of equal x are
    drawn side by side, 3 % apart.

    Returns:
        What a legend shows for each line.
    """
    handles = {}
    num_at = Counter(x.value for _, x, _, _ in points if x is not None)
    drawn_at: Counter[float] = Counter()
    known: dict[str, list[Any]] = {}
    for line, x, y, name in points:
        if x is not None:
            shift = drawn_at[x.value] - (num_at[x.value] - 1) / 2
            drawn_at[x.value] += 1
            at = x.value * 1.03**shift
            known.setdefault(line, []).append((x, y, at))
            place.annotate(
                name, (at, y.value), (4, 4), textcoords="offset points", fontsize=7, color="0.3"
            )
    for index, line in enumerate(lines):
        style = {"color": f"C{index % 10}", "label": line}
        for level in (y.value for one, x, y, _ in points if one == line and x is None):
            handles[line] = place.axhline(level, linestyle="--", linewidth=1, **style)
        if line in known:
            xs, ys, places = zip(
                *sorted(known[line], key=lambda point: point[0].value), strict=True
            )
            handles[line] = place.errorbar(
                places,
                [y.value for y in ys],
                xerr=_reach(xs),
                yerr=_reach(ys),
                marker="os^vD"[index // 10 % 5],
                markersize=4,
                capsize=2,
                **style,
            )
    if len(num_at) == 1:  # a single value would stretch the axis over several powers of ten
        (only,) = num_at
        place.set_xlim(only / 2, only * 2)
    return handles


def scale_axis(place: Any, label: str, ticks: Sequence[int] | None) -> None:
    """Make the x axis logarithmic, with the given ticks or those at 1, 2 and 5."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    place.set_xscale("log")
    if ticks is None:
        place.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        place.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    else:
        place.set_xticks(ticks, [str(tick) for tick in ticks])
    place.xaxis.set_minor_locator(NullLocator())
    place.set_xlabel(label)
    place.grid(alpha=0.3)


def _reach(estimates: Sequence[Estimate]) -> list[list[float]]:
    """How far the intervals reach down and up."""
    return [
        [max(0.0, e.value - e.low) for e in estimates],
        [max(0.0, e.high - e.value) for e in estimates],
    ]
