"""Measure videos, keep the numbers, and report them: the work of `infer.measure`."""

import math
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.measurement import MeasureConfig, MeasuringConfig
from configs.progress import SECONDS, Steps, doing
from infer.diff.records import read_record
from infer.evaluate.queue import result_key, stored_record
from infer.evaluate.report import INTERVALS, Column, Report, Row, mean_of, numbers
from infer.gallery.page import SEED
from infer.gallery.records import MEASURES, MEASURES_FILE, find_records, page_of, video_name
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
TEXT, RANK = "text", "text_rank"
COLUMNS = {n: Column(one.name, one.written, mean_of(n), (n,)) for n, one in MEASURES.items()}
Values = Mapping[str, float | None]  # measure -> number


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
        if {"text", "consistency"} & set(measures):
            transformers()
        self._clip_folder = self._image_folder = None
        if "text" in measures or ("consistency" in measures and config.image_tower is None):
            self._clip_folder = TowerFolder.find("clip_model", config.clip_model)
        if "consistency" in measures and config.image_tower is not None:
            self._image_folder = TowerFolder.find("image_tower", config.image_tower)
        if "motion" in measures:
            flow_library()

    def identity(self) -> dict[str, dict[str, str]]:
        """What a report says of the networks."""
        named = {"clip_model": self._clip_folder, "image_tower": self._image_folder}
        return {name: folder.identity() for name, folder in named.items() if folder is not None}

    def keys(
        self, digest: str, prompt: str, prompts: Sequence[str], identity: Mapping[str, Any]
    ) -> dict[str, str]:
        """All that each number of a video depends on, as a sha256 by measure.

        Args:
            digest: sha256 of the video's file.
            prompts: of all videos, which the rank compares with.
            identity: see `identity`.
        """
        seen = [FORMAT, digest, self.sampled_frames]
        found: dict[str, str] = {}
        if TEXT in self.measures:
            text = [*seen, identity["clip_model"], prompt, prompts]  # both numbers at once
            found |= {name: result_key([name, *text]) for name in (TEXT, RANK)}
        if "consistency" in self.measures:
            tower = identity.get("image_tower", identity.get("clip_model"))
            found["consistency"] = result_key(["consistency", *seen, tower])
        if "motion" in self.measures:
            found["motion"] = result_key(["motion", FORMAT, digest])
        return found

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


class Store:
    """What was measured, in a JSON file: each number of each video, with what it depends on.

    Attributes:
        file: written as a whole; what it holds of other videos and measures stays in it.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        record = stored_record(file, "what was measured before") or {}
        self._videos: dict[str, dict[str, Any]] = record.get("videos", {})
        self._networks: dict[str, Any] = record.get("networks", {})
        self._written = time.monotonic()

    def known(self, video: Path, keys: Mapping[str, str]) -> dict[str, Any]:
        """What is stored of a video under these keys, by measure: "value" and more."""
        found = self._videos.get(self._name(video), {})
        return {n: found[n] for n, key in keys.items() if n in found and found[n]["key"] == key}

    def put(
        self, video: Path, found: Mapping[str, dict[str, Any]], networks: Mapping[str, Any]
    ) -> None:
        """Keep numbers of a video; every ten seconds they are written."""
        self._videos.setdefault(self._name(video), {}).update(found)
        self._networks |= networks
        if time.monotonic() - self._written > SECONDS:
            self.write()

    def write(self) -> None:
        videos = dict(sorted(self._videos.items()))
        write_sealed(self.file, {"networks": self._networks, "videos": videos})
        self._written = time.monotonic()

    def _name(self, video: Path) -> str:
        return video_name(video, self.file.parent)


def measure(videos: Sequence[Video], towers: Towers, store: Store) -> Measured:
    """The numbers of videos; those that the store holds are not measured again.

    A video that can't be read is named and left out.

    Raises:
        WanError: a network can't be read. What was measured before is stored.
    """
    prompts = sorted({video.prompt for video in videos})
    identity = towers.identity()
    names = {name: result_key([one])[:16] for name, one in identity.items()}
    networks = {names[name]: one for name, one in identity.items()}
    tower = "image_tower" if "image_tower" in identity else "clip_model"
    used = {TEXT: names.get("clip_model"), RANK: names.get("clip_model")}
    used["consistency"] = names.get(tower)
    stored: dict[Path, dict[str, Any]] = {}
    missing: list[tuple[Video, dict[str, str]]] = []
    for video in videos:
        if not video.file.is_file():
            print(f"not measured: {video.file}: no such file", file=sys.stderr)
            continue
        keys = towers.keys(sha256_file(video.file), video.prompt, prompts, identity)
        stored[video.file] = store.known(video.file, keys)
        if new := {name: key for name, key in keys.items() if name not in stored[video.file]}:
            missing.append((video, new))
    texts = too_long = None
    if any(TEXT in new for _, new in missing):
        texts, too_long = towers.clip.texts(prompts)
    try:
        with Steps("videos", len(videos), len(videos) - len(missing)) as steps:
            for video, new in missing:
                try:
                    frames, about = read_video(video.file)
                except (WanError, OSError) as error:
                    print(f"not measured: {error}", file=sys.stderr)
                    del stored[video.file]
                    continue
                own = prompts.index(video.prompt)
                numbers = measure_one(frames, about.fps, own, texts, towers, new)
                found = {
                    name: {"value": numbers[name], "key": key, "network": used.get(name)}
                    for name, key in new.items()
                }
                if too_long is not None and TEXT in found:
                    found[TEXT]["prompt_cut"] = too_long[own]
                stored[video.file] |= found
                store.put(video.file, found, networks)
                steps.add()
    finally:
        if missing:
            store.write()
    cut = {v.prompt for v in videos if stored.get(v.file, {}).get(TEXT, {}).get("prompt_cut")}
    values = {
        file: {name: found[name]["value"] for name in COLUMNS if name in found}
        for file, found in stored.items()
    }
    return Measured(values, identity, len(cut))


def measure_one(
    frames: Frames,
    fps: float,
    own: int,
    texts: Tensor | None,
    towers: Towers,
    wanted: Collection[str],
) -> dict[str, float | None]:
    """Numbers of one video, by measure.

    Args:
        frames: (F, H, W, 3) RGB.
        own: which of the prompts is the video's.
        texts: (P, D), the prompts' embeddings; None if no text is asked for.
        wanted: the measures to take, of `COLUMNS`.
    """
    looked_at = evenly_spaced(frames, towers.sampled_frames)
    found: dict[str, float | None] = {}
    seen: Tensor | None = None
    if texts is not None and TEXT in wanted:
        seen = towers.clip.frames(looked_at)
        values = agreement(seen, texts)
        found |= {TEXT: values[own], RANK: rank_of_own(values, own)}
    if "consistency" in wanted:
        if seen is None or towers.image_tower is not towers.clip:
            seen = towers.image_tower.frames(looked_at)
        found["consistency"] = consistency(seen)
    if "motion" in wanted:
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
    store = expanded(config.output) if config.output else folder / MEASURES_FILE
    measured = measure(videos, towers, Store(store))
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
        WanError: there is no such place, no video, or the one that is named has no record.
    """
    if place.is_dir():
        records = find_records(place)
        strangers = {path.resolve() for path in place.rglob("*.mp4")}
        strangers -= {record.path.with_suffix(".mp4").resolve() for record in records}
        if strangers:
            print(f"left out: {len(strangers)} mp4 files without a record", file=sys.stderr)
    elif any(place.with_name(place.name + ending).exists() for ending in ("", ".json")):
        records = [read_record(str(place))]
    else:
        raise WanError(f"{place}: no such file or folder")
    clips = page_of(records, place if place.is_dir() else place.parent, "").clips if records else []
    videos = []
    for record, clip in zip(records, clips, strict=True):
        file = record.path.with_suffix(".mp4")  # the name that a record says is not opened
        label = ", ".join(
            f"{name}={value}" for name, value in clip.settings.items() if name != SEED
        )
        if record.values.get("status", "done") == "done" or file.is_file():
            videos.append(Video(file, clip.prompt, label))
    if not videos:
        raise WanError(f"{place}: no video of infer.sample with its record in it")
    return videos


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
