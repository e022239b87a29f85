"""Run the contests, check parity first, print and keep the table: the work of `infer.bench`."""

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from configs.benchmark import BenchConfig
from configs.parity import ParityConfig
from configs.progress import Steps, doing
from configs.schema import kept_settings
from infer.bench import against_diffusers, loading, stages
from infer.bench.timing import (
    Contest,
    Outcome,
    TooSlowError,
    num_calls,
    product_rate,
    profile,
    run_contest,
    table,
)
from infer.machine import environment, package_version, writable_folder
from infer.parity.models import NEEDED, reference, releases
from infer.parity.tolerance import Row
from infer.parity.tolerance import table as parity_table
from wan.errors import WanError
from wan.files import write_json, write_text
from wan.runtime.offload import resolve_device


def compared(config: BenchConfig) -> Iterator[Contest | Outcome]:
    """Contests with the references; loading is measured in other processes and comes finished."""
    reference("diffusers")  # its absence is reported before all work
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides = stack.enter_context(releases(ParityConfig(checkpoint=config.checkpoint)))[0]
        for target in config.chosen():
            if target == "load":
                yield from loading.contests(config, scratch / "load")
                continue
            of_target = sides
            if target == "block":
                of_target = against_diffusers.block_sides(
                    scratch / "block", config.block_heads, config.seed
                )
            yield from against_diffusers.contests(target, of_target, config)


def check_parity(config: BenchConfig) -> list[Row]:
    """Hold bfloat16 on the device against diffusers; no rows if that is off or not installed.

    Raises:
        WanError: a result is wrong, and so not worth timing; names the first row.
    """
    device, size = resolve_device(config.device), stages.stage_size(config)
    if not config.parity:
        return []
    try:
        reference("diffusers")
    except WanError:
        return []
    with (
        tempfile.TemporaryDirectory() as scratch,
        doing(f"holding bfloat16 on {device} against diffusers"),
    ):
        rows = list(against_diffusers.parity_rows(size, device, config, Path(scratch)))
    if wrong := [row for row in rows if not row.passed]:
        raise WanError(
            f"bfloat16 on {device} does not compute what diffusers does, so nothing is timed; "
            f"first: {wrong[0].rung}, {wrong[0].what}\n{parity_table(rows)}"
        )
    return rows


def parity_text(rows: list[Row], config: BenchConfig) -> str:
    if rows:
        return f"{parity_table(rows)}\n\nparity with diffusers: {len(rows)} of {len(rows)} rows ok"
    why = f"{', '.join(NEEDED)}: not all installed" if config.parity else "parity=false"
    return f"parity with diffusers: NOT CHECKED ({why})"


def write_profiles(contest: Contest, folder: Path, number: int) -> None:
    task = contest.task
    for name, call in contest.sides.items():
        path = folder / f"profile_{number:02d}_{task.target}_{name}.txt"
        write_text(path, f"{task.what}\n{profile(call, contest.device)}\n")
        print(f"{task.target}, {name}: {path}")


def explain(outcome: Outcome, config: BenchConfig) -> Iterator[str]:
    """Lines about an outcome beside the table: phases, distance from the floor, compiling, note."""
    task = outcome.task
    for side, seconds in outcome.phases.items():
        yield f"{task.target}: {task.what}, {side}, seconds of all threads:"
        for phase, taken in sorted(seconds.items(), key=lambda item: -item[1]):
            yield f"  {phase:<18}{taken:8.3f}"
    if config.stages is not None and task.flops is not None:
        floor = task.flops / (config.peak_tflops * 1e12)
        best = min(side.median(config.clock) for side in outcome.sides.values())
        yield (
            f"{task.target}: {task.flops / 1e12:.4g} TFLOP need {floor:.3g} s at "
            f"{config.peak_tflops:g} TFLOP/s; {floor / best:.0%} of that rate"
        )
        compiled = outcome.sides.get("compiled")
        if compiled is not None and compiled.first is not None:
            seconds_more = compiled.first - compiled.median("wall")
            yield f"{task.target}: compiling took {seconds_more:.3g} s"
    if task.note:
        yield f"{task.target}: {task.note}"


GPU_VERSIONS = {"driver": "driver", "cuda": "CUDA", "cudnn": "cuDNN"}


def machine(about: dict[str, Any]) -> str:
    """The line that says on what these times were taken, from `environment`."""
    torch_version = f"PyTorch {about['packages']['torch']}"
    if "gpu" not in about:
        return f"{about['processor']}, {about['threads']} threads, {torch_version}"
    versions = [f"{name} {about[key]}" for key, name in GPU_VERSIONS.items() if about[key]]
    return ", ".join([about["gpu"], *versions, torch_version])


def measured(
    contests: Iterable[Contest | Outcome],
    config: BenchConfig,
    folder: Path,
    keep: Callable[[list[Outcome]], None],
) -> list[Outcome]:
    """Run the contests one by one, and profile them if the settings say so.

    Args:
        keep: called with all outcomes so far after each: what failed later loses none.
    """
    outcomes: list[Outcome] = []
    targets = config.chosen()
    waiting = iter(contests)
    while True:
        with doing("networks and inputs are made"):
            contest = next(waiting, None)
        if contest is None:
            return outcomes
        if isinstance(contest, Outcome):
            outcomes.append(contest)
        else:
            task = contest.task
            place = f"target {targets.index(task.target) + 1} of {len(targets)}"
            total = num_calls(contest, config.repeats, config.warmup)
            try:
                with Steps(f"calls of {task.target}, {task.what} ({place})", total) as steps:
                    limits = (config.repeats, config.warmup, config.most_seconds)
                    outcomes.append(run_contest(contest, *limits, called=steps.add))
            except TooSlowError as slow:
                limit = f"most_seconds={config.most_seconds:g}"
                print(f"{task.target}: {task.what}: left out, {slow}; {limit}", file=sys.stderr)
                continue
            if config.profile:
                write_profiles(contest, folder, len(outcomes))
        keep(outcomes)
        del contest  # and its networks, before the next ones are made


@torch.no_grad()
def bench(config: BenchConfig) -> None:
    device = resolve_device(config.device, mps=False)
    config = config.on(str(device))
    folder = writable_folder(config.output_dir)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    about: dict[str, Any] = environment(device)
    about["packages"] |= {name: package_version(name) for name in NEEDED}
    rows: list[Row] = []

    def keep(outcomes: list[Outcome]) -> None:
        record = {
            "config": kept_settings(asdict(config), folder),
            "environment": about,
            "parity": [asdict(row) for row in rows],
            "outcomes": [outcome.as_json() for outcome in outcomes],
        }
        write_json(folder / "bench.json", record)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the references
        if config.stages is None:
            outcomes = measured(compared(config), config, folder, keep)
            rate = product_rate(device)
            print(table(outcomes, config.clock))
            print(f"a matrix product in float32 here: {rate / 1e12:.3g} TFLOP/s")
        else:
            rows += check_parity(config)
            outcomes = measured(stages.contests(config), config, folder, keep)
            outcomes += stages.end_to_end(outcomes, config, bool(rows))
            keep(outcomes)
            print(parity_text(rows, config) + "\n")
            print(table(outcomes, config.clock, config.peak_tflops))
    report = ["", *(line for outcome in outcomes for line in explain(outcome, config))]
    report += [f"missed: {text}" for outcome in outcomes for text in outcome.misses(config.clock)]
    print("\n".join([*report, machine(about), f"{folder / 'bench.json'}"]))
