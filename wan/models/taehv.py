"""TAEHV: a tiny decoder of Wan's latents, fast and small, and not exact.

It was trained to imitate the autoencoder's decoder. Convolutions are of single frames; a block sees
its past through the same layer's input of the frame before. So a clip can be decoded in chunks of
any length, and a `Memory` holds what the blocks need of the past. Latents are normalised, as the
transformer has them: no mean is added and nothing is scaled.

`taew2_1` decodes the latents of Wan2.1 (16 channels, stride 4x8x8), `taew2_2` those of Wan2.2's
5B (48 channels, stride 4x16x16). Both have the same layers; only the two ends differ.
Source: github.com/madebyollin/taehv, `taehv.py`.
Letters: B batch, C channels, T latent frames, F frames inside the network or of pixels, H W.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.errors import WanError
from wan.models.vae_config import CHUNK_LATENTS

Memory = dict[nn.Module, Tensor]  # block -> the last frame of its input, (1, C, H, W)

WIDTHS = (256, 128, 64, 64)  # before, between and after the three stages
TIMES = (1, 2, 2)  # frames that a stage makes of each
LATENT_LIMIT = 3.0  # latents are bent smoothly so that they stay below this


class TinyKind(NamedTuple):
    """One published decoder: which latents it reads, and at which stride."""

    name: str  # of its file, without the ending
    latents: str  # a name in `wan.models.latent_rgb.LATENT_SPACES`
    channels: int
    patch_size: int  # the last layer makes patches of this many pixels per side


KINDS = (TinyKind("taew2_1", "Wan2.1", 16, 1), TinyKind("taew2_2", "Wan2.2", 48, 2))


def conv(in_width: int, out_width: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_width, out_width, 3, padding=1, bias=bias)


class MemoryBlock(nn.Module):
    """A residual block that reads each frame together with the frame before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_1 = conv(2 * width, width)
        self.conv_2 = conv(width, width)
        self.conv_3 = conv(width, width)

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """(F, C, H, W) -> the same. Before the first frame of a clip there are zeros."""
        past = memory[self] if self in memory else torch.zeros_like(x[:1])
        memory[self] = x[-1:].clone()  # a view would keep all frames
        before = torch.cat([past, x[:-1]])
        y = F.relu(self.conv_1(torch.cat([x, before], dim=1)))  # (F, 2C, H, W) -> (F, C, H, W)
        y = F.relu(self.conv_2(y))
        return F.relu(self.conv_3(y) + x)


class Stage(nn.Module):
    """Three memory blocks, then twice the height and width and `times` frames of each."""

    def __init__(self, width: int, out_width: int, times: int) -> None:
        super().__init__()
        self.width = width
        self.blocks = nn.ModuleList(MemoryBlock(width) for _ in range(3))
        self.grow = nn.Conv2d(width, width * times, 1, bias=False)
        self.out = conv(width, out_width, bias=False)

    def forward(self, x: Tensor, memory: Memory, last_only: bool) -> Tensor:
        """(F, C, H, W) -> (F times, C', 2H, 2W), or (F, C', 2H, 2W) with `last_only`."""
        for block in self.blocks:
            x = block(x, memory)
        weight = self.grow.weight[-self.width :] if last_only else self.grow.weight
        x = F.conv2d(x, weight)  # before the pixels are doubled, which is the same in a quarter
        x = x.unflatten(1, (-1, self.width)).flatten(0, 1)  # (F times, C, H, W)
        return self.out(F.interpolate(x, scale_factor=2.0))


class TinyDecoder(nn.Module):
    """Normalised latents (B, C, T, h, w) -> video (B, 3, F, H, W) in [-1, 1].

    Computes in the dtype of its weights.
    """

    def __init__(self, kind: TinyKind) -> None:
        super().__init__()
        self.kind = kind
        self.conv_in = conv(kind.channels, WIDTHS[0])
        self.stages = nn.ModuleList(
            Stage(a, b, times) for a, b, times in zip(WIDTHS, WIDTHS[1:], TIMES, strict=False)
        )
        self.conv_out = conv(WIDTHS[-1], 3 * kind.patch_size**2)

    def decode_stream(
        self,
        latents: Tensor,
        chunk_latents: int | None = CHUNK_LATENTS,
        last_only: bool = False,
    ) -> Iterator[Tensor]:
        """Yield (B, 3, f, H, W) as soon as each chunk is ready; in all F = 4 (T - 1) + 1 frames.

        Args:
            latents: (B, C, T, h, w), normalised.
            chunk_latents: latent frames that are decoded at a time; None decodes in one piece. It
                changes results by the rounding of sums only.
            last_only: of each latent's frames compute the last one alone, F = T: a quarter of the
                work, for previews. The frame before is then the one of the latent before.

        Raises:
            WanError: a wrong shape.
        """
        channels = self.kind.channels
        if latents.ndim != 5 or latents.shape[1] != channels or 0 in latents.shape:
            raise WanError(f"latents {tuple(latents.shape)}: need (B, {channels}, T, h, w), none 0")
        z = latents.to(self.conv_in.weight.dtype)
        memories: list[Memory] = [{} for _ in z]
        skip = 0 if last_only else 3  # the first latent stands for one frame, as in Wan's own VAE
        for chunk in z.split(chunk_latents or z.shape[2], dim=2):
            clips = [
                self._decode(clip.transpose(0, 1), memory, last_only)  # (T, C, h, w)
                for clip, memory in zip(chunk, memories, strict=True)
            ]
            yield torch.stack(clips).transpose(1, 2)[:, :, skip:]
            skip = 0

    def _decode(self, x: Tensor, memory: Memory, last_only: bool) -> Tensor:
        """(T, C, h, w) -> (F, 3, H, W) in [-1, 1]."""
        x = F.relu(self.conv_in(torch.tanh(x / LATENT_LIMIT) * LATENT_LIMIT))
        for stage in self.stages:
            x = stage(x, memory, last_only)
        x = F.pixel_shuffle(self.conv_out(F.relu(x)), self.kind.patch_size)
        return x.clamp(0, 1) * 2 - 1  # it was trained on colours from 0 to 1
