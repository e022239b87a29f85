"""The settings of `python -m infer.parity`, which compares with diffusers and transformers."""

from dataclasses import dataclass

from configs.schema import DTYPES, Options, count, option, seed_option
from wan.errors import WanError


@dataclass
class ParityConfig(Options):
    """`python -m infer.parity`."""

    checkpoint: str = option(
        "random", "random, mini, mini-teacher, a release's folder, or a hub id"
    )
    revision: str | None = option(None, "hub commit, branch or tag")
    full_block: bool = option(False, "one full-width block of TI2V-5B instead")
    dtype: str = option(
        "float32",
        "float32, or bfloat16: who is nearer to float32, we or the reference?",
        choices=DTYPES,
    )
    steps: int = count(6, "steps of the sampling runs")
    seed: int = seed_option(0, "seed of the random inputs")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.full_block and self.checkpoint != "random":
            raise WanError("full_block= has random weights: leave checkpoint= out")
