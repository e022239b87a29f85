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

from omegaconf import DictConfig, OmegaConf

from wan.errors import WanError

C = TypeVar("C")
DTYPES = ("float32", "bfloat16")
MAX_SEED = 2**63 - 1


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


def check_seed(name: str, value: int) -> None:
    if not 0 <= value <= MAX_SEED:
        raise WanError(f"{name}={value}: seeds go from 0 to {MAX_SEED} (2**63 - 1)")


def check_device(name: str, value: str) -> None:
    if re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value) is None:
        raise WanError(f"{name}={value}: choose auto, cpu, mps, cuda or cuda:N")


@dataclass
class SamplerConfig:
    """How the network is integrated. Exactly one of `steps` and `timesteps` is set."""

    name: str = option("unipc", "unipc, euler or few_step")
    steps: int | None = option(None, "number of network evaluations")
    timesteps: list[float] | None = field(
        default=None, metadata={"help": "instead: an explicit list, e.g. [1000,757,522]"}
    )
    shift: float = option(5.0, "moves the noise levels towards high noise; 1 leaves them linear")

    def __post_init__(self) -> None:
        check_positive("shift", self.shift)
        if (self.steps is None) == (self.timesteps is None):
            raise WanError(
                f"steps={self.steps} and timesteps={self.timesteps}: give exactly one of them"
            )
        if self.steps is not None and not 1 <= self.steps <= 1000:
            raise WanError(f"steps={self.steps}: must be between 1 and 1000")
        if self.timesteps is not None:
            self._check_timesteps(self.timesteps)

    def _check_timesteps(self, timesteps: list[float]) -> None:
        if not timesteps or not all(math.isfinite(t) and 0 < t <= 1000 for t in timesteps):
            raise WanError(f"timesteps={timesteps}: need one or more numbers above 0, up to 1000")
        if any(a <= b for a, b in itertools.pairwise(timesteps)):
            raise WanError(
                f"timesteps={timesteps}: must go down at every step; "
                f"try {sorted(set(timesteps), reverse=True)}"
            )


@dataclass
class SampleConfig:
    """`python -m infer.sample`: a prompt in, a video out."""

    prompt: str | None = option(None, "what the video shows; any text, exactly as typed")
    negative_prompt: str | None = option(None, "what it should not show (base models)")
    prompt_file: str | None = option(
        None, "a file with one job a line: a prompt, or a JSON object like {prompt: .., seed: ..}"
    )
    image: str | None = option(None, "first frame, for models that take one (TI2V)")
    image_fit: str = option("crop", "crop (keeps the aspect ratio) or resize (stretches)")
    seed: int = option(0, "a video depends on its seed and settings, not on batch or device")
    num_videos: int = option(1, "videos per prompt, with seeds seed, seed+1, ...")

    checkpoint: str = option("", "a folder or a hub id (owner/name), instead of the preset's own")
    revision: str | None = option(None, "hub commit, branch or tag")
    pipeline: str = option("base", "base (many steps, guidance) or few_step (distilled student)")
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(steps=50))
    guidance_scale: float = option(5.0, "weight of the prompt against the negative prompt; 1 = off")
    guidance_scale_2: float | None = option(
        None, "the same for the low-noise expert of two-expert models; null = guidance_scale"
    )
    allow_off_recipe: bool = option(
        False, "let a few-step student use settings that it was not trained for"
    )
    max_sequence_length: int = option(512, "prompt tokens that the text encoder reads")

    height: int = option(128, "pixels; illegal sizes are refused with the nearest legal ones")
    width: int = option(128, "pixels")
    num_frames: int = option(17, "4k + 1")
    fps: float = option(8.0, "frames per second written into the file; changes no frame")

    device: str = option("auto", "auto (cuda if there is one, else cpu), cpu, mps, cuda, cuda:N")
    dtype: str = option("float32", "of the matrix products: " + ", ".join(DTYPES))
    attention: str = option("sdpa", "sdpa, math or sliced; all exact")
    offload: bool = option(
        False, "keep only the part at work on the device; slower, fits less memory"
    )
    lora: str | None = option(None, "a LoRA file to merge into the weights")
    lora_strength: float = option(1.0, "how much of it")

    output_dir: str = option("outputs", "made if missing; existing files are never overwritten")
    save_latents: bool = option(True, "keep the latents beside the video (always kept on failure)")
    contact_sheet: bool = option(True, "write a PNG with frames of the video")
    embed_prompt: bool = option(True, "store prompt, seed and settings inside the mp4")
    hash_weights: bool = option(True, "put the sha256 of every weight file into the record")

    def __post_init__(self) -> None:
        if self.prompt is not None and not self.prompt.strip():
            raise WanError('prompt= is empty: say what the video shows, e.g. prompt="a red circle"')
        if self.prompt is not None and self.prompt_file is not None:
            raise WanError("prompt= and prompt_file=: give only one of them")
        if not self.checkpoint:
            raise WanError("checkpoint= is empty: name a folder or a hub id")
        check_choice("image_fit", self.image_fit, ("crop", "resize"))
        check_choice("pipeline", self.pipeline, ("base", "few_step"))
        check_choice("dtype", self.dtype, DTYPES)
        check_device("device", self.device)
        check_seed("seed", self.seed)
        check_at_least("num_videos", self.num_videos, 1)
        check_seed("seed + num_videos - 1", self.seed + self.num_videos - 1)
        check_at_least("guidance_scale", self.guidance_scale, 0)
        if self.guidance_scale_2 is not None:
            check_at_least("guidance_scale_2", self.guidance_scale_2, 0)
        check_at_least("max_sequence_length", self.max_sequence_length, 1)
        for name in ("height", "width", "num_frames"):
            check_at_least(name, getattr(self, name), 1)
        if not (math.isfinite(self.fps) and 1 <= self.fps <= 240):
            raise WanError(f"fps={self.fps}: must be between 1 and 240")
        if not math.isfinite(self.lora_strength):
            raise WanError(f"lora_strength={self.lora_strength}: must be a number")


@dataclass
class EvaluateConfig:
    """`python -m infer.evaluate`: captions of the miniature's world in, how many came true out."""

    source: str = option(
        "model",
        "model, or a ceiling: renders (the truth itself), vae (the truth through the autoencoder)",
    )
    num_captions: int = option(512, "clips to make and read")
    split: str = option("heldout", "heldout (combinations never trained on), train or any")
    num_objects: int | None = option(1, "1 or 2; null draws 1 for seven scenes in ten")
    omit: float = option(0.0, "chance that a caption leaves an attribute unsaid, as in training")
    seed: int = option(0, "chooses captions and noise; caption i gets noise seed + i")
    batch_size: int = option(16, "clips at a time; changes no clip")

    checkpoint: str = option("", "a folder or a hub id (owner/name), instead of the preset's own")
    revision: str | None = option(None, "hub commit, branch or tag")
    pipeline: str = option("base", "base (many steps, guidance) or few_step (distilled student)")
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(steps=50))
    guidance_scale: float = option(5.0, "weight of the prompt against the negative prompt; 1 = off")
    negative_prompt: str | None = option(None, "what videos should not show")
    allow_off_recipe: bool = option(
        False, "let a few-step student use settings that it was not trained for"
    )
    max_sequence_length: int = option(512, "prompt tokens that the text encoder reads")
    height: int = option(128, "pixels; the world is square")
    width: int = option(128, "pixels")
    num_frames: int = option(17, "4k + 1; at least 9, so that a circling object gets half round")
    fps: float = option(8.0, "of the preset; everything is measured per frame")
    device: str = option("auto", "auto (cuda if there is one, else cpu), cpu, mps, cuda, cuda:N")
    dtype: str = option("float32", "of the matrix products: " + ", ".join(DTYPES))
    attention: str = option("sdpa", "sdpa, math or sliced; all exact")

    output: str | None = option(None, "also write every number and every clip's to this JSON file")
    sheet: str | None = option(None, "also write a PNG of clips that are not what was asked for")

    def __post_init__(self) -> None:
        check_choice("source", self.source, ("model", "renders", "vae"))
        check_choice("split", self.split, ("heldout", "train", "any"))
        check_choice("pipeline", self.pipeline, ("base", "few_step"))
        check_choice("dtype", self.dtype, DTYPES)
        check_device("device", self.device)
        check_seed("seed", self.seed)
        check_at_least("num_captions", self.num_captions, 1)
        check_seed("seed + num_captions - 1", self.seed + self.num_captions - 1)
        check_at_least("batch_size", self.batch_size, 1)
        check_at_least("guidance_scale", self.guidance_scale, 0)
        check_at_least("num_frames", self.num_frames, 9)
        check_at_least("height", self.height, 64)
        if self.num_objects not in (None, 1, 2):
            raise WanError(f"num_objects={self.num_objects}: the world shows 1 or 2; null draws")
        if not 0 <= self.omit <= 1:
            raise WanError(f"omit={self.omit}: a probability, from 0 to 1")
        if self.height != self.width:
            raise WanError(f"height={self.height}, width={self.width}: the world is square")
