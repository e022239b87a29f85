"""Rectified flow: the straight line between clean latents and noise, and what lies on it.

    x = (1 - sigma) * x0 + sigma * noise        velocity = noise - x0 = dx/dsigma

Any two of (x0, noise, x, velocity) at a known sigma give the other two.
Source: rectified flow, arXiv:2209.03003; flow matching, arXiv:2210.02747.

Shapes: all tensors are (B, ...) alike. A sigma is a number, a (B,) tensor with one value per
sample, or a tensor that already broadcasts against the latents, such as (B, 1, T, 1, 1).
"""

import torch
from torch import Tensor


def add_noise(x0: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """The point at noise level sigma: (1 - sigma) * x0 + sigma * noise.

    Computed in float32 (float64 if any input is), returned in the dtype of x0.
    """
    dtype = _compute_dtype(x0, noise, sigma, at_least=torch.float32)
    s = _expand(sigma, x0, dtype)
    return ((1 - s) * x0.to(dtype) + s * noise.to(dtype)).to(x0.dtype)


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """What the DiT learns to predict: noise - x0."""
    return noise - x0


def x0_from_velocity(x: Tensor, velocity: Tensor, sigma: float | Tensor) -> Tensor:
    """The clean latents that lie sigma behind x: x - sigma * velocity.

    Computed in float64, returned in the dtype of x: near sigma = 1 the result is a small difference
    of large numbers, and a few-step sampler computes its next state from it.
    """
    wide = _double(x)
    s = _expand(sigma, wide, torch.float64)
    return (wide - s * _double(velocity)).to(x.device, x.dtype)


def noise_from_velocity(x: Tensor, velocity: Tensor, sigma: float | Tensor) -> Tensor:
    """The noise that lies 1 - sigma ahead of x: x + (1 - sigma) * velocity; float64 inside."""
    wide = _double(x)
    s = _expand(sigma, wide, torch.float64)
    return (wide + (1 - s) * _double(velocity)).to(x.device, x.dtype)


def _double(x: Tensor) -> Tensor:
    """x in float64; on the CPU if its device has no float64."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def _compute_dtype(*values: float | Tensor, at_least: torch.dtype) -> torch.dtype:
    """The widest dtype among the tensors and `at_least`; Python numbers do not count."""
    dtype = at_least
    for value in values:
        if isinstance(value, Tensor):
            dtype = torch.promote_types(dtype, value.dtype)
    return dtype


def _expand(sigma: float | Tensor, like: Tensor, dtype: torch.dtype) -> float | Tensor:
    """Give a sigma the dtype, device and shape to multiply with `like`."""
    if not isinstance(sigma, Tensor):
        return sigma
    assert sigma.ndim in (0, 1, like.ndim), f"sigma {tuple(sigma.shape)} for {tuple(like.shape)}"
    if sigma.ndim == 1:
        assert len(sigma) == len(like), f"{len(sigma)} sigmas for a batch of {len(like)}"
        sigma = sigma.view(-1, *[1] * (like.ndim - 1))  # (B, 1, ...)
    return sigma.to(device=like.device, dtype=dtype)
