"""The settings of infer.rerun and infer.diff, and which options of a video its record decides."""

from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any

from configs.schema import (
    DTYPES,
    PARTS,
    Options,
    PartsConfig,
    SampleConfig,
    check_device,
    check_lora,
    option,
    walk_options,
)

# Options of `infer.sample` that name something on the machine that a record was made on.
PLACES = ("checkpoint", "revision", "variant", *PARTS, "image", "decoder", "lora", "lora_2")
# Those that say how a command goes about its work, and nothing of one video.
COMMAND_ONLY = (
    *("prompt_file", "output_dir", "num_videos", "preflight", "verify", "skip_done", "verbose"),
    *("preview", "preview_decoder"),
    *("parallel.mode", "parallel.weights", "parallel.guidance"),
)
# All others, with their types: a record of a video decides them.
OF_A_VIDEO = {
    name: kind
    for name, kind, _ in walk_options(SampleConfig)
    if name not in (*PLACES, *COMMAND_ONLY)
}


def typed_options(config: SampleConfig) -> dict[str, Any]:
    """The options of a video that differ from their defaults, by dotted name."""
    given, defaults = asdict(config), asdict(SampleConfig())
    found = {}
    for name in OF_A_VIDEO:
        value, default = (reduce(dict.__getitem__, name.split("."), d) for d in (given, defaults))
        if value != default:
            found[name] = value
    return found


@dataclass
class RerunConfig(PartsConfig):
    """`python -m infer.rerun`: a record in, its video again, and whether it is the same.

    All settings are the record's. What names a place is given here, unless the record names a
    shipped model, one on the hub, or a file beside itself.
    """

    record: str = option("", "a record, its mp4, or their name without the ending")
    checkpoint: str | None = option(None, "the model, as a folder or a hub id")
    revision: str | None = option(None, "commit, branch or tag of checkpoint=")
    variant: str | None = option(None, "variant of checkpoint='s weights, as in fp16")
    image: str | None = option(None, "the picture that the video started from")
    decoder: str | None = option(None, "the tiny decoder, if the video was decoded with one")
    lora: list[str] | None = option(
        None,
        "the LoRA files in their order; the strengths are the record's unless given as a:0.8",
        check=check_lora,
    )
    lora_2: list[str] | None = option(
        None, "the same for the low-noise expert of models with two", check=check_lora
    )
    device: str | None = option(
        None, "another device than the record's, which may change the video", check=check_device
    )
    dtype: str | None = option(
        None, "another dtype than the record's, which changes the video", choices=DTYPES
    )
    offload: str | None = option(
        None, "as for infer.sample; changes no number", choices=("none", "stage", "block")
    )
    output_dir: str = option("outputs", "made if missing; nothing in it is ever overwritten")


@dataclass
class DiffConfig(Options):
    """`python -m infer.diff`: what differs between two videos, from their records."""

    a: str = option("", "a record, its mp4, or their name without the ending")
    b: str = option("", "another")
