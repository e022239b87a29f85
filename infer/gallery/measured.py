"""Clips that were measured, as clips of a page: what was asked for, seen, and not there."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from infer.evaluate.report import Column, Report
from infer.gallery.page import SEED, Clip, Measure, Point, Span
from wan.errors import WanError
from wan.media.video import open_video, video_info
from wan.miniature.statistics import Estimate

ATTRIBUTES = ("size", "colour", "shape", "motion")  # in the order of a caption
NOT_KEPT = "not kept when it was made; its command makes it again"


def measured_clip(
    clip: Mapping[str, Any],
    settings: Mapping[str, str],
    video: Path,
    columns: Sequence[Column],
    command: str,
    point: int | None = None,
) -> Clip:
    """A clip as a record of `infer.evaluate` or `infer.ablate` has it.

    Args:
        settings: what tells it from other clips.
        video: where its mp4 may be.
        columns: the measures of the page.
    """
    values = {"joint": clip.get("joint"), **clip["measures"]}
    right: dict[str, list[bool]] = clip.get("right", {})
    failed = [name for name, verdicts in right.items() if not all(verdicts)]
    facts: list[tuple[str, str, bool | None]] = []
    if "seen" in clip:
        facts.append(("seen", seen_words(clip["seen"]), None))
    if right:
        passed = [name for name in right if name not in failed]
        facts.append(("as stated", ", ".join(passed) or "nothing", None))
    if failed:
        facts.append(("not as stated", ", ".join(failed), False))
    if SEED not in settings:
        facts.append((SEED, str(clip["seed"]), None))
    joint = clip.get("joint")
    there = video.is_file()
    return Clip(
        clip["prompt"],
        settings,
        video if there else None,
        "" if there else NOT_KEPT,
        seconds=clip["seconds"],
        measures=[column.of_clip(values) for column in columns],
        right=None if joint is None else bool(joint),
        failed=failed,
        facts=facts,
        command=command,
        point=point,
    )


def tell_not_kept(clips: Iterable[Clip], keep_clips: int) -> None:
    """Say how many clips `keep_clips` asks for that were stored without their video.

    Clips that are stored are not made again, so that a larger number keeps new ones only.

    Args:
        clips: those that were to be kept.
    """
    if missing := sum(clip.why == NOT_KEPT for clip in clips):
        print(
            f"keep_clips={keep_clips}: {missing} of these clips were measured before, and were not "
            "kept. The page has the command of each; to make and keep all anew, run this command "
            "with another output_dir=",
            file=sys.stderr,
        )


def seen_words(seen: Mapping[str, Any]) -> str:
    """What the detectors read, in the words of a caption."""
    objects = [
        " ".join(one[name] or f"(unclear {name})" for name in ATTRIBUTES) for one in seen["objects"]
    ]
    what = " and ".join(f"a {one}" for one in objects) or "nothing"
    return f"{what}, on {seen['background'] or 'an unclear'} background"


def points_of(
    report: Report, columns: Sequence[Column], xs: Sequence[Sequence[Estimate | None]]
) -> list[Point]:
    """The rows of a report as points of the plot.

    Args:
        columns: the measures of the page.
        xs: for each row, its values along the x axes.
    """
    chosen = [report.columns.index(column) for column in columns]
    return [
        Point(row.label, row.line, [span(x) for x in own], [span(values[i]) for i in chosen])
        for row, values, own in zip(report.rows, report.estimates, xs, strict=True)
    ]


def span(value: Estimate | None) -> Span | None:
    return None if value is None else (value.value, value.low, value.high)


def measures_of(columns: Sequence[Column]) -> list[Measure]:
    return [Measure(column.heading, column.written) for column in columns]


def aspect_of(clips: Sequence[Clip]) -> tuple[int, int]:
    """Width and height of the first clip that can be opened."""
    for clip in clips:
        if clip.video is not None:
            try:
                with open_video(clip.video) as container:
                    info = video_info(container, 0)
            except (WanError, OSError):
                continue
            return info.width, info.height
    return 1, 1
