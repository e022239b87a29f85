"""The settings of data: where training finds it, and how `train.preprocess` makes it."""

import re
from dataclasses import dataclass
from typing import ClassVar

from configs.schema import (
    Options,
    check_colour,
    check_device,
    check_prompt,
    count,
    option,
    positive,
    share,
)
from wan.errors import WanError

Size = tuple[int, int, int]  # frames, height, width
MAX_REPEATS = 10_000  # of a clip in an epoch
# Options of `DataConfig` that one kind of data alone reads.
OF_WORLD = ("cache_dir", "num_clips", "seed", "repeat_circling", "two_objects", "passes")
OF_FOLDERS = ("check_weights",)  # and those that `check_source` refuses
# Which frames of a clip are used, under musubi-tuner's names.
FRAMES = {
    "head": "takes its first frames",
    "chunk": "cuts it into samples, one after the other",
    "slide": "takes a sample every frame_stride= frames",
    "uniform": "takes frame_samples= samples, from its start to its end",
}


@dataclass
class DataConfig(Options):
    """Where clips and captions come from."""

    GROUP: ClassVar[str] = "data."

    kind: str = option(
        "world",
        "world (rendered miniature scenes) or folder (of train.preprocess)",
        choices=("world", "folder"),
    )
    folder: list[str] | None = option(
        None, "for folder: the output_dir of train.preprocess, or several as [a,b]"
    )
    weights: list[float] | None = option(
        None,
        "for several folders: how often clips of each come, as in [3,1]; none: by their samples, "
        "as if they were one folder",
        above=0,
    )
    check_weights: bool = option(True, "refuse a folder made with another vae or text encoder")
    cache_dir: str = option("runs/cache", "for the world: encoded latents are kept here")
    num_clips: int = count(8192, "for the world: how many scenes are rendered and encoded")
    seed: int = option(0, "for the world: which scenes")
    repeat_circling: int = count(
        1, "for the world: how often an epoch has each clip with a circling object, the hard motion"
    )
    two_objects: float = share(0.4, "for the world: share of scenes with two objects")
    passes: int | None = option(
        None, "for the world: after so many epochs, new scenes take the clips' place", at_least=1
    )

    def __post_init__(self) -> None:
        if isinstance(self.folder, str):
            self.folder = [self.folder]
        super().__post_init__()

    def idle(self) -> dict[str, str]:
        names = OF_WORLD if self.kind == "folder" else OF_FOLDERS
        return {f"data.{name}": f"data.kind={self.kind}" for name in names}

    def check_source(self) -> None:
        """Kind, folders and weights fit.

        Not in `__post_init__`: literal paths are filled in after it.
        """
        if self.weights is not None and len(self.weights) != len(self.folder or []):
            raise WanError(
                f"data.weights={self.weights}: need one for each of the {len(self.folder or [])} "
                "folders in data.folder="
            )
        if len(set(self.folder or [])) < len(self.folder or []):
            raise WanError(
                f"data.folder={self.folder}: none twice; data.weights= says how often each comes"
            )
        if (self.kind == "folder") != bool(self.folder):
            raise WanError(
                f"data.kind={self.kind}, data.folder={self.folder}: data.kind=folder reads what "
                "train.preprocess wrote into data.folder=, the world has no folder"
            )


@dataclass
class PreprocessConfig(Options):
    """`train.preprocess`: clips and captions in, latents and text embeddings out."""

    clips: str | None = option(
        None,
        "a folder (name.mp4 beside name.txt), or a .jsonl, .csv or .json list of video, prompt; "
        "also what musubi-tuner, FastVideo and Hugging Face's folders call them; or the dataset "
        "file (.toml) of musubi-tuner or diffusion-pipe",
    )
    prompts: str | None = option(
        None, "a text file of further prompts, one per line; enough by itself if no clips are used"
    )
    negative_prompt: str | None = option(
        None, "encoded too; the empty prompt always is", check=check_prompt
    )
    output_dir: str = option("runs/data", "latents, texts, report.jsonl and index.json go here")
    checkpoint: str = option("builtin:miniature", "folder or hub id with vae and text_encoder")
    sizes: list[str] = option(
        ["17x128x128"],
        "frames x height x width; a clip goes to the one that keeps most of the picture, then to "
        "the nearest in pixels",
    )
    fps: float = positive(8.0, "frames per second of the clips that training sees")
    retime: bool = option(
        False, "bring higher frame rates to fps by nearest frames; else they are set aside"
    )
    frames: str = option(
        "head",
        "which frames of a clip: " + "; ".join(f"{name} {does}" for name, does in FRAMES.items()),
        choices=tuple(FRAMES),
    )
    frame_stride: int | None = option(
        None, "for frames=slide: from the start of a sample to that of the next", at_least=1
    )
    frame_samples: int | None = option(
        None, "for frames=uniform: how many samples of a clip", at_least=2
    )
    image_background: list[int] | None = option(
        None,
        "red, green, blue (0 to 255) behind transparent pixels of pictures and videos; without it "
        "such clips are set aside",
        at_least=0,
        at_most=255,
    )
    max_crop: float = share(0.5, "set clips aside that lose more than this share of the picture")
    max_upscale: float = positive(1.5, "set clips aside that must be enlarged more than this")
    max_set_aside_share: float = share(0.05, "fail when more than this share is set aside")
    max_set_aside: int | None = option(
        None, "instead of the share: fail when more clips than this are set aside", at_least=0
    )
    check_only: bool = option(False, "judge all clips and write check.jsonl, encode nothing")
    verify: bool = option(False, "read all that is stored again, encode anew what is damaged")
    shard_clips: int = count(32, "clips per file; a killed process loses at most this many")
    max_text_tokens: int = option(
        512,
        "captions are cut there; the report says which. Transformers read 512 tokens",
        at_least=1,
        at_most=512,
    )
    device: str = option(
        "auto", "auto (cuda if there is one, else cpu), cpu, cuda, cuda:N", check=check_device
    )
    threads: int = count(2, "CPU threads")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.parsed_sizes()
        check_colour("image_background", self.image_background)
        for name, reader in (("frame_stride", "slide"), ("frame_samples", "uniform")):
            value = getattr(self, name)
            if self.frames == reader and value is None:
                raise WanError(f"frames={reader}: {FRAMES[reader]}, so give {name}= too")
            if self.frames != reader and value is not None:
                raise WanError(
                    f"{name}={value}: only frames={reader} reads it, and frames={self.frames}"
                )

    def parsed_sizes(self) -> list[Size]:
        """The sizes as numbers."""
        if not self.sizes or len(set(self.sizes)) < len(self.sizes):
            raise WanError(f"sizes={self.sizes}: need at least one, and none twice")
        return [parse_size(text) for text in self.sizes]


def same_rate(fps: float, wanted: float) -> bool:
    """Whether one number of frames per second stands for another, as 23.976 does for 24."""
    return abs(fps - wanted) <= 0.01 * wanted


def parse_size(text: str, name: str = "sizes") -> Size:
    """`17x128x128` -> (17, 128, 128); `name` is the option's."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise WanError(f"{name}: {text!r}: write frames x height x width, such as 121x704x1280")
    return int(match[1]), int(match[2]), int(match[3])
