"""Calls and commands on a device: the CPU's noise, and a video of what was asked for."""

import json

import pytest
import torch
from test_pipeline import LATENT_SHAPE, PROMPT, build, write_tokenizer

from configs.cli import execute
from infer.sample.__main__ import LINE, SampleCommand
from wan.media.video import read_video
from wan.miniature.captions import Caption, Stated
from wan.miniature.detect import detect, score
from wan.sampling.noise import draw_noise, sample_generators


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


def first_state(pipeline, **call) -> torch.Tensor:
    """What the transformer is given in the first step: noise alone."""
    given = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    pipeline(PROMPT, num_inference_steps=1, guidance_scale=1.0, output_type="latent", **call)
    hook.remove()
    return given[0]


def test_a_seed_gives_the_noise_of_the_cpu_bit_for_bit(device, tokenizer_folder):
    state = first_state(build(tokenizer_folder).to(device), seed=3)
    assert state.device.type == device.type
    expected = draw_noise(LATENT_SHAPE[1:], sample_generators(3, 1))
    assert torch.equal(state.cpu(), expected)


def test_a_generator_of_the_device_draws_there(device, tokenizer_folder):
    pipeline = build(tokenizer_folder).to(device)

    def generator() -> torch.Generator:
        return torch.Generator(device).manual_seed(11)

    expected = torch.randn(LATENT_SHAPE, generator=generator(), device=device)
    for _ in range(2):
        assert torch.equal(first_state(pipeline, generator=generator()), expected)


def test_the_first_command_of_the_readme_shows_what_it_was_asked_for(device, tmp_path):
    prompt = "a small red circle moving right on a gray background"
    words = [f"prompt={prompt}", f"device={device.type}", f"output_dir={tmp_path}"]
    assert execute(SampleCommand(), LINE, "", words) == 0
    (file,) = tmp_path.glob("*.mp4")
    record = json.loads(file.with_suffix(".json").read_text())
    assert record["status"] == "done"
    assert record["environment"]["device"] == device.type
    frames = torch.from_numpy(read_video(file)[0]).permute(3, 0, 1, 2)
    stated = Stated(shape="circle", colour="red", size="small", motion="right")
    assert score(detect(frames), Caption(prompt, (stated,), "gray")).joint
