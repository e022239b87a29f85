"""Samplers against exact solutions and against diffusers, on velocities given by formulas."""

import math

import pytest
import torch

from wan.errors import WanError
from wan.sampling.samplers import (
    SAMPLERS,
    build_stepper,
    sample,
    sample_euler,
    sample_few_step,
    sample_unipc,
)
from wan.sampling.schedule import Schedule, euler_schedule, few_step_schedule, unipc_schedule

SHAPE = (2, 3, 2, 4, 4)


def start(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=dtype)


def toy_velocity(x: torch.Tensor, timestep: float) -> torch.Tensor:
    """Smooth, nonlinear, and strongly dependent on both arguments."""
    return torch.tanh(2 * x + timestep / 500) + 0.3 * torch.roll(x, 1, dims=-1)


def run(name: str, velocity, x, schedule, on_step=None, **options) -> torch.Tensor:
    return sample(velocity, x, build_stepper(name, schedule, **options), on_step)


def renoise_from(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda i: torch.randn(SHAPE, generator=generator)


@pytest.mark.parametrize("shift", [3.0, 5.0, 12.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 20, 50])
def test_unipc_equals_diffusers(steps, shift):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
    )
    scheduler.set_timesteps(steps)
    expected = start()
    for t in scheduler.timesteps:
        expected = scheduler.step(toy_velocity(expected, float(t)), t, expected).prev_sample
    ours = sample_unipc(toy_velocity, start(), unipc_schedule(steps, shift))
    assert ((ours - expected).norm() / expected.norm()).item() <= 1e-6


@pytest.mark.parametrize("steps", [1, 4, 40])
def test_euler_equals_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    expected = start()
    for t in scheduler.timesteps:
        expected = scheduler.step(toy_velocity(expected, float(t)), t, expected).prev_sample
    ours = sample_euler(toy_velocity, start(), euler_schedule(steps, 5.0))
    assert ((ours - expected).norm() / expected.norm()).item() <= 1e-6


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 5, 30])
def test_a_straight_path_ends_at_x0_exactly(name, steps):
    noise, x0 = start(torch.float64), torch.rand(SHAPE, dtype=torch.float64)
    options = {"renoise": None, "deterministic": True} if name == "few_step" else {}
    x = run(name, lambda x, t: noise - x0, noise, euler_schedule(steps, 3.0), **options)
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-7)  # sigmas are float32


def test_few_step_finds_x0_from_any_fresh_noise():
    """The algebra with a model that knows the answer: v = (x - x0) / sigma at every state."""
    x0 = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1))
    schedule = few_step_schedule()
    sigma_of = dict(zip(schedule.timesteps.tolist(), schedule.sigmas.tolist(), strict=False))
    seen = []

    def velocity(x: torch.Tensor, timestep: float) -> torch.Tensor:
        seen.append(timestep)
        return (x - x0) / sigma_of[timestep]

    x = sample_few_step(velocity, start(), schedule, renoise_from(5))
    assert seen == [1000, 757, 522]
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-6)


def test_few_step_states_are_x0_plus_the_given_noise():
    schedule = few_step_schedule([1000, 500])
    sigma = schedule.sigmas[1].item()
    noise = renoise_from(3)(0)
    states = []
    sample_few_step(
        toy_velocity, start(), schedule, renoise_from(3), on_step=lambda *a: states.append(a[3])
    )
    x0 = start() - toy_velocity(start(), 1000)
    torch.testing.assert_close(states[0], (1 - sigma) * x0 + sigma * noise, rtol=1e-6, atol=1e-6)
    expected = states[0] - sigma * toy_velocity(states[0], 500)
    torch.testing.assert_close(states[1], expected, rtol=1e-6, atol=1e-6)


def test_deterministic_few_step_is_euler():
    schedule = few_step_schedule()
    ours = sample_few_step(toy_velocity, start(), schedule, deterministic=True)
    torch.testing.assert_close(ours, sample_euler(toy_velocity, start(), schedule))


def test_few_step_draws_noise_once_between_steps():
    drawn = []

    def renoise(i: int) -> torch.Tensor:
        drawn.append(i)
        return torch.zeros(SHAPE)

    sample_few_step(toy_velocity, start(), few_step_schedule(), renoise)
    assert drawn == [0, 1]


def test_few_step_without_noise_is_refused():
    with pytest.raises(WanError, match="deterministic=True"):
        sample_few_step(toy_velocity, start(), few_step_schedule())


@pytest.mark.parametrize(("name", "least"), [("euler", 0.9), ("unipc", 1.9), ("dpm++", 1.9)])
def test_order_of_convergence(name, least):
    """Twice the steps on dx/dsigma = -x, whose solution is known, cut the error by 2^order."""
    x = torch.ones(1, dtype=torch.float64)

    def error(steps: int) -> float:
        # From 0.9 down to 0.1 by even steps in half-log-SNR, then to 0 in one: the last step is
        # first order, so the error is taken before it.
        levels = torch.linspace(-math.log(9), math.log(9), steps + 1, dtype=torch.float64)
        sigmas = torch.cat([1 / (1 + levels.exp()), torch.zeros(1, dtype=torch.float64)])
        schedule = Schedule(sigmas[:-1] * 1000, sigmas, "even in half-log-SNR")
        states = []
        run(name, lambda x, t: -x, x, schedule, on_step=lambda *step: states.append(step[3]))
        return abs(states[steps - 1].item() - math.exp(0.8))

    assert math.log2(error(160) / error(320)) > least


@pytest.mark.parametrize("name", SAMPLERS)
def test_on_step_sees_every_state_and_may_replace_it(name):
    options = {"deterministic": True} if name == "few_step" else {}
    schedule = unipc_schedule(4, 5.0)
    seen = []

    def watch(i: int, timestep: float, sigma: float, x: torch.Tensor) -> None:
        seen.append((i, timestep, sigma))

    plain = run(name, toy_velocity, start(), schedule, on_step=watch, **options)
    assert [step[0] for step in seen] == [0, 1, 2, 3]
    assert [step[1] for step in seen] == schedule.timesteps.tolist()
    assert [step[2] for step in seen] == schedule.sigmas[1:].tolist()

    given = []

    def velocity(x: torch.Tensor, timestep: float) -> torch.Tensor:
        given.append(x)
        return toy_velocity(x, timestep)

    def replace(i: int, timestep: float, sigma: float, x: torch.Tensor) -> torch.Tensor | None:
        return torch.full_like(x, 7.0) if i == 1 else None

    replaced = run(name, velocity, start(), schedule, on_step=replace, **options)
    assert bool((given[2] == 7).all())
    assert not torch.equal(replaced, plain)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(name):
    """Bit for bit, as long as the velocity itself works sample by sample."""

    def velocity(x: torch.Tensor, timestep: float) -> torch.Tensor:
        return torch.cat([toy_velocity(one, timestep) for one in x.split(1)])

    options = {"deterministic": True} if name == "few_step" else {}
    schedule = unipc_schedule(5, 5.0)
    together = run(name, velocity, start(), schedule, **options)
    for j in range(len(together)):
        alone = run(name, velocity, start()[j : j + 1], schedule, **options)
        assert torch.equal(alone, together[j : j + 1])


@pytest.mark.parametrize("name", SAMPLERS)
def test_states_keep_their_dtype_when_the_velocity_is_bfloat16(name):
    options = {"deterministic": True} if name == "few_step" else {}
    x = run(
        name, lambda x, t: toy_velocity(x, t).bfloat16(), start(), unipc_schedule(3, 5.0), **options
    )
    assert x.dtype == torch.float32


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_runs_from_pure_noise(name):
    """sigma = 1 exactly has infinite log-SNR; the formulas have a limit there."""
    options = {"deterministic": True} if name == "few_step" else {}
    x = run(name, toy_velocity, start(), euler_schedule(6, 5.0), **options)
    assert bool(x.isfinite().all())
    nearly = euler_schedule(6, 5.0)
    sigmas = nearly.sigmas.clone()
    sigmas[0] = 1 - 1e-6
    close = run(
        name, toy_velocity, start(), Schedule(nearly.timesteps, sigmas, "almost 1"), **options
    )
    torch.testing.assert_close(x, close, rtol=0, atol=2e-3)


def test_an_unknown_sampler_is_refused_with_the_known_ones():
    with pytest.raises(WanError, match=r"euler, unipc, dpm\+\+, few_step"):
        build_stepper("dpm", euler_schedule(2, 5.0))
