"""Time and memory: python -m infer.bench [targets=[decode,dit]] [device=cuda attention=cudnn]

    on the CPU     against diffusers and transformers: the same weights, inputs, threads and dtype,
                   in one process, taking turns. Needs pip install -e .[parity]
    device=cuda    the stages of TI2V-5B at 121x704x1280 with random weights, eager and compiled,
                   beside the least time that their FLOPs need. Nothing is downloaded.

Prints a table of medians, with the middle half of all calls as spread, and writes bench.json. A
comparison on the CPU ends with what was not as fast as it should be; profile=true says why.
"""

import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from configs.benchmark import BenchConfig
from infer import bench_compare, bench_load, bench_stages
from infer.bench_measure import Contest, Outcome, profile, run_contest, table
from infer.cli import run_command
from infer.command_line import ATTENTION
from infer.parity import ParityConfig, releases
from infer.parity_sides import NEEDED, reference
from infer.record import environment, package_version, processor, writable_folder


def compared(config: BenchConfig) -> Iterator[Contest | Outcome]:
    """Contests with the references, and loading, which is measured apart."""
    reference("diffusers")  # its absence is reported before all work
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides = stack.enter_context(releases(ParityConfig(checkpoint=config.checkpoint)))[0]
        for target in config.chosen():
            if target == "load":
                yield from bench_load.contests(config, scratch / "load")
            elif target == "block":
                block = bench_compare.block_sides(
                    scratch / "block", config.block_heads, config.seed
                )
                yield from bench_compare.contests(target, block, config)
            else:
                yield from bench_compare.contests(target, sides, config)


def staged(config: BenchConfig) -> Iterator[Contest]:
    for target in config.chosen():
        yield from bench_stages.contests(target, config)


def write_profiles(contest: Contest, folder: Path, number: int) -> None:
    for name, run in contest.sides.items():
        path = folder / f"profile_{number:02d}_{contest.target}_{name}.txt"
        path.write_text(f"{contest.what}\n{profile(run, contest.device)}\n", encoding="utf-8")
        print(f"{contest.target}, {name}: {path}")


def floor_lines(outcomes: list[Outcome], config: BenchConfig) -> list[str]:
    """How far each stage is from the time that its FLOPs need at the device's best rate."""
    lines = []
    for outcome in outcomes:
        assert outcome.flops is not None
        floor = outcome.flops / (config.peak_tflops * 1e12)
        best = min(side.median(config.clock) for side in outcome.sides.values())
        lines.append(
            f"{outcome.target}: {outcome.flops / 1e12:.4g} TFLOP need {floor:.3g} s at "
            f"{config.peak_tflops:g} TFLOP/s; {floor / best:.0%} of that rate"
        )
    return lines


def missed_lines(outcomes: list[Outcome], config: BenchConfig) -> list[str]:
    lines = []
    for outcome in outcomes:
        ratio = outcome.ratio(config.clock)
        if outcome.goal is not None and ratio is not None and ratio < outcome.goal:
            what = f"{outcome.target}, {outcome.what}"
            lines.append(f"missed: {what}: {ratio:.2f}x of {outcome.goal:g}x")
    return lines


def write_json(path: Path, outcomes: list[Outcome], config: BenchConfig) -> None:
    about: dict[str, Any] = environment(torch.device(config.device))
    about["packages"] |= {name: package_version(name) for name in NEEDED}
    record = {
        "config": asdict(config),
        "environment": about,
        "outcomes": [outcome.as_json() for outcome in outcomes],
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def main(config: BenchConfig) -> None:
    folder = writable_folder(config.output_dir)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    outcomes: list[Outcome] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the references
        for contest in compared(config) if config.stages is None else staged(config):
            if sys.stderr.isatty():
                print(f"\r{contest.target}: {contest.what}", end="\r", file=sys.stderr, flush=True)
            if isinstance(contest, Outcome):
                outcomes.append(contest)
                continue
            outcomes.append(run_contest(contest, config.repeats, config.warmup))
            if config.profile:
                write_profiles(contest, folder, len(outcomes))
    write_json(folder / "bench.json", outcomes, config)
    print(table(outcomes, config.clock))
    lines = missed_lines if config.stages is None else floor_lines
    about = f"{processor()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"
    print("\n".join(["", *lines(outcomes, config), about, f"{folder / 'bench.json'}"]))


if __name__ == "__main__":
    run_command(
        main, BenchConfig, "bench", path_keys=("checkpoint", "output_dir"), shortcuts=ATTENTION
    )
