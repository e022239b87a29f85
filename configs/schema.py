"""The settings of every command: a dataclass each, and the one function that fills them.

YAML holds values, these classes say what is allowed. Importing this file must stay cheap (no
torch): a wrong option is reported before anything heavy is loaded.
"""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf

from wan.attention_config import AttentionConfig
from wan.errors import WanError
from wan.vae_config import CHUNK_LATENTS

C = TypeVar("C")
DTYPES = ("float32", "bfloat16")
# How a model is loaded: the same options in every command that makes videos.
LOADING = {
    "dtype": ("auto", *DTYPES),
    "offload": ("none", "stage", "block"),
    "quantize": ("none", "int8", "fp8"),
    "compile": ("none", "dit", "all"),
}
MAX_SEED = 2**32 - 1  # PyTorch's CPU generator reads 32 bits


def option(default: Any, help: str) -> Any:
    """A dataclass field with the line that `--help` prints for it."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def read_config(schema: type[C], cfg: DictConfig) -> C:
    """Composed YAML -> dataclasses. Unknown keys, wrong types and missing values raise here.

    Raises:
        omegaconf.errors.OmegaConfBaseException: a key or a type that the schema does not have.
        WanError: a value that the schema's own checks refuse.
    """
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), cfg))
    assert isinstance(config, schema)
    return config


def walk_options(schema: type, prefix: str = "") -> Iterator[tuple[str, Any, Field[Any]]]:
    """(dotted name, type, dataclass field) of every option of a schema, nested ones included."""
    hints = get_type_hints(schema)
    for item in fields(schema):
        kind = hints[item.name]
        if isinstance(kind, type) and is_dataclass(kind):
            yield from walk_options(kind, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", kind, item


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise WanError(f"{name}={value}: choose one of {', '.join(allowed)}")


def check_at_least(name: str, value: float, lowest: float) -> None:
    if not (math.isfinite(value) and value >= lowest):
        raise WanError(f"{name}={value}: must be a number of at least {lowest}")


def check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise WanError(f"{name}={value}: must be a number above 0")


PICTURES = (".png", ".jpg", ".jpeg", ".webp")  # endings


def check_ending(name: str, value: str | None, allowed: tuple[str, ...]) -> None:
    """The name of a file to write, if there is one."""
    if value is not None and not value.lower().endswith(allowed):
        raise WanError(f"{name}={value}: the name must end in {' or '.join(allowed)}")


def check_seed(name: str, value: int) -> None:
    if not 0 <= value <= MAX_SEED:
        raise WanError(f"{name}={value}: seeds go from 0 to {MAX_SEED} (2**32 - 1)")


def check_device(name: str, value: str) -> None:
    if re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value) is None:
        raise WanError(f"{name}={value}: choose auto, cpu, mps, cuda or cuda:N")


def check_loading(config: Any) -> None:
    """The options of a command that say how and where its model is loaded."""
    check_device("device", config.device)
    for name, allowed in LOADING.items():
        check_choice(name, getattr(config, name), allowed)


def check_every_step(attention: AttentionConfig) -> None:
    """Training draws noise levels at random: there are no steps to choose among."""
    if attention.steps != "all":
        raise WanError(
            f"attention.steps={attention.steps}: for sampling only; training has no numbered steps"
        )


@dataclass
class SamplerConfig:
    """How the network is integrated. None everywhere means as the model's own folder says."""

    name: str | None = option(None, "unipc, euler or few_step")
    steps: int | None = option(None, "number of network evaluations")
    timesteps: list[float] | None = field(
        default=None, metadata={"help": "instead: an explicit list, e.g. [1000,757,522]"}
    )
    shift: float | None = option(
        None,
        "moves the noise levels of `steps` towards high noise; 1 = not at all. A list of timesteps "
        "is taken as it is",
    )

    def __post_init__(self) -> None:
        if self.shift is not None:
            check_positive("shift", self.shift)
        if self.steps is not None and self.timesteps is not None:
            raise WanError(
                f"steps={self.steps} and timesteps={self.timesteps} set the same thing: "
                "give only one of them"
            )
        if self.steps is not None and not 1 <= self.steps <= 1000:
            raise WanError(f"steps={self.steps}: must be between 1 and 1000")
        if self.timesteps is not None:
            check_timesteps(self.timesteps)


def check_timesteps(timesteps: list[float]) -> None:
    if not timesteps or not all(math.isfinite(t) and 0 < t <= 1000 for t in timesteps):
        raise WanError(f"timesteps={timesteps}: need one or more numbers above 0, up to 1000")
    if any(a <= b for a, b in itertools.pairwise(timesteps)):
        raise WanError(
            f"timesteps={timesteps}: must go down at every step; "
            f"try {sorted(set(timesteps), reverse=True)}"
        )


@dataclass
class SampleConfig:
    """`python -m infer.sample`: a prompt in, a video out.

    What is None here and in the preset is taken from the checkpoint's own folder.
    """

    prompt: str | None = option(None, "what the video shows; any text, exactly as typed")
    negative_prompt: str | None = option(None, "what it should not show; needs guidance")
    prompt_file: str | None = option(
        None, 'one job a line: a prompt, or JSON such as {"prompt": "..", "seed": 7, "width": 256}'
    )
    image: str | None = option(None, "a picture to start from, for models trained on that (TI2V)")
    image_fit: str = option("crop", "crop keeps its proportions, resize stretches it")
    image_background: list[int] | None = option(
        None, "red, green, blue (0 to 255) behind transparent pixels; null refuses those"
    )
    seed: int = option(0, "a video depends on seed and settings, not on batch or device")
    num_videos: int = option(1, "videos per prompt, with seeds seed, seed+1, ...")

    checkpoint: str = option(MISSING, "a folder or a hub id (owner/name), not the preset's own")
    revision: str | None = option(None, "commit, branch or tag on the hub")
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    guidance_scale: float | None = option(None, "weight of the prompt; 1 = no guidance")
    guidance_scale_2: float | None = option(
        None, "the same for the low-noise expert of models with two"
    )
    deterministic: bool | None = option(None, "few_step: put back predicted noise, not fresh noise")
    frame_first_noise: bool = option(False, "draw noise in FastVideo's order: its seeds match ours")
    allow_untrained: bool = option(False, "let a few-step student do what it was not trained for")
    max_sequence_length: int | None = option(
        None, "rows of text that are read, past the prompt's end too; another number, another model"
    )

    height: int | None = option(None, "pixels; an illegal size is refused with the nearest legal")
    width: int | None = option(None, "pixels")
    num_frames: int | None = option(None, "4k + 1")
    fps: float | None = option(None, "frames per second written into the file; changes no frame")

    device: str = option("auto", "auto (cuda if there is one, else cpu), cpu, mps, cuda, cuda:N")
    dtype: str = option("auto", "auto (bfloat16 on cuda, else float32), float32, bfloat16")
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    offload: str = option(
        "none", "stage keeps only the network at work on the device, block only two of its blocks"
    )
    quantize: str = option(
        "none", "int8 or fp8 weights in the transformer and text encoder: half the memory"
    )
    compile: str = option("none", "torch.compile: dit (its blocks), all (the VAE's decoder too)")
    preflight: str = option(
        "auto",
        "predict memory and refuse what cannot fit: always, never, auto (from about 1 GiB on)",
    )
    chunk_latents: int = option(
        CHUNK_LATENTS, "latent frames decoded at a time; 1 needs least memory and takes longer"
    )
    tile: int | None = option(None, "decode in tiles of this many latents: less memory, not exact")
    verify: bool = option(False, "check files against SHA256SUMS or the hub's digests first")
    lora: str | None = option(None, "a LoRA file to merge into the weights")
    lora_2: str | None = option(None, "the one for the low-noise expert of models with two")
    lora_strength: float = option(1.0, "how much of it")

    output_dir: str = option("outputs", "made if missing; nothing in it is ever overwritten")
    save_latents: bool = option(True, "keep the latents of good videos too; of bad ones always")
    contact_sheet: bool = option(True, "write a PNG with frames of the video")
    embed_prompt: bool = option(True, "store prompt, seed and settings inside the mp4")
    hash_weights: bool = option(True, "put the sha256 of every weight file into the record")

    def __post_init__(self) -> None:
        if self.prompt is not None:
            check_prompt("prompt", self.prompt)
        if self.prompt is not None and self.prompt_file is not None:
            raise WanError("prompt= and prompt_file=: give only one of them")
        if not self.checkpoint:
            raise WanError("checkpoint= is empty: name a folder or a hub id")
        check_choice("image_fit", self.image_fit, ("crop", "resize"))
        colour = self.image_background
        if colour is not None and not (len(colour) == 3 and all(0 <= c <= 255 for c in colour)):
            raise WanError(f"image_background={colour}: need three numbers from 0 to 255")
        check_loading(self)
        check_choice("preflight", self.preflight, ("auto", "always", "never"))
        check_seed("seed", self.seed)
        check_at_least("num_videos", self.num_videos, 1)
        check_at_least("chunk_latents", self.chunk_latents, 1)
        check_seed("seed + num_videos - 1", self.seed + self.num_videos - 1)
        for name in ("guidance_scale", "guidance_scale_2", "max_sequence_length"):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), 1)
        for name in ("height", "width", "num_frames", "tile"):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), 1)
        if self.fps is not None and not (math.isfinite(self.fps) and 1 <= self.fps <= 240):
            raise WanError(f"fps={self.fps}: must be between 1 and 240")
        if not math.isfinite(self.lora_strength):
            raise WanError(f"lora_strength={self.lora_strength}: must be a number")


def check_text(key: str, text: str) -> None:
    """Records are UTF-8, which half of a character has no place in; a zero byte ends a title."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise WanError(f"{key}=: the text is not valid UTF-8") from error
    if "\0" in text:
        raise WanError(f"{key}=: there is a zero byte in the text")


def check_prompt(name: str, text: str) -> None:
    if not text.strip():
        raise WanError(f'{name}= is empty: say what the video shows, e.g. {name}="a red circle"')
