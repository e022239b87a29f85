"""Clips of one question that are made in parts, each a file, until all of them are there.

So several processes can make them, and an interruption costs no more than the part at hand.
"""

import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.evaluation import EvaluateConfig
from configs.schema import kept_settings
from infer.evaluate.measure import (
    Example,
    Result,
    VideoSource,
    draw_examples,
    evaluate,
    read_results,
    write_results,
)
from infer.evaluate.queue import question_key, result_key, weights_of
from wan.errors import WanError
from wan.files import read_sealed
from wan.pipeline.arguments import known_dtype
from wan.runtime.offload import resolve_device

NAME = re.compile(r"(\d{1,9})-(\d{1,9})\.json")
OWN = re.compile(r"(row|\d{1,9})-\d{1,9}\.(json|safetensors)")
Range = tuple[int, int]  # the first clip and the one after the last
Seen = Callable[[int, Result, Tensor], None]


@dataclass(frozen=True)
class ClipParts:
    """The parts of a question's clips, in a folder that is gone when they have been joined.

    Attributes:
        label: names the clips in messages.
        weights: digests of the model that makes the clips; None if no model does, or if nothing is
            to be found again.
        with_rows: each part was made with `row_file`s beside it.
    """

    label: str
    question: EvaluateConfig
    folder: Path
    weights: dict[str, str] | None
    with_rows: bool = False

    @cached_property
    def examples(self) -> list[Example]:
        return draw_examples(self.question)

    def file(self, part: Range) -> Path:
        return self.folder / f"{part[0]:06}-{part[1]:06}.json"

    def row_file(self, number: int) -> Path:
        """Where frames of a clip may be kept."""
        return self.folder / f"row-{number:06}.safetensors"

    def key(self, part: Range) -> str:
        """What a part answers, whatever the number of captions is in all."""
        one = replace(self.question, num_captions=1)
        key = question_key(one, self.examples[slice(*part)], self.weights)
        return result_key([key, "rows"]) if self.with_rows else key

    def stored(self, at_least: int = 0) -> list[Range]:
        """The parts that are there, undamaged, and answer this question; those from a clip on.

        Raises:
            WanError: one was made on another machine.
        """
        found, known = [], at_least
        for file in sorted(self.folder.glob("*.json")):
            if not (match := NAME.fullmatch(file.name)):
                continue
            part = int(match[1]), int(match[2])
            try:
                record = read_sealed(file)
                if part[0] < known or record.get("key") != self.key(part):
                    continue
                read_results(file, self.examples[slice(*part)])
            except (WanError, OSError) as error:
                print(f"{self.label}: {error}; it is made again", file=sys.stderr)
                file.unlink(missing_ok=True)
                continue
            check_machine(file, record, self.question)
            found.append(part)
            known = part[1]
        return found

    def missing(self, at_least: int, num_processes: int) -> list[Range]:
        """What is not stored, in parts of at most a batch, so that every process has one.

        Args:
            at_least: the first clip that is needed.
        """
        gaps, known = [], at_least
        for start, stop in [*self.stored(at_least), (self.question.num_clips,) * 2]:
            gaps.append((known, start))
            known = stop
        count = sum(stop - start for start, stop in gaps)
        size = max(1, min(self.question.batch_size, -(-count // num_processes)))
        return [
            (first, min(first + size, stop))
            for start, stop in gaps
            for first in range(start, stop, size)
        ]

    def make(
        self,
        part: Range,
        source: VideoSource,
        about: Mapping[str, Any],
        processes: int = 1,
        seen: Seen | None = None,
    ) -> None:
        """Make the clips of a part and store it.

        Args:
            about: written to the head of its record.
            processes: how many make clips at once.
            seen: called with each clip's number, result and video (3, F, H, W).
        Raises:
            WanError: the weights are not those that the parts were begun with.
        """
        if self.weights is not None and weights_of(self.question) != self.weights:
            raise WanError("the model's weights have changed since the command began; run it again")
        self.folder.mkdir(parents=True, exist_ok=True)
        examples = self.examples[slice(*part)]
        results: list[Result] = []
        clips = evaluate(examples, source, len(examples))
        for number, (result, video) in enumerate(clips, part[0]):
            results.append(replace(result, processes=processes))
            if seen is not None:
                seen(number, results[-1], video)
        kept = kept_settings(self.question.question(), self.folder)
        head = {"key": self.key(part), "config": kept, **machine(self.question), **about}
        write_results(self.file(part), results, **head)

    def joined(self, at_least: int = 0) -> tuple[list[Result], list[dict[str, Any]]]:
        """The results of all parts from a clip on, and the parts' records."""
        results: list[Result] = []
        records = []
        for part in self.stored(at_least):
            file = self.file(part)
            results += read_results(file, self.examples[slice(*part)])
            records.append(read_sealed(file))
        return results, records

    def remove(self) -> None:
        """Remove the parts, and the folder if nothing else is in it."""
        for file in self.folder.glob("*"):
            if OWN.fullmatch(file.name):
                file.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()


def machine(config: Any) -> dict[str, Any]:
    """What clips and their seconds depend on besides the settings."""
    device = resolve_device(config.device)
    dtype = str(known_dtype(config.dtype, device)).removeprefix("torch.")
    threads = torch.get_num_threads()
    return {"device": str(device), "dtype": dtype, "threads": threads, "torch": torch.__version__}


def check_machine(file: Path, record: Mapping[str, Any], config: EvaluateConfig) -> None:
    """Refuse to go on with clips of another machine: one record holds none of two.

    Raises:
        WanError: names both.
    """
    now = machine(config)
    before = {name: record.get(name) for name in now}
    if before != now:
        there, these = (
            ", ".join(f"{name} {value}" for name, value in place.items()) for place in (before, now)
        )
        raise WanError(
            f"{file}: the {len(record['clips'])} clips there were made with {there}, "
            f"these would be with {these}; go on as before, or choose another place to store them"
        )
