"""Records of `infer.sample` as clips of a page.

A record may come from a stranger: what it says is shown as text, and no file that it names is
opened or linked. Its video is the mp4 of the same name beside it.
"""

import itertools
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from infer.diff.records import VideoRecord, checked
from infer.gallery.page import SEED, Clip, Measure, Page, axes_of, setting_of, write_page
from wan.errors import WanError, shortened, visible
from wan.files import read_sealed, write_text
from wan.settings import is_of

CHOSEN = ("command line", "prompt file")  # sources of a setting that somebody typed
# No axis of a page: said elsewhere on it.
LEFT_OUT = (SEED, "num_videos")
OF_MACHINE = ("device",)  # neither a model nor another setting decides it
NAMES = {"checkpoint": "model"}
NOTE = (
    "Videos of infer.sample, from the records beside them. Seconds are of all stages but loading "
    "the model. The command makes a video again from its record and says whether it is the same, "
    "bit for bit. Start it where the page was made, or, if the folder was named in full, in that "
    "folder."
)


# What infer.measure takes of a video, and the file that keeps it.
MEASURES = {
    "text": Measure("text agreement", ".2f"),
    "text_rank": Measure("own prompt", ".1%"),
    "consistency": Measure("consistency", ".2f"),
    "motion": Measure("motion, %/s", ".2f"),
}
MEASURES_FILE = "measures.json"
MEASURES_NOTE = f"Measures are those of {MEASURES_FILE}, which infer.measure wrote and explains."


def find_records(folder: Path) -> list[VideoRecord]:
    """The records of videos in a folder and below it; hidden folders are left out."""
    below = ((path, path.relative_to(folder).parts) for path in folder.rglob("*.json"))
    return read_records(
        path for path, parts in below if not any(part.startswith(".") for part in parts)
    )


def read_records(paths: Iterable[Path]) -> list[VideoRecord]:
    """The records of videos among some JSON files, in the order of their names.

    Files of another kind are no records. A video whose record cannot be read is left out with a
    line on stderr.
    """
    found = []
    for path in sorted(set(paths)):
        try:
            values = read_sealed(path)
            if "record_version" in values:
                latents = path.with_suffix(".latents.safetensors")
                found.append(VideoRecord(path, checked(values, path), latents))
        except (WanError, OSError) as error:
            if path.with_suffix(".mp4").exists():
                print(f"{error}; left out", file=sys.stderr)
    return found


def write_sweep(paths: Iterable[Path]) -> None:
    """Write a table and a page of a sweep's videos beside them, named by the first one's number.

    Those of another sweep stay: where it has that name, a number of its own comes behind.

    Args:
        paths: the records; for each folder among them there is a table and a page.
    """
    folders: dict[Path, list[Path]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path)
    for folder, own in folders.items():
        if records := read_records(own):
            number = records[0].path.name.partition("_")[0]
            table = new_table(folder, f"{number}_sweep")
            file = table.with_suffix(".html")
            page = page_of(records, folder, f"Sweep {table.stem.replace('_sweep', '')}")
            write_text(table, table_of(page))
            write_page(file, page)
            print(f"table and page of {len(records)} videos: {table}, {file}", file=sys.stderr)


def new_table(folder: Path, name: str) -> Path:
    """An empty table that no other sweep has, nor a page of its name; the first free one."""
    for number in itertools.count(1):
        table = folder / f"{name}{'' if number == 1 else f'-{number}'}.md"
        if not table.with_suffix(".html").exists():
            try:
                table.touch(exist_ok=False)  # so that no other process takes it
                break
            except FileExistsError:
                pass
    return table


def table_of(page: Page) -> str:
    """What varies, the seconds and the file of each clip, as Markdown."""
    names = list(axes_of(page.clips))
    lines = [[*names, "seconds", "video"], ["---"] * (len(names) + 2)]
    for clip in page.clips:
        seconds = "-" if clip.seconds is None else f"{clip.seconds:.2f}"
        file = clip.why if clip.video is None else clip.video.name
        lines.append([*(setting_of(clip, name) for name in names), seconds, file])
    return "".join(f"| {' | '.join(map(cell, line))} |\n" for line in lines)


def cell(value: str) -> str:
    """A text in a cell of a table."""
    return shortened(" ".join(visible(value).split()), 100).replace("|", "\\|")


def page_of(records: Sequence[VideoRecord], folder: Path, title: str) -> Page:
    """The page of some records that lies in `folder`."""
    settings = [
        {NAMES.get(name, name.removeprefix("sampler.")): value for name, value in own.items()}
        for own in (record.settings for record in records)
    ]
    names = list(dict.fromkeys(n for own in settings for n in own))
    varied = [
        name
        for name in names
        if name not in LEFT_OUT and len({text(own.get(name)) for own in settings}) > 1
    ]
    decided = chosen_by_nobody(records, settings, varied)
    varied = [name for name in varied if name not in decided]
    same = {name: text(settings[0].get(name)) for name in names if name not in (*varied, *LEFT_OUT)}
    common = {name: value for name, value in same.items() if value not in ("none", "")}
    common = {name: value for name, value in common.items() if name not in decided}
    if len({record.values["prompt"] for record in records}) == 1:
        common = {"prompt": str(records[0].values["prompt"])} | common
    measured = measures_of(records, folder)
    measures = [name for name in MEASURES if any(name in own for own in measured)]
    clips = [
        clip_of(
            record,
            folder,
            {name: text(own.get(name)) for name in varied},
            [values.get(name) for name in measures],
        )
        for record, own, values in zip(records, settings, measured, strict=True)
    ]
    return Page(
        title,
        clips,
        [NOTE, *([MEASURES_NOTE] if measures else [])],
        common,
        [MEASURES[name] for name in measures],
        aspect=aspect_of(records),
    )


def measures_of(records: Sequence[VideoRecord], folder: Path) -> list[dict[str, float]]:
    """The numbers that infer.measure has stored of each video, by measure.

    They are looked for in `folder`, and in the folders from there down to the video's own: the
    first that knows the video says them. A file that cannot be read is named on stderr.
    """
    files: dict[Path, dict[str, Any]] = {}

    def stored(place: Path) -> dict[str, Any]:
        if place not in files:
            file, files[place] = place / MEASURES_FILE, {}
            try:
                videos = read_sealed(file).get("videos") if file.is_file() else {}
                files[place] = videos if isinstance(videos, dict) else {}
            except (WanError, OSError) as error:
                print(f"{error}; no measures are shown from it", file=sys.stderr)
        return files[place]

    found = []
    for record in records:
        video = record.path.with_suffix(".mp4")
        places = [one for one in reversed(video.parents) if one.is_relative_to(folder)]
        entries = (stored(one).get(video_name(video, one)) for one in places)
        entry = next((one for one in entries if isinstance(one, dict)), {})
        values = {name: entry[name].get("value") for name in entry if isinstance(entry[name], dict)}
        found.append({n: v for n, v in values.items() if is_of(float, v)})
    return found


def video_name(video: Path, folder: Path) -> str:
    """How the measures of a folder call a video: by its path from there, or by its name alone."""
    video, folder = video.absolute(), folder.absolute()
    name = video.relative_to(folder).as_posix() if video.is_relative_to(folder) else video.name
    return name.encode("utf-8", "backslashreplace").decode()  # any name that a disk may have


def chosen_by_nobody(
    records: Sequence[VideoRecord], settings: Sequence[Mapping[str, Any]], varied: Sequence[str]
) -> list[str]:
    """Settings that vary only because the model, or what somebody typed, does.

    Most of them are the model's own; the grid of a student's steps follows from their number.
    """
    typed = [name for name in varied if name == "model" or is_typed(records, name)]
    points = [tuple(text(own.get(name)) for name in typed) for own in settings]
    found = []
    for name in varied:
        values = {(point, text(own.get(name))) for point, own in zip(points, settings, strict=True)}
        if name not in (*typed, *OF_MACHINE) and len(values) == len(set(points)) > 1:
            found.append(name)
    return found


def is_typed(records: Sequence[VideoRecord], name: str) -> bool:
    """Whether a setting, by its name on the page, was typed for one of the records."""
    names = (name, f"sampler.{name}")
    return any(source_of(record, one) in CHOSEN for record in records for one in names)


def source_of(record: VideoRecord, name: str) -> str:
    entry = record.values["settings"].get(name)
    return str(entry.get("from")) if isinstance(entry, dict) else ""


def clip_of(
    record: VideoRecord,
    folder: Path,
    settings: Mapping[str, str],
    measures: Sequence[float | None],
) -> Clip:
    """One record as a clip of the page in `folder`; no absolute path is written there."""
    values = record.values
    video: Path | None = record.path.with_suffix(".mp4")
    status = str(values.get("status", "done"))
    why = "" if status == "done" else status
    if video is not None and not video.is_file():
        video, why = None, why or "the video is not there"
    times = values.get("seconds")
    stages = {n: t for n, t in times.items() if is_of(float, t)} if isinstance(times, dict) else {}
    path = record.path.relative_to(folder) if record.path.is_absolute() else record.path
    name = f"./{path.as_posix()}"  # so that it is no option
    return Clip(
        values["prompt"],
        {**settings, SEED: str(values["seed"])},
        video,
        why,
        seconds=stages.get("total"),
        measures=measures,
        facts=[fact for fact in facts_of(values, stages, status) if fact[1]],
        command=shlex.join(["python", "-m", "infer.rerun", name]),
    )


def facts_of(
    values: Mapping[str, Any], stages: Mapping[str, float], status: str
) -> list[tuple[str, str, bool | None]]:
    """What a record says of its video besides its settings."""
    video = values.get("video") or {}
    size = [video.get(name) for name in ("frames", "height", "width", "fps")]
    shown = f"{size[0]} frames of {size[1]}x{size[2]}, {size[3]} fps" if None not in size else ""
    untrained = values.get("not_trained_for")
    return [
        ("status", "" if status == "done" else status, False),
        ("not trained for", text(untrained) if untrained else "", False),
        ("video", shown, None),
        ("stages", ", ".join(f"{n} {text(t)} s" for n, t in stages.items() if n != "total"), None),
        ("made", text(values.get("started")) if values.get("started") else "", None),
    ]


def aspect_of(records: Sequence[VideoRecord]) -> tuple[int, int]:
    """Width and height of the first video that says them."""
    for record in records:
        video = record.values.get("video") or {}
        width, height = video.get("width"), video.get("height")
        if isinstance(width, int) and isinstance(height, int) and min(width, height) > 0:
            return width, height
    return 1, 1


def text(value: Any) -> str:
    """A setting's value in words: a number in the fewest digits that tell it from all others."""
    if isinstance(value, list):
        return ", ".join(map(text, value))
    if isinstance(value, bool) or value is None:
        return "none" if value is None else str(value).lower()
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)
