"""Parameters, FLOPs and kept activations of the networks, computed from their sizes alone.

For the DiT everything follows from one list, `linear_layers`. Parameters and the FLOPs of matrix
products and convolutions are exact. Kept activations agree with `wan.models.dit` to a few per cent.
Tests hold all of them against PyTorch's own counts.

Letters: L video tokens, S text tokens (padding included; `rows` in the arguments), D width, F
feed-forward width, N heads, n blocks. In the autoencoder: T latent frames, h w latent height and
width.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from wan.models.dit_config import DiTConfig
from wan.models.umt5 import UMT5Config
from wan.models.vae_config import VAEConfig

# A fused kernel computes the scores again: five matrix products for the two of the forward pass.
# Source: FlashAttention-2, arXiv:2307.08691, section 3.1.2.
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class Linear:
    """Linear layers of one kind.

    Attributes:
        part: the group of layers that a report names.
        rows: number of vectors that pass through each layer.
        count: number of such layers.
        before: which gradient of their inputs is needed: "data" none, "condition" in full training
            only (text and time embeddings), "trunk" always (earlier blocks).
        is_float32: they compute in float32 beside bfloat16 weights.
    """

    part: str
    rows: int
    fan_in: int
    fan_out: int
    count: int
    before: str
    is_float32: bool = False

    @property
    def parameters(self) -> int:
        return self.count * (self.fan_in + 1) * self.fan_out

    @property
    def takes_lora(self) -> bool:
        return self.part in BLOCK_PARTS

    def pair_parameters(self, rank: int) -> int:
        return self.count * rank * (self.fan_in + self.fan_out)


BLOCK_PARTS = ("self-attention", "cross-attention", "feed-forward")


def linear_layers(config: DiTConfig, tokens: int, rows: int) -> list[Linear]:
    """Every linear layer of `wan.models.dit.WanDiT`, the patch embedding among them."""
    d, f, n = config.width, config.ffn_dim, config.num_layers
    patch = math.prod(config.patch_size)
    return [
        Linear("embeddings", tokens, config.in_channels * patch, d, 1, "data"),
        Linear("embeddings", 1, config.freq_dim, d, 1, "data", is_float32=True),
        Linear("embeddings", 1, d, d, 1, "condition", is_float32=True),
        Linear("embeddings", 1, d, 6 * d, 1, "condition", is_float32=True),
        Linear("embeddings", rows, config.text_dim, d, 1, "data"),
        Linear("embeddings", rows, d, d, 1, "condition"),
        Linear("self-attention", tokens, d, d, 3, "condition"),  # the first block's q, k, v
        Linear("self-attention", tokens, d, d, 3 * (n - 1) + n, "trunk"),
        Linear("cross-attention", tokens, d, d, 2 * n, "trunk"),  # q, out
        Linear("cross-attention", rows, d, d, 2 * n, "condition"),  # k, v
        Linear("feed-forward", tokens, d, f, n, "trunk"),
        Linear("feed-forward", tokens, f, d, n, "trunk"),
        Linear("head", tokens, d, config.out_channels * patch, 1, "trunk", is_float32=True),
    ]


class Parameters(NamedTuple):
    """Numbers of parameters of a DiT."""

    total: int
    float32: int  # those that stay float32 beside bfloat16 weights
    block: int  # in one block
    pairs: int  # in a LoRA, on top of the total


def count_parameters(config: DiTConfig, rank: int = 0) -> Parameters:
    """Count the parameters of a DiT, and those of a LoRA of this rank in its blocks."""
    layers = linear_layers(config, 1, 1)
    tables, norms = 6 * config.width, 6 * config.width  # four RMS norms and a layer norm with bias
    small = config.num_layers * (tables + norms) + 2 * config.width
    block = sum(layer.parameters for layer in layers if layer.part in BLOCK_PARTS)
    return Parameters(
        total=sum(layer.parameters for layer in layers) + small,
        float32=sum(layer.parameters for layer in layers if layer.is_float32)
        + config.num_layers * (tables + 2 * config.width)
        + 2 * config.width,
        block=block // config.num_layers + tables + norms,
        pairs=sum(layer.pair_parameters(rank) for layer in layers if layer.takes_lora),
    )


class Work(NamedTuple):
    """FLOPs for one clip; a multiplication with its addition is two."""

    forward: float
    backward: float
    recompute: float


def network_work(
    config: DiTConfig,
    tokens: int,
    rows: int,
    rank: int = 0,
    checkpoint_blocks: str = "none",
    attention_backward: float = ATTENTION_BACKWARD,
    density: float = 1.0,
) -> Work:
    """FLOPs of the DiT's matrix products for one clip, trained in full or as a LoRA.

    Args:
        rank: of the LoRA; 0 trains the whole network.
        density: share of the scores of full self-attention that is computed.
    """
    forward = backward = again = 0.0
    for layer in linear_layers(config, tokens, rows):
        work = 2.0 * layer.rows * layer.fan_in * layer.fan_out * layer.count
        if not rank:
            back = work * (1 + (layer.before != "data"))  # to the weight, to the input
        else:
            back = work * (layer.before == "trunk")
            if layer.takes_lora:
                down = 2.0 * layer.rows * layer.fan_in * rank * layer.count
                up = 2.0 * layer.rows * rank * layer.fan_out * layer.count
                work += down + up
                back += 2 * up + down * (1 + (layer.before == "trunk"))
        forward, backward = forward + work, backward + back
        again += work * (layer.part in BLOCK_PARTS)
    attention = 4.0 * tokens * (density * tokens + rows) * config.width * config.num_layers
    recompute = {"none": 0.0, "selective": again, "full": again + attention}[checkpoint_blocks]
    return Work(forward + attention, backward + attention_backward * attention, recompute)


def kept_by_block(
    config: DiTConfig,
    tokens: int,
    rows: int,
    *,
    compute_bytes: int,
    rank: int = 0,
    autocast: bool = False,
    fused_norm: bool = True,
) -> float:
    """Bytes of activations that autograd keeps for one block and one clip.

    Args:
        compute_bytes: bytes per number in the matrix products, 2 or 4.
        autocast: weights are float32 and inputs are cast for each layer on its own.
        fused_norm: whether RMS norm is one kernel, as on GPUs; else its normalised input is kept
            too, where the norm's weight is trained.
    """
    d, c, trained = config.width, compute_bytes, rank == 0
    unfused = trained and not fused_norm
    per_channel = (
        3 * 4  # the residual stream before each norm
        + trained * 2 * 4  # what the scales multiply
        + trained * 2 * 4  # what the gates multiply
        + (3 + 2 * autocast) * c  # inputs of q/k/v, cross-attention's q, feed-forward
        + 3 * 4 * (1 + unfused)  # q and k before their norms, in both attentions
        + (4 + 2) * c  # q, k, v and output of attention; q and output of cross-attention
    )
    statistics = 4 * (3 * 2 + 3 + 2 * config.num_attention_heads)
    per_token = d * per_channel + statistics + 2 * config.ffn_dim * c + 8 * rank * c
    per_row = d * (4 * (1 + unfused) + (2 + 2 * autocast) * c) + 2 * rank * c
    return float(tokens * per_token + rows * per_row)


def kept_outside(
    config: DiTConfig, tokens: int, rows: int, *, compute_bytes: int, rank: int = 0
) -> float:
    """Bytes of activations that autograd keeps for the embeddings and the head, for one clip."""
    d, c = config.width, compute_bytes
    if rank:
        return float(tokens * 4 * d + rows * c * d)
    patch = config.in_channels * math.prod(config.patch_size)
    return float(tokens * (3 * 4 * d + c * patch) + rows * c * (config.text_dim + 3 * d))


def text_work(config: UMT5Config, tokens: int) -> float:
    """FLOPs of encoding one text of that many tokens."""
    inner = config.num_heads * config.d_kv
    weights = 4 * config.d_model * inner + 3 * config.d_model * config.d_ff
    return config.num_layers * (2.0 * tokens * weights + 4.0 * tokens**2 * inner)


def convolution(taps: int, fan_in: int, fan_out: int, positions: int) -> float:
    """FLOPs of a convolution whose kernel has `taps` elements, at `positions` outputs."""
    return 2.0 * taps * fan_in * fan_out * positions


def residual_work(fan_in: int, fan_out: int, positions: int) -> float:
    """FLOPs of a residual block of the autoencoder, with its 3x3x3 convolutions."""
    shortcut = convolution(1, fan_in, fan_out, positions) if fan_in != fan_out else 0.0
    first, second = (convolution(27, width, fan_out, positions) for width in (fan_in, fan_out))
    return first + second + shortcut


def middle_work(width: int, frames: int, area: int) -> float:
    """FLOPs of two residual blocks and attention within frames of `area` positions."""
    positions = frames * area
    attention = convolution(1, width, 4 * width, positions) + 4.0 * positions * area * width
    return 2 * residual_work(width, width, positions) + attention


def decode_work(config: VAEConfig, latent_frames: int, height: int, width: int) -> float:
    """FLOPs of decoding (T, h, w) latents, with the plain 3x3 kernel after each doubling."""
    base = config.decoder_base_dim or config.base_dim
    dims = [base * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
    times = [*reversed(config.temperal_downsample), None]
    frames, area, z = latent_frames, height * width, config.z_dim
    total = convolution(1, z, z, frames * area) + convolution(27, z, dims[0], frames * area)
    total += middle_work(dims[0], frames, area)
    fan_in = dims[0]
    for out, doubles_time in zip(dims[1:], times, strict=True):
        total += residual_work(fan_in, out, frames * area)
        total += config.num_res_blocks * residual_work(out, out, frames * area)
        fan_in = out
        if doubles_time is None:
            continue
        if doubles_time:
            total += convolution(3, out, 2 * out, (frames - 1) * area)
            frames = 2 * frames - 1
        fan_in = out if config.is_residual else out // 2
        area *= 4
        total += convolution(9, out, fan_in, frames * area)
    return total + convolution(27, dims[-1], config.out_channels, frames * area)


def encode_work(config: VAEConfig, num_frames: int, height: int, width: int) -> float:
    """FLOPs of encoding (F, H, W) pixels, a multiple of the strides."""
    dims = [config.base_dim * m for m in (1, *config.dim_mult)]
    times = [*config.temperal_downsample, None]
    frames, area = num_frames, height * width // (config.patch_size or 1) ** 2
    total = convolution(27, config.in_channels, dims[0], frames * area)
    for fan_in, out, halves_time in zip(dims[:-1], dims[1:], times, strict=True):
        total += residual_work(fan_in, out, frames * area)
        total += (config.num_res_blocks - 1) * residual_work(out, out, frames * area)
        if halves_time is None:
            continue
        area //= 4
        total += convolution(9, out, out, frames * area)
        if halves_time:
            total += convolution(3, out, out, (frames - 1) // 2 * area)
            frames = (frames - 1) // 2 + 1
    total += middle_work(dims[-1], frames, area)
    moments = 2 * config.z_dim
    total += convolution(27, dims[-1], moments, frames * area)
    return total + convolution(1, moments, moments, frames * area)
