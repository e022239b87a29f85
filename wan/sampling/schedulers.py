"""Scheduler objects under the names of diffusers, for scripts and loops written for it.

Each is a configuration (`wan/sampling/scheduler_config.py`) and, after `set_timesteps`, one of the
solvers of `wan/sampling/samplers.py`: `step` is the same code as in a pipeline's call.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from wan.errors import WanError
from wan.files import read_json, write_json
from wan.sampling.flow import add_noise
from wan.sampling.samplers import Stepper
from wan.sampling.schedule import NUM_TIMESTEPS, Schedule, shift_sigmas
from wan.sampling.scheduler_config import (
    DPM,
    EULER,
    FIELDS,
    SHIFTS,
    UNIPC,
    SchedulerSettings,
    read_scheduler,
    scheduler_fields,
)

FILE = "scheduler_config.json"

S = TypeVar("S", bound="Scheduler")


class FrozenConfig(dict[str, Any]):
    """A configuration: a dict that is read by name or as attributes, and never changed."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name} in this configuration") from None

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise WanError(
            "a configuration does not change: make another object with from_config(config, name=..)"
        )

    __setattr__ = __setitem__ = __delitem__ = _refuse
    pop = popitem = update = clear = setdefault = _refuse


@dataclass(frozen=True)
class SchedulerOutput:
    """The result of `Scheduler.step`.

    Attributes:
        prev_sample: the state after the step, shaped like the one before it.
    """

    prev_sample: Tensor

    def __getitem__(self, index: int) -> Tensor:
        return (self.prev_sample,)[index]


class Scheduler:
    """What the schedulers share; use a subclass.

    Attributes:
        config: every field of the configuration, by diffusers' names.
        settings: the same as this project reads it.
        timesteps: (S,), after `set_timesteps`: the network's input in each step.
        order: network evaluations per step.
        init_noise_sigma: factor of the noise to start from.
    """

    CLASS_NAME: ClassVar[str]
    order = 1
    init_noise_sigma = 1.0

    def __init__(self, **config: Any) -> None:
        """Check a configuration.

        Args:
            config: fields by diffusers' names, with its defaults.

        Raises:
            WanError: a field is unknown, or asks for what cannot be done.
        """
        known = FIELDS[self.CLASS_NAME]
        if unknown := [name for name in config if name not in known]:
            hint = ""
            if SHIFTS[self.CLASS_NAME] not in config and {"shift", "flow_shift"} & set(unknown):
                hint = f" (its shift is called {SHIFTS[self.CLASS_NAME]})"
            raise WanError(
                f"{self.CLASS_NAME}: unknown {', '.join(unknown)}{hint}; known are "
                f"{', '.join(known)}"
            )
        values = {name: rule.default for name, rule in known.items()} | config
        self._configure({"_class_name": self.CLASS_NAME, **values})

    def _configure(self, fields: Mapping[str, Any]) -> None:
        self.config = FrozenConfig(fields)
        self.settings: SchedulerSettings = read_scheduler(self.config, self.CLASS_NAME)
        self.num_inference_steps: int | None = None
        self._schedule: Schedule | None = None
        self._stepper: Stepper | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self.timesteps = self._first_timesteps()

    def _first_timesteps(self) -> Tensor:
        """The timesteps before `set_timesteps`: all of the network's clock."""
        return torch.arange(NUM_TIMESTEPS - 1, -1, -1, dtype=torch.float32)

    @classmethod
    def from_config(cls: type[S], config: Any, **changes: Any) -> S:
        """Another scheduler with the same configuration, up to some changes.

        Fields that the configuration has and this class has not, as after a change of class, are
        kept in `config` and have no effect.

        Args:
            config: a mapping, or a scheduler, also of another class or of diffusers.
            changes: fields by diffusers' names.

        Raises:
            WanError: a change is unknown, or a field asks for what cannot be done.
        """
        known = FIELDS[cls.CLASS_NAME]
        given = config if isinstance(config, Mapping) else getattr(config, "config", {})
        defaults = given.get("_use_default_values", ()) if isinstance(given, Mapping) else ()
        fields = {k: v for k, v in scheduler_fields(config).items() if k not in defaults}
        scheduler = cls(**{k: v for k, v in fields.items() if k in known} | changes)
        hidden = {k: v for k, v in fields.items() if k not in known and k != "_class_name"}
        if lost := {"shift", "flow_shift"} & set(hidden):
            own = SHIFTS[cls.CLASS_NAME]
            if own not in fields and own not in changes:
                name = lost.pop()
                warnings.warn(
                    f"{cls.CLASS_NAME}.from_config: {name}={hidden[name]} is another scheduler's "
                    f"field; here it is {own}, which stays {scheduler.config[own]}. Give {own}=..",
                    stacklevel=2,
                )
        scheduler.config = FrozenConfig({**hidden, **scheduler.config})
        scheduler.settings = replace(scheduler.settings, fields=scheduler.config)
        return scheduler

    @classmethod
    def from_pretrained(
        cls: type[S], name: str | Path, subfolder: str | None = None, **arguments: Any
    ) -> S:
        """Read scheduler_config.json from a folder on this machine.

        Args:
            name: a model's folder with `subfolder="scheduler"`, or the scheduler's own.
            arguments: fields that replace those of the file.

        Raises:
            WanError: there is no such file, or see `from_config`.
        """
        path = Path(name, subfolder or "", FILE)
        if not path.is_file():
            raise WanError(
                f"{path} is missing: give the folder that holds {FILE}, or its subfolder"
            )
        return cls.from_config(read_json(path, infinite=True), **arguments)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write scheduler_config.json into a folder, which is made."""
        write_json(Path(folder, FILE), self.settings.to_json())

    @property
    def sigmas(self) -> Tensor:
        """(S + 1,) float32, after `set_timesteps`: the level before each step and, last, 0."""
        return self._ready()[0].sigmas

    @property
    def step_index(self) -> int | None:
        """Number of the next step; None before the first one."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Number of the first step, if it was set."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say at which step a run begins, in place of the place of its first timestep."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Decide the steps and begin a new run.

        Args:
            num_inference_steps: how many.
            device: of `timesteps`.
            sigmas: falling noise levels in (0, 1] in place of a number of steps; they are shifted.
            timesteps: only for `FlowMatchEulerDiscreteScheduler`.

        Raises:
            WanError: there is neither a number nor a list, or one is out of range.
        """
        if num_inference_steps is None and sigmas is None and timesteps is None:
            raise WanError("set_timesteps: give num_inference_steps or sigmas")
        for name, given in (("sigmas", sigmas), ("timesteps", timesteps)):
            if given is None or num_inference_steps is None:
                continue
            if len(given) != num_inference_steps:
                raise WanError(
                    f"set_timesteps: num_inference_steps={num_inference_steps} and {len(given)} "
                    f"{name}; leave the number out"
                )
        schedule = self._make_schedule(num_inference_steps, sigmas, timesteps)
        self._schedule = schedule
        self._stepper = self.settings.stepper(schedule)
        self.timesteps = self._as_timesteps(schedule.timesteps).to(device)
        self.num_inference_steps = len(schedule)
        self._step_index = self._begin_index = None

    def _make_schedule(self, steps: int | None, sigmas: Any, timesteps: Any) -> Schedule:
        if timesteps is not None:
            raise WanError(
                f"{self.CLASS_NAME}.set_timesteps: timesteps= is not supported; give sigmas=, each "
                "timestep / 1000 before the shift"
            )
        return self.settings.schedule(None if sigmas is not None else steps, sigmas)

    def _as_timesteps(self, timesteps: Tensor) -> Tensor:
        return timesteps.long()

    def _ready(self) -> tuple[Schedule, Stepper]:
        if self._schedule is None or self._stepper is None:
            raise WanError(f"{self.CLASS_NAME}: call set_timesteps first")
        return self._schedule, self._stepper

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """Number of the (first) step with this timestep.

        Raises:
            WanError: there is none.
        """
        found = (self.timesteps == torch.as_tensor(timestep).to(self.timesteps.device)).nonzero()
        if len(found) == 0:
            raise WanError(
                f"timestep {float(timestep):g}: not one of this schedule's {len(self.timesteps)}; "
                "give one of scheduler.timesteps"
            )
        return int(found[0])

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """One step of the solver.

        Args:
            model_output: the network's velocity, shaped like `sample`.
            timestep: one of `timesteps`; it decides where the first step is, later ones follow.
            sample: the state before the step.
            return_dict: False returns (state,).

        Raises:
            WanError: `set_timesteps` was not called, or all its steps are done.
        """
        schedule, stepper = self._ready()
        if self._step_index is None:
            begin = self._begin_index
            self._step_index = self.index_for_timestep(timestep) if begin is None else begin
        if self._step_index >= len(schedule):
            raise WanError(
                f"all {len(schedule)} steps are done; call set_timesteps for another run"
            )
        state = stepper.step(self._step_index, sample, model_output)
        self._step_index += 1
        return SchedulerOutput(state) if return_dict else (state,)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The network's input: the state itself."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(1 - sigma) x0 + sigma noise at one timestep per sample, (B,), or one for all, (1,).

        Raises:
            WanError: a timestep is not in the schedule.
        """
        if self._begin_index is None:
            indices = [self.index_for_timestep(t) for t in timesteps]
        else:
            now = self._begin_index if self._step_index is None else self._step_index
            indices = [now] * len(timesteps)
        sigmas = self.sigmas[indices].expand(len(original_samples))
        return add_noise(original_samples, noise, sigmas)

    def __len__(self) -> int:
        return NUM_TIMESTEPS

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(self.config)})"


class UniPCMultistepScheduler(Scheduler):
    """UniPC; see `wan.sampling.samplers.UniPC`."""

    CLASS_NAME = UNIPC


class DPMSolverMultistepScheduler(Scheduler):
    """DPM-Solver++; see `wan.sampling.samplers.DPMSolver`."""

    CLASS_NAME = DPM


class FlowMatchEulerDiscreteScheduler(Scheduler):
    """Flow-match Euler; see `wan.sampling.samplers.Euler`.

    Given a number of steps it shifts its grid twice, as diffusers does; given sigmas, once.
    """

    CLASS_NAME = EULER

    @property
    def sigmas(self) -> Tensor:
        """(S + 1,) float32; before `set_timesteps` the table (1000,) without the last 0."""
        return self.timesteps / NUM_TIMESTEPS if self._schedule is None else self._schedule.sigmas

    @property
    def shift(self) -> float:
        """The shift of the next `set_timesteps`."""
        return self.settings.shift

    def set_shift(self, shift: float) -> None:
        """Use another shift from the next `set_timesteps` on; `config` keeps its own."""
        self.settings = replace(self.settings, shift=shift)

    def _first_timesteps(self) -> Tensor:
        counts = torch.arange(NUM_TIMESTEPS, 0, -1, dtype=torch.float32)
        return shift_sigmas(counts / NUM_TIMESTEPS, self.settings.shift) * NUM_TIMESTEPS

    def _as_timesteps(self, timesteps: Tensor) -> Tensor:
        return timesteps

    def _make_schedule(self, steps: int | None, sigmas: Any, timesteps: Any) -> Schedule:
        if timesteps is None:
            return self.settings.schedule(None if sigmas is not None else steps, sigmas)
        given = torch.as_tensor(timesteps, dtype=torch.float32)
        levels = given / NUM_TIMESTEPS if sigmas is None else sigmas
        schedule = self.settings.schedule(None, levels)
        return Schedule(given, schedule.sigmas, f"{schedule.description}, timesteps as given")

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` with the order of arguments that diffusers has here."""
        return self.add_noise(sample, noise, timestep)


SCHEDULERS: dict[str, type[Scheduler]] = {
    UNIPC: UniPCMultistepScheduler,
    EULER: FlowMatchEulerDiscreteScheduler,
    DPM: DPMSolverMultistepScheduler,
}
