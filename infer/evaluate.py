"""Measure how often videos show what their captions say.

Captions of the miniature's world go in; analytic detectors read what came out. A clip counts as
right only if every stated attribute and the number of objects are. Example:

    python -m infer.evaluate num_captions=512 split=heldout output=outputs/evaluation.json

Two ceilings need no trained transformer: source=renders scores the world's own renders (how good
the detectors are), source=vae the same renders through the autoencoder (how much it keeps).

The distance to the truth compares all clips with other true scenes of the same captions, so that
source=renders shows its floor. How diverse a model is shows where captions leave something open and
get several seeds: omit=0.5 seeds_per_caption=8 split=train.
"""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from configs.evaluation import EvaluateConfig
from infer.cli import Run, run_jobs
from infer.command_line import ATTENTION, CommandLine, Shortcut
from infer.measure import (
    Example,
    Result,
    VideoSource,
    draw_examples,
    evaluate,
    summarise,
    table,
    write_record,
)
from infer.request import torch_dtype
from wan.checkpoint import open_checkpoint
from wan.errors import WanError
from wan.hub import resolve_model
from wan.miniature.world import render
from wan.pipeline import PIPELINES, WanPipeline, WanPipelineOutput
from wan.pipeline_config import part_folder, read_index
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
        **ATTENTION,
    },
    written=("output", "sheet"),
)

SHEET_ROWS, SHEET_FRAMES = 16, 5


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
    folder = part_folder(folder_of(config), "vae")
    vae_config = VAEConfig.from_json(read_json_object(folder / "config.json"))
    device = resolve_device(config.device)
    vae = load_module(lambda: WanVAE(vae_config), open_checkpoint(folder), "vae", device=device)
    truth = render_truth(config)

    @torch.inference_mode()
    def make(batch: Sequence[Example]) -> Tensor:
        return vae.decode(vae.encode(truth(batch).to(device))).float().cpu()

    return make


def sampling(config: EvaluateConfig) -> dict[str, Any]:
    """What decides the steps, by the names of the pipeline's arguments."""
    return {
        "num_inference_steps": config.sampler.steps,
        "timesteps": config.sampler.timesteps,
        "sampler": config.sampler.name,
        "shift": config.sampler.shift,
        "guidance_scale": config.guidance_scale,
        "allow_untrained": config.allow_untrained,
    }


def load_pipeline(config: EvaluateConfig) -> WanPipeline:
    folder = folder_of(config)
    device = resolve_device(config.device)
    return PIPELINES[read_index(folder)["_class_name"]].from_pretrained(
        folder,
        dtype=torch_dtype(config.dtype, device),
        device=device,
        attention=config.attention,
        offload=config.offload,
        compile=config.compile,
        quantize=config.quantize,
    )


def generate(config: EvaluateConfig, pipeline: WanPipeline | None = None) -> VideoSource:
    """What the model makes of the captions; a clip whose latents blow up is all NaN.

    Args:
        pipeline: the model, if it is loaded already.
    Raises:
        WanError: the settings are not the model's; before anything is made.
    """
    pipe = load_pipeline(config) if pipeline is None else pipeline
    pipe.plan(
        **sampling(config),
        negative_prompt=config.negative_prompt is not None,
        max_sequence_length=config.max_sequence_length,
    )

    def make(batch: Sequence[Example]) -> Tensor:
        try:
            made = pipe(
                [example.said.text for example in batch],
                config.negative_prompt,
                height=config.height,
                width=config.width,
                num_frames=config.num_frames,
                seed=[example.seed for example in batch],
                max_sequence_length=config.max_sequence_length,
                output_type="pt",
                **sampling(config),
            )
        except FloatingPointError:
            if len(batch) > 1:  # one of them
                return torch.cat([make([example]) for example in batch])
            shape = (1, 3, config.num_frames, config.height, config.width)
            return torch.full(shape, math.nan)
        assert isinstance(made, WanPipelineOutput)
        return made.frames.transpose(1, 2) * 2 - 1  # (B, 3, F, H, W), from [0, 1]

    return make


def folder_of(config: EvaluateConfig) -> Path:
    return resolve_model(config.checkpoint, config.revision)


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
    seconds = time.perf_counter() - started
    print(f"{config.num_captions} captions, split {config.split}, source {config.source}")
    print(table(summarise(results)))
    print(f"{'seconds in all':<28} {seconds:>7.0f}")
    if output is not None:
        more = {"config": asdict(config), "presets": run.presets, "seconds": seconds}
        write_record(output, results, **more)
    if sheet is not None and failed:
        Image.fromarray(torch.cat(failed).numpy()).save(sheet)


if __name__ == "__main__":
    run_jobs(main, LINE, __doc__ or "")
