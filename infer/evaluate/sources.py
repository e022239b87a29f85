"""The sources of an evaluation's clips: the world itself, the autoencoder, or a model."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.evaluation import EvaluateConfig
from infer.evaluate.measure import Example, VideoSource
from infer.sample.request import torch_dtype
from wan.files import read_json
from wan.miniature.world import render
from wan.models.vae import VAEConfig, WanVAE
from wan.pipeline.config import part_folder, read_index
from wan.pipeline.pipeline import PIPELINES, WanPipeline, WanPipelineOutput
from wan.runtime.offload import resolve_device
from wan.weights.checkpoint import open_checkpoint
from wan.weights.hub import resolve_model
from wan.weights.load import load_module

# B batch, F frames, H W pixels


def folder_of(config: EvaluateConfig) -> Path:
    return resolve_model(config.checkpoint, config.revision)


def sampling(config: EvaluateConfig) -> dict[str, Any]:
    """The pipeline's arguments that choose its steps."""
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


def render_truth(config: EvaluateConfig) -> VideoSource:
    """The scenes that the captions were made from."""

    def make(batch: Sequence[Example]) -> Tensor:
        scenes = [example.scene for example in batch]
        return render(scenes, config.num_frames, config.height, config.width)

    return make


def reconstruct_truth(config: EvaluateConfig) -> VideoSource:
    """The true scenes, encoded and decoded; only the checkpoint's vae/ folder is needed."""
    folder = part_folder(folder_of(config), "vae")
    vae_config = VAEConfig.from_json(read_json(folder / "config.json"))
    device = resolve_device(config.device)
    vae = load_module(lambda: WanVAE(vae_config), open_checkpoint(folder), "vae", device=device)
    truth = render_truth(config)

    @torch.inference_mode()
    def make(batch: Sequence[Example]) -> Tensor:
        return vae.decode(vae.encode(truth(batch).to(device))).float().cpu()

    return make


def generate(config: EvaluateConfig, pipeline: WanPipeline | None = None) -> VideoSource:
    """A model's clips of the captions; one whose latents are not finite is all NaN.

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
                [example.caption.text for example in batch],
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


SOURCES: dict[str, Callable[[EvaluateConfig], VideoSource]] = {
    "renders": render_truth,
    "vae": reconstruct_truth,
    "model": generate,
}
