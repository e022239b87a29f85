"""Measure how often videos show what their captions say.

Captions of the miniature's world go in; analytic detectors read what came out. A clip counts as
right only if every stated attribute and the number of objects are. Example:

    python -m infer.evaluate num_captions=512 split=heldout output=outputs/evaluation.json

Two ceilings need no trained transformer: source=renders scores the world's own renders (how good
the detectors are), source=vae the same renders through the autoencoder (how much it keeps).
"""

import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from configs.evaluation import EvaluateConfig
from infer.cli import Run, run_jobs
from infer.command_line import CommandLine, Shortcut
from infer.request import checkpoint_name, torch_dtype
from wan.checkpoint import open_checkpoint
from wan.errors import WanError
from wan.hub import resolve_model
from wan.miniature.captions import Caption, caption
from wan.miniature.detect import Detection, Score, detect, score
from wan.miniature.world import (
    ATTRIBUTES,
    OBJECT_ATTRIBUTES,
    Scene,
    render,
    sample_scene,
)
from wan.pipeline import PIPELINES, WanPipelineOutput
from wan.pipeline_config import read_index
from wan.placement import resolve_device
from wan.tokenizer import read_json_object
from wan.vae import VAEConfig, WanVAE
from wan.weights import load_module

# B batch, F frames, H W pixels

LINE = CommandLine(
    EvaluateConfig,
    "evaluate",
    text_keys=("negative_prompt",),
    path_keys=("checkpoint", "output", "sheet"),
    shortcuts={
        "steps": Shortcut("sampler.steps", clears=("sampler.timesteps",)),
        "timesteps": Shortcut("sampler.timesteps", clears=("sampler.steps",)),
        "shift": Shortcut("sampler.shift"),
    },
)

NAMES = ("count", "background", *OBJECT_ATTRIBUTES)
NONE = "none"  # in a confusion: nothing of this kind was recognised
MEASURES = ("shape_iou", "residual", "motion_ratio", "saturation_ratio", "permanence")
CONFIDENCE = 1.959964  # two-sided 95 % of a normal distribution
SHEET_ROWS, SHEET_FRAMES = 16, 5

VideoSource = Callable[[Sequence["Example"]], Tensor]


@dataclass(frozen=True)
class Example:
    """One caption to fulfil, with a scene that would, and the seed of the noise."""

    scene: Scene
    said: Caption
    seed: int


@dataclass(frozen=True)
class Result:
    """One clip, read and compared with its caption."""

    example: Example
    detection: Detection
    score: Score


def draw_examples(config: EvaluateConfig) -> list[Example]:
    """The captions of a seed: the first n of them don't depend on how many are drawn."""
    examples = []
    for index in range(config.num_captions):
        rng = random.Random(f"evaluate/{config.seed}/{index}")  # no scene that training draws
        scene = sample_scene(rng, config.split, config.num_objects, config.num_frames)
        examples.append(Example(scene, caption(scene, rng, config.omit), config.seed + index))
    return examples


def evaluate(
    examples: Sequence[Example], source: VideoSource, batch_size: int
) -> Iterator[tuple[Result, Tensor]]:
    """Make every clip and read it: (result, video (3, F, H, W)) in order.

    A clip with a number that is not finite shows nothing: all that was asked of it is wrong.
    """
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        for example, video in zip(batch, source(batch), strict=True):
            shown = detect(video) if video.isfinite().all() else Detection(None, ())
            yield Result(example, shown, score(shown, example.said)), video


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a share that was seen `right` times in `total`.

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
        model that doesn't read its prompt would get.
        "confusion": attribute -> stated value -> seen value -> times.
        "measures": means over the detected objects of `DetectedObject`'s fields of these names.
    """
    verdicts: dict[str, list[bool]] = {name: [] for name in NAMES}
    for result in results:
        for name, statements in result.score.attributes.items():
            verdicts[name].extend(statements)
    following = [*results[1:], *results[:1]]
    other = [
        score(result.detection, next_one.example.said).joint
        for result, next_one in zip(results, following, strict=True)
    ]
    matches = [item for result in results for item in result.score.matches if item is not None]
    return {
        "joint": _share([result.score.joint for result in results]),
        "joint_of_other_caption": _share(other),
        "attributes": {name: _share(seen) for name, seen in verdicts.items() if seen},
        "confusion": {name: _confusion(results, name) for name in OBJECT_ATTRIBUTES},
        "measures": {name: _mean(getattr(item, name) for item in matches) for name in MEASURES},
    }


def _share(verdicts: Sequence[bool]) -> dict[str, Any]:
    right, total = sum(verdicts), len(verdicts)
    interval = wilson_interval(right, total)
    return {"accuracy": right / total, "right": right, "total": total, "interval": interval}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _confusion(results: Sequence[Result], name: str) -> dict[str, dict[str, int]]:
    """Times that a stated value (outer) was seen as a value or as none (inner)."""
    seen_as = (*ATTRIBUTES[name], NONE)
    table = {value: dict.fromkeys(seen_as, 0) for value in ATTRIBUTES[name]}
    for result in results:
        for stated, item in zip(result.example.said.objects, result.score.matches, strict=True):
            value, seen = getattr(stated, name), getattr(item, name, None)
            if value is not None:
                table[value][seen or NONE] += 1
    return table


def table(summary: dict[str, Any]) -> str:
    """The summary for people."""
    rows = {"all that was stated": summary["joint"]} | summary["attributes"]
    rows["another caption's"] = summary["joint_of_other_caption"]
    lines = [f"{'':<20} {'right':>7} {'of':>6} {'share':>8}   95 % interval"]
    for name, share in rows.items():
        low, high = share["interval"]
        lines.append(
            f"{name:<20} {share['right']:>7} {share['total']:>6} {share['accuracy']:>8.1%}   "
            f"{low:.1%} to {high:.1%}"
        )
    lines += ["", *_confusion_lines("shape", summary["confusion"]["shape"]), ""]
    for name, value in summary["measures"].items():
        lines.append(f"{name:<20} {'-' if value is None else format(value, '.3f'):>7}")
    return "\n".join(lines)


def _confusion_lines(name: str, confusion: dict[str, dict[str, int]]) -> list[str]:
    columns = next(iter(confusion.values()))
    lines = [f"{name + ' (seen as)':<20}" + "".join(f" {column:>9}" for column in columns)]
    for value, row in confusion.items():
        lines.append(f"{value:<20}" + "".join(f" {count:>9}" for count in row.values()))
    return lines


def to_json(result: Result) -> dict[str, Any]:
    """One clip's line of the record."""
    return {
        "prompt": result.example.said.text,
        "seed": result.example.seed,
        "stated": {
            "background": result.example.said.background,
            "objects": [asdict(stated) for stated in result.example.said.objects],
        },
        "seen": asdict(result.detection),
        "right": result.score.attributes,
        "joint": result.score.joint,
    }


def failure_row(video: Tensor) -> Tensor:
    """Frames of a clip (3, F, H, W) side by side: (H, W', 3) uint8."""
    chosen = torch.linspace(0, video.shape[1] - 1, SHEET_FRAMES).round().long()
    row = video[:, chosen].nan_to_num(-1).clamp(-1, 1)  # black where there is no number
    return ((row + 1) * 127.5).round().byte().permute(2, 1, 3, 0).flatten(1, 2)


def render_truth(config: EvaluateConfig) -> VideoSource:
    """What the captions were made from."""

    def make(batch: Sequence[Example]) -> Tensor:
        scenes = [example.scene for example in batch]
        return render(scenes, config.num_frames, config.height, config.width)

    return make


def reconstruct_truth(config: EvaluateConfig) -> VideoSource:
    """The same, encoded and decoded; needs only the vae/ folder of the checkpoint."""
    folder = _folder(config) / "vae"
    vae_config = VAEConfig.from_json(read_json_object(folder / "config.json"))
    device = _device(config)
    vae = load_module(lambda: WanVAE(vae_config), open_checkpoint(folder), "vae", device=device)
    truth = render_truth(config)

    @torch.inference_mode()
    def make(batch: Sequence[Example]) -> Tensor:
        return vae.decode(vae.encode(truth(batch).to(device))).float().cpu()

    return make


def generate(config: EvaluateConfig) -> VideoSource:
    """What the model makes of the captions."""
    folder = _folder(config)
    device = _device(config)
    pipeline = PIPELINES[read_index(folder)["_class_name"]].from_pretrained(
        folder,
        dtype=torch_dtype(config.dtype, device),
        device=device,
        attention=config.attention,
    )

    def make(batch: Sequence[Example]) -> Tensor:
        made = pipeline(
            [example.said.text for example in batch],
            config.negative_prompt,
            height=config.height,
            width=config.width,
            num_frames=config.num_frames,
            num_inference_steps=config.sampler.steps,
            timesteps=config.sampler.timesteps,
            sampler=config.sampler.name,
            shift=config.sampler.shift,
            guidance_scale=config.guidance_scale,
            seed=[example.seed for example in batch],
            max_sequence_length=config.max_sequence_length,
            allow_untrained=config.allow_untrained,
            output_type="pt",
        )
        assert isinstance(made, WanPipelineOutput)
        return made.frames.transpose(1, 2) * 2 - 1  # (B, 3, F, H, W), from [0, 1]

    return make


def _folder(config: EvaluateConfig) -> Path:
    return resolve_model(checkpoint_name(config.checkpoint), config.revision)


def _device(config: EvaluateConfig) -> torch.device:
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    return resolve_device(auto if config.device == "auto" else config.device)


SOURCES: dict[str, Callable[[EvaluateConfig], VideoSource]] = {
    "renders": render_truth,
    "vae": reconstruct_truth,
    "model": generate,
}


def _writable(path: str | None) -> Path | None:
    """A file that can be written later, so that minutes of work don't end in an error."""
    if path is None:
        return None
    file = Path(path).expanduser()
    if file.is_dir():
        raise WanError(f"{file} is a folder: name the file to write")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=file.parent):
        pass
    return file


def _write(file: Path, content: str) -> None:
    """Write beside and rename, so that a file is whole or not there."""
    beside = file.with_name(f".{file.name}.tmp")
    beside.write_text(content, encoding="utf-8")
    beside.replace(file)


def main(run: Run[EvaluateConfig]) -> None:
    """The command: make the clips, print the table, write what was asked for."""
    config = run.config
    output, sheet = (_writable(path) for path in (config.output, config.sheet))
    examples = draw_examples(config)
    started = time.perf_counter()
    source = SOURCES[config.source](config)
    results: list[Result] = []
    failed: list[Tensor] = []
    progress = tqdm(total=len(examples), desc="clips", unit="clip", disable=None)
    for result, video in evaluate(examples, source, config.batch_size):
        results.append(result)
        if not result.score.joint and len(failed) < SHEET_ROWS:
            failed.append(failure_row(video))
        progress.update()
    progress.close()
    summary = summarise(results)
    seconds = time.perf_counter() - started
    print(f"{len(results)} captions, split {config.split}, source {config.source}")
    print(table(summary))
    print(f"{'seconds':<20} {seconds:>7.0f}")
    if output is not None:
        record = {
            "summary": summary,
            "config": asdict(config),
            "presets": run.presets,
            "seconds": seconds,
            "torch": torch.__version__,
            "clips": [to_json(result) for result in results],
        }
        _write(output, json.dumps(record, indent=1) + "\n")
    if sheet is not None and failed:
        Image.fromarray(torch.cat(failed).numpy()).save(sheet)


if __name__ == "__main__":
    run_jobs(main, LINE, __doc__ or "")
