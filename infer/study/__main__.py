"""Compare a student with its teacher on the same captions and seeds, and report.

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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from configs.cli import Run, run_jobs
from configs.command_line import CommandLine
from configs.evaluation import CAPTION_SETS, EvaluateConfig, StudyConfig
from infer.evaluate.measure import (
    Example,
    Result,
    draw_examples,
    evaluate,
    read_results,
    write_record,
)
from infer.evaluate.queue import (
    LastPipeline,
    open_source,
    question_key,
    report_failed,
    run_each,
    warm_up,
    weights_of,
)
from infer.sample.record import writable_folder
from infer.sample.request import torch_dtype
from infer.study.report import read_settings, write_report
from wan.errors import WanError
from wan.runtime.offload import resolve_device

LINE = CommandLine(StudyConfig, "study", text_keys=(), path_keys=("output_dir", "checkpoint"))

STORE_EVERY = 300.0  # seconds; what an interruption may cost


@dataclass(frozen=True)
class CaptionSet:
    """A setting's clips of one set of captions, and where they are stored.

    Attributes:
        weights: of the model as it is when the first clip is made or looked for.
    """

    label: str
    question: EvaluateConfig
    weights: dict[str, str] | None
    file: Path

    def first(self, num_captions: int) -> tuple[EvaluateConfig, list[Example]]:
        """The same question of so many captions only, and its clips."""
        question = replace(self.question, num_captions=num_captions)
        return question, draw_examples(question)

    def stored(self) -> dict[str, Any] | None:
        """The record there, if it answers this question for some of its captions, or for more."""
        if not self.file.is_file():
            return None
        record: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))
        key = question_key(*self.first(record["config"]["num_captions"]), self.weights)
        if record["key"] == key:
            return record
        print(
            f"{self.label}: the {len(record['clips'])} clips that are stored had other settings, "
            "captions or weights; they are made again",
            file=sys.stderr,
        )
        return None

    def made(self, record: dict[str, Any]) -> list[Result]:
        """The clips of a record, to go on from.

        Raises:
            WanError: they were made elsewhere; one record would hold clips of two machines.
        """
        now = here(self.question)
        before = {name: record[name] for name in now}
        if before != now:
            there, these = (
                ", ".join(f"{name} {value}" for name, value in place.items())
                for place in (before, now)
            )
            raise WanError(
                f"{self.file}: the {len(record['clips'])} clips there were made with {there}, "
                f"these would be with {these}; go on as before, or choose another output_dir="
            )
        return read_results(self.file, self.first(record["config"]["num_captions"])[1])

    def store(self, results: Sequence[Result], **about: Any) -> None:
        """Write the first clips, all of whole captions."""
        question, examples = self.first(len(results) // self.question.seeds_per_caption)
        key = question_key(question, examples, self.weights)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        about |= {"key": key, "config": question.question(), "weights": self.weights}
        write_record(self.file, results, **about)


def here(config: EvaluateConfig) -> dict[str, Any]:
    """What clips and their seconds depend on that no setting says."""
    device = resolve_device(config.device)
    dtype = str(torch_dtype(config.dtype, device)).removeprefix("torch.")
    threads = torch.get_num_threads()
    return {"device": str(device), "dtype": dtype, "threads": threads, "torch": torch.__version__}


def run_setting(name: str, config: StudyConfig, folder: Path, models: LastPipeline) -> None:
    """Make and measure the clips of one setting that are not stored yet."""
    weights = weights_of(config.evaluation(name, CAPTION_SETS[0]))
    for captions in CAPTION_SETS:
        question = config.evaluation(name, captions)
        file = folder / name / f"{captions}.json"
        clips = CaptionSet(f"{name}, {captions}", question, weights, file)
        record = clips.stored()
        if record is None or len(record["clips"]) < question.num_clips:
            make_clips(clips, [] if record is None else clips.made(record), models)


def make_clips(clips: CaptionSet, made: Sequence[Result], models: LastPipeline) -> None:
    """Make those that are missing, and store all at the end and every few minutes."""
    question, results = clips.question, list(made)
    examples = draw_examples(question)
    missing = examples[len(made) :]
    source, plan = open_source(question, models)
    warmup_seconds = warm_up(question, missing[0], models)
    about = {"plan": plan, "warmup_seconds": warmup_seconds, **here(question)}
    progress = tqdm(
        evaluate(missing, source, question.batch_size),
        clips.label,
        len(examples),
        initial=len(made),
        unit="clip",
        disable=None,
    )
    stored = time.monotonic()
    for result, _ in progress:
        results.append(result)
        whole = len(results) % question.seeds_per_caption == 0
        if whole and time.monotonic() - stored >= STORE_EVERY:
            clips.store(results, **about)
            stored = time.monotonic()
    clips.store(results, **about)
    print(f"{clips.label}: {len(missing)} clips made, {len(results)} stored", file=sys.stderr)


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
