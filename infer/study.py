"""Compare a student with its teacher: many settings, the same captions and seeds, one report.

    python -m infer.study study=mini                    # make what is missing, then the report
    python -m infer.study study=mini report_only=true   # only the report, of what is stored

A study is a YAML file in configs/study/. Results are stored per setting and set of captions, every
few minutes too. Clips whose settings, captions and weights have not changed are not made again: an
interrupted study goes on where it stopped, and of more captions only the new ones are made. A
setting that fails is named at the end; the others are still made. Options of a setting are changed
as in settings.teacher_unipc_50.share=0.1.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from configs.evaluation import CAPTION_SETS, EvaluateConfig, StudyConfig
from infer.cli import Run, run_jobs
from infer.command_line import CommandLine
from infer.evaluate import SOURCES, folder_of, generate, sampling
from infer.measure import (
    Example,
    Result,
    VideoSource,
    draw_examples,
    evaluate,
    read_results,
    write_record,
)
from infer.record import writable_folder
from infer.resumable import (
    LastPipeline,
    plan_record,
    report_failed,
    result_key,
    run_each,
    weight_digests,
)
from infer.study_report import read_settings, write_report
from wan.placement import resolve_device

LINE = CommandLine(StudyConfig, "study", text_keys=(), path_keys=("output_dir", "checkpoint"))

STORE_EVERY = 300.0  # seconds


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


def stored_results(file: Path, question: EvaluateConfig) -> list[Result]:
    """What is stored of a question's clips, or the first of them; there may be more than asked."""
    if not file.is_file():
        return []
    record = json.loads(file.read_text(encoding="utf-8"))
    asked = replace(question, num_captions=record["config"]["num_captions"])
    examples = draw_examples(asked)
    if record["key"] != question_key(asked, examples):
        return []
    return read_results(file, examples)


def run_setting(name: str, config: StudyConfig, folder: Path, models: LastPipeline) -> None:
    """Make and measure the clips of one setting that are not stored yet."""
    for captions in CAPTION_SETS:
        question = config.evaluation(name, captions)
        file = folder / name / f"{captions}.json"
        results = stored_results(file, question)
        if len(results) >= question.num_clips:
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        make_results(f"{name}, {captions}", question, results, file, models)


def make_results(
    label: str, question: EvaluateConfig, results: list[Result], file: Path, models: LastPipeline
) -> None:
    """Make what `results` lacks of a question, and store it at its end and every few minutes."""
    examples = draw_examples(question)
    missing = examples[len(results) :]
    source, plan = open_source(question, models)
    about = {
        "plan": plan,
        "warmup_seconds": warm_up(question, missing[0], models),
        "device": str(resolve_device(question.device)),
        "threads": torch.get_num_threads(),
    }

    def store() -> None:
        done = replace(question, num_captions=len(results) // question.seeds_per_caption)
        key = question_key(done, examples[: len(results)])
        write_record(file, results, key=key, config=done.question(), **about)

    stored = time.monotonic()
    clips = evaluate(missing, source, question.batch_size)
    for result, _ in tqdm(
        clips, label, len(examples), initial=len(results), unit="clip", disable=None
    ):
        results.append(result)
        whole = len(results) % question.seeds_per_caption == 0
        if whole and time.monotonic() - stored >= STORE_EVERY:
            store()
            stored = time.monotonic()
    store()
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
