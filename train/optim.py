"""Optimisers, learning-rate schedules and weight averages."""

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from configs.training import OptimConfig
from train.checkpoint import newest_settings
from train.parallel import Ranks, gathered, sharded_like
from wan.errors import WanError
from wan.precision import is_fast_in_bfloat16

# Quintic Newton-Schulz coefficients: five rounds push all singular values of a matrix with unit
# norm into about [0.7, 1.2]. Source: Jordan et al., Muon (2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


C = TypeVar("C", bound=OptimConfig)


def with_precision(config: C, folder: Path, ranks: Ranks) -> C:
    """The settings with `bfloat16` decided where it was left open, for all processes alike.

    A run goes on as its checkpoints in `folder` say; a new one is computed as its device is fast.
    """
    if config.bfloat16 is not None:
        return config
    fast = ranks.first(is_fast_in_bfloat16(ranks.device))
    kept = ranks.first(newest_settings(folder / "checkpoints") if ranks.is_main else {})
    before = kept.get("bfloat16")
    if not isinstance(before, bool):
        return replace(config, bfloat16=fast)
    if before != fast and ranks.is_main:
        print(f"bfloat16={str(before).lower()}, as the run began", file=sys.stderr)
    return replace(config, bfloat16=before)


def orthogonalize(matrix: Tensor, rounds: int = 5) -> Tensor:
    """Nearly the closest semi-orthogonal matrix: (..., m, n) -> (..., m, n).

    Five rounds are far from exact, so bfloat16 is enough. Where a device is slow in bfloat16 (a CPU
    without AVX-512 takes three times as long for these products as for the rest of a training
    step), they are in float32.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.to(torch.bfloat16 if is_fast_in_bfloat16(matrix.device) else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(Optimizer):
    """Momentum whose update is orthogonalised, for matrices and convolution kernels.

    A kernel (out, in, ...) is treated as the matrix (out, in * ...). The update is scaled by
    0.2 sqrt(max(m, n)), which gives it the root mean square of an AdamW step, so that both
    optimisers share one learning rate. (`torch.optim.Muon` takes two-dimensional weights only.)

    Of a sharded weight the whole update is computed in every process, from its gathered momentum:
    right, and dear where weights are large; AdamW needs no whole matrix.

    Source: Jordan et al., Muon (2024); scale from Liu et al., arXiv:2502.16982.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            raise ValueError("Muon.step takes no closure")
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                nesterov = weight.grad.lerp(state["momentum"], group["momentum"])
                matrix = orthogonalize(gathered(nesterov).flatten(1))
                scale = 0.2 * max(matrix.shape) ** 0.5
                update = sharded_like(matrix.view(weight.shape), weight)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * scale)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that training changes, by their names."""
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def make_optimizers(
    module: nn.Module,
    name: str,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.01,
) -> dict[str, Optimizer]:
    """AdamW alone, or Muon for the hidden weights and AdamW for the rest.

    With "muon", weights of two and more axes inside blocks and levels go to Muon; tables, norms,
    biases and the first and last layers stay with AdamW, as the source advises. Decay touches the
    matrices only.
    """
    if name not in ("adamw", "muon"):
        raise WanError(f"optimizer={name!r}: must be adamw or muon")
    weights = trainable(module)
    matrices = {n: p for n, p in weights.items() if p.ndim >= 2 and min(p.shape[:2]) > 1}
    hidden = {
        n: p
        for n, p in matrices.items()
        if name == "muon"
        and ("blocks." in n or "levels." in n or "mid." in n)
        and "relative_bias" not in n
    }
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in matrices.items() if n not in hidden]},
        {"params": [p for n, p in weights.items() if n not in matrices], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizers: dict[str, Optimizer] = {}
    if groups:
        optimizers["adamw"] = torch.optim.AdamW(
            groups, lr=lr, betas=betas, weight_decay=weight_decay
        )
    if hidden:
        optimizers["muon"] = Muon(hidden.values(), lr=lr, weight_decay=weight_decay)
    return optimizers


def learning_rate(step: int, peak: float, steps: int, warmup: int, final: float = 0.1) -> float:
    """Linear warm-up to `peak`, then a cosine down to `final` * peak at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def warn_of_warmup(steps: int, warmup: int) -> None:
    """Say so where a run ends before its learning rate has reached what was asked for."""
    if warmup > steps:
        print(
            f"warning: warmup={warmup} is longer than the run: after loop.steps={steps} the "
            f"learning rate ends at {steps / warmup:.2g} of what was asked for, and never falls; "
            f"lower warmup= (to about {max(1, steps // 10)}) or raise loop.steps=",
            file=sys.stderr,
        )


def apply_gradients(
    optimizers: dict[str, Optimizer], parameters: Iterable[nn.Parameter], lr: float, max_norm: float
) -> float:
    """The end of a step: clip, set the rate, update, clear. Returns the norm before clipping."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    set_learning_rate(optimizers, lr)
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return gathered(norm).item()


def set_learning_rate(optimizers: dict[str, Optimizer], lr: float) -> None:
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = lr


class EMA:
    """An exponential moving average of a module's trainable weights, in float32.

    The decay ramps up as (1 + n) / (10 + n) until it reaches `decay`, so that the initial weights
    don't dominate early averages.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.weights = {n: p.detach().float().clone() for n, p in trainable(module).items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = dict(module.named_parameters())
        for name, average in self.weights.items():
            average.lerp_(weights[name].detach().float(), 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        weights = dict(module.named_parameters())
        for name, average in self.weights.items():
            weights[name].copy_(average)

    @contextmanager
    def in_place(self, module: nn.Module) -> Iterator[None]:
        """Let the module have the averaged weights for a while; its own come back afterwards."""
        weights = dict(module.named_parameters())
        own = {name: weights[name].detach().cpu().clone() for name in self.weights}
        self.copy_to(module)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in own.items():
                    weights[name].copy_(value)

    def state_dict(self) -> dict:
        return {"updates": self.updates, "weights": self.weights}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        for name, weight in state["weights"].items():
            self.weights[name].copy_(weight)
