"""The schedulers of `wan.sampling.schedulers` with `from_pretrained` for every name of a model."""

from pathlib import Path
from typing import Any, Self

from wan.pipeline.arguments import FileArguments, check_arguments, file_options
from wan.sampling import schedulers
from wan.sampling.schedulers import FILE, Scheduler
from wan.weights.hub import resolve_model


class NamedScheduler(Scheduler):
    """A scheduler that is found by a folder, a hub id or the name of a shipped model."""

    @classmethod
    def from_pretrained(
        cls, name: str | Path, subfolder: str | None = None, **arguments: Any
    ) -> Self:
        """Read scheduler_config.json.

        Args:
            name: a model with `subfolder="scheduler"`, or the scheduler's own folder.
            arguments: `FileArguments`, and fields that replace those of the file.

        Raises:
            WanError: there is no such file, or a field asks for what cannot be done.
        """
        files = {n: arguments.pop(n) for n in FileArguments.__annotations__ if n in arguments}
        check_arguments(files, FileArguments)
        patterns = (FILE if subfolder is None else f"{subfolder}/{FILE}",)
        folder = resolve_model(name, patterns=patterns, **file_options(files))
        return super().from_pretrained(folder, subfolder, **arguments)


class UniPCMultistepScheduler(NamedScheduler, schedulers.UniPCMultistepScheduler):
    """UniPC; see `wan.sampling.samplers.UniPC`."""


class DPMSolverMultistepScheduler(NamedScheduler, schedulers.DPMSolverMultistepScheduler):
    """DPM-Solver++; see `wan.sampling.samplers.DPMSolver`."""


class FlowMatchEulerDiscreteScheduler(NamedScheduler, schedulers.FlowMatchEulerDiscreteScheduler):
    """Flow-match Euler; see `wan.sampling.samplers.Euler`.

    Given a number of steps it shifts its grid twice, as diffusers does; given sigmas, once.
    """


SCHEDULERS: dict[str, type[NamedScheduler]] = {
    one.CLASS_NAME: one
    for one in (
        UniPCMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        DPMSolverMultistepScheduler,
    )
}
