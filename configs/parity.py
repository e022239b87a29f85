"""The settings of the command that compares with diffusers: parity."""

from dataclasses import dataclass

from configs.schema import DTYPES, check_at_least, check_choice, check_seed, option
from wan.errors import WanError


@dataclass
class ParityConfig:
    """`python -m infer.parity`."""

    checkpoint: str = option(
        "random", "random, mini, mini-teacher, a release's folder, or a hub id"
    )
    revision: str | None = option(None, "hub commit, branch or tag")
    full_block: bool = option(False, "one full-width block of TI2V-5B instead")
    dtype: str = option(
        "float32", "float32, or bfloat16: who is nearer to float32, we or the reference?"
    )
    steps: int = option(6, "of the sampling runs")
    seed: int = option(0, "of the random inputs")

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        check_at_least("steps", self.steps, 1)
        check_seed("seed", self.seed)
        if self.full_block and self.checkpoint != "random":
            raise WanError("full_block= has random weights: leave checkpoint= out")
