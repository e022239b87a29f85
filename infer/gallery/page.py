"""A page that shows clips side by side, filtered, sorted, and as points of quality over time.

It is one HTML file without external parts, which opens from the disk; the clips lie beside it. Text
from prompts and names of files reaches the page as data, never as HTML.
"""

import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from wan.errors import WanError, visible
from wan.files import read_text, write_text

TEMPLATE = Path(__file__).with_name("page.html")
MARK = '<meta name="generator" content="wan-few-step">'
PROMPT, SEED = "prompt", "seed"
Span = tuple[float, float, float]  # a value, and the ends of its interval


@dataclass(frozen=True)
class Measure:
    """A number of every clip: its name, and how it is written (a format of Python, .2f or .1%)."""

    name: str
    written: str


@dataclass(frozen=True)
class Clip:
    """One clip of a page.

    Attributes:
        prompt: what it should show.
        settings: what tells it from other clips, by name; the page has rows, columns and filters
            for those that vary.
        video: the file; None if there is none.
        why: why there is none, in a few words.
        seconds: what it took to make.
        measures: a number for each measure of the page; None where nothing was measured.
        right: whether it shows all that its prompt says; None if nobody judged that.
        failed: what of the prompt it does not show.
        facts: name, text and whether that is as it should be (None: not judged), for its details.
        command: makes the clip again.
        point: which point of the page it belongs to.
    """

    prompt: str
    settings: Mapping[str, str]
    video: Path | None
    why: str = ""
    seconds: float | None = None
    measures: Sequence[float | None] = ()
    right: bool | None = None
    failed: Sequence[str] = ()
    facts: Sequence[tuple[str, str, bool | None]] = ()
    command: str = ""
    point: int | None = None


@dataclass(frozen=True)
class Point:
    """A setting in the plot: its values along each x axis and for each measure, with intervals."""

    label: str
    line: str
    xs: Sequence[Span | None]
    ys: Sequence[Span | None]


@dataclass(frozen=True)
class Page:
    """What a page shows.

    Attributes:
        notes: what a reader must know, a paragraph each.
        common: what is the same for all clips, by name.
        measures: the first is written below clips that nobody judged as right or wrong.
        x_names: the x axes of the plot.
        points: without any, each clip is a point over its seconds.
        aspect: width and height of the clips.
    """

    title: str
    clips: Sequence[Clip]
    notes: Sequence[str] = ()
    common: Mapping[str, str] = field(default_factory=dict)
    measures: Sequence[Measure] = ()
    x_names: Sequence[str] = ("seconds",)
    points: Sequence[Point] = ()
    aspect: tuple[int, int] = (1, 1)


def write_page(file: Path, page: Page) -> None:
    """Write a page; it replaces an older one.

    Raises:
        WanError: there is a file of that name which is none of these pages.
    """
    if file.exists() and MARK not in read_text(file):
        raise WanError(f"{file}: another program's file; move it away, and the page is written")
    before, after = TEMPLATE.read_text(encoding="utf-8").split("{{data}}")
    before = before.replace("{{title}}", html.escape(visible(page.title)))
    data = json.dumps(page_data(page, file.parent), separators=(",", ":"), allow_nan=False)
    write_text(file, before + data.replace("<", "\\u003c") + after)


def page_data(page: Page, folder: Path) -> dict[str, Any]:
    """What the page's script reads, as JSON has it.

    Args:
        folder: where the page lies; links start there.
    """
    axes = axes_of(page.clips)
    numbers = {name: {value: i for i, value in enumerate(values)} for name, values in axes.items()}
    rows, columns = layout(list(axes))
    return {
        "title": visible(page.title),
        "notes": list(page.notes),
        "common": list(page.common.items()),
        "prompt": page.clips[0].prompt if page.clips else "",
        "axes": [{"name": name, "values": list(values)} for name, values in axes.items()],
        "rows": rows,
        "columns": columns,
        "measures": [{"name": one.name, "format": one.written} for one in page.measures],
        "xs": list(page.x_names),
        "aspect": page.aspect,
        "points": [
            {"label": one.label, "line": one.line, "x": list(one.xs), "y": list(one.ys)}
            for one in page.points
        ],
        "clips": [
            {
                "at": [number[setting_of(one, name)] for name, number in numbers.items()],
                "video": None if one.video is None else link(one.video, folder),
                "file": None if one.video is None else visible(relative(one.video, folder)),
                "why": one.why,
                "seconds": known(one.seconds),
                "measures": [known(value) for value in one.measures],
                "right": one.right,
                "failed": list(one.failed),
                "facts": [list(fact) for fact in one.facts],
                "command": one.command,
                "point": one.point,
            }
            for one in page.clips
        ],
    }


def setting_of(clip: Clip, name: str) -> str:
    return clip.prompt if name == PROMPT else clip.settings.get(name, "none")


def axes_of(clips: Sequence[Clip]) -> dict[str, list[str]]:
    """The settings that vary, with their values in the order of the clips."""
    names = [PROMPT, *dict.fromkeys(name for clip in clips for name in clip.settings)]
    values = {name: list(dict.fromkeys(setting_of(clip, name) for clip in clips)) for name in names}
    return {name: found for name, found in values.items() if len(found) > 1}


def layout(names: Sequence[str]) -> tuple[str, str]:
    """The rows and columns that a page begins with, as its script names them."""
    others = [str(i) for i, name in enumerate(names) if name not in (PROMPT, SEED)]
    down = [str(names.index(name)) for name in (PROMPT, SEED) if name in names]
    if not others:
        return (down[0], down[1]) if len(down) > 1 else ("", "")
    if down:
        return down[0], others[0] if len(others) == 1 else "setting"
    return (others[0], others[1]) if len(others) > 1 else ("", others[0])


def link(file: Path, folder: Path) -> str:
    """The address of a file, relative to the folder of the page."""
    return quote(os.fsencode(relative(file, folder)))


def relative(file: Path, folder: Path) -> str:
    return Path(os.path.relpath(file, folder)).as_posix()


def known(value: float | None) -> float | None:
    """A number that JSON can hold."""
    return None if value is None or not math.isfinite(value) else value
