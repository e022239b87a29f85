"""From the stored results of a study to a table, a picture and a verdict; no model is needed."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from configs.evaluation import CAPTION_SETS, StudyConfig
from infer.evaluate.report import (
    INTERVALS,
    Column,
    Point,
    draw_panels,
    exactly,
    markdown_table,
    numbers,
    share,
    taken_on,
)
from wan.errors import WanError
from wan.miniature.statistics import (
    Clause,
    Estimate,
    Measured,
    distance,
    match,
    mean,
    ratio,
    verdict,
)

REPORT, PICTURE = "report.md", "report.png"


@dataclass(frozen=True)
class Stored:
    """The results of one setting.

    Attributes:
        records: what `infer.evaluate.measure.write_record` wrote, by set of captions.
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
    """The stored results, in the study's order: of the captions that it asks for, where more are
    stored. Those that answer other questions, or not all, are left out with a line on stderr.
    """
    stored = []
    for name in config.settings:
        files = {captions: folder / name / f"{captions}.json" for captions in CAPTION_SETS}
        if not all(file.is_file() for file in files.values()):
            continue
        records = {c: json.loads(file.read_text(encoding="utf-8")) for c, file in files.items()}
        asked = {captions: config.evaluation(name, captions) for captions in files}
        if any(
            _but_number(records[c]["config"]) != _but_number(asked[c].question()) for c in files
        ):
            print(f"{name}: stored with other settings, left out; run it again", file=sys.stderr)
            continue
        if any(len(records[c]["clips"]) < asked[c].num_clips for c in files):
            print(f"{name}: not all captions are stored, left out; run it again", file=sys.stderr)
            continue
        weights = [record["weights"] for record in records.values() if "weights" in record]
        if any(one != weights[0] for one in weights):
            print(f"{name}: stored of two models, left out; run it again", file=sys.stderr)
            continue
        for captions, record in records.items():
            record["clips"] = record["clips"][: asked[captions].num_clips]
            if "captions" in record:
                record["captions"] = record["captions"][: asked[captions].num_captions]
        features = load_file(files["single"].with_suffix(".safetensors"))
        clips, truth = (features[part][: asked["single"].num_clips] for part in ("clips", "truth"))
        stored.append(Stored(name, records, Measured(_values(records), clips, truth)))
    return stored


def _but_number(question: dict[str, Any]) -> dict[str, Any]:
    """Stored captions of one question differ in nothing but how many there are."""
    return {name: value for name, value in question.items() if name != "num_captions"}


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
    return {name: numbers(column) for name, column in values.items()}


def _share(stored: Stored, name: str) -> Estimate:
    return share(stored.measured.values[name])


def _mean(stored: Stored, name: str) -> Estimate:
    return mean(stored.measured.values[name])


def _of_truth(stored: Stored, name: str) -> Estimate:
    return ratio(stored.measured.values[name], stored.measured.values[f"true_{name}"])


def _median(stored: Stored, name: str) -> Estimate:
    return exactly(median(clip[name] for clip in stored.records["single"]["clips"]))


def _distance(stored: Stored, _: str) -> Estimate:
    return distance(stored.measured.features, stored.measured.truth)


COLUMNS: tuple[Column[Stored], ...] = (
    Column("joint, one object", ".1%", _share, "joint"),
    Column("joint, two objects", ".1%", _share, "pair_joint"),
    Column("motion ratio", ".3f", _mean, "motion_ratio"),
    Column("entropy of the unsaid / truth's", ".3f", _of_truth, "entropy"),
    Column("cells in use / truth's", ".3f", _of_truth, "cells"),
    Column("kernel distance", ".3f", _distance),
    Column("saturation ratio", ".3f", _mean, "saturation_ratio"),
    Column("residual, px", ".2f", _mean, "residual"),
    Column("seconds per video", ".2f", _median, "seconds"),
    Column("CPU seconds per video", ".2f", _median, "cpu_seconds"),
)

Estimates = dict[str, list[Estimate | None]]  # setting -> a number per column


def table(stored: list[Stored], estimates: Estimates) -> str:
    """Markdown, one row per setting."""
    head = ["setting", "steps", "guidance", *(column.heading for column in COLUMNS), "captions"]
    rows = []
    for one in stored:
        plan = one.plan or {}
        cells = [c.cell(v) for c, v in zip(COLUMNS, estimates[one.name], strict=True)]
        captions = [len(one.measured.values[name]) for name in ("joint", "pair_joint", "cells")]
        rows.append(
            [one.name, str(plan.get("steps", "-")), f"{plan.get('guidance_scale', '-')}"]
            + [*cells, " + ".join(map(str, captions))]
        )
    return markdown_table(head, rows)


def compare(config: StudyConfig, stored: list[Stored]) -> tuple[str, list[Clause]]:
    """The verdict of the match rule in one line, and its clauses."""
    rule = config.match
    by_name = {one.name: one.measured for one in stored}
    several = f" (mean of {len(rule.students)} trainings)" if rule.repeats else ""
    title = f"{rule.student}{several} against {rule.teacher}"
    missing = [name for name in rule.names if name not in by_name]
    if missing:
        return f"{title}: no verdict, as there are no results of {', '.join(missing)}", []
    baseline = None if rule.baseline is None else by_name[rule.baseline]
    try:
        clauses = match(
            [by_name[name] for name in rule.students],
            by_name[rule.teacher],
            by_name[rule.floor],
            baseline,
        )
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
    machines = sorted({taken_on(r) for s in stored for r in s.records.values()})
    notes = (
        f"Captions: of one object + of two + with several seeds each. {INTERVALS} Distances are of "
        "fixed random features, to other true clips of the same captions; the row of the renders "
        f"is their floor. Seconds without loading, on: {'; '.join(machines)}."
    )
    text = f"{table(stored, estimates)}\n\n{notes}\n\n```\n{decision}\n```\n"
    (folder / REPORT).write_text(text, encoding="utf-8")
    draw(config, stored, estimates, folder / PICTURE)
    return f"{decision}\ntable and picture: {folder / REPORT}, {folder / PICTURE}"


def draw(config: StudyConfig, stored: list[Stored], estimates: Estimates, file: Path) -> None:
    """A panel per column over the number of steps; ceilings are horizontal lines."""
    panels: dict[str, list[Point]] = {column.heading: [] for column in COLUMNS}
    for one in stored:
        line = config.settings[one.name].line or one.name
        steps = None if one.plan is None else exactly(one.plan["steps"])
        for column, value in zip(COLUMNS, estimates[one.name], strict=True):
            if value is not None:
                panels[column.heading].append(Point(line, steps, value))
    ticks = sorted({one.plan["steps"] for one in stored if one.plan is not None})
    draw_panels(panels, file, "steps", ticks)
