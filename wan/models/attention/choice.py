"""From a name to what every layer of a network calls."""

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

AttentionChoice = str | AttentionConfig | AttentionFunction

SELF_TEST_GRID = (4, 4, 32)  # large enough that every sparse variant leaves something out
# Largest relative rms from the formula in float32, for a kernel to be trusted.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}
QUANTISED_TOLERANCE = 0.1


class GridAttention(Protocol):
    """Self-attention of tokens on a grid (T, H, W); what a sparse variant is."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        """(B, N, L, K) three times -> (B, N, L, K)."""

    def of_layer(self, layer: int) -> "GridAttention":
        """The attention of one layer, for variants that differ among layers."""

    def density(self, grid: Grid) -> float:
        """Share of the FLOPs of dense attention."""

    def mask(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """Who sees whom: bool, broadcasts to (B, N, L, L)."""


@dataclass(frozen=True)
class Dense:
    """An exact function as a `GridAttention`, with no use for the grid."""

    function: AttentionFunction

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        return self.function(q, k, v)

    def of_layer(self, layer: int) -> "Dense":
        return self

    def density(self, grid: Grid) -> float:
        return 1.0

    def mask(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        return torch.ones((), dtype=torch.bool, device=q.device)


# Exact, with a bias if need be: for any attention of a network.
ATTENTION: dict[str, AttentionFunction] = {
    "sdpa": sdpa_attention,
    "math": math_attention,
    "sliced": sliced_attention,
}
# One kernel each, without a bias: for self-attention.
BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cudnn": cudnn_attention,
    "flash": flash_attention,
    "flash3": flash3_attention,
    "sage": sage_attention,
}
# Approximations of self-attention, by their options.
SPARSE: dict[str, Callable[..., GridAttention]] = {
    "sliding_tile": SlidingTile,
    "spatial": Spatial,
    "temporal": Temporal,
    "factorised": Factorised,
    "frame_causal": FrameCausal,
    "top_k": TopK,
}


def check_known(name: str, known: Mapping[str, Any]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise WanError(f"attention={name!r}: choose one of {', '.join(known)}{hint}")


def build_attention(name: str, **options: Any) -> Callable[..., Any]:
    """What is called `name`, with its options bound: of `ATTENTION`, `BACKENDS` or `SPARSE`.

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
    """What `build_attention` calls a variant or a function; of others, their own name."""
    function = attention.function if isinstance(attention, Dense) else attention
    function = function.func if isinstance(function, partial) else function
    known: dict[str, Any] = {**ATTENTION, **BACKENDS, **SPARSE}
    own = getattr(function, "__name__", type(function).__name__)
    return next((name for name, one in known.items() if one in (function, type(function))), own)


@dataclass(frozen=True)
class LayerAttention:
    """Self-attention of one layer: (q, k, v, grid) -> out; without a grid, exact."""

    chosen: GridAttention
    exact: AttentionFunction

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid | None) -> Tensor:
        if grid is None:
            return self.exact(q, k, v)
        return self.chosen(q, k, v, grid)


@dataclass(frozen=True)
class NetworkAttention:
    """What the layers of a network call.

    Attributes:
        config: the choice it was made from.
        layers: self-attention of each layer.
        cross: attention to the text in every layer, exact.
    """

    config: AttentionConfig
    layers: tuple[LayerAttention, ...]
    cross: AttentionFunction

    def density(self, grid: Grid, num_steps: int = 1) -> float:
        """Share of the FLOPs of dense self-attention, over all layers and steps."""
        of_layers = sum(layer.chosen.density(grid) for layer in self.layers) / len(self.layers)
        used = sum(self.config.uses("steps", num_steps)) / num_steps
        return used * of_layers + (1 - used)

    def exact_timesteps(self, timesteps: Sequence[float]) -> frozenset[float]:
        """Those of a schedule's timesteps at which the choice leaves attention exact.

        Raises:
            WanError: of steps at one timestep the choice leaves out some and not others.
        """
        used = self.config.uses("steps", len(timesteps))
        exact = frozenset(t for t, use in zip(timesteps, used, strict=True) if not use)
        if both := exact.intersection(t for t, use in zip(timesteps, used, strict=True) if use):
            raise WanError(
                f"attention.steps={self.config.steps!r}: of {len(timesteps)} steps several are at "
                f"timestep {max(both):g}, all or none of which can be left out; take fewer steps, "
                "a lower shift, other ranges or all"
            )
        return exact

    def verify(self, head_dim: int, device: torch.device, dtype: torch.dtype) -> None:
        """Hold every function on a small grid against the formula under its mask or bias.

        Raises:
            WanError: a kernel that is not there, or does not compute what it should.
        """
        generator = torch.Generator().manual_seed(0)
        shape = (3, 1, 2, math.prod(SELF_TEST_GRID), head_dim)
        q, k, v = torch.randn(shape, generator=generator).to(device, dtype)

        def check(name: str, found: Tensor, bias: Tensor) -> None:
            tolerance = QUANTISED_TOLERANCE if name == "sage" else TOLERANCE[dtype]
            expected = math_attention(q.float(), k.float(), v.float(), bias)
            error = found.float() - expected
            distance = float(error.square().mean().sqrt() / expected.square().mean().sqrt())
            if not distance < tolerance:
                raise WanError(
                    f"attention={name} is off by {distance:.1e} (relative rms) from the "
                    f"formula on {device}, {tolerance:.0e} is allowed; choose sdpa"
                )

        with torch.no_grad():
            for attention in {
                a for layer in self.layers for a in (layer.chosen, Dense(layer.exact))
            }:
                bias = torch.zeros((), device=device)
                bias = bias.where(attention.mask(q, k, SELF_TEST_GRID), -math.inf)
                check(name_of(attention), attention(q, k, v, SELF_TEST_GRID), bias)
            # As the text's padding rows weigh: `wan.models.dit.share_padding`.
            bias = torch.linspace(-3, 3, k.shape[2], device=device).to(dtype).float()
            check(name_of(self.cross), self.cross(q, k, v, bias), bias)


def network_attention(choice: AttentionChoice, num_layers: int) -> NetworkAttention:
    """Decide what each layer calls.

    Args:
        choice: a name, a config, or a function (q, k, v, bias=None) for every attention.

    Raises:
        WanError: see `build_attention` and `AttentionConfig`; or nothing would call the exact one.
    """
    if not isinstance(choice, str | AttentionConfig):
        layers = (LayerAttention(Dense(choice), choice),) * num_layers
        return NetworkAttention(AttentionConfig(), layers, choice)
    config = AttentionConfig(choice) if isinstance(choice, str) else choice
    built = build_attention(config.name, **config.options())
    chosen: Any = built if config.name in SPARSE else Dense(built)
    check_known(config.exact, {**ATTENTION, **BACKENDS})
    if config.exact == "sage":
        raise WanError("attention.exact=sage is 8-bit, not exact; choose sdpa, cudnn or flash")
    exact = build_attention(config.exact)
    used = config.uses("layers", num_layers)
    layers = tuple(
        LayerAttention(chosen.of_layer(i) if use else Dense(exact), exact)
        for i, use in enumerate(used)
    )
    # Of the two, the first that takes a bias; one kernel alone may not, and it hardly matters here.
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
