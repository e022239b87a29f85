"""Compare our models with diffusers and transformers on the same weights.

    python -m infer.parity [checkpoint=..]

    checkpoint=random   small models of both generations with random weights (the default)
    checkpoint=mini     the miniature that comes with this project; mini-teacher, its teacher
    checkpoint=FOLDER   a release in the diffusers layout, or its id on the hub
    full_block=true     one block of TI2V-5B at full width, random weights

Prints a row per comparison, and the first tensor that diverges. Exits with 1 if a row fails.
Needs pip install -e .[parity]
"""

import sys
import time
import warnings
from collections.abc import Callable, Iterator

import torch

from configs.cli import run
from configs.command_line import CommandLine
from configs.parity import ParityConfig
from infer.parity import with_weights as rungs
from infer.parity import without_weights as facts
from infer.parity.models import Sides, reference, releases
from infer.parity.tolerance import Row, table

LINE = CommandLine(
    ParityConfig,
    "parity",
    path_keys=("checkpoint",),
)

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
    run(lambda run: main(run.config), LINE, __doc__ or "")
