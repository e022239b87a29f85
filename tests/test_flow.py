"""The line between clean latents and noise."""

import pytest
import torch

from wan.sampling.flow import add_noise, noise_from_velocity, velocity_target, x0_from_velocity


def pair(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 3, 4, 2, 5, 6, generator=generator, dtype=dtype)
    return x0, noise


def test_ends_of_the_line():
    x0, noise = pair()
    assert torch.equal(add_noise(x0, noise, 0.0), x0)
    assert torch.equal(add_noise(x0, noise, 1.0), noise)


@pytest.mark.parametrize("sigma", [0.02, 0.5, 0.75675672, 1.0])
def test_velocity_gives_back_both_ends(sigma):
    x0, noise = pair(dtype=torch.float64)
    x = add_noise(x0, noise, sigma)
    velocity = velocity_target(x0, noise)
    torch.testing.assert_close(x0_from_velocity(x, velocity, sigma), x0, rtol=0, atol=1e-14)
    torch.testing.assert_close(noise_from_velocity(x, velocity, sigma), noise, rtol=0, atol=1e-14)


def test_velocity_is_the_slope_of_the_line():
    x0, noise = pair(dtype=torch.float64)
    rise = add_noise(x0, noise, 0.7) - add_noise(x0, noise, 0.3)
    torch.testing.assert_close(rise / 0.4, velocity_target(x0, noise))


def test_sigma_per_sample_equals_one_sample_at_a_time():
    x0, noise = pair()
    velocity = velocity_target(x0, noise)
    sigma = torch.tensor([0.1, 0.6, 1.0])
    x = add_noise(x0, noise, sigma)
    back = x0_from_velocity(x, velocity, sigma)
    for j, s in enumerate(sigma.tolist()):
        one = slice(j, j + 1)
        assert torch.equal(x[one], add_noise(x0[one], noise[one], s))
        assert torch.equal(back[one], x0_from_velocity(x[one], velocity[one], s))


def test_sigma_per_frame_broadcasts():
    x0, noise = pair()
    sigma = torch.tensor([0.0, 0.75]).view(1, 1, 2, 1, 1)
    x = add_noise(x0, noise, sigma)
    assert torch.equal(x[:, :, 0], x0[:, :, 0])
    assert torch.equal(x[:, :, 1], add_noise(x0[:, :, 1], noise[:, :, 1], 0.75))


def test_half_precision_inputs_are_combined_in_float32():
    x0, noise = pair()
    x0, noise = x0.bfloat16(), noise.bfloat16()
    x = add_noise(x0, noise, 0.3)
    assert x.dtype == torch.bfloat16
    assert torch.equal(x, add_noise(x0.float(), noise.float(), 0.3).bfloat16())


def test_x0_is_computed_in_float64():
    """In float32 the product alone would round; the difference is one that a float64 sum keeps."""
    x, velocity = torch.tensor([[1.0]]), torch.tensor([[3.0000002]])
    sigma = 1 / 3
    exact = float(x.double() - sigma * velocity.double())
    assert x0_from_velocity(x, velocity, sigma).item() == torch.tensor(exact).item() != 0.0
    assert (x - sigma * velocity).item() != torch.tensor(exact).item()


def test_gradients_reach_the_velocity():
    x0, noise = pair(dtype=torch.float64)
    velocity = velocity_target(x0, noise).requires_grad_()
    x0_from_velocity(noise, velocity, 0.4).sum().backward()
    assert velocity.grad is not None
    assert torch.equal(velocity.grad, torch.full_like(velocity, -0.4))


def test_a_sigma_of_the_wrong_length_is_a_bug():
    x0, noise = pair()
    with pytest.raises(AssertionError, match="2 sigmas for a batch of 3"):
        add_noise(x0, noise, torch.tensor([0.1, 0.2]))
