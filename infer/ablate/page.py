"""The clips of a grid, side by side on one page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.ablation import AblateConfig, Setting
from infer.ablate.cell import Cell
from infer.evaluate.report import Report, Row, exactly
from infer.gallery.command import sample_command
from infer.gallery.measured import (
    aspect_of,
    measured_clip,
    measures_of,
    points_of,
    tell_not_kept,
)
from infer.gallery.page import SEED, Clip, Page
from infer.measure.run import Measured


def page_of(
    config: AblateConfig,
    cells: Sequence[Cell],
    settings: Sequence[tuple[Setting, Row]],
    report: Report,
    notes: Sequence[str],
    folder: Path,
    measured: Measured | None = None,
) -> Page:
    """The page of a report.

    Args:
        cells: all that are stored.
        settings: the rows of the report; seconds are its last column.
        folder: the output folder, where the page lies.
        measured: more numbers of the cells' clips.
    """
    axes = [setting.axes() for setting, _ in settings]
    varied = [name for name in axes[0] if len({own[name] for own in axes}) > 1]
    columns = list(report.columns[:-1])
    clips: list[Clip] = []
    to_keep: list[Clip] = []
    for number, (setting, row) in enumerate(settings):
        own = {name: axes[number][name] for name in varied}
        for cell in (one for one in cells if one.setting is setting):
            seed = {SEED: str(cell.seed)} if config.num_seeds > 1 else {}
            more = {} if measured is None else measured.values.get(cell.video(0), {})
            for index, clip in enumerate(cell.record()["clips"]):
                clip["measures"] |= more
                command = command_of(config, setting, row, clip, folder)
                what = (own | seed, cell.video(index), columns, command, number)
                clips.append(measured_clip(clip, *what))
                to_keep += clips[-1:] if index < config.keep_clips else []
    tell_not_kept(to_keep, config.keep_clips)
    seconds = [values[-1] for values in report.estimates]
    steps = [exactly(row.plan["steps"]) if row.plan else None for row in report.rows]
    return Page(
        f"Ablation: {folder.resolve().name}",
        clips,
        notes,
        {name: value for name, value in axes[0].items() if name not in varied},
        measures_of(columns),
        (report.columns[-1].heading, "steps"),
        points_of(report, columns, list(zip(seconds, steps, strict=True))),
        aspect_of(clips),
    )


def command_of(
    config: AblateConfig, setting: Setting, row: Row, clip: dict[str, Any], folder: Path
) -> str:
    """The command that makes one clip of a setting again."""
    question = config.evaluation(setting)
    own: dict[str, Any] = {"fps": config.fps}
    if not config.in_world:
        names = ("height", "width", "num_frames", "max_sequence_length")
        own |= {name: getattr(config, name) for name in names}
        if row.plan is not None and row.plan["guidance_scale"] > 1:
            own["negative_prompt"] = config.negative_prompt
            own["guidance_scale_2"] = config.guidance_scale_2
    return sample_command(question, clip["prompt"], clip["seed"], folder, **own)
