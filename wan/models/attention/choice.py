"""From the name of an attention to the function that each layer of a network calls."""

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from wan.errors import WanError
from wan.models.attention.exact import (
    AttentionFunction,
    math_attention,
    sdpa_attention,
    sliced_attention,
)
from wan.models.attention.factorised import Factorised, Spatial, Temporal
from wan.models.attention.frame_causal import FrameCausal
from wan.models.attention.kernels import (
    cudnn_attention,
    flash3_attention,
    flash_attention,
    sage_attention,
)
from wan.models.attention.pattern import Grid
from wan.models.attention.sliding_tile import SlidingTile
from wan.models.attention.top_k import TopK
from wan.models.attention_config import AttentionConfig
from wan.models.dit_config import DiTConfig
from wan.precision import working_dtype

SELF_TEST_GRID = (4, 4, 32)  # large enough that every sparse variant leaves something out
# A kernel is trusted if its relative rms error against the formula in float32 is below this.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}
QUANTISED_TOLERANCE = 0.1  # for sage, which multiplies in 8 bits


class GridAttention(Protocol):
    """The interface of a sparse variant: self-attention of tokens on a grid (T, H, W)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        """(B, N, L, K) three times -> (B, N, L, K)."""

    def of_layer(self, layer: int) -> "GridAttention":
        """The variant that one layer uses; `Factorised` alternates between layers."""

    def density(self, grid: Grid) -> float:
        """Computed share of dense attention's FLOPs, between 0 and 1."""

    def mask(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """True where a query attends to a key: bool, broadcasts to (B, N, L, L)."""


# Exact functions that accept a bias, for self-attention and cross-attention.
ATTENTION: dict[str, AttentionFunction] = {
    "sdpa": sdpa_attention,
    "math": math_attention,
    "sliced": sliced_attention,
}
# Single kernels that accept no bias, for self-attention only.
BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cudnn": cudnn_attention,
    "flash": flash_attention,
    "flash3": flash3_attention,
    "sage": sage_attention,
}
# Approximations of self-attention. Calling an entry with its options builds the variant.
SPARSE: dict[str, Callable[..., GridAttention]] = {
    "sliding_tile": SlidingTile,
    "spatial": Spatial,
    "temporal": Temporal,
    "factorised": Factorised,
    "frame_causal": FrameCausal,
    "top_k": TopK,
}


def check_known(name: str, known: Mapping[str, Any], what: str = "attention") -> None:
    """Refuse an unknown name and suggest the closest known one."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise WanError(f"{what}={name!r}: choose one of {', '.join(known)}{hint}")


def build_attention(name: str, **options: Any) -> Callable[..., Any]:
    """Return the entry of `ATTENTION`, `BACKENDS` or `SPARSE` with its options bound.

    Raises:
        WanError: no such variant, it lacks one of the options, or a value is out of range.
    """
    known: dict[str, Callable[..., Any]] = {**ATTENTION, **BACKENDS, **SPARSE}
    check_known(name, known)
    variant = known[name]
    allowed = [p for p in inspect.signature(variant).parameters if p not in ("q", "k", "v", "bias")]
    if unknown := sorted(set(options) - set(allowed)):
        raise WanError(
            f"attention={name!r} has no option {', '.join(unknown)}; "
            f"it takes {', '.join(allowed) or 'none'}"
        )
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    if name in SPARSE:
        return variant(**options)
    if any(value < 1 for value in options.values()):
        raise WanError(f"attention={name!r}: {options} must be at least 1")
    return partial(variant, **options) if options else variant


def name_of(attention: Any) -> str:
    """The name that `build_attention` uses for a function or variant, or else its Python name."""
    function = attention.func if isinstance(attention, partial) else attention
    known: dict[str, Any] = {**ATTENTION, **BACKENDS, **SPARSE}
    own = getattr(function, "__name__", type(function).__name__)
    return next((name for name, one in known.items() if one in (function, type(function))), own)


@dataclass(frozen=True)
class LayerAttention:
    """Self-attention of one layer.

    Attributes:
        sparse: the variant that the layer computes; None where it attends densely.
        dense: the function it calls without a sparse variant.
        exact: the function it calls in steps that leave the sparse variant out.
    """

    sparse: GridAttention | None
    dense: AttentionFunction
    exact: AttentionFunction

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid, exact: bool = False) -> Tensor:
        """(B, N, L, K) three times, tokens on a grid (T, H, W) -> (B, N, L, K)."""
        if exact:
            return self.exact(q, k, v)
        if self.sparse is not None:
            return self.sparse(q, k, v, grid)
        return self.dense(q, k, v)

    def density(self, grid: Grid) -> float:
        """Share of the FLOPs of dense attention."""
        return 1.0 if self.sparse is None else self.sparse.density(grid)


@dataclass(frozen=True)
class NetworkAttention:
    """The attention functions of all layers of a network.

    It is built once from the user's choice (`network_attention`) and verified once, when the device
    is known (`verify`). Later code passes this object on and does not decide again.

    Attributes:
        config: the settings that it was built from.
        layers: self-attention of each layer.
        cross: cross-attention of every layer; always exact.
    """

    config: AttentionConfig
    layers: tuple[LayerAttention, ...]
    cross: AttentionFunction

    def density(self, grid: Grid, num_steps: int = 1) -> float:
        """Share of the FLOPs of dense self-attention, over all layers and steps."""
        of_layers = sum(layer.density(grid) for layer in self.layers) / len(self.layers)
        used = sum(self.config.uses("steps", num_steps)) / num_steps
        return used * of_layers + (1 - used)

    def exact_timesteps(self, timesteps: Sequence[float]) -> frozenset[float]:
        """The timesteps at which self-attention is exact, because `attention.steps` excludes them.

        Raises:
            WanError: several steps share a timestep, and the choice treats them differently.
        """
        used = self.config.uses("steps", len(timesteps))
        exact = frozenset(t for t, use in zip(timesteps, used, strict=True) if not use)
        if both := exact.intersection(t for t, use in zip(timesteps, used, strict=True) if use):
            raise WanError(
                f"attention.steps={self.config.steps!r}: of {len(timesteps)} steps several are at "
                f"timestep {max(both):g}, so the ranges must name all of these or none; take fewer "
                "steps, a lower shift, other ranges or all"
            )
        return exact

    def verify(self, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
        """Compare every function with the plain formula, on random tokens of a small grid.

        Raises:
            WanError: a kernel is missing on this device, or does not compute the formula.
        """
        generator = torch.Generator().manual_seed(0)
        shape = (3, 1, 2, math.prod(SELF_TEST_GRID), head_dim)
        q, k, v = torch.randn(shape, generator=generator).to(device, dtype)

        def check(function: Any, found: Tensor, bias: Tensor) -> None:
            name = name_of(function)
            tolerance = QUANTISED_TOLERANCE if name == "sage" else TOLERANCE[dtype]
            expected = math_attention(q.float(), k.float(), v.float(), bias)
            error = found.float() - expected
            distance = float(error.square().mean().sqrt() / expected.square().mean().sqrt())
            if not distance < tolerance:
                raise WanError(
                    f"attention={name} is off by {distance:.1e} (relative rms) from the "
                    f"formula on {device}, {tolerance:.0e} is allowed; choose sdpa"
                )

        no_bias = torch.zeros((), device=device)
        with torch.no_grad():
            for sparse in {layer.sparse for layer in self.layers} - {None}:
                assert sparse is not None
                # A sparse variant equals the formula with a bias of -inf outside its mask.
                mask = sparse.mask(q, k, SELF_TEST_GRID)
                check(sparse, sparse(q, k, v, SELF_TEST_GRID), no_bias.where(mask, -math.inf))
            used = {layer.dense for layer in self.layers if layer.sparse is None}
            for function in used | {layer.exact for layer in self.layers}:
                check(function, function(q, k, v), no_bias)
            # Cross-attention gets such a bias for padding: see `wan.models.dit.share_padding`.
            bias = torch.linspace(-3, 3, k.shape[2], device=device).to(dtype).float()
            check(self.cross, self.cross(q, k, v, bias), bias)


AttentionChoice = str | AttentionConfig | AttentionFunction | NetworkAttention


def network_attention(choice: AttentionChoice, num_layers: int) -> NetworkAttention:
    """Decide which function each layer calls.

    Args:
        choice: a name, a config, a function (q, k, v, bias=None) for every attention, or a
            `NetworkAttention`, which is returned unchanged.
        num_layers: number of blocks of the network.

    Raises:
        WanError: `build_attention` or `AttentionConfig` refuses the choice; no layer or step would
            call the chosen `exact`; or a built attention has another number of layers.
    """
    if isinstance(choice, NetworkAttention):
        if len(choice.layers) != num_layers:
            raise WanError(
                f"this attention is for {len(choice.layers)} layers, the network has {num_layers}"
            )
        return choice
    if not isinstance(choice, str | AttentionConfig):
        layers = (LayerAttention(None, choice, choice),) * num_layers
        return NetworkAttention(AttentionConfig(), layers, choice)
    config = AttentionConfig(choice) if isinstance(choice, str) else choice
    built = build_attention(config.name, **config.options())
    check_known(config.exact, {**ATTENTION, **BACKENDS}, "attention.exact")
    if config.exact == "sage":
        raise WanError("attention.exact=sage is 8-bit, not exact; choose sdpa, cudnn or flash")
    exact = build_attention(config.exact)
    is_sparse = config.name in SPARSE

    def layer_attention(layer: int, used: bool) -> LayerAttention:
        if not used:
            return LayerAttention(None, exact, exact)
        if is_sparse:
            return LayerAttention(built.of_layer(layer), exact, exact)  # type: ignore[attr-defined]
        return LayerAttention(None, built, exact)

    used = config.uses("layers", num_layers)
    layers = tuple(layer_attention(i, use) for i, use in enumerate(used))
    # Cross-attention needs a bias, which single kernels do not accept: use the first of the two
    # choices that accepts one, else sdpa. It is about 1 % of the work, so speed matters little.
    cross = next(
        (f for n, f in ((config.name, built), (config.exact, exact)) if n in ATTENTION),
        sdpa_attention,
    )
    everywhere = all(used) and config.steps.strip() == "all"
    if everywhere and config.exact not in ("sdpa", config.name) and cross is not exact:
        raise WanError(
            f"attention.exact={config.exact}: nothing would call it, as attention={config.name} "
            f"serves all layers and steps, and {name_of(cross)} the text; leave it out, or set "
            "attention.layers or attention.steps"
        )
    return NetworkAttention(config, layers, cross)


def verified_attention(
    choice: AttentionChoice, config: DiTConfig, device: torch.device, dtype: torch.dtype
) -> NetworkAttention:
    """Build the attention of a network and verify it on the device that it will run on.

    A `NetworkAttention` is returned unchanged, because it was verified when it was built.

    Args:
        dtype: of the weights; verified in the dtype of their products.
    Raises:
        WanError: as `network_attention` and `NetworkAttention.verify`.
    """
    built = network_attention(choice, config.num_layers)
    if built is not choice:
        built.verify(config.attention_head_dim, device, working_dtype(dtype, device))
    return built
