"""From noise to latents: solvers of dx/dsigma = velocity(x, sigma).

A solver is a class with one method, `step(i, x, velocity)`: from the state before step i and its
velocity to the state after it. What it has to remember between steps is inside. `sample` is the one
loop around it; a scheduler object (`wan/sampling/schedulers.py`) calls the same `step`.

The velocity is a function, not a network: `velocity(x, timestep)` with a number for the timestep.
Guidance, experts and conditioning are that function's business (`wan/sampling/denoiser.py`), the
noise levels are the schedule's (`wan/sampling/schedule.py`). States stay float32, predictions of x0
and noise are computed in float64.
"""

import math
from collections.abc import Callable, Collection
from typing import Any, Protocol

from torch import Tensor

from wan.errors import WanError
from wan.sampling.flow import add_noise, noise_from_velocity, x0_from_velocity
from wan.sampling.schedule import Schedule

Velocity = Callable[[Tensor, float], Tensor]
OnStep = Callable[[int, float, float, Tensor], Tensor | None]
OnX0 = Callable[[int, Tensor], None]
Renoise = Callable[[int], Tensor]


class Stepper(Protocol):
    """A solver on one schedule, for one run.

    Attributes:
        schedule: S steps.
    """

    schedule: Schedule

    def step(self, i: int, x: Tensor, velocity: Tensor) -> Tensor:
        """The state after step i, at sigmas[i + 1], from the state x and its velocity before it.

        Steps are taken in order, from any first one on.
        """
        ...


def sample(
    velocity: Velocity,
    x: Tensor,
    stepper: Stepper,
    on_step: OnStep | None = None,
    on_x0: OnX0 | None = None,
) -> Tensor:
    """Take all steps of a schedule, with one velocity call each.

    Args:
        velocity: the model.
        x: the start, at noise level sigmas[0].
        stepper: a new one; it holds the schedule.
        on_step: called as (i, timestep, sigma, x) after step i, with the timestep that the model
            was given, the state x after the step and its noise level sigma. If it returns a tensor,
            sampling continues from that tensor; the corrector of `UniPC`, as in diffusers, still
            starts from its own state of the step before.
        on_x0: called as (i, x0) in step i, before `on_step`, with the clean latents that the model
            predicts there. It watches only.
    """
    sigmas = stepper.schedule.sigmas.tolist()
    for i, timestep in enumerate(stepper.schedule.timesteps.tolist()):
        predicted = velocity(x, timestep)
        if on_x0 is not None:
            on_x0(i, x0_from_velocity(x, predicted, sigmas[i]))
        x = stepper.step(i, x, predicted)
        if on_step is not None:
            replaced = on_step(i, timestep, sigmas[i + 1], x)
            x = x if replaced is None else replaced
    return x


class Euler:
    """Straight steps along the velocity: x + (sigma_next - sigma) * v."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._sigmas = schedule.sigmas.tolist()

    def step(self, i: int, x: Tensor, velocity: Tensor) -> Tensor:
        return x + (self._sigmas[i + 1] - self._sigmas[i]) * velocity.to(x.dtype)


class FewStep:
    """Predict x0, add noise up to the next level, repeat, as distilled students are trained.

    Source: DMD2, arXiv:2405.14867, section 4.4 (also consistency models, arXiv:2303.01469, alg. 1).
    """

    def __init__(
        self, schedule: Schedule, renoise: Renoise | None = None, deterministic: bool = False
    ) -> None:
        """Prepare a run.

        Args:
            renoise: fresh standard normal noise, shaped like x, for the state after step i.
            deterministic: put back the noise that the model itself predicts, instead of fresh
                noise; `renoise` is not used. With it a step is an Euler step.

        Raises:
            WanError: neither fresh noise nor `deterministic`.
        """
        if renoise is None and not deterministic and len(schedule) > 1:
            raise WanError(
                "few-step sampling needs fresh noise between steps, or deterministic=True"
            )
        self.schedule = schedule
        self._sigmas = schedule.sigmas.tolist()
        self._renoise = None if deterministic else renoise

    def step(self, i: int, x: Tensor, velocity: Tensor) -> Tensor:
        sigma, sigma_next = self._sigmas[i : i + 2]
        noise = None if self._renoise is None or sigma_next == 0 else self._renoise(i)
        return few_step(x, velocity, sigma, sigma_next, noise)


def few_step(
    x: Tensor, velocity: Tensor, sigma: float, sigma_next: float, noise: Tensor | None
) -> Tensor:
    """One step of `FewStep`: predict x0 from x at sigma, add noise up to sigma_next.

    Args:
        noise: fresh noise, or None for the noise that the velocity predicts.
    """
    x0 = x0_from_velocity(x, velocity, sigma)
    if sigma_next == 0:
        return x0
    if noise is None:
        noise = noise_from_velocity(x, velocity, sigma)
    return add_noise(x0, noise.to(x), sigma_next)


class UniPC:
    """Multistep predictor and corrector in the half-log-SNR of rectified flow.

    Wan uses order 2 and B(h) = expm1(-h), with x0 prediction. The first step and the last one are
    of first order: the last one goes to sigma 0, where the half-log-SNR is infinite. The network
    does not run again at a corrected state: the prediction from before the correction is kept.
    Source: UniPC, arXiv:2302.04867, algorithms 5 to 8.
    """

    def __init__(
        self,
        schedule: Schedule,
        order: int = 2,
        solver_type: str = "bh2",
        disable_corrector: Collection[int] = (),
    ) -> None:
        """Prepare a run.

        Args:
            order: of the predictor, 1 to 3; the corrector adds one.
            solver_type: "bh2" for B(h) = expm1(-h), "bh1" for B(h) = -h.
            disable_corrector: steps (from 0) whose result is not corrected.

        Raises:
            WanError: an order or type is unknown, or "bh1" starts from pure noise, where it has no
                limit.
        """
        check_solver(order, solver_type, ("bh1", "bh2"))
        self.schedule = schedule
        self._sigmas = schedule.sigmas.tolist()
        if solver_type == "bh1" and self._sigmas[0] == 1:
            raise WanError(
                "solver_type='bh1' from sigma 1: its first correction is infinite; use 'bh2', or a "
                "grid that starts below 1 (diffusers or official)"
            )
        self.order = order
        self.solver_type = solver_type
        self.disable_corrector = frozenset(disable_corrector)
        self._x0s: list[Tensor] = []  # as predicted at the start of each step so far
        self._base: Tensor | None = None  # the state the last predictor started from
        self._last_order = 0  # of that predictor

    def step(self, i: int, x: Tensor, velocity: Tensor) -> Tensor:
        x0 = x0_from_velocity(x, velocity, self._sigmas[i])
        if self._base is not None and i - 1 not in self.disable_corrector:
            order = self._last_order
            levels = self._sigmas[i - order : i + 1]
            x = self._advance(self._base, self._x0s[-order:], levels, x0_end=x0)
        self._x0s = [*self._x0s, x0][-self.order :]
        order = min(self.order, len(self._x0s), len(self.schedule) - i)
        self._base, self._last_order = x, order
        return self._advance(x, self._x0s[-order:], self._sigmas[i - order + 1 : i + 2])

    def _advance(
        self, x: Tensor, x0s: list[Tensor], sigmas: list[float], x0_end: Tensor | None = None
    ) -> Tensor:
        """From state x at sigmas[-2] to sigmas[-1].

        Args:
            x0s: the predictions at sigmas[:-1], oldest first; their number is the order.
            x0_end: the prediction at sigmas[-1], for the corrector; None for the predictor.
        """
        x0 = x0s[-1]
        h, e, alpha = _step_size(sigmas[-2], sigmas[-1])
        b = e if self.solver_type == "bh2" else -h
        scale = alpha * b
        result = sigmas[-1] / sigmas[-2] * x - alpha * e * x0
        points = [] if x0_end is None else [(1.0, x0_end)]  # (place in units of h, prediction)
        for sigma, older in zip(sigmas[-3::-1], x0s[-2::-1], strict=True):
            points.append(((half_log_snr(sigma) - half_log_snr(sigmas[-2])) / h, older))
        # With one point the papers' code takes 1/2. A point at minus infinity (sigma 1) says
        # nothing: its weight has the limit 0.
        halved = len(points) == 1
        points = [point for point in points if math.isfinite(point[0])]
        if not points:
            return result
        places = [place for place, _ in points]
        weights = [0.5] if halved else _weights(places, h, e, b)
        if x0_end is None:
            for weight, (place, other) in zip(weights, points, strict=True):
                result = result - scale * weight / place * (other - x0)
            return result
        change: Any = 0
        for weight, (place, other) in reversed(list(zip(weights, points, strict=True))):
            change = change + weight / place * (other - x0)
        return result - scale * change


def _weights(places: list[float], h: float, e: float, b: float) -> list[float]:
    """Weights w of UniPC's differences: sum over j of w_j r_j^(k - 1) = k! phi_k / B(h), all k.

    The Vandermonde system is solved by the algorithm of Björck and Pereyra (1970).

    Args:
        places: r, distinct.
        h, e: the step in half-log-SNR, and expm1(-h).
        b: B(h).
    """
    w = []
    phi = -e / h - 1
    for k in range(1, len(places) + 1):
        w.append(math.factorial(k) * phi / b)
        phi = -phi / h - 1 / math.factorial(k + 1)
    last = len(places) - 1
    for k in range(last):
        for i in range(last, k, -1):
            w[i] -= places[k] * w[i - 1]
    for k in range(last - 1, -1, -1):
        for i in range(k + 1, last + 1):
            w[i] /= places[i] - places[i - k - 1]
        for i in range(k, last):
            w[i] -= w[i + 1]
    return w


class DPMSolver:
    """DPM-Solver++, the multistep solver that predicts x0, in half-log-SNR of rectified flow.

    Wan's own code uses order 2 and the midpoint type. The first step and the last one are of first
    order. Source: arXiv:2211.01095, algorithm 2; order 3 and the heun type from arXiv:2206.00927.
    """

    def __init__(
        self,
        schedule: Schedule,
        order: int = 2,
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
    ) -> None:
        """Prepare a run.

        Args:
            order: 1 to 3.
            solver_type: "midpoint" or "heun", for second-order steps.
            lower_order_final: with fewer than 15 steps, the last but one is at most second order.

        Raises:
            WanError: an order or type is unknown.
        """
        check_solver(order, solver_type, ("midpoint", "heun"))
        self.schedule = schedule
        self._sigmas = schedule.sigmas.tolist()
        self.order = order
        self.solver_type = solver_type
        self.lower_order_final = lower_order_final
        self._x0s: list[Tensor] = []

    def step(self, i: int, x: Tensor, velocity: Tensor) -> Tensor:
        sigmas, left = self._sigmas, len(self.schedule) - i
        self._x0s = [*self._x0s[-2:], x0_from_velocity(x, velocity, sigmas[i])]
        order = min(self.order, len(self._x0s))
        if left == 1:
            order = 1
        elif left == 2 and self.lower_order_final and len(self.schedule) < 15:
            order = min(order, 2)
        x0 = self._x0s[-1]
        h, e, alpha = _step_size(sigmas[i], sigmas[i + 1])
        result = sigmas[i + 1] / sigmas[i] * x - alpha * e * x0
        if order == 1:
            return result
        newer = (half_log_snr(sigmas[i]) - half_log_snr(sigmas[i - 1])) / h
        slope = 1 / newer * (x0 - self._x0s[-2])
        if order == 2:
            weight = -e / 2 if self.solver_type == "midpoint" else e / h + 1
            return result + alpha * weight * slope
        older = (half_log_snr(sigmas[i - 1]) - half_log_snr(sigmas[i - 2])) / h
        bend = 1 / (newer + older) * (slope - 1 / older * (self._x0s[-2] - self._x0s[-3]))
        slope = slope + newer * bend
        return result + alpha * (e / h + 1) * slope - alpha * ((e + h) / h**2 - 0.5) * bend


SAMPLERS: dict[str, Callable[..., Stepper]] = {
    "euler": Euler,
    "unipc": UniPC,
    "dpm++": DPMSolver,
    "few_step": FewStep,
}


def build_stepper(name: str, schedule: Schedule, **options: Any) -> Stepper:
    """The solver of that name on a schedule; options as its class takes them.

    Raises:
        WanError: there is none, or an option is wrong.
    """
    check_sampler(name)
    return SAMPLERS[name](schedule, **options)


def check_sampler(name: str) -> None:
    """Refuse a name that is no sampler's."""
    if name not in SAMPLERS:
        raise WanError(f"sampler {name!r}: choose one of {', '.join(SAMPLERS)}")


def sample_euler(
    velocity: Velocity, x: Tensor, schedule: Schedule, on_step: OnStep | None = None
) -> Tensor:
    """`sample` with `Euler`."""
    return sample(velocity, x, Euler(schedule), on_step)


def sample_unipc(
    velocity: Velocity, x: Tensor, schedule: Schedule, on_step: OnStep | None = None
) -> Tensor:
    """`sample` with `UniPC` as Wan uses it."""
    return sample(velocity, x, UniPC(schedule), on_step)


def sample_few_step(
    velocity: Velocity,
    x: Tensor,
    schedule: Schedule,
    renoise: Renoise | None = None,
    deterministic: bool = False,
    on_step: OnStep | None = None,
) -> Tensor:
    """`sample` with `FewStep`."""
    return sample(velocity, x, FewStep(schedule, renoise, deterministic), on_step)


def check_solver(order: int, solver_type: str, types: tuple[str, ...]) -> None:
    """Refuse an order or a type that a multistep solver does not have."""
    if order not in (1, 2, 3):
        raise WanError(f"solver_order={order}: choose 1, 2 or 3")
    if solver_type not in types:
        raise WanError(f"solver_type={solver_type!r}: choose one of {', '.join(types)}")


def _step_size(sigma: float, sigma_next: float) -> tuple[float, float, float]:
    """h, the step in half-log-SNR; expm1(-h); and alpha = 1 - sigma at its end."""
    h = half_log_snr(sigma_next) - half_log_snr(sigma)
    return h, math.expm1(-h), 1 - sigma_next


def half_log_snr(sigma: float) -> float:
    """ln((1 - sigma) / sigma): minus infinity for pure noise, infinity for clean latents."""
    if sigma in (0, 1):
        return math.inf if sigma == 0 else -math.inf
    return math.log(1 - sigma) - math.log(sigma)
