"""The loop that every training command shares: step, log, save, resume."""

import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from configs.progress import Steps, doing
from configs.schema import default_values, kept_settings
from configs.training import LoopConfig
from train.artefact import Artefacts
from train.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    load_latest,
    name_of,
    save_checkpoint,
    step_of,
)
from train.data import DATA_CONTENT, DATA_DIGEST, data_changes
from train.disk import check_room
from train.metrics import MetricsLog, media_files
from train.optim import trainable
from train.parallel import ALONE, Ranks
from train.state import TrainState
from train.tensor_cache import only_writer
from wan.errors import WanError
from wan.files import write_json
from wan.settings import Kinds, check_kinds, is_of


def step_generator(seed: int, step: int) -> torch.Generator:
    """The randomness of one step: a CPU generator that depends on (seed, step) alone."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


HEALTH = "health"  # the measured number by which a checkpoint is called the best
# Of the weights that training starts from, and of another start's; checked where they are kept.
MODEL_DIGEST, START_DIGEST = "model_digest", "start_digest"
# What a run keeps of a LoRA that it started from -> the option that names the file.
LORA_STARTS = {
    "lora_start.sha256": "lora.start",
    "student_lora_start.sha256": "student.lora.start",
    "critic_lora_start.sha256": "scores.critic_lora.start",
}
CLIPS = "clips"  # the number of clips in a step, of all processes; logged as a rate

# Settings that a resumed run may change: they have no part in what is computed.
FREE_SETTINGS = {
    "output_dir",
    "threads",
    "export",
    "few_step",
    "regression.folder",
    "loop.log_every",
    "loop.save_every",
    "loop.keep_last",
    "loop.export_every",
    "loop.wandb_project",
    "loop.tensorboard",
    "loop.allow_changes",
    "data.cache_dir",
    # What is looked at, and not trained on.
    "sample_prompts",
    "sample_every",
    "sample_size",
    "sample_steps",
    "sample_shift",
    "sample_guidance",
    "sample_negative_prompt",
    "sample_seed",
    # How the same numbers are computed, up to rounding.
    "device",
    "compile",
    "checkpoint_blocks",
    "gradient_accumulation",
    "parallel.shard",
    "parallel.replicate",
    "parallel.sequence",
}


class Diverged(WanError):
    """Training cannot go on: a number is not finite, or a network has run away."""


def run_training(
    state: TrainState,
    train_step: Callable[[TrainState], dict[str, float]],
    config: LoopConfig,
    folder: Path,
    settings: dict[str, Any],
    on_save: Callable[[TrainState], dict[str, float]] | None = None,
    ranks: Ranks = ALONE,
    artefacts: Artefacts | None = None,
    ranked: bool = False,
    schema: type | None = None,
) -> bool:
    """Train to `config.steps`, continuing from the newest checkpoint in `folder` if there is one.

    Where the run has gone beyond `config.steps`, the state of just that step is loaded, and nothing
    is trained. An export that is due at the step where the run begins is written if it is missing.

    Args:
        settings: of the whole run, as `dataclasses.asdict` gives them; they are kept in
            `folder/config.json` and in every checkpoint, with paths as `kept_settings` writes them.
        train_step: one optimisation step on `state`; returns numbers to log. It must depend on
            `state` alone, so that a resumed run repeats an unbroken one bit for bit. `CLIPS`
            among them becomes clips_per_second.
        on_save: measured and logged at each checkpoint (validation, sample clips), but for those
            before the last step where a signal ends the run: there may be no time to measure. With
            `ranked` it comes before the checkpoint, which keeps the health; else after it, so that
            whatever ends it costs no training, and a kill in between only its line of the log.
            What it writes as `media_files` finds it is mirrored too.
        ranks: of all processes, which step and stop together; numbers are averaged over them, and
            the main one prints and logs.
        artefacts: what `config.export_every` makes of every so many steps; needed with it.
        ranked: whether `on_save` returns `HEALTH`. The checkpoint where that was highest is then
            kept beside the last ones.
        schema: of `settings`. An option that is younger than the checkpoints there may have its
            default value.
    Returns:
        True at the last step; False after a Ctrl-C or SIGTERM, which ends the run with a checkpoint
        after the step in progress. A second one ends the process at once.
    Raises:
        Diverged: a logged number is not finite, or `train_step` says so; names the step and what
            to go on from. Nothing is saved after that.
        WanError: the checkpoints there were made with other settings; they are beyond
            `config.steps` and none is of that step; another run writes there; processes read
            different data; or the disk has no room for the checkpoints to come.
        OSError: the metrics or a checkpoint could not be written. As after any other end, the same
            command goes on from the last checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = kept_settings(settings, folder)
    checkpoints = folder / "checkpoints"
    with ExitStack() as stack:
        with ranks.together():
            if ranks.is_main:
                stack.enter_context(only_writer(folder))
        with doing("looking for a checkpoint to go on from", quiet=not ranks.is_main):
            seen = resume(state, config, checkpoints, settings, ranks, schema)
        export = partial(export_due, state, config, folder, artefacts, ranks)
        export()  # where a run was stopped after the checkpoint and before it
        if state.step >= config.steps:
            return True
        with ranks.together():
            if ranks.is_main:
                check_room(folder, config, state.step, *sizes(state, artefacts), ranked)
        stop_requested = stack.enter_context(stop_signals())
        log: MetricsLog | None = None
        if ranks.is_main:
            write_json(folder / "config.json", settings)
            log = MetricsLog(folder, state.step, config.wandb_project, settings, config.tensorboard)
            stack.callback(log.close)
        steps = Steps("steps", config.steps, state.step, quiet=not ranks.is_main)
        stack.enter_context(steps)

        def report(text: str, values: dict[str, float]) -> None:
            if log is not None:
                log.write(state.step - 1, **values)
                steps.print(text)

        def look() -> dict[str, float]:
            with doing("validation", quiet=on_save is None or not ranks.is_main):
                measured = {} if on_save is None else on_save(state)
            if measured:
                report("    " + format_numbers(measured), measured)
            return measured

        numbers, stopping = Numbers(seen), False
        while state.step < config.steps and not stopping:
            try:
                values = ranks.mean(train_step(state))
                check_finite(state.step, values)
            except Diverged as error:
                raise Diverged(f"{error}. {way_on(checkpoints, settings)}") from error
            stopping = ranks.any(stop_requested())  # one answer for all, whenever the signal came
            numbers.add(values)
            state.step += 1
            steps.add()
            last = state.step == config.steps
            if state.step % config.log_every == 0 or last:
                means, speed = numbers.take()
                pace = f"{speed['seconds_per_step']:.2f} s/step"
                done = f"{state.step}/{config.steps}"
                left = f"  {steps.left()}" * (not last)
                report(f"{done}  {format_numbers(means)}  {pace}{left}", means | speed)
            due = state.step % config.save_every == 0 or last
            if due or stopping:
                paused = time.perf_counter()
                looks = last or (due and not stopping)
                health = look().get(HEALTH) if looks and ranked else None
                tree = {**state.to_tree(), "settings": settings, "seen": numbers.seen}
                with doing("writing a checkpoint", quiet=not ranks.is_main):
                    save_checkpoint(checkpoints, state.step, tree, config.keep_last, ranks, health)
                if looks and not ranked:
                    look()
                if log is not None:
                    log.show(state.step - 1, media_files(folder, state.step))
                numbers.started += time.perf_counter() - paused
            if last or not stopping:
                paused = time.perf_counter()
                export()
                numbers.started += time.perf_counter() - paused
    if state.step < config.steps and ranks.is_main:
        print(how_to_go_on(checkpoints / name_of(state.step), config.steps), file=sys.stderr)
    return state.step >= config.steps


def how_to_go_on(checkpoint: Path, steps: int) -> str:
    """What a run says that a signal has ended: where it stands, and the command that goes on."""
    command = typed_command(int(os.environ.get("WORLD_SIZE", "1")))
    return (
        f"stopped at step {step_of(checkpoint)} of {steps}; everything is in {checkpoint}. "
        f"To go on from there: {command}"
    )


def typed_command(processes: int) -> str:
    """The command that this process runs, as it is typed."""
    main = getattr(sys.modules["__main__"], "__spec__", None)
    if main is None:  # a function called it
        return "run the same command again"
    starter = "python" if processes == 1 else f"torchrun --nproc-per-node {processes}"
    return f"{starter} -m {main.name.removesuffix('.__main__')} {shlex.join(sys.argv[1:])}".strip()


def export_due(
    state: TrainState,
    config: LoopConfig,
    folder: Path,
    artefacts: Artefacts | None,
    ranks: Ranks,
) -> None:
    """Write what `export_every` makes of the present step, if it is one of these.

    A checkpoint of the same step is written before. So whatever stops a run in between, it begins
    again at this step or at an earlier one, and the export is written then.
    """
    if config.export_every and state.step and state.step % config.export_every == 0:
        assert artefacts is not None, "whoever exports says what"
        artefacts.write_step(state, folder, ranks)


def sizes(state: TrainState, artefacts: Artefacts | None) -> tuple[int, int]:
    """Bytes of a checkpoint, and of what is made of a step."""
    if artefacts is None:
        return state.num_bytes(), 0
    weights = trainable(state.modules[artefacts.network])
    return state.num_bytes(), sum(one.num_bytes(weights) for one in artefacts.made)


TREE_KINDS: Kinds = {"step": (int,)} | dict.fromkeys(
    ("settings", "seen", "modules", "optimizers", "averages"), (dict,)
)


def resume(
    state: TrainState,
    config: LoopConfig,
    checkpoints: Path,
    settings: dict[str, Any],
    ranks: Ranks,
    schema: type | None,
) -> dict[str, list[float]]:
    """Bring `state` to the newest checkpoint, if there is one; returns what `Numbers` had seen.

    A run that has gone further is brought to the checkpoint of `config.steps`.
    """
    if len(set(ranks.gather(settings.get(DATA_DIGEST)))) > 1:
        raise WanError(
            "data.folder: train.preprocess changed it while processes opened it; start again"
        )
    reached = ranks.first([step_of(folder) for folder in list_checkpoints(checkpoints)])
    beyond = max(reached, default=0) > config.steps
    if beyond and config.steps not in reached:
        raise WanError(
            f"loop.steps={config.steps}: the run in {checkpoints.parent} has reached step "
            f"{max(reached)}, and there is no checkpoint of step {config.steps}; those of "
            f"{', '.join(map(str, reached))} are there: give one of these, or another output_dir="
        )
    wanted = checkpoints / name_of(config.steps)
    tree = load_checkpoint(wanted, ranks) if beyond else load_latest(checkpoints, ranks)
    if tree is None:
        return {}
    check_kinds(tree, TREE_KINDS, f"{checkpoints}, the state of a checkpoint", TREE_KINDS)
    if not all(
        isinstance(numbers, list) and all(is_of(float, n) for n in numbers)
        for numbers in tree["seen"].values()
    ):
        raise WanError(f"{checkpoints}: damaged, what a checkpoint has seen are no numbers")
    if not config.allow_changes:
        free = {"loop.steps"} if beyond else set()  # it has its part in training alone
        defaults = None if schema is None else default_values(schema)
        saved = kept_settings(tree["settings"], checkpoints.parent)
        check_unchanged(saved, settings, free, defaults)
    state.load_tree(tree)
    if ranks.is_main:
        words = f"continuing from step {state.step} of {config.steps}"
        if beyond:
            words = f"step {state.step} of a run that has reached {max(reached)}: nothing to train"
        print(words, file=sys.stderr)
    return tree["seen"]


class Numbers:
    """What steps returned since the last line of the log, and how long they took.

    Attributes:
        seen: the values of each number; not every step has all of them.
        started: when the first of these steps began; whoever pauses between steps moves it.
    """

    def __init__(self, seen: dict[str, list[float]]) -> None:
        self.seen, self.counted, self.started = seen, 0, time.perf_counter()

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.seen.setdefault(name, []).append(value)
        self.counted += 1

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """Mean of each number, and speed; then counting begins anew."""
        means = {name: sum(values) / len(values) for name, values in self.seen.items()}
        pace = (time.perf_counter() - self.started) / self.counted
        speed = {"seconds_per_step": pace}
        if (clips := means.pop(CLIPS, None)) is not None:
            speed["clips_per_second"] = clips / pace
        self.seen, self.counted, self.started = {}, 0, time.perf_counter()
        return means, speed


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Catch Ctrl-C and SIGTERM: yields a function that says whether one has come.

    A second one ends the process at once.
    """
    came = False

    def note(signum: int, frame: object) -> None:
        nonlocal came
        came = True
        signal.signal(signum, signal.SIG_DFL)

    previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def check_finite(step: int, values: dict[str, float]) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise Diverged(f"step {step}: {name} is {value}; the run stops here")


def way_on(checkpoints: Path, settings: dict[str, Any]) -> str:
    """What may be done about a run that diverged."""
    found = list_checkpoints(checkpoints)
    if not found:
        also = ", or bfloat16=false" if settings.get("bfloat16") else ""
        return (
            "No checkpoint was made before that, so there is nothing to go on from: run the "
            f"command again with a lower lr= or a longer warmup={also}"
        )
    return (
        f"The newest checkpoint is {found[-1]}: the same command goes on from there, with a lower "
        "lr= if loop.allow_changes=true is added"
    )


def check_unchanged(
    saved: dict[str, Any],
    given: dict[str, Any],
    more_free: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Refuse to continue a run as another one.

    Args:
        more_free: settings that may differ beside `FREE_SETTINGS`.
        defaults: of the options. One that `saved` does not know yet may have it, or be off.
    Raises:
        WanError: lists the settings that differ.
    """
    before, now = dict(flat(saved)), dict(flat(given))
    free = FREE_SETTINGS | set(more_free)
    free |= {MODEL_DIGEST, START_DIGEST} - before.keys()  # older checkpoints have none
    off = {name for name, value in now.items() if not value}
    off |= {name for name, value in (defaults or {}).items() if now.get(name) == value}
    free |= off - before.keys()  # they are newer
    if DATA_DIGEST in before and DATA_DIGEST in now:  # which data, wherever they lie by now
        free |= {DATA_DIGEST, "data.folder"}
    for digest, option in LORA_STARTS.items():  # which file, likewise
        free |= {option} if digest in before.keys() & now.keys() else set()
    free |= {name for name in before | now if name.startswith(f"{DATA_CONTENT}.")}
    changed = data_changes(saved, given) if DATA_DIGEST in free else []
    changed += [
        f"{name}: {before.get(name)} there, {now.get(name)} now"
        for name in before | now
        if before.get(name) != now.get(name) and name not in free
    ]
    if changed:
        raise WanError(
            f"the checkpoints there were made with other settings ({'; '.join(changed)}); choose "
            "another output_dir=, or loop.allow_changes=true to go on all the same"
        )


def check_apart(folder: Path, inputs: Mapping[str, Path]) -> None:
    """Refuse what a run reads where it writes.

    Args:
        inputs: options as they were given -> where each lies.
    Raises:
        WanError: names the option.
    """
    for given, place in inputs.items():
        if place.resolve().is_relative_to(folder.resolve()):
            raise WanError(
                f"{given} lies in output_dir={folder}, which this run would write over; choose "
                "another output_dir="
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
