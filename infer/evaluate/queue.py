"""Many things to make one after the other: they share a model, and a failure stops only itself.

Several processes share them: each takes the next one that nobody has taken.
"""

import hashlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from configs.cli import report as report_error
from configs.evaluation import EvaluateConfig
from configs.progress import Steps
from configs.schema import LOADING
from infer.evaluate.measure import Example, VideoSource
from infer.evaluate.sources import SOURCES, generate, open_pipeline
from infer.loading import digests_of, folder_of, sampling
from infer.processes import ALONE, Processes, Team
from wan.errors import WanError
from wan.files import read_sealed
from wan.models.attention_config import AttentionConfig
from wan.pipeline.pipeline import WanPipeline
from wan.pipeline.plan import SamplingPlan
from wan.weights.quantize import quantization_of

SHOWN = 3  # names of things that failed for one reason
FORMAT = 2  # of stored results: others are made again
# Failures whose message says enough; any other kind is printed with its traceback.
EXPECTED = (WanError, OSError, FloatingPointError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class Job:
    """One thing to make.

    Attributes:
        of: what it belongs to, such as a cell; if it fails, no other job of that is begun.
        name: its own, unlike all others.
        make: makes it; the argument is the processes that share the jobs.
        clips: how many clips that are.
    """

    of: str
    name: str
    make: Callable[[Team], None]
    clips: int = 1


class LastPipeline:
    """The last model that was loaded, for the next entry that wants the same.

    Args:
        processes: of several, this one loads it to a GPU of its own.
    """

    def __init__(self, processes: Processes = ALONE) -> None:
        self._processes = processes
        self._key: tuple[Any, ...] | None = None
        self._pipeline: WanPipeline | None = None
        self._attention: AttentionConfig | None = None
        self._warm: set[tuple[Any, ...]] = set()  # what ran since model and attention were set

    def here(self, config: EvaluateConfig) -> EvaluateConfig:
        """The same with the device that this process computes on."""
        return replace(config, device=self._processes.device(config.device))

    def get(self, config: EvaluateConfig) -> WanPipeline:
        """The model that a config names, with the attention that it names."""
        loading = {name: getattr(config, name) for name in LOADING}
        weights = tuple(digests_of(config).items())
        key = (folder_of(config), weights, config.device, loading)
        if self._pipeline is None or key != self._key:
            self._pipeline = None  # before the next one needs the room
            self._pipeline = open_pipeline(self.here(config))
            self._key = key
        elif config.attention != self._attention:
            self._pipeline.set_attention(config.attention)
        else:
            return self._pipeline
        self._attention = config.attention
        self._warm.clear()
        return self._pipeline

    def warm_up(self, config: EvaluateConfig, prompt: str, **call: Any) -> float:
        """Begin a clip and drop it, if model, attention or size are new.

        The costs of a first call (compiling, choosing kernels, starting CUDA) are then not in the
        seconds of the clips that follow. One step is made; if the attention names steps, as many
        as it takes until it has been used and been left out.

        Args:
            call: the pipeline's arguments beside `sampling(config)`: negative_prompt, height,
                width, num_frames and others.
        Returns:
            Seconds, decoding included; 0 if such a clip was made before.
        Raises:
            WanError: the model refuses these arguments.
        """
        pipeline = self.get(config)
        what = tuple(call[name] for name in ("height", "width", "num_frames"))
        if pipeline.compile != "none":  # a text of another length is compiled for anew
            what += (prompt, call["negative_prompt"], config.guidance_scale)
        if what in self._warm:
            return 0.0
        options = sampling(config)
        used = config.attention.uses("steps", len(pipeline.plan(**options).schedule))
        last = max(used.index(kind) for kind in set(used))

        def stop(pipeline: WanPipeline, step: int, *_: Any) -> None:
            pipeline.interrupt = step == last

        started = time.perf_counter()
        with suppress(FloatingPointError):  # the clips themselves will fail by it
            pipeline(prompt, seed=0, output_type="pt", callback_on_step_end=stop, **call, **options)
        self._warm.add(what)
        return time.perf_counter() - started


def result_key(parts: Sequence[Any]) -> str:
    """sha256 of all that a result depends on: plain data, in this order."""
    return hashlib.sha256(json.dumps(list(parts), sort_keys=True).encode()).hexdigest()


def stored_record(file: Path, label: str) -> dict[str, Any] | None:
    """The record in a file; None if there is none, or, with a line on stderr, a damaged one.

    Args:
        label: names what is stored there.
    """
    if not file.is_file():
        return None
    try:
        return read_sealed(file)
    except WanError as error:
        print(f"{label}: {error}; it is made again", file=sys.stderr)
        return None


def is_stored(file: Path, key: str, label: str) -> bool:
    """Whether a record is there, undamaged, and answers this very question."""
    record = stored_record(file, label)
    return record is not None and record.get("key") == key


def plan_record(
    pipeline: WanPipeline, plan: SamplingPlan, height: int, width: int, num_frames: int
) -> dict[str, Any]:
    """The sampling and loading of a model's clips, for their record.

    "density" is attention's share of the FLOPs of dense attention.
    """
    shape = pipeline.config.latent_shape(height, width, num_frames)
    grid = pipeline.config.transformer.token_grid(shape[1:])
    attention = pipeline.transformer.attention
    return {
        "sampler": plan.sampler,
        "steps": len(plan.schedule),
        "guidance_scale": plan.guidance_scale,
        "untrained": list(plan.untrained),
        "density": attention.density(grid, len(plan.schedule)),
        "offload": pipeline.offload,
        "quantize": quantization_of(pipeline.transformer),
        "compile": pipeline.compile,
    }


def run_each(jobs: Sequence[Job], what: str = "jobs", team: Team | None = None) -> dict[str, str]:
    """Do one job after the other, whatever fails; only Ctrl-C stops them all.

    Args:
        jobs: the same in all processes.
        what: names what they make, in the plural.
        team: the processes that share them; each job is done by one, and all wait for the last.
            None is this one alone.
    Returns:
        What failed in any process, with its reason, in the order of the jobs. Each reason is on
        stderr once, however many jobs failed for it.
    """
    team = team or Team()
    if team.size > 1 and team.is_main and jobs:
        print(f"{team.size} processes share {len(jobs)} {what}", file=sys.stderr)
    failed: dict[str, str] = {}
    total = sum(job.clips for job in jobs)
    counted = ("clips", total) if total else (what, len(jobs))  # nothing is made: looked at
    with Steps(*counted, quiet=not team.is_main) as steps:

        def advance(number: int) -> None:
            if new := team.tally(f"{counted[0]} of {what}", number) - steps.done:
                steps.add(new)

        for job in jobs:
            if team.tally(f"{job.of} failed", 0) or not team.claim(job.name):
                continue
            started = time.perf_counter()
            try:
                job.make(team)
                if team.size > 1:
                    print(f"{job.name}: {time.perf_counter() - started:.1f} s", file=sys.stderr)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                if team.tally(f"failures for {reason[:200]}", 1) == 1:
                    print(f"{job.of} failed ({type(error).__name__}):", file=sys.stderr)
                    if isinstance(error, EXPECTED):
                        report_error(error)
                    else:
                        traceback.print_exc()
                failed[job.of] = reason
                team.tally(f"{job.of} failed", 1)
            advance(job.clips if total else 1)
        everywhere = team.everyone(failed, lambda: advance(0))
    reasons = {name: reason for own in everywhere for name, reason in own.items()}
    return {job.of: reasons[job.of] for job in jobs if job.of in reasons}


def named(failed: Mapping[str, str]) -> str:
    """What failed, by name; of several with the same reason the first few."""
    groups: dict[str, list[str]] = {}
    for name, reason in failed.items():
        groups.setdefault(reason, []).append(name)
    return "; ".join(
        "; ".join(names[:SHOWN]) + (f"; and {len(names) - SHOWN} more" if names[SHOWN:] else "")
        for names in groups.values()
    )


def conclude(report: str | None, failed: Mapping[str, str], what: str, folder: Path) -> int:
    """Print the report, and at the end, where it is seen, what was not made.

    Args:
        report: None if nothing is stored.
        failed: names, each with its reason.
        what: the kind of the things that failed, in the plural.
    Returns:
        The command's exit code: 1 if something failed or there is nothing to report.
    """
    if report is None:
        print(f"{folder}: no stored results to report", file=sys.stderr)
    else:
        print(report)
    if failed:
        reasons = len(set(failed.values()))
        why = ", all for the same reason" if reasons == 1 < len(failed) else ""
        print(f"{len(failed)} {what} failed{why}: {named(failed)}", file=sys.stderr)
    return 1 if failed or report is None else 0


def weights_of(config: EvaluateConfig) -> dict[str, str] | None:
    """Digests of the model that makes the clips; None where the world itself shows them."""
    return None if config.source == "renders" else digests_of(config)


def question_key(
    config: EvaluateConfig, examples: Sequence[Example], weights: dict[str, str] | None
) -> str:
    """The key of a result: settings, captions and scenes, and weights."""
    return result_key([FORMAT, config.question(), repr(examples), weights])


def open_source(
    config: EvaluateConfig, models: LastPipeline
) -> tuple[VideoSource, dict[str, Any] | None]:
    """The source of the clips, and the `plan_record` of the model that makes them, if one does."""
    if config.source != "model":
        return SOURCES[config.source](models.here(config)), None
    pipeline = models.get(config)
    size = (config.height, config.width, config.num_frames)
    plan = pipeline.plan(**sampling(config))
    return generate(config, pipeline), plan_record(pipeline, plan, *size)


def warm_up(config: EvaluateConfig, example: Example, models: LastPipeline) -> float:
    """`LastPipeline.warm_up` for clips of captions; 0 seconds if no model makes them."""
    if config.source != "model":
        return 0.0
    return models.warm_up(
        config,
        example.caption.text,
        negative_prompt=config.negative_prompt,
        height=config.height,
        width=config.width,
        num_frames=config.num_frames,
        max_sequence_length=config.max_sequence_length,
    )
