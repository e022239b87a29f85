"""Everything a run needs to go on where it stopped."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from train.optim import EMA, Muon, trainable
from wan.errors import WanError


@dataclass
class TrainState:
    """Step counter, networks, optimisers and averages.

    There is no RNG here on purpose: every batch and every noise draw comes from a generator seeded
    with (seed, step), so the data position is the step itself.
    """

    modules: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    averages: dict[str, EMA] = field(default_factory=dict)
    step: int = 0

    def num_bytes(self) -> int:
        """Size of a checkpoint once every optimiser has made a step; all its numbers are float32.

        AdamW keeps two numbers for each weight, Muon one.
        """
        kept: list[Mapping[str, Tensor]] = [trainable(module) for module in self.modules.values()]
        kept += [average.weights for average in self.averages.values()]
        numbers = sum(weight.numel() for weights in kept for weight in weights.values())
        for optimizer in self.optimizers.values():
            moments = 1 if isinstance(optimizer, Muon) else 2
            groups = optimizer.param_groups
            numbers += moments * sum(p.numel() for group in groups for p in group["params"])
        return 4 * numbers

    def to_tree(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "modules": {
                name: {n: p.detach() for n, p in trainable(module).items()}  # frozen: of the base
                for name, module in self.modules.items()
            },
            "optimizers": {k: v.state_dict() for k, v in self.optimizers.items()},
            "averages": {k: v.state_dict() for k, v in self.averages.items()},
        }

    def load_tree(self, tree: dict[str, Any]) -> None:
        """Restore in place; weight decay and the like stay as this run was given them.

        Raises:
            WanError: the checkpoint is of another run: other parts, names or shapes.
        """
        try:
            for name, module in self.modules.items():
                load_trainable(module, tree["modules"][name])
            for name, optimizer in self.optimizers.items():
                groups = optimizer.param_groups
                own = [{k: v for k, v in group.items() if k != "params"} for group in groups]
                optimizer.load_state_dict(tree["optimizers"][name])
                for group, values in zip(optimizer.param_groups, own, strict=True):
                    group.update(values)
            for name, average in self.averages.items():
                average.load_state_dict(tree["averages"][name])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise WanError(
                f"the checkpoints in the output folder belong to another run ({error}); "
                "choose another output_dir="
            ) from error
        self.step = tree["step"]


@torch.no_grad()
def load_trainable(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    weights = trainable(module)
    if weights.keys() != state.keys():
        differing = sorted(weights.keys() ^ state.keys())
        raise KeyError(f"{len(differing)} weights differ, the first is {differing[0]}")
    for name, weight in weights.items():
        weight.copy_(state[name])
