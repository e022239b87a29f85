"""The sources of an evaluation's clips: the world itself, the autoencoder, or a model."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from configs.evaluation import EvaluateConfig
from infer.evaluate.measure import Example, VideoSource
from infer.loading import StageBars, folder_of, load_pipeline, model_folder, places_of, sampling
from wan.miniature.world import render
from wan.pipeline.folder import load_part
from wan.pipeline.pipeline import WanPipeline, WanPipelineOutput
from wan.runtime.offload import resolve_device

# B batch, F frames, H W pixels


def open_pipeline(config: EvaluateConfig) -> WanPipeline:
    """The model of an evaluation."""
    with StageBars() as bars:
        return load_pipeline(model_folder(config), config, config.attention, on_progress=bars)


def render_truth(config: EvaluateConfig) -> VideoSource:
    """The scenes that the captions were made from."""

    def make(batch: Sequence[Example]) -> Tensor:
        scenes = [example.scene for example in batch]
        return render(scenes, config.num_frames, config.height, config.width)

    return make


def reconstruct_truth(config: EvaluateConfig) -> VideoSource:
    """The true scenes, encoded and decoded; only the checkpoint's vae/ folder is needed."""
    device = resolve_device(config.device)
    vae = load_part(folder_of(config), "vae", overrides=places_of(config), device=device)
    truth = render_truth(config)

    @torch.inference_mode()
    def make(batch: Sequence[Example]) -> Tensor:
        return vae.decode_normalized(vae.encode_normalized(truth(batch).to(device))).float().cpu()

    return make


def generate(config: EvaluateConfig, pipeline: WanPipeline | None = None) -> VideoSource:
    """A model's clips of the captions; one whose latents are not finite is all NaN.

    Args:
        pipeline: the model, if it is loaded already.
    Raises:
        WanError: the settings are not the model's; before anything is made.
    """
    pipe = open_pipeline(config) if pipeline is None else pipeline
    pipe.plan(
        **sampling(config),
        negative_prompt=config.negative_prompt is not None,
        max_sequence_length=config.max_sequence_length,
    )

    def make(batch: Sequence[Example]) -> Tensor:
        try:
            with StageBars() as bars:
                made = pipe(
                    [example.caption.text for example in batch],
                    config.negative_prompt,
                    height=config.height,
                    width=config.width,
                    num_frames=config.num_frames,
                    seed=[example.seed for example in batch],
                    max_sequence_length=config.max_sequence_length,
                    output_type="pt",
                    on_progress=bars,
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
