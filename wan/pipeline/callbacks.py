"""A sampler's run in a pipeline, and what happens after each of its steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wan.errors import check_names
from wan.pipeline.inputs import CALLBACK_TENSORS, OnProgress, report
from wan.pipeline.plan import SamplingPlan
from wan.sampling.denoiser import Denoiser
from wan.sampling.samplers import build_sampler

# (pipeline, step, timestep, tensors by name) -> tensors to go on with, by name
StepCallback = Callable[..., dict[str, Tensor] | None]


class Interrupted(Exception):
    """Leaves a sampler from inside its hook, with the state reached."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents


@dataclass
class StepHook:
    """A sampler's `on_step`: check the latents, show them to the caller, report, maybe stop.

    Attributes:
        pipeline: handed to the callback; sampling stops once its `interrupt` is true.
        denoiser: its prompts can be replaced by the callback.
        steps: of the whole run.
        callback: the caller's function, in the form that diffusers defined.
        names: the tensors it wants to see, of `CALLBACK_TENSORS`.
    """

    pipeline: Any
    denoiser: Denoiser
    steps: int
    callback: StepCallback | None
    names: Sequence[str]
    on_progress: OnProgress | None

    def __call__(self, i: int, timestep: float, sigma: float, x: Tensor) -> Tensor | None:
        """After step i: the latents to go on with, or None for x itself.

        Raises:
            FloatingPointError: x is infinite or NaN somewhere.
            Interrupted: the caller wants no further step.
        """
        if not bool(x.isfinite().all()):
            raise FloatingPointError(
                f"latents are not finite after step {i + 1} of {self.steps} (timestep {timestep:g})"
            )
        replaced = None if self.callback is None else self._call_back(i, timestep, x)
        report(self.on_progress, "denoise", i + 1, self.steps)
        if self.pipeline.interrupt:
            raise Interrupted(x if replaced is None else replaced)
        return replaced

    def _call_back(self, i: int, timestep: float, x: Tensor) -> Tensor | None:
        """Show a step to the caller's function and take what it wants changed."""
        assert self.callback is not None
        denoiser = self.denoiser
        tensors: dict[str, Tensor | None] = {
            "latents": x,
            "prompt_embeds": denoiser.context,
            "negative_prompt_embeds": denoiser.negative_context,
        }
        # An integer where it is one, which is the dtype that callbacks written for diffusers know.
        t = torch.tensor(int(timestep) if timestep == int(timestep) else timestep)
        shown = {name: tensors[name] for name in self.names}
        changed = self.callback(self.pipeline, i, t, shown) or {}
        check_names("the callback's return", list(changed), CALLBACK_TENSORS)
        if "prompt_embeds" in changed or "negative_prompt_embeds" in changed:
            denoiser.set_context(
                changed.get("prompt_embeds", denoiser.context),
                changed.get("negative_prompt_embeds", denoiser.negative_context),
            )
        return changed.get("latents")


def run_sampler(plan: SamplingPlan, x: Tensor, hook: StepHook, **options: Any) -> Tensor:
    """From the noise x to the end of the plan, or to where the caller interrupts it.

    Args:
        options: of the plan's sampler.
    """
    sample = build_sampler(plan.sampler)
    report(hook.on_progress, "denoise", 0, len(plan.schedule))
    try:
        x = sample(hook.denoiser, x, plan.schedule, on_step=hook, **options)
    except Interrupted as stopped:
        x = stopped.latents
    return hook.denoiser.impose_image(x)
