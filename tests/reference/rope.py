"""Rotary embedding as a loop over tokens and pairs, in complex numbers."""

import cmath

import torch
from torch import Tensor


def rotate(x: Tensor, grid: tuple[int, int, int], theta: float = 10000.0) -> Tensor:
    """(L, K) float64 -> (L, K): every pair of channels times exp(i angle)."""
    num_tokens, head_dim = x.shape
    space = 2 * (head_dim // 6)
    axes = [(0, head_dim - 2 * space), (1, space), (2, space)]  # axis, channels
    out = torch.empty_like(x)
    for token in range(num_tokens):
        position = (
            token // (grid[1] * grid[2]),
            token // grid[2] % grid[1],
            token % grid[2],
        )
        channel = 0
        for axis, channels in axes:
            for pair in range(channels // 2):
                angle = position[axis] * theta ** (-2 * pair / channels)
                number = complex(float(x[token, channel]), float(x[token, channel + 1]))
                turned = number * cmath.exp(1j * angle)
                out[token, channel], out[token, channel + 1] = turned.real, turned.imag
                channel += 2
    return out
