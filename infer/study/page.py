"""The clips that a study keeps, side by side on one page."""

from collections.abc import Sequence
from pathlib import Path

from configs.evaluation import CAPTION_SETS, StudyConfig
from infer.evaluate.report import Column, Report, exactly
from infer.evaluate.store import cut, kept_clip
from infer.gallery.command import command, sample_command
from infer.gallery.measured import (
    aspect_of,
    measured_clip,
    measures_of,
    points_of,
    tell_not_kept,
)
from infer.gallery.page import SEED, Clip, Page
from wan.files import read_sealed

SECONDS = "seconds per video"
CAPTIONS = {"single": "one object", "pair": "two objects", "seeds": "several seeds"}


def page_of(
    config: StudyConfig,
    report: Report,
    columns: Sequence[Column],
    notes: Sequence[str],
    folder: Path,
) -> Page:
    """The page of a report.

    Args:
        columns: those of the report that are measures.
        notes: what a reader must know.
        folder: the output folder, where the page lies.
    """
    clips: list[Clip] = []
    for number, row in enumerate(report.rows):
        for captions in CAPTION_SETS:
            question = config.evaluation(row.label, captions)
            file = folder / row.label / f"{captions}.json"
            record = cut(read_sealed(file), question)
            for index, clip in enumerate(record["clips"][: config.keep_clips]):
                again = command("infer.evaluate", question, folder)
                if question.source == "model":
                    again = sample_command(question, clip["prompt"], clip["seed"], folder)
                settings = {"setting": row.label, "captions": CAPTIONS[captions]}
                if captions == "seeds":
                    settings[SEED] = str(clip["seed"])
                what = (settings, kept_clip(file, index), columns, again, number)
                clips.append(measured_clip(clip, *what))
    tell_not_kept(clips, config.keep_clips)
    seconds = [column.heading for column in report.columns].index(SECONDS)
    xs = [
        (None, None) if row.plan is None else (values[seconds], exactly(row.plan["steps"]))
        for row, values in zip(report.rows, report.estimates, strict=True)
    ]
    return Page(
        f"Study: {folder.resolve().name}",
        clips,
        notes,
        {},
        measures_of(columns),
        (SECONDS, "steps"),
        points_of(report, columns, xs),
        aspect_of(clips),
    )
