"""The settings of `python -m infer.rehearse`, which runs a released model with random weights."""

from dataclasses import dataclass

from configs.schema import DTYPES, Options, check_device, check_prompt, count, option, seed_option
from wan.errors import WanError

# The released models by the names of their presets in configs/model, and a small one for a try.
RELEASES = (
    "fastwan_ti2v_5b",
    "wan22_ti2v_5b",
    "wan22_t2v_a14b",
    "wan21_t2v_14b",
    "wan21_t2v_1_3b",
    "tiny",
)


@dataclass
class RehearseConfig(Options):
    """`python -m infer.rehearse`: which model, where its files go, and which video is made."""

    release: str = option(
        "fastwan_ti2v_5b",
        f"whose names, shapes, dtypes and shards the files have: {', '.join(RELEASES)}",
        choices=RELEASES,
    )
    folder: str = option(
        "outputs/rehearsal", "the model's files, the video and the report are written here"
    )
    keep: bool = option(
        False, "keep the model's files, which the next rehearsal of this release then finds"
    )
    seed: int = seed_option(0, "seed of the weights and of the video")

    prompt: str = option("a fox runs through fresh snow", "as for infer.sample", check=check_prompt)
    height: int = count(128, "pixels of the video")
    width: int = count(128, "pixels")
    num_frames: int = count(5, "number of frames: 4k + 1")
    steps: int | None = count(None, "number of network evaluations; none: the preset's")
    device: str = option("auto", "as for infer.sample", check=check_device)
    dtype: str = option("bfloat16", "of the weights in memory", choices=DTYPES)
    quantize: str = option("none", "as for infer.sample", choices=("none", "int8", "fp8"))
    offload: str = option("none", "as for infer.sample", choices=("none", "stage", "block"))

    cold: bool = option(
        False, "let the system forget the files first (Linux), so that they are read from the disk"
    )
    compare: bool = option(
        False,
        "make the video with the networks of diffusers and transformers too, one after the other",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compare and self.release == "wan22_t2v_a14b":
            raise WanError("compare=true: for models with one transformer; leave it out")
