"""The dataset files of musubi-tuner and diffusion-pipe (TOML) -> clips.

Folders, lists, captions and repeats are taken as they stand there. What else such a file says of
clips (sizes, frames) is an option of `train.preprocess` here: the options must say the same, or the
error gives those that do. Fields that belong to training, or that nothing here does, are named.

Source of the fields: musubi-tuner, docs/dataset_config.md; diffusion-pipe, examples/dataset.toml
and utils/dataset.py.
"""

import math
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from configs.data import FRAMES, PreprocessConfig
from configs.schema import PICTURES
from train.clips import (
    LISTS,
    NO_CONTROL,
    VIDEOS,
    Clip,
    check_repeats,
    checked,
    folder_clips,
    listed_clips,
)
from wan.errors import WanError
from wan.files import MAX_JSON_BYTES, expanded, read_text
from wan.settings import value_is

NEAR_AREA = (
    0.8,
    1.15,
)  # sizes are rounded to multiples, so their pixels are nearly those asked for
NEAR_SHAPE = 0.15  # of the logarithm of width / height
LARGEST = 100_000  # frames, or pixels of a side
NARROWEST = 0.01  # width / height of a frame, or the other way round
MULTIPLE = 32  # that suggested heights and widths are rounded to
Table = dict[str, Any]


@dataclass(frozen=True)
class Field:
    """What becomes of one field.

    Attributes:
        kinds: the types that it may have.
        note: printed where the field is given: it is an option elsewhere.
        refused: why the file is refused that gives it, unless with a value of `harmless`.
    """

    kinds: tuple[type, ...]
    note: str = ""
    refused: str = ""
    harmless: tuple[Any, ...] = ()


TEXT, WHOLE, TRUTH, LIST = (str,), (int,), (bool,), (list,)
NO_SHUFFLE = "captions are taken as they are; give several captions per clip in a list instead"
OTHER_MODEL = "it is for another model; take it out"

MUSUBI_SHARED = {
    "resolution": Field((list, int)),
    "enable_bucket": Field(TRUTH),
    "bucket_no_upscale": Field(TRUTH),
    "caption_extension": Field(TEXT),
    "num_repeats": Field(WHOLE),
    "batch_size": Field(WHOLE, note="it is batch_size= of train.finetune"),
}
MUSUBI = MUSUBI_SHARED | {
    "video_directory": Field(TEXT),
    "video_jsonl_file": Field(TEXT),
    "image_directory": Field(TEXT),
    "image_jsonl_file": Field(TEXT),
    "target_frames": Field(LIST),
    "frame_extraction": Field(TEXT),
    "frame_stride": Field(WHOLE),
    "frame_sample": Field(WHOLE),
    "max_frames": Field(WHOLE, note="only frame_extraction=full reads it"),
    "source_fps": Field(
        (float,), note="each file says its own rate; fps= and retime=true bring them to one"
    ),
    "cache_directory": Field(TEXT, note="latents and texts go to output_dir="),
    "control_directory": Field(TEXT, refused=NO_CONTROL),
    "no_resize_control": Field(TRUTH, refused=NO_CONTROL, harmless=(False,)),
    "control_resolution": Field((list, int), refused=NO_CONTROL),
    "multiple_target": Field(TRUTH, refused=OTHER_MODEL, harmless=(False,)),
    "fp_latent_window_size": Field(WHOLE, refused=OTHER_MODEL),
    "fp_1f_clean_indices": Field(LIST, refused=OTHER_MODEL),
    "fp_1f_target_index": Field(WHOLE, refused=OTHER_MODEL),
    "fp_1f_no_post": Field(TRUTH, refused=OTHER_MODEL, harmless=(False,)),
}
PLACES = ("video_directory", "video_jsonl_file", "image_directory", "image_jsonl_file")

PIPE_SHARED = {
    "resolutions": Field(LIST),
    "size_buckets": Field(LIST),
    "frame_buckets": Field(LIST),
    "enable_ar_bucket": Field(TRUTH),
    "min_ar": Field((float,)),
    "max_ar": Field((float,)),
    "num_ar_buckets": Field(WHOLE),
    "ar_buckets": Field(LIST),
    "num_repeats": Field((int, float)),
    "shuffle_metadata": Field(TRUTH, note="clips come in an order by the seed= of train.finetune"),
    "skip_empty_caption": Field(
        TRUTH, refused="clips without a caption are set aside; write captions", harmless=(True,)
    ),
    "shuffle_tags": Field(TRUTH, refused=NO_SHUFFLE, harmless=(False,)),
    "cache_shuffle_num": Field(WHOLE, refused=NO_SHUFFLE, harmless=(0,)),
    "cache_shuffle_delimiter": Field(TEXT, note="only cache_shuffle_num reads it"),
    "caption_prefix": Field(TEXT, refused="write it into the captions", harmless=("",)),
    "online_captions": Field(TRUTH, refused="take it out: captions are encoded", harmless=(False,)),
    "subsample_ratio": Field((float,), refused="list the clips that are to be used in clips="),
}
PIPE = PIPE_SHARED | {
    "path": Field(TEXT),
    "mask_path": Field(TEXT, refused=NO_CONTROL),
    "default_mask_file": Field(TEXT, refused=NO_CONTROL),
    "control_path": Field(TEXT, refused=NO_CONTROL),
}


@dataclass(frozen=True)
class Source:
    """One folder or list of clips, and what the file asks for them.

    Attributes:
        where: its place in the file, for messages.
        path: as the file has it.
        endings: of the files that are its clips.
        lengths: frames of samples; 1 is for pictures.
        area: pixels of a frame.
        shapes: width / height of frames; empty: any.
        options: of `train.preprocess`, that are to have these values.
        caption: the ending of its text files.
        sizes: as in `sizes=`, in place of lengths, area and shapes.
        upscale: whether frames may be enlarged.
    """

    where: str
    path: str
    endings: tuple[str, ...]
    repeats: int
    lengths: tuple[int, ...]
    area: float
    shapes: tuple[float, ...]
    options: Table = field(default_factory=dict)
    caption: str = ".txt"
    sizes: tuple[str, ...] = ()
    upscale: bool = True


def toml_clips(path: Path, config: PreprocessConfig) -> list[Clip]:
    """The clips of a dataset file.

    Raises:
        FileNotFoundError: no such file.
        WanError: it can't be read, has a field that is not known or that nothing here does, or asks
            for other sizes or frames than the options; says which options would do.
    """
    table = parse_toml(path)
    notes: dict[str, None] = {}
    if "datasets" in table:
        sources = musubi_sources(table, path, notes)
    elif "directory" in table:
        sources = pipe_sources(table, path, notes)
    else:
        raise WanError(
            f"clips={path}: neither musubi-tuner's ([[datasets]]) nor diffusion-pipe's "
            "([[directory]]) dataset file"
        )
    videos = [one for one in sources if one.endings != PICTURES]
    for name in ("area", "shapes", "sizes", "upscale"):
        check_agreement(path, sources, name)
    for name in ("lengths", "options"):
        check_agreement(path, videos, name)
    check_options(path, sources, videos, config, notes)
    for note in notes:
        print(f"clips={path}: {note}", file=sys.stderr)
    places = [place_of(path, source) for source in sources]
    names = unique_names(places)
    pairs = zip(sources, places, strict=True)
    return checked([clip for one, at in pairs for clip in clips_of(path, one, at, names[at])], path)


def parse_toml(path: Path) -> Table:
    try:
        return tomllib.loads(read_text(path, MAX_JSON_BYTES))
    except WanError:
        raise
    except (ValueError, RecursionError) as error:
        raise WanError(f"clips={path}: not valid TOML ({error})") from error


def place_of(path: Path, source: Source) -> Path:
    """The folder or list of a source, whose path is relative to the file, or to where the command
    runs, as the other trainers have it."""
    written = expanded(source.path)
    place = path.parent / written if (path.parent / written).exists() else written
    if not place.exists():
        raise WanError(f"clips={path}, {source.where}: {source.path}: no such folder or list")
    return place


def unique_names(places: Iterable[Path]) -> dict[Path, str]:
    """The last part of each path, or as many of its last parts as no other path there ends with."""
    parts = {place: place.resolve().parts for place in places}
    names = {}
    for place, own in parts.items():
        others = [other for other in parts.values() if other != own]
        count = 1
        while any(other[-count:] == own[-count:] for other in others):
            count += 1
        names[place] = place.name if count == 1 else "/".join(own[-count:])
    return names


def clips_of(path: Path, source: Source, place: Path, name: str) -> list[Clip]:
    """The clips of a source's folder or list; their names begin with its name."""
    if place.is_dir():
        found = folder_clips(place, source.endings, source.caption, "*")
    elif place.suffix in LISTS:
        found = listed_clips(place)
    else:
        raise WanError(
            f"clips={path}, {source.where}: {source.path}: need a folder or a list "
            f"({', '.join(LISTS)})"
        )
    if not found:
        raise WanError(
            f"clips={path}, {source.where}: {source.path}: no clips there "
            f"({', '.join(source.endings)})"
        )
    return [
        replace(clip, name=f"{name}/{clip.name}", repeats=clip.repeats * source.repeats)
        for clip in found
    ]


def read_fields(
    table: Any, known: Mapping[str, Field], where: str, notes: dict[str, None]
) -> Table:
    """The fields of a table, if all are known and of their types; notes are added."""
    if not isinstance(table, dict):
        raise WanError(f"{where}: not a table of fields")
    for name, value in table.items():
        if name not in known:
            raise WanError(f"{where}: {name}: not a known field; known are {', '.join(known)}")
        about = known[name]
        if not any(value_is(kind, value) for kind in about.kinds):
            words = " or ".join(kind.__name__ for kind in about.kinds)
            raise WanError(f"{where}: {name}={value!r}: must be of type {words}")
        if about.refused and value not in about.harmless:
            raise WanError(f"{where}: {name}={value!r}: {about.refused}")
        if about.note:
            notes[f"{name}: {about.note}"] = None
    return table


def tables(table: Table, name: str, where: str) -> list[Any]:
    found = table[name]
    if not isinstance(found, list) or not found:
        raise WanError(f"{where}: write it as [[{name}]]")
    return found


def whole(values: Any, where: str, count: int | None = None) -> list[int]:
    """A list of whole numbers from 1 to `LARGEST`."""
    good = isinstance(values, list) and all(value_is(int, n) and 1 <= n <= LARGEST for n in values)
    if not good or not values or (count is not None and len(values) != count):
        amount = "" if count is None else f"{count} "
        raise WanError(
            f"{where}={values!r}: need a list of {amount}whole numbers from 1 to {LARGEST}"
        )
    return values


# --- musubi-tuner ---------------------------------------------------------------------------------


def musubi_sources(table: Table, path: Path, notes: dict[str, None]) -> list[Source]:
    if more := [name for name in table if name not in ("general", "datasets")]:
        raise WanError(f"clips={path}: {more[0]}: not a known table; known are general, datasets")
    general = read_fields(
        table.get("general", {}), MUSUBI_SHARED, f"clips={path}, [general]", notes
    )
    sources = []
    for number, one in enumerate(tables(table, "datasets", f"clips={path}, datasets"), 1):
        where = f"[[datasets]] {number}"
        about = f"clips={path}, {where}"
        fields = general | read_fields(one, MUSUBI, about, notes)
        given = [name for name in PLACES if name in fields]
        if len(given) != 1:
            raise WanError(f"{about}: need one of {', '.join(PLACES)}, not {len(given)} of them")
        sources.append(musubi_source(fields, given[0], where, about, notes))
    return sources


def musubi_source(
    fields: Table, place: str, where: str, about: str, notes: dict[str, None]
) -> Source:
    """One of [[datasets]], with the defaults of musubi-tuner."""
    is_video = place.startswith("video")
    size = fields.get("resolution", [960, 544])
    width, height = whole([size] * 2 if isinstance(size, int) else size, f"{about}: resolution", 2)
    how = fields.get("frame_extraction", "head")
    if how not in FRAMES:
        raise WanError(
            f"{about}: frame_extraction={how!r}: frames= has {', '.join(FRAMES)}; several lengths "
            "in sizes= with frames=head take the longest that a clip has"
        )
    lengths = whole(fields.get("target_frames", [1]), f"{about}: target_frames")
    lengths = sorted({n - (n - 1) % 4 for n in lengths} - {1}) if is_video else [1]
    if not lengths:
        raise WanError(
            f"{about}: target_frames={fields.get('target_frames', [1])}: a video never becomes a "
            "picture here; give a length of 5 or more"
        )
    if is_video and 1 in fields["target_frames"]:
        notes["target_frames: 1 is left out: a video never becomes a picture here"] = None
    if len(lengths) > 1:
        notes["target_frames: each clip goes to one of the lengths here, not to all"] = None
    options: Table = {"frames": how} if is_video else {}
    for name, reader, option in (
        ("frame_stride", "slide", "frame_stride"),
        ("frame_sample", "uniform", "frame_samples"),
    ):
        if how == reader:
            options[option] = fields.get(name, 1)
        elif name in fields:
            notes[f"{name}: only frame_extraction={reader} reads it"] = None
    if options.get("frame_samples") == 1:
        options = {"frames": "head"}  # the same
    bucket = fields.get("enable_bucket", False)
    repeats = fields.get("num_repeats", 1)
    check_repeats(f"{about}: num_repeats", repeats)
    return Source(
        where,
        fields[place],
        VIDEOS if is_video else PICTURES,
        repeats,
        tuple(lengths),
        width * height,
        () if bucket else (width / height,),
        options,
        fields.get("caption_extension", ".txt"),
        upscale=not (bucket and fields.get("bucket_no_upscale", False)),
    )


# --- diffusion-pipe -------------------------------------------------------------------------------


def pipe_sources(table: Table, path: Path, notes: dict[str, None]) -> list[Source]:
    shared = {name: value for name, value in table.items() if name != "directory"}
    shared = read_fields(shared, PIPE_SHARED, f"clips={path}", notes)
    sources = []
    for number, one in enumerate(tables(table, "directory", f"clips={path}, directory"), 1):
        where = f"[[directory]] {number}"
        about = f"clips={path}, {where}"
        fields = shared | read_fields(one, PIPE, about, notes)
        if "path" not in fields:
            raise WanError(f"{about}: has no path")
        sources.append(pipe_source(fields, where, about))
    return sources


def pipe_source(fields: Table, where: str, about: str) -> Source:
    """One [[directory]], with the defaults of diffusion-pipe."""
    repeats = fields.get("num_repeats", 1)
    repeats = int(repeats) if isinstance(repeats, float) and repeats.is_integer() else repeats
    check_repeats(f"{about}: num_repeats", repeats)
    source = Source(where, fields["path"], VIDEOS + PICTURES, repeats, (), 0.0, ())
    if fields.get("size_buckets"):
        sizes = [whole(size, f"{about}: size_buckets", 3) for size in fields["size_buckets"]]
        names = tuple(f"{frames}x{height}x{width}" for width, height, frames in sizes)
        return replace(source, sizes=tuple(sorted(names)))
    areas = fields.get("resolutions", [])
    if len(areas) != 1:
        raise WanError(
            f"{about}: resolutions={areas}: each clip is trained at all of them there, and goes to "
            "one size here; leave one in the file, preprocess each into its own output_dir=, and "
            "train on all with data.folder=[..]"
        )
    side = areas[0]
    width, height = whole([side] * 2 if isinstance(side, int) else side, f"{about}: resolutions", 2)
    lengths = whole(fields.get("frame_buckets", [1]), f"{about}: frame_buckets")
    return replace(
        source,
        lengths=tuple(sorted({n - (n - 1) % 4 for n in lengths})),
        area=width * height,
        shapes=pipe_shapes(fields, about),
    )


def pipe_shapes(fields: Table, about: str) -> tuple[float, ...]:
    """Width / height of diffusion-pipe's buckets."""
    if not fields.get("enable_ar_bucket", False):
        return (1.0,)
    if given := fields.get("ar_buckets"):
        pairs = [one if isinstance(one, list) else [one, 1.0] for one in given]
        if all(len(p) == 2 and all(value_is(float, x) and x > 0 for x in p) for p in pairs):
            shapes = {width / height for width, height in pairs}
            if all(NARROWEST <= shape <= 1 / NARROWEST for shape in shapes):
                return tuple(sorted(shapes))
        raise WanError(
            f"{about}: ar_buckets={given}: need numbers, or pairs of width and height, from 1:100 "
            "to 100:1"
        )
    names = ("min_ar", "max_ar", "num_ar_buckets")
    if missing := [name for name in names if name not in fields]:
        raise WanError(f"{about}: enable_ar_bucket=true needs {', '.join(missing)}")
    low, high, count = (fields[name] for name in names)
    if not (NARROWEST <= low <= high <= 1 / NARROWEST and 1 <= count <= 1000):
        raise WanError(f"{about}: min_ar={low}, max_ar={high}, num_ar_buckets={count}: no shapes")
    steps = [number / max(1, count - 1) for number in range(count)]
    return tuple(sorted({low * (high / low) ** step for step in steps}))


# --- what the options here say --------------------------------------------------------------------


def check_agreement(path: Path, sources: list[Source], name: str) -> None:
    """Refuse sources that ask for different things, which one run cannot do."""
    for other in sources[1:]:
        there, here = getattr(sources[0], name), getattr(other, name)
        if there != here:
            raise WanError(
                f"clips={path}: {sources[0].where} and {other.where} ask for different {name} "
                f"({there} and {here}); make a file of each, preprocess each with its own options "
                "into its own output_dir=, and train with data.folder=[..] and data.weights=[..]"
            )


def check_options(
    path: Path,
    sources: list[Source],
    videos: list[Source],
    config: PreprocessConfig,
    notes: dict[str, None],
) -> None:
    """Refuse options that do not do what the file asks for, and say which do.

    Raises:
        WanError: names the options.
    """
    asked = videos[0].options if videos else {}
    wanted = [f"{name}={value}" for name, value in asked.items() if getattr(config, name) != value]
    if not sources[0].upscale and config.max_upscale > 1:
        wanted.append("max_upscale=1")
    lengths = sorted({length for source in sources for length in source.lengths})
    if not fits(sources[0], lengths, config):
        wanted.insert(0, f"sizes=[{','.join(suggested_sizes(sources[0], lengths))}]")
    elif missing := [shape for shape in sources[0].shapes if not has_shape(config, shape)]:
        words = ", ".join(f"{shape:.2f}" for shape in missing)
        notes[f"no size in sizes= is {words} times as wide as high, as the file has it"] = None
    if wanted:
        raise WanError(
            f"clips={path} asks for other clips than the options; give {' '.join(wanted)} "
            "(other heights and widths may do, with nearly as many pixels)"
        )


def suggested_sizes(source: Source, lengths: Iterable[int]) -> list[str]:
    """Values of `sizes=` that do what a source asks for."""
    if source.sizes:
        return list(source.sizes)
    names: dict[str, None] = {}
    for length in lengths:
        for shape in source.shapes or (16 / 9, 9 / 16, 1.0):
            width = max(1, round(math.sqrt(source.area * shape) / MULTIPLE)) * MULTIPLE
            height = max(1, round(math.sqrt(source.area / shape) / MULTIPLE)) * MULTIPLE
            names[f"{length}x{height}x{width}"] = None
    return list(names)


def fits(source: Source, lengths: list[int], config: PreprocessConfig) -> bool:
    """Whether `sizes=` have the lengths and the pixels that a source asks for."""
    if source.sizes:
        return tuple(sorted(config.sizes)) == source.sizes
    sizes = config.parsed_sizes()
    low, high = NEAR_AREA
    near = all(low < height * width / source.area < high for _, height, width in sizes)
    found = {frames for frames, *_ in sizes}
    return near and set(lengths) <= found <= {*lengths, 1}


def has_shape(config: PreprocessConfig, shape: float) -> bool:
    sizes = config.parsed_sizes()
    return any(abs(math.log(width / height / shape)) < NEAR_SHAPE for _, height, width in sizes)
