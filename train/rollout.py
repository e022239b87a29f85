"""What a few-step student makes, with the gradient through one step of its chain, or all.

A student is trained on the states it will meet when it samples: its own (backward simulation,
DMD2, arXiv:2405.14867, section 4.5). Each sample of a batch leaves the chain at a step of its own.
Mostly only the forward of that step carries gradient, and what it starts from is detached
(stochastic gradient truncation, Self-Forcing, arXiv:2506.08009, section 3.3). Where K steps of
activations fit, the gradient may run through all of them: then a step also learns what serves the
steps after it.

B batch, C channels, T H W latent sizes, K steps of the student.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from wan.sampling.denoiser import Condition, guided_velocity, predict_velocity
from wan.sampling.flow import x0_from_velocity
from wan.sampling.samplers import few_step
from wan.sampling.schedule import NUM_TIMESTEPS, Schedule


def predict_x0(dit: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    """The clean latents the network sees in x, float32, with the given first frame imposed."""
    velocity = predict_velocity(dit, x, NUM_TIMESTEPS * sigma, condition)
    return condition.impose(x0_from_velocity(x, velocity, sigma))


def guided_x0(
    dit: nn.Module,
    x: Tensor,
    sigma: Tensor,
    condition: Condition,
    null: Condition,
    scale: float | Tensor,
) -> Tensor:
    """What `predict_x0` gives, with classifier-free guidance: see `guided_velocity`."""
    velocity = guided_velocity(dit, x, NUM_TIMESTEPS * sigma, condition, null, scale)
    return condition.impose(x0_from_velocity(x, velocity, sigma))


def autocast(device: torch.device, bfloat16: bool) -> torch.autocast:
    """Matrix products in bfloat16, or nothing.

    Without its cache: before PyTorch 2.11 that hands casts of weights made under no_grad, as in the
    student's chain, to the forward that wants their gradient.
    """
    return torch.autocast(device.type, torch.bfloat16, bfloat16, cache_enabled=False)


def sampler_velocity(
    dit: nn.Module, condition: Condition, null: Condition, scale: float, bfloat16: bool
) -> Callable[[Tensor, float], Tensor]:
    """The guided velocity of a batch as samplers call it: (x, timestep) -> velocity, float32."""

    def velocity(x: Tensor, timestep: float) -> Tensor:
        levels = torch.full((len(x),), timestep, device=x.device)
        with autocast(x.device, bfloat16):
            return guided_velocity(dit, x, levels, condition, null, scale)

    return velocity


def draw_exits(batch: int, steps: int, how: str, generator: torch.Generator) -> Tensor:
    """At which of its K steps each sample leaves the chain: (B,) int64.

    Args:
        how: "stratified" spreads a batch evenly over the steps, the remainder by chance: the
            expectation of "random" with less variance; "late" spreads it so that step i of 1 to K
            gets i shares, and what the critic sees is nearer to what sampling ends with; "random"
            draws each sample's; "shared" draws one for the whole batch, as DMD2 does.
    """
    if how == "shared":
        return torch.randint(steps, (1,), generator=generator).expand(batch)
    if how == "random":
        return torch.randint(steps, (batch,), generator=generator)
    deck = torch.arange(steps)
    if how == "late":
        deck = deck.repeat_interleave(deck + 1)
    rounds = -(-batch // len(deck))
    shuffled = [deck[torch.randperm(len(deck), generator=generator)] for _ in range(rounds)]
    return torch.cat(shuffled)[:batch][torch.randperm(batch, generator=generator)]


def mean_forwards(steps: int, how: str) -> float:
    """Forwards that a sample takes on average up to its exit, the last one included."""
    return (2 * steps + 1) / 3 if how == "late" else (steps + 1) / 2


def states_at_exits(
    student: nn.Module,
    condition: Condition,
    schedule: Schedule,
    exits: Tensor,
    noises: Sequence[Tensor],
    deterministic: bool = False,
    for_all: int = 0,
) -> Tensor:
    """The states (B, C, T, H, W) from which the samples take their last step, as sampling has them.

    Args:
        exits: (B,), from `draw_exits`.
        noises: K of (B, C, T, H, W): the start, then one per re-noising.
        deterministic: as in `wan.sampling.samplers.sample_few_step`.
        for_all: run so many steps for every sample, needed or not: all ranks of a sharded network
            must run equally many forwards.
    """
    sigmas, timesteps = schedule.sigmas.tolist(), schedule.timesteps.tolist()
    x = noises[0]
    for i in range(for_all or int(exits.max())):
        going_on = exits.to(x.device) > i
        chosen = torch.ones_like(going_on) if for_all else going_on
        part, of = x[chosen], condition.select(chosen)
        timestep = torch.full((len(part),), timesteps[i], device=x.device)
        velocity = predict_velocity(student, part, timestep, of)
        noise = None if deterministic else noises[i + 1][chosen]
        moved = x.clone()
        moved[chosen] = few_step(part, velocity, sigmas[i], sigmas[i + 1], noise)
        # Samples that have left stay, and where ranks run for all, pass zeros back through the step
        x = torch.where(going_on[:, None, None, None, None], moved, x)
    return x


def x0_at_exits(
    student: nn.Module, x: Tensor, condition: Condition, schedule: Schedule, exits: Tensor
) -> Tensor:
    """The clean latents that each sample's own step of the chain sees in its state, float32."""
    exits = exits.to(schedule.sigmas.device)
    velocity = predict_velocity(student, x, schedule.timesteps[exits].to(x.device), condition)
    return condition.impose(x0_from_velocity(x, velocity, schedule.sigmas[exits].to(x.device)))


def roll_out(
    student: nn.Module,
    condition: Condition,
    schedule: Schedule,
    exits: Tensor,
    noises: Sequence[Tensor],
    deterministic: bool = False,
    for_all: int = 0,
    truncate_gradient: bool = True,
) -> Tensor:
    """The student's samples x0, (B, C, T, H, W) float32; other arguments as for `states_at_exits`.

    Args:
        truncate_gradient: only the last step of each sample carries gradient; if not, all of its
            steps do. Under `torch.no_grad` none does.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and not truncate_gradient):
        x = states_at_exits(student, condition, schedule, exits, noises, deterministic, for_all)
    return x0_at_exits(student, x, condition, schedule, exits)
