"""Video files and pictures -> clips of the sizes that training takes, or the reason why not.

A clip goes to one of several sizes (frames, height, width): one or several stretches of it are
cropped around its centre to the size's shape and scaled. Nothing is repaired: what is damaged, too
short, at another frame rate, sideways, stretched, interlaced or too far from every size is refused,
by name and with a reason.

F frames, H height, W width.
"""

import csv
import io
import math
import os
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from configs.data import MAX_REPEATS, Size, same_rate
from configs.schema import PICTURES, check_text
from wan.errors import WanError
from wan.files import parse_json, parse_json_list, read_text
from wan.media.images import check_background, is_still, load_image
from wan.media.video import (
    Frames,
    decoded_frames,
    is_transparent,
    open_video,
    rgb_frame,
    to_uint8,
    video_info,
)
from wan.settings import is_of

# How files become frames. Raise it when this file or wan/media changes what they give.
# 1 read files without a colour tag as BT.709, and took the size with most pixels; 2 reads BT.601,
# and takes the size that keeps most of the picture. 1 made pictures of retimed videos, too.
RECIPE = 2
# What a list calls a clip and its caption: here, in musubi-tuner (videos, pictures), in Hugging
# Face's folders and in FastVideo.
SPELLINGS = {
    "video": "prompt",
    "video_path": "caption",
    "image_path": "caption",
    "file_name": "text",
    "path": "cap",
}
ROW = 'video and prompt, as in {"video": "fox.mp4", "prompt": "a fox runs"}'
LISTS = (".jsonl", ".csv", ".json")
# The lists that others lay into a folder of clips.
INSIDE = ("metadata.jsonl", "metadata.csv", "videos2caption.json", "captions.json")
REPEATS = ("repeats", "num_repeats")  # fields of a list
# Fields of other trainers for control clips and masks, that nothing here does; some are numbered.
CONTROLS = (
    "control_path",
    "control_directory",
    "control_resolution",
    "no_resize_control",
    "mask_path",
    "default_mask_file",
)
NO_CONTROL = "there is no training with control clips or masks here; take it out"
VIDEOS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".gif")
PQ, HLG = 16, 18  # transfer curves of HDR, as numbers in a file
SAME_SHAPE = 0.01  # scaling to even widths leaves pixels of 1280/1281


@dataclass(frozen=True)
class Clip:
    """One entry of a data set.

    Attributes:
        name: its name in the report.
        caption: or the text file that it is read from.
        repeats: how often it comes in an epoch.
    """

    name: str
    path: Path
    caption: str | Path
    repeats: int = 1


@dataclass(frozen=True)
class ClipRules:
    """The sizes and rate that clips are brought to, and how; see `PreprocessConfig`."""

    sizes: list[Size]
    fps: float
    retime: bool
    max_crop: float
    max_upscale: float
    frames: str = "head"
    frame_stride: int | None = None
    frame_samples: int | None = None
    image_background: list[int] | None = None


def list_clips(source: Path) -> list[Clip]:
    """Every clip of a folder (sorted by name, subfolders included) or of a list, in its order.

    A folder without captions of its own that holds a list of another trainer is read by that list.
    Names match if they are the same text: macOS and others write accents in different bytes.

    Raises:
        FileNotFoundError: no such folder or list.
        WanError: nothing in it, a name that no report can hold, a link to a folder, or a list that
            can't be read, by its line.
    """
    if source.is_dir():
        clips = folder_clips(source)
    elif not source.exists():
        raise FileNotFoundError(f"clips={source}: no such folder or list")
    elif source.suffix in LISTS:
        clips = listed_clips(source)
    else:
        endings = ", ".join((*LISTS, ".toml"))
        raise WanError(f"clips={source}: give a folder, or a list ({endings})")
    return checked(clips, source)


def checked(clips: list[Clip], source: Path) -> list[Clip]:
    """The clips of a source, if there are any and a report can hold their names."""
    if not clips:
        raise WanError(f"clips={source}: no clips there ({', '.join(VIDEOS + PICTURES)})")
    for clip in clips:
        check_text(f"clips={source}: the file name {clip.name!a}", clip.name)
    return clips


def folder_clips(
    folder: Path,
    endings: tuple[str, ...] = VIDEOS + PICTURES,
    caption: str = ".txt",
    pattern: str = "**/*",
) -> list[Clip]:
    """Videos and pictures of a folder; files that are neither nor a caption are named on stderr.

    Args:
        endings: of the files that are clips.
        caption: the ending of the text files beside them.
        pattern: of the files that are looked at; by default those of subfolders too.
    """
    found = sorted(
        path
        for path in folder.glob(pattern)
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if links := [path for path in found if path.is_symlink() and path.is_dir()]:
        raise WanError(
            f"clips={folder}: {links[0].name} is a link to a folder, which is not followed; move "
            "the folder there or give a list of clips"
        )
    there = set(found)
    texts = {composed(path): path for path in found if path.name.endswith(caption)}
    clips: list[Clip] = []
    used: set[Path] = set()
    for path in found:
        if path.suffix.lower() in endings:
            beside = path.with_name(path.stem + caption)
            text = beside if beside in there else texts.get(composed(beside), beside)
            clips.append(Clip(path.relative_to(folder).as_posix(), path, text))
            used |= {path, text}
    lists = [folder / name for name in INSIDE if folder / name in there]
    if lists and not used.intersection(texts.values()):
        if len(lists) > 1:
            names = " and ".join(path.name for path in lists)
            raise WanError(f"clips={folder} holds {names}; name the one to be read: {lists[0]}")
        print(f"clips={folder}: read by its {lists[0].name}", file=sys.stderr)
        clips = listed_clips(lists[0])
        used = {*lists, *(clip.path for clip in clips)}
        why = f"not in {lists[0].name}"
    else:
        why = "neither clip nor a clip's caption"
    if others := [path for path in found if path not in used and not path.is_dir()]:
        names = ", ".join(ascii(path.relative_to(folder).as_posix()) for path in others[:3])
        print(
            f"warning: clips={folder}: {len(others)} left out, {why}: "
            f"{names}{', ...' if others[3:] else ''}",
            file=sys.stderr,
        )
    return clips


def composed(path: Path) -> str:
    """A path as text in Unicode's normal form C; the same text may be stored in several ways."""
    return unicodedata.normalize("NFC", str(path))


def listed_clips(source: Path) -> list[Clip]:
    """The clips of a list, one for each caption; paths are relative to it, or to videos/ beside it.

    The second is where FastVideo has them.
    """
    folders = (source.parent, source.parent / "videos")
    seen: dict[Path, dict[str, Path]] = {}
    clips = []
    for where, row in list_rows(source):
        name, captions = list_entry(row, f"{source}, {where}")
        repeats = entry_repeats(row, f"{source}, {where}")
        paths = [find_path(folder / name, seen) for folder in folders]
        path = next(filter(os.path.exists, paths), source.parent / name)
        clips += [Clip(name, path, caption, repeats) for caption in captions]
    return clips


def find_path(path: Path, seen: dict[Path, dict[str, Path]]) -> Path:
    """The path, or the one there is whose name is the same text.

    Args:
        seen: what folders hold, by normalised path; each is listed once.
    """
    if os.path.exists(path) or path == path.parent:
        return path
    folder = find_path(path.parent, seen)
    if folder not in seen:
        try:
            there = sorted(folder.iterdir())
        except OSError:  # whoever opens the clip says why
            there = []
        seen[folder] = {composed(Path(each.name)): each for each in there}
    return seen[folder].get(composed(Path(path.name)), path)


def list_rows(path: Path) -> list[tuple[str, Any]]:
    """(where it stands, entry) of each entry of a list."""
    text = read_text(path)
    if path.suffix == ".csv":
        return csv_rows(path, text)
    if path.suffix == ".json":
        advice = f"need an array of {ROW}, or lists of captions by file name"
        entries: list[Any]
        if text.lstrip().startswith("{"):
            by_name = parse_json(text, str(path), advice)
            if not all(isinstance(captions, list) for captions in by_name.values()):
                raise WanError(f"{path}: its JSON is not an array; {advice}")
            entries = [{"file_name": name, "text": said} for name, said in by_name.items()]
        else:
            entries = parse_json_list(text, str(path), advice)
        return [(f"entry {number}", entry) for number, entry in enumerate(entries, 1)]
    lines = [(f"line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [(at, parse_json(line, f"{path}, {at}", f"need {ROW}")) for at, line in lines]


def csv_rows(path: Path, text: str) -> list[tuple[str, Any]]:
    table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows, end = [], 1
    try:
        for row in table:
            end = table.line_num
            if any(row.get(None, [])):
                raise WanError(
                    f"{path}, line {end}: more cells than the head; write a prompt that has commas "
                    'in "quotes"'
                )
            rows.append((f"line {end}", row))
    except csv.Error as error:
        raise WanError(
            f"{path}, row after line {end}: not CSV ({error}); quotes stand around a whole prompt, "
            "and twice within it"
        ) from error
    return rows


def list_entry(row: Any, where: str) -> tuple[str, list[str]]:
    """The name of a clip and its captions, as one entry of a list has them; "" if there is none.

    Raises:
        WanError: no name, more than one field that may be the caption, or a control clip or mask.
    """
    names = [key for key in SPELLINGS if isinstance(row, dict) and row.get(key)]
    if not names or not isinstance(row[names[0]], str):
        others = ", ".join(f"{video} and {text}" for video, text in list(SPELLINGS.items())[1:])
        raise WanError(
            f"{where}: need {ROW} or under a CSV head of video,prompt; other trainers' {others} "
            "are read too"
        )
    for key, value in row.items():
        if value and re.sub(r"_\d+$", "", str(key)) in CONTROLS:
            raise WanError(f"{where}: {key}={value!r}: {NO_CONTROL}")
    own = SPELLINGS[names[0]]
    texts = dict.fromkeys(key for key in SPELLINGS.values() if row.get(key))
    keys = [own] if own in texts else list(texts)
    if len(keys) > 1:
        raise WanError(f"{where}: {' and '.join(keys)} may both be the caption; name it {own}")
    captions = row[keys[0]] if keys else ""
    return row[names[0]], captions if isinstance(captions, list) else [captions]


def entry_repeats(row: dict[str, Any], where: str) -> int:
    """How often a clip comes in an epoch, as one entry of a list has it; 1 if it does not say."""
    given = {name: row[name] for name in REPEATS if row.get(name) not in (None, "")}
    if len(given) > 1:
        raise WanError(f"{where}: {' and '.join(given)} are the same; give one of them")
    for name, value in given.items():
        number = int(value) if isinstance(value, str) and value.isdecimal() else value
        check_repeats(f"{where}: {name}", number)
        return number
    return 1


def check_repeats(name: str, value: Any) -> None:
    if not (is_of(int, value) and 1 <= value <= MAX_REPEATS):
        raise WanError(
            f"{name}={value!r}: must be a whole number from 1 to {MAX_REPEATS}; for fractions, "
            "encode the clips into several folders and give data.weights= in training"
        )


def read_prompts(path: Path, option: str = "prompts") -> list[str]:
    """The lines of a text file that are not empty; errors name the option that gave it."""
    prompts = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    if not prompts:
        raise WanError(f"{option}={path}: no prompt in it; write one per line")
    return prompts


def read_caption(clip: Clip) -> str:
    """The caption of a clip, from its list or from the text file beside it.

    Raises:
        WanError: there is none, or it is not valid UTF-8.
    """
    caption, where = clip.caption, "as its prompt"
    if isinstance(caption, Path):
        where = f"into a {caption.suffix} file of its name beside it"
        caption = read_text(caption) if caption.is_file() else ""
    if not isinstance(caption, str) or not caption.strip():
        raise WanError(f"its caption is missing; write one sentence {where}")
    check_text("prompt", caption)
    return caption.strip()


def judge_clip(clip: Clip, rules: ClipRules, facts: dict[str, Any]) -> list[list[int]]:
    """Decode all of a clip, judge it, and choose its size and the samples that are taken of it.

    Args:
        facts: filled as they become known, so that a refused clip has some too.

    Returns:
        For each sample the numbers of its frames, counted in the file from 0.

    Raises:
        WanError: the clip is refused; gives all reasons.
        OSError: it can't be read.
    """
    reasons: list[str] = []
    if is_picture(clip.path):
        _, height, width = load_image(clip.path, rules.image_background).shape
        facts.update(decoded_frames=1, height=height, width=width)
        numbers, retimed = [0], False
    else:
        reasons += scan_video(clip.path, facts, rules.image_background)
        with noted(reasons):
            check_rate(facts["fps"], rules, facts)
        numbers = frame_numbers(facts["decoded_frames"], facts["fps"], rules)
        retimed = bool(facts.get("retimed_to"))
    found = (len(numbers), facts["height"], facts["width"])
    size = rules.sizes[0]
    with noted(reasons):
        size = best_size(found, rules, facts, retimed)
    if reasons:
        raise WanError("; ".join(reasons))
    facts["size"] = "x".join(map(str, size))
    starts = sample_starts(len(numbers), size[0], rules)
    return [numbers[start : start + size[0]] for start in starts]


@contextmanager
def noted(reasons: list[str]) -> Iterator[None]:
    """Add what a `WanError` says to the reasons, and go on behind the block."""
    try:
        yield
    except WanError as error:
        reasons.append(error.on_command_line)


def is_picture(path: Path) -> bool:
    """Whether a clip is a still picture; a GIF may be either."""
    ending = path.suffix.lower()
    return ending in PICTURES or (ending == ".gif" and is_still(path))


def read_samples(
    clip: Clip,
    samples: list[list[int]],
    facts: dict[str, Any],
    background: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Decode, crop and scale samples of a judged clip: each is (3, F, H, W) in [-1, 1].

    Long files need no more memory than one sample.

    Args:
        samples: at least one of what `judge_clip` returned, in its order.
        facts: what it filled.
        background: RGB in 0..255 behind transparent pixels.
    Raises:
        WanError, OSError: the file is no longer the one that was judged.
    """
    _, height, width = map(int, facts["size"].split("x"))
    if is_picture(clip.path):
        picture = to_uint8(load_image(clip.path, background).unsqueeze(1))[0]
        yield fit_frame(picture, facts["crop"], height, width).unsqueeze(1)
        return
    wanted, waiting = {number for sample in samples for number in sample}, list(samples)
    kept: dict[int, Tensor] = {}
    with open_video(clip.path) as container:
        for number, frame in enumerate(decoded_frames(container, clip.path)):
            if number not in wanted:
                continue
            picture = rgb_frame(frame, background, f"video {clip.path}")
            kept[number] = fit_frame(picture, facts["crop"], height, width)
            if number < waiting[0][-1]:
                continue
            yield torch.stack([kept[n] for n in waiting.pop(0)], dim=1)
            if not waiting:
                return
            kept = {n: one for n, one in kept.items() if n >= waiting[0][0]}
    raise WanError(f"video {clip.path}: was changed while it was read")


def scan_video(
    path: Path, facts: dict[str, Any], background: Sequence[int] | None = None
) -> list[str]:
    """Decode all of a video and say what is wrong with it, in words, the worst first.

    Args:
        facts: what becomes known of the file is added to them.
        background: RGB in 0..255 behind transparent pixels; without it they are wrong.
    Raises:
        FileNotFoundError: there is no such file.
        WanError: not a video, or its pictures change size.
    """
    times: list[float] = []
    sizes: dict[tuple[int, int], None] = {}
    count = damaged = rotation = 0
    interlaced, transparent, broken, last = False, False, None, 0.0
    with open_video(path) as container:
        stream = container.streams.video[0]
        rate = video_info(container, 0).fps
        try:
            for frame in decoded_frames(container, path):
                count += 1
                transparent = transparent or is_transparent(frame)
                damaged += frame.is_corrupt  # parts of it are guessed
                interlaced |= frame.interlaced_frame
                rotation = frame.rotation
                sizes[frame.height, frame.width] = None
                if frame.time is not None:
                    times.append(frame.time)
                    last = float((frame.duration or 0) * (frame.time_base or 0))  # some are held
        except av.FFmpegError as error:
            broken = error.strerror
        info = video_info(container, count)
        hdr = stream.codec_context.color_trc in (PQ, HLG)
        pixel_shape = stream.sample_aspect_ratio or Fraction(1)  # 0 in a file: not known
        end = times[-1] + max(last, 1 / rate) if times and rate else math.inf
        missing = max(0.0, _declared_end(container) - end)  # seconds
    if len(sizes) > 1:
        shapes = ", ".join(f"{height}x{width}" for height, width in sizes)
        raise WanError(
            f"video {path}: its pictures change size midway ({shapes}); they must be of one size, "
            "so cut it there"
        )
    height, width = next(iter(sizes), (info.height, info.width))
    facts.update(
        declared_frames=info.declared_frames,
        decoded_frames=count,
        fps=round(rate, 4),
        height=height,
        width=width,
    )
    decoded = f"{count} could be decoded"
    counts = f"its header says {info.declared_frames} frames, {decoded}"
    fewer, cut_short = count < info.declared_frames, bool(rate) and missing > 1.5 / rate
    even = bool((abs(np.diff(times) * rate - 1) < 0.5).all())  # up to half a frame
    damage = {
        f"damaged: {decoded}, then the decoder stopped ({broken})": broken is not None,
        f"damaged: {counts}": fewer and cut_short,
        f"{counts}: cut without encoding (-c copy) or damaged; encode it anew": fewer,
        f"damaged: {decoded}, which end {missing:.3g} seconds before its header says": (
            cut_short and not info.declared_frames
        ),
        f"damaged: {damaged} of {count} frames": damaged > 0,
    }
    worst = [reason for reason, found in damage.items() if found][:1]  # one damage, told once
    flaws = {
        f"players turn it by {rotation} degrees; write it upright first": rotation != 0,
        f"its pixels are {pixel_shape} times as wide as high; make them square first "
        "(ffmpeg -vf scale=trunc(iw*sar/2)*2:ih,setsar=1)": abs(pixel_shape - 1) > SAME_SHAPE,
        "interlaced; make whole frames of it first (ffmpeg -vf bwdif)": interlaced,
        "HDR colours; convert it to bt709 first": hdr,
        "its frames come at uneven times; write it at a constant rate first": not (even or worst),
    }
    reasons = worst + [reason for reason, found in flaws.items() if found]
    if transparent:
        with noted(reasons):
            check_background(background, f"video {path}")
    return reasons


def _declared_end(container: av.container.InputContainer) -> float:
    """When pictures end, in seconds, by the header; 0 if it does not say. Sound may be longer."""
    stream = container.streams.video[0]
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if time := re.fullmatch(r"(\d+):(\d+):(\d+\.\d+)", stream.metadata.get("DURATION", "")):
        return 3600 * int(time[1]) + 60 * int(time[2]) + float(time[3])  # Matroska
    alone = len(container.streams) == 1
    return (container.duration or 0) / av.time_base if alone else 0.0


def frame_numbers(count: int, fps: float, rules: ClipRules) -> list[int]:
    """Which frames of a clip stand for one at `rules.fps`: all, or the nearest in time."""
    step = 1.0 if same_rate(fps, rules.fps) else max(1.0, fps / rules.fps)
    return [number for i in range(count) if (number := round(i * step)) < count]


def sample_starts(count: int, length: int, rules: ClipRules) -> list[int]:
    """Where samples of `length` frames start in a clip of `count`, as musubi-tuner has it.

    head: one at its start. chunk: one after the other; what is left at the end is not used. slide:
    one every `frame_stride` frames. uniform: `frame_samples` from its start to its end, with equal
    distances; fewer if the clip has not as many places.
    """
    last = count - length
    if rules.frames == "chunk":
        return list(range(0, last + 1, length))
    if rules.frames == "slide":
        assert rules.frame_stride is not None
        return list(range(0, last + 1, rules.frame_stride))
    if rules.frames == "uniform":
        assert rules.frame_samples is not None
        return sorted({int(start) for start in np.linspace(0, last, rules.frame_samples)})
    return [0]


def check_rate(rate: float, rules: ClipRules, facts: dict[str, Any]) -> None:
    """Refuse a clip whose frames per second are not those of `rules`, nor may become them."""
    retimed = not same_rate(rate, rules.fps)
    if retimed and rate < rules.fps:
        raise WanError(f"{rate:g} frames per second, fewer than fps={rules.fps:g}")
    if retimed and not rules.retime:
        raise WanError(f"{rate:g} frames per second, not fps={rules.fps:g}; retime=true picks some")
    facts["retimed_to"] = rules.fps if retimed else None


def best_size(found: Size, rules: ClipRules, facts: dict[str, Any], retimed: bool = False) -> Size:
    """The size that keeps most of the picture, then the nearest in pixels, then the longest.

    Shares of the picture within one percent of the largest count as equal: sizes are rounded to
    multiples. A size with twice the pixels is as near as one with half of them. A clip must have a
    size's frames (only a picture may become one), and keep within `max_crop` and `max_upscale`.

    Args:
        facts: what is chosen is added to them.
        retimed: the frames are some of a video's; one of them that is left is no picture.
    """
    frames, height, width = found
    reasons, fits = [], []
    for size in rules.sizes:
        name = "x".join(map(str, size))
        scale = max(size[1] / height, size[2] / width)
        crop = centre_crop(height, width, size[1] / size[2])
        kept = crop[2] * crop[3] / (height * width)
        if size[0] == 1 and (frames > 1 or retimed):
            reasons.append(f"{name}: is for pictures")
        elif frames < size[0]:
            reasons.append(f"{name}: has {frames} frames at {rules.fps:g} fps")
        elif 1 - kept > rules.max_crop:
            reasons.append(f"{name}: loses {1 - kept:.0%} of the picture")
        elif scale > rules.max_upscale:
            reasons.append(f"{name}: must be enlarged {scale:.2f} times")
        else:
            fits.append((kept, abs(math.log(scale)), size, crop, scale))
    if not fits:
        raise WanError(f"fits no size ({'; '.join(reasons)})")
    most = max(kept for kept, *_ in fits)
    fits = [fit for fit in fits if fit[0] > most - SAME_SHAPE]
    kept, _, size, crop, scale = min(fits, key=lambda fit: (fit[1], -fit[2][0]))
    facts.update(crop=crop, cropped_share=round(1 - kept, 4), scale=round(scale, 4))
    return size


def centre_crop(height: int, width: int, shape: float) -> list[int]:
    """[top, left, height, width] of the largest centred window with height / width = `shape`."""
    inner_h = min(height, max(1, round(width * shape)))
    inner_w = min(width, max(1, round(height / shape)))
    return [(height - inner_h) // 2, (width - inner_w) // 2, inner_h, inner_w]


def fit_frame(frame: Frames, crop: list[int], height: int, width: int) -> Tensor:
    """(H, W, 3) uint8 -> (3, height, width) in [-1, 1]: crop, then antialiased bilinear."""
    top, left, inner_h, inner_w = crop
    window = np.ascontiguousarray(frame[top : top + inner_h, left : left + inner_w])
    pixels = torch.from_numpy(window).permute(2, 0, 1)[None].float() / 127.5 - 1  # (1, 3, h, w)
    pixels = torch.nn.functional.interpolate(
        pixels, (height, width), mode="bilinear", antialias=True
    )
    return pixels[0].clamp(-1, 1)
