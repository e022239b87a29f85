"""What does a choice buy, and what does it cost? Every combination of some settings, measured.

    python -m infer.ablate experiment=attention      # full attention and the rest, 3 and 50 steps
    python -m infer.ablate experiment=steps          # 1 step to 50, teacher and student
    python -m infer.ablate attention=[sdpa,spatial] steps=[4,20] grid.guidance_scale=[1,3]
    python -m infer.ablate model=wan22_ti2v_5b prompt="a fox runs" num_seeds=4 steps=[4,10,20]

Without a prompt, captions of the miniature's world are made and its detectors say whether clips
show them. With prompts, clips of any model are compared with its exact many-step result on the same
noise: that says how near a setting comes to it, and not which of the two is the better video.

What is stored for the same settings and weights is not made again, so an interrupted run goes on
where it stopped. What fails is named at the end, with exit code 1; the rest is still made.
"""

import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from configs.ablation import AblateConfig, Setting
from configs.evaluation import loading_key
from infer.ablate_report import Cell, write_report
from infer.cli import Run, run_jobs
from infer.command_line import CommandLine, Shortcut
from infer.evaluate import folder_of, sampling
from infer.jobs import read_text
from infer.measure import Result, draw_examples, evaluate, write_json, write_record
from infer.record import writable_folder
from infer.resumable import (
    LastPipeline,
    is_stored,
    plan_record,
    report_failed,
    result_key,
    run_each,
    weight_digests,
)
from infer.study import open_source, question_key
from wan.errors import WanError
from wan.measures import flicker, psnr, ssim
from wan.pipeline import WanPipelineOutput
from wan.placement import resolve_device
from wan.video import to_uint8, write_video

LINE = CommandLine(
    AblateConfig,
    "ablate",
    text_keys=("prompt", "negative_prompt"),
    path_keys=("prompt_file", "output_dir", "checkpoint"),
    shortcuts={name: Shortcut(f"grid.{name}") for name in ("attention", "steps", "shift")},
)
MAX_PSNR = 60.0  # dB; of 8-bit pixels that are equal but for one level in a few


@dataclass(frozen=True)
class Runner:
    """What all cells share."""

    config: AblateConfig
    folder: Path
    models: LastPipeline


# --- captions of the world ------------------------------------------------------------------------


def make_captions(runner: Runner, cell: Cell) -> None:
    """Make and read the clips of one setting and seed."""
    question = runner.config.evaluation(cell.setting, cell.seed)
    examples = draw_examples(question)
    source, plan = open_source(question, runner.models)
    results: list[Result] = []
    clips = evaluate(examples, source, question.batch_size)
    for result, video in tqdm(clips, cell.name, len(examples), unit="clip", disable=None):
        if not results:
            write_clip(runner, cell.file.with_suffix(".mp4"), video.nan_to_num(-1))
        results.append(result)
    write_record(cell.file, results, **about(runner, cell, plan))


# --- any prompts ----------------------------------------------------------------------------------


def make_video(
    runner: Runner, setting: Setting, seed: int, prompt: str
) -> tuple[Tensor, dict[str, Any], dict[str, float]]:
    """One clip (3, F, H, W) in [-1, 1], the plan of it, and the seconds of its stages."""
    config = runner.config
    question = config.evaluation(setting)
    pipeline = runner.models.get(question)
    options = sampling(question) | {"guidance_scale_2": config.guidance_scale_2}
    plan = pipeline.plan(**options)
    made = pipeline(
        prompt,
        config.negative_prompt if plan.guided else None,
        config.height,
        config.width,
        config.num_frames,
        seed=seed,
        max_sequence_length=config.max_sequence_length,
        output_type="pt",
        **options,
    )
    assert isinstance(made, WanPipelineOutput)
    video = made.frames[0].transpose(0, 1) * 2 - 1
    frames, height, width = video.shape[1:]
    return video, plan_record(pipeline, plan, height, width, frames), dict(pipeline.last_timings)


def make_reference(runner: Runner, cell: Cell, file: Path) -> None:
    """What cells are compared with, as 8-bit frames (F, H, W, 3)."""
    assert cell.prompt is not None
    setting = runner.config.reference_of(cell.setting)
    try:
        video, _, _ = make_video(runner, setting, cell.seed, cell.prompt)
    except WanError as error:
        raise WanError(
            f"the reference: {error}; reference.checkpoint= names another model to compare with, "
            "reference.steps=null takes the model's own steps"
        ) from error
    frames = torch.from_numpy(to_uint8(video))
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.tmp")
    save_file({"frames": frames}, beside)
    beside.replace(file)


def make_compared(runner: Runner, cell: Cell, reference: Path) -> None:
    """Make one clip and compare it with its reference, both as 8-bit frames."""
    assert cell.prompt is not None
    if not reference.is_file():
        raise WanError("nothing to compare with: the reference failed, see above")
    started, cpu_started = time.perf_counter(), time.process_time()
    video, plan, stages = make_video(runner, cell.setting, cell.seed, cell.prompt)
    elapsed, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    frames = to_uint8(video)
    ours, exact = (
        pixels.permute(3, 0, 1, 2) / 255
        for pixels in (torch.from_numpy(frames), load_file(reference)["frames"])
    )
    measures = {
        "psnr": min(psnr(ours, exact), MAX_PSNR),
        "ssim": ssim(ours, exact),
        "flicker": flicker(ours),
        "reference_flicker": flicker(exact),
    }
    write_clip(runner, cell.file.with_suffix(".mp4"), video)
    clip = {
        "prompt": cell.prompt,
        "seed": cell.seed,
        "measures": measures,
        "seconds": stages["denoise"] + stages["decode"],  # a prompt is encoded once for all cells
        "seconds_in_all": elapsed,
        "cpu_seconds_in_all": cpu_seconds,
        "stages": stages,
    }
    write_json(cell.file, {**about(runner, cell, plan), "clips": [clip]})


def reference_key(config: AblateConfig, cell: Cell) -> str:
    return clip_key(config, config.reference_of(cell.setting), cell.seed, cell.prompt)


def clip_key(config: AblateConfig, setting: Setting, seed: int, prompt: str | None) -> str:
    """The key of one clip: all that its pixels depend on."""
    how = asdict(setting) | loading_key(config)
    for label in ("model", "attention_name"):
        del how[label]
    names = ("guidance_scale_2", "negative_prompt", "max_sequence_length", "height", "width")
    rest = [getattr(config, name) for name in (*names, "num_frames", "device", "dtype")]
    return result_key(
        [how, rest, seed, prompt, weight_digests(folder_of(config.evaluation(setting)))]
    )


# --- the grid -------------------------------------------------------------------------------------


def about(runner: Runner, cell: Cell, plan: dict[str, Any] | None) -> dict[str, Any]:
    """The head of a record."""
    return {
        "key": cell.key,
        "setting": asdict(cell.setting),
        "seed": cell.seed,
        "plan": plan,
        "device": str(resolve_device(runner.config.device)),
        "threads": torch.get_num_threads(),
    }


def write_clip(runner: Runner, file: Path, video: Tensor) -> None:
    write_video(file, to_uint8(video), runner.config.fps or 8)


def read_prompts(config: AblateConfig) -> list[str | None]:
    """The prompts; None alone stands for captions of the world."""
    if config.prompt_file is None:
        return [config.prompt]
    path = Path(config.prompt_file).expanduser()
    prompts: list[str | None] = [line.strip() for line in read_text(path).split("\n")]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise WanError(f"prompt_file={path}: no prompt in it; write one per line")
    if len(set(prompts)) < len(prompts):
        raise WanError(f"prompt_file={path}: a prompt is there twice; num_seeds= makes more of it")
    return prompts


def list_cells(config: AblateConfig, folder: Path) -> tuple[list[Cell], list[str]]:
    """All cells, and the names of those whose model is not there."""
    cells: list[Cell] = []
    prompts = read_prompts(config)

    def add(setting: Setting, name: str, seed: int, number: int, prompt: str | None) -> None:
        if prompt is None:
            question = config.evaluation(setting, seed)
            key = question_key(question, draw_examples(question))
        else:
            key = clip_key(config, setting, seed, prompt)
            key = result_key([key, clip_key(config, config.reference_of(setting), seed, prompt)])
        cells.append(Cell(setting, seed, prompt, number, name, key, folder / "cells"))

    entries = {}
    for setting in config.settings():
        for number, prompt in enumerate(prompts):
            for seed in config.seeds:
                where = f", prompt {number + 1}" if len(prompts) > 1 else ""
                name = f"{', '.join(setting.axes().values())}{where}, seed {seed}"
                entries[name] = partial(add, setting, name, seed, number, prompt)
    return cells, run_each(entries)


def run_cells(config: AblateConfig, folder: Path, cells: list[Cell]) -> list[str]:
    """Make what is not stored yet; the names of the cells that failed."""
    (folder / "cells").mkdir(exist_ok=True)
    runner = Runner(config, folder, LastPipeline())
    missing = [cell for cell in cells if not is_stored(cell.file, cell.key)]
    if missing:
        print(f"{len(missing)} of {len(cells)} cells to make", file=sys.stderr)
    if config.in_world:
        return run_each({cell.name: partial(make_captions, runner, cell) for cell in missing})
    files = {
        cell.name: folder / "references" / f"{reference_key(config, cell)[:16]}.safetensors"
        for cell in missing
    }
    first = {files[cell.name]: cell for cell in reversed(missing) if not files[cell.name].is_file()}
    run_each(
        {
            f"the reference of {cell.name}": partial(make_reference, runner, cell, file)
            for file, cell in reversed(first.items())
        }
    )
    return run_each(
        {cell.name: partial(make_compared, runner, cell, files[cell.name]) for cell in missing}
    )


def main(run: Run[AblateConfig]) -> int:
    """The command; exit code 1 if something failed or there is nothing to report."""
    config = run.config
    config.check_world()
    folder = writable_folder(config.output_dir)
    cells, failed = list_cells(config, folder)
    if not config.report_only:
        failed += run_cells(config, folder, cells)
    stored = [cell for cell in cells if is_stored(cell.file, cell.key)]
    if stored:
        print(write_report(config, stored, failed, folder))
    else:
        print(f"{folder}: no stored results to report", file=sys.stderr)
    report_failed(failed, "cells")
    return 1 if failed or not stored else 0


if __name__ == "__main__":
    run_jobs(main, LINE, __doc__ or "")
