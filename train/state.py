"""Everything a run needs to go on where it stopped."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from train.optim import EMA


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

    def to_tree(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "modules": {k: v.state_dict() for k, v in self.modules.items()},
            "optimizers": {k: v.state_dict() for k, v in self.optimizers.items()},
            "averages": {k: v.state_dict() for k, v in self.averages.items()},
        }

    def load_tree(self, tree: dict[str, Any]) -> None:
        """Restore in place; a name present on one side only is a KeyError."""
        for name in ("modules", "optimizers", "averages"):
            part = getattr(self, name)
            if set(part) != set(tree[name]):
                saved, built = sorted(tree[name]), sorted(part)
                raise KeyError(f"checkpoint has {name} {saved}, this run has {built}")
            for key, item in part.items():
                item.load_state_dict(tree[name][key])
        self.step = tree["step"]
