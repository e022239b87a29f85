"""Check the arguments of a pipeline's call; bring arguments and results to one form."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from wan.errors import WanError, check_names
from wan.media.images import (
    fit_image,
    fit_picture,
    image_to_tensor,
    load_image,
    read_picture,
    upright_rgb,
)
from wan.pipeline.plan import SamplingPlan
from wan.sampling.noise import DISTINCT_SEEDS, sample_generators

OUTPUT_TYPES = ("np", "pt", "pil", "latent")
COMPAT = ("none", "fastvideo")
FASTVIDEO_SEED = 1024  # where its caller gives none
CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")
X0 = "x0"  # what a callback may see as well: the predicted clean latents

ImageInput = Image.Image | Tensor | NDArray[Any] | str | Path
Generators = torch.Generator | Sequence[torch.Generator]
OnProgress = Callable[[str, int, int], None]  # stage, done, total


@dataclass
class WanPipelineOutput:
    """The result of a pipeline's call.

    Attributes:
        frames: "np" (B, F, H, W, 3) and "pt" (B, F, 3, H, W) float32 in [0, 1]; "pil" a list of
            lists of images; "latent" (B, C, T, h, w) float32, normalised.
        plan: the sampler, schedule and guidance that were used.
        seeds: seed of each video; None if the caller gave generators, or neither.
        nsfw_content_detected: per video, if there is a safety checker: True means made black.

    `output[0]`, `output["frames"]` and `output.frames` are the same.
    """

    frames: Any
    plan: SamplingPlan
    seeds: list[int] | None = None
    nsfw_content_detected: list[bool] | None = None

    def to_tuple(self) -> tuple[Any]:
        """The frames alone, as a call with return_dict=False returns them."""
        return (self.frames,)

    def keys(self) -> tuple[str]:
        """The names that `output[name]` takes."""
        return ("frames",)

    def __getitem__(self, key: int | slice | str) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(f"{key}: an output of a pipeline has frames")
        return self.frames


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
    the whole batch. Without seed and generator it is PyTorch's global generator, which
    `torch.manual_seed` seeds; with seed -1 that generator draws a seed.
    """
    if generator is not None:
        if seed is not None:
            raise WanError("seed and generator: both decide the noise; give one of them")
        one = isinstance(generator, torch.Generator)
        if not one and not isinstance(generator, list | tuple):
            raise WanError(
                f"generator={generator!r}: need a torch.Generator or a list of them; a number is "
                "given as seed="
            )
        generators: list[Any] = [generator] * batch if one else list(generator)  # type: ignore[arg-type]
        if len(generators) != batch:
            raise WanError(f"{len(generators)} generators for {batch} videos: one, or one each")
        return generators, None
    if seed is None:
        return [torch.default_generator] * batch, None
    if np.ndim(seed) == 0 and seed == -1:
        seed = int(torch.randint(DISTINCT_SEEDS - 1 - batch, ()))
    streams = sample_generators(seed, batch)
    return streams, [stream.initial_seed() for stream in streams]


def first_frames(
    image: Any, height: int, width: int, count: int, fit: str = "resize"
) -> list[Tensor]:
    """One image, or one for each of `count`, as (3, height, width) float32 in [-1, 1].

    Args:
        fit: how an image of another shape becomes a frame, see `wan.media.images.fit_image`.

    Raises:
        WanError: not an image, or another number of images.
    """
    is_batch = isinstance(image, Tensor | np.ndarray) and image.ndim == 4
    images = list(image) if is_batch or isinstance(image, list | tuple) else [image]
    if len(images) not in (1, count):
        raise WanError(f"{len(images)} images for {count} prompts: give one, or one per prompt")
    return [_first_frame(one, height, width, fit) for one in images]


def _first_frame(image: Any, height: int, width: int, fit: str) -> Tensor:
    """One image as (3, height, width); pictures stay in 8 bits until they have the size."""
    if isinstance(image, str | Path):
        return fit_picture(read_picture(image), height, width, fit)
    if isinstance(image, Image.Image):
        return fit_picture(upright_rgb(image), height, width, fit)
    return fit_image(image_pixels(image), height, width, fit)


def image_pixels(image: Any) -> Tensor:
    """An image in any accepted form as (3, H, W) float in [-1, 1].

    Args:
        image: a picture of Pillow's, a path, an array (H, W, 3) or a tensor (3, H, W). Arrays and
            tensors hold numbers in [0, 1], or 0 to 255 if they are uint8. If one is negative, they
            are taken to be in [-1, 1], with a warning.
    """
    if isinstance(image, str | Path):
        return load_image(image)
    if isinstance(image, Image.Image):
        return image_to_tensor(image)
    if isinstance(image, np.ndarray):
        if image.ndim != 3:
            raise WanError(f"image of shape {image.shape}: an array must be (H, W, 3)")
        image = torch.from_numpy(image).permute(2, 0, 1)
    if not isinstance(image, Tensor):
        raise WanError(
            f"image of type {type(image).__name__}: need a PIL image, an array, a tensor or a path"
        )
    if image.dtype == torch.uint8:
        return image.float() / 127.5 - 1
    if bool((image < 0).any()):
        warnings.warn(
            "the image has negative values and is taken to be in [-1, 1]; give values in [0, 1]",
            stacklevel=2,
        )
        return image.float()
    return image.float() * 2 - 1


def video_count(num_videos_per_prompt: Any) -> int:
    """The number of videos of each prompt; None is 1."""
    count = 1 if num_videos_per_prompt is None else num_videos_per_prompt
    if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
        raise WanError(f"num_videos_per_prompt={count}: need at least 1, whole")
    return int(count)


def lora_scale(attention_kwargs: Mapping[str, Any] | None) -> float:
    """The factor on all LoRA adapters, the only entry of `attention_kwargs` that has a meaning."""
    if attention_kwargs is not None and not isinstance(attention_kwargs, Mapping):
        raise WanError(f'attention_kwargs={attention_kwargs!r}: need a mapping, {{"scale": 0.5}}')
    given = dict(attention_kwargs or {})
    scale = given.pop("scale", 1.0)
    if given:
        raise WanError(
            f"attention_kwargs has {', '.join(given)}: only scale is known, a factor on the "
            "strength of LoRA adapters; set_attention chooses an attention"
        )
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise WanError(f"attention_kwargs: scale={scale!r} must be a finite number")
    return float(scale)


def check_output(
    output_type: str,
    callback_tensors: Sequence[str],
    safety_checker: Callable[[Tensor], bool] | None,
    callback: Any = None,
    latents: Any = None,
) -> None:
    """Refuse an unknown output type or callback tensor, or a checker that would see no frames.

    Also a callback that cannot be called, and latents that are no tensor.
    """
    check_names("output_type", [output_type], OUTPUT_TYPES)
    check_names("callback_on_step_end_tensor_inputs", callback_tensors, (*CALLBACK_TENSORS, X0))
    if callback is not None and not callable(callback):
        raise WanError(f"callback_on_step_end={callback!r}: need a function")
    if latents is not None and not isinstance(latents, Tensor):
        raise WanError(f"latents of type {type(latents).__name__}: need a tensor (B, C, T, h, w)")
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
