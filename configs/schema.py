"""One dataclass of settings per command or group, and the function that fills them from YAML.

YAML holds values, these classes define what is allowed. Importing this file must stay cheap (no
torch): a wrong option is reported before anything heavy is loaded.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf

from wan.errors import WanError
from wan.files import expanded
from wan.models.attention_config import AttentionConfig
from wan.models.vae_config import CHUNK_LATENTS
from wan.paths import kept_path
from wan.settings import NO_BOUND, bounds, check_length, check_number

C = TypeVar("C")
DTYPES = ("float32", "bfloat16")
SAMPLERS = ("unipc", "euler", "dpm++", "few_step")
GRIDS = ("diffusers", "official", "uniform", "karras", "exponential", "beta")
# How weights are loaded. A loaded model serves another command if all of these are equal.
LOADING = ("dtype", "offload", "quantize", "compile")
DISTINCT_SEEDS = 2**32  # PyTorch's CPU generator reads 32 bits of a seed
MAX_SEED = 2**64 - 1  # the largest that PyTorch takes
RANDOM_SEED = -1
MAX_INTEGER = 2**63 - 1  # the largest that PyTorch takes as a size
MAX_STEPS = 1000
FASTVIDEO_SEED = 1024  # where its caller gives none
# An entry of `lora=`: the file, and a strength after a colon.
STRENGTH = re.compile(r"(.+):([-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?)")


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    check: Callable[[str, Any], None] | None = None,
    several: str = "",
    needs: Sequence[str] = (),
) -> Any:
    """A dataclass field with the line that `--help` prints for it and the values that it may have.

    Args:
        choices: the texts that are allowed.
        at_least, above, at_most, below: bounds of a number.
        check: called with name and value; raises a WanError for values that it does not allow.
        several: what to do who gives several values, where a sweep is not the way.
        needs: full names of options of which one must be given too, or nothing would read this one.
    """
    about: dict[str, Any] = {"help": help, "choices": tuple(choices), "check": check}
    about |= {"several": several, "needs": tuple(needs)}
    about |= bounds(at_least, above, at_most, below)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=about)
    return field(default=default, metadata=about)


def count(default: Any, help: str, needs: Sequence[str] = ()) -> Any:
    """An `option` that is at least 1."""
    return option(default, help, at_least=1, needs=needs)


def positive(default: Any, help: str, needs: Sequence[str] = ()) -> Any:
    """An `option` above 0."""
    return option(default, help, above=0, needs=needs)


def share(default: Any, help: str, needs: Sequence[str] = ()) -> Any:
    """An `option` between 0 and 1."""
    return option(default, help, at_least=0, at_most=1, needs=needs)


def seed_option(default: Any, help: str, several: str = "") -> Any:
    """An `option` that seeds a random stream."""
    return option(default, help, check=check_seed, several=several)


@dataclass
class Options:
    """The settings of a command, or a group of them, checked when an instance is created.

    Each field's `option` defines its allowed values. None is always allowed; in a list each element
    is checked. Checks that relate two fields go into a `__post_init__` of the subclass, which calls
    this one first.

    Attributes:
        GROUP: prefix of the fields' names on a command line, such as "loop."; often empty.
    """

    GROUP: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            for one in value if isinstance(value, list) else [value]:
                if one is not None and one != MISSING:
                    check_option(f"{self.GROUP}{item.name}", one, item.metadata)

    def idle(self) -> dict[str, str]:
        """Options that nothing reads under these settings: their full name -> because of what.

        A command line that gives one another value than its default is refused; a preset is not.
        """
        groups = (getattr(self, item.name) for item in fields(self))
        return {
            name: why
            for group in groups
            if isinstance(group, Options)
            for name, why in group.idle().items()
        }


def check_option(name: str, value: Any, about: Mapping[str, Any]) -> None:
    """Check one value against its `option`.

    Raises:
        WanError: the value is not allowed; names the option, the value and what is allowed.
    """
    if about.get("choices"):
        check_choice(name, value, about["choices"])
    check_number(name, value, about.get("low", NO_BOUND), about.get("high", NO_BOUND))
    if about.get("check") is not None:
        about["check"](name, value)
    elif isinstance(value, float) and not math.isfinite(value):
        raise WanError(f"{name}={value}: must be a finite number")
    elif isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise WanError(f"{name}={value}: at most {MAX_INTEGER} (2**63 - 1) is understood")


def read_config(schema: type[C], cfg: DictConfig) -> C:
    """Composed YAML -> dataclasses. Unknown keys, wrong types and missing values raise here.

    Raises:
        omegaconf.errors.OmegaConfBaseException: the schema lacks a key, or a type is wrong.
        WanError: the schema's own checks refuse a value.
    """
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), cfg))
    assert isinstance(config, schema)
    return config


def walk_options(schema: type, prefix: str = "") -> Iterator[tuple[str, Any, Field[Any]]]:
    """Yield (dotted name, type, dataclass field) for every option of a schema, nested ones too."""
    hints = get_type_hints(schema)
    own = vars(schema).get("__annotations__", {})  # --help lists a command's own options first
    for item in sorted(fields(schema), key=lambda item: item.name not in own):
        kind = hints[item.name]
        if isinstance(kind, type) and is_dataclass(kind):
            yield from walk_options(kind, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", kind, item


def default_of(item: Field[Any]) -> Any:
    """The default value of an option."""
    return item.default if item.default_factory is NO_DEFAULT else item.default_factory()


def default_values(schema: type) -> dict[str, Any]:
    """The default of every option of a schema, under its dotted name."""
    return {name: default_of(item) for name, _, item in walk_options(schema)}


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise WanError(f"{name}={value}: choose one of {', '.join(allowed)}")


PICTURES = (".png", ".jpg", ".jpeg", ".webp")  # file endings


def check_ending(name: str, value: str | None, allowed: tuple[str, ...]) -> None:
    """Refuse the name of an output file with another ending; None means no file."""
    if value is not None and not value.lower().endswith(allowed):
        raise WanError(f"{name}={value}: the name must end in {' or '.join(allowed)}")


def check_seed(name: str, value: int) -> None:
    """Refuse a seed that would repeat the numbers of a smaller one."""
    if not 0 <= value < DISTINCT_SEEDS:
        raise WanError(
            f"{name}={value}: seeds go from 0 to {DISTINCT_SEEDS - 1} (2**32 - 1); the generator "
            f"reads 32 bits, and the same numbers are those of {name}={value % DISTINCT_SEEDS}"
        )


def check_sample_seed(name: str, value: int) -> None:
    """Refuse what is neither a seed of PyTorch nor -1, which draws one."""
    if not RANDOM_SEED <= value <= MAX_SEED:
        raise WanError(
            f"{name}={value}: seeds go from 0 to {MAX_SEED} (2**64 - 1); -1 draws a random one"
        )


def check_sampler(name: str, value: str) -> None:
    check_choice(f"sampler.{name}", value, SAMPLERS)


def check_device(name: str, value: str) -> None:
    if re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value) is None:
        raise WanError(f"{name}={value}: choose auto, cpu, mps, cuda or cuda:N")


def check_prompt(name: str, text: str) -> None:
    if not text.strip():
        raise WanError(f'{name}= is empty: describe the video, e.g. {name}="a red circle"')
    check_length(f"{name}=", text)


def check_colour(name: str, colour: list[int] | None) -> None:
    if colour is not None and len(colour) != 3:
        raise WanError(f"{name}={colour}: need three numbers from 0 to 255")


def check_filled(name: str, value: str) -> None:
    if not value:
        raise WanError(f"{name}= is empty: name a folder or a hub id")


def check_lora(name: str, value: str) -> None:
    if not value.strip():
        raise WanError(f"{name}= has an empty entry: name LoRA files, as in {name}=a,b")


def check_every_step(attention: AttentionConfig) -> None:
    """Refuse a choice of steps: training draws noise levels at random and has no steps."""
    if attention.steps != "all":
        raise WanError(
            f"attention.steps={attention.steps}: for sampling only; training has no numbered steps"
        )


@dataclass
class SamplerConfig(Options):
    """The sampler, its steps and its noise levels. None takes the value of the model's folder."""

    name: str | None = option(None, "unipc, euler, dpm++ or few_step", check=check_sampler)
    steps: int | None = option(None, "number of network evaluations", at_least=1, at_most=MAX_STEPS)
    timesteps: list[float] | None = field(
        default=None, metadata={"help": "in place of steps: an explicit list, e.g. [1000,757,522]"}
    )
    shift: float | None = positive(
        None,
        "moves the noise levels of `steps` towards high noise; 1 = not at all. A list of timesteps "
        "is not shifted",
    )
    grid: str | None = option(
        None,
        "how `steps` are spaced: diffusers, official (Wan's own code), karras; euler also has "
        "uniform, exponential, beta",
        choices=GRIDS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None and self.timesteps is not None:
            raise WanError(
                f"steps={self.steps} and timesteps={self.timesteps} set the same thing: "
                "give only one of them"
            )
        if self.grid is not None and self.timesteps is not None:
            raise WanError(
                f"grid={self.grid} and timesteps={self.timesteps}: a grid is for a number of "
                "steps; give steps= or leave the grid out"
            )
        if self.timesteps is not None:
            check_timesteps(self.timesteps)

    def key(self) -> dict[str, Any]:
        """The settings that a stored result depends on; a grid only if one was chosen."""
        return {name: value for name, value in vars(self).items() if (name, value) != NO_GRID}


NO_GRID = ("grid", None)


def check_timesteps(timesteps: list[float]) -> None:
    if len(timesteps) > MAX_STEPS:
        raise WanError(f"timesteps=: {len(timesteps):,} of them, at most {MAX_STEPS}")
    if not timesteps or not all(math.isfinite(t) and 0 < t <= 1000 for t in timesteps):
        raise WanError(f"timesteps={timesteps}: need one or more numbers above 0, up to 1000")
    if any(a <= b for a, b in itertools.pairwise(timesteps)):
        raise WanError(
            f"timesteps={timesteps}: must go down at every step; "
            f"try {sorted(set(timesteps), reverse=True)}"
        )


@dataclass
class LoadingConfig(Options):
    """The model that a command runs, and how it is loaded."""

    checkpoint: str = option(
        MISSING, "a folder or a hub id (owner/name), in place of the preset's", check=check_filled
    )
    revision: str | None = option(None, "commit, branch or tag on the hub")
    variant: str | None = option(None, "weights of that variant where a part has it, as in fp16")
    device: str = option(
        "auto",
        "auto (what there is of cuda, mps, cpu, in this order), cpu, mps, cuda, cuda:N",
        check=check_device,
    )
    dtype: str = option(
        "auto",
        "auto (bfloat16 on cuda, else float32), float32, bfloat16",
        choices=("auto", *DTYPES),
    )
    offload: str = option(
        "none",
        "stage: only the running network is on the device; block: only two of its blocks",
        choices=("none", "stage", "block"),
    )
    quantize: str = option(
        "none",
        "int8 or fp8 weights in transformer and text encoder: half the memory of bfloat16",
        choices=("none", "int8", "fp8"),
    )
    compile: str = option(
        "none",
        "torch.compile: dit (its blocks), all (the VAE's decoder too)",
        choices=("none", "dit", "all"),
    )


@dataclass
class SharingConfig(Options):
    """What the processes do that torchrun has started for one command."""

    GROUP: ClassVar[str] = "parallel."

    mode: str = option(
        "auto",
        "torchrun's processes: video (all make each video together), jobs (each makes videos of "
        "its own), auto (video for a single one, else jobs)",
        choices=("auto", "video", "jobs"),
    )
    weights: str = option(
        "whole",
        "video: whole on each device, or sharded, of the transformers a part on each",
        choices=("whole", "sharded"),
    )
    guidance: bool = option(
        True, "video: an even number of processes computes guidance's two forwards on two halves"
    )


PARTS = ("transformer", "transformer_2", "vae", "text_encoder", "tokenizer")

# Options that name files or folders, in whatever group of settings they stand.
PATH_OPTIONS = (
    *("checkpoint", "image", "prompt_file", "lora", "lora_2", *PARTS),
    *("decoder", "preview_decoder"),
    *("output", "output_dir", "sheet", "folder", "cache_dir", "start", "source", "base", "config"),
)


def kept_settings(values: Mapping[str, Any], folder: str | Path) -> dict[str, Any]:
    """Settings as they are kept or handed on: with paths as `wan.paths.kept_path` writes them.

    Args:
        values: as `dataclasses.asdict` gives them, nested or not.
        folder: the output folder.
    """

    def kept(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return kept_settings(value, folder)
        if name not in PATH_OPTIONS or not value:
            return value
        if isinstance(value, list | tuple):
            return [kept_path(one, folder) for one in value]
        return kept_path(value, folder) if isinstance(value, str | Path) else value

    return {name: kept(name, value) for name, value in values.items()}


def kept_config(schema: type[C], kept: Mapping[str, Any], source: str) -> C:
    """The settings of a command from what `kept_settings` made of them.

    Options that were not kept have their defaults. What the schema does not know is left alone:
    digests that stand beside the settings, and options of other releases.

    Args:
        source: where they were kept, for messages.
    Raises:
        WanError: a value is not allowed.
    """
    hints = get_type_hints(schema)
    values = {item.name: kept[item.name] for item in fields(schema) if item.name in kept}  # type: ignore[arg-type]
    for name, value in values.items():
        if is_dataclass(hints[name]) and isinstance(value, Mapping):
            values[name] = kept_config(hints[name], value, source)
    try:
        return schema(**values)
    except WanError as error:
        raise error.about(source) from error
    except (TypeError, AttributeError) as error:
        raise WanError(f"{source}: the settings there are damaged: {error}") from error


def given_paths(config: Any) -> list[str]:
    """The files and folders that a command's settings name."""
    values = [getattr(config, name, None) or [] for name in PATH_OPTIONS]
    return [path for value in values for path in ([value] if isinstance(value, str) else value)]


@dataclass(kw_only=True)
class PartsConfig(Options):
    """Parts of a model that come from elsewhere: files as other tools write them, or folders."""

    transformer: str | None = option(None, "another file or folder for the transformer's weights")
    transformer_2: str | None = option(
        None, "the same for the low-noise expert of models with two; transformer= is then the other"
    )
    vae: str | None = option(None, "another file or folder for the autoencoder's weights")
    text_encoder: str | None = option(None, "another file or folder for the text encoder's weights")
    tokenizer: str | None = option(None, "another folder for the tokenizer")

    @property
    def parts(self) -> dict[str, Path]:
        """The parts that are given: part -> file or folder.

        Raises:
            WanError: one does not exist.
        """
        given = {name: getattr(self, name) for name in PARTS}
        found = {n: expanded(place) for n, place in given.items() if place is not None}
        for name, place in found.items():
            if not place.exists():
                raise WanError(f"{name}={given[name]}: no such file or folder")
        return found


@dataclass
class SampleConfig(LoadingConfig, PartsConfig):
    """`python -m infer.sample`: a prompt in, a video out.

    Options that are None here and in the preset take the value of the checkpoint's folder.
    """

    prompt: str | None = option(
        None, "what the video shows; any text, exactly as typed", check=check_prompt
    )
    negative_prompt: str | None = option(
        None,
        "what it should not show; needs guidance. Released base models have an official one; "
        '"" for none',
        check=lambda name, text: check_length(f"{name}=", text),
    )
    prompt_file: str | None = option(
        None, 'one job a line: a prompt, or JSON such as {"prompt": "..", "seed": 7, "width": 256}'
    )
    image: str | None = option(None, "a picture to start from, for models trained on that (TI2V)")
    image_fit: str = option(
        "crop",
        "crop keeps its proportions, resize stretches it",
        choices=("crop", "resize"),
        needs=("image", "prompt_file"),
    )
    image_background: list[int] | None = option(
        None,
        "red, green, blue (0 to 255) behind transparent pixels; null refuses such images",
        at_least=0,
        at_most=255,
        needs=("image", "prompt_file"),
    )
    seed: int = option(
        0,
        "a video depends on seed and settings, not on batch or device; -1 draws one and says which",
        check=check_sample_seed,
    )
    num_videos: int = count(1, "videos per prompt, with seeds seed, seed+1, ...")

    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    guidance_scale: float | None = option(
        None, "weight of the prompt; 0 to 1 = no guidance", at_least=0
    )
    guidance_scale_2: float | None = option(
        None, "the same for the low-noise expert of models with two", at_least=0
    )
    deterministic: bool | None = option(None, "few_step: add predicted noise, not fresh noise")
    frame_first_noise: bool = option(False, "draw noise in FastVideo's order, for its seeds")
    compat: str = option(
        "none",
        "fastvideo: its noise order, its seed 1024 unless one is given, prompts only stripped, "
        "pixels rounded down to 8 bits; to compare the same seed side by side",
        choices=("none", "fastvideo"),
    )
    allow_untrained: bool = option(False, "let a few-step student do what it was not trained for")
    max_sequence_length: int | None = count(
        None, "text tokens that are read, padding included; another number makes another video"
    )

    height: int | None = count(
        None, "pixels; the error for an illegal size names the nearest legal one"
    )
    width: int | None = count(None, "pixels")
    num_frames: int | None = count(None, "number of frames: 4k + 1")
    fps: float | None = option(
        None,
        "frames per second written into the file; changes no frame",
        at_least=1,
        at_most=240,
    )

    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parallel: SharingConfig = field(default_factory=SharingConfig)
    preflight: str = option(
        "auto",
        "estimate memory and refuse what cannot fit: always, never, auto (from about 1 GiB on)",
        choices=("auto", "always", "never"),
    )
    chunk_latents: int = count(
        CHUNK_LATENTS, "latent frames decoded at a time; 1 needs least memory and takes longer"
    )
    tile: int | None = count(None, "decode in tiles of this many latents: less memory, not exact")
    decoder: str | None = option(
        None,
        "a tiny decoder in place of the VAE's: TAEHV's taew2_1.safetensors or taew2_2.safetensors; "
        "fast, needs little memory, not exact",
    )
    preview: bool = option(
        False,
        "after each step, write what the video will show as a small animated picture (STEM.gif)",
    )
    preview_decoder: str | None = option(
        None,
        "a tiny decoder for sharper previews, as in decoder=; none: a linear map to colours",
        needs=("preview",),
    )
    verify: bool = option(
        False,
        "hash all files anew and compare with SHA256SUMS or the hub's digests",
    )
    lora: list[str] | None = option(
        None,
        "LoRA files to merge into the weights, each with its strength if you like: a:0.8,b",
        check=check_lora,
    )
    lora_2: list[str] | None = option(
        None, "the same for the low-noise expert of models with two", check=check_lora
    )
    lora_strength: float = option(1.0, "factor on all LoRAs; 1 as they were trained")
    lora_strength_2: float | None = option(None, "the same for lora_2; none: as lora_strength")

    verbose: bool = option(False, "print every setting, where it comes from, and the weights")
    output_dir: str = option("outputs", "made if missing; nothing in it is ever overwritten")
    skip_done: bool = option(
        False, "leave out videos that the same command has finished in output_dir before"
    )
    save_latents: bool = option(
        True, "keep the latents of good videos; those of bad ones are always kept"
    )
    contact_sheet: bool = option(True, "write a PNG with frames of the video")
    embed_prompt: bool = option(True, "store prompt, seed and settings inside the mp4")
    hash_weights: bool = option(True, "put the sha256 of every weight file into the record")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt is not None and self.prompt_file is not None:
            raise WanError("prompt= and prompt_file=: give only one of them")
        check_colour("image_background", self.image_background)
        check_sample_seed("seed + num_videos - 1", self.seed + self.num_videos - 1)
        if self.decoder is not None and self.tile is not None:
            raise WanError(
                f"decoder= and tile={self.tile}: a tiny decoder needs no tiles; leave it out"
            )
        if self.skip_done and self.seed == RANDOM_SEED:
            raise WanError(
                f"skip_done=true with seed={RANDOM_SEED}: each run draws other seeds, so that no "
                "video is found again; give a seed"
            )


def check_text(key: str, text: str) -> None:
    """Refuse text that a record (UTF-8) or the title of an mp4 (no zero byte) cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise WanError(f"{key}=: the text is not valid UTF-8") from error
    if "\0" in text:
        raise WanError(f"{key}=: there is a zero byte in the text")
