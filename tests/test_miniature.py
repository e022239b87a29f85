"""The shipped models: whole, small, and they show what a prompt says."""

import numpy as np
import pytest
import torch

from infer.parity.models import Sides
from wan import WanDMDPipeline, WanError, WanPipeline
from wan.miniature.captions import EXAMPLES, caption, outside_world
from wan.miniature.detect import detect
from wan.miniature.world import sample_scene, scene_rng
from wan.weights.digests import verify_manifest
from wan.weights.hub import STUDENT, TEACHER

PROMPT = "a small red circle moving right on a gray background"


@pytest.fixture(scope="module")
def student() -> WanDMDPipeline:
    return WanDMDPipeline.from_pretrained(STUDENT, dtype=torch.float32)


@pytest.fixture(scope="module")
def teacher() -> WanPipeline:
    return WanPipeline.from_pretrained(TEACHER, dtype=torch.float32)


@pytest.fixture(scope="module", params=["student", "teacher"])
def pipe(request) -> WanPipeline:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def video(pipe) -> np.ndarray:
    return pipe(PROMPT, seed=1).frames[0]


def test_the_weights_take_at_most_24_megabytes():
    files = [path for folder in (STUDENT, TEACHER) for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 24e6


@pytest.mark.parametrize("folder", [STUDENT, TEACHER], ids=lambda folder: folder.name)
def test_the_shipped_files_are_those_that_were_measured(folder):
    """After a change: `wan.weights.digests.write_manifest(folder)`, and say so in its card."""
    assert verify_manifest(folder) >= 6


def test_the_default_prompt_shows_what_it_says(video):
    frames = torch.from_numpy(video).permute(3, 0, 1, 2) * 2 - 1
    found = detect(frames)
    assert found.background == "gray"
    (item,) = found.objects
    assert (item.shape, item.colour, item.size, item.motion) == ("circle", "red", "small", "right")


def test_a_given_first_frame_is_kept_and_moves_on(teacher):
    video = teacher(PROMPT, seed=1).frames[0]
    first = torch.from_numpy(video[0]).permute(2, 0, 1) * 2 - 1
    frames = teacher(PROMPT, image=first, seed=1).frames[0]
    # What the autoencoder makes of the frame, no more: 25 dB
    assert np.square(frames[0] - video[0]).mean() < 10**-2.5
    assert np.abs(frames[-1] - frames[0]).max() > 0.3


def test_tiles_change_little_away_from_their_borders(student):
    latents = student(PROMPT, seed=0, output_type="latent").frames
    whole = student.decode_latents(latents)
    student.tile = 6
    try:
        tiled = student.decode_latents(latents)
    finally:
        student.tile = None
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)
    assert (tiled - whole).abs().mean() < 0.1


def test_the_student_takes_its_three_steps_and_refuses_others(student):
    assert student.config.timesteps == (1000, 757, 522)
    assert student.config.defaults.guidance_scale == 1.0
    for untrained in (
        {"num_inference_steps": 20},
        {"guidance_scale": 3.0},
        {"image": torch.zeros(3, 128, 128)},
    ):
        with pytest.raises(WanError, match="allow_untrained"):
            student(PROMPT, **untrained)


def test_diffusers_makes_the_same_video_with_the_teacher(teacher):
    oracle = Sides("", TEACHER, ()).their_pipeline()
    settings = {"height": 128, "width": 128, "num_frames": 17, "num_inference_steps": 4}
    theirs = oracle(
        PROMPT,
        negative_prompt="",
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **settings,
    ).frames[0]
    ours = teacher(
        PROMPT, guidance_scale=3.0, generator=torch.Generator().manual_seed(0), **settings
    ).frames[0]
    assert np.sqrt(np.square(ours - theirs).mean()) < 1e-4 * np.sqrt(np.square(theirs).mean())


def test_what_the_miniature_has_never_seen_is_said_with_what_it_can_do():
    for number in range(100):
        rng = scene_rng(5, number)
        text = caption(sample_scene(rng, "any"), rng, 0.3).text
        assert outside_world(text, 128, 128, 17) is None, text
    assert all(outside_world(text, 128, 128, 17) is None for text in EXAMPLES)
    said = outside_world("A cat, a red circle", 256, 128, 17)
    assert "not of 128x256, 17 frames and does not know the word cat." in said
    assert all(text in said for text in EXAMPLES)
