"""An adversarial term on what a diffusion network sees in a noised clip.

Source: DMD2, arXiv:2405.14867, section 4.3: a small head on the features of the critic tells noised
clips of the data from noised clips of the student; features of the frozen teacher serve as well.

B batch, L tokens, l of them in one process, D width.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from wan.errors import WanError
from wan.models.dit import WanDiT
from wan.sampling.denoiser import Condition, predict_velocity
from wan.sampling.flow import add_noise
from wan.sampling.schedule import NUM_TIMESTEPS


class Discriminator(nn.Module):
    """One head per block that is read: token features (B, L, D) -> logits (B, heads)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
            for _ in range(num_heads)
        )
        self.logits = nn.ModuleList(nn.Linear(width, 1) for _ in range(num_heads))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Positive for what looks like data; a clip's logit is the mean over its tokens."""
        parts = [
            logit(head(x.float()).mean(dim=1))
            for head, logit, x in zip(self.heads, self.logits, features, strict=True)
        ]
        return torch.cat(parts, dim=1)


def block_numbers(blocks: Sequence[int], num_layers: int) -> list[int]:
    """The indices of blocks, given by numbers of which negative ones count from the end.

    Raises:
        WanError: a block that the network does not have.
    """
    for number in blocks:
        if not -num_layers <= number < num_layers:
            raise WanError(f"gan.blocks: {number} for {num_layers} blocks; 0 to {num_layers - 1}")
    return [number % num_layers for number in blocks]


@contextmanager
def read_blocks(dit: WanDiT, blocks: Sequence[int]) -> Iterator[list[Tensor]]:
    """Collect the outputs of these blocks, (B, L, D) each, in the order of the network.

    Where tokens are shared out over processes these are the process's own: (B, l, D).
    """
    found: list[Tensor] = []
    handles = [
        dit.blocks[number].register_forward_hook(
            lambda module, inputs, output: found.append(output)
        )
        for number in sorted(blocks)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def noised_logits(
    discriminator: Discriminator,
    host: WanDiT,
    blocks: Sequence[int],
    x0: Tensor,
    noise: Tensor,
    sigma: Tensor,
    condition: Condition,
) -> Tensor:
    """The discriminator's verdict on clips (B, C, T, H, W), each noised to its level (B,)."""
    x = add_noise(x0, noise, sigma)
    with read_blocks(host, blocks) as features:
        predict_velocity(host, x, NUM_TIMESTEPS * sigma, condition)
    if host.split is not None:  # a mean is over all tokens of a clip, and over no padding
        length = math.prod(host.token_grid(x))
        features = [host.split.collect(one, length) for one in features]
    return discriminator(features)
