"""From noise to latents: solvers of dx/dsigma = velocity(x, sigma).

A sampler takes a function, not a network: `velocity(x, timestep)` with a number for the timestep.
Guidance, experts and conditioning are that function's business (`wan/sampling/denoiser.py`), the
noise levels are the schedule's (`wan/sampling/schedule.py`). States stay float32, predictions of x0
and noise are computed in float64.

All samplers take `on_step(i, timestep, sigma, x)`, called after step i with the timestep the model
was given, the state x after the step and its noise level sigma. If it returns a tensor, sampling
continues from that tensor; the corrector of `sample_unipc`, as in diffusers, still starts from
its own state of the step before.
"""

import math
from collections.abc import Callable

from torch import Tensor

from wan.errors import WanError
from wan.sampling.flow import add_noise, noise_from_velocity, x0_from_velocity
from wan.sampling.schedule import Schedule

Velocity = Callable[[Tensor, float], Tensor]
OnStep = Callable[[int, float, float, Tensor], Tensor | None]


def sample_euler(
    velocity: Velocity, x: Tensor, schedule: Schedule, on_step: OnStep | None = None
) -> Tensor:
    """Straight steps along the velocity: x + (sigma_next - sigma) * v.

    Args:
        velocity: the model.
        x: the start, at noise level sigmas[0].
        schedule: S steps.
        on_step: see the module.
    """
    sigmas = schedule.sigmas.tolist()
    for i, timestep in enumerate(schedule.timesteps.tolist()):
        x = x + (sigmas[i + 1] - sigmas[i]) * velocity(x, timestep).to(x.dtype)
        x = _after_step(on_step, i, timestep, sigmas[i + 1], x)
    return x


def sample_few_step(
    velocity: Velocity,
    x: Tensor,
    schedule: Schedule,
    renoise: Callable[[int], Tensor] | None = None,
    deterministic: bool = False,
    on_step: OnStep | None = None,
) -> Tensor:
    """Predict x0, add noise up to the next level, repeat, as distilled students are trained.

    Source: DMD2, arXiv:2405.14867, section 4.4 (also consistency models, arXiv:2303.01469, alg. 1).

    Args:
        velocity, x, schedule, on_step: as in `sample_euler`.
        renoise: fresh standard normal noise, shaped like x, for the state after step i.
        deterministic: put back the noise that the model itself predicts, instead of fresh noise;
            `renoise` is not used. With it a step is an Euler step.

    Raises:
        WanError: neither fresh noise nor `deterministic`.
    """
    if renoise is None and not deterministic and len(schedule) > 1:
        raise WanError("few-step sampling needs fresh noise between steps, or deterministic=True")
    sigmas = schedule.sigmas.tolist()
    for i, timestep in enumerate(schedule.timesteps.tolist()):
        noise = None
        if sigmas[i + 1] > 0 and not deterministic:
            assert renoise is not None
            noise = renoise(i)
        x = few_step(x, velocity(x, timestep), sigmas[i], sigmas[i + 1], noise)
        x = _after_step(on_step, i, timestep, sigmas[i + 1], x)
    return x


def few_step(
    x: Tensor, velocity: Tensor, sigma: float, sigma_next: float, noise: Tensor | None
) -> Tensor:
    """One step of `sample_few_step`: predict x0 from x at sigma, add noise up to sigma_next.

    Args:
        noise: fresh noise, or None for the noise that the velocity predicts.
    """
    x0 = x0_from_velocity(x, velocity, sigma)
    if sigma_next == 0:
        return x0
    if noise is None:
        noise = noise_from_velocity(x, velocity, sigma)
    return add_noise(x0, noise.to(x), sigma_next)


def sample_unipc(
    velocity: Velocity, x: Tensor, schedule: Schedule, on_step: OnStep | None = None
) -> Tensor:
    """Second-order multistep predictor and corrector, one velocity call per step.

    As Wan configures it: order 2, B(h) = expm1(-h), x0 prediction, corrector from the second step
    on, first order in the first and the last step. The network does not run again at a corrected
    state: the prediction from before the correction is kept.
    Source: UniPC, arXiv:2302.04867, algorithms 5 to 8, in the half-log-SNR of rectified flow.

    Args: as in `sample_euler`.
    """
    sigmas = schedule.sigmas.tolist()
    steps = len(schedule)
    predictions: list[Tensor] = []  # x0 as predicted at the start of each step so far
    corrected = x  # the state the last predictor started from
    for i, timestep in enumerate(schedule.timesteps.tolist()):
        predictions.append(x0_from_velocity(x, velocity(x, timestep), sigmas[i]))
        if i > 0:
            order = min(2, i)  # the order of the predictor whose step is corrected
            corrected = _correct(corrected, predictions[-order - 1 :], sigmas[i - order : i + 1])
        else:
            corrected = x
        order = min(2, i + 1, steps - i)
        x = _predict(corrected, predictions[-order:], sigmas[i - order + 1 : i + 2])
        del predictions[:-2]
        x = _after_step(on_step, i, timestep, sigmas[i + 1], x)
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler": sample_euler,
    "unipc": sample_unipc,
    "few_step": sample_few_step,
}


def build_sampler(name: str) -> Callable[..., Tensor]:
    """The sampler of that name.

    Raises:
        WanError: there is none.
    """
    if name not in SAMPLERS:
        raise WanError(f"sampler {name!r}: choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def _predict(x: Tensor, x0s: list[Tensor], sigmas: list[float]) -> Tensor:
    """UniP: one step from state x, at sigmas[-2], to sigmas[-1].

    x0s are the predictions at sigmas[:-1], oldest first; their number, 1 or 2, is the order.
    """
    x0 = x0s[-1]
    h, e, alpha = _step_size(sigmas[-2], sigmas[-1])
    result = sigmas[-1] / sigmas[-2] * x - alpha * e * x0
    if len(x0s) == 2:
        ratio = (half_log_snr(sigmas[-3]) - half_log_snr(sigmas[-2])) / h
        result = result - alpha * e * 0.5 / ratio * (x0s[-2] - x0)
    return result


def _correct(x: Tensor, x0s: list[Tensor], sigmas: list[float]) -> Tensor:
    """UniC: repeat the step from x at sigmas[-2] to sigmas[-1], with the prediction at its end.

    x0s are the predictions at `sigmas`, oldest first: 2 for order 1, 3 for order 2.
    """
    x0, x0_end = x0s[-2:]
    h, e, alpha = _step_size(sigmas[-2], sigmas[-1])
    result = sigmas[-1] / sigmas[-2] * x - alpha * e * x0
    if len(x0s) == 2:
        return result - alpha * e * 0.5 * (x0_end - x0)
    ratio = (half_log_snr(sigmas[-3]) - half_log_snr(sigmas[-2])) / h
    # Weights of the older and the newer difference: [[1, 1], [ratio, 1]] w = [b1, b2], solved.
    phi1 = -e / h - 1
    phi2 = -phi1 / h - 0.5
    b1, b2 = phi1 / e, 2 * phi2 / e
    older = (b2 - b1) / (ratio - 1)
    newer = b1 - older
    change = older / ratio * (x0s[-3] - x0) + newer * (x0_end - x0)
    return result - alpha * e * change


def _step_size(sigma: float, sigma_next: float) -> tuple[float, float, float]:
    """h, the step in half-log-SNR; expm1(-h); and alpha = 1 - sigma at its end."""
    h = half_log_snr(sigma_next) - half_log_snr(sigma)
    return h, math.expm1(-h), 1 - sigma_next


def half_log_snr(sigma: float) -> float:
    """ln((1 - sigma) / sigma): minus infinity for pure noise, infinity for clean latents."""
    if sigma in (0, 1):
        return math.inf if sigma == 0 else -math.inf
    return math.log(1 - sigma) - math.log(sigma)


def _after_step(on_step: OnStep | None, i: int, timestep: float, sigma: float, x: Tensor) -> Tensor:
    """Call on_step; return the state to continue from."""
    replaced = on_step(i, timestep, sigma, x) if on_step is not None else None
    return x if replaced is None else replaced
