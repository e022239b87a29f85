"""Check the arguments of a pipeline's call; bring arguments and results to one form."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wan.errors import WanError, check_names
from wan.media.images import fit_image, image_to_tensor, load_image
from wan.pipeline.plan import SamplingPlan
from wan.sampling.noise import DISTINCT_SEEDS, sample_generators

OUTPUT_TYPES = ("np", "pt", "pil", "latent")
COMPAT = ("none", "fastvideo")
FASTVIDEO_SEED = 1024  # where its caller gives none
CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")

ImageInput = Image.Image | Tensor | str | Path
Generators = torch.Generator | Sequence[torch.Generator]
OnProgress = Callable[[str, int, int], None]  # stage, done, total


@dataclass
class WanPipelineOutput:
    """The result of a pipeline's call.

    Attributes:
        frames: "np" (B, F, H, W, 3) and "pt" (B, F, 3, H, W) float32 in [0, 1]; "pil" a list of
            lists of images; "latent" (B, C, T, h, w) float32, normalised.
        plan: the sampler, schedule and guidance that were used.
        seeds: seed of each video; None if the caller gave generators.
        nsfw_content_detected: per video, if there is a safety checker: True means made black.
    """

    frames: Any
    plan: SamplingPlan
    seeds: list[int] | None = None
    nsfw_content_detected: list[bool] | None = None


def report(on_progress: OnProgress | None, stage: str, done: int, total: int) -> None:
    """Call the caller's progress function, if there is one."""
    if on_progress is not None:
        on_progress(stage, done, total)


def prompt_list(prompt: str | list[str] | None, embeds: Tensor | None) -> list[str] | None:
    """The prompts, or None if embeddings stand in for them."""
    if (prompt is None) == (embeds is None):
        raise WanError("prompt and prompt_embeds: give one of them, and only one")
    if prompt is None:
        return None
    prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise WanError(f"prompt={prompt!r}: need a text or a list of texts")
    return prompts


def prompt_count(prompts: list[str] | None, embeds: Tensor | None) -> int:
    """Number of prompts from `prompt_list`, or of embeddings if it returned None."""
    if prompts is not None:
        return len(prompts)
    assert embeds is not None
    return len(embeds)


def negative_list(
    negative: str | list[str] | None, embeds: Tensor | None, count: int
) -> list[str] | None:
    """One negative prompt per prompt, or None if embeddings stand in for them."""
    if embeds is not None:
        if negative is not None:
            raise WanError("negative_prompt and negative_prompt_embeds: give only one of them")
        return None
    negatives = list(negative) if isinstance(negative, list | tuple) else [negative or ""] * count
    if len(negatives) != count or not all(isinstance(text, str) for text in negatives):
        raise WanError(f"{len(negatives)} negative prompts for {count} prompts: one, or one each")
    return negatives


def noise_streams(
    seed: int | Sequence[int] | None, generator: Generators | None, batch: int
) -> tuple[list[torch.Generator], list[int] | None]:
    """One generator per video, and the seeds if they are known.

    All videos draw in turn from a single generator, which gives the same numbers as one draw for
    the whole batch. Without seed and generator, or with seed -1, PyTorch's global generator draws
    a seed.
    """
    if generator is not None:
        if seed is not None:
            raise WanError("seed and generator: both decide the noise; give one of them")
        one = isinstance(generator, torch.Generator)
        generators: list[Any] = [generator] * batch if one else list(generator)  # type: ignore[arg-type]
        if len(generators) != batch:
            raise WanError(f"{len(generators)} generators for {batch} videos: one, or one each")
        return generators, None
    if seed is None or (np.ndim(seed) == 0 and seed == -1):
        seed = int(torch.randint(DISTINCT_SEEDS - 1 - batch, ()))
    streams = sample_generators(seed, batch)
    return streams, [stream.initial_seed() for stream in streams]


def first_frames(image: Any, height: int, width: int, count: int) -> list[Tensor]:
    """One image, or one for each of `count`, as (3, height, width) float32 in [-1, 1].

    Raises:
        WanError: not an image, or another number of images.
    """
    images = list(image) if isinstance(image, list | tuple) else [image]
    if len(images) not in (1, count):
        raise WanError(f"{len(images)} images for {count} prompts: give one, or one per prompt")
    return [fit_image(image_pixels(one), height, width) for one in images]


def image_pixels(image: Any) -> Tensor:
    """An image in any accepted form as (3, H, W) float in [-1, 1]."""
    if isinstance(image, str | Path):
        return load_image(image)
    if isinstance(image, Image.Image):
        return image_to_tensor(image)
    if isinstance(image, Tensor):
        return image
    raise WanError(f"image of type {type(image).__name__}: need a PIL image, a tensor or a path")


def check_output(
    output_type: str,
    callback_tensors: Sequence[str],
    safety_checker: Callable[[Tensor], bool] | None,
) -> None:
    """Refuse an unknown output type or callback tensor, or a checker that would see no frames."""
    check_names("output_type", [output_type], OUTPUT_TYPES)
    check_names("callback_on_step_end_tensor_inputs", callback_tensors, CALLBACK_TENSORS)
    if output_type == "latent" and safety_checker is not None:
        raise WanError("output_type='latent' has no frames for the safety checker to see")


def finished_frames(
    video: Tensor,
    output_type: str,
    safety_checker: Callable[[Tensor], bool] | None,
    truncate: bool = False,
) -> tuple[Any, list[bool] | None]:
    """Convert a video to `output_type`; also return the safety checker's results, if any.

    Args:
        video: (B, 3, F, H, W) in [-1, 1].
        output_type: "pt", "np" or "pil".
        safety_checker: called with the (F, 3, H, W) frames of each video; if it returns True, the
            video becomes black.
        truncate: "pil" rounds down to 8 bits, as FastVideo does, not to the nearest.
    """
    frames = (video / 2 + 0.5).clamp(0, 1).transpose(1, 2)  # (B, F, 3, H, W)
    flags = None
    if safety_checker is not None:
        flags = [bool(safety_checker(one)) for one in frames]
        frames = frames * ~torch.tensor(flags).view(-1, 1, 1, 1, 1)
    if output_type == "pt":
        return frames.contiguous(), flags
    array = frames.permute(0, 1, 3, 4, 2).contiguous().numpy()  # (B, F, H, W, 3)
    if output_type == "np":
        return array, flags
    levels = array * 255
    pixels = (levels if truncate else levels.round()).astype(np.uint8)
    return [[Image.fromarray(frame) for frame in one] for one in pixels], flags
