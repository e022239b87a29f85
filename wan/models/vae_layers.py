"""Layers of the causal autoencoder, and the cache that lets them work on a clip in chunks.

The layers are causal: one that looks back in time keeps the last frames of its input. All frames
are treated alike, except that frame 0 skips the temporal resampling.

Source: Wan2.2 `wan/modules/vae2_1.py`, `vae2_2.py`; diffusers `autoencoder_kl_wan.py`.
Letters: B batch, C channels, T H W frames, rows and columns inside the network.
"""

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wan.precision import convolve


class Rows(Protocol):
    """Rows of each frame shared out over processes while decoding. See `wan.runtime.parallel`."""

    def own(self, x: Tensor) -> Tensor:
        """This process's rows of latents: (..., H, W) -> (..., h, W)."""
        ...

    def with_neighbours(self, x: Tensor) -> Tensor:
        """A row of each neighbour around the own ones, or zeros: (..., h, W) -> (..., h + 2, W)."""
        ...

    def collect(self, x: Tensor) -> Tensor:
        """All rows, from those of each process: (..., h, W) -> (..., H, W)."""
        ...


class StreamCache:
    """The states that causal convolutions keep from chunk to chunk of one clip.

    `history[layer]` holds the last input frames a causal layer saw. `first` is true during the
    first chunk, in which frame 0 skips the temporal resampling. Layers read and replace their own
    entry; `WanVAE` clears `first`. With `keep=False` (a clip in one chunk) nothing is stored.
    With `rows`, the decoder's layers hold some rows of each frame, and other processes the others.
    """

    def __init__(self, keep: bool = True, rows: Rows | None = None) -> None:
        self.first = True
        self.keep = keep
        self.rows = rows
        self.history: dict[nn.Module, Tensor] = {}

    def remember(self, layer: nn.Module, frames: Tensor) -> None:
        """Store a copy: a view of the last frames would keep the whole activation in memory."""
        if self.keep:
            self.history[layer] = frames.clone()


def convolve_layer(
    layer: nn.Conv2d | nn.Conv3d, x: Tensor, padding: Sequence[int] | None = None
) -> Tensor:
    """A layer's convolution; with other padding where x holds what the layer would pad."""
    assert layer.padding_mode == "zeros"
    assert not isinstance(layer.padding, str)
    assert layer.groups == 1
    assert set(layer.dilation) == {1}
    padding = layer.padding if padding is None else padding
    return convolve(x, layer.weight, layer.bias, layer.stride, padding)


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return convolve_layer(self, x)


class Conv3d(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return convolve_layer(self, x)


class CausalConv3d(nn.Conv3d):
    """Convolution over past frames: zeros or cached frames are put in front, none behind."""

    def forward(self, x: Tensor, cache: StreamCache) -> Tensor:  # type: ignore[override]
        """(B, C, T, H, W) -> (B, C', T, H', W')."""
        past = self.kernel_size[0] - 1
        padding: tuple[int, ...] | None = None
        if cache.rows is not None and self.kernel_size[1] == 3:
            x, padding = cache.rows.with_neighbours(x), (0, 0, 1)
        if past:
            history = cache.history.get(self)
            if history is None:
                x = F.pad(x, (0, 0, 0, 0, past, 0))
            else:
                x = torch.cat([history, x], dim=2)
            cache.remember(self, x[:, :, -past:])
        return convolve_layer(self, x, padding)


def causal_conv(in_dim: int, out_dim: int, kernel: int) -> CausalConv3d:
    """A causal convolution with a cubic kernel that keeps height and width."""
    return CausalConv3d(in_dim, out_dim, kernel, padding=(0, kernel // 2, kernel // 2))


def frames_of(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B T, C, H, W); a view, as channels are innermost in memory."""
    return x.transpose(1, 2).flatten(0, 1)


def clip_of(frames: Tensor, batch: int) -> Tensor:
    """The inverse of `frames_of`."""
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)


class RMSNorm(nn.Module):
    """x / ||x||_2 * sqrt(C) * gamma over channels; statistics in float32."""

    def __init__(self, dim: int, axes: int = 3) -> None:
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * axes))

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        factor = (self.scale / length.clamp_min(1e-12)).to(x.dtype)
        return x * factor * self.gamma


def silu(x: Tensor) -> Tensor:
    """SiLU; it overwrites x unless autograd may need x."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and conv, plus the input (1x1x1 projection where the width changes)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(in_dim)
        self.conv1 = causal_conv(in_dim, out_dim, 3)
        self.norm2 = RMSNorm(out_dim)
        self.conv2 = causal_conv(out_dim, out_dim, 3)
        self.shortcut = causal_conv(in_dim, out_dim, 1) if in_dim != out_dim else None

    def forward(self, x: Tensor, cache: StreamCache) -> Tensor:
        skip = x if self.shortcut is None else self.shortcut(x, cache)
        x = self.conv1(silu(self.norm1(x)), cache)
        x = self.conv2(silu(self.norm2(x)), cache)
        return x + skip


class FrameAttention(nn.Module):
    """Single-head attention within each frame, over its positions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, axes=2)
        self.qkv = Conv2d(dim, 3 * dim, 1)
        self.proj = Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, cache: StreamCache) -> Tensor:
        frames = frames_of(x)
        width = frames.shape[1]
        query, key_value = self.qkv(self.norm(frames)).split([width, 2 * width], dim=1)
        if cache.rows is not None:
            key_value = cache.rows.collect(key_value)
        q = rearrange(query, "n c h w -> n 1 (h w) c")
        k, v = rearrange(key_value, "n (two c) h w -> two n 1 (h w) c", two=2)
        mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = rearrange(mixed, "n 1 (h w) c -> n c h w", h=x.shape[-2])
        return x + clip_of(self.proj(mixed), len(x))


class MidBlock(nn.Module):
    """Residual block, attention within frames, residual block, at the lowest resolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.resnet_in = ResidualBlock(dim, dim)
        self.attention = FrameAttention(dim)
        self.resnet_out = ResidualBlock(dim, dim)

    def forward(self, x: Tensor, cache: StreamCache) -> Tensor:
        return self.resnet_out(self.attention(self.resnet_in(x, cache), cache), cache)


class Downsample(nn.Module):
    """Halve height and width; with `temporal`, also halve the frames after the first."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.conv = Conv2d(dim, dim, 3, stride=2)
        self.time_conv = Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: StreamCache) -> Tensor:
        frames = F.pad(frames_of(x), (0, 1, 0, 1))  # the released models pad right and below
        x = clip_of(self.conv(frames), len(x))
        if self.time_conv is None:
            return x
        # Outputs centre on frames 1, 3, 5, ...: each sees its frame and one to either side. Frame 0
        # passes through and then serves as the left neighbour of frame 1.
        window = x if cache.first else torch.cat([cache.history[self], x], dim=2)
        cache.remember(self, x[:, :, -1:])
        if window.shape[2] < 3:
            return x
        pairs = self.time_conv(window)
        return torch.cat([x[:, :, :1], pairs], dim=2) if cache.first else pairs


def merge_taps(weight: Tensor, dim: int) -> Tensor:
    """Turn three taps over doubled pixels into two over the pixels: (2, ...), one per phase.

    Even outputs see the pixels i - 1, i, i and odd ones i, i, i + 1: two taps can be added.
    """
    first, second, third = weight.unbind(dim)
    even = torch.stack([first, second + third], dim)
    odd = torch.stack([first + second, third], dim)
    return torch.stack([even, odd])


class DoublingConv2d(nn.Conv2d):
    """Repeat every pixel 2x2 times, then convolve with a 3x3 kernel: (n, C, H, W) -> 2H, 2W.

    Computed without repeating: taps that fall on the same pixel are added first (in float32), which
    leaves a 2x2 kernel for each of the four phases of the output (even or odd row and column), 4/9
    of the FLOPs. The result is equal up to rounding.
    """

    def forward(self, x: Tensor, rows: Rows | None = None) -> Tensor:
        height, width = x.shape[2:]
        by_row = merge_taps(self.weight.float(), 2)  # (2, C', C, 2, 3)
        kernels = merge_taps(by_row, 4).to(x.dtype)  # (column, row, C', C, 2, 2)
        bias = None if self.bias is None else self.bias.repeat(4)
        padding = (1, 1)
        if rows is not None:
            x, padding = rows.with_neighbours(x), (0, 1)
        seen = convolve(x, kernels.flatten(0, 2), bias, (1, 1), padding)  # (n, 4 C', H + 1, W + 1)
        phases = seen.unflatten(1, (2, 2, -1))
        y = seen.new_empty(len(x), 2 * height, 2 * width, self.out_channels).permute(0, 3, 1, 2)
        for column, row in itertools.product((0, 1), (0, 1)):
            part = phases[:, column, row, :, row : row + height, column : column + width]
            y[:, :, row::2, column::2] = part
        return y


class Upsample(nn.Module):
    """Double height and width; with `temporal`, also double the frames after the first."""

    def __init__(self, dim: int, out_dim: int, temporal: bool) -> None:
        super().__init__()
        self.conv = DoublingConv2d(dim, out_dim, 3, padding=1)
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: StreamCache) -> Tensor:
        if self.time_conv is not None:
            # Frame 0 stays one frame and never enters the history of time_conv.
            alone, rest = x.split([1, x.shape[2] - 1], dim=2) if cache.first else (None, x)
            if rest.shape[2]:
                # Half of the channels is the first frame of a pair, the other half the second.
                # Channels stay innermost in memory.
                pairs = self.time_conv(rest, cache).permute(0, 2, 3, 4, 1).unflatten(-1, (2, -1))
                rest = pairs.permute(0, 1, 4, 2, 3, 5).flatten(1, 2).permute(0, 4, 1, 2, 3)
            x = rest if alone is None else torch.cat([alone, rest], dim=2)
        return clip_of(self.conv(frames_of(x), cache.rows), len(x))


def average_down(x: Tensor, out_dim: int, time: int, space: int, cache: StreamCache) -> Tensor:
    """Fold `time` x `space` x `space` cells into channels, then average groups down to `out_dim`.

    (B, C, T, H, W) -> (B, out_dim, T / time, H / space, W / space). The first chunk, whose frame 0
    stands alone, is padded with `time` - 1 zero frames in front.
    """
    if cache.first and time > 1:
        x = F.pad(x, (0, 0, 0, 0, time - 1, 0))
    x = rearrange(x, "b c (t i) (h j) (w k) -> b (c i j k) t h w", i=time, j=space, k=space)
    return x.unflatten(1, (out_dim, -1)).mean(dim=2)


def duplicate_up(x: Tensor, out_dim: int, time: int, space: int, cache: StreamCache) -> Tensor:
    """Repeat channels and unfold them into `time` x `space` x `space` cells: the inverse layout.

    (B, C, T, H, W) -> (B, out_dim, time T, space H, space W), without the first `time` - 1 frames
    of a clip, since frame 0 is not doubled.
    """
    x = x.repeat_interleave(out_dim * time * space * space // x.shape[1], dim=1)
    x = rearrange(x, "b (c i j k) t h w -> b c (t i) (h j) (w k)", i=time, j=space, k=space)
    return x[:, :, time - 1 :] if cache.first else x


class EncoderLevel(nn.Module):
    """Residual blocks, then down-sampling; Wan2.2 adds the averaging shortcut around both."""

    def __init__(
        self, in_dim: int, out_dim: int, depth: int, space: int, time: int, shortcut: bool
    ) -> None:
        super().__init__()
        self.out_dim, self.space, self.time, self.has_shortcut = out_dim, space, time, shortcut
        self.resnets = nn.ModuleList(
            ResidualBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(depth)
        )
        self.downsample = Downsample(out_dim, temporal=time > 1) if space > 1 else None

    def forward(self, x: Tensor, cache: StreamCache) -> Tensor:
        y = x
        for resnet in self.resnets:
            y = resnet(y, cache)
        if self.downsample is not None:
            y = self.downsample(y, cache)
        if self.has_shortcut:
            y = y + average_down(x, self.out_dim, self.time, self.space, cache)
        return y


class DecoderLevel(nn.Module):
    """Residual blocks, then up-sampling; Wan2.2 adds the duplicating shortcut around both."""

    def __init__(
        self, in_dim: int, out_dim: int, depth: int, space: int, time: int, shortcut: bool
    ) -> None:
        super().__init__()
        self.out_dim, self.space, self.time = out_dim, space, time
        self.has_shortcut = shortcut and space > 1
        self.resnets = nn.ModuleList(
            ResidualBlock(in_dim if i == 0 else out_dim, out_dim) for i in range(depth)
        )
        up_dim = (
            out_dim if shortcut else out_dim // 2
        )  # Wan2.1 halves the width while it doubles H, W
        self.upsample = Upsample(out_dim, up_dim, temporal=time > 1) if space > 1 else None

    def forward(self, x: Tensor, cache: StreamCache) -> Tensor:
        y = x
        for resnet in self.resnets:
            y = resnet(y, cache)
        if self.upsample is not None:
            y = self.upsample(y, cache)
        if self.has_shortcut:
            y = y + duplicate_up(x, self.out_dim, self.time, self.space, cache)
        return y
