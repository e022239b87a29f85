"""What happens after each denoising step of a pipeline call: callbacks, progress, interruption."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wan.errors import check_names
from wan.pipeline.inputs import CALLBACK_TENSORS, OnProgress, report
from wan.sampling.denoiser import Denoiser

# (pipeline, step, timestep, tensors by name) -> tensors to go on with, by name
StepCallback = Callable[..., dict[str, Tensor] | None]
# (denoiser, step, timestep, latents after it) -> latents to go on with, or None to go on as it is.
# It may replace the denoiser's prompts, and leaves the sampler by raising `Interrupted`.
StepFunction = Callable[[Denoiser, int, float, Tensor], Tensor | None]


class Interrupted(Exception):
    """Raised after a step to leave the sampler with the latents reached so far."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents


@dataclass
class StepHook:
    """The `StepFunction` of a pipeline call: show the step to the caller, report it, maybe stop.

    Attributes:
        pipeline: handed to the callback; sampling stops once its `interrupt` is true.
        steps: number of steps of the whole run.
        callback: the caller's function, in the form that diffusers defined.
        names: the tensors that the callback receives, of `CALLBACK_TENSORS`.
    """

    pipeline: Any
    steps: int
    callback: StepCallback | None
    names: Sequence[str]
    on_progress: OnProgress | None

    def __call__(self, denoiser: Denoiser, i: int, timestep: float, x: Tensor) -> Tensor | None:
        """After step i: the latents to go on with, or None for x itself.

        Raises:
            Interrupted: the caller wants no further step.
        """
        replaced = None
        if self.callback is not None:
            replaced = self._call_back(self.callback, denoiser, i, timestep, x)
        report(self.on_progress, "denoise", i + 1, self.steps)
        if self.pipeline.interrupt:
            raise Interrupted(x if replaced is None else replaced)
        return replaced

    def _call_back(
        self, callback: StepCallback, denoiser: Denoiser, i: int, timestep: float, x: Tensor
    ) -> Tensor | None:
        """Call the caller's function; apply the prompts, return the latents that it changed."""
        tensors: dict[str, Tensor | None] = {
            "latents": x,
            "prompt_embeds": denoiser.context,
            "negative_prompt_embeds": denoiser.negative_context,
        }
        # An integer where it is one, which is the dtype that callbacks written for diffusers know.
        t = torch.tensor(int(timestep) if timestep == int(timestep) else timestep)
        shown = {name: tensors[name] for name in self.names}
        changed = callback(self.pipeline, i, t, shown) or {}
        check_names("the callback's return", list(changed), CALLBACK_TENSORS)
        if "prompt_embeds" in changed or "negative_prompt_embeds" in changed:
            denoiser.set_context(
                changed.get("prompt_embeds", denoiser.context),
                changed.get("negative_prompt_embeds", denoiser.negative_context),
            )
        return changed.get("latents")
