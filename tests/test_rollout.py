"""The student's chain: equal to sampling, one gradient, steps left evenly."""

import pytest
import torch
from torch import Tensor, nn

from train.rollout import (
    draw_exits,
    mean_forwards,
    predict_x0,
    roll_out,
    states_at_exits,
)
from wan.models.dit import WanDiT
from wan.models.dit_config import DiTConfig
from wan.sampling.denoiser import (
    Condition,
    Denoiser,
    Expert,
    guide,
    guided_velocity,
    predict_velocity,
)
from wan.sampling.samplers import sample_few_step
from wan.sampling.schedule import few_step_schedule

TINY = DiTConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=8,
    freq_dim=16,
    ffn_dim=32,
    num_layers=2,
)
SHAPE = (4, 3, 4, 4)
SCHEDULE = few_step_schedule([1000, 757, 522])


def with_random_weights(dit: WanDiT, seed: int = 0) -> WanDiT:
    """All weights random: a fresh network is zero in many places, and blind to text and time."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in dit.parameters():
            p.normal_(0.05, max(p[0].numel(), 4) ** -0.5, generator=generator)
    return dit


def tiny_dit(seed: int = 0) -> WanDiT:
    return with_random_weights(WanDiT(TINY), seed)


def condition(batch: int, first_frame: bool = False) -> Condition:
    generator = torch.Generator().manual_seed(3)
    context = torch.zeros(batch, 16, 8)
    context[:, :5] = torch.randn(batch, 5, 8, generator=generator)
    frame = torch.randn(batch, 4, 1, 4, 4, generator=generator) if first_frame else None
    return Condition(context, 5, frame)


def noises(batch: int, steps: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(batch, *SHAPE, generator=generator) for _ in range(steps)]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("first_frame", [False, True])
def test_a_sample_that_stays_to_the_end_is_what_the_sampler_makes(deterministic, first_frame):
    dit, given, noise = tiny_dit(), condition(1, first_frame), noises(1)
    with torch.no_grad():
        ours = roll_out(dit, given, SCHEDULE, torch.tensor([2]), noise, deterministic)
        denoiser = Denoiser(Expert(dit), given.context, image_latents=given.first_frame)
        sampled = sample_few_step(
            denoiser, noise[0], SCHEDULE, lambda i: noise[i + 1], deterministic
        )
    # The denoiser attends padding in its own way: equal up to the rounding of that.
    torch.testing.assert_close(ours, denoiser.impose_image(sampled), rtol=1e-5, atol=1e-5)


def test_states_at_exits_are_the_samplers_own_bit_for_bit():
    dit, given, noise = tiny_dit(), condition(1), noises(1)
    seen = [noise[0]]

    def velocity(x: Tensor, timestep: float) -> Tensor:
        return predict_velocity(dit, x, torch.full((len(x),), timestep), given)

    with torch.no_grad():
        sample_few_step(
            velocity, noise[0], SCHEDULE, lambda i: noise[i + 1],
            on_step=lambda i, t, sigma, x: seen.append(x),
        )  # fmt: skip
    for j in range(3):
        state = states_at_exits(dit, given, SCHEDULE, torch.tensor([j]), noise)
        assert torch.equal(state, seen[j])


def test_a_batch_with_mixed_exits_gives_what_each_sample_gives_alone():
    dit, given, noise = tiny_dit(), condition(4), noises(4)
    exits = torch.tensor([2, 0, 1, 0])
    with torch.no_grad():
        together = roll_out(dit, given, SCHEDULE, exits, noise)
        aligned = roll_out(dit, given, SCHEDULE, exits, noise, for_all=2)
        for row in range(4):
            one = torch.tensor([row])
            alone = roll_out(dit, given.select(one), SCHEDULE, exits[one], [n[one] for n in noise])
            torch.testing.assert_close(together[one], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together, aligned, rtol=1e-5, atol=1e-5)


class Counting(nn.Module):
    """Counts forwards with and without gradient, and looks at what they start from."""

    def __init__(self, dit: WanDiT) -> None:
        super().__init__()
        self.dit, self.with_gradient, self.without = dit, 0, 0

    def forward(self, x: Tensor, *rest: object) -> Tensor:
        assert not x.requires_grad
        if torch.is_grad_enabled():
            self.with_gradient += 1
        else:
            self.without += 1
        return self.dit(x, *rest)


@pytest.mark.parametrize("exit_step", [0, 1, 2])
def test_exactly_one_forward_carries_gradient(exit_step):
    student = Counting(tiny_dit())
    x0 = roll_out(student, condition(2), SCHEDULE, torch.full((2,), exit_step), noises(2))
    assert (student.with_gradient, student.without) == (1, exit_step)
    assert x0.requires_grad


@pytest.mark.parametrize("for_all", [0, 2])
@pytest.mark.parametrize("deterministic", [False, True])
def test_untruncated_the_gradient_is_that_of_the_whole_chain(deterministic, for_all):
    dit, given, noise = tiny_dit(), condition(3), noises(3)
    exits = torch.tensor([2, 0, 1])

    def gradients(truncate: bool) -> list[Tensor]:
        dit.zero_grad()
        chain = (SCHEDULE, exits, noise, deterministic, for_all)
        roll_out(dit, given, *chain, truncate_gradient=truncate).square().sum().backward()
        return [p.grad.clone() for p in dit.parameters()]

    through_all = gradients(truncate=False)
    dit.zero_grad()
    for row, exit_step in enumerate(exits.tolist()):  # each sample by itself, step after step
        one = torch.tensor([row])
        x = noise[0][one]
        for i in range(exit_step + 1):
            sigma, timestep = float(SCHEDULE.sigmas[i]), SCHEDULE.timesteps[i : i + 1]
            velocity = predict_velocity(dit, x, timestep, given.select(one))
            x0 = x - sigma * velocity
            fresh = x + (1 - sigma) * velocity if deterministic else noise[(i + 1) % 3][one]
            following = float(SCHEDULE.sigmas[i + 1])
            x = (1 - following) * x0 + following * fresh
        x0.square().sum().backward()
    for seen, parameter in zip(through_all, dit.parameters(), strict=True):
        torch.testing.assert_close(seen, parameter.grad, rtol=1e-4, atol=1e-4)
    truncated = gradients(truncate=True)  # no first two steps of sample 0, no first of sample 2
    assert max((a - b).abs().max() for a, b in zip(through_all, truncated, strict=True)) > 0.1


def test_a_given_first_frame_stays_and_is_seen_at_timestep_zero():
    dit, given = tiny_dit(), condition(2, first_frame=True)
    x0 = roll_out(dit, given, SCHEDULE, torch.tensor([2, 1]), noises(2))
    assert torch.equal(x0[:, :, :1], given.first_frame)
    other = noises(2)[0].clone()
    other[:, :, 0] += 1  # whatever stands in frame 0 of the state, the network sees the clean one
    level = torch.tensor([500.0, 500.0])
    assert torch.equal(
        predict_velocity(dit, other, level, given),
        predict_velocity(dit, noises(2)[0], level, given),
    )
    per_frame = torch.tensor([[0.0, 500.0, 500.0]] * 2)
    seen = dit(given.impose(other), per_frame, given.context, given.num_tokens)
    torch.testing.assert_close(predict_velocity(dit, other, level, given), seen)
    assert not torch.allclose(seen, dit(given.impose(other), level, given.context), atol=0.1)
    assert given.frame_weight(3)[:, 0, :, 0, 0].tolist() == [[0, 1, 1]] * 2


@pytest.mark.parametrize("sigma", [0.02, 0.5, 0.98])
def test_x0_and_velocity_say_the_same(sigma):
    dit, given, x = tiny_dit(), condition(2), noises(2)[0]
    level = torch.full((2,), sigma)
    x0 = predict_x0(dit, x, level, given)
    velocity = predict_velocity(dit, x, 1000 * level, given)
    torch.testing.assert_close((x - x0) / sigma, velocity, rtol=1e-4, atol=1e-4)


def test_guidance_is_the_standard_form():
    dit, given, x = tiny_dit(), condition(2), noises(2)[0]
    null = Condition(torch.zeros(2, 16, 8), 1)
    level = torch.tensor([700.0, 300.0])
    with_text = predict_velocity(dit, x, level, given)
    without = predict_velocity(dit, x, level, null)
    assert (with_text - without).abs().max() > 0.1
    for scale in (1.0, 4.0):
        guided = guided_velocity(dit, x, level, given, null, scale)
        torch.testing.assert_close(
            guided, without + scale * (with_text - without), rtol=1e-4, atol=1e-5
        )


def test_standard_guidance_is_the_offset_form_of_other_codebases_at_one_more():
    with_text, without = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    offset = with_text + 3 * (with_text - without)  # c + g (c - u), as FastVideo has it
    torch.testing.assert_close(guide(with_text, without, 4.0), offset)


def test_exits_are_uniform_and_a_stratified_batch_is_even():
    generator = torch.Generator().manual_seed(0)
    for how in ("random", "shared", "stratified"):
        drawn = torch.stack([draw_exits(4, 3, how, generator) for _ in range(3000)])
        shares = torch.bincount(drawn.flatten(), minlength=3) / drawn.numel()
        assert shares.tolist() == pytest.approx([1 / 3] * 3, abs=0.03)
    assert torch.bincount(draw_exits(9, 3, "stratified", generator)).tolist() == [3, 3, 3]
    assert torch.bincount(draw_exits(12, 3, "late", generator)).tolist() == [2, 4, 6]
    assert len(set(draw_exits(50, 4, "shared", generator).tolist())) == 1


@pytest.mark.parametrize("how", ["stratified", "late", "shared"])
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_forwards_up_to_an_exit_are_counted_as_drawn(how, steps):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([draw_exits(10, steps, how, generator) for _ in range(2000)]) + 1
    assert drawn.float().mean() == pytest.approx(mean_forwards(steps, how), rel=0.02)
