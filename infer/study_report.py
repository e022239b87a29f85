"""From the stored results of a study to a table, a picture and a verdict; no model is needed."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from configs.evaluation import CAPTION_SETS, StudyConfig
from infer.measure import wilson_interval
from wan.errors import WanError
from wan.miniature.comparison import (
    Clause,
    Estimate,
    Measured,
    distance,
    match,
    mean,
    ratio,
    verdict,
)
from wan.miniature.metrics import frechet_distance

REPORT, PICTURE = "report.md", "report.png"


@dataclass(frozen=True)
class Stored:
    """The results of one setting.

    Attributes:
        records: what `infer.measure.write_record` wrote, by set of captions.
        measured: the numbers that settings are compared by.
    """

    name: str
    records: dict[str, dict[str, Any]]
    measured: Measured

    @property
    def plan(self) -> dict[str, Any] | None:
        """Sampler, steps and guidance; None for the ceilings."""
        return self.records["single"]["plan"]


def read_settings(config: StudyConfig, folder: Path) -> list[Stored]:
    """The stored results, in the study's order. Those that answer other questions than the study
    now asks are left out with a line on stderr."""
    stored = []
    for name in config.settings:
        files = {captions: folder / name / f"{captions}.json" for captions in CAPTION_SETS}
        if not all(file.is_file() for file in files.values()):
            continue
        records = {c: json.loads(file.read_text(encoding="utf-8")) for c, file in files.items()}
        if any(records[c]["config"] != config.evaluation(name, c).question() for c in files):
            print(f"{name}: stored with other settings, left out; run it again", file=sys.stderr)
            continue
        features = load_file(files["single"].with_suffix(".safetensors"))
        measured = Measured(_values(records), features["clips"], features["truth"])
        stored.append(Stored(name, records, measured))
    return stored


def _values(records: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """One number per caption, NaN where there is none."""
    single, captions = records["single"]["clips"], records["seeds"]["captions"]
    values = {
        "joint": [clip["joint"] for clip in single],
        "pair_joint": [clip["joint"] for clip in records["pair"]["clips"]],
    }
    for name in ("motion_ratio", "saturation_ratio", "residual"):
        values[name] = [clip["measures"][name] for clip in single]
    for name in ("entropy", "cells"):
        values[name] = [caption["clips"][name] for caption in captions]
        values[f"true_{name}"] = [caption["truth"][name] for caption in captions]
    return {
        name: torch.tensor([float("nan") if v is None else float(v) for v in column])
        for name, column in values.items()
    }


def _share(stored: Stored, name: str) -> Estimate:
    right = stored.measured.values[name]
    return Estimate(float(right.mean()), *wilson_interval(int(right.sum()), len(right)))


def _mean(stored: Stored, name: str) -> Estimate:
    return mean(stored.measured.values[name])


def _of_truth(stored: Stored, name: str) -> Estimate:
    return ratio(stored.measured.values[name], stored.measured.values[f"true_{name}"])


def _median(stored: Stored, name: str) -> Estimate:
    value = stored.records["single"]["summary"][name]
    return Estimate(value, value, value)


def _distance(stored: Stored, _: str) -> Estimate:
    return distance(stored.measured.features, stored.measured.truth)


def _frechet(stored: Stored, _: str) -> Estimate:
    value = frechet_distance(stored.measured.features, stored.measured.truth)
    return Estimate(value, value, value)


@dataclass(frozen=True)
class Column:
    """One number of a setting: its heading, how it is written, and how it is computed."""

    heading: str
    written: str
    compute: Callable[[Stored, str], Estimate]
    name: str = ""

    def estimate(self, stored: Stored) -> Estimate | None:
        """None where no clip of the setting shows what is measured."""
        try:
            return self.compute(stored, self.name)
        except WanError:
            return None

    def cell(self, value: Estimate | None) -> str:
        if value is None:
            return "-"
        one, low, high = (format(v, self.written) for v in (value.value, value.low, value.high))
        return one if low == high else f"{one} ({low} to {high})"


COLUMNS = (
    Column("joint, one object", ".1%", _share, "joint"),
    Column("joint, two objects", ".1%", _share, "pair_joint"),
    Column("motion ratio", ".3f", _mean, "motion_ratio"),
    Column("entropy of the unsaid / truth's", ".3f", _of_truth, "entropy"),
    Column("cells in use / truth's", ".3f", _of_truth, "cells"),
    Column("kernel distance", ".3f", _distance),
    Column("Fréchet distance", ".2f", _frechet),
    Column("saturation ratio", ".3f", _mean, "saturation_ratio"),
    Column("residual, px", ".2f", _mean, "residual"),
    Column("seconds per video", ".2f", _median, "seconds_per_video"),
    Column("CPU seconds per video", ".2f", _median, "cpu_seconds_per_video"),
)

Estimates = dict[str, list[Estimate | None]]  # setting -> a number per column


def table(stored: list[Stored], estimates: Estimates) -> str:
    """Markdown, one row per setting."""
    head = ["setting", "steps", "guidance", *(column.heading for column in COLUMNS), "captions"]
    rows = [head, ["---"] * len(head)]
    for one in stored:
        plan = one.plan or {}
        cells = [c.cell(v) for c, v in zip(COLUMNS, estimates[one.name], strict=True)]
        captions = [len(one.measured.values[name]) for name in ("joint", "pair_joint", "cells")]
        rows.append(
            [one.name, str(plan.get("steps", "-")), f"{plan.get('guidance_scale', '-')}"]
            + [*cells, " + ".join(map(str, captions))]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def compare(config: StudyConfig, stored: list[Stored]) -> tuple[str, list[Clause]]:
    """The verdict of the match rule in one line, and its clauses."""
    names = config.match
    by_name = {one.name: one.measured for one in stored}
    needed = [names.student, names.teacher, names.floor]
    needed += [] if names.baseline is None else [names.baseline]
    title = f"{names.student} against {names.teacher}"
    missing = [name for name in needed if name not in by_name]
    if missing:
        return f"{title}: no verdict, as there are no results of {', '.join(missing)}", []
    student, teacher, floor = (by_name[name] for name in needed[:3])
    baseline = None if names.baseline is None else by_name[names.baseline]
    try:
        clauses = match(student, teacher, floor, baseline)
    except WanError as error:
        return f"{title}: no verdict: {error}", []
    return f"{title}: {verdict(clauses)}", clauses


def write_report(config: StudyConfig, stored: list[Stored], folder: Path) -> str:
    """Write `report.md` and `report.png`; the verdict, for people to read.

    Raises:
        WanError: matplotlib is not installed; the table is written then.
    """
    estimates = {one.name: [column.estimate(one) for column in COLUMNS] for one in stored}
    line, clauses = compare(config, stored)
    decision = "\n".join([line, *(f"  {clause}" for clause in clauses)])
    machines = sorted(
        {f"{r['device']}, {r['threads']} threads" for s in stored for r in s.records.values()}
    )
    notes = (
        "Captions: of one object + of two + with several seeds each. Intervals are 95 %: Wilson's "
        "for shares, a bootstrap over captions for the rest. Distances are of fixed random "
        "features, to other true clips of the same captions; the row of the renders is their "
        f"floor. Seconds without loading, on: {'; '.join(machines)}."
    )
    text = f"{table(stored, estimates)}\n\n{notes}\n\n```\n{decision}\n```\n"
    (folder / REPORT).write_text(text, encoding="utf-8")
    draw(config, stored, estimates, folder / PICTURE)
    return f"{decision}\ntable and picture: {folder / REPORT}, {folder / PICTURE}"


def draw(config: StudyConfig, stored: list[Stored], estimates: Estimates, file: Path) -> None:
    """A panel per column over the number of steps; ceilings are horizontal lines."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullLocator
    except ImportError as error:
        raise WanError('the picture needs matplotlib: pip install -e ".[plot]"') from error
    lines: dict[str, list[Stored]] = {}
    for one in stored:
        lines.setdefault(config.settings[one.name].line or one.name, []).append(one)
    steps = sorted({one.plan["steps"] for one in stored if one.plan is not None})
    figure = Figure(figsize=(18, 11), layout="constrained")
    *panels, legend = figure.subplots(3, 4).flat
    for number, (panel, column) in enumerate(zip(panels, COLUMNS, strict=True)):
        for index, (label, members) in enumerate(lines.items()):
            style = {"color": f"C{index % 10}", "label": label}
            points = [(one.plan, estimates[one.name][number]) for one in members]
            known = sorted(
                (plan["steps"], e.value, e.low, e.high)
                for plan, e in points
                if plan is not None and e is not None
            )
            if known:
                x, y, low, high = (torch.tensor(values) for values in zip(*known, strict=True))
                errors = torch.stack((y - low, high - y)).clamp(min=0)
                panel.errorbar(x, y, errors, marker="o", markersize=4, capsize=2, **style)
            for plan, e in points:
                if plan is None and e is not None:
                    panel.axhline(e.value, linestyle="--", linewidth=1, **style)
        panel.set_title(column.heading)
        panel.set_xscale("log")
        panel.set_xticks(steps, [str(count) for count in steps])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xlabel("steps")
        panel.grid(alpha=0.3)
    handles = {
        label: handle
        for panel in panels
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    legend.legend(handles.values(), handles.keys(), loc="center")
    legend.axis("off")
    figure.savefig(file, dpi=110)
