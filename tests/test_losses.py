import torch

from train.losses import flow_matching_loss, sample_sigmas


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
