"""From the stored cells of a grid to CSV, JSON, a table, a picture and a labelled video."""

import csv
import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.ablation import AblateConfig, Setting
from infer.evaluate.report import (
    INTERVALS,
    Column,
    Point,
    draw_panels,
    markdown_table,
    numbers,
    share,
    taken_on,
)
from infer.evaluate.video_grid import video_grid
from infer.sample.request import torch_dtype
from wan.files import write_json
from wan.media.video import read_video, write_video
from wan.miniature.statistics import Estimate, mean, ratio

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


@dataclass(frozen=True)
class Cell:
    """A setting with one seed, and with one prompt or the captions of the world.

    Attributes:
        number: of the prompt.
        name: how to speak of it.
        key: sha256 of all that its result depends on.
    """

    setting: Setting
    seed: int
    prompt: str | None
    number: int
    name: str
    key: str
    folder: Path

    @property
    def file(self) -> Path:
        """The record; the clip to look at lies beside it as .mp4."""
        return self.folder / f"{self.key[:16]}.json"


@dataclass(frozen=True)
class Row:
    """The results of one setting.

    Attributes:
        label: what tells it from the others.
        line: the same without the number of steps.
        machines: what its clips were made on.
        values: measure -> one number per clip (N,), NaN where there is none.
    """

    setting: Setting
    label: str
    line: str
    plan: dict[str, Any]
    machines: list[str]
    values: dict[str, Tensor]

    @property
    def num_clips(self) -> int:
        return len(self.values["seconds"])


def _share(row: Row, name: str) -> Estimate:
    return share(row.values[name])


def _mean(row: Row, name: str) -> Estimate:
    return mean(row.values[name])


def _flicker(row: Row, _: str) -> Estimate:
    return ratio(row.values["flicker"], row.values["reference_flicker"])


SECONDS = Column(heading="seconds per clip", written=".2f", compute=_mean, name="seconds")
WORLD: tuple[Column[Row], ...] = (
    Column("text adherence", ".1%", _share, "joint"),
    Column("motion ratio", ".3f", _mean, "motion_ratio"),
    Column("residual, px", ".2f", _mean, "residual"),
    Column("permanence", ".1%", _mean, "permanence"),
)
REFERENCE: tuple[Column[Row], ...] = (
    Column("PSNR, dB", ".2f", _mean, "psnr"),
    Column("SSIM", ".4f", _mean, "ssim"),
    Column("flicker / reference's", ".3f", _flicker),
)


def read_rows(config: AblateConfig, cells: Sequence[Cell]) -> list[Row]:
    """The stored results, a row per setting in the grid's order."""
    axes = {id(setting): setting.axes() for setting in (cell.setting for cell in cells)}
    varied = [n for n in cells[0].setting.axes() if len({a[n] for a in axes.values()}) > 1]
    rows = []
    for setting, group in itertools.groupby(cells, lambda cell: cell.setting):
        records = [json.loads(cell.file.read_text(encoding="utf-8")) for cell in group]
        clips = [clip for record in records for clip in record["clips"]]
        columns = [
            {"joint": clip.get("joint"), "seconds": clip["seconds"], **clip["measures"]}
            for clip in clips
        ]
        own = setting.axes()
        rows.append(
            Row(
                setting,
                ", ".join(own[name] for name in varied) or setting.attention_name,
                ", ".join(own[name] for name in varied if name != "steps") or setting.model,
                records[0]["plan"],
                [machine(config, record) for record in records],
                {name: numbers(clip[name] for clip in columns) for name in columns[0]},
            )
        )
    return rows


def machine(config: AblateConfig, record: dict[str, Any]) -> str:
    """As `taken_on`. The dtype is in every cell's key, and in records of late only."""
    dtype = str(torch_dtype(config.dtype, torch.device(record["device"])))
    return taken_on({"dtype": dtype} | record)


def write_report(
    config: AblateConfig, cells: Sequence[Cell], failed: Sequence[str], folder: Path
) -> str:
    """Write everything; what a person reads first.

    Raises:
        WanError: matplotlib is not installed; all but the picture is written then.
    """
    rows = read_rows(config, cells)
    columns = (*(WORLD if config.in_world else REFERENCE), SECONDS)
    estimates = [[column.estimate(row) for column in columns] for row in rows]
    machines = sorted({one for row in rows for one in row.machines})
    notes = " ".join(
        [
            WORLD_NOTE if config.in_world else REFERENCE_NOTE,
            f"{INTERVALS} A mean over one clip has none.",
            f"Seconds are without loading{'' if config.in_world else ', encoding the prompt'} and "
            "what a first clip pays for (warmup_seconds in cells/; with it, where that is missing)."
            f" They were taken on: {'; '.join(machines)}."
            f"{' Cells of different ones do not compare in seconds.' if len(machines) > 1 else ''}"
            " Density: attention's share of the FLOPs of dense attention.",
            *([f"Failed, and not in here: {'; '.join(failed)}."] if failed else []),
        ]
    )
    head = ["setting", "steps", "density", *(column.heading for column in columns), "clips"]
    lines = [
        [row.label, str(row.plan["steps"]), f"{row.plan['density']:.1%}"]
        + [c.cell(v) for c, v in zip(columns, values, strict=True)]
        + [str(row.num_clips)]
        for row, values in zip(rows, estimates, strict=True)
    ]
    text = markdown_table(head, lines)
    (folder / "report.md").write_text(f"{text}\n\n{notes}\n", encoding="utf-8")
    flat = [_flat(row, columns, values) for row, values in zip(rows, estimates, strict=True)]
    write_json(folder / "results.json", {"notes": notes, "failed": list(failed), "rows": flat})
    _write_csv(folder / "results.csv", flat)
    write_sheet(config, cells, rows, folder / "clips.mp4")
    panels = {
        column.heading: [
            Point(row.line, values[-1], value)
            for row, values in zip(rows, estimates, strict=True)
            if (value := values[index]) is not None
        ]
        for index, column in enumerate(columns[:-1])
    }
    draw_panels(panels, folder / "report.png", "seconds per clip")
    files = "report.md, results.csv, results.json, report.png, clips.mp4"
    return f"{text}\n\n{notes}\n\n{files} in {folder}"


def _flat(
    row: Row, columns: Sequence[Column[Row]], values: Sequence[Estimate | None]
) -> dict[str, Any]:
    """A line of the CSV: how the clips were made, then each number with its interval."""
    line: dict[str, Any] = {
        "setting": row.label,
        "model": row.setting.model,
        "attention": row.setting.attention_name,
        "shift": row.setting.sampler.shift,
        **{name: row.plan[name] for name in ("sampler", "steps", "guidance_scale", "density")},
        "untrained": "; ".join(row.plan["untrained"]),
        "clips": row.num_clips,
    }
    for column, value in zip(columns, values, strict=True):
        known = {} if value is None else asdict(value)
        line[column.heading] = known.get("value")
        line |= {f"{column.heading}, {part}": known.get(part) for part in ("low", "high")}
    return line


def _write_csv(file: Path, lines: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    file.write_text(text.getvalue(), encoding="utf-8")


def write_sheet(
    config: AblateConfig, cells: Sequence[Cell], rows: Sequence[Row], file: Path
) -> None:
    """The first clip of every setting, all from one prompt and seed, side by side in one video."""
    labels = {id(row.setting): row.label for row in rows}
    first = {}
    for cell in cells:
        if (cell.seed, cell.number) == (config.seed, 0):
            first[labels[id(cell.setting)]] = read_video(cell.file.with_suffix(".mp4"))[0]
    if first:
        write_video(file, video_grid(first), config.fps or 8)
