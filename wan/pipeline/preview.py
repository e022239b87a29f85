"""What a video will show, after each step: the predicted clean latents as a small picture.

A sampler's state is noise until the last steps, but in each step the model predicts the clean
latents behind it (x0). A linear map turns these into colours in about a millisecond; TAEHV's tiny
decoder shows more and takes longer.

B videos, C T h w latent sizes, F frames, H W pixels.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wan.errors import WanError
from wan.media.animation import ENDING, write_animation
from wan.media.video import Frames, to_uint8
from wan.models.latent_rgb import LatentSpace, latent_space
from wan.models.taehv import TinyDecoder
from wan.models.vae_config import VAEConfig
from wan.pipeline.inputs import X0
from wan.pipeline.tiny_decoder import check_fits_latents

# Pixels of the longer side of one video: latents are enlarged to at least the first, and what a
# tiny decoder makes is reduced to the second.
LEAST_PIXELS, MOST_PIXELS = 96, 256
MAX_FRAMES = 32
UNKNOWN = (
    "preview: no colours are known for the latents of this autoencoder (those of Wan2.1, of "
    "Wan2.2's 5B and of the miniature are); `wan.models.latent_rgb.fit_latent_rgb` fits such a map"
)


class Preview:
    """Writes the video that a step predicts as an animated picture; the file is replaced each time.

    It is a callback of a pipeline's call, `pipe(.., callback_on_step_end=Preview(pipe, "a.gif"))`,
    and `show` is the `on_x0` of `PipelineStages.denoise`. The videos of a batch are side by side.

    Attributes:
        tensor_inputs: what a pipeline hands to this callback.
    """

    tensor_inputs = (X0,)

    def __init__(self, pipeline: Any, path: str | Path, decoder: TinyDecoder | None = None) -> None:
        """Prepare for the videos of one pipeline.

        Args:
            pipeline: a `WanPipeline`.
            path: ends in .gif; its folder must exist.
            decoder: from `load_tiny_decoder`; None uses the linear map.

        Raises:
            WanError: another ending, or nothing is known about the latents of this model.
        """
        self.path = Path(path)
        if self.path.suffix.lower() != ENDING:
            raise WanError(f"{path}: the name of a preview must end in {ENDING}")
        config = pipeline.config
        self._space = check_preview(config.vae, decoder)
        self._decoder = decoder
        self._seconds = config.vae.temporal_stride / config.defaults.fps  # of a latent frame

    def __call__(self, pipeline: Any, step: int, timestep: Tensor, tensors: Any) -> None:
        """The callback after a step."""
        self.show(step, tensors[X0])

    @torch.no_grad()
    def show(self, step: int, x0: Tensor) -> None:
        """Write the picture of predicted clean latents (B, C, T, h, w), normalised.

        Raises:
            OSError: the file can't be written.
        """
        if self._decoder is None:
            assert self._space is not None
            clips = [self._space.decode(one) for one in x0]
        else:
            chunks = self._decoder.to(x0.device).decode_stream(x0, last_only=True)
            clips = list(torch.cat([chunk.float() for chunk in chunks], dim=2))
        every = -(-x0.shape[2] // MAX_FRAMES)
        row = torch.cat([small(clip[:, ::every]) for clip in clips], dim=3)
        frames = enlarged(to_uint8(row.cpu()), -(-LEAST_PIXELS // max(clips[0].shape[2:])))
        write_animation(self.path, frames, self._seconds * every)


def check_preview(vae: VAEConfig, decoder: TinyDecoder | None = None) -> LatentSpace | None:
    """The latent space of an autoencoder, of which previews can be made.

    Raises:
        WanError: it is not known, or not that of the decoder.
    """
    space = latent_space(vae)
    if decoder is not None:
        check_fits_latents(decoder.kind, vae)
    elif space is None:
        raise WanError(UNKNOWN)
    return space


def small(clip: Tensor) -> Tensor:
    """A clip (3, F, H, W), reduced if a side has more pixels than previews have."""
    scale = MOST_PIXELS / max(clip.shape[2:])
    return clip if scale >= 1 else resized(clip.transpose(0, 1), scale).transpose(0, 1)


def enlarged(frames: Frames, times: int) -> Frames:
    """Frames (F, H, W, 3) so many times as large.

    Of 8-bit numbers this takes a tenth of the time that it takes of floats.
    """
    if times == 1:
        return frames
    pixels = resized(torch.from_numpy(frames).permute(0, 3, 1, 2), times)
    return np.asarray(pixels.permute(0, 2, 3, 1).contiguous().numpy())


def resized(frames: Tensor, scale: float) -> Tensor:
    """Frames (F, 3, H, W) at another size, by bicubic interpolation."""
    size = [max(1, round(side * scale)) for side in frames.shape[2:]]
    return F.interpolate(frames, size=size, mode="bicubic", antialias=True)
