"""Measurements of clips that are kept in a file, so that only missing clips are made.

A study and an ablation in the world both consist of such files: a model and how it is run, some
captions, and what the detectors read from the clips. Until all clips are there, they lie beside it
in parts, which several processes can make.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from configs.evaluation import EvaluateConfig
from configs.schema import kept_settings
from infer.evaluate.measure import (
    Example,
    Result,
    draw_examples,
    read_features,
    read_results,
    write_record,
)
from infer.evaluate.parts import ClipParts, Range, check_machine, machine
from infer.evaluate.queue import (
    Job,
    LastPipeline,
    open_source,
    question_key,
    stored_record,
    warm_up,
)
from infer.processes import Team
from wan.errors import WanError
from wan.files import read_sealed
from wan.media.video import to_uint8, write_video

Missing = tuple[int, list[Range]]  # clips of the record that are kept, parts to make after them


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

    @cached_property
    def parts(self) -> ClipParts:
        folder = self.file.with_suffix(".parts")
        return ClipParts(self.label, self.question, folder, self.weights)

    def missing(self, num_processes: int) -> Missing:
        """What `jobs` is to make. What is stored of other settings or weights is renamed.

        Raises:
            WanError: what is stored was made on another machine.
        """
        record = self.read()
        if record is None:
            self._set_aside()
            return 0, self.parts.missing(0, num_processes)
        kept = len(record["clips"])
        if self.is_complete(record):
            return kept, []
        check_machine(self.file, record, self.question)
        return kept, self.parts.missing(kept, num_processes)

    def _set_aside(self) -> None:
        """Rename a sound record of another question, so that it is not written over."""
        try:
            record = read_sealed(self.file)
        except (WanError, OSError):
            return
        number = record.get("config", {}).get("num_captions", 0)
        key = str(record.get("key", ""))
        if not number or key == question_key(*self.first(number), self.weights):
            return
        aside = self.file.with_name(f"{self.file.stem}-{key[:8]}.json")
        for ending in (".json", ".safetensors", ".clips"):
            place = self.file.with_suffix(ending)
            if place.exists() and not aside.with_suffix(ending).exists():
                place.rename(aside.with_suffix(ending))
        print(f"{self.label}: what was stored is kept as {aside.name}", file=sys.stderr)

    def jobs(
        self,
        name: str,
        missing: Missing,
        models: LastPipeline,
        keep: Callable[[int, Tensor], None],
    ) -> list[Job]:
        """The making of what is missing, in parts; whoever makes the last one writes the record.

        Args:
            name: what the clips belong to; if one part fails, no others of that name are begun.
            keep: called with number and video (3, F, H, W) of the first `keep_clips` clips, of
                those that are made now.
        """
        kept, parts = missing
        if kept >= self.question.num_clips:
            return []
        parts = [(start, stop) for start, stop in parts]

        def make(part: Range | None, team: Team) -> None:
            if part is not None:
                self._make(part, models, team, keep)
            done = team.tally(f"parts of {self.file}", 1)
            if done == max(1, len(parts)):
                self._join(kept)

        if not parts:  # all were made by a process that was killed before it joined them
            return [Job(name, f"{self.label}, to be joined", partial(make, None), 0)]
        return [
            Job(
                name,
                f"{self.label}, clips {start} to {stop}",
                partial(make, (start, stop)),
                stop - start,
            )
            for start, stop in parts
        ]

    def _make(
        self,
        part: Range,
        models: LastPipeline,
        team: Team,
        keep: Callable[[int, Tensor], None],
    ) -> None:
        source, plan = open_source(self.question, models)
        first = self.parts.examples[part[0]]
        about = {"plan": plan, "warmup_seconds": warm_up(self.question, first, models)}

        def seen(number: int, result: Result, video: Tensor) -> None:
            if number < self.question.keep_clips:
                keep(number, video)

        self.parts.make(part, source, about, team.size, seen)

    def _join(self, kept: int) -> None:
        """Write the record: the clips that are kept, and those of the parts."""
        record = self.read() if kept else None
        results: list[Result] = []
        if record is not None:
            results = read_results(self.file, self.first(record["config"]["num_captions"])[1])
        more, heads = self.parts.joined(kept)
        results = [*results[:kept], *more]
        question = self.question
        write_record(
            self.file,
            results,
            key=question_key(question, self.parts.examples, self.weights),
            config=kept_settings(question.question(), self.file.parent),
            weights=self.weights,
            **machine(question),
            **self.about,
            plan=heads[-1]["plan"],
            warmup_seconds=max(head["warmup_seconds"] for head in heads),
        )
        self.parts.remove()
        made = f"{len(more)} clips made, {len(results)} stored"
        print(f"{self.label}: {made}", file=sys.stderr)


def kept_clip(record: Path, number: int) -> Path:
    """Where a clip of a record is kept to look at."""
    return record.with_suffix(".clips") / f"{number:06}.mp4"


def keep_clip(file: Path, video: Tensor, fps: float) -> None:
    """Write a clip (3, F, H, W) to look at; black where there is no number.

    An mp4 holds even sizes only: a clip of another size is not kept.
    """
    if not any(size % 2 for size in video.shape[2:]):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_video(file, to_uint8(video.nan_to_num(-1)), fps)


def cut(record: dict[str, Any], question: EvaluateConfig) -> dict[str, Any]:
    """A record of as many captions as the question has, where more are stored."""
    record["clips"] = record["clips"][: question.num_clips]
    if "captions" in record:
        record["captions"] = record["captions"][: question.num_captions]
    return record
