"""The LoRA that a run trains: a new one, or one from a file that it goes on with."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from configs.training import LoRAConfig
from wan.errors import WanError
from wan.lora.files import LoRA, read_lora
from wan.lora.merge import add_lora, continue_lora, pairs_to_train
from wan.lora.source import find_lora
from wan.models.dit import WanDiT
from wan.models.dit_config import DiTConfig
from wan.weights.digests import sha256_file
from wan.weights.load import build_on_meta

Scales = float | Mapping[str, float]  # alpha / r of all pairs, or by the names of layers


@dataclass(frozen=True)
class StartLoRA:
    """A LoRA file that a run goes on with.

    Attributes:
        sha256: of the file; whoever resumes the run must start from the same.
    """

    lora: LoRA
    sha256: str

    @property
    def ranks(self) -> list[int]:
        """The ranks of its pairs, each once."""
        return sorted({pair.rank for pair in self.lora.pairs.values()})

    def to_json(self) -> dict[str, Any]:
        """What a run keeps of it: its digest, and alpha / r, by layers only where they differ."""
        by_layer = {n.removesuffix(".weight"): p.scale for n, p in self.lora.pairs.items()}
        each = set(by_layer.values())
        return {"sha256": self.sha256, "scale": each.pop() if len(each) == 1 else by_layer}


def read_start(config: LoRAConfig, transformer: DiTConfig, name: str = "lora") -> StartLoRA | None:
    """The LoRA file that `start` names, in any format that inference reads; None without one.

    Args:
        transformer: what it is going to be trained with.
        name: of these settings on the command line, for messages.
    Raises:
        WanError: the file cannot be read, or has another rank or alpha than the settings; it was
            made for another model, or changes something that pairs cannot go on with.
        FileNotFoundError: there is no such file.
    """
    if config.start is None:
        return None
    path = find_lora(config.start)
    start = StartLoRA(read_lora(path), sha256_file(path))
    pairs_to_train(build_on_meta(lambda: WanDiT(transformer)), start.lora)
    pairs = start.lora.pairs.values()
    if config.rank and start.ranks != [config.rank]:
        ranks = ", ".join(map(str, start.ranks)) or "none"
        raise WanError(
            f"{name}.rank={config.rank}: the pairs of {name}.start={config.start} have rank "
            f"{ranks}, which training keeps; leave {name}.rank= out"
        )
    alphas = sorted({round(pair.scale * pair.rank, 6) for pair in pairs})
    if config.alpha is not None and not all(math.isclose(config.alpha, a) for a in alphas):
        raise WanError(
            f"{name}.alpha={config.alpha}: the pairs of {name}.start={config.start} have alpha "
            f"{', '.join(f'{a:g}' for a in alphas)}, which training keeps; leave {name}.alpha= out"
        )
    return start


def train_lora(
    module: nn.Module, config: LoRAConfig, start: StartLoRA | None, generator: torch.Generator
) -> None:
    """Freeze a transformer and give it the pairs to train, if the settings ask for a LoRA.

    Args:
        start: what `read_start` gave.
    """
    if start is not None:
        continue_lora(module, start.lora)
    elif config.rank:
        add_lora(module, config.rank, config.alpha, generator=generator)


def warn_of_attention(start: StartLoRA | None, attention: str) -> None:
    """Say so where a LoRA was trained with another attention than it goes on with."""
    if start is not None and start.lora.attention not in (None, attention):
        print(
            f"warning: {start.lora.path}: was trained with attention={start.lora.attention} and "
            f"goes on with {attention}",
            file=sys.stderr,
        )


def kept_scales(config: LoRAConfig, kept: Mapping[str, Any] | None) -> Scales:
    """alpha / r of a run's pairs.

    Args:
        kept: what the run keeps of the file that it started from; None without one.
    """
    if kept is not None:
        scale = kept["scale"]
        assert isinstance(scale, float | int | Mapping)
        return scale
    return 1.0 if config.alpha is None else config.alpha / config.rank
