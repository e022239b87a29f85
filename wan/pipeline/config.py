"""The settings files of a released folder, read before any weight is.

    model_index.json                    pipeline class, boundary_ratio, expand_timesteps
    scheduler/scheduler_config.json     the sampler and its noise levels
    transformer/ [transformer_2/] vae/ text_encoder/     config.json each, and weights
    tokenizer/
    sampling_defaults.json              this project's own, optional: `SamplingDefaults`
    shared_parts.json                   also its own, optional: parts in other folders below

A student's model_index.json may hold `timesteps`, the list that it was trained on. Without it, the
list of the released students is used.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from wan.errors import WanError, check_names, errors_about
from wan.files import read_json, write_json
from wan.models.dit_config import DiTConfig
from wan.models.umt5 import UMT5Config
from wan.models.vae import VAEConfig
from wan.models.vae_config import VAE_2_1
from wan.paths import all_inside, inside
from wan.pipeline.known_models import (
    HEAD_DIM,
    VAE_2_2,
    config_of_shapes,
    known_config,
    read_settings,
    shapes_of,
    shapes_with,
)
from wan.pipeline.model_index import BASE as BASE  # imported from here by others
from wan.pipeline.model_index import FEW_STEP, PIPELINE_CLASSES, is_used, read_index
from wan.sampling.schedule import FEW_STEP_TIMESTEPS, few_step_schedule
from wan.sampling.scheduler_config import (
    SchedulerSettings,
    read_scheduler,
    read_scheduler_or_default,
)
from wan.settings import bounded, check_settings
from wan.weights.checkpoint import open_checkpoint
from wan.weights.digests import list_files

DEFAULTS_FILE = "sampling_defaults.json"
SHARED_FILE = "shared_parts.json"
SHARED_PARTS = ("transformer", "transformer_2", "vae", "text_encoder", "tokenizer")
CARD = "README.md"
# Heads, layers and latent channels of the released base models: TI2V-5B, A14B and 14B, 1.3B.
RELEASED_SIZES = ((24, 30, 48), (40, 40, 16), (12, 30, 16))
# What the official code takes where its caller gives none. Source: Wan2.2 `shared_config.py`.
OFFICIAL_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，"
    "整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)
LIBRARIES = {  # component -> [library, class] in model_index.json
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    # This class uses tokenizer.json unchanged; T5's own rebuilds it with other special ids.
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
}


@dataclass(frozen=True)
class SamplingDefaults:
    """Values that a call uses where the caller gives none."""

    height: int = bounded(480, at_least=1, at_most=1 << 16)
    width: int = bounded(832, at_least=1, at_most=1 << 16)
    num_frames: int = bounded(81, at_least=1, at_most=1 << 16)
    fps: float = bounded(16, above=0, at_most=1000)
    num_inference_steps: int = bounded(50, at_least=1, at_most=1000)
    guidance_scale: float = bounded(5.0, at_least=0, at_most=1000)
    guidance_scale_2: float | None = bounded(None, at_least=0, at_most=1000)  # None: the same
    max_sequence_length: int = bounded(512, at_least=1, at_most=1 << 16)
    attention: str | None = None  # sparse self-attention used in training; None: full
    deterministic: bool = False  # few-step: predicted noise is put back between steps, not fresh

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class PipelineConfig:
    """The settings of a whole pipeline.

    Attributes:
        class_name: "WanPipeline" (base model) or "WanDMDPipeline" (few-step student).
        boundary_ratio: noise level where two experts hand over; None for one network.
        expand_timesteps: the network was trained with a timestep per token, so that a clean first
            frame can be given.
        scheduler: sampler and noise levels of a base model; a student uses them only where
            `own_scheduler` says that they were replaced.
        own_scheduler: what the model came with, if `scheduler` was replaced; None if not.
        timesteps: the list a student was trained on; None for a base model.
    """

    class_name: str
    transformer: DiTConfig
    vae: VAEConfig
    text_encoder: UMT5Config
    boundary_ratio: float | None = bounded(None, above=0, at_most=1)
    expand_timesteps: bool = False
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    own_scheduler: SchedulerSettings | None = None
    timesteps: tuple[float, ...] | None = bounded(None, above=0, at_most=1000, max_length=1000)
    defaults: SamplingDefaults = SamplingDefaults()

    def __post_init__(self) -> None:
        check_settings(self)
        if self.class_name not in PIPELINE_CLASSES:
            raise WanError(
                f"pipeline class {self.class_name!r}: known are {', '.join(PIPELINE_CLASSES)}"
            )
        dit, channels = self.transformer, self.vae.z_dim
        if (dit.in_channels, dit.out_channels) != (channels, channels):
            raise WanError(
                f"the transformer has {dit.in_channels} input and {dit.out_channels} output "
                f"channels, the VAE's latents have {channels}: they are of different models"
            )
        if dit.text_dim != self.text_encoder.d_model:
            raise WanError(
                f"the transformer reads text of width {dit.text_dim}, the text encoder gives "
                f"{self.text_encoder.d_model}: they are of different models"
            )
        if (self.class_name == FEW_STEP) != (self.timesteps is not None):
            raise WanError(f"{self.class_name} with timesteps={self.timesteps}: only students")
        if self.timesteps is not None:
            few_step_schedule(self.timesteps)  # refuses a list that is no schedule

    @property
    def released_base(self) -> bool:
        """Whether this is a base model of a released size, and not a student or a small one."""
        dit = self.transformer
        size = (dit.num_attention_heads, dit.num_layers, dit.in_channels)
        return self.timesteps is None and size in RELEASED_SIZES

    @property
    def shift(self) -> float:
        """How far the scheduler's grid is moved towards high noise."""
        return self.scheduler.shift

    def with_scheduler(self, scheduler: Any) -> "PipelineConfig":
        """The same model, sampled by another scheduler.

        Args:
            scheduler: one of `wan.sampling.schedulers` or of diffusers, or a configuration; see
                `wan.sampling.scheduler_config.read_scheduler`.

        Raises:
            WanError: it cannot be followed; says why.
        """
        given = read_scheduler(scheduler)
        own = self.own_scheduler or self.scheduler
        if given == own:
            return replace(self, scheduler=own, own_scheduler=None)
        return replace(self, scheduler=given, own_scheduler=own)

    @property
    def components(self) -> tuple[str, ...]:
        """The folders that hold weights."""
        experts = ("transformer",) if self.boundary_ratio is None else TWO_EXPERTS
        return (*experts, "vae", "text_encoder")

    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a video.

        Raises:
            WanError: the model cannot make this size; names the nearest legal sizes.
        """
        for name, size in (("height", height), ("width", width), ("num_frames", num_frames)):
            if not hasattr(size, "__index__"):
                raise WanError(f"{name}={size!r}: need a whole number, such as int({size!r})")
        _, patch_h, patch_w = self.transformer.patch_size
        stride, longest = self.vae.spatial_stride, self.transformer.rope_max_seq_len
        problems = []
        for name, size, patch in (("height", height, patch_h), ("width", width, patch_w)):
            step = stride * patch
            if nearest := _nearest(size, step, first=step, last=longest * step):
                problems.append(f"{name}={size}: must be a multiple of {step}{nearest}")
        time = self.vae.temporal_stride
        if nearest := _nearest(num_frames, time, first=1, last=(longest - 1) * time + 1):
            problems.append(f"num_frames={num_frames}: must be {time}k + 1{nearest}")
        if problems:
            raise WanError("; ".join(problems))
        latent_frames = self.vae.latent_frames(num_frames)
        return (self.vae.z_dim, latent_frames, height // stride, width // stride)


TWO_EXPERTS = ("transformer", "transformer_2")


def _nearest(size: int, step: int, first: int, last: int) -> str:
    """The legal sizes (first + k * step, at most last) nearest to `size`; "" if it is legal."""
    low = first + (size - first) // step * step
    if first <= size <= last and low == size:
        return ""
    around = sorted({min(max(first, value), last) for value in (low, low + step)})
    return f"; nearest {'is' if len(around) == 1 else 'are'} {' and '.join(map(str, around))}"


# --- reading --------------------------------------------------------------------------------------


def read_pipeline_config(
    folder: Path,
    overrides: Mapping[str, Path] | None = None,
    shared: Mapping[str, Path] | None = None,
) -> PipelineConfig:
    """Read every settings file of a released folder.

    Args:
        folder: holds model_index.json.
        overrides: component -> another folder or file for it; see `component_settings`.
        shared: what `shared_parts` returned for this folder, if it was called already.

    Raises:
        WanError: a file is missing or damaged, the class is unknown, a part is quantised, or parts
            don't fit together.
    """
    index, source = read_index(folder), str(folder / "model_index.json")
    shared = shared_parts(folder) if shared is None else shared
    configs = {
        name: component_settings(folder, name, overrides or {}, shared)
        for name in ("transformer", "vae", "text_encoder")
    }
    boundary = index.get("boundary_ratio")
    if (boundary is not None) != is_used(index.get("transformer_2")):
        raise WanError(
            f"{source}: boundary_ratio={boundary} and transformer_2={index.get('transformer_2')}: "
            "two experts need both, one network neither"
        )
    transformer = DiTConfig.from_json(configs["transformer"])
    vae = VAEConfig.from_json(configs["vae"])
    text_encoder = UMT5Config.from_json(configs["text_encoder"])
    scheduler = folder_scheduler(folder)
    defaults = read_defaults(folder, vae, boundary is not None)
    timesteps = index.get("timesteps", FEW_STEP_TIMESTEPS)
    with errors_about(source):
        return PipelineConfig(
            class_name=index["_class_name"],
            transformer=transformer,
            vae=vae,
            text_encoder=text_encoder,
            boundary_ratio=boundary,
            expand_timesteps=index.get("expand_timesteps", False),
            scheduler=scheduler,
            timesteps=timesteps if index["_class_name"] == FEW_STEP else None,
            defaults=defaults,
        )


def component_settings(
    folder: Path,
    component: str,
    overrides: Mapping[str, Path],
    shared: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """The settings of a component; arguments as in `read_pipeline_config`.

    Weights from elsewhere have the settings of the config.json in their folder. Without one, they
    have those of the model's folder if their shapes agree, else those of `known_config`.

    Raises:
        WanError: there is no config.json, or the weights are quantised.
    """
    own = overrides.get(component)
    if own is None or (own.is_dir() and (own / "config.json").is_file()):
        return read_settings(component_config(folder, component, overrides, shared))
    checkpoint = open_checkpoint(own)
    shapes = shapes_of(component, checkpoint)
    try:
        values = read_settings(component_config(folder, component, {}, shared))
    except WanError:  # the folder lacks this part
        return known_config(component, checkpoint)
    if shapes_with(component, values) != shapes:
        values = config_of_shapes(component, shapes) or values  # loading says what does not fit
    return values


def component_config(
    folder: Path,
    component: str,
    overrides: Mapping[str, Path],
    shared: Mapping[str, Path] | None = None,
) -> Path:
    """The path of a component's config.json; arguments as in `read_pipeline_config`.

    Raises:
        WanError: there is none.
    """
    own = overrides.get(component)
    if own is not None and own.is_dir() and (own / "config.json").is_file():
        return inside(own / "config.json", own)
    shared = shared_parts(folder) if shared is None else shared
    path = shared.get(component, folder / component) / "config.json"
    if not path.is_file():
        raise WanError(f"{path} is missing: the model's folder is not complete")
    return inside(path, folder)


def part_folder(folder: Path, part: str) -> Path:
    """The folder of a part: below the model's folder, or the place that `SHARED_FILE` names.

    Raises:
        WanError: it, or a file in it, is a link to what did not come with the model.
    """
    return all_inside(shared_parts(folder).get(part, folder / part), folder)


def shared_parts(folder: Path) -> dict[str, Path]:
    """The parts that a model takes from other folders: part -> folder.

    Models that share parts store them once: `SHARED_FILE` holds a JSON object, part -> folder,
    relative to the model's folder. They lie inside of it or among the shipped models.
    `infer.convert` writes all parts into one folder.

    Raises:
        WanError: the file names something else than parts and folders, or a folder elsewhere.
    """
    file = folder / SHARED_FILE
    if not file.is_file():
        return {}
    values = read_json(inside(file, folder))
    if not all(isinstance(place, str) for place in values.values()):
        raise WanError(f"{file}: needs a folder's name for each part")
    check_names(str(file), list(values), SHARED_PARTS)
    places = {part: Path(os.path.abspath(folder / place)) for part, place in values.items()}
    return {part: inside(place, folder) for part, place in places.items()}


def parts_from_elsewhere(folder: Path, shared: Mapping[str, Path] | None = None) -> dict[str, Path]:
    """`shared_parts` (given, if they are read already), and the parts that are links."""
    entries = folder.iterdir() if folder.is_dir() else ()
    shared = shared_parts(folder) if shared is None else shared
    links = [e for e in sorted(entries) if e.is_symlink() and e.is_dir() and e.name not in shared]
    return {link.name: inside(link, folder).resolve() for link in links} | dict(shared)


def model_files(folder: Path, shared: Mapping[str, Path] | None = None) -> dict[str, Path]:
    """Every file that a model's videos may depend on, by its path in the released layout.

    Parts in other places are included, and what they replace is not. The model's card is neither.

    Raises:
        WanError: one is a link to what did not come with the model.
    """
    elsewhere = parts_from_elsewhere(folder, shared)
    # A folder of another layout may hold more than its parts.
    own = list_files(folder) if (folder / "model_index.json").is_file() or not elsewhere else {}
    files = {name: path for name, path in own.items() if name.split("/")[0] not in elsewhere}
    for part, place in elsewhere.items():
        files |= {f"{part}/{name}": path for name, path in list_files(place).items()}
    for name, path in files.items():
        place = elsewhere.get(name.split("/")[0], folder)
        inside(path, folder, place, *([] if place.is_dir() else [place.parent]))
    return {name: path for name, path in files.items() if name != CARD}


def folder_scheduler(folder: Path) -> SchedulerSettings:
    """What a model's scheduler_config.json says; warns if it cannot be followed."""
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        raise WanError(f"{path} is missing: the model's folder is not complete")
    return read_scheduler_or_default(read_json(inside(path, folder), infinite=True), str(path))


def read_defaults(folder: Path, vae: VAEConfig, two_experts: bool) -> SamplingDefaults:
    """The folder's own defaults; those of the official code for values it does not set."""
    defaults = model_defaults(vae, two_experts)
    path = folder / DEFAULTS_FILE
    if not path.is_file():
        return defaults
    return override_defaults(defaults, read_json(inside(path, folder)), str(path))


def model_defaults(vae: VAEConfig, two_experts: bool) -> SamplingDefaults:
    """The defaults of the official code for a model of this kind.

    Source: Wan2.2 `wan/configs`. A VAE with spatial stride 16 marks TI2V-5B; diffusers runs the
    other models at 832x480.
    """
    defaults = SamplingDefaults()
    if vae.spatial_stride == 16:
        defaults = replace(defaults, height=704, width=1280, num_frames=121, fps=24)
    if two_experts:
        defaults = replace(
            defaults, num_inference_steps=40, guidance_scale=4.0, guidance_scale_2=3.0
        )
    return defaults


def override_defaults(
    defaults: SamplingDefaults, own: Mapping[str, Any], where: str
) -> SamplingDefaults:
    """`defaults` with some of them replaced; an unknown name is a WanError that says where."""
    known = [field.name for field in fields(SamplingDefaults)]
    if unknown := sorted(set(own) - set(known)):
        raise WanError(f"{where}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    with errors_about(where):
        return replace(defaults, **own)


# --- writing --------------------------------------------------------------------------------------


def model_index_json(config: PipelineConfig) -> dict[str, Any]:
    """The model_index.json of a pipeline."""
    index: dict[str, Any] = {
        "_class_name": config.class_name,
        "_diffusers_version": "0.35.0",
        "boundary_ratio": config.boundary_ratio,
        "expand_timesteps": config.expand_timesteps,
        **LIBRARIES,
        "scheduler": ["diffusers", config.scheduler.class_name],
        "transformer_2": LIBRARIES["transformer"] if config.boundary_ratio else [None, None],
    }
    # Written only where needed, because other readers take a list for a [library, class] pair.
    if config.timesteps not in (None, FEW_STEP_TIMESTEPS):
        index["timesteps"] = list(config.timesteps or ())
    return index


def write_configs(config: PipelineConfig, folder: Path) -> None:
    """Write model_index.json, the sampling defaults, the scheduler's and every part's settings."""
    transformers = TWO_EXPERTS if config.boundary_ratio is not None else TWO_EXPERTS[:1]
    objects = {
        "model_index.json": model_index_json(config),
        "scheduler/scheduler_config.json": config.scheduler.to_json(),
        DEFAULTS_FILE: asdict(config.defaults),
        "vae/config.json": config.vae.to_json(),
        "text_encoder/config.json": config.text_encoder.to_json(),
        **{f"{name}/config.json": config.transformer.to_json() for name in transformers},
    }
    for name, values in objects.items():
        write_json(folder / name, values)


def released_config(checkpoint: str) -> PipelineConfig | None:
    """What the files of a released base model of one transformer say, by its id on the hub.

    For whoever wants to know before they are there; None for any other name.
    """
    wan21: dict[str, Any] = {"in_channels": 16, "out_channels": 16}
    known = {
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers": (DiTConfig(), VAE_2_2),
        "Wan-AI/Wan2.1-T2V-14B-Diffusers": (DiTConfig(40, HEAD_DIM, 40, 13824, **wan21), VAE_2_1),
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (DiTConfig(12, HEAD_DIM, 30, 8960, **wan21), VAE_2_1),
    }
    if checkpoint not in known:
        return None
    transformer, vae = known[checkpoint]
    is_5b = vae is VAE_2_2
    return PipelineConfig(
        BASE,
        transformer,
        vae,
        UMT5Config(),
        expand_timesteps=is_5b,
        scheduler=SchedulerSettings(shift=5.0 if is_5b else 3.0),
        defaults=model_defaults(vae, two_experts=False),
    )
