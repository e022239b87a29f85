"""Training objectives as pure functions."""

import torch
from torch import Tensor

from wan.schedule import shift_sigmas

# B batch; a latent is (B, C, T, H, W)


def sample_sigmas(batch: int, shift: float, generator: torch.Generator) -> Tensor:
    """Noise levels (B,) in (0, 1): logit-normal, then shifted towards high noise.

    Source: SD3, arXiv:2403.03206, sections 3.1 (logit-normal) and 5.3.2 (shift).
    """
    return shift_sigmas(torch.sigmoid(torch.randn(batch, generator=generator)), shift)


def flow_matching_loss(velocity: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error to noise - x0, in float32.

    Source: Lipman et al., arXiv:2210.02747, eq. 23, on the straight path.
    Args:
        velocity, target: (B, C, T, H, W).
        weight: (B, 1, T, 1, 1), 0 for frames that are given rather than predicted; None weighs all
            alike. The mean is over what counts.
    """
    error = (velocity.float() - target.float()).square()
    if weight is None:
        return error.mean()
    weight = weight.expand_as(error)
    return (error * weight).sum() / weight.sum()
