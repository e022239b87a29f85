"""Make every cell of a grid that is not stored yet, and compare: the work of `infer.ablate`."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.ablation import AblateConfig, Setting
from configs.cli import Run
from configs.evaluation import loading_key
from configs.progress import doing
from configs.schema import kept_settings
from infer.ablate.cell import Cell
from infer.ablate.report import write_report
from infer.evaluate.measure import draw_examples
from infer.evaluate.parts import machine
from infer.evaluate.queue import (
    FORMAT,
    Job,
    LastPipeline,
    conclude,
    plan_record,
    question_key,
    result_key,
    run_each,
    weights_of,
)
from infer.evaluate.store import Missing, StoredClips, keep_clip
from infer.evaluate.video_distance import flicker, psnr, ssim
from infer.gallery.records import MEASURES_FILE
from infer.loading import digests_of, sampling
from infer.machine import writable_folder
from infer.measure.run import Store, Towers, Video, measure
from infer.processes import Processes, Team
from wan.errors import WanError
from wan.files import expanded, read_text, write_sealed
from wan.media.video import to_uint8
from wan.models.attention import ATTENTION, BACKENDS, SPARSE
from wan.models.attention.choice import check_known
from wan.pipeline.pipeline import WanPipelineOutput
from wan.runtime.offload import resolve_device
from wan.weights.checked import read_checked, write_checked

OF_WORLD = ("num_captions", "num_objects", "split", "batch_size", "keep_clips")
MAX_PSNR = 60.0  # dB; of 8-bit pixels that are equal but for one level in a few


@dataclass(frozen=True)
class Runner:
    """What all cells share."""

    config: AblateConfig
    models: LastPipeline
    team: Team


def write_clip(runner: Runner, cell: Cell, number: int, video: Tensor) -> None:
    """Write a clip (3, F, H, W) of a cell to look at."""
    keep_clip(cell.video(number), video, runner.config.fps or 8)


# --- any prompts ----------------------------------------------------------------------------------


def make_video(
    runner: Runner, setting: Setting, seed: int, prompt: str
) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
    """Make a clip with the model warmed up.

    Returns:
        The video (3, F, H, W) in [-1, 1]; how the model made it; and its seconds, warm-up excluded:
        of each stage as in `WanPipeline.last_timings`, and of all together.
    """
    config = runner.config
    question = config.evaluation(setting)
    pipeline = runner.models.get(question)
    options = sampling(question)
    plan = pipeline.plan(**options, guidance_scale_2=config.guidance_scale_2)
    names = ("height", "width", "num_frames", "max_sequence_length", "guidance_scale_2")
    call = {name: getattr(config, name) for name in names}
    call["negative_prompt"] = config.negative_prompt if plan.guided else None
    warmup_seconds = runner.models.warm_up(question, prompt, **call)
    started, cpu_started = time.perf_counter(), time.process_time()
    made = pipeline(prompt, seed=seed, output_type="pt", **call, **options)
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    assert isinstance(made, WanPipelineOutput)
    video = made.frames[0].transpose(0, 1) * 2 - 1
    frames, height, width = video.shape[1:]
    record = plan_record(pipeline, plan, height, width, frames)
    stages = dict(pipeline.last_timings)
    # A prompt is encoded once for all cells: its time is not in "seconds".
    seconds: dict[str, Any] = {"seconds": stages["denoise"] + stages["decode"], "stages": stages}
    seconds |= {"seconds_in_all": wall, "cpu_seconds_in_all": cpu}
    if runner.team.size > 1:
        seconds["processes"] = runner.team.size
    return video, {"plan": record, "warmup_seconds": warmup_seconds, **machine(config)}, seconds


def make_reference(runner: Runner, cell: Cell, team: Team) -> None:
    """Write what cells are compared with, as 8-bit frames (F, H, W, 3)."""
    assert cell.prompt is not None
    assert cell.reference is not None
    setting = runner.config.reference_of(cell.setting)
    exact = replace(runner, config=runner.config.unquantized())
    try:
        video, _, _ = make_video(exact, setting, cell.seed, cell.prompt)
    except WanError as error:
        raise WanError(
            f"the reference: {error}; reference.checkpoint= names another model to compare with, "
            "reference.steps=null takes the model's own steps"
        ) from error
    cell.reference.parent.mkdir(parents=True, exist_ok=True)
    write_checked(cell.reference, {"frames": torch.from_numpy(to_uint8(video))})


def has_reference(cell: Cell) -> bool:
    """Whether what a cell is compared with is stored, undamaged; a line on stderr if it is not."""
    assert cell.reference is not None
    if not cell.reference.is_file():
        return False
    try:
        frames = read_checked(cell.reference).get("frames")
        if frames is None or frames.dtype != torch.uint8 or frames.shape[3:] != (3,):
            raise WanError(f"{cell.reference}: damaged, it holds no frames (F, H, W, 3)")
        return True
    except WanError as error:
        print(f"the reference of {cell.name}: {error}; it is made again", file=sys.stderr)
        cell.reference.unlink()
        return False


def make_compared(runner: Runner, cell: Cell, team: Team) -> None:
    """Make one clip and compare it with its reference, both as 8-bit frames."""
    assert cell.prompt is not None
    assert cell.reference is not None
    if not cell.reference.is_file():
        raise WanError("nothing to compare with: the reference failed, see above")
    video, how, seconds = make_video(runner, cell.setting, cell.seed, cell.prompt)
    frames = (torch.from_numpy(to_uint8(video)), read_checked(cell.reference)["frames"])
    ours, exact = (pixels.permute(3, 0, 1, 2) / 255 for pixels in frames)
    measures = {
        "psnr": min(psnr(ours, exact), MAX_PSNR),
        "ssim": ssim(ours, exact),
        "flicker": flicker(ours),
        "reference_flicker": flicker(exact),
    }
    write_clip(runner, cell, 0, video)
    kept = kept_settings(asdict(cell.setting), runner.config.output_dir)
    clip = {"prompt": cell.prompt, "seed": cell.seed, "measures": measures, **seconds}
    write_sealed(cell.file, {"key": cell.key, "setting": kept, **how, "clips": [clip]})


def clip_key(config: AblateConfig, setting: Setting, seed: int, prompt: str) -> str:
    """The key of one clip: all that its pixels depend on."""
    how = asdict(setting) | {"sampler": setting.sampler.key()} | loading_key(config)
    for label in ("model", "attention_name"):
        del how[label]
    names = ("guidance_scale_2", "negative_prompt", "max_sequence_length", "height", "width")
    rest = [getattr(config, name) for name in (*names, "num_frames")]
    weights = digests_of(config.evaluation(setting))
    return result_key([FORMAT, how, rest, made_on(config), seed, prompt, weights])


def made_on(config: AblateConfig) -> list[str]:
    """The kind of device and the dtype, where the settings may say "auto"."""
    return [resolve_device(config.device).type, machine(config)["dtype"]]


# --- the grid -------------------------------------------------------------------------------------


def read_prompts(config: AblateConfig) -> list[str | None]:
    """The prompts; None alone stands for captions of the world."""
    if config.in_world or config.prompt is not None:
        return [config.prompt]
    if config.prompt_file is None:
        return [*config.prompts]
    path = expanded(config.prompt_file)
    prompts: list[str | None] = [line.strip() for line in read_text(path).split("\n")]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise WanError(f"prompt_file={path}: no prompt in it; write one per line")
    if len(set(prompts)) < len(prompts):
        raise WanError(f"prompt_file={path}: a prompt is there twice; num_seeds= makes more of it")
    return prompts


def make_cell(
    config: AblateConfig,
    folder: Path,
    name: str,
    setting: Setting,
    seed: int,
    number: int,
    prompt: str | None,
) -> Cell:
    """A cell with its key, which tells what is stored of it.

    Raises:
        WanError: the model is not there.
    """
    reference = clips = None
    if prompt is None:
        question = config.evaluation(setting, seed)
        one, weights = replace(question, num_captions=1), weights_of(question)
        # Without the number of captions: where that grows, clips are added to the same file.
        key = result_key([question_key(one, draw_examples(one), weights), made_on(config)])
    else:
        exact = clip_key(config.unquantized(), config.reference_of(setting), seed, prompt)
        key = result_key([clip_key(config, setting, seed, prompt), exact])
        reference = folder / "references" / f"{exact[:16]}.safetensors"
    file = folder / "cells" / f"{key[:16]}.json"
    if prompt is None:
        about = {"setting": kept_settings(asdict(setting), folder), "seed": seed}
        clips = StoredClips(name, question, file, weights, about)
    return Cell(name, setting, seed, prompt, number, key, file, reference, clips)


def cell_makers(config: AblateConfig, folder: Path) -> dict[str, Callable[[], Cell]]:
    """How to make each cell of the grid, by its name, in the report's order."""
    makers: dict[str, Callable[[], Cell]] = {}
    prompts = read_prompts(config)
    for setting in config.settings():
        for number, prompt in enumerate(prompts):
            for seed in config.seeds:
                which = f", prompt {number + 1}" if len(prompts) > 1 else ""
                name = f"{', '.join(setting.axes().values())}{which}, seed {seed}"
                what = (setting, seed, number, prompt)
                makers[name] = partial(make_cell, config, folder, name, *what)
    return makers


def list_cells(config: AblateConfig, folder: Path) -> tuple[list[Cell], dict[str, str]]:
    """All cells, and the names of those whose model is not there, with the reason."""
    cells: list[Cell] = []

    def add(make: Callable[[], Cell], team: Team) -> None:
        cells.append(make())

    makers = cell_makers(config, folder)
    return cells, run_each(
        [Job(n, n, partial(add, make), 0) for n, make in makers.items()], "cells looked for"
    )


def list_missing(
    cells: Sequence[Cell], num_processes: int
) -> tuple[list[tuple[str, Missing | None]], list[str], dict[str, str]]:
    """What is not stored yet.

    Returns:
        Names of cells, of the world's with the clips that are missing; of the cells that make a
        reference first; and of those that failed, with their reasons.
    """
    missing: list[tuple[str, Missing | None]] = []
    references: dict[Path, str] = {}  # each with the first cell that needs it

    def look(cell: Cell, team: Team) -> None:
        if cell.clips is not None:
            found = cell.clips.missing(num_processes)
            if found[0] < cell.clips.question.num_clips:
                missing.append((cell.name, found))
        elif not cell.is_stored:
            missing.append((cell.name, None))
            reference = cell.reference
            if reference is not None and reference not in references and not has_reference(cell):
                references[reference] = cell.name

    looks = [Job(cell.name, cell.name, partial(look, cell), 0) for cell in cells]
    failed = run_each(looks, "cells looked for")
    if missing:
        print(f"{len(missing)} of {len(cells)} cells to make", file=sys.stderr)
    return missing, list(references.values()), failed


def run_cells(
    config: AblateConfig, folder: Path, cells: Sequence[Cell], team: Team
) -> dict[str, str]:
    """Make what is not stored yet; the names of the cells that failed, with their reasons.

    Args:
        cells: all, in the main process; the others make those that it lists.
    """
    (folder / "cells").mkdir(exist_ok=True)
    missing, references, failed = team.first(lambda: list_missing(cells, team.size))
    known = {cell.name: cell for cell in cells}
    if not team.is_main:
        makers = cell_makers(config, folder)
        known = {name: makers[name]() for name, _ in missing}
    runner = Runner(config, LastPipeline(team.processes), team)
    jobs = []
    for name in references:
        of = f"the reference of {name}"
        jobs.append(Job(of, of, partial(make_reference, runner, known[name])))
    run_each(jobs, "references", team)
    jobs = []
    for name, clips in missing:
        cell = known[name]
        if cell.clips is None or clips is None:
            jobs.append(Job(name, name, partial(make_compared, runner, cell)))
        else:
            jobs += cell.clips.jobs(name, clips, runner.models, partial(write_clip, runner, cell))
    return failed | run_each(jobs, "parts of cells" if config.in_world else "cells", team)


def check_models(run: Run[AblateConfig]) -> None:
    """Refuse a typed model that the experiment is not made for, or would never load, options that
    nothing reads where there are prompts, and names of attentions that do not exist.

    Raises:
        WanError: see above.
    """
    config, model = run.config, run.presets.get("model")
    typed = [name for name in OF_WORLD if run.sources.get(name) == "command line"]
    if typed and not config.in_world:
        raise WanError(
            f"{typed[0]}={getattr(config, typed[0])}: for captions of the miniature's world, and "
            "there are prompts; leave it out"
        )
    for setting in config.settings():  # a mistyped name, before anything is made
        check_known(setting.attention.name, {**ATTENTION, **BACKENDS, **SPARSE})
    if config.made_for and model is not None and model not in config.made_for:
        raise WanError(
            f"model={model}: experiment={run.presets['experiment']} is made for "
            f"model={' or '.join(config.made_for)}; leave model= out or take another experiment"
        )
    if config.models and run.sources.get("checkpoint") == "command line":
        raise WanError(
            f"checkpoint=: each of the models {', '.join(config.models)} names its own; change "
            f"that, as in models.{next(iter(config.models))}.checkpoint=.."
        )


def ablate(run: Run[AblateConfig]) -> int:
    """The command; exit code 1 if something failed or there is nothing to report."""
    config = run.config
    check_models(run)
    config.check_world()
    folder = writable_folder(config.output_dir)
    towers = Towers(config, config.device) if config.measures else None
    with Processes.started().together(config.device) as team:
        cells, failed = list_cells(config, folder) if team.is_main else ([], {})
        if not config.report_only:
            failed |= run_cells(config, folder, cells, team)
        if not team.is_main:
            return 0
        stored = [cell for cell in cells if cell.is_stored]
        measured = None
        if towers is not None and stored:
            clips = [Video(cell.video(0), cell.prompt or "") for cell in stored]
            measured = measure(clips, towers, Store(folder / MEASURES_FILE))
        with doing("writing the report"):
            report = write_report(config, stored, failed, folder, measured) if stored else None
        return conclude(report, failed, "cells", folder)
