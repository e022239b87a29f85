"""Analytic detectors: what a clip shows, read from its pixels without any learning."""

import torch
from torch import Tensor


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """sRGB in [0, 1] to CIELAB under D65, over the last axis: (..., 3) -> (..., 3) float32."""
    rgb = rgb.float()
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp(min=0) + 0.055) / 1.055) ** 2.4)
    to_xyz = torch.tensor(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
         [0.0193339, 0.1191920, 0.9503041]]
    )  # fmt: skip
    white = torch.tensor([0.95047, 1.0, 1.08883])
    xyz = linear @ to_xyz.T / white
    root = torch.where(
        xyz > 216 / 24389, xyz.clamp(min=1e-12) ** (1 / 3), xyz * (841 / 108) + 4 / 29
    )
    x, y, z = root.unbind(-1)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), -1)
