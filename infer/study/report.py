"""From the stored results of a study to a table, a picture and a verdict; no model is needed."""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from configs.evaluation import CAPTION_SETS, EvaluateConfig, StudyConfig
from configs.schema import kept_settings
from infer.evaluate.measure import read_features
from infer.evaluate.queue import result_key
from infer.evaluate.report import (
    HOLDS,
    INTERVALS,
    Column,
    Compute,
    Report,
    Row,
    about_seconds,
    exactly,
    free_place,
    mean_of,
    numbers,
    ratio_of,
    share_of,
    taken_on,
)
from infer.evaluate.store import cut
from infer.gallery.page import write_page
from infer.study.page import page_of
from wan.errors import WanError
from wan.files import read_sealed, write_json, write_text
from wan.miniature.statistics import Clause, Measured, distance, match, verdict

REPORT, PICTURE = "report.md", "report.png"


def median_of(name: str) -> Compute:
    return lambda values: exactly(median(values[name].tolist()))


COLUMNS = (
    Column("joint, one object", ".1%", share_of("joint")),
    Column("joint, two objects", ".1%", share_of("pair_joint")),
    Column("motion ratio", ".3f", mean_of("motion_ratio"), ("motion_ratio",)),
    Column("entropy of the unsaid / truth's", ".3f", ratio_of("entropy", "true_entropy")),
    Column("cells in use / truth's", ".3f", ratio_of("cells", "true_cells")),
    Column("kernel distance", ".3f", lambda values: distance(values["clips"], values["truth"])),
    Column("saturation ratio", ".3f", mean_of("saturation_ratio"), ("saturation_ratio",)),
    Column("residual, px", ".2f", mean_of("residual"), ("residual",)),
    Column("seconds per video", ".2f", median_of("seconds")),
    Column("CPU seconds per video", ".2f", median_of("cpu_seconds")),
)


def read_settings(config: StudyConfig, folder: Path) -> list[Row]:
    """A row per setting in the study's order, of the captions that the study asks for.

    Results that answer other questions, or not all, are left out with a line on stderr.
    """
    rows = []
    for name, setting in config.settings.items():
        files = {captions: folder / name / f"{captions}.json" for captions in CAPTION_SETS}
        if not all(file.is_file() for file in files.values()):
            continue
        asked = {captions: config.evaluation(name, captions) for captions in files}
        try:
            records = {captions: read_sealed(file) for captions, file in files.items()}
            features = read_features(files["single"])
            problem = why_unusable(records, asked, folder / name)
        except WanError as error:
            problem = str(error)
        if problem:
            print(f"{name}: {problem}, left out; run it again", file=sys.stderr)
            continue
        records = {captions: cut(records[captions], asked[captions]) for captions in files}
        values = read_values(records) | {
            part: features[part][: asked["single"].num_clips] for part in ("clips", "truth")
        }
        machines = [taken_on(record) for record in records.values()]
        line, plan = setting.line or name, records["single"]["plan"]
        rows.append(Row(name, line, plan, machines, values))
    return rows


def why_unusable(
    records: dict[str, dict[str, Any]], asked: dict[str, EvaluateConfig], folder: Path
) -> str | None:
    """What keeps the records in a folder from answering the questions of a setting, if anything."""

    def but_number(question: dict[str, Any]) -> dict[str, Any]:
        kept = kept_settings(question, folder)  # paths as the records have them
        return {name: value for name, value in kept.items() if name != "num_captions"}

    questions = {captions: but_number(one.question()) for captions, one in asked.items()}
    if any(but_number(records[c]["config"]) != questions[c] for c in asked):
        return "stored with other settings"
    if any(len(records[c]["clips"]) < asked[c].num_clips for c in asked):
        return "not all captions are stored"
    first, *others = (record["weights"] for record in records.values())
    return "stored of two models" if any(other != first for other in others) else None


def read_values(records: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """One number per clip or caption, NaN where there is none."""
    single, captions = records["single"]["clips"], records["seeds"]["captions"]
    values: dict[str, list[float | None]] = {
        name: [clip[name] for clip in single] for name in ("joint", "seconds", "cpu_seconds")
    }
    values["pair_joint"] = [clip["joint"] for clip in records["pair"]["clips"]]
    for name in ("motion_ratio", "saturation_ratio", "residual"):
        values[name] = [clip["measures"][name] for clip in single]
    for name in ("entropy", "cells"):
        values[name] = [caption["clips"][name] for caption in captions]
        values[f"true_{name}"] = [caption["truth"][name] for caption in captions]
    return {name: numbers(column) for name, column in values.items()}


def compare(config: StudyConfig, rows: list[Row]) -> tuple[str, list[Clause]]:
    """The verdict of the match rule in one line, and its clauses."""
    rule = config.match
    by_name = {
        row.label: Measured(row.values, row.values["clips"], row.values["truth"]) for row in rows
    }
    several = f" (mean of {len(rule.students)} trainings)" if rule.repeats else ""
    title = f"{rule.student}{several} against {rule.teacher}"
    missing = [name for name in rule.names if name not in by_name]
    if missing:
        return f"{title}: no verdict, as there are no results of {', '.join(missing)}", []
    baseline = None if rule.baseline is None else by_name[rule.baseline]
    students = [by_name[name] for name in rule.students]
    try:
        clauses = match(students, by_name[rule.teacher], by_name[rule.floor], baseline)
    except WanError as error:
        return f"{title}: no verdict: {error}", []
    return f"{title}: {verdict(clauses)}", clauses


def num_captions(row: Row) -> str:
    return " + ".join(str(len(row.values[name])) for name in ("joint", "pair_joint", "cells"))


def write_report(config: StudyConfig, rows: list[Row], folder: Path) -> str:
    """Write table, picture, numbers and page; the verdict, for people to read.

    A report replaces one that holds nothing else. Beside any other it gets the next number.

    Raises:
        WanError: matplotlib is not installed; all but the picture is written then.
    """
    report = Report(rows, COLUMNS)
    holds = contents(rows, folder)
    place = free_place(folder, holds)
    table_file, picture, results, page = (
        folder / name.replace(".", f"{place}.")
        for name in (REPORT, PICTURE, "results.json", "index.html")
    )
    plan_columns = {
        "steps": lambda row: str((row.plan or {}).get("steps", "-")),
        "guidance": lambda row: str((row.plan or {}).get("guidance_scale", "-")),
    }
    table = report.table(plan_columns, {"captions": num_captions})
    line, clauses = compare(config, rows)
    decision = "\n".join([line, *(f"  {clause}" for clause in clauses)])
    notes = [
        f"Captions: of one object + of two + with several seeds each. {INTERVALS}",
        "Distances are of fixed random features, to other true clips of the same captions; the row "
        "of the renders is their floor.",
        f"Seconds without loading, on: {about_seconds(report.machines)}",
    ]
    write_text(table_file, f"{table}\n\n{' '.join(notes)}\n\n```\n{decision}\n```\n")
    lines = [
        {"setting": row.label, **report.line(values)}
        for row, values in zip(rows, report.estimates, strict=True)
    ]
    write_json(results, {"verdict": decision, "rows": lines, HOLDS: holds})
    measures = [column for column in COLUMNS if "seconds" not in column.heading]
    write_page(page, page_of(config, report, measures, [*notes, decision], folder))
    # Ceilings, which take no steps, are horizontal lines.
    xs = [None if row.plan is None else exactly(row.plan["steps"]) for row in rows]
    ticks = sorted({row.plan["steps"] for row in rows if row.plan is not None})
    report.draw(picture, "steps", xs, len(COLUMNS), ticks)
    files = ", ".join(map(str, (table_file, picture, results, page)))
    return f"{decision}\ntable, picture, numbers and page: {files}"


def contents(rows: Sequence[Row], folder: Path) -> dict[str, int]:
    """How many clips a report has of each record, by a key of all else that they depend on."""
    found = {}
    for row in rows:
        single, pair, seeds = (len(row.values[n]) for n in ("joint", "pair_joint", "cells"))
        for captions, number in zip(CAPTION_SETS, (single, pair, seeds), strict=True):
            record = read_sealed(folder / row.label / f"{captions}.json")
            config = {n: v for n, v in record["config"].items() if n != "num_captions"}
            found[result_key([row.label, captions, config, record.get("weights")])[:16]] = number
    return found
