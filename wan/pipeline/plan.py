"""Decide the sampler, its schedule and its guidance from a caller's arguments.

A base model accepts any. A few-step student was trained on one list of timesteps, without guidance
and without an image: anything else is refused in one error, unless `allow_untrained` is set.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from torch import Tensor

from wan.errors import WanError
from wan.pipeline.config import PipelineConfig
from wan.sampling.samplers import Stepper
from wan.sampling.schedule import FEW_STEP_TABLE_SHIFT, Schedule, few_step_schedule
from wan.sampling.scheduler_config import SchedulerSettings


def plain_number(value: Any) -> Any:
    """A number of NumPy, or a tensor with one number, as Python's; anything else as it is."""
    alone = isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0)
    return value.item() if alone else value


NUMBERS = ("timesteps", "shift", "guidance_scale", "guidance_scale_2", "max_sequence_length")


def check_is_number(name: str, value: Any) -> None:
    """Refuse a text or another object where a number must stand; None is allowed."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise WanError(f"{name}={value!r}: need a number")


@dataclass(frozen=True)
class SamplingRequest:
    """A caller's arguments about sampling; None takes the model's default.

    Attributes:
        num_inference_steps, timesteps, schedule: how many steps, or which timesteps, or the whole
            schedule; at most one of them.
        sampler: a name in `wan.sampling.samplers.SAMPLERS`.
        grid: a name in `wan.sampling.schedule.GRIDS` of the sampler, for a number of steps.
        shift: shift of the grid, or of the table in which the sigmas of `timesteps` are looked up;
            the list itself is not shifted. Not allowed with `schedule`.
        guidance_scale, guidance_scale_2: 0 to 1 turns guidance off; the second is for the low-noise
            expert.
        negative_prompt, image: whether there is one.
        num_frames: number of frames of the video.
        max_sequence_length: number of text tokens that the model reads. It attends to the padding
            after a prompt too, so another number gives another video.
        deterministic: few-step sampling adds predicted noise, not fresh noise.
        allow_untrained: let a student do what it was not trained for.
    """

    num_inference_steps: int | None = None
    timesteps: Sequence[float] | None = None
    schedule: Schedule | None = None
    sampler: str | None = None
    grid: str | None = None
    shift: float | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    negative_prompt: bool = False
    image: bool = False
    num_frames: int | None = None
    max_sequence_length: int | None = None
    deterministic: bool | None = None
    allow_untrained: bool = False

    def __post_init__(self) -> None:
        """Numbers of NumPy and PyTorch become Python's; what is no number is refused."""
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "timesteps" and value is not None:
                plain: Any = tuple(plain_number(one) for one in value)
            else:
                plain = plain_number(value)
            if item.name in NUMBERS:
                for one in plain if isinstance(plain, tuple) else [plain]:
                    check_is_number(item.name, one)
            object.__setattr__(self, item.name, plain)


@dataclass(frozen=True)
class SamplingPlan:
    """Everything that is decided about sampling before it starts.

    Attributes:
        scheduler: the sampler, its grid and its options.
        schedule: the steps.
        guidance_scale, guidance_scale_2: for the high-noise (or only) and the low-noise expert.
        spaced: the steps are those of the scheduler's grid, not a list or a given schedule.
        deterministic: few-step sampling adds predicted noise, not fresh noise.
        untrained: the settings that the model was not trained for, in words.
    """

    scheduler: SchedulerSettings
    schedule: Schedule
    guidance_scale: float
    guidance_scale_2: float
    spaced: bool = True
    deterministic: bool = False
    untrained: tuple[str, ...] = ()

    @property
    def sampler(self) -> str:
        """Name in `wan.sampling.samplers.SAMPLERS`."""
        return self.scheduler.sampler

    @property
    def grid(self) -> str | None:
        """How the steps are spaced, in `wan.sampling.schedule.GRIDS`; None for a given list."""
        return self.scheduler.grid if self.spaced else None

    @property
    def shift(self) -> float:
        """Of the grid, or of the table in which the sigmas of a list of timesteps are found."""
        return self.scheduler.shift

    def stepper(self, renoise: Callable[[int], Tensor] | None = None) -> Stepper:
        """A new solver for one run.

        Args:
            renoise: step -> fresh noise, shaped like the latents; for few-step sampling.
        """
        if self.sampler != "few_step":
            return self.scheduler.stepper(self.schedule)
        options = {"renoise": renoise, "deterministic": self.deterministic}
        return self.scheduler.stepper(self.schedule, **options)

    @property
    def guided(self) -> bool:
        """True if any step needs a second forward, with the negative prompt."""
        return self.guidance_scale != 1 or self.guidance_scale_2 != 1


def plan_sampling(config: PipelineConfig, request: SamplingRequest) -> SamplingPlan:
    """Decide sampler, schedule and guidance; needs no weights.

    Raises:
        WanError: arguments contradict each other, are out of range, or need `allow_untrained`.
    """
    knobs = ("num_inference_steps", "timesteps", "schedule")
    given = [name for name in knobs if getattr(request, name) is not None]
    if len(given) > 1:
        raise WanError(f"{' and '.join(given)}: both define the steps; give one of them")
    if request.schedule is not None and request.shift is not None:
        raise WanError(
            f"shift={request.shift:g} and schedule: a schedule has its noise levels already; build "
            "it with that shift, or leave shift out"
        )
    for name in ("timesteps", "schedule"):
        if request.grid is not None and getattr(request, name) is not None:
            raise WanError(f"grid={request.grid} and {name}: a grid is for a number of steps")
    if request.image and not config.expand_timesteps:
        raise WanError(
            "image: this model was not trained to start from one (TI2V models are: their "
            "model_index.json says expand_timesteps)"
        )
    if request.image and request.num_frames == 1:
        raise WanError("image with num_frames=1: the only frame would be the image itself")
    if request.max_sequence_length is not None and request.max_sequence_length < 1:
        raise WanError(f"max_sequence_length={request.max_sequence_length}: need at least 1")
    if request.guidance_scale_2 is not None and config.boundary_ratio is None:
        raise WanError(
            f"guidance_scale_2={request.guidance_scale_2}: for models with two experts; this one "
            "has one network"
        )
    for name in ("guidance_scale", "guidance_scale_2"):
        scale = getattr(request, name)
        if scale is not None and not (scale >= 0 and math.isfinite(scale)):
            raise WanError(f"{name}={scale}: must be at least 0 (0 to 1 turns guidance off)")
    if config.timesteps is None:
        plan = _plan_base(config, request)
    else:
        plan = _plan_few_step(config, config.timesteps, request)
    if request.deterministic is not None and plan.sampler != "few_step":
        raise WanError(f"deterministic: sampler {plan.sampler} adds no noise; for few_step")
    if plan.sampler != "few_step":
        return plan
    own = config.defaults.deterministic
    chosen = own if request.deterministic is None else request.deterministic
    return replace(plan, deterministic=chosen)


def _other_text_length(config: PipelineConfig, request: SamplingRequest) -> list[str]:
    length = request.max_sequence_length
    if length in (None, config.defaults.max_sequence_length):
        return []
    return [f"max_sequence_length={length}"]


def _plan_base(config: PipelineConfig, request: SamplingRequest) -> SamplingPlan:
    defaults = config.defaults
    scheduler = _scheduler(request, config.scheduler)
    own: tuple[float, float | None] = (defaults.guidance_scale, defaults.guidance_scale_2)
    if scheduler.sampler == "few_step":
        # What makes few steps enough is a student's weights, merged as a LoRA or loaded in place of
        # the model's own. They were distilled with guidance inside.
        own = (1.0, None)
    scale, scale_2 = _guidance(request, own)
    plan = SamplingPlan(
        scheduler,
        _schedule(request, scheduler, defaults.num_inference_steps),
        scale,
        scale_2,
        spaced=request.timesteps is None and request.schedule is None,
        untrained=tuple(_other_text_length(config, request)),
    )
    if request.negative_prompt and not plan.guided:
        warnings.warn(f"{NEGATIVE_UNUSED}; it is left out", stacklevel=3)
    return plan


NEGATIVE_UNUSED = "negative_prompt has no effect without guidance: set guidance_scale above 1"


def _guidance(request: SamplingRequest, own: tuple[float, float | None]) -> tuple[float, float]:
    """Guidance scales of both experts; 1 where guidance is off.

    As in diffusers, a scale of 0 to 1 means off. Below 1, that of the low-noise expert is used as
    a weight if the other one is on.

    Args:
        own: the model's, for a caller who gives none; None for the same as the first.
    """
    scale, scale_2 = request.guidance_scale, request.guidance_scale_2
    if scale is None:
        scale, own_2 = own
        scale_2 = own_2 if scale_2 is None else scale_2
    scale = max(scale, 1.0)
    if scale_2 is None:
        return scale, scale
    return scale, max(scale_2, 1.0) if scale == 1 else scale_2


def _plan_few_step(
    config: PipelineConfig, trained: tuple[float, ...], request: SamplingRequest
) -> SamplingPlan:
    steps, sampler = request.num_inference_steps, request.sampler
    usual = SchedulerSettings("few_step", shift=FEW_STEP_TABLE_SHIFT)
    scheduler = _scheduler(request, config.scheduler if config.own_scheduler else usual)
    untrained = []
    if config.own_scheduler is not None:
        untrained.append(f"scheduler={config.scheduler.class_name}")
    if steps is not None and steps != len(trained):
        untrained.append(f"num_inference_steps={steps}")
    if request.timesteps is not None and tuple(request.timesteps) != trained:
        untrained.append(f"timesteps={[*request.timesteps]}")
    if request.schedule is not None:
        untrained.append(f"schedule ({request.schedule.description})")
    if request.shift not in (None, FEW_STEP_TABLE_SHIFT):
        untrained.append(f"shift={request.shift:g}")
    if sampler not in (None, "few_step"):
        untrained.append(f"sampler={sampler}")
    if request.grid is not None:
        untrained.append(f"grid={request.grid}")
    for name in ("guidance_scale", "guidance_scale_2"):
        if (getattr(request, name) or 0) > 1:
            untrained.append(f"{name}={getattr(request, name)}")
    untrained += [name for name in ("negative_prompt", "image") if getattr(request, name)]
    untrained += _other_text_length(config, request)
    if untrained and not request.allow_untrained:
        listed = ", ".join(f"{t:g}" for t in trained)
        why = (
            f"this few-step model was trained for the {len(trained)} timesteps [{listed}] and "
            f"{config.defaults.max_sequence_length} text tokens, without guidance, negative prompt "
            "or image; leave it out, or set "
        )
        options = [as_option(setting) for setting in untrained]
        raise WanError(
            f"{', '.join(untrained)}: {why}allow_untrained=True to see what happens",
            f"{', '.join(options)}: {why}allow_untrained=true to see what happens",
        )
    own_steps = ("num_inference_steps=", "timesteps=", "schedule (", "scheduler=", "grid=")
    if any(name.startswith(own_steps) for name in untrained):
        schedule = _schedule(request, scheduler, len(trained))
        spaced = request.timesteps is None and request.schedule is None
    else:
        spaced = False
        schedule = few_step_schedule(trained, scheduler.shift)
    scale, scale_2 = _guidance(request, (1.0, None))
    if request.negative_prompt and scale == scale_2 == 1:
        raise WanError(NEGATIVE_UNUSED)
    return SamplingPlan(scheduler, schedule, scale, scale_2, spaced, untrained=tuple(untrained))


OPTION_NAMES = {"num_inference_steps": "steps", "grid": "sampler.grid"}


def as_option(setting: str) -> str:
    """A setting "name=value" as the commands spell it."""
    name, equals, value = setting.partition("=")
    return f"{OPTION_NAMES.get(name, name)}{equals}{value}"


def _scheduler(request: SamplingRequest, own: SchedulerSettings) -> SchedulerSettings:
    """The caller's sampler, grid and shift; what is left open is as the model's own."""
    settings = own
    if request.sampler not in (None, own.sampler):
        settings = SchedulerSettings(request.sampler or "", shift=own.shift)
    if request.grid is not None:
        settings = replace(settings, grid=request.grid)
    if request.shift is None:
        return settings
    if settings.sampler == "unipc" and settings.grid == "karras":
        raise WanError(f"shift={request.shift:g}: UniPC's grid karras has no shift; leave it out")
    return replace(settings, shift=request.shift)


def _schedule(
    request: SamplingRequest, scheduler: SchedulerSettings, default_steps: int
) -> Schedule:
    """The caller's schedule, or one from the caller's list or number of steps."""
    if request.schedule is not None:
        return request.schedule
    if request.timesteps is not None:
        return few_step_schedule(request.timesteps, scheduler.shift)
    steps = default_steps if request.num_inference_steps is None else request.num_inference_steps
    return scheduler.schedule(steps)
