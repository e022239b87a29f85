"""Training objectives as pure functions.

Distribution matching distillation (DMD, arXiv:2311.18828; DMD2, arXiv:2405.14867) moves the samples
x of a student along the difference of two scores at noised samples x_s = (1 - s) x + s e:

    grad log p(x_s) = ((1 - s) x0(x_s) - x_s) / s^2,  so
    score_critic - score_teacher = (1 - s) / s^2 (x0_critic - x0_teacher)

The critic knows the student's own distribution, the teacher that of the data; descending along the
difference lowers KL(student || teacher) over all noise levels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.errors import WanError
from wan.sampling.schedule import shift_sigmas

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
        weight: as in `mean_squared_error`.
    """
    return mean_squared_error(velocity, target, weight)


def mean_squared_error(x: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of (x - target)^2 over what counts, in float32.

    Args:
        x, target: (B, C, T, H, W).
        weight: (B, 1, T, 1, 1), 0 for frames that are given rather than predicted; None weighs all
            alike.
    """
    error = (x.float() - target.float()).square()
    if weight is None:
        return error.mean()
    weight = weight.expand_as(error)
    return (error * weight).sum() / weight.sum()


NORMALIZER_FLOOR = 1e-6  # two networks that agree to this say nothing about a direction


def dmd_normalizer(x0: Tensor, x0_teacher: Tensor, weight: Tensor | None = None) -> Tensor:
    """How far the teacher would move each sample: mean |x0 - x0_teacher|, (B,) float32.

    Dividing by it takes the place of the score's weight (1 - s) / s^2, so that all noise levels
    pull alike. Source: DMD, arXiv:2311.18828, eq. 8.
    Args:
        weight: (B, 1, T, 1, 1) or None, as in `flow_matching_loss`.
    """
    distance = (x0.float() - x0_teacher.float()).abs()
    if weight is None:
        return distance.flatten(1).mean(1)
    weight = weight.expand_as(distance)
    return (distance * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)


def dmd_gradient(
    x0: Tensor, x0_teacher: Tensor, x0_critic: Tensor, weight: Tensor | None = None
) -> Tensor:
    """The direction a student's samples leave: (x0_critic - x0_teacher) / normalizer, float32.

    Source: DMD, arXiv:2311.18828, eqs. 7 and 8; DMD2, arXiv:2405.14867, eq. 2.
    Args:
        x0: (B, C, T, H, W), what the student made.
        x0_teacher, x0_critic: what the two networks see in one noised version of it; the teacher
            with guidance, the critic without.
        weight: as in `dmd_normalizer`; where it is 0, so is the gradient.
    """
    scale = dmd_normalizer(x0, x0_teacher, weight).clamp(min=NORMALIZER_FLOOR)
    gradient = (x0_critic.float() - x0_teacher.float()) / scale.view(-1, *[1] * (x0.ndim - 1))
    return gradient if weight is None else gradient * weight


def loss_with_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose derivative with respect to x is exactly gradient / numel.

    DMD gives a gradient and no loss; autograd wants a loss. Its value, half the mean squared
    gradient, says how much critic and teacher disagree and is not expected to fall.
    """
    return 0.5 * F.mse_loss(x.float(), (x.float() - gradient.float()).detach())


def sample_score_sigmas(
    batch: int,
    shift: float,
    bounds: tuple[float, float],
    generator: torch.Generator,
    clamp: bool = True,
    above: Tensor | None = None,
) -> Tensor:
    """Noise levels (B,) for scores: uniform, shifted towards high noise, within bounds.

    Args:
        bounds: lowest and highest level.
        clamp: move what falls outside onto the bounds, as FastVideo does (at shift 5, 9 % of all
            draws land on 0.98); False draws uniformly from what falls inside.
        above: (B,), below the highest level: each sample's is drawn from there up.
    Raises:
        WanError: bounds that are not 0 < lowest < highest < 1.
    """
    lowest, highest = bounds
    if not 0 < lowest < highest < 1:
        raise WanError(f"noise levels from {lowest} to {highest}: need 0 < lowest < highest < 1")
    uniform = torch.rand(batch, generator=generator)
    # Places before the shift, whose inverse is the shift by 1 / shift; 0 and 1 stay where they are.
    start = torch.zeros(()) if above is None else shift_sigmas(above, 1 / shift)
    if clamp:
        return shift_sigmas(start + uniform * (1 - start), shift).clamp(lowest, highest)
    low, high = shift_sigmas(torch.tensor([lowest, highest]), 1 / shift)
    start = start.maximum(low)
    return shift_sigmas(start + uniform * (high - start), shift)


def adversarial_loss(logits: Tensor) -> Tensor:
    """Non-saturating: what a generator pays where its samples do not pass. arXiv:1406.2661."""
    return F.softplus(-logits.float()).mean()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """What telling real from fake costs: softplus(-D(real)) + softplus(D(fake))."""
    return F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean()
