"""The diffusion transformer of Wan: noisy latents, timestep and text -> velocity.

Source: Wan, arXiv:2503.20314, section 4.2 and figure 10; DiT, arXiv:2212.09748 (adaptive norm).

Precision: the time path, all modulation tables, `cross_norm`, the arithmetic of every norm, the
rotary tables, the residual stream and the head are float32 whatever the dtype of the weights and
whether or not autocast is on; the other matmuls run in their weights' dtype, or in float32 on a CPU
that is slow in that (`wan.precision`). Loaders keep the parameters that
`WanDiT.FLOAT32_PARAMETERS` names in float32.

Letters: B batch, C channels, T H W latent frames, height, width (`grid` counts patches), L tokens
(order T, H, W, row-major), S text tokens, D width, N heads, K = D / N. G counts the groups of
consecutive tokens that share a timestep: 1, T or L.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.errors import WanError
from wan.models.attention import (
    AttentionChoice,
    AttentionFunction,
    Grid,
    LayerAttention,
    network_attention,
)
from wan.models.dit_config import DiTConfig
from wan.models.recompute import CHECKPOINT_BLOCKS
from wan.models.rope import apply_rope, rope_table
from wan.precision import Linear, linear, working_dtype

KeyValue = tuple[Tensor, Tensor]  # keys and values, (B, N, S, K) each


@dataclass(frozen=True)
class ContextCache:
    """Embedded text for cross-attention, one entry per block; made by `WanDiT`.

    An entry is either the embedded text (B, S, D), from which its block computes keys and values,
    or these keys and values. `bias` (S,), if given, is added to the attention scores.
    """

    per_block: Sequence[Tensor | KeyValue]
    bias: Tensor | None = None


class TokenSplit(Protocol):
    """Sequence parallelism: each process holds a part of the tokens. See `wan.runtime.parallel`."""

    size: int

    def share(self, x: Tensor, dim: int) -> Tensor:
        """This process's part of x along `dim`; the last part is padded with zeros."""
        ...

    def collect(self, x: Tensor, length: int) -> Tensor:
        """Gather the parts (B, l, ...) of all processes, cut to `length` tokens: (B, L, ...)."""
        ...

    def around(self, attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Wrap a self-attention (q, k, v, grid, exact) to take and return a process's part."""
        ...


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, even under autocast or with weights in bfloat16.

    Only this class switches autocast off: a timestep rounded to bfloat16 is another timestep.
    """

    def forward(self, x: Tensor) -> Tensor:
        # Memory is estimated with meta tensors, for which autocast does not exist.
        plain = nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
        with plain:
            return F.linear(x.float(), self.weight.float(), self.bias.float())


def layer_norm(x: Tensor, eps: float) -> Tensor:
    """Layer norm over the last dimension without parameters, float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift per group of tokens: (B, L, D) with two (B, G, D) -> (B, L, D)."""
    groups = x.unflatten(1, (shift.shape[1], -1))  # (B, G, L / G, D)
    return (groups * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).flatten(1, 2)


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """x times the gate of its group: (B, L, D) with (B, G, D) -> (B, L, D) float32."""
    groups = x.float().unflatten(1, (gate.shape[1], -1))
    return (groups * gate.unsqueeze(2)).flatten(1, 2)


def timestep_sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """[cos(t f), sin(t f)] with f_i = 10000^(-i / half): (...) -> (..., dim) float32.

    Taken in float32 like the released pipelines in diffusers; float64 would move the velocity by
    6e-6 (relative rms). Source: arXiv:1706.03762, section 3.5, cosines first.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=timestep.device)
    frequency = torch.exp(-math.log(10000.0) * index / half)
    angle = timestep.float().unsqueeze(-1) * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def compute_dtype(layer: nn.Linear) -> torch.dtype:
    """The dtype a layer computes in, by its bias, as its weight may be stored in 8 bits."""
    return working_dtype(layer.bias.dtype, layer.bias.device)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension; float32 inside, then the dtype of x."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """Layer norm with weight and bias: (..., D) -> (..., D) float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), x.shape[-1:], weight, bias, self.eps)


class PatchEmbedding(nn.Module):
    """Latents (B, C, T, H, W) -> one token per patch (B, L, D) float32.

    A convolution whose stride is its kernel is a linear layer over patches; the released weight
    keeps the shape of the convolution, (D, C, *patch_size).
    """

    def __init__(self, in_channels: int, width: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, in_channels, *patch_size))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, latents: Tensor) -> Tensor:
        t, h, w = self.weight.shape[2:]
        patches = latents.unflatten(4, (-1, w)).unflatten(3, (-1, h)).unflatten(2, (-1, t))
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7)  # (B, T, H, W, C, t, h, w)
        patches = patches.flatten(4).flatten(1, 3)  # (B, L, C t h w)
        patches = patches.to(working_dtype(self.weight.dtype, patches.device))
        return linear(patches, self.weight.flatten(1), self.bias).float()


class TimeEmbedding(nn.Module):
    """Sinusoid of the timestep (..., freq_dim) -> (..., D), float32."""

    def __init__(self, freq_dim: int, width: int) -> None:
        super().__init__()
        self.in_proj = Float32Linear(freq_dim, width)
        self.out_proj = Float32Linear(width, width)

    def forward(self, sinusoid: Tensor) -> Tensor:
        return self.out_proj(F.silu(self.in_proj(sinusoid)))


class TextEmbedding(nn.Module):
    """Output of the text encoder (B, S, text_dim) -> (B, S, D) in `compute_dtype`."""

    def __init__(self, text_dim: int, width: int) -> None:
        super().__init__()
        self.in_proj = Linear(text_dim, width)
        self.out_proj = Linear(width, width)

    def forward(self, context: Tensor) -> Tensor:
        hidden = self.in_proj(context.to(compute_dtype(self.in_proj)))
        return self.out_proj(F.gelu(hidden, approximate="tanh"))


class AttentionLayers(nn.Module):
    """The layers of both attentions. Queries and keys are normed over the whole width D."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_attention_heads
        self.query = Linear(width, width)
        self.key = Linear(width, width)
        self.value = Linear(width, width)
        self.out = Linear(width, width)
        self.query_norm = RMSNorm(width, config.eps)
        self.key_norm = RMSNorm(width, config.eps)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, N, L, K)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def merge_heads(self, x: Tensor) -> Tensor:
        """(B, N, L, K) -> (B, L, D), through the output layer."""
        return self.out(x.transpose(1, 2).flatten(2))


class SelfAttention(AttentionLayers):
    """Video tokens attend to video tokens, all to all or in the pattern of `attention`.

    Positions enter through the rotary embedding of queries and keys.
    """

    def __init__(self, config: DiTConfig, attention: LayerAttention) -> None:
        super().__init__(config)
        self.attention: Callable[..., Tensor] = attention

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], grid: Grid, exact: bool = False
    ) -> Tensor:
        """(B, L, D) on a grid of tokens -> (B, L, D) in `compute_dtype`.

        With `exact` all tokens attend to all, whatever `attention` is.
        """
        x = x.to(compute_dtype(self.query))
        query = apply_rope(self.split_heads(self.query_norm(self.query(x))), *rope)
        key = apply_rope(self.split_heads(self.key_norm(self.key(x))), *rope)
        value = self.split_heads(self.value(x))
        return self.merge_heads(self.attention(query, key, value, grid, exact))


class CrossAttention(AttentionLayers):
    """Every video token attends to every text token, padding included.

    The text gets no rotary embedding.
    """

    def __init__(self, config: DiTConfig, attention: AttentionFunction) -> None:
        super().__init__(config)
        self.attention = attention

    def key_value(self, text: Tensor) -> KeyValue:
        """Keys and values (B, N, S, K) of the embedded text (B, S, D)."""
        text = text.to(compute_dtype(self.key))
        return self.split_heads(self.key_norm(self.key(text))), self.split_heads(self.value(text))

    def forward(self, x: Tensor, text: Tensor | KeyValue, bias: Tensor | None) -> Tensor:
        """(B, L, D) and the embedded text, or its keys and values -> (B, L, D)."""
        key, value = self.key_value(text) if isinstance(text, Tensor) else text
        query = self.query_norm(self.query(x.to(compute_dtype(self.query))))
        return self.merge_heads(self.attention(self.split_heads(query), key, value, bias))


class FeedForward(nn.Module):
    """Linear, GELU, linear: (B, L, D) -> (B, L, D) in `compute_dtype`."""

    def __init__(self, width: int, ffn_dim: int) -> None:
        super().__init__()
        self.up = Linear(width, ffn_dim)
        self.down = Linear(ffn_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x.to(compute_dtype(self.up)))
        return self.down(F.gelu(hidden, approximate="tanh"))


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward around a float32 residual stream."""

    def __init__(
        self, config: DiTConfig, attention: LayerAttention, cross: AttentionFunction
    ) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.width))
        self.self_attention = SelfAttention(config, attention)
        self.cross_norm = LayerNorm(config.width, config.eps)
        self.cross_attention = CrossAttention(config, cross)
        self.ffn = FeedForward(config.width, config.ffn_dim)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        rope: tuple[Tensor, Tensor],
        text: Tensor | KeyValue,
        bias: Tensor | None,
        grid: Grid,
        exact: bool = False,
    ) -> Tensor:
        """One block: (B, L, D) float32 -> the same.

        Args:
            x: residual stream.
            time: (B, G, 6, D) float32: shift, scale and gate of self-attention, then of the
                feed-forward. The block adds its own table to them.
            rope: cosine and sine, (L, K / 2) each.
            text, bias: an entry of `ContextCache` and its bias.
            grid: number of tokens along T, H and W.
            exact: all tokens attend to all in this call.
        """
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation + time).unbind(2)
        modulated = modulate(layer_norm(x, self.eps), shift, scale)
        x = x + gated(self.self_attention(modulated, rope, grid, exact), gate)
        x = x + self.cross_attention(self.cross_norm(x), text, bias)
        x = x + gated(self.ffn(modulate(layer_norm(x, self.eps), ffn_shift, ffn_scale)), ffn_gate)
        return x


class Head(nn.Module):
    """Tokens (B, L, D) -> patches of velocity (B, L, t h w C), all float32."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.eps = config.eps
        width = config.width
        self.modulation = nn.Parameter(torch.zeros(1, 2, width))
        self.proj = Float32Linear(width, config.out_channels * math.prod(config.patch_size))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """`time` (B, G, D) is the time embedding, without the blocks' `time_modulation`."""
        shift, scale = (self.modulation + time.unsqueeze(2)).unbind(2)
        return self.proj(modulate(layer_norm(x, self.eps), shift, scale))


class WanDiT(nn.Module):
    """The network. Its modulation tables start at zero: load weights, or call `init_weights`.

    Args:
        config: sizes.
        attention: a name, an `AttentionConfig`, or a function (q, k, v, bias=None);
            `set_attention` changes it.
        checkpoint_blocks: activation checkpointing: "none", "full" (only each block's input is
            kept) or "selective" (attention's output is kept too).
    """

    FLOAT32_PARAMETERS: tuple[str, ...] = (
        "time_embedding.",
        "modulation",  # time_modulation and every table
        "cross_norm.",
        "head.proj.",
    )

    def __init__(
        self,
        config: DiTConfig,
        attention: AttentionChoice = "sdpa",
        checkpoint_blocks: str = "none",
    ) -> None:
        super().__init__()
        if checkpoint_blocks not in CHECKPOINT_BLOCKS:
            raise WanError(
                f"checkpoint_blocks={checkpoint_blocks}: choose {', '.join(CHECKPOINT_BLOCKS)}"
            )
        self.config = config
        self.run_block = CHECKPOINT_BLOCKS[checkpoint_blocks]
        # A context around each block's work: `wan.runtime.offload` copies its weights in it.
        self.block_at_work: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext
        self.split: TokenSplit | None = None
        self.attention = network_attention(attention, config.num_layers)
        width = config.width
        self.patch_embedding = PatchEmbedding(config.in_channels, width, config.patch_size)
        self.time_embedding = TimeEmbedding(config.freq_dim, width)
        self.time_modulation = Float32Linear(width, 6 * width)
        self.text_embedding = TextEmbedding(config.text_dim, width)
        self.blocks = nn.ModuleList(
            Block(config, layer, self.attention.cross) for layer in self.attention.layers
        )
        self.head = Head(config)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: Tensor | ContextCache,
        num_tokens: int | None = None,
        exact: bool = False,
    ) -> Tensor:
        """Velocity (noise - x0) of noisy latents: (B, C_out, T, H, W) float32.

        Args:
            latents: (B, C, T, H, W), normalised, at the noise levels that `timestep` gives.
            timestep: 1000 sigma as (B,), (B, T) per latent frame (a clean first frame has 0), or
                (B, L) per token, which needs memory for a modulation per token.
            context: (B, S, text_dim), zero after each prompt's tokens; or the result of
                `prepare_context`.
            num_tokens: as in `prepare_context`.
            exact: in this call all tokens attend to all, whatever the chosen attention.
        Raises:
            WanError: a shape the network cannot take.
        """
        grid = self.token_grid(latents)
        groups = self.timestep_groups(timestep, len(latents), grid)  # (B, G)
        if isinstance(context, Tensor):
            context = self.embed_context(context, num_tokens)

        x = self.patch_embedding(latents)  # (B, L, D)
        rope = rope_table(grid, self.config.attention_head_dim, device=x.device)
        time = self.time_embedding(timestep_sinusoid(groups, self.config.freq_dim))  # (B, G, D)
        modulation = self.time_modulation(F.silu(time)).unflatten(-1, (6, -1))  # (B, G, 6, D)
        if self.split is not None:
            x, time, modulation, rope = share_tokens(self.split, x, time, modulation, rope)

        for block, text in zip(self.blocks, context.per_block, strict=True):
            arguments = (x, modulation, rope, text, context.bias, grid, exact)
            with self.block_at_work(block):
                x = self.run_block(block, *arguments)

        patches = self.head(x, time)
        if self.split is not None:
            patches = self.split.collect(patches, math.prod(grid))
        return self.unpatchify(patches, grid)

    def set_attention(self, attention: AttentionChoice) -> None:
        """Use another attention from the next call on.

        Raises:
            WanError: an unknown choice, or one that does not fit the number of layers.
        """
        self.attention = network_attention(attention, self.config.num_layers)
        self._place_attention()

    def _place_attention(self) -> None:
        for block, layer in zip(self.blocks, self.attention.layers, strict=True):
            block = cast(Block, block)
            block.self_attention.attention = self.split.around(layer) if self.split else layer
            block.cross_attention.attention = self.attention.cross

    def split_tokens(self, split: "TokenSplit | None") -> None:
        """Use sequence parallelism from the next call on: blocks hold a part of the tokens.

        Args:
            split: None lets them hold all tokens again.

        Raises:
            WanError: the number of heads is not a multiple of `split.size`.
        """
        if split is not None and self.config.num_attention_heads % split.size:
            raise WanError(
                f"{self.config.num_attention_heads} heads cannot be shared out over {split.size} "
                "processes: parallel.sequence must divide them"
            )
        self.split = split
        self._place_attention()

    def embed_context(self, context: Tensor, num_tokens: int | None = None) -> ContextCache:
        """Embed the text; every block computes its keys and values again in each call.

        Arguments and errors as for `prepare_context`.
        """
        if context.ndim != 3 or context.shape[-1] != self.config.text_dim:
            raise WanError(
                f"context {tuple(context.shape)}: need (B, S, {self.config.text_dim}), the output "
                "of this model's text encoder"
            )
        bias = None
        if num_tokens is not None:
            context, bias = share_padding(context, num_tokens)
        return ContextCache([self.text_embedding(context)] * self.config.num_layers, bias)

    def prepare_context(self, context: Tensor, num_tokens: int | None = None) -> ContextCache:
        """Compute all blocks' keys and values once per prompt; `forward` takes them as context.

        They do not depend on latents or timestep, so the velocity is the same and takes less time.

        Args:
            context: (B, S, text_dim), zero after each prompt's tokens. Attention reads the zero
                tokens like any others, because the network was trained so.
            num_tokens: n says that all tokens from n on are zero. Two tokens then stand for
                all of them: the same function, up to rounding, in less time.
        Raises:
            WanError: the shape does not fit, or a token from `num_tokens` on is not zero.
        """
        embedded = self.embed_context(context, num_tokens)
        key_values = []
        for block, text in zip(self.blocks, embedded.per_block, strict=True):
            assert isinstance(text, Tensor)
            with self.block_at_work(block):
                key_values.append(cast(Block, block).cross_attention.key_value(text))
        return ContextCache(key_values, embedded.bias)

    def token_grid(self, latents: Tensor) -> tuple[int, int, int]:
        """Tokens along T, H and W.

        Raises:
            WanError: not 5-D, wrong channels, or sizes that `DiTConfig.token_grid` refuses.
        """
        channels = self.config.in_channels
        if latents.ndim != 5 or latents.shape[1] != channels:
            raise WanError(f"latents {tuple(latents.shape)}: need (B, {channels}, T, H, W)")
        return self.config.token_grid(latents.shape[2:])

    def timestep_groups(self, timestep: Tensor, batch: int, grid: tuple[int, int, int]) -> Tensor:
        """Timesteps of groups of consecutive tokens: (B,), (B, T) or (B, L) -> (B, G).

        Raises:
            WanError: another shape.
        """
        groups = timestep.unsqueeze(1) if timestep.ndim == 1 else timestep
        allowed = (1, grid[0], math.prod(grid))
        if groups.ndim != 2 or len(groups) != batch or groups.shape[1] not in allowed:
            raise WanError(
                f"timestep {tuple(timestep.shape)}: need ({batch},), ({batch}, {grid[0]}) per "
                f"latent frame or ({batch}, {allowed[2]}) per token"
            )
        return groups

    def unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """(B, L, t h w C) with channels fastest -> (B, C, T, H, W)."""
        t, h, w = self.config.patch_size
        x = patches.unflatten(2, (t, h, w, -1)).unflatten(1, grid)  # (B, T, H, W, t, h, w, C)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # (B, C, T, t, H, h, W, w)
        return x.reshape(*x.shape[:2], grid[0] * t, grid[1] * h, grid[2] * w)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw weights to train from scratch: each block starts as the identity, the output as 0.

        Zeroing the last layer of every residual branch, with gates at 1, does what zero gates do in
        DiT (arXiv:2212.09748, section 3.2), but lets those layers learn from the first step.
        """
        for name, parameter in self.named_parameters():
            last_of_branch = name.endswith((".out.weight", "ffn.down.weight", "head.proj.weight"))
            if last_of_branch or parameter.ndim == 1:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
            elif name.endswith(".modulation"):
                parameter.zero_()
                parameter[:, 2::3] = 1.0  # the gates; the head's table has none
            elif name == "time_modulation.weight":
                parameter.zero_()
            else:
                fan_in = parameter[0].numel()
                parameter.normal_(std=fan_in**-0.5, generator=generator)


def share_tokens(
    split: TokenSplit, x: Tensor, time: Tensor, modulation: Tensor, rope: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """This process's tokens, with their time embedding, modulation and rotary tables."""
    length, groups = x.shape[1], time.shape[1]
    if groups > 1:
        group = torch.arange(length, device=x.device) // (length // groups)  # (L,) of each token
        own = split.share(group, 0)
        time, modulation = time[:, own], modulation[:, own]
    cos, sin = (split.share(table, 0) for table in rope)
    return split.share(x, 1), time, modulation, (cos, sin)


def share_padding(context: Tensor, num_tokens: int) -> tuple[Tensor, Tensor | None]:
    """Let two zero tokens stand for all padding tokens, which start at n = `num_tokens`.

    (B, S, text_dim) -> (B, n + 2, text_dim) and a bias (n + 2,) for the attention scores; with up
    to 2 padding tokens the context is unchanged and the bias None. Equal tokens give equal keys and
    values, and m equal scores s weigh m exp(s) = exp(s + log m). A kernel may round the bias to
    bfloat16, which changes m by up to 1.6 %. So m is split over two tokens: bfloat16 holds the
    first logarithm exactly, and m changes by 0.03 % only.
    """
    num_rows = context.shape[1]
    if not 0 <= num_tokens <= num_rows:
        raise WanError(f"num_tokens={num_tokens}: the context has {num_rows} text tokens")
    if context[:, num_tokens:].any():
        raise WanError(f"num_tokens={num_tokens}, but later tokens of the context are not zero")
    count = num_rows - num_tokens
    if count <= 2:
        return context, None
    first = math.floor(math.log(count) * 32) / 32
    rest = math.log(count - math.exp(first)) if count > math.exp(first) else -math.inf
    bias = torch.tensor([0.0] * num_tokens + [first, rest], device=context.device)
    return context[:, : num_tokens + 2], bias
