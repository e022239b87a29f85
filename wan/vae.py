"""The causal 3-D video autoencoder, both generations.

Wan2.1: stride 4x8x8, 16 latent channels. Wan2.2: 2x2 pixel patches, parameter-free average-down
and duplicate-up shortcuts around every level, stride 4x16x16, 48 latent channels. One structure,
one set of names; `VAEConfig` says which.

Time is causal: frame 0 becomes latent 0 by itself, every later latent holds four frames. The
network is a fixed function of the clip, so a clip may be coded in chunks of any length: the history
that each causal layer needs lives in an explicit `StreamCache`, and no result depends on the
chunking beyond the rounding of sums.

Source: Wan2.2 `wan/modules/vae2_1.py`, `vae2_2.py`; diffusers `autoencoder_kl_wan.py`.
Letters: B batch, C channels, F pixel frames, T latent frames (or frames inside the network), H W.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from wan.errors import WanError


@dataclass
class VAEConfig:
    """Settings of the autoencoder, under the names of the released `vae/config.json`."""

    base_dim: int = 160
    decoder_base_dim: int | None = 256
    z_dim: int = 48
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)  # the released spelling
    is_residual: bool = True
    in_channels: int = 12
    out_channels: int = 12
    patch_size: int | None = 2
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("dim_mult", "temperal_downsample", "latents_mean", "latents_std"):
            setattr(self, name, tuple(getattr(self, name)))
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise WanError(
                f"temperal_downsample has {len(self.temperal_downsample)} entries for "
                f"{len(self.dim_mult)} levels: one fewer than dim_mult is needed"
            )
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) not in (0, self.z_dim):
                raise WanError(
                    f"{name} has {len(getattr(self, name))} numbers, z_dim is {self.z_dim}"
                )
        if self.is_residual:
            self._check_shortcuts()
        pixels = 3 * (self.patch_size or 1) ** 2
        if (self.in_channels, self.out_channels) != (pixels, pixels):
            raise WanError(
                f"in_channels={self.in_channels}, out_channels={self.out_channels}: "
                f"patch_size={self.patch_size} makes {pixels} channels of an RGB frame"
            )

    def _check_shortcuts(self) -> None:
        """Shortcuts without parameters group or repeat channels, so widths must divide."""
        times = [2 if t else 1 for t in self.temperal_downsample] + [1]
        spaces = [2] * len(self.temperal_downsample) + [1]
        down, up = (1, *self.dim_mult), (self.dim_mult[-1], *reversed(self.dim_mult))
        cells = [t * s * s for t, s in zip(times, spaces, strict=True)]
        for wide, narrow, cell in zip(down[:-1], down[1:], cells, strict=True):
            if wide * cell % narrow:
                raise WanError(
                    f"dim_mult={self.dim_mult}: the average-down shortcut cannot make {narrow} of "
                    f"{wide} x {cell} channels"
                )
        cells = [t * s * s for t, s in zip([*reversed(times[:-1]), 1], spaces, strict=True)]
        for wide, narrow, cell in zip(up[:-1], up[1:], cells, strict=True):
            if cell > 1 and narrow * cell % wide:
                raise WanError(
                    f"dim_mult={self.dim_mult}: the duplicate-up shortcut cannot make {narrow} x "
                    f"{cell} channels of {wide}"
                )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "VAEConfig":
        """Read a released `config.json`; a setting we would have to ignore is an error."""
        known = {f.name for f in fields(cls)}
        expected: dict[
            str, tuple[Any, ...] | None
        ] = {  # fields that follow from the others, or that only training used
            "attn_scales": ([],),
            "dropout": (0.0,),
            "clip_output": (False, True),  # decoding always clamps, as both references do
            "scale_factor_spatial": None,
            "scale_factor_temporal": None,
        }
        settings = {}
        for name, value in values.items():
            if name in known:
                settings[name] = value
            elif name.startswith("_"):
                continue
            elif name not in expected:
                raise WanError(f"vae config.json: unknown setting {name}={value!r}")
            elif (allowed := expected[name]) is not None and value not in allowed:
                raise WanError(f"vae config.json: {name}={value!r} is not supported")
        return cls(**settings)

    def to_json(self) -> dict[str, Any]:
        """The released `config.json` of this autoencoder."""
        return {
            "_class_name": "AutoencoderKLWan",
            **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()},
            "attn_scales": [],
            "dropout": 0.0,
            "clip_output": False,
            "scale_factor_spatial": self.spatial_stride,
            "scale_factor_temporal": self.temporal_stride,
        }

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent along height and width."""
        return (self.patch_size or 1) * 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_stride(self) -> int:
        """Frames per latent after the first."""
        return 2 ** sum(self.temperal_downsample)

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames T of a clip of `num_frames` = stride * (T - 1) + 1 frames."""
        stride = self.temporal_stride
        if num_frames < 1 or (num_frames - 1) % stride:
            low = max(1, num_frames - (num_frames - 1) % stride)
            raise WanError(
                f"num_frames={num_frames}: the VAE takes {stride}k + 1 frames; "
                f"nearest are {low} and {low + stride}"
            )
        return (num_frames - 1) // stride + 1


class StreamCache:
    """What one pass over a clip remembers from chunk to chunk.

    `history[layer]` holds the last input frames a causal layer saw. `first` is true during the
    first chunk, in which frame 0 skips the temporal resampling. Layers read and replace their own
    entry; the autoencoder flips `first`. With `keep=False` (a clip in one chunk) nothing is stored.
    """

    def __init__(self, keep: bool = True) -> None:
        self.first = True
        self.keep = keep
        self.history: dict[nn.Module, Tensor] = {}

    def remember(self, layer: nn.Module, frames: Tensor) -> None:
        """Store a copy, so that a whole activation is not kept alive by its last two frames."""
        if self.keep:
            self.history[layer] = frames.clone()


class CausalConv3d(nn.Conv3d):
    """Convolution that sees the past only: zeros or history in front, nothing behind."""

    def forward(self, x: Tensor, cache: StreamCache) -> Tensor:  # type: ignore[override]
        """(B, C, T, H, W) -> (B, C', T, H', W')."""
        past = self.kernel_size[0] - 1
        if past:
            history = cache.history.get(self)
            if history is None:
                history = x.new_zeros(*x.shape[:2], past, *x.shape[3:])
            x = torch.cat([history, x], dim=2)
            cache.remember(self, x[:, :, -past:])
        return super().forward(x)


def causal_conv(in_dim: int, out_dim: int, kernel: int) -> CausalConv3d:
    """A cubic causal kernel that keeps the frame size."""
    return CausalConv3d(in_dim, out_dim, kernel, padding=(0, kernel // 2, kernel // 2))


class RMSNorm(nn.Module):
    """x / ||x||_2 * sqrt(C) * gamma over channels; statistics in float32."""

    def __init__(self, dim: int, axes: int = 3) -> None:
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * axes))

    def forward(self, x: Tensor) -> Tensor:
        normal = F.normalize(x.float(), dim=1, eps=1e-12).to(x.dtype)
        return normal * (self.gamma * self.scale)


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, twice, plus the input (1x1x1 projection where the width changes)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(in_dim)
        self.conv1 = causal_conv(in_dim, out_dim, 3)
        self.norm2 = RMSNorm(out_dim)
        self.conv2 = causal_conv(out_dim, out_dim, 3)
        self.shortcut = causal_conv(in_dim, out_dim, 1) if in_dim != out_dim else None

    def forward(self, x: Tensor, cache: StreamCache) -> Tensor:
        skip = x if self.shortcut is None else self.shortcut(x, cache)
        x = self.conv1(F.silu(self.norm1(x)), cache)
        x = self.conv2(F.silu(self.norm2(x)), cache)
        return x + skip


class FrameAttention(nn.Module):
    """Single-head attention over the positions of each frame by itself."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, axes=2)
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        q, k, v = rearrange(
            self.qkv(self.norm(frames)), "n (three c) h w -> three n 1 (h w) c", three=3
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = rearrange(mixed, "n 1 (h w) c -> n c h w", h=x.shape[-2])
        return x + rearrange(self.proj(mixed), "(b t) c h w -> b c t h w", b=len(x))


class MidBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.resnet_in = ResidualBlock(dim, dim)
        self.attention = FrameAttention(dim)
        self.resnet_out = ResidualBlock(dim, dim)

    def forward(self, x: Tensor, cache: StreamCache) -> Tensor:
        return self.resnet_out(self.attention(self.resnet_in(x, cache)), cache)


class Downsample(nn.Module):
    """Halve height and width; with `temporal`, also halve the frames after the first."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=2)
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: StreamCache) -> Tensor:
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        frames = self.conv(F.pad(frames, (0, 1, 0, 1)))  # the released models pad right and below
        x = rearrange(frames, "(b t) c h w -> b c t h w", b=len(x))
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


class Upsample(nn.Module):
    """Double height and width; with `temporal`, also double the frames after the first."""

    def __init__(self, dim: int, out_dim: int, temporal: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, padding=1)
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: StreamCache) -> Tensor:
        if self.time_conv is not None:
            # Frame 0 stays one frame and never enters the history of time_conv.
            alone, rest = x.split([1, x.shape[2] - 1], dim=2) if cache.first else (None, x)
            if rest.shape[2]:
                rest = self.time_conv(rest, cache)
                rest = rearrange(rest, "b (two c) t h w -> b c (t two) h w", two=2)
            x = rest if alone is None else torch.cat([alone, rest], dim=2)
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        frames = self.conv(F.interpolate(frames, scale_factor=2.0, mode="nearest-exact"))
        return rearrange(frames, "(b t) c h w -> b c t h w", b=len(x))


def average_down(x: Tensor, out_dim: int, time: int, space: int, cache: StreamCache) -> Tensor:
    """Fold `time` x `space` x `space` cells into channels, then average groups down to `out_dim`.

    (B, C, T, H, W) -> (B, out_dim, T / time, H / space, W / space). The first chunk, whose frame 0
    stands alone, is filled up with a zero frame in front.
    """
    if cache.first and time > 1:
        x = F.pad(x, (0, 0, 0, 0, time - 1, 0))
    x = rearrange(x, "b c (t i) (h j) (w k) -> b (c i j k) t h w", i=time, j=space, k=space)
    return x.unflatten(1, (out_dim, -1)).mean(dim=2)


def duplicate_up(x: Tensor, out_dim: int, time: int, space: int, cache: StreamCache) -> Tensor:
    """Repeat channels and unfold them into `time` x `space` x `space` cells: the inverse layout.

    (B, C, T, H, W) -> (B, out_dim, time T, space H, space W), less the first `time` - 1 frames of a
    clip.
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


class Encoder(nn.Module):
    """Patched pixels (B, 3p², F, H/p, W/p) -> moments (B, 2z, T, h, w)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        dims = [config.base_dim * m for m in (1, *config.dim_mult)]
        times = [2 if t else 1 for t in config.temperal_downsample] + [1]
        spaces = [2] * len(config.temperal_downsample) + [1]
        self.conv_in = causal_conv(config.in_channels, dims[0], 3)
        self.levels = nn.ModuleList(
            EncoderLevel(a, b, config.num_res_blocks, space, time, config.is_residual)
            for a, b, space, time in zip(dims, dims[1:], spaces, times, strict=False)
        )
        self.mid = MidBlock(dims[-1])
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = causal_conv(dims[-1], 2 * config.z_dim, 3)

    def forward(self, x: Tensor, cache: StreamCache) -> Tensor:
        x = self.conv_in(x, cache)
        for level in self.levels:
            x = level(x, cache)
        x = self.mid(x, cache)
        return self.conv_out(F.silu(self.norm_out(x)), cache)


class Decoder(nn.Module):
    """Latents (B, z, T, h, w) -> patched pixels (B, 3p², F, H/p, W/p)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        base = config.decoder_base_dim or config.base_dim
        dims = [base * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
        times = [2 if t else 1 for t in reversed(config.temperal_downsample)] + [1]
        spaces = [2] * len(config.temperal_downsample) + [1]
        self.conv_in = causal_conv(config.z_dim, dims[0], 3)
        self.mid = MidBlock(dims[0])
        levels = []
        in_dim = dims[0]
        for out_dim, space, time in zip(dims[1:], spaces, times, strict=True):
            depth = config.num_res_blocks + 1
            levels.append(DecoderLevel(in_dim, out_dim, depth, space, time, config.is_residual))
            in_dim = out_dim if config.is_residual else out_dim // 2
        self.levels = nn.ModuleList(levels)
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = causal_conv(dims[-1], config.out_channels, 3)

    def forward(self, z: Tensor, cache: StreamCache) -> Tensor:
        z = self.mid(self.conv_in(z, cache), cache)
        for level in self.levels:
            z = level(z, cache)
        return self.conv_out(F.silu(self.norm_out(z)), cache)


def patchify(video: Tensor, size: int) -> Tensor:
    """(B, 3, F, H, W) -> (B, 3 size², F, H/size, W/size); within a patch the column is slower."""
    return rearrange(video, "b c f (h q) (w r) -> b (c r q) f h w", q=size, r=size)


def unpatchify(x: Tensor, size: int) -> Tensor:
    """The inverse of `patchify`."""
    return rearrange(x, "b (c r q) f h w -> b c f (h q) (w r)", q=size, r=size)


class WanVAE(nn.Module):
    """Video (B, 3, F, H, W) in [-1, 1] <-> normalised latents (B, z, T, h, w).

    Computes in the dtype of its weights, norm statistics in float32. Latents are the posterior
    mean, normalised per channel with `latents_mean` and `latents_std` in float32 on the way out and
    in.
    """

    # An image encoded in bfloat16 visibly moves the video that starts from it; decoding is robust.
    FLOAT32_PARAMETERS: tuple[str, ...] = (r"^encoder\.", r"^quant_conv\.")

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = causal_conv(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = causal_conv(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.quant_conv.weight.dtype

    def latent_statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Per-channel mean and std (1, z, 1, 1, 1), float32; 0 and 1 where the config has none."""
        mean = self.config.latents_mean or (0.0,) * self.config.z_dim
        std = self.config.latents_std or (1.0,) * self.config.z_dim
        as_tensor = [torch.tensor(v, device=device).view(1, -1, 1, 1, 1) for v in (mean, std)]
        return as_tensor[0], as_tensor[1]

    def encode(self, video: Tensor, chunk_frames: int | None = None) -> Tensor:
        """Normalised latents of a clip, float32.

        Args:
            video: (B, 3, F, H, W) in [-1, 1], F = 4k + 1, H and W multiples of the spatial stride.
            chunk_frames: frames per chunk after frame 0, a multiple of the temporal stride; fewer
                need less memory. None codes the clip in one piece.
        Raises:
            WanError: sizes the strides do not divide.
        """
        moments = self.encode_moments(video, chunk_frames)
        mean, std = self.latent_statistics(video.device)
        return (moments.float().chunk(2, dim=1)[0] - mean) / std

    def encode_moments(self, video: Tensor, chunk_frames: int | None = None) -> Tensor:
        """Posterior mean and log-variance (B, 2z, T, h, w), not normalised: what training needs."""
        self._check_video(video)
        stride = self.config.temporal_stride
        if chunk_frames is not None and (chunk_frames < 1 or chunk_frames % stride):
            raise WanError(f"chunk_frames={chunk_frames}: must be a multiple of {stride}")
        x = patchify(video.to(self.dtype), self.config.patch_size or 1)
        cache = StreamCache(keep=chunk_frames is not None)
        moments = []
        for chunk in split_stream(x, chunk_frames):
            moments.append(self.encoder(chunk, cache))
            cache.first = False
        return self.quant_conv(torch.cat(moments, dim=2), cache)

    def decode(self, latents: Tensor, chunk_latents: int | None = 4) -> Tensor:
        """Video (B, 3, F, H, W) in [-1, 1], in the dtype of the weights.

        Args:
            latents: (B, z, T, h, w), normalised.
            chunk_latents: latent frames per chunk after the first; None decodes in one piece.
        """
        return torch.cat(list(self.decode_stream(latents, chunk_latents)), dim=2)

    def decode_stream(self, latents: Tensor, chunk_latents: int | None = 4) -> Iterator[Tensor]:
        """Like `decode`, handing out (B, 3, f, H, W) as soon as each chunk is ready."""
        if latents.ndim != 5 or latents.shape[1] != self.config.z_dim:
            raise WanError(
                f"latents {tuple(latents.shape)}: need (B, {self.config.z_dim}, T, h, w)"
            )
        if chunk_latents is not None and chunk_latents < 1:
            raise WanError(f"chunk_latents={chunk_latents}: must be at least 1")
        mean, std = self.latent_statistics(latents.device)
        z = (latents.float() * std + mean).to(self.post_quant_conv.weight.dtype)
        cache = StreamCache(keep=chunk_latents is not None)
        for chunk in split_stream(z, chunk_latents):
            yield self.decode_chunk(chunk, cache).clamp(-1, 1)
            cache.first = False

    def decode_chunk(self, z: Tensor, cache: StreamCache) -> Tensor:
        """De-normalised latents to unclamped pixels, with the caller's cache."""
        x = self.decoder(self.post_quant_conv(z, cache), cache)
        return unpatchify(x, self.config.patch_size or 1)

    def _check_video(self, video: Tensor) -> None:
        stride = self.config.spatial_stride
        if video.ndim != 5 or video.shape[1] != 3:
            raise WanError(f"video {tuple(video.shape)}: need (B, 3, F, H, W) in [-1, 1]")
        self.config.latent_frames(video.shape[2])
        height, width = video.shape[-2:]
        if height % stride or width % stride:
            raise WanError(
                f"{height}x{width} pixels: height and width must be multiples of {stride}"
            )


def split_stream(x: Tensor, size: int | None) -> list[Tensor]:
    """Frame 0 alone, then chunks of `size` frames along dim 2; one piece if size is None."""
    if size is None:
        return [x]
    return [x[:, :, :1], *x[:, :, 1:].split(size, dim=2)] if x.shape[2] > 1 else [x]


def decode_tiled(
    vae: WanVAE, latents: Tensor, tile: int = 16, overlap: int = 4, chunk_latents: int | None = 4
) -> Tensor:
    """Decode in spatial tiles with linear cross-fades: less memory, not the same result.

    Every tile sees zeros beyond its border and attends within itself, so seams can show; use it
    only where the whole frame does not fit. Tiles of `tile` latents advance by `tile` - `overlap`.
    """
    if not 0 <= overlap < tile:
        raise WanError(f"tile={tile}, overlap={overlap}: need 0 <= overlap < tile")
    stride = vae.config.spatial_stride
    height, width = latents.shape[-2:]
    video: Tensor | None = None
    weight = torch.zeros(height * stride, width * stride, device=latents.device)
    for top in tile_starts(height, tile, overlap):
        for left in tile_starts(width, tile, overlap):
            part = latents[..., top : top + tile, left : left + tile]
            pixels = vae.decode(part, chunk_latents).float()
            ramp = blend_ramp(pixels.shape[-2], overlap * stride).unsqueeze(1) * blend_ramp(
                pixels.shape[-1], overlap * stride
            )
            ramp = ramp.to(pixels.device)
            if video is None:
                shape = (*pixels.shape[:3], height * stride, width * stride)
                video = pixels.new_zeros(shape)
            y, x = top * stride, left * stride
            window = (slice(y, y + pixels.shape[-2]), slice(x, x + pixels.shape[-1]))
            video[(..., *window)] += pixels * ramp
            weight[window] += ramp
    assert video is not None
    return (video / weight).to(vae.dtype)


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Start of each tile; the last one is moved back so that every tile is full."""
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def blend_ramp(size: int, overlap: int) -> Tensor:
    """Weights that rise from near 0 to 1 over `overlap` pixels at both ends: (size,), never 0."""
    edge = torch.arange(1, size + 1) / (overlap + 1)
    return torch.minimum(edge, edge.flip(0)).clamp(max=1)
