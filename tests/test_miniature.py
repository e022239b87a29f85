"""The shipped model: whole, small, and it shows what a prompt says."""

import numpy as np
import pytest
import torch
from diffusers import WanPipeline as Oracle

from wan import WanPipeline
from wan.miniature import WEIGHTS
from wan.miniature.detect import detect

PROMPT = "a small red circle moving right on a gray background"


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    return WanPipeline.from_pretrained(WEIGHTS, dtype=torch.float32)


@pytest.fixture(scope="module")
def video(pipe) -> np.ndarray:
    return pipe(PROMPT, seed=1).frames[0]


def test_the_weights_take_at_most_16_megabytes():
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 16e6


def test_the_default_prompt_shows_what_it_says(video):
    frames = torch.from_numpy(video).permute(3, 0, 1, 2) * 2 - 1
    found = detect(frames)
    assert found.background == "gray"
    (item,) = found.objects
    assert (item.shape, item.colour, item.size, item.motion) == ("circle", "red", "small", "right")


def test_a_given_first_frame_is_kept_and_moves_on(pipe, video):
    first = torch.from_numpy(video[0]).permute(2, 0, 1) * 2 - 1
    frames = pipe(PROMPT, image=first, seed=1).frames[0]
    # What the autoencoder makes of the frame, no more: 25 dB
    assert np.square(frames[0] - video[0]).mean() < 10**-2.5
    assert np.abs(frames[-1] - frames[0]).max() > 0.3


def test_tiles_change_little_away_from_their_borders(pipe):
    latents = pipe(PROMPT, seed=0, output_type="latent").frames
    whole = pipe.decode_latents(latents)
    pipe.tile = 6
    try:
        tiled = pipe.decode_latents(latents)
    finally:
        pipe.tile = None
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)
    assert (tiled - whole).abs().mean() < 0.1


def test_diffusers_makes_the_same_video_of_the_folder(pipe):
    oracle = Oracle.from_pretrained(WEIGHTS, dtype=torch.float32)
    oracle.set_progress_bar_config(disable=True)
    settings = {"height": 128, "width": 128, "num_frames": 17, "num_inference_steps": 4}
    theirs = oracle(
        PROMPT,
        negative_prompt="",
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **settings,
    ).frames[0]
    ours = pipe(
        PROMPT, guidance_scale=3.0, generator=torch.Generator().manual_seed(0), **settings
    ).frames[0]
    assert np.sqrt(np.square(ours - theirs).mean()) < 1e-4 * np.sqrt(np.square(theirs).mean())
