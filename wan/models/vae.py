"""The causal 3-D video autoencoder, both generations.

Wan2.1: stride 4x8x8, 16 latent channels. Wan2.2: 2x2 pixel patches, parameter-free average-down
and duplicate-up shortcuts around every level, stride 4x16x16, 48 latent channels. Both share one
structure and one set of names; `VAEConfig` chooses between them.

Time is causal: frame 0 alone becomes latent 0, every later latent holds four frames. A clip may be
encoded and decoded in chunks of any length: an explicit `StreamCache` keeps the past frames that
each causal layer needs. The chunking changes results only by the rounding of sums.

Source: Wan2.2 `wan/modules/vae2_1.py`, `vae2_2.py`; diffusers `autoencoder_kl_wan.py`.
Letters: B batch, C channels, F pixel frames, T latent frames (or frames inside the network), H W.
"""

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor, nn

from wan.errors import WanError
from wan.models.vae_config import CHUNK_LATENTS, VAEConfig
from wan.models.vae_layers import (
    DecoderLevel,
    EncoderLevel,
    MidBlock,
    RMSNorm,
    Rows,
    StreamCache,
    causal_conv,
    silu,
)
from wan.precision import working_dtype

__all__ = ["StreamCache", "VAEConfig", "WanVAE", "decode_tiled"]


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
        return self.conv_out(silu(self.norm_out(x)), cache)


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
        return self.conv_out(silu(self.norm_out(z)), cache)


def patchify(video: Tensor, size: int) -> Tensor:
    """(B, 3, F, H, W) -> (B, 3 size², F, H/size, W/size); in a patch the row varies fastest."""
    return rearrange(video, "b c f (h q) (w r) -> b (c r q) f h w", q=size, r=size)


def unpatchify(x: Tensor, size: int) -> Tensor:
    """The inverse of `patchify`."""
    return rearrange(x, "b (c r q) f h w -> b c f (h q) (w r)", q=size, r=size)


class WanVAE(nn.Module):
    """Video (B, 3, F, H, W) in [-1, 1] <-> normalised latents (B, z, T, h, w).

    Computes in the dtype of its weights, or in float32 on a CPU that is slow in that
    (`wan.precision`), norm statistics in float32. Latents are the posterior mean.
    `encode_normalized` normalises them per channel with `latents_mean` and `latents_std`, in
    float32, and `decode_normalized` undoes it.

    Attributes:
        tile: for pipelines: latents per side of the tiles that they decode (`decode_tiled`); None
            decodes whole frames.
        tile_overlap: latents that neighbouring tiles share.
    """

    # Encoding an image in bfloat16 visibly changes the video made from it; decoding is robust.
    FLOAT32_PARAMETERS: tuple[str, ...] = (r"^encoder\.", r"^quant_conv\.")

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = causal_conv(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = causal_conv(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)
        self.tile: int | None = None
        self.tile_overlap = 0

    @property
    def dtype(self) -> torch.dtype:
        return self.quant_conv.weight.dtype

    def latent_statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Per-channel mean and std (1, z, 1, 1, 1), float32; 0 and 1 where the config has none."""
        mean = self.config.latents_mean or (0.0,) * self.config.z_dim
        std = self.config.latents_std or (1.0,) * self.config.z_dim
        as_tensor = [torch.tensor(v, device=device).view(1, -1, 1, 1, 1) for v in (mean, std)]
        return as_tensor[0], as_tensor[1]

    def encode_normalized(self, video: Tensor, chunk_frames: int | None = 4) -> Tensor:
        """Normalised latents (B, z, T, h, w) of a clip, float32.

        Args:
            video: (B, 3, F, H, W) in [-1, 1], F = 4k + 1, H and W multiples of the spatial stride.
            chunk_frames: frames per chunk, a multiple of the temporal stride; more are faster and
                need more memory. The first chunk also has frame 0. None encodes in one piece.
        Raises:
            WanError: sizes the strides do not divide.
        """
        moments = self.encode_moments(video, chunk_frames)
        mean, std = self.latent_statistics(video.device)
        return (moments.float().chunk(2, dim=1)[0] - mean) / std

    def encode_moments(self, video: Tensor, chunk_frames: int | None = None) -> Tensor:
        """Posterior mean and log-variance (B, 2z, T, h, w), not normalised; for VAE training."""
        self._check_video(video)
        stride = self.config.temporal_stride
        if chunk_frames is not None and (chunk_frames < 1 or chunk_frames % stride):
            raise WanError(f"chunk_frames={chunk_frames}: must be a multiple of {stride}")
        cache = StreamCache(keep=chunk_frames is not None)
        moments = []
        for chunk in split_stream(video, chunk_frames):
            chunk = chunk.to(working_dtype(self.dtype, chunk.device))
            x = patchify(chunk, self.config.patch_size or 1)
            # Channels innermost in memory, so that `frames_of` is a view and no copy.
            moments.append(self.encoder(x.contiguous(memory_format=torch.channels_last_3d), cache))
            cache.first = False
        return self.quant_conv(torch.cat(moments, dim=2), cache).to(self.dtype)

    def decode_normalized(
        self, latents: Tensor, chunk_latents: int | None = CHUNK_LATENTS
    ) -> Tensor:
        """Video (B, 3, F, H, W) in [-1, 1], in the dtype of the weights.

        Args:
            latents: (B, z, T, h, w), normalised.
            chunk_latents: latent frames per chunk, one more in the first; None decodes in one
                piece.
        """
        return torch.cat(list(self.decode_stream(latents, chunk_latents)), dim=2)

    def decode_stream(
        self,
        latents: Tensor,
        chunk_latents: int | None = CHUNK_LATENTS,
        rows: Rows | None = None,
    ) -> Iterator[Tensor]:
        """Like `decode_normalized`, but yields (B, 3, f, H, W) as soon as each chunk is ready.

        Args:
            rows: how processes share out the rows of each frame; all of them get whole frames.
        """
        z_dim = self.config.z_dim
        if latents.ndim != 5 or latents.shape[1] != z_dim or 0 in latents.shape:
            raise WanError(f"latents {tuple(latents.shape)}: need (B, {z_dim}, T, h, w), none 0")
        if chunk_latents is not None and chunk_latents < 1:
            raise WanError(f"chunk_latents={chunk_latents}: must be at least 1")
        mean, std = self.latent_statistics(latents.device)
        z = (latents.float() * std + mean).to(self.post_quant_conv.weight.dtype)
        yield from self.decode_chunks(z, chunk_latents, rows)

    def decode_chunks(
        self, z: Tensor, chunk_latents: int | None, rows: Rows | None = None
    ) -> Iterator[Tensor]:
        """Like `decode_stream`, for latents that are not normalised, in the weights' dtype."""
        cache = StreamCache(chunk_latents is not None, rows)
        z = z if rows is None else rows.own(z)
        for chunk in split_stream(z, chunk_latents):
            pixels = self.decode_chunk(chunk, cache).clamp(-1, 1)
            yield pixels if rows is None else rows.collect(pixels)
            cache.first = False

    def decode_chunk(self, z: Tensor, cache: StreamCache) -> Tensor:
        """De-normalised latents to unclamped pixels, with the caller's cache."""
        z = z.to(working_dtype(z.dtype, z.device)).contiguous(memory_format=torch.channels_last_3d)
        x = self.decoder(self.post_quant_conv(z, cache), cache)
        return unpatchify(x, self.config.patch_size or 1).to(self.post_quant_conv.weight.dtype)

    def _check_video(self, video: Tensor) -> None:
        stride = self.config.spatial_stride
        if video.ndim != 5 or video.shape[1] != 3:
            raise WanError(f"video {tuple(video.shape)}: need (B, 3, F, H, W) in [-1, 1]")
        self.config.latent_frames(video.shape[2])
        height, width = video.shape[-2:]
        if min(height, width) < stride or height % stride or width % stride:
            raise WanError(
                f"{height}x{width} pixels: height and width must be multiples of {stride}, not 0"
            )


def split_stream(x: Tensor, size: int | None) -> list[Tensor]:
    """Split x along dim 2: frame 0 with the next `size` frames, then `size` frames at a time.

    None gives one piece. Frame 0 gets no chunk of its own, because that would take longer.
    """
    if size is None or x.shape[2] <= 1 + size:
        return [x]
    return [x[:, :, : 1 + size], *x[:, :, 1 + size :].split(size, dim=2)]


def decode_tiled(
    vae: WanVAE,
    latents: Tensor,
    tile: int = 16,
    overlap: int = 4,
    chunk_latents: int | None = CHUNK_LATENTS,
) -> Tensor:
    """Decode in spatial tiles with linear cross-fades: less memory, not the same result.

    Every tile sees zeros beyond its border and attends within itself, so seams can show; use it
    only where the whole frame does not fit. Tiles of `tile` latents advance by `tile` - `overlap`.
    They are added up in float32; the result has the dtype of `WanVAE.decode_normalized`.
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
            pixels = vae.decode_normalized(part, chunk_latents)
            ramp = blend_ramp(pixels.shape[-2], overlap * stride).unsqueeze(1) * blend_ramp(
                pixels.shape[-1], overlap * stride
            )
            ramp = ramp.to(pixels.device)
            if video is None:
                shape = (*pixels.shape[:3], height * stride, width * stride)
                video = torch.zeros(shape, device=pixels.device)
            y, x = top * stride, left * stride
            window = (slice(y, y + pixels.shape[-2]), slice(x, x + pixels.shape[-1]))
            video[(..., *window)] += pixels * ramp
            weight[window] += ramp
    assert video is not None
    return (video / weight).to(pixels.dtype)


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Start of each tile; the last one is moved back so that every tile is full."""
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def blend_ramp(size: int, overlap: int) -> Tensor:
    """Weights that rise from near 0 to 1 over `overlap` pixels at both ends: (size,), never 0."""
    edge = torch.arange(1, size + 1) / (overlap + 1)
    return torch.minimum(edge, edge.flip(0)).clamp(max=1)
