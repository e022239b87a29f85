"""The loop that every training command shares: step, log, save, resume."""

import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from configs.training import LoopConfig
from train.checkpoint import load_latest, save_checkpoint
from train.metrics import MetricsLog
from train.state import TrainState
from wan.errors import WanError


def step_generator(seed: int, step: int) -> torch.Generator:
    """The randomness of one step: a CPU generator that depends on (seed, step) alone."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def run_training(
    state: TrainState,
    train_step: Callable[[TrainState], dict[str, float]],
    config: LoopConfig,
    folder: Path,
    on_save: Callable[[TrainState], dict[str, float]] | None = None,
) -> None:
    """Train to `config.steps`, continuing from the newest checkpoint in `folder` if there is one.

    Args:
        train_step: one optimisation step on `state`; returns numbers to log. It must depend on
            `state` alone, so that a resumed run repeats an unbroken one bit for bit.
        on_save: measured and logged before each checkpoint (validation, sample clips).
    Raises:
        WanError: a logged number is not finite; names the step. Nothing is saved after that.
    A first Ctrl-C or SIGTERM saves and returns after the step in progress.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = folder / "checkpoints"
    tree = load_latest(checkpoints)
    if tree is not None:
        state.load_tree(tree)
        print(f"continuing from step {state.step} of {config.steps}", file=sys.stderr)
    log = MetricsLog(folder, state.step, config.wandb_project, asdict(config))

    asked_to_stop = False

    def request_stop(signum: int, frame: object) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True
        signal.signal(signum, signal.SIG_DFL)  # a second one ends the process at once

    previous = {s: signal.signal(s, request_stop) for s in (signal.SIGINT, signal.SIGTERM)}
    sums: dict[str, float] = {}
    started, counted = time.perf_counter(), 0
    try:
        while state.step < config.steps and not asked_to_stop:
            values = train_step(state)
            for name, value in values.items():
                if not math.isfinite(value):
                    raise WanError(
                        f"step {state.step}: {name} is {value}; the run stops here. "
                        f"Checkpoints up to this step are in {checkpoints}"
                    )
                sums[name] = sums.get(name, 0.0) + value
            state.step += 1
            counted += 1
            if state.step % config.log_every == 0 or state.step == config.steps:
                elapsed = time.perf_counter() - started
                means = {name: total / counted for name, total in sums.items()}
                log.write(state.step - 1, **means, seconds_per_step=elapsed / counted)
                done = f"{state.step}/{config.steps}"
                print(
                    f"{done}  {format_numbers(means)}  {elapsed / counted:.2f} s/step", flush=True
                )
                sums, started, counted = {}, time.perf_counter(), 0
            if state.step % config.save_every == 0 or state.step == config.steps or asked_to_stop:
                if on_save is not None:
                    measured = on_save(state)
                    log.write(state.step - 1, **measured)
                    print("    " + format_numbers(measured), flush=True)
                save_checkpoint(checkpoints, state.step, state.to_tree(), config.keep_last)
                started = time.perf_counter()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def format_numbers(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
