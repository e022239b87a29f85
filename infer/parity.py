"""Hold our models against diffusers and transformers: python -m infer.parity [checkpoint=..]

    checkpoint=random   small models of both generations with random weights (the default)
    checkpoint=mini     the miniature that comes with this project; mini-teacher, its teacher
    checkpoint=FOLDER   a release in the diffusers layout, or its id on the hub
    full_block=true     one block of TI2V-5B at full width, random weights

Prints a row per comparison, and the first tensor that diverges. Exits with 1 if a row fails.
Needs pip install -e .[parity]
"""

import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.schema import DTYPES, check_at_least, check_choice, check_seed, option
from infer import parity_facts as facts
from infer import parity_rungs as rungs
from infer.cli import run_command
from infer.parity_compare import Row, table
from infer.parity_sides import Sides, full_block_sides, random_sides, reference
from wan.errors import WanError
from wan.hub import resolve_model
from wan.miniature import SHIPPED
from wan.pipeline_config import read_pipeline_config

FAILED = 1

# In the order of the model itself; a rung of the second list runs for every release.
GENERAL_RUNGS: list[Callable[[], list[Row]]] = [
    facts.names_and_shapes,
    facts.time_embedding,
    facts.schedules,
    facts.samplers,
]
RELEASE_RUNGS: list[Callable[[Sides], list[Row]]] = [
    rungs.tokens,
    rungs.text_encoder,
    rungs.transformer,
    rungs.autoencoder,
    rungs.pipeline,
]


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


@contextmanager
def releases(config: ParityConfig) -> Iterator[list[Sides]]:
    """What to compare; random weights live as long as the context.

    Raises:
        WanError: no such release.
    """
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    settings: dict[str, Any] = {"dtype": dtype, "steps": config.steps, "seed": config.seed}
    if config.checkpoint == "random":
        make = full_block_sides if config.full_block else random_sides
        with tempfile.TemporaryDirectory() as scratch:
            yield make(Path(scratch), settings)
        return
    name = SHIPPED.get(config.checkpoint, config.checkpoint)
    folder = resolve_model(name, config.revision)
    parts = read_pipeline_config(folder).components
    yield [Sides(Path(config.checkpoint).name, folder, parts, **settings)]


def climb(config: ParityConfig) -> Iterator[list[Row]]:
    """The rows of one rung after the other."""
    reference("diffusers")  # its absence, like a missing release, is reported before all work
    with releases(config) as all_sides:
        for general in () if config.full_block else GENERAL_RUNGS:
            yield general()
        for sides in all_sides:
            for rung in (rungs.transformer,) if config.full_block else RELEASE_RUNGS:
                yield rung(sides)


@torch.no_grad()
def main(config: ParityConfig) -> int:
    started = time.perf_counter()
    rows: list[Row] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the references, and that a long prompt is cut
        for found in climb(config):
            rows += found
            if sys.stderr.isatty():
                print(f"\r{len(rows)} rows compared", end="\r", file=sys.stderr, flush=True)
    print(table(rows))
    failed = [row for row in rows if not row.passed]
    seconds = time.perf_counter() - started
    print(f"\n{len(rows) - len(failed)} of {len(rows)} rows ok, {seconds:.0f} s, {config.dtype}")
    if failed:
        row = failed[0]
        cause = f": {row.note}" if row.note.startswith(("first ", "shape ")) else ""
        print(f"first failure: {row.rung}, {row.what}{cause}")
        return FAILED
    return 0


if __name__ == "__main__":
    run_command(main, ParityConfig, "parity", path_keys=("checkpoint",))
