"""From the stored cells of a grid to CSV, JSON, a table, a picture and a labelled video."""

import csv
import io
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.ablation import AblateConfig, Setting
from infer.ablate.cell import Cell
from infer.ablate.page import page_of
from infer.evaluate.queue import named
from infer.evaluate.report import (
    HOLDS,
    INTERVALS,
    Column,
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
from infer.evaluate.video_grid import video_grid
from infer.gallery.page import write_page
from infer.measure.run import Measured, columns_of
from infer.measure.run import notes as about_measures
from wan.errors import WanError
from wan.files import write_json, write_text
from wan.media.video import read_video, write_video

WORLD_NOTE = (
    "Clips of captions of the miniature's world, read by its detectors. Text adherence: everything "
    "that the caption states, and nothing more, is seen. Motion ratio: speed over the stated one. "
    "Residual: distance in pixels from a smooth path, and permanence: share of the frames in which "
    "an object is there, both of temporal coherence. Means are over the clips that show what is "
    "measured: a setting with few right clips is judged by those alone."
)
REFERENCE_NOTE = (
    "Clips compared, as 8-bit frames, with the exact many-step result from the same noise. PSNR "
    "(at most 60 dB) and SSIM say how near a setting comes to that clip. They do not say which "
    "video is better: another clip that is as good scores low, and a student, which is not trained "
    "to repeat its teacher's clips, scores low however good it is. Flicker is the mean change "
    "between frames over that of the reference: above 1 is more flicker or more motion, below 1 is "
    "calmer or more static; it does not tell these apart. None of them reads the prompt."
)

SECONDS = Column("seconds per clip", ".2f", mean_of("seconds"))
WORLD = (
    Column("text adherence", ".1%", share_of("joint")),
    Column("motion ratio", ".3f", mean_of("motion_ratio"), ("motion_ratio",)),
    Column("residual, px", ".2f", mean_of("residual"), ("residual",)),
    Column("permanence", ".1%", mean_of("permanence"), ("permanence",)),
    SECONDS,
)
REFERENCE = (
    Column("PSNR, dB", ".2f", mean_of("psnr"), ("psnr",)),
    Column("SSIM", ".4f", mean_of("ssim"), ("ssim",)),
    Column(
        "flicker / reference's",
        ".3f",
        ratio_of("flicker", "reference_flicker"),
        ("flicker", "reference_flicker"),
    ),
    SECONDS,
)


def read_rows(cells: Sequence[Cell], measured: Measured | None = None) -> list[tuple[Setting, Row]]:
    """The stored results, a row per setting in the grid's order."""
    more = {} if measured is None else measured.values
    names = {name for values in more.values() for name in values}
    none = dict.fromkeys(names)
    axes = {id(setting): setting.axes() for setting in (cell.setting for cell in cells)}
    varied = [n for n in cells[0].setting.axes() if len({a[n] for a in axes.values()}) > 1]
    rows = []
    for setting, group in itertools.groupby(cells, lambda cell: cell.setting):
        own_cells = list(group)
        records = [cell.record() for cell in own_cells]
        columns = [
            {"joint": clip.get("joint"), "seconds": clip["seconds"], **clip["measures"]}
            | dict(more.get(cell.video(0), none))
            for cell, record in zip(own_cells, records, strict=True)
            for clip in record["clips"]
        ]
        own = setting.axes()
        row = Row(
            ", ".join(own[name] for name in varied) or setting.attention_name,
            ", ".join(own[name] for name in varied if name != "steps") or setting.model,
            records[0]["plan"],
            [taken_on(record) for record in records],
            {name: numbers(clip[name] for clip in columns) for name in columns[0]},
        )
        rows.append((setting, row))
    return rows


def plan_of(row: Row) -> dict[str, Any]:
    assert row.plan is not None, "a model made every clip of a grid"
    return row.plan


def num_clips(row: Row) -> int:
    return len(row.values["seconds"])


def write_report(
    config: AblateConfig,
    cells: Sequence[Cell],
    failed: Mapping[str, str],
    folder: Path,
    measured: Measured | None = None,
) -> str:
    """Write everything; what a person reads first.

    A report replaces one that holds nothing else. Beside any other it gets the next number.

    Args:
        failed: names of cells, with their reasons.
        measured: more numbers of the cells' clips.
    Raises:
        WanError: matplotlib is not installed; all but the picture is written then.
    """
    settings = read_rows(cells, measured)
    holds = {cell.key[:16]: len(cell.record()["clips"]) for cell in cells}
    holds |= {f"measure {name}": 1 for name in config.measures if measured is not None}
    place = free_place(folder, holds)
    files = {
        name: folder / name.replace(".", f"{place}.")
        for name in ("index.html", "report.md", "results.csv", "results.json", "report.png")
    }
    sheet = folder / f"clips{place}.mp4"
    *columns, seconds_column = WORLD if config.in_world else REFERENCE
    if measured is not None:
        columns += columns_of(measured)
    report = Report([row for _, row in settings], [*columns, seconds_column])
    plan_columns = {
        "steps": lambda row: str(plan_of(row)["steps"]),
        "density": lambda row: f"{plan_of(row)['density']:.1%}",
    }
    table = report.table(plan_columns, {"clips": lambda row: str(num_clips(row))})
    paragraphs = write_notes(config, report.machines, failed, measured)
    notes = " ".join(paragraphs)
    write_text(files["report.md"], f"{table}\n\n{notes}\n")
    lines = [
        csv_line(setting, row, report, values)
        for (setting, row), values in zip(settings, report.estimates, strict=True)
    ]
    about = {"notes": notes, "failed": list(failed), "rows": lines, HOLDS: holds}
    write_json(files["results.json"], about)
    write_csv(files["results.csv"], lines)
    labels = {id(setting): row.label for setting, row in settings}
    write_sheet(config, cells, labels, sheet)
    write_page(
        files["index.html"], page_of(config, cells, settings, report, paragraphs, folder, measured)
    )
    draw(files["report.png"], [setting for setting, _ in settings], report)
    names = ", ".join(file.name for file in (*files.values(), sheet) if file.is_file())
    return f"{table}\n\n{notes}\n\n{names} in {folder}"


def draw(file: Path, settings: Sequence[Setting], report: Report) -> None:
    """Draw all columns but the seconds: over the steps where little else varies, else over seconds.

    Raises:
        WanError: matplotlib is not installed.
    """
    num_panels = len(report.columns) - 1
    steps = [plan_of(row)["steps"] for row in report.rows]
    others = {
        tuple(value for name, value in setting.axes().items() if name not in ("model", "steps"))
        for setting in settings
    }
    if len(set(steps)) > 1 and len(others) == 1:
        xs = [exactly(number) for number in steps]
        report.draw(file, "steps", xs, num_panels, ticks=sorted(set(steps)))
        return
    seconds = [values[-1] for values in report.estimates]
    names = [f"{number} step{'s' * (number > 1)}" for number in steps]
    report.draw(file, SECONDS.heading, seconds, num_panels, names=names)


def write_notes(
    config: AblateConfig,
    machines: Sequence[str],
    failed: Mapping[str, str],
    measured: Measured | None = None,
) -> list[str]:
    """What a reader of the table must know."""
    notes = [
        WORLD_NOTE if config.in_world else REFERENCE_NOTE,
        f"{INTERVALS} A mean over one clip has none.",
        f"Seconds are without loading{'' if config.in_world else ', encoding the prompt'} and "
        "what a first clip pays for (warmup_seconds in cells/).",
        f"They were taken on: {about_seconds(machines)}",
    ]
    if len(machines) > 1:
        notes.append("Cells of different ones do not compare in seconds.")
    notes.append("Density: attention's share of the FLOPs of dense attention.")
    if measured is not None:
        notes += about_measures(measured, config.sampled_frames)
    if failed:
        notes.append(f"Failed, and not in here: {named(failed)}.")
    return notes


def csv_line(setting: Setting, row: Row, report: Report, values: Sequence[Any]) -> dict[str, Any]:
    """A line of the CSV: how the clips were made, then each number with its interval."""
    plan = plan_of(row)
    line: dict[str, Any] = {
        "setting": row.label,
        "model": setting.model,
        "attention": setting.attention_name,
        "shift": setting.sampler.shift,
        **{name: plan[name] for name in ("sampler", "steps", "guidance_scale", "density")},
        "untrained": "; ".join(plan["untrained"]),
        "clips": num_clips(row),
    }
    return line | report.line(values)


def write_csv(file: Path, lines: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(file, text.getvalue())


def write_sheet(
    config: AblateConfig, cells: Sequence[Cell], labels: dict[int, str], file: Path
) -> None:
    """The first clip of every setting, all from one prompt and seed, side by side in one video.

    A clip that is damaged or not there is left out, with a line on stderr.

    Args:
        labels: by the settings' ids.
    """
    first = {}
    for cell in cells:
        if (cell.seed, cell.number) == (config.seed, 0):
            clip = cell.video(0)
            try:
                first[labels[id(cell.setting)]] = read_video(clip)[0]
            except (WanError, OSError) as error:
                print(
                    f"{cell.name}: left out of {file.name} ({error}); to make it again, delete "
                    f"{cell.file}",
                    file=sys.stderr,
                )
    if first:
        write_video(file, video_grid(first), config.fps or 8)
