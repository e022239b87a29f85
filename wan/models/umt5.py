"""The UMT5 text encoder: T5 with a relative position bias of its own in every layer.

No biases, no dropout, no embedding scale, no 1/sqrt(d) on the attention scores.
Source: T5, arXiv:1910.10683; UMT5, arXiv:2304.09151; transformers `modeling_umt5.py`.

Precision: matmuls run in the weights' dtype, or in float32 on a CPU that is slow in that
(`wan.precision`); the residual stream, the norms' statistics and the softmax accumulate in float32
whatever that dtype is. The result has the weights' dtype.

Letters: B batch, S text tokens, D width, N heads, K = d_kv, width of one head.
"""

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.errors import WanError, errors_about
from wan.models.tokenizer import PAD_ID, Tokenizer, clean_prompt
from wan.precision import Linear, working_dtype
from wan.settings import bounded, check_settings


@dataclass
class UMT5Config:
    """Settings of the encoder, under the names of the released `text_encoder/config.json`."""

    # Rows of the embedding; the tokenizer may use fewer.
    vocab_size: int = bounded(256384, at_least=1, at_most=1 << 24)
    d_model: int = bounded(4096, at_least=1, at_most=1 << 17)
    d_kv: int = bounded(64, at_least=1, at_most=1 << 17)
    d_ff: int = bounded(10240, at_least=1, at_most=1 << 17)
    num_layers: int = bounded(24, at_least=1, at_most=1000)
    num_heads: int = bounded(64, at_least=1, at_most=1 << 17)
    relative_attention_num_buckets: int = bounded(32, at_least=4, at_most=1 << 16)
    relative_attention_max_distance: int = bounded(128, at_least=1, at_most=1 << 24)
    layer_norm_epsilon: float = bounded(1e-6, at_least=0, at_most=1)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.num_heads * self.d_kv > 1 << 17:
            raise WanError(f"num_heads={self.num_heads}, d_kv={self.d_kv}: at most {1 << 17} wide")
        buckets, distance = (
            self.relative_attention_num_buckets,
            self.relative_attention_max_distance,
        )
        if buckets % 4 or distance <= buckets // 4:
            raise WanError(
                f"relative_attention_num_buckets={buckets}, relative_attention_max_distance="
                f"{distance}: need a multiple of 4, and a distance above a quarter of it"
            )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "UMT5Config":
        """Read a released `config.json`.

        Settings that only training, the decoder or transformers itself uses are ignored.

        Raises:
            WanError: another kind of encoder (T5 and mT5 share one position bias among layers), or
                a size is missing.
        """
        with errors_about("text encoder config.json"):
            required = {"model_type": "umt5", "feed_forward_proj": "gated-gelu"}
            for name, value in required.items():
                if values.get(name) != value:
                    raise WanError(
                        f"{name}={values.get(name)!r}, only {value!r} is "
                        "supported (the text encoder of Wan is UMT5)"
                    )
            known = [f.name for f in fields(cls)]
            if missing := [name for name in known if name not in values]:
                raise WanError(f"it lacks {', '.join(missing)}")
            return cls(**{name: values[name] for name in known})

    def to_json(self) -> dict[str, Any]:
        """The released `config.json` of this encoder."""
        return {
            "architectures": ["UMT5EncoderModel"],
            "model_type": "umt5",
            **asdict(self),
            "num_decoder_layers": self.num_layers,
            "dropout_rate": 0.1,
            "feed_forward_proj": "gated-gelu",
            "dense_act_fn": "gelu_new",
            "is_gated_act": True,
            "is_encoder_decoder": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
            "tie_word_embeddings": False,
        }


def relative_position_buckets(
    length: int, num_buckets: int, max_distance: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The bias bucket of each (query, key) pair: (S, S) int64, an index into the bias table.

    Half of the buckets are for keys after the query. In each half, the first half of the buckets
    holds one distance each. The others hold ranges that grow logarithmically; the last one also
    holds `max_distance` and everything beyond.
    Source: T5, arXiv:1910.10683, section 2.1.
    """
    position = torch.arange(length, device=device)
    offset = position[None, :] - position[:, None]  # key minus query
    distance = offset.abs()
    half = num_buckets // 2
    exact = half // 2
    growth = torch.log(distance.clamp(min=exact).float() / exact) / math.log(max_distance / exact)
    far = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (offset > 0)


class RMSNorm(nn.Module):
    """Root-mean-square norm without a mean or a bias; statistics in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) float32 -> (..., D) in the dtype of products, rounded before the multiply."""
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(working_dtype(self.weight.dtype, x.device))


class Attention(nn.Module):
    """Self-attention whose scores are q k + bias(distance), not scaled."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        self.query = Linear(config.d_model, inner, bias=False)
        self.key = Linear(config.d_model, inner, bias=False)
        self.value = Linear(config.d_model, inner, bias=False)
        self.out = Linear(inner, config.d_model, bias=False)
        self.relative_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor | None) -> Tensor:
        """(B, S, D) -> (B, S, D). buckets (S, S) int64; mask (B, 1, 1, S) bool, True = attend."""
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, N, S, K)
            for proj in (self.query, self.key, self.value)
        )
        bias = self.relative_bias(buckets).permute(2, 0, 1).unsqueeze(0)  # (1, N, S, S)
        bias = bias.to(working_dtype(bias.dtype, bias.device))
        if mask is not None:
            # The most negative finite number, as in the reference: a query that may attend to no
            # key (in an entry that is all padding) gets an even average instead of NaN.
            bias = bias.masked_fill(~mask, torch.finfo(bias.dtype).min)  # (B, N, S, S)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.out(x.transpose(1, 2).flatten(-2))


class GatedFeedForward(nn.Module):
    """down(gelu(gate x) * up x), with the tanh form of GELU."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.gate = Linear(config.d_model, config.d_ff, bias=False)
        self.up = Linear(config.d_model, config.d_ff, bias=False)
        self.down = Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return self.down(F.gelu(self.gate(x), approximate="tanh") * self.up(x))


class Block(nn.Module):
    """Pre-norm attention and feed-forward around a float32 residual stream."""

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.ffn = GatedFeedForward(config)

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor | None) -> Tensor:
        """(B, S, D) float32 -> the same."""
        x = x + self.attention(self.attention_norm(x), buckets, mask)
        return x + self.ffn(self.ffn_norm(x))


class UMT5Encoder(nn.Module):
    """Token ids -> one vector per token."""

    FLOAT32_PARAMETERS: tuple[str, ...] = ()

    def __init__(self, config: UMT5Config) -> None:
        super().__init__()
        self.config = config
        # A context around each block's work: `wan.runtime.offload` copies its weights in it.
        self.block_at_work: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode a batch of token ids; see `encode_ids`."""
        return self.encode_ids(ids, mask)

    def encode_ids(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Encode a batch of token ids.

        Args:
            ids: (B, S) int64.
            mask: (B, S) bool, True at real tokens; None if all are. Padding may stand anywhere: no
                token attends to it. The outputs at padding have no meaning.

        Returns:
            (B, S, D) in the weights' dtype.
        """
        config = self.config
        buckets = relative_position_buckets(
            ids.shape[1],
            config.relative_attention_num_buckets,
            config.relative_attention_max_distance,
            ids.device,
        )
        key_mask = None if mask is None else mask[:, None, None, :]
        x = self.token_embedding(ids).float()  # (B, S, D)
        for block in self.blocks:
            with self.block_at_work(block):
                x = block(x, buckets, key_mask)
        return self.final_norm(x).to(self.final_norm.weight.dtype)


def pad_ids(ids: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Right-padded ids (B, S) int64, and the mask of real tokens (B, S) bool."""
    lengths = torch.tensor([len(one) for one in ids])
    padded = torch.full((len(ids), int(lengths.max())), PAD_ID)
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    padded[mask] = torch.tensor([i for one in ids for i in one])
    return padded, mask


@torch.no_grad()  # the encoder is frozen in every use; a graph through it would fill the memory
def encode_text(
    encoder: UMT5Encoder,
    tokenizer: Tokenizer,
    prompts: list[str],
    max_length: int = 512,
    clean: Callable[[str], str] = clean_prompt,
) -> Tensor:
    """Encode prompts to the DiT's context: (B, max_length, D), zero after each prompt's tokens.

    Prompts are cleaned, then encoded one at a time, without padding. This gives
    the same result as padding and masking with less work, and a prompt's embedding is bit for bit
    the same in any batch. A prompt that is too long is cut, with a warning.

    Args:
        encoder: the result has its device and dtype.
        tokenizer: the one the encoder was trained with.
        prompts: B texts as typed; "" is the unconditional context.
        max_length: number of text tokens of the context, the final </s> included.
        clean: text as typed -> text as the tokenizer gets it.

    Raises:
        WanError: an id has no embedding, so the tokenizer belongs to another encoder.
    """
    weight = encoder.token_embedding.weight
    context = torch.zeros(
        len(prompts), max_length, weight.shape[1], dtype=weight.dtype, device=weight.device
    )
    for row, prompt in enumerate(prompts):
        tokens = tokenizer(clean(prompt), max_length)
        if tokens.truncated:
            warnings.warn(
                f"the prompt has {tokens.num_tokens_before_truncation} tokens, the model reads the "
                f"first {max_length}: its end is ignored ({prompt[:40]!r}...)",
                stacklevel=2,
            )
        if max(tokens.ids) >= len(weight):
            raise WanError(
                f"the tokenizer gives id {max(tokens.ids)}, the text encoder has {len(weight)} "
                "embeddings: take both from the same model"
            )
        ids = torch.tensor([tokens.ids], device=weight.device)  # (1, S)
        context[row, : len(tokens.ids)] = encoder.encode_ids(ids)[0]
    return context
