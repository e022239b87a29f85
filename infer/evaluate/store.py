"""Measurements of clips that are kept in a file, so that only missing clips are made.

A study and an ablation in the world both consist of such files: a model and how it is run, some
captions, and what the detectors read from the clips.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from configs.evaluation import EvaluateConfig
from configs.schema import kept_settings
from infer.evaluate.measure import (
    Example,
    Result,
    draw_examples,
    evaluate,
    read_features,
    read_results,
    write_record,
)
from infer.evaluate.queue import (
    LastPipeline,
    open_source,
    question_key,
    stored_record,
    warm_up,
)
from wan.errors import WanError
from wan.pipeline.arguments import known_dtype
from wan.runtime.offload import resolve_device

STORE_EVERY = 300.0  # seconds of work that an interruption may cost


@dataclass(frozen=True)
class StoredClips:
    """The clips that answer one question, and the file that keeps what was measured.

    Attributes:
        label: names the clips in messages.
        file: the JSON record; features lie beside it (`measure.write_record`).
        weights: digests of the model that makes the clips, taken before the first is made; None
            if no model does.
        about: also written to the head of the record.
    """

    label: str
    question: EvaluateConfig
    file: Path
    weights: dict[str, str] | None
    about: Mapping[str, Any] = field(default_factory=dict)

    def first(self, num_captions: int) -> tuple[EvaluateConfig, list[Example]]:
        """The same question about so many captions only, and its clips."""
        question = replace(self.question, num_captions=num_captions)
        return question, draw_examples(question)

    def read(self) -> dict[str, Any] | None:
        """The record, if it answers this question for fewer, as many or more captions.

        A damaged one, or one whose features are damaged, is none; a line on stderr says so.
        """
        record = stored_record(self.file, self.label)
        if record is None:
            return None
        try:
            read_features(self.file)
        except WanError as error:
            print(f"{self.label}: {error}; its clips are made again", file=sys.stderr)
            return None
        number = record.get("config", {}).get("num_captions", 0)
        if number and record.get("key") == question_key(*self.first(number), self.weights):
            return record
        print(
            f"{self.label}: the {len(record.get('clips', ()))} clips that are stored had other "
            "settings, captions or weights; they are made again",
            file=sys.stderr,
        )
        return None

    def is_complete(self, record: dict[str, Any] | None) -> bool:
        return record is not None and len(record["clips"]) >= self.question.num_clips

    def make_missing(
        self, models: LastPipeline, on_first: Callable[[Tensor], None] | None = None
    ) -> None:
        """Make the clips that are not stored; store them at the end and every few minutes.

        Args:
            on_first: called with the first clip (3, F, H, W), if that is made now.
        Raises:
            WanError: what is stored was made on another machine.
        """
        record, question = self.read(), self.question
        if self.is_complete(record):
            return
        results = [] if record is None else self._continued(record)
        examples = draw_examples(question)
        missing = examples[len(results) :]
        source, plan = open_source(question, models)
        about = {"plan": plan, "warmup_seconds": warm_up(question, missing[0], models)}
        clips = evaluate(missing, source, question.batch_size)
        bar = {"initial": len(results), "unit": "clip", "disable": None}
        last_stored = time.monotonic()
        for result, video in tqdm(clips, self.label, len(examples), **bar):
            if not results and on_first is not None:
                on_first(video)
            results.append(result)
            is_whole = len(results) % question.seeds_per_caption == 0
            if is_whole and time.monotonic() - last_stored >= STORE_EVERY:
                self._write(results, about)
                last_stored = time.monotonic()
        self._write(results, about)
        made = f"{len(missing)} clips made, {len(results)} stored"
        print(f"{self.label}: {made}", file=sys.stderr)

    def _continued(self, record: dict[str, Any]) -> list[Result]:
        """The clips of a record, to add to; one record holds no clips of two machines."""
        now = machine(self.question)
        before = {name: record.get(name) for name in now}
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

    def _write(self, results: Sequence[Result], about: Mapping[str, Any]) -> None:
        """Store the first clips, which belong to whole captions."""
        question, examples = self.first(len(results) // self.question.seeds_per_caption)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_record(
            self.file,
            results,
            key=question_key(question, examples, self.weights),
            config=kept_settings(question.question(), self.file.parent),
            weights=self.weights,
            **machine(self.question),
            **self.about,
            **about,
        )


def machine(config: Any) -> dict[str, Any]:
    """What clips and their seconds depend on besides the settings."""
    device = resolve_device(config.device)
    dtype = str(known_dtype(config.dtype, device)).removeprefix("torch.")
    threads = torch.get_num_threads()
    return {"device": str(device), "dtype": dtype, "threads": threads, "torch": torch.__version__}


def cut(record: dict[str, Any], question: EvaluateConfig) -> dict[str, Any]:
    """A record of as many captions as the question has, where more are stored."""
    record["clips"] = record["clips"][: question.num_clips]
    if "captions" in record:
        record["captions"] = record["captions"][: question.num_captions]
    return record
