"""What happens after each denoising step of a pipeline call: callbacks, progress, interruption."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wan.errors import WanError, check_names
from wan.pipeline.inputs import CALLBACK_TENSORS, X0, OnProgress, report
from wan.sampling.denoiser import Denoiser

# (pipeline, step, timestep, tensors by name) -> tensors that replace some of them, by name
StepCallback = Callable[..., dict[str, Tensor] | None]
# (denoiser, step, timestep, latents after the step) -> latents that replace them, or None.
# It may replace the denoiser's prompts, and stops the sampler by raising `Interrupted`.
StepFunction = Callable[[Denoiser, int, float, Tensor], Tensor | None]


class Interrupted(Exception):
    """Raised after a step to leave the sampler with the latents reached so far."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents


@dataclass
class StepHook:
    """The `StepFunction` of a pipeline call: runs the callback, reports progress, may stop.

    Attributes:
        pipeline: handed to the callback, which may change the guidance of the next steps
            (`_guidance_scale`) and stop sampling (`interrupt`).
        steps: number of steps of the whole run.
        callback: the caller's function, in the form that diffusers defined.
        names: names from `CALLBACK_TENSORS`, and x0: the tensors that the callback receives.
        bar: counts the steps, if there is one.
        x0: the clean latents that were predicted in the last step, if `see_x0` was called.
    """

    pipeline: Any
    steps: int
    callback: StepCallback | None
    names: Sequence[str]
    on_progress: OnProgress | None
    bar: Any = None
    x0: Tensor | None = None

    def see_x0(self, i: int, x0: Tensor) -> None:
        self.x0 = x0

    def __call__(self, denoiser: Denoiser, i: int, timestep: float, x: Tensor) -> Tensor | None:
        """Called after step i; returns the latents that replace x, or None to keep x.

        Raises:
            Interrupted: the caller has set `pipeline.interrupt`.
        """
        replaced = None
        if self.callback is not None:
            replaced = self._call_back(self.callback, denoiser, i, timestep, x)
        if self.bar is not None:
            self.bar.update()
        report(self.on_progress, "denoise", i + 1, self.steps)
        if self.pipeline.interrupt:
            raise Interrupted(x if replaced is None else replaced)
        return replaced

    def _call_back(
        self, callback: StepCallback, denoiser: Denoiser, i: int, timestep: float, x: Tensor
    ) -> Tensor | None:
        """Run the callback; apply changed prompts, return changed latents."""
        tensors: dict[str, Tensor | None] = {
            "latents": x,
            "prompt_embeds": denoiser.context,
            "negative_prompt_embeds": denoiser.negative_context,
            X0: self.x0,
        }
        # Whole timesteps become int64, the dtype that callbacks written for diffusers expect.
        t = torch.tensor(int(timestep) if timestep == int(timestep) else timestep)
        shown = {name: tensors[name] for name in self.names}
        self.pipeline._current_timestep = t
        guidance = self.pipeline.guidance_scale, self.pipeline.guidance_scale_2
        changed = callback(self.pipeline, i, t, shown) or {}
        if not isinstance(changed, Mapping):
            raise WanError(
                f"the callback returned a {type(changed).__name__}: it must return a dict of "
                "tensors, such as the one that it got, or None"
            )
        if X0 in changed and changed[X0] is not shown.get(X0):
            raise WanError(
                "the callback returned another x0: that is a prediction and is shown only; return "
                "latents to change what the next step starts from"
            )
        returned = [name for name in changed if name != X0]
        check_names("the callback's return", returned, CALLBACK_TENSORS)
        if "prompt_embeds" in changed or "negative_prompt_embeds" in changed:
            denoiser.set_context(
                changed.get("prompt_embeds", denoiser.context),
                changed.get("negative_prompt_embeds", denoiser.negative_context),
            )
        if guidance != (self.pipeline.guidance_scale, self.pipeline.guidance_scale_2):
            denoiser.set_guidance(self.pipeline.guidance_scale, self.pipeline.guidance_scale_2)
        if self.pipeline.adapters.pending:  # the callback changed LoRA adapters
            denoiser.reload()
        return changed.get("latents")
