import math

import pytest
import torch
from torch import Tensor

from train.losses import (
    adversarial_loss,
    discriminator_loss,
    dmd_gradient,
    dmd_normalizer,
    flow_matching_loss,
    loss_with_gradient,
    sample_score_sigmas,
    sample_sigmas,
)
from wan.errors import WanError
from wan.sampling.flow import add_noise
from wan.sampling.schedule import shift_sigmas


def test_loss_of_the_exact_velocity_is_zero():
    target = torch.randn(2, 3, 4, 2, 2)
    assert flow_matching_loss(target, target).item() == 0


def test_weight_zero_takes_a_frame_out_of_the_mean():
    target = torch.zeros(1, 1, 2, 1, 1)
    velocity = torch.tensor([100.0, 2.0]).view(1, 1, 2, 1, 1)
    weight = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1, 1)
    assert flow_matching_loss(velocity, target, weight).item() == 4.0


def test_shift_moves_the_median_noise_level_as_the_formula_says():
    generator = torch.Generator().manual_seed(0)
    sigmas = sample_sigmas(20_000, 3.0, generator)
    assert sigmas.min() > 0
    assert sigmas.max() < 1
    # The median of the logit-normal is 0.5, and S_3(0.5) = 0.75; 0.01 is three standard errors
    assert abs(sigmas.median().item() - 0.75) < 0.01


# --- distribution matching ------------------------------------------------------------------------

SHAPE = (3, 2, 4, 2, 2)


def draw(seed: int, shape=SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_where_critic_and_teacher_agree_the_student_stays():
    x0, same = draw(0), draw(1)
    gradient = dmd_gradient(x0, same, same)
    assert torch.equal(gradient, torch.zeros_like(x0))
    assert loss_with_gradient(x0, gradient) == 0


def test_autograd_delivers_the_gradient_over_the_number_of_elements():
    x0 = draw(0).requires_grad_()
    gradient = dmd_gradient(x0.detach(), draw(1), draw(2))
    (found,) = torch.autograd.grad(loss_with_gradient(x0, gradient), x0)
    torch.testing.assert_close(found, gradient / x0.numel(), rtol=1e-5, atol=1e-7)


def test_descending_moves_towards_the_teacher_and_away_from_the_critic():
    x0, teacher, critic = torch.zeros(1, 1, 1, 1, 1), torch.ones(1, 1, 1, 1, 1), -torch.ones(1)
    gradient = dmd_gradient(x0, teacher, critic.view(1, 1, 1, 1, 1))
    assert (x0 - 0.1 * gradient).item() > 0


def test_the_gradient_of_a_sample_by_hand():
    x0, teacher, critic = (torch.full((1, 1, 1, 1, 2), x) for x in (0.0, 2.0, 5.0))
    assert dmd_gradient(x0, teacher, critic).flatten().tolist() == [1.5, 1.5]  # (5 - 2) / |0 - 2|


def test_the_normalizer_is_each_samples_own():
    x0, teacher, critic = draw(0), draw(1), draw(2)
    before = dmd_gradient(x0, teacher, critic)
    far = teacher.clone()
    far[0] = x0[0] + 100 * (teacher[0] - x0[0])
    after = dmd_gradient(x0, far, critic)
    assert torch.equal(before[1:], after[1:])
    expected = (x0 - teacher).abs().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(dmd_normalizer(x0, teacher), expected)


def test_a_given_frame_counts_neither_in_the_normalizer_nor_in_the_gradient():
    x0, teacher, critic = draw(0), draw(1), draw(2)
    weight = torch.ones(3, 1, 4, 1, 1)
    weight[:, :, 0] = 0
    gradient = dmd_gradient(x0, teacher, critic, weight)
    assert gradient[:, :, 0].abs().max() == 0
    rest = dmd_gradient(x0[:, :, 1:], teacher[:, :, 1:], critic[:, :, 1:])
    torch.testing.assert_close(gradient[:, :, 1:], rest)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("clamp", [True, False])
def test_score_levels_are_shifted_uniform_within_bounds(shift, clamp):
    generator = torch.Generator().manual_seed(0)
    sigma = sample_score_sigmas(20_000, shift, (0.02, 0.98), generator, clamp)
    assert sigma.min() >= 0.0199999
    assert sigma.max() <= 0.9800001
    inside = sigma[(sigma > 0.0201) & (sigma < 0.9799)]
    uniform = shift_sigmas(inside, 1 / shift).sort().values  # the shift undone
    low, high = shift_sigmas(torch.tensor([0.0201, 0.9799]), 1 / shift)
    steps = torch.linspace(float(low), float(high), len(uniform))
    assert (uniform - steps).abs().max() / (high - low) < 1.63 / len(uniform) ** 0.5  # KS, 1 %
    on_top = (sigma >= 0.9799).float().mean()
    expected = 1 - float(shift_sigmas(torch.tensor(0.98), 1 / shift)) if clamp else 0.0
    assert on_top == pytest.approx(expected, abs=0.008)  # at shift 5: 9.3 %


@pytest.mark.parametrize("shift", [3.0, 5.0])
def test_score_levels_that_are_clamped_are_fastvideos_to_the_last_bit(shift):
    sigma = sample_score_sigmas(1000, shift, (0.02, 0.98), torch.Generator().manual_seed(0))
    uniform = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sigma, shift_sigmas(uniform, shift).clamp(0.02, 0.98))


@pytest.mark.parametrize("clamp", [True, False])
def test_score_levels_start_at_each_samples_own(clamp):
    above = torch.tensor([0.0, 0.3, 0.9]).repeat(4000)
    generator = torch.Generator().manual_seed(0)
    sigma = sample_score_sigmas(12_000, 3.0, (0.02, 0.98), generator, clamp, above)
    for level, drawn in zip((0.02, 0.3, 0.9), sigma.view(-1, 3).T, strict=True):
        assert level - 1e-6 <= drawn.min() < level + 0.01
        assert drawn.max() <= 0.98 + 1e-6
        ends = torch.tensor([level, 1 if clamp else 0.98])
        middle = shift_sigmas(shift_sigmas(ends, 1 / 3).mean(), 3.0)
        assert (drawn < middle).float().mean() == pytest.approx(0.5, abs=0.03)


def two_points(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x] of data that are -1 or 1."""
    return torch.tanh((1 - sigma) * x / sigma**2)


def test_at_high_levels_only_samples_need_not_have_decided_yet():
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 50_000, generator=generator)  # as wide as the data, undecided
    pull = {}
    for above in (0.0, 0.9):
        sigma = sample_score_sigmas(
            50_000, 1.0, (0.02, 0.98), generator, above=torch.full((50_000,), above)
        )
        x = (1 - sigma) * x0 + sigma * noise
        critic = (1 - sigma) * x / ((1 - sigma) ** 2 + sigma**2)  # exact for N(0, 1)
        pull[above] = (critic - two_points(x, sigma)).square().mean().sqrt()
    assert pull[0.0] > 0.25
    assert pull[0.9] < 0.01


def test_a_teacher_that_sees_the_data_pulls_towards_a_mode_that_the_student_lost():
    generator = torch.Generator().manual_seed(0)
    sigma = torch.full((20_000,), 0.2)
    noise = torch.randn(20_000, generator=generator)
    clips = 2.0 * torch.randint(2, (20_000,), generator=generator) - 1
    x0 = torch.ones(20_000)  # the student makes one of the two points only
    own, there = ((1 - sigma) * x + sigma * noise for x in (x0, clips))
    plain = dmd_gradient(x0[:, None], two_points(own, sigma)[:, None], x0[:, None])
    forced = dmd_gradient(x0[:, None], two_points(there, sigma)[:, None], x0[:, None])
    assert plain[two_points(own, sigma) < 1].abs().max() <= 1 + 1e-6
    assert (x0 - two_points(own, sigma)).mean() < 1e-3  # nothing is said of the other point
    assert (x0 - two_points(there, sigma)).mean() == pytest.approx(1, abs=0.03)
    assert forced[clips < 0].min() > 0.99  # descending leads to -1


def test_score_levels_refuse_bounds_in_the_wrong_order():
    with pytest.raises(WanError, match="lowest < highest"):
        sample_score_sigmas(1, 5.0, (0.9, 0.1), torch.Generator())


def test_renoised_states_have_the_variance_of_their_level():
    x0, noise = 2 * draw(0, (40_000, 1)), draw(1, (40_000, 1))
    for sigma in (0.2, 0.757):
        expected = (1 - sigma) ** 2 * 4 + sigma**2
        assert add_noise(x0, noise, sigma).var().item() == pytest.approx(expected, rel=0.03)


def test_the_adversarial_losses_know_their_side():
    sure = torch.tensor([4.0])
    assert adversarial_loss(sure) < adversarial_loss(-sure)
    assert discriminator_loss(sure, -sure) < discriminator_loss(-sure, sure)
    assert discriminator_loss(0 * sure, 0 * sure).item() == pytest.approx(2 * math.log(2))
