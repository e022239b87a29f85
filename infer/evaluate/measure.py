"""What clips of the miniature's captions show: measured by detectors, summarised and stored.

A `VideoSource` makes the clips: the world itself, an autoencoder or a model.
"""

import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.evaluation import EvaluateConfig
from wan.errors import check_names
from wan.files import read_sealed, sealed, write_text
from wan.miniature.captions import Caption, caption, sample_scene_for
from wan.miniature.detect import DetectedObject, Detection, Score, detect, score
from wan.miniature.metrics import (
    MEASURES,
    PARTS,
    clip_features,
    clip_measures,
    frechet_distance,
    kernel_distance,
    kernel_terms,
    seed_diversity,
    shown_by_clip,
    shown_by_scene,
)
from wan.miniature.world import ATTRIBUTES, OBJECT_ATTRIBUTES, Scene, render, sample_scene
from wan.weights.checked import read_checked, write_checked

# B batch, F frames, H W pixels, D features

NAMES = ("count", "background", *OBJECT_ATTRIBUTES)
NONE = "none"  # in a confusion: nothing of this kind was recognised
CONFIDENCE = 1.959964  # two-sided 95 % of a normal distribution

VideoSource = Callable[[Sequence["Example"]], Tensor]


@dataclass(frozen=True)
class Example:
    """One clip to make: a caption, two scenes that fulfil it, and the seed of the noise.

    Attributes:
        number: the caption's; clips of one caption follow each other.
        scene: what source=renders shows.
        truth: another scene, which all sources are compared with.
    """

    number: int
    scene: Scene
    truth: Scene
    caption: Caption
    seed: int


@dataclass(frozen=True)
class Result:
    """One clip, read and compared with its caption.

    Attributes:
        features, truth: (D,) of the clip and of the example's true scene.
        num_frames: of both.
        seconds, cpu_seconds: time to make the clip, without loading and measuring; the second adds
            up all threads, and is the same on a machine that is busy with something else.
        processes: how many made clips at once; on one machine they slow each other down.
    """

    example: Example
    detection: Detection
    features: Tensor
    truth: Tensor
    num_frames: int
    seconds: float
    cpu_seconds: float
    processes: int = 1

    @cached_property
    def score(self) -> Score:
        return score(self.detection, self.example.caption)


def draw_examples(config: EvaluateConfig) -> list[Example]:
    """The captions of a seed: the first n of them don't depend on how many are drawn."""
    examples: list[Example] = []
    for number in range(config.num_captions):
        rng = random.Random(f"evaluate/{config.seed}/{number}")  # no scene that training draws
        scene = sample_scene(rng, config.split, config.num_objects, config.num_frames)
        stated = caption(scene, rng, config.omit)
        for _ in range(config.seeds_per_caption):
            truth = sample_scene_for(stated, rng, config.split, config.num_frames)
            examples.append(Example(number, scene, truth, stated, config.seed + len(examples)))
            scene = sample_scene_for(stated, rng, config.split, config.num_frames)
    return examples


def evaluate(
    examples: Sequence[Example], source: VideoSource, batch_size: int
) -> Iterator[tuple[Result, Tensor]]:
    """Make every clip and read it: (result, video (3, F, H, W)) in order.

    A clip with a number that is not finite counts as a black one: nothing in it is right.
    """
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        started, cpu_started = time.perf_counter(), time.process_time()
        videos = source(batch)
        seconds = (time.perf_counter() - started) / len(batch)
        cpu_seconds = (time.process_time() - cpu_started) / len(batch)
        for example, video in zip(batch, videos, strict=True):
            seen = video if video.isfinite().all() else torch.full_like(video, -1)
            truth = render([example.truth], *video.shape[1:])[0]
            features = clip_features(seen), clip_features(truth)
            num_frames = video.shape[1]
            result = Result(example, detect(seen), *features, num_frames, seconds, cpu_seconds)
            yield result, video


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a share, from `right` of `total` draws.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    z2 = CONFIDENCE**2
    centre = (right + z2 / 2) / (total + z2)
    half = CONFIDENCE / (total + z2) * math.sqrt(right * (total - right) / total + z2 / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def summarise(results: Sequence[Result]) -> dict[str, Any]:
    """All numbers of an evaluation.

    Returns:
        "joint", "joint_of_other_caption" and "attributes": accuracy, right, total and 95 %
        interval each. The second scores every clip against the next example's caption: what a
        model that doesn't read its prompt would get; of two or more captions. Intervals are of
        independent clips: with several seeds per caption they are too narrow.
        "confusion": attribute -> stated value -> seen value -> times.
        "measures": means over clips of `clip_measures`.
        "distance": of all features and of each part, "kernel" and "frechet"; of two or more clips.
        "diversity": means over captions of `seed_diversity`, "clips" and "truth"; with several
        seeds per caption only.
        "seconds_per_video", "cpu_seconds_per_video": the median clip's.
    """
    verdicts: dict[str, list[bool]] = {name: [] for name in NAMES}
    for result in results:
        for name, statements in result.score.attributes.items():
            verdicts[name].extend(statements)
    seeds = sum(result.example.number == results[0].example.number for result in results)
    following = [*results[seeds:], *results[:seeds]]
    other = [
        score(result.detection, next_one.example.caption).joint
        for result, next_one in zip(results, following, strict=True)
    ]
    measured = [clip_measures(result.example.caption, result.score) for result in results]
    summary = {
        "joint": _share([result.score.joint for result in results]),
        "attributes": {name: _share(seen) for name, seen in verdicts.items() if seen},
        "confusion": {name: _confusion(results, name) for name in OBJECT_ATTRIBUTES},
        "measures": {name: _mean(clip[name] for clip in measured) for name in MEASURES},
        "seconds_per_video": statistics.median(result.seconds for result in results),
        "cpu_seconds_per_video": statistics.median(result.cpu_seconds for result in results),
    }
    if len(results) > seeds:
        summary["joint_of_other_caption"] = _share(other)
    if len(results) > 1:
        summary["distance"] = _distances(results)
    if seeds > 1:
        captions = caption_diversities(results)
        summary["diversity"] = {
            of: {name: _mean(one[of][name] for one in captions) for name in captions[0][of]}
            for of in ("clips", "truth")
        }
    return summary


def _distances(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    clips = torch.stack([result.features for result in results])
    truth = torch.stack([result.truth for result in results])
    return {
        part: {
            "kernel": float(kernel_distance(kernel_terms(clips[:, columns], truth[:, columns]))),
            "frechet": frechet_distance(clips[:, columns], truth[:, columns]),
        }
        for part, columns in PARTS.items()
    }


def caption_diversities(results: Sequence[Result]) -> list[dict[str, dict[str, float | None]]]:
    """`seed_diversity` of each caption: of its clips, and of as many true scenes."""
    diversities = []
    for _, group in itertools.groupby(results, lambda result: result.example.number):
        clips = list(group)
        shown = [shown_by_clip(one.example.caption, one.detection, one.score) for one in clips]
        true = [
            shown_by_scene(one.example.caption, one.example.truth, one.num_frames) for one in clips
        ]
        diversities.append({"clips": seed_diversity(shown), "truth": seed_diversity(true)})
    return diversities


def _share(verdicts: Sequence[bool]) -> dict[str, Any]:
    right, total = sum(verdicts), len(verdicts)
    interval = wilson_interval(right, total)
    return {"accuracy": right / total, "right": right, "total": total, "interval": interval}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _confusion(results: Sequence[Result], name: str) -> dict[str, dict[str, int]]:
    """How often a stated value (outer key) was seen as a value or as none (inner key)."""
    seen_as = (*ATTRIBUTES[name], NONE)
    table = {value: dict.fromkeys(seen_as, 0) for value in ATTRIBUTES[name]}
    for result in results:
        for stated, item in zip(result.example.caption.objects, result.score.matches, strict=True):
            value, seen = getattr(stated, name), getattr(item, name, None)
            if value is not None:
                table[value][seen or NONE] += 1
    return table


def table(summary: dict[str, Any]) -> str:
    """The summary as text."""
    rows = {"all that was stated": summary["joint"]} | summary["attributes"]
    if "joint_of_other_caption" in summary:
        rows["another caption's"] = summary["joint_of_other_caption"]
    lines = [f"{'':<20} {'right':>7} {'of':>6} {'share':>8}   95 % interval"]
    for name, share in rows.items():
        low, high = share["interval"]
        lines.append(
            f"{name:<20} {share['right']:>7} {share['total']:>6} {share['accuracy']:>8.1%}   "
            f"{low:.1%} to {high:.1%}"
        )
    shapes = summary["confusion"]["shape"]
    lines += ["", f"{'shape (seen as)':<20}" + "".join(f" {name:>9}" for name in (*shapes, NONE))]
    for shape, counts in shapes.items():
        lines.append(f"{shape:<20}" + "".join(f" {count:>9}" for count in counts.values()))
    lines.append("")
    numbers = dict(summary["measures"])
    for part, distances in summary.get("distance", {}).items():
        numbers |= {f"{name} distance, {part}": value for name, value in distances.items()}
    for of, diversity in summary.get("diversity", {}).items():
        numbers |= {f"{name} over seeds, {of}": value for name, value in diversity.items()}
    for name in ("seconds", "cpu_seconds"):
        numbers[f"{name} per video"] = summary[f"{name}_per_video"]
    for name, value in numbers.items():
        lines.append(f"{name:<28} {'-' if value is None else format(value, '.3f'):>7}")
    return "\n".join(lines)


def to_json(result: Result) -> dict[str, Any]:
    """One clip's line of the record."""
    return {
        **({"processes": result.processes} if result.processes > 1 else {}),
        "prompt": result.example.caption.text,
        "seed": result.example.seed,
        "stated": {
            "background": result.example.caption.background,
            "objects": [asdict(stated) for stated in result.example.caption.objects],
        },
        "seen": asdict(result.detection),
        "right": result.score.attributes,
        "joint": result.score.joint,
        "measures": clip_measures(result.example.caption, result.score),
        "seconds": result.seconds,
        "cpu_seconds": result.cpu_seconds,
    }


def write_record(file: Path, results: Sequence[Result], **more: Any) -> None:
    """Everything that was measured, and its summary; see `write_results`."""
    summary = summarise(results)
    about = {**more, "summary": summary}
    if "diversity" in summary:
        about["captions"] = caption_diversities(results)
    write_results(file, results, **about)


def write_results(file: Path, results: Sequence[Result], **more: Any) -> None:
    """Every clip's line as JSON, and beside it a .safetensors file with the features.

    Features come first: a record that is there is complete. `more` goes to its top.
    """
    features = {
        "clips": torch.stack([result.features for result in results]),
        "truth": torch.stack([result.truth for result in results]),
    }
    write_checked(file.with_suffix(".safetensors"), features)
    record = {"torch": torch.__version__, **more}
    record = sealed(record | {"clips": [to_json(result) for result in results]})
    clips = ",\n".join("  " + json.dumps(clip) for clip in record.pop("clips"))
    head = json.dumps(record, indent=1)[:-2]
    write_text(file, f'{head},\n "clips": [\n{clips}\n ]\n}}\n')


def read_features(file: Path) -> dict[str, Tensor]:
    """The features beside a record: "clips" and "truth", (N, D) each.

    Raises:
        WanError: they are damaged or not there.
    """
    features = read_checked(file.with_suffix(".safetensors"))
    check_names(str(file.with_suffix(".safetensors")), ["clips", "truth"], list(features))
    return features


def read_results(file: Path, examples: Sequence[Example]) -> list[Result]:
    """The results that `write_results` wrote of these examples."""
    record, features = read_sealed(file), read_features(file)
    num_frames = record["config"]["num_frames"]
    results = []
    for index, (example, clip) in enumerate(zip(examples, record["clips"], strict=True)):
        objects = tuple(DetectedObject(**item) for item in clip["seen"]["objects"])
        detection = Detection(clip["seen"]["background"], objects)
        own = features["clips"][index], features["truth"][index]
        how = clip["seconds"], clip["cpu_seconds"], clip.get("processes", 1)
        results.append(Result(example, detection, *own, num_frames, *how))
    return results
