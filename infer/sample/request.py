"""Decide, check and explain every open setting of a job before the weights are loaded."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from configs.schema import PARTS, SampleConfig, kept_settings
from infer.loading import sampling
from infer.sample.jobs import PROMPT_FILE, RECORD, Job
from wan.errors import WanError, visible
from wan.files import expanded
from wan.media.images import best_size, fit_picture, picture_size, read_picture
from wan.models.attention import NetworkAttention
from wan.models.tokenizer import check_escapes, clean_prompt, strip_prompt
from wan.pipeline.config import OFFICIAL_NEGATIVE_PROMPT, PipelineConfig
from wan.pipeline.plan import SamplingPlan, SamplingRequest, as_option, plan_sampling
from wan.precision import precision_note

MODEL = "checkpoint"  # as the source of a value: the model's own folder
OF_IMAGE = "image's proportions"  # as the source of a size
HOW = ("offload", "quantize", "compile", "tile")  # told in a summary where they are chosen
CHOSEN = ("command line", PROMPT_FILE, RECORD)  # sources that somebody typed
# Options whose default is in the model's folder, under the same name.
FROM_MODEL = ("height", "width", "num_frames", "fps", "max_sequence_length")
# Options that the printed header and the record list, in this order.
SHOWN = (
    *("checkpoint", "revision", "variant", *PARTS, "height", "width", "num_frames", "fps"),
    *("seed", "num_videos"),
    *("sampler.name", "sampler.steps", "sampler.timesteps", "sampler.grid", "sampler.shift"),
    *("guidance_scale", "guidance_scale_2", "negative_prompt"),
    *("image", "image_fit", "image_background"),
    *("max_sequence_length", "device", "dtype", "attention", "offload", "quantize", "compile"),
    *("chunk_latents", "tile", "deterministic", "frame_first_noise", "compat"),
    "allow_untrained",
    *("lora", "lora_2", "lora_strength", "lora_strength_2"),
)
# Listed only if given, so that videos of older releases are still known by their settings.
SHOWN_IF_GIVEN = ("decoder",)


@dataclass(frozen=True)
class Request:
    """A job whose settings are all decided.

    Attributes:
        job: the job as given, without a negative prompt that nothing would read.
        height, width, num_frames, fps, max_sequence_length: as given, or the model's defaults.
        plan: sampler, schedule and guidance.
        latent_shape: (C, T, h, w).
        grid: tokens along T, H, W.
        heads: attention heads of the transformer.
        attention_density: share of the FLOPs of dense self-attention, over layers and steps.
        settings: each option in SHOWN, and in SHOWN_IF_GIVEN -> (value, its source).
    """

    job: Job
    height: int
    width: int
    num_frames: int
    fps: float
    max_sequence_length: int
    plan: SamplingPlan
    latent_shape: tuple[int, int, int, int]
    grid: tuple[int, int, int]
    heads: int
    attention_density: float
    settings: dict[str, tuple[Any, str]]

    @property
    def config(self) -> SampleConfig:
        return self.job.config

    @property
    def clean(self) -> Callable[[str], str]:
        """Text as typed -> text as the tokenizer gets it."""
        return strip_prompt if self.config.compat == "fastvideo" else clean_prompt

    @property
    def prompt(self) -> str:
        assert self.config.prompt is not None  # every job has one
        return self.config.prompt

    def first_frame(self) -> Tensor | None:
        """The image as (3, H, W) in [-1, 1], of the video's size; None without one.

        Each call reads the file: the images of many jobs would need too much memory.
        """
        if self.config.image is None:
            return None
        picture = read_image(self.config)
        return fit_picture(picture, self.height, self.width, self.config.image_fit)

    @property
    def tokens(self) -> int:
        """Number of video tokens, the sequence length of self-attention."""
        return math.prod(self.grid)

    @property
    def precision(self) -> str | None:
        """A sentence if the networks compute in another dtype than their weights'; else None."""
        device, dtype = (self.settings[name][0] for name in ("device", "dtype"))
        return precision_note(getattr(torch, dtype), torch.device(device))

    @property
    def seeds(self) -> range:
        return range(self.config.seed, self.config.seed + self.config.num_videos)


def read_image(config: SampleConfig) -> Image:
    assert config.image is not None
    return read_picture(expanded(config.image), config.image_background)


def resolve_request(
    job: Job,
    model: PipelineConfig,
    attention: NetworkAttention,
    device: str,
    dtype: str,
    look: bool = True,
) -> Request:
    """Decide the settings that a job leaves open; refuse what the model can't do.

    Args:
        look: decode the image of the job, which tells whether it can be used; without it only the
            image's size is read.

    Raises:
        FileNotFoundError: the image does not exist.
        WanError: a size is illegal (names the nearest legal ones), the image is unreadable, or the
            model was not trained for the request; names the job if there are several.
    """
    try:
        return _resolve(job, model, attention, device, dtype, look)
    except WanError as error:
        if not job.name:
            raise
        raise error.about(job.name) from error


def _resolve(
    job: Job,
    model: PipelineConfig,
    attention: NetworkAttention,
    device: str,
    dtype: str,
    look: bool,
) -> Request:
    config, sources = job.config, dict(job.sources)
    check_strengths(config)
    if config.compat != "fastvideo":  # which is not cleaned
        for text in (config.prompt, config.negative_prompt):
            check_escapes(text or "")
    for name in ("image_fit", "image_background"):
        if config.image is None and sources[name] in CHOSEN:
            raise WanError(f"{name}= without image=: there is nothing to fit or to fill")
    values: dict[str, Any] = {}
    for name in FROM_MODEL:
        values[name] = getattr(config, name)
        if values[name] is None:
            values[name], sources[name] = getattr(model.defaults, name), MODEL
    if config.image is not None:
        image_size = picture_size(expanded(config.image))
        if not {sources["height"], sources["width"]} & set(CHOSEN):
            # The legal size nearest to the image's proportions, within the default's pixels.
            multiple = model.vae.spatial_stride * model.transformer.patch_size[1]
            area = values["height"] * values["width"]
            size = best_size(*image_size, area, multiple)
            values["height"], values["width"] = size
            sources["height"] = sources["width"] = OF_IMAGE
    few_steps_of_base = model.timesteps is None and config.sampler.name == "few_step"
    if few_steps_of_base and sources["guidance_scale"] not in (*CHOSEN, "default"):
        # A preset's is for the base model's own weights, not for a student's merged into them.
        config = replace(config, guidance_scale=None, guidance_scale_2=None)
        sources["guidance_scale"] = "few_step"
    shape = model.latent_shape(values["height"], values["width"], values["num_frames"])
    config = with_official_negative(config, sources, model)
    limits = {name: values[name] for name in ("num_frames", "max_sequence_length")}
    asked = SamplingRequest(**sampling_options(config), **limits)
    if sources["negative_prompt"] not in CHOSEN:  # a preset's is no error where nothing reads it
        asked = replace(asked, negative_prompt=False)
    plan = plan_sampling(model, asked)
    if config.negative_prompt and not plan.guided:
        sources["negative_prompt"] = "no guidance"
        config = replace(config, negative_prompt=None)
    # Refuses a choice of steps that treats equal timesteps differently.
    attention.exact_timesteps(plan.schedule.timesteps.tolist())
    if config.image is not None and look:  # refuses an image that cannot be used
        fit_picture(read_image(config), values["height"], values["width"], config.image_fit)
    sources["attention"] = sources["attention.name"]
    grid = model.transformer.token_grid(shape[1:])
    decided = _decided(config, model, plan, device, dtype)
    return Request(
        job=replace(job, config=config),
        plan=plan,
        latent_shape=shape,
        grid=grid,
        heads=model.transformer.num_attention_heads,
        attention_density=attention.density(grid, len(plan.schedule)),
        settings=_settings(config, sources, values | decided, model),
        **values,
    )


def check_strengths(config: SampleConfig) -> None:
    """Refuse a strength without a LoRA that it weighs; warn of one for an expert without one."""
    if not config.lora and not config.lora_2 and config.lora_strength != 1:
        raise WanError(
            f"lora_strength={config.lora_strength:g} without lora=: there is nothing to weigh; "
            "name the LoRA file with lora=FILE"
        )
    if config.lora_strength_2 is not None and not config.lora_2:
        warnings.warn(
            f"lora_strength_2={config.lora_strength_2:g} without lora_2=: it weighs nothing; the "
            "LoRAs of lora= have lora_strength=",
            stacklevel=2,
        )


def with_official_negative(
    config: SampleConfig, sources: dict[str, str], model: PipelineConfig
) -> SampleConfig:
    """The official negative prompt for a base model as released, if none is given.

    The presets of these models have it too. From Python, as in diffusers, it is "".
    """
    if sources["negative_prompt"] != "default" or not model.released_base:
        return config
    sources["negative_prompt"] = "official code"
    return replace(config, negative_prompt=OFFICIAL_NEGATIVE_PROMPT)


def _decided(
    config: SampleConfig, model: PipelineConfig, plan: SamplingPlan, device: str, dtype: str
) -> dict[str, Any]:
    """Values that the model or another option decides, not the typed value alone."""
    deterministic = config.deterministic
    if deterministic is None:
        deterministic = plan.deterministic or None  # listed only if true
    return {
        "sampler.name": plan.sampler,
        "sampler.steps": len(plan.schedule),
        "sampler.grid": plan.grid,
        "sampler.shift": plan.shift,
        "guidance_scale": plan.guidance_scale,
        "guidance_scale_2": plan.guidance_scale_2 if model.boundary_ratio else None,
        "lora_strength": config.lora_strength if config.lora or config.lora_2 else None,
        "lora_strength_2": config.lora_strength_2 if config.lora_2 else None,
        "device": device,
        "dtype": dtype,
        "attention": str(config.attention),
        "deterministic": deterministic,
        "image_fit": config.image_fit if config.image else None,
        "frame_first_noise": config.frame_first_noise or None,
        "compat": None if config.compat == "none" else config.compat,
        "allow_untrained": config.allow_untrained or None,
    }


def sampling_options(config: SampleConfig) -> dict[str, Any]:
    """The settings that decide the sampling plan, by the names of `SamplingRequest`."""
    return sampling(config) | {
        "guidance_scale_2": config.guidance_scale_2,
        "negative_prompt": bool(config.negative_prompt),
        "image": config.image is not None,
        "deterministic": config.deterministic,
    }


def _settings(
    config: SampleConfig,
    sources: dict[str, str],
    decided: dict[str, Any],
    model: PipelineConfig,
) -> dict[str, tuple[Any, str]]:
    """Each option in SHOWN -> (the value that is used, its source)."""
    settings: dict[str, tuple[Any, str]] = {}
    for name in SHOWN:
        nested = name.removeprefix("sampler.")
        asked = getattr(config if nested == name else config.sampler, nested)
        value, source = decided.get(name, asked), sources[name]
        if asked is None and value is not None and source == "default":
            source = _source_of_default(name, model, decided)
        settings[name] = (kept_settings({name: value}, config.output_dir)[name], source)
    for name in SHOWN_IF_GIVEN:
        if (value := getattr(config, name)) is not None:
            settings[name] = (kept_settings({name: value}, config.output_dir)[name], sources[name])
    if config.sampler.timesteps is not None:
        settings["sampler.steps"] = (settings["sampler.steps"][0], sources["sampler.timesteps"])
    return settings


def _source_of_default(name: str, model: PipelineConfig, decided: dict[str, Any]) -> str:
    """Where the value of an option comes from that nobody gave: the model's files, or the code.

    Sampler, grid and shift are the folder's if its scheduler could be read and is the one used; a
    student's are what it was trained with.
    """
    if name == "guidance_scale" and model.timesteps is None:
        return "few_step" if decided["sampler.name"] == "few_step" else MODEL
    if name not in ("sampler.name", "sampler.grid", "sampler.shift") or model.timesteps is not None:
        return MODEL
    own = model.scheduler
    same = own.followed and decided["sampler.name"] == own.sampler
    return MODEL if same or (name == "sampler.shift" and own.followed) else "default"


def describe(request: Request, folder: Path) -> str:
    """The header of a run, and below it what should be known of its result."""
    lines = details(request, folder) if request.config.verbose else summary(request)
    if (note := request.precision) is not None:
        lines.append(note)
    if request.config.decoder is not None:
        lines.append("not exact: decoded by a tiny decoder, not by the model's own VAE")
    if request.plan.untrained:
        settings = ", ".join(map(as_option, request.plan.untrained))
        lines.append(f"not what this model was trained for: {settings}")
    return "\n".join(lines)


def summary(request: Request) -> list[str]:
    """What decides most of a run, a line each: model, size, steps, seed, device."""
    value = {name: value for name, (value, _) in request.settings.items()}
    source = {name: source for name, (_, source) in request.settings.items()}
    grid, schedule = " x ".join(map(str, request.grid)), request.plan.schedule
    model = [str(value["checkpoint"])]
    for name in (*PARTS, "lora", "lora_2", "image"):
        if value[name]:
            model.append(f"{name} {_short(value[name])}")
    size = f"{value['width']}x{value['height']}, {value['num_frames']} frames"
    if source["width"] == OF_IMAGE:
        size += f" ({OF_IMAGE})"
    steps = f"{len(schedule)} of {value['sampler.name']}, t {_ends(schedule.timesteps.tolist())}"
    guidance = f"guidance {value['guidance_scale']:g}" if request.plan.guided else "no guidance"
    seed, count = value["seed"], value["num_videos"]
    seeds = f"{seed}" if count == 1 else f"{seed} to {seed + count - 1}"
    if source["seed"] not in (*CHOSEN, "default"):
        seeds += f", {source['seed']}"
    device = [value["device"], value["dtype"], f"attention {value['attention']}"]
    device += [f"{name} {value[name]}" for name in HOW if value[name] not in (None, "none")]
    if request.attention_density < 1:
        device.append(f"{request.attention_density:.1%} of dense self-attention")
    return [
        f"model   {', '.join(model)}",
        f"size    {size}: {request.tokens} tokens ({grid})",
        f"steps   {steps}; {guidance}",
        f"seed    {seeds}",
        f"device  {', '.join(map(str, device))}",
    ]


def _ends(timesteps: list[float], most: int = 8) -> str:
    """Timesteps in words; of many, the first and the last ones."""
    words = [f"{t:.4g}" for t in timesteps]
    return " ".join(words if len(words) <= most else [*words[:4], "..", *words[-3:]])


def details(request: Request, folder: Path) -> list[str]:
    """Each setting and its source, then every step's (t, sigma)."""
    rows = [("prompt", _short(request.prompt), request.job.sources["prompt"])]
    for name, (value, source) in request.settings.items():
        if value is not None and value != "":
            rows.append((name.removeprefix("sampler."), _short(value), source))
    channels, frames, height, width = request.latent_shape
    rows.append(("latents", f"{channels} x {frames} x {height} x {width}", "computed"))
    grid = " x ".join(map(str, request.grid))
    rows.append(("tokens", f"{request.tokens} ({grid})", "computed"))
    rows.append(("self-attention", f"{request.attention_density:.1%} of dense", "computed"))
    rows.append(("model folder", str(folder), "found"))
    wide = max(len(name) for name, _, _ in rows)
    value_width = max(len(value) for _, value, _ in rows)
    lines = [f"{n:<{wide}}  {v:<{value_width}}  {s}".rstrip() for n, v, s in rows]
    schedule = request.plan.schedule
    steps = [
        f"{t:g} ({s:.4f})"
        for t, s in zip(schedule.timesteps.tolist(), schedule.sigmas.tolist(), strict=False)
    ]
    lines.append(f"t (sigma) of {schedule.description}:")
    return lines + ["  " + "  ".join(steps[i : i + 6]) for i in range(0, len(steps), 6)]


def _short(value: Any, limit: int = 60) -> str:
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        value = ", ".join(value)
    text = " ".join(visible(str(value)).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def identity(request: Request) -> dict[str, Any]:
    """What a video is made from, as its record holds it: prompt, settings and their sources."""
    settings = {
        name: {"value": value, "from": source} for name, (value, source) in request.settings.items()
    }
    return {"prompt": request.prompt, "settings": settings}
