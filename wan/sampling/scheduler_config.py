"""What a scheduler_config.json or a scheduler object says about sampling, field by field.

Released folders hold the settings of one of diffusers' schedulers. `read_scheduler` turns them into
`SchedulerSettings`. Every field is used, known to have no effect on a flow model, warned of or
refused; the tables below say which. Missing fields have diffusers' defaults.
"""

import math
import numbers
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wan.errors import WanError
from wan.sampling.samplers import Stepper, build_stepper, check_sampler
from wan.sampling.schedule import (
    GRIDS,
    NUM_TIMESTEPS,
    Schedule,
    check_grid,
    dpm_schedule,
    euler_schedule,
    unipc_schedule,
    vp_ends,
)

DEFAULT_SHIFT = 5.0
UNIPC, EULER, DPM = CLASSES = (
    "UniPCMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
)
CLASS_OF = {"unipc": UNIPC, "euler": EULER, "dpm++": DPM}
SOLVER_TYPES = {"unipc": "bh2", "dpm++": "midpoint"}  # the usual ones


@dataclass(frozen=True)
class SchedulerSettings:
    """Which sampler runs on which noise levels.

    Attributes:
        sampler: a name in `wan.sampling.samplers.SAMPLERS`.
        grid: a name in `wan.sampling.schedule.GRIDS[sampler]`; "" takes the first.
        shift: moves the grid towards high noise; see `wan.sampling.schedule.shift_sigmas`.
        order: of the multistep solvers, 1 to 3.
        solver_type: of the multistep solvers; "" takes the usual one.
        lower_order_final: for "dpm++": see `wan.sampling.samplers.DPMSolver`.
        disable_corrector: for "unipc": steps that are not corrected.
        ends: for the grid "karras" of "unipc": see `wan.sampling.schedule.unipc_schedule`.
        fields: the configuration that this was read from; it is written back as it is.
        problem: why `fields` could not be followed; "" if they are.
    """

    sampler: str = "unipc"
    grid: str = ""
    shift: float = DEFAULT_SHIFT
    order: int = 2
    solver_type: str = ""
    lower_order_final: bool = True
    disable_corrector: tuple[int, ...] = ()
    ends: tuple[float, float] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    problem: str = ""

    def __post_init__(self) -> None:
        check_sampler(self.sampler)
        if not self.grid:
            object.__setattr__(self, "grid", GRIDS[self.sampler][0])
        if not self.solver_type:
            object.__setattr__(self, "solver_type", SOLVER_TYPES.get(self.sampler, ""))
        check_grid(self.sampler, self.grid)

    def schedule(self, steps: int | None, sigmas: Any = None) -> Schedule:
        """The noise levels for a number of steps, or for unshifted `sigmas` in place of it.

        Raises:
            WanError: the number, the shift or the sigmas are out of range.
        """
        if sigmas is not None and self.grid == "karras" and self.sampler == "unipc":
            raise WanError("sigmas with use_karras_sigmas=True: give one of them")
        if self.sampler == "unipc":
            return unipc_schedule(steps, self.shift, self.grid, sigmas, self.ends)
        if self.sampler == "dpm++":
            return dpm_schedule(steps, self.shift, self.grid, sigmas)
        return euler_schedule(steps, self.shift, self.grid, sigmas)

    def stepper(self, schedule: Schedule, **options: Any) -> Stepper:
        """The solver on a schedule.

        Args:
            options: `renoise` and `deterministic` for "few_step".
        """
        if self.sampler in SOLVER_TYPES:
            options |= {"order": self.order, "solver_type": self.solver_type}
        if self.sampler == "unipc":
            options["disable_corrector"] = self.disable_corrector
        if self.sampler == "dpm++":
            options["lower_order_final"] = self.lower_order_final
        return build_stepper(self.sampler, schedule, **options)

    @property
    def followed(self) -> bool:
        """Whether this is what a configuration says, and not a default in its place."""
        return bool(self.fields) and not self.problem

    @property
    def class_name(self) -> str:
        """The name of diffusers' scheduler."""
        return str(self.fields.get("_class_name") or CLASS_OF[self.sampler])

    def to_json(self) -> dict[str, Any]:
        """The scheduler_config.json: the fields as they were read, or those of this sampler.

        Infinite values, which JSON cannot hold, are left out; they are defaults.
        """
        if self.fields:
            finite = {k: v for k, v in self.fields.items() if not _is_infinite(v)}
            return finite | {"_class_name": self.class_name}
        head: dict[str, Any] = {
            "_class_name": self.class_name,
            "_diffusers_version": "0.35.0",
            "num_train_timesteps": NUM_TIMESTEPS,
        }
        if self.sampler == "euler":
            return head | {"shift": self.shift}
        common = {
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": self.shift,
            "solver_order": self.order,
            "solver_type": self.solver_type,
        }
        if self.sampler == "dpm++":
            common |= {"algorithm_type": "dpmsolver++"}
            return head | common | {"lower_order_final": True, "final_sigmas_type": "zero"}
        return {
            **head,
            **common,
            "predict_x0": True,
            "lower_order_final": True,
            "disable_corrector": [],
            "solver_p": None,
            "final_sigmas_type": "zero",
            "timestep_spacing": "linspace",
        }


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


@dataclass(frozen=True)
class Field:
    """A field of a scheduler's configuration.

    Attributes:
        default: its value where it is missing; others have the same type.
        allowed: the values that can be followed; empty for any.
        why: the reason, for the error.
    """

    default: Any
    allowed: tuple[Any, ...] = ()
    why: str = ""

    def takes(self, value: Any) -> bool:
        """Whether a value is allowed, or has the type of the default where all are allowed."""
        if self.allowed:
            return any(one == value and _is_bool(one) == _is_bool(value) for one in self.allowed)
        if isinstance(self.default, list):
            return isinstance(value, list | tuple) and all(type(n) is int for n in value)
        if isinstance(self.default, bool | str):
            return type(value) is type(self.default)
        return self.default is None or _is_number(value) or value == self.default


OF_NOISE = "it belongs to networks that predict noise; Wan's predict the velocity of a flow"
ABOVE_ONE = "with this scheduler it gives noise levels above 1, which a flow does not have"
COMMON = {  # UniPC and DPM-Solver
    "num_train_timesteps": Field(1000, (1000,), "the networks' clock has 1000 timesteps"),
    "beta_start": Field(0.0001),
    "beta_end": Field(0.02),
    "beta_schedule": Field("linear"),
    "trained_betas": Field(None),
    "solver_order": Field(2, (1, 2, 3), "the solvers here have no other order"),
    "prediction_type": Field("epsilon", ("flow_prediction",), OF_NOISE),
    "thresholding": Field(False, (False,), "it clips pixels, and these are latents"),
    "dynamic_thresholding_ratio": Field(0.995),
    "sample_max_value": Field(1.0),
    "lower_order_final": Field(True, (True, False)),
    "use_karras_sigmas": Field(False, (False,), ABOVE_ONE),
    "use_exponential_sigmas": Field(False, (False,), ABOVE_ONE),
    "use_beta_sigmas": Field(False, (False,), ABOVE_ONE),
    "use_flow_sigmas": Field(False, (True,), "other noise levels do not fit a flow model"),
    "flow_shift": Field(1.0),
    "timestep_spacing": Field("linspace"),
    "steps_offset": Field(0),
    "final_sigmas_type": Field("zero", ("zero",), "it would leave noise in the video"),
    "rescale_betas_zero_snr": Field(False),
    "use_dynamic_shifting": Field(
        False, (False,), "Wan's shift is a constant, and nothing computes another"
    ),
    "time_shift_type": Field("exponential"),
}
NO_TERMINAL = Field(None, (None,), "Wan's grids are not stretched at their end")
FIELDS: dict[str, dict[str, Field]] = {
    UNIPC: COMMON
    | {
        "solver_type": Field("bh2", ("bh1", "bh2", "midpoint", "heun", "logrho")),
        "predict_x0": Field(True, (True,), OF_NOISE),
        "disable_corrector": Field([]),
        "solver_p": Field(None, (None,), "a second solver inside UniPC is not supported"),
        "use_karras_sigmas": Field(False, (True, False)),
        "sigma_min": Field(None),
        "sigma_max": Field(None),
        "shift_terminal": NO_TERMINAL,
    },
    DPM: COMMON
    | {
        "algorithm_type": Field(
            "dpmsolver++",
            ("dpmsolver++", "deis"),
            "the others predict noise or add it at random; sampler few_step adds it",
        ),
        "solver_type": Field("midpoint", ("midpoint", "heun", "logrho", "bh1", "bh2")),
        "euler_at_final": Field(False, (True, False)),
        "use_lu_lambdas": Field(False, (False,), ABOVE_ONE),
        "lambda_min_clipped": Field(-math.inf),
        "variance_type": Field(None),
    },
    EULER: {
        "num_train_timesteps": COMMON["num_train_timesteps"],
        "shift": Field(1.0),
        "use_dynamic_shifting": COMMON["use_dynamic_shifting"],
        "base_shift": Field(0.5),
        "max_shift": Field(1.15),
        "base_image_seq_len": Field(256),
        "max_image_seq_len": Field(4096),
        "invert_sigmas": Field(False, (False,), "sampling would run from clean latents to noise"),
        "shift_terminal": NO_TERMINAL,
        "use_karras_sigmas": Field(False, (True, False)),
        "use_exponential_sigmas": Field(False, (True, False)),
        "use_beta_sigmas": Field(False, (True, False)),
        "time_shift_type": Field("exponential"),
        "stochastic_sampling": Field(
            False, (False,), "choose sampler few_step, which adds fresh noise from the seed"
        ),
    },
}
SHIFTS = {UNIPC: "flow_shift", DPM: "flow_shift", EULER: "shift"}  # the field of the shift
KNOWN = frozenset().union(*FIELDS.values())
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def scheduler_fields(source: Any) -> dict[str, Any]:
    """The configuration of a scheduler: a mapping's, or an object's `config` and its class's name.

    Raises:
        WanError: it is neither.
    """
    config = source if isinstance(source, Mapping) else getattr(source, "config", None)
    if not isinstance(config, Mapping):
        raise WanError(
            f"scheduler {type(source).__name__}: has no configuration; use one of "
            f"{', '.join(CLASSES)}"
        )
    fields = dict(config)
    if source is not config:
        fields.setdefault("_class_name", type(source).__name__)
    fields.pop("_use_default_values", None)  # a note of diffusers, not a setting
    return fields


def read_scheduler(source: Any, where: str = "scheduler") -> SchedulerSettings:
    """Understand a scheduler of diffusers, or one of `wan.sampling.schedulers`.

    Args:
        source: the content of a scheduler_config.json, or an object with such a `config`.
        where: the file's name, for messages.

    Raises:
        WanError: the scheduler is not one of `CLASSES`, or a field asks for what cannot be done;
            names every such field.
    """
    fields = scheduler_fields(source)
    name = fields.get("_class_name")
    if not isinstance(name, str) or name not in FIELDS:
        raise WanError(
            f"{where}: {name or 'no _class_name'} is not supported; choose one of "
            f"{', '.join(CLASSES)}"
        )
    known = FIELDS[name]
    values = {key: _value(fields.get(key), rule.default) for key, rule in known.items()}
    if problems := _problems(name, values):
        raise WanError(f"{where}: {name} with {'; '.join(problems)}")
    unknown = [key for key in fields if key not in KNOWN and not key.startswith("_")]
    if unknown:
        warnings.warn(f"{where}: {name} has no {', '.join(unknown)}; ignored", stacklevel=2)
    shift = float(values[SHIFTS[name]])
    if name == EULER:
        spacing = [key for key in SPACINGS if values[key]]
        grid = spacing[0].split("_")[1] if spacing else "diffusers"
        return SchedulerSettings("euler", grid, shift, fields=fields)
    types = ("bh1", "bh2") if name == UNIPC else ("midpoint", "heun")
    solver_type = values["solver_type"]
    common: dict[str, Any] = {
        "shift": shift,
        "order": int(values["solver_order"]),
        "solver_type": solver_type if solver_type in types else types[-1 if name == UNIPC else 0],
        "fields": fields,
    }
    if name == DPM:
        return SchedulerSettings("dpm++", lower_order_final=values["lower_order_final"], **common)
    ends = None
    if values["use_karras_sigmas"]:
        scaled = values["beta_schedule"] == "scaled_linear"
        high, low = vp_ends(values["beta_start"], values["beta_end"], scaled)
        given = (values["sigma_max"], values["sigma_min"])
        ends = (given[0] or high, given[1] or low)
    return SchedulerSettings(
        "unipc",
        "karras" if ends else "",
        disable_corrector=tuple(values["disable_corrector"]),
        ends=ends,
        **common,
    )


def read_scheduler_or_default(fields: Mapping[str, Any], where: str) -> SchedulerSettings:
    """`read_scheduler` of a model's own file, which must not keep a model from being used.

    If the file cannot be followed, a warning says so and UniPC as released with Wan takes its
    place, with the file's shift if there is one.

    Raises:
        WanError: a known scheduler without its shift: the file is damaged.
    """
    name = str(fields.get("_class_name"))
    if name in SHIFTS and fields.get(SHIFTS[name]) is None:
        raise WanError(f"{where}: no {SHIFTS[name]}; the file is not complete")
    try:
        return read_scheduler(fields, where)
    except WanError as error:
        shifts: list[Any] = [fields.get(key) for key in ("flow_shift", "shift")]
        shift = next((float(s) for s in shifts if _is_shift(s)), DEFAULT_SHIFT)
        warnings.warn(
            f"{error}. The scheduler of this folder is not used: videos are sampled by UniPC with "
            f"shift {shift:g} unless another sampler is chosen",
            stacklevel=2,
        )
        return SchedulerSettings(shift=shift, fields=fields, problem=str(error))


_KIND_WORDS = {
    bool: "True or False",
    int: "a number",
    float: "a number",
    str: "a text",
    list: "a list of whole numbers",
}


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not _is_bool(value) and math.isfinite(value)


def _is_shift(value: Any) -> bool:
    return _is_number(value) and value > 0


def _value(given: Any, default: Any) -> Any:
    """A field's value; one that is missing or null has the default."""
    return default if given is None else given


def _problems(name: str, values: Mapping[str, Any]) -> list[str]:
    """What cannot be followed in a complete configuration, in words."""
    problems = []
    for key, value in values.items():
        rule = FIELDS[name][key]
        if not rule.takes(value):
            wanted = " or ".join(map(repr, rule.allowed)) or _KIND_WORDS[type(rule.default)]
            problems.append(f"{key}={value!r} (need {wanted}{': ' if rule.why else ''}{rule.why})")
    shift = values[SHIFTS[name]]
    if not _is_shift(shift):
        problems.append(f"{SHIFTS[name]}={shift!r} (need a number above 0)")
    if sum(bool(values[key]) for key in SPACINGS) > 1:
        problems.append(f"more than one of {', '.join(SPACINGS)}")
    if name == UNIPC:
        if not values["lower_order_final"] and values["solver_order"] != 1:
            problems.append(
                "lower_order_final=False (need True, or solver_order=1: the last step, to sigma 0, "
                "has an infinite second-order term)"
            )
        betas = ("linear", "scaled_linear")
        plain = values["beta_schedule"] in betas and not (
            values["trained_betas"] or values["rescale_betas_zero_snr"]
        )
        if values["use_karras_sigmas"] and not problems:
            problems += _karras_problems(values)
        if values["use_karras_sigmas"] and not plain:
            problems.append("use_karras_sigmas=True and betas that are not linear or scaled_linear")
    return problems


def _karras_problems(values: Mapping[str, Any]) -> list[str]:
    """Numbers that are no ends of UniPC's grid "karras", in words."""
    problems = [
        f"{key}={value!r} (need a number between 0 and 1)"
        for key in ("beta_start", "beta_end")
        if not 0 < (value := values[key]) < 1
    ]
    return problems + [
        f"{key}={value!r} (need a number above 0)"
        for key in ("sigma_max", "sigma_min")
        if (value := values[key]) is not None and not _is_shift(value)
    ]
