"""The loop that every training command shares: step, log, save, resume."""

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from configs.training import LoopConfig
from train.checkpoint import load_latest, save_checkpoint
from train.metrics import MetricsLog, media_files
from train.parallel import ALONE, Ranks
from train.state import TrainState
from train.tensor_cache import only_writer
from wan.errors import WanError


def step_generator(seed: int, step: int) -> torch.Generator:
    """The randomness of one step: a CPU generator that depends on (seed, step) alone."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


HEALTH = "health"  # the measured number by which a checkpoint is called the best
CLIPS = "clips"  # the number of clips in a step, of all processes; logged as a rate

# Settings that a resumed run may change: they have no part in what is computed.
FREE_SETTINGS = {
    "output_dir",
    "threads",
    "export",
    "regression.folder",
    "loop.log_every",
    "loop.save_every",
    "loop.keep_last",
    "loop.wandb_project",
    "loop.allow_changes",
    "data.cache_dir",
    # Of earlier versions, for clips that training encoded itself; the world never used them.
    "data.num_frames",
    "data.height",
    "data.width",
    "data.fps",
    # How the same numbers are computed, up to rounding.
    "compile",
    "checkpoint_blocks",
    "parallel.shard",
    "parallel.replicate",
    "parallel.sequence",
}

# Settings whose names are those of a released file: a new one there comes from no new version.
FREE_FORM = ("dit.", "sampling.", "vae.", "encoder.")


def run_training(
    state: TrainState,
    train_step: Callable[[TrainState], dict[str, float]],
    config: LoopConfig,
    folder: Path,
    settings: dict[str, Any],
    on_save: Callable[[TrainState], dict[str, float]] | None = None,
    ranks: Ranks = ALONE,
) -> bool:
    """Train to `config.steps`, continuing from the newest checkpoint in `folder` if there is one.

    Args:
        settings: of the whole run, as `dataclasses.asdict` gives them; they are kept in
            `folder/config.json` and in every checkpoint.
        train_step: one optimisation step on `state`; returns numbers to log. It must depend on
            `state` alone, so that a resumed run repeats an unbroken one bit for bit. `CLIPS`
            among them becomes clips_per_second.
        on_save: measured and logged before each checkpoint (validation, sample clips), but for
            the one that a signal asks for between two others. If it returns `HEALTH`, the
            checkpoint where that was highest is kept beside the last ones. What it writes as
            `media_files` finds it is mirrored to wandb too.
        ranks: of all processes, which step and stop together; numbers are averaged over them, and
            the main one prints and logs.
    Returns:
        True at the last step; False after a Ctrl-C or SIGTERM, which ends the run with a checkpoint
        after the step in progress. A second one ends the process at once.
    Raises:
        WanError: a logged number is not finite (names the step; nothing is saved after that), or
            the checkpoints there were made with other settings; another run writes there; or
            processes read different data.
        OSError: the metrics or a checkpoint could not be written. As after any other end, the same
            command goes on from the last checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with ranks.together():
            if ranks.is_main:
                stack.enter_context(only_writer(folder))
        return _train(state, train_step, config, folder, settings, on_save, ranks)


def _train(
    state: TrainState,
    train_step: Callable[[TrainState], dict[str, float]],
    config: LoopConfig,
    folder: Path,
    settings: dict[str, Any],
    on_save: Callable[[TrainState], dict[str, float]] | None,
    ranks: Ranks,
) -> bool:
    """`run_training`, in a folder that no other run writes to."""
    if len(set(ranks.gather(settings.get("data_digest")))) > 1:
        raise WanError(
            "data.folder: train.preprocess changed it while processes opened it; start again"
        )
    checkpoints = folder / "checkpoints"
    tree = load_latest(checkpoints, ranks)
    seen: dict[str, list[float]] = {}  # since the last line of the log; not every step has all
    if tree is not None:
        if not config.allow_changes:
            check_unchanged(tree.get("settings", {}), settings)
        state.load_tree(tree)
        seen = tree.get("seen", {})  # earlier versions did not save it
        if ranks.is_main:
            print(f"continuing from step {state.step} of {config.steps}", file=sys.stderr)
    del tree  # all weights and averages once more
    log: MetricsLog | None = None
    if ranks.is_main:
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        log = MetricsLog(folder, state.step, config.wandb_project, settings)

    def report(text: str, values: dict[str, float]) -> None:
        if log is not None:
            log.write(state.step - 1, **values)
            print(text, flush=True)

    asked_to_stop = stopping = False

    def request_stop(signum: int, frame: object) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True
        signal.signal(signum, signal.SIG_DFL)  # a second one ends the process at once

    previous = {s: signal.signal(s, request_stop) for s in (signal.SIGINT, signal.SIGTERM)}
    started, counted = time.perf_counter(), 0
    try:
        while state.step < config.steps and not stopping:
            values = ranks.mean(train_step(state))
            stopping = ranks.any(asked_to_stop)  # one answer for all, whenever the signal came
            for name, value in values.items():
                if not math.isfinite(value):
                    raise WanError(
                        f"step {state.step}: {name} is {value}; the run stops here. "
                        f"Checkpoints up to this step are in {checkpoints}"
                    )
                seen.setdefault(name, []).append(value)
            state.step += 1
            counted += 1
            if state.step % config.log_every == 0 or state.step == config.steps:
                means = {name: sum(values) / len(values) for name, values in seen.items()}
                clips, pace = means.pop(CLIPS, None), (time.perf_counter() - started) / counted
                speed = {"seconds_per_step": pace}
                if clips is not None:
                    speed["clips_per_second"] = clips / pace
                done = f"{state.step}/{config.steps}"
                report(f"{done}  {format_numbers(means)}  {pace:.2f} s/step", means | speed)
                seen, started, counted = {}, time.perf_counter(), 0
            due = state.step % config.save_every == 0 or state.step == config.steps
            if due or stopping:
                paused = time.perf_counter()
                # Asked to stop, there may be no time to measure; nor is the best to depend on it.
                measured = on_save(state) if due and on_save is not None else {}
                if measured:
                    report("    " + format_numbers(measured), measured)
                tree = {**state.to_tree(), "settings": settings, "seen": seen}
                health = measured.get(HEALTH)
                save_checkpoint(checkpoints, state.step, tree, config.keep_last, ranks, health)
                if log is not None:
                    log.show(state.step - 1, media_files(folder, state.step))
                started += time.perf_counter() - paused
    finally:
        if log is not None:
            log.close()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return state.step >= config.steps


def check_unchanged(saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Refuse to continue a run as another one; settings that earlier versions lacked may be new.

    Raises:
        WanError: lists what differs.
    """
    before, now = dict(flat(saved)), dict(flat(given))
    added = [name for name in now if name not in before and name.startswith(FREE_FORM)]
    free = FREE_SETTINGS
    if "data_digest" in before and "data_digest" in now:  # which data, wherever they lie by now
        free = free | {"data.folder"}
    changed = [
        f"{name}: {before.get(name)} there, {now.get(name)} now"
        for name in [*before, *added]
        if before.get(name) != now.get(name) and name not in free
    ]
    if changed:
        raise WanError(
            f"the checkpoints there were made with other settings ({'; '.join(changed)}); choose "
            "another output_dir=, or loop.allow_changes=true to go on all the same"
        )


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as dotted names; lists stand for tuples, as JSON has no others."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def format_numbers(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
