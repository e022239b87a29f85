"""Climb the rungs of the comparison and print the table: the work of `infer.parity`."""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

import torch

from configs.parity import ParityConfig
from configs.progress import Steps, doing
from infer.parity import with_weights as rungs
from infer.parity import without_weights as facts
from infer.parity.models import Sides, reference, releases
from infer.parity.tolerance import Row, table

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
    with doing("loading diffusers and transformers"):
        reference("diffusers")  # its absence, like a missing release, is reported before all work
    with ExitStack() as stack:
        with doing(f"opening checkpoint={config.checkpoint}"):
            all_sides = stack.enter_context(releases(config))
        climbed: list[tuple[str, Callable[[], list[Row]]]] = []
        for general in () if config.full_block else GENERAL_RUNGS:
            climbed.append((general.__name__, general))
        for sides in all_sides:
            for rung in (rungs.transformer,) if config.full_block else RELEASE_RUNGS:
                climbed.append((f"{rung.__name__} of {sides.name}", partial(rung, sides)))
        steps = stack.enter_context(Steps("comparisons", len(climbed)))
        for name, compare in climbed:
            with doing(name.replace("_", " ")):
                rows = compare()
            steps.add()
            yield rows


@torch.no_grad()
def parity(config: ParityConfig) -> int:
    started = time.perf_counter()
    rows: list[Row] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the references, and that a long prompt is cut
        for found in climb(config):
            rows += found
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
