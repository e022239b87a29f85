"""Measure videos, keep the numbers, and report them: the work of `infer.measure`."""

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.measurement import MeasureConfig, MeasuringConfig
from configs.progress import SECONDS, Steps, doing
from configs.rerun import OF_A_VIDEO
from configs.schema import PARTS
from infer.diff.records import read_record
from infer.evaluate.queue import result_key, stored_record
from infer.evaluate.report import INTERVALS, Column, Report, Row, mean_of, numbers
from infer.measure.measures import (
    MEANING,
    agreement,
    consistency,
    evenly_spaced,
    flow_library,
    motion,
    rank_of_own,
)
from infer.measure.towers import CLIP, ImageTower, TowerFolder, transformers
from wan.errors import WanError
from wan.files import expanded, write_sealed
from wan.media.video import Frames, read_video
from wan.runtime.offload import resolve_device
from wan.weights.digests import sha256_file

FORMAT = 1  # of what is stored: numbers of another are measured again
MOST_LISTED = 24  # videos: of more, the single numbers are in the file only
COLUMNS = {
    "text": Column("text agreement", ".2f", mean_of("text"), ("text",)),
    "text_rank": Column("own prompt", ".1%", mean_of("text_rank"), ("text_rank",)),
    "consistency": Column("consistency", ".2f", mean_of("consistency"), ("consistency",)),
    "motion": Column("motion, %/s", ".2f", mean_of("motion"), ("motion",)),
}
Values = Mapping[str, float | None]  # measure -> number
# Settings that tell kinds of videos apart, and not single ones.
OF_A_KIND = {"checkpoint", *PARTS, *OF_A_VIDEO, "lora", "lora_2"} - {"prompt", "seed"}


@dataclass(frozen=True)
class Video:
    """A video to measure.

    Attributes:
        label: of its kind; videos of one label are averaged.
    """

    file: Path
    prompt: str
    label: str = ""


class Towers:
    """The networks that the measures need, loaded when the first video needs them."""

    def __init__(self, config: MeasuringConfig, device: str) -> None:
        """Find the networks' files and the libraries, so that nothing missing is found later.

        Raises:
            WanError: something is missing.
        """
        measures = self.measures = tuple(config.measures)
        self.sampled_frames, self._device = config.sampled_frames, resolve_device(device)
        own_image_tower = config.image_tower is not None
        self._clip_folder = self._image_folder = None
        if "text" in measures or ("consistency" in measures and not own_image_tower):
            self._clip_folder = TowerFolder.find("clip_model", config.clip_model)
        if "consistency" in measures and config.image_tower is not None:
            self._image_folder = TowerFolder.find("image_tower", config.image_tower)
        if self._clip_folder is not None or self._image_folder is not None:
            transformers()
        if "motion" in measures:
            flow_library()

    def identity(self) -> dict[str, dict[str, str]]:
        """What a report says of the networks."""
        named = {"clip_model": self._clip_folder, "image_tower": self._image_folder}
        return {name: folder.identity() for name, folder in named.items() if folder is not None}

    @cached_property
    def clip(self) -> CLIP:
        assert self._clip_folder is not None
        with doing(f"loading {self._clip_folder.given}"):
            return CLIP(self._clip_folder, self._device)

    @cached_property
    def image_tower(self) -> ImageTower:
        if self._image_folder is None:
            return self.clip
        with doing(f"loading {self._image_folder.given}"):
            return ImageTower(self._image_folder, "image_tower", self._device)


@dataclass(frozen=True)
class Measured:
    """Numbers of videos.

    Attributes:
        values: video's file -> measure -> its number; None where a video has none. Files that
            can't be read are not in it.
        networks: what the numbers were measured with.
        prompts_cut: how many of the prompts are longer than CLIP reads.
    """

    values: Mapping[Path, Values]
    networks: Mapping[str, Mapping[str, str]]
    prompts_cut: int


def measure(videos: Sequence[Video], towers: Towers, store: Path) -> Measured:
    """The numbers of videos; those that the store holds are not measured again.

    A video that can't be read is named and left out.

    Args:
        store: a JSON file, written every ten seconds and at the end. What it holds of other videos
            stays in it.
    Raises:
        WanError: a network can't be read. What was measured before is stored.
    """
    prompts = sorted({video.prompt for video in videos})
    identity = towers.identity()
    question = [FORMAT, identity, towers.sampled_frames, towers.measures, prompts]
    record = stored_record(store, "what was measured before") or {}
    entries: dict[str, dict[str, Any]] = record.get("videos", {})
    values: dict[Path, Values] = {}
    missing: list[tuple[Video, str]] = []
    for video in videos:
        if not video.file.is_file():
            print(f"not measured: {video.file}: no such file", file=sys.stderr)
            continue
        key = result_key([*question, video.prompt, sha256_file(video.file)])
        entry = entries.get(name_in(store, video.file), {})
        if entry.get("key") == key:
            values[video.file] = entry["values"]
        else:
            missing.append((video, key))
    texts = too_long = None
    if "text" in towers.measures and missing:
        texts, too_long = towers.clip.texts(prompts)

    def write() -> None:
        write_sealed(store, {"networks": identity, "videos": dict(sorted(entries.items()))})

    written = time.monotonic()
    try:
        with Steps("videos", len(videos), len(values)) as steps:
            for video, key in missing:
                try:
                    frames, about = read_video(video.file)
                except (WanError, OSError) as error:
                    steps.print(f"not measured: {error}")
                    continue
                own = prompts.index(video.prompt)
                found = measure_one(frames, about.fps, own, texts, towers)
                values[video.file] = found
                is_cut = too_long is not None and too_long[own]
                entry = {"key": key, "prompt": video.prompt, "prompt_cut": is_cut}
                entries[name_in(store, video.file)] = entry | {"values": found}
                steps.add()
                if time.monotonic() - written > SECONDS:
                    write()
                    written = time.monotonic()
    finally:
        if missing:
            write()
    own_entries = [entries[name_in(store, file)] for file in values]
    cut = {entry["prompt"] for entry in own_entries if entry["prompt_cut"]}
    return Measured(values, identity, len(cut))


def name_in(store: Path, video: Path) -> str:
    """What a video is called in the store: its path from there, or its name alone."""
    video, folder = video.absolute(), store.absolute().parent
    return video.relative_to(folder).as_posix() if video.is_relative_to(folder) else video.name


def measure_one(
    frames: Frames, fps: float, own: int, texts: Tensor | None, towers: Towers
) -> dict[str, float | None]:
    """The numbers of one video.

    Args:
        frames: (F, H, W, 3) RGB.
        own: which of the prompts is the video's.
        texts: (P, D), the prompts' embeddings; None if no text is asked for.
    """
    looked_at = evenly_spaced(frames, towers.sampled_frames)
    found: dict[str, float | None] = {}
    by_clip: Tensor | None = None
    if texts is not None:
        by_clip = towers.clip.frames(looked_at)
        values = agreement(by_clip, texts)
        found |= {"text": values[own], "text_rank": rank_of_own(values, own)}
    if "consistency" in towers.measures:
        same = by_clip is not None and towers.image_tower is towers.clip
        found["consistency"] = consistency(
            by_clip if same and by_clip is not None else towers.image_tower.frames(looked_at)
        )
    if "motion" in towers.measures:
        found["motion"] = motion(frames, fps)
    return found


def notes(measured: Measured, sampled_frames: int) -> list[str]:
    """What a reader of the numbers must know."""
    names = {name for values in measured.values.values() for name in values}
    lines = [MEANING[name] for name in MEANING if name in names]
    for name, network in measured.networks.items():
        commit = f" at {network['commit']}" if "commit" in network else ""
        lines.append(f"{name}: {network['given']}{commit}.")
    if measured.networks:
        lines.append(f"Networks look at {sampled_frames} frames of each video, evenly spaced.")
    if measured.prompts_cut:
        lines.append(
            f"{measured.prompts_cut} of the prompts are longer than CLIP reads; it saw their start."
        )
    return lines


# --- the command ----------------------------------------------------------------------------------


def measure_videos(config: MeasureConfig) -> int:
    """The command: find, measure, print."""
    if not config.videos:
        raise WanError("which videos? python -m infer.measure outputs, or one mp4 or record")
    place = expanded(config.videos)
    folder = place if place.is_dir() else place.parent
    towers = Towers(config, config.device)
    videos = find_videos(place)
    store = expanded(config.output) if config.output else folder / "measures.json"
    measured = measure(videos, towers, store)
    videos = [video for video in videos if video.file in measured.values]
    if not videos:
        raise WanError(f"{place}: none of its videos can be read")
    report = Report(rows_of(videos, measured), columns_of(measured))
    if len(videos) <= MOST_LISTED:
        print(listing(videos, measured, folder))
    print(report.table({}, {"videos": lambda row: str(len(row.values["videos"]))}))
    print("\n" + "\n".join([*notes(measured, config.sampled_frames), INTERVALS, str(store)]))
    return 0


def find_videos(place: Path) -> list[Video]:
    """The videos with their prompts, labelled by the settings that differ.

    Raises:
        OSError: there is no such file.
        WanError: no video is there, or the one that is named has no record.
    """
    if place.is_dir():
        found = list(_records_below(place))
        if not found:
            raise WanError(f"{place}: no video of infer.sample with its record in it")
    else:
        record = read_record(str(place))
        name = (record.values.get("video") or {}).get("file")
        video = record.path.with_name(name) if record.path.suffix == ".json" and name else place
        found = [(video, record.values["prompt"], record.settings)]
    varied = {
        name: None
        for _, _, settings in found
        for name, value in settings.items()
        if name in OF_A_KIND and value != found[0][2].get(name)
    }
    return [
        Video(file, prompt, ", ".join(f"{name}={settings.get(name)}" for name in varied))
        for file, prompt, settings in found
    ]


def _records_below(folder: Path) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """The finished videos below a folder: file, prompt and settings. Others are named on stderr."""
    for path in sorted(folder.rglob("*.mp4")):
        try:
            record = read_record(str(path))
        except WanError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        yield path, record.values["prompt"], record.settings


def columns_of(measured: Measured) -> list[Column]:
    names = {name for values in measured.values.values() for name in values}
    return [column for name, column in COLUMNS.items() if name in names]


def rows_of(videos: Sequence[Video], measured: Measured) -> list[Row]:
    """A row for each label."""
    rows = []
    for label in dict.fromkeys(video.label for video in videos):
        own = [measured.values[video.file] for video in videos if video.label == label]
        values = {name: numbers(one[name] for one in own) for name in own[0]}
        values["videos"] = torch.ones(len(own))
        rows.append(Row(label or "all", label, None, [], values))
    return rows


def listing(videos: Sequence[Video], measured: Measured, folder: Path) -> str:
    """A line for each video."""
    columns = columns_of(measured)
    names = [name for name, column in COLUMNS.items() if column in columns]
    lines = [["video", *(column.heading for column in columns), "prompt"]]
    for video in videos:
        values = [measured.values[video.file][name] for name in names]
        cells = [
            "-" if value is None or math.isnan(value) else format(value, column.written)
            for value, column in zip(values, columns, strict=True)
        ]
        prompt = " ".join(video.prompt.split())
        short = prompt if len(prompt) <= 60 else prompt[:59] + "…"
        file = video.file.relative_to(folder) if video.file.is_relative_to(folder) else video.file
        lines.append([str(file), *cells, short])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [map(str.ljust, line, widths) for line in lines]
    return "".join("  ".join(cells).rstrip() + "\n" for cells in padded)
