"""Gaussian noise that depends on a sample's seed and on nothing else.

Each sample has a CPU generator of its own, and every draw of that sample (the start, then one per
re-noising step) continues its stream. So a video does not change with the batch it is in, with the
device it runs on, or with the number of GPUs. Shapes: one sample is (C, T, H, W).
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wan.errors import WanError

MAX_SEED = 2**64 - 1  # the largest that PyTorch takes
DISTINCT_SEEDS = 2**32  # its CPU generator reads 32 bits of them


def sample_generators(seed: int | Sequence[int], batch: int) -> list[torch.Generator]:
    """One seeded CPU generator per sample.

    PyTorch's CPU generator reads the lower 32 bits of a seed. A larger seed is taken, with a
    warning that names the smaller one of the same noise.

    Args:
        seed: sample j gets seed + j; or one seed for each sample.
        batch: number of samples B.

    Raises:
        WanError: the number of seeds is not B, or a seed is not a whole number from 0 to 2**64 - 1.
    """
    one = isinstance(seed, int | np.integer)
    several = isinstance(seed, list | tuple | np.ndarray)
    given: list[Any] = list(seed) if several else [seed]  # type: ignore[arg-type]
    for value in given:
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or not 0 <= value <= MAX_SEED:
            raise WanError(
                f"seed {value!r}: need a whole number from 0 to {MAX_SEED}, or -1 for a random one"
            )
    seeds = [int(given[0]) + j for j in range(batch)] if one else [int(one) for one in given]
    if len(seeds) != batch:
        raise WanError(f"{len(seeds)} seeds for {batch} videos: give one number, or one per video")
    if max(seeds, default=0) > MAX_SEED:
        raise WanError(f"seed {seed}: {batch} videos take seeds up to {max(seeds)} > {MAX_SEED}")
    if large := [one for one in seeds if one >= DISTINCT_SEEDS]:
        warnings.warn(
            f"seed {large[0]}: PyTorch's CPU generator reads 32 bits of a seed; the noise is that "
            f"of seed {large[0] % DISTINCT_SEEDS}",
            stacklevel=2,
        )
    return [torch.Generator("cpu").manual_seed(value) for value in seeds]


def draw_noise(
    shape: Sequence[int], generators: Sequence[torch.Generator], frame_first: bool = False
) -> Tensor:
    """Standard normal noise, the next (C, T, H, W) numbers of every stream.

    Args:
        shape: (C, T, H, W) of one sample.
        generators: one per sample; each is advanced. One on a GPU draws there, so that its numbers
            are those of other libraries; they depend on the hardware. Where all samples share it,
            it draws them at once.
        frame_first: draw in the order (T, C, H, W), as FastVideo does, so that its seeds give its
            videos. False is the order of diffusers and of the official code.

    Returns:
        (B, C, T, H, W) float32 on the CPU.
    """
    channels, frames, height, width = shape
    drawn = (frames, channels, height, width) if frame_first else (channels, frames, height, width)
    first = generators[0]
    if first.device.type != "cpu" and all(one is first for one in generators):
        noise = torch.randn(
            (len(generators), *drawn), generator=first, device=first.device, dtype=torch.float32
        ).cpu()
    else:
        noise = torch.stack(
            [
                torch.randn(drawn, generator=one, device=one.device, dtype=torch.float32).cpu()
                for one in generators
            ]
        )
    return noise.transpose(1, 2).contiguous() if frame_first else noise
