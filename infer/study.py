"""Compare a student with its teacher: many settings, the same captions and seeds, one report.

    python -m infer.study study=mini                    # make what is missing, then the report
    python -m infer.study study=mini report_only=true   # only the report, of what is stored

A study is a YAML file in configs/study/. Results are stored per setting and set of captions. One
whose settings, captions and weights have not changed is not made again, so an interrupted study
goes on where it stopped. A setting that fails is named at the end; the others are still made.
Options of a setting are changed as in settings.teacher_unipc_50.share=0.1.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from configs.evaluation import CAPTION_SETS, EvaluateConfig, StudyConfig
from infer.cli import Run, run_jobs
from infer.command_line import CommandLine
from infer.evaluate import SOURCES, folder_of, generate, sampling
from infer.measure import Example, VideoSource, draw_examples, evaluate, write_record
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
from infer.study_report import read_settings, write_report
from wan.placement import resolve_device

LINE = CommandLine(StudyConfig, "study", text_keys=(), path_keys=("output_dir", "checkpoint"))


def question_key(config: EvaluateConfig, examples: Sequence[Example]) -> str:
    """The key of a result: settings, captions and scenes, and weights."""
    parts: list[Any] = [config.question(), repr(examples)]
    if config.source != "renders":
        parts.append(weight_digests(folder_of(config)))
    return result_key(parts)


def open_source(
    config: EvaluateConfig, models: LastPipeline
) -> tuple[VideoSource, dict[str, Any] | None]:
    """Where the clips come from, and the plan by which a model makes them."""
    if config.source != "model":
        return SOURCES[config.source](config), None
    pipeline = models.get(config)
    size = (config.height, config.width, config.num_frames)
    plan = pipeline.plan(**sampling(config))
    return generate(config, pipeline), plan_record(pipeline, plan, *size)


def warm_up(config: EvaluateConfig, example: Example, models: LastPipeline) -> float:
    """`LastPipeline.warm_up` for clips of captions; what no model makes needs none."""
    if config.source != "model":
        return 0.0
    return models.warm_up(
        config,
        example.said.text,
        negative_prompt=config.negative_prompt,
        height=config.height,
        width=config.width,
        num_frames=config.num_frames,
        max_sequence_length=config.max_sequence_length,
    )


def run_setting(name: str, config: StudyConfig, folder: Path, models: LastPipeline) -> None:
    """Make and measure the clips of one setting that are not stored yet."""
    for captions in CAPTION_SETS:
        question = config.evaluation(name, captions)
        examples = draw_examples(question)
        key = question_key(question, examples)
        file = folder / name / f"{captions}.json"
        if is_stored(file, key):
            continue
        source, plan = open_source(question, models)
        warmup_seconds = warm_up(question, examples[0], models)
        clips = evaluate(examples, source, question.batch_size)
        label = f"{name}, {captions}"
        progress = tqdm(clips, label, len(examples), unit="clip", disable=None)
        results = [result for result, _ in progress]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_record(
            file,
            results,
            key=key,
            config=question.question(),
            plan=plan,
            warmup_seconds=warmup_seconds,
            device=str(resolve_device(question.device)),
            threads=torch.get_num_threads(),
        )
        print(f"{label}: {len(results)} clips", file=sys.stderr)


def run_settings(config: StudyConfig, folder: Path) -> list[str]:
    """Run the settings one after the other; the names of those that failed."""
    models = LastPipeline()
    names = config.only or config.settings
    return run_each({name: partial(run_setting, name, config, folder, models) for name in names})


def main(run: Run[StudyConfig]) -> int:
    """The command; exit code 1 if a setting failed."""
    config = run.config
    folder = writable_folder(config.output_dir)
    failed = [] if config.report_only else run_settings(config, folder)
    stored = read_settings(config, folder)
    if stored:
        print(write_report(config, stored, folder))
    else:
        print(f"{folder}: no stored results to report", file=sys.stderr)
    report_failed(failed, "settings")
    return 1 if failed or not stored else 0


if __name__ == "__main__":
    run_jobs(main, LINE, __doc__ or "")
