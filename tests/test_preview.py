"""Previews show what a step predicts, cost little, and a tiny decoder can stand in for the VAE."""

import json
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image, ImageSequence
from safetensors.torch import save_file
from test_taehv import TAEW, published_state

from configs.compose import compose_runs
from configs.rerun import RerunConfig
from infer.diff.records import read_record
from infer.rerun.request import job_of
from infer.sample.__main__ import LINE, SampleCommand
from wan import WanDMDPipeline
from wan.errors import WanError
from wan.miniature.world import render, sample_scene, scene_rng
from wan.models.latent_rgb import LATENT_SPACES, MINIATURE, WAN_2_1, fit_latent_rgb, latent_space
from wan.models.vae_config import VAE_2_1
from wan.pipeline.known_models import VAE_2_2
from wan.pipeline.preview import Preview, check_preview
from wan.pipeline.tiny_decoder import load_tiny_decoder
from wan.sampling.samplers import SAMPLERS, build_stepper, sample
from wan.sampling.schedule import unipc_schedule
from wan.weights.hub import SHIPPED

PROMPT = "a large red circle moving right on a gray background"


@pytest.fixture(scope="module")
def pipe():
    pipeline = WanDMDPipeline.from_pretrained(SHIPPED["mini"])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def frames_of(path):
    with Image.open(path) as picture:
        assert picture.info["loop"] == 0
        shown = [one.info["duration"] for one in ImageSequence.Iterator(picture)]
        frames = [one.convert("RGB").copy() for one in ImageSequence.Iterator(picture)]
    return frames, shown


# --- x0 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_shows_the_clean_latents_that_the_model_predicts(name):
    x0, noise = torch.randn(2, 1, 4, 2, 3, 3, dtype=torch.float64).unbind()
    options = {"deterministic": True} if name == "few_step" else {}
    stepper = build_stepper(name, unipc_schedule(4, 5.0), **options)
    seen = []
    sample(lambda x, t: noise - x0, noise, stepper, on_x0=lambda i, found: seen.append((i, found)))
    assert [i for i, _ in seen] == [0, 1, 2, 3]
    assert all((found - x0).abs().max() < 0.01 for _, found in seen)  # sigmas are float32


def test_the_last_step_of_a_student_predicts_its_result(pipe):
    seen = []

    class Watch:
        tensor_inputs = ("latents", "x0")

        def __call__(self, pipeline, step, timestep, tensors):
            seen.append(tensors["x0"])
            return dict(tensors)  # as callbacks in the wild do

    result = pipe(PROMPT, seed=0, callback_on_step_end=Watch(), output_type="latent").frames
    assert len(seen) == 3
    assert torch.equal(seen[-1], result)
    assert not torch.equal(seen[0], seen[1])
    with pytest.raises(WanError, match="x0: that is a prediction and is shown only"):
        pipe(
            PROMPT,
            callback_on_step_end=lambda *_: {"x0": result},
            callback_on_step_end_tensor_inputs=["x0"],
        )


# --- colours --------------------------------------------------------------------------------------


def clips(pipe, stream, count):
    video = render([sample_scene(scene_rng(stream, i), "any") for i in range(count)])
    with torch.no_grad():
        return torch.cat([pipe.vae.encode_normalized(one) for one in video.split(8)]), video


def test_the_miniatures_colours_are_those_of_least_squares(pipe):
    factors, bias, explained = fit_latent_rgb(*clips(pipe, 0, 16))
    torch.testing.assert_close(factors.float(), torch.tensor(MINIATURE.factors), atol=2e-3, rtol=0)
    torch.testing.assert_close(bias.float(), torch.tensor(MINIATURE.bias), atol=2e-3, rtol=0)
    assert 0.9 < explained < 0.95
    with pytest.raises(WanError, match="are not those of"):
        fit_latent_rgb(torch.zeros(1, 16, 5, 8, 8), torch.zeros(1, 3, 18, 128, 128))


def test_a_map_belongs_to_one_autoencoder(pipe):
    assert [len(space.factors) for space in LATENT_SPACES] == [16, 48, 16]
    assert latent_space(VAE_2_1) is WAN_2_1
    assert latent_space(VAE_2_2).name == "Wan2.2"
    assert latent_space(pipe.vae.config) is MINIATURE  # 16 channels, as Wan2.1
    assert latent_space(replace(VAE_2_1, latents_mean=(0.5,) * 16)) is None
    assert latent_space(replace(VAE_2_1, latents_mean=(), latents_std=())) is None
    with pytest.raises(WanError, match="no colours are known"):
        check_preview(replace(VAE_2_1, latents_mean=(0.5,) * 16))


# --- pictures -------------------------------------------------------------------------------------


def test_a_preview_shows_the_video_after_each_step(pipe, tmp_path):
    path, pictures = tmp_path / "a.gif", []
    preview = Preview(pipe, path)

    class Look(Preview):
        def __init__(self):
            pass

        def __call__(self, *step):
            preview(*step)
            pictures.append(frames_of(path))

    pipe([PROMPT, "a small blue square on a black background"], seed=0, callback_on_step_end=Look())
    assert len(pictures) == 3
    frames, shown = pictures[-1]
    assert len(frames) == 5
    assert set(shown) == {500}  # four frames at 8 per second
    assert frames[0].size == (192, 96)  # two videos, each latent as 12 x 12 pixels
    # The red circle moves right, at the height of the middle; the other background is black.
    place = []
    for frame in frames:
        pixels = torch.frombuffer(bytearray(frame.tobytes()), dtype=torch.uint8).view(96, 192, 3)
        red = (pixels[:, :96, 0].float() - pixels[:, :96, 1]).clamp(min=60) - 60
        place.append((red.sum(0) @ torch.arange(96.0) / red.sum()).item())
        assert pixels[4:20, 100:180].float().mean() < 60
    assert place == sorted(place)
    assert place[-1] - place[0] > 15
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.gif"]
    with pytest.raises(WanError, match=r"must end in .gif"):
        Preview(pipe, tmp_path / "a.mp4")


def test_previews_cost_under_five_percent(pipe, tmp_path):
    shares = []
    preview, spent = Preview(pipe, tmp_path / "a.gif"), 0.0

    class Timed(Preview):
        def __init__(self):
            pass

        def __call__(self, *step):
            nonlocal spent
            started = time.perf_counter()
            preview(*step)
            spent += time.perf_counter() - started

    for i in range(6):
        spent, started = 0.0, time.perf_counter()
        pipe(f"{PROMPT} {i}", seed=i, callback_on_step_end=Timed())
        shares.append(spent / (time.perf_counter() - started))
    assert min(shares) < 0.05, shares  # others may use this machine


# --- the command ----------------------------------------------------------------------------------


def run(*options):
    (composed,) = compose_runs(LINE, list(options))
    return SampleCommand()(composed)


def test_the_command_writes_a_preview_beside_its_video(tmp_path, capsys):
    assert run(f"prompt={PROMPT}", "preview=true", f"output_dir={tmp_path}") == 0
    (path,) = tmp_path.glob("*.gif")
    assert f"preview: {path}" in capsys.readouterr().err
    assert path.stem == next(tmp_path.glob("*.mp4")).stem
    assert len(frames_of(path)[0]) == 5
    record = json.loads(path.with_suffix(".json").read_text())
    assert "decoder" not in record["settings"]
    assert record["decoder"] is None


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    for name, kind in TAEW.items():
        save_file(published_state(kind), folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def wan21_model(pipe, tmp_path_factory):
    """The miniature with an autoencoder of Wan2.1's latents: random weights, stride 8."""
    from wan.models.vae import WanVAE

    torch.manual_seed(0)
    small = replace(VAE_2_1, base_dim=8, num_res_blocks=1)
    folder = tmp_path_factory.mktemp("model")
    parts = {n: getattr(pipe, n) for n in ("tokenizer", "text_encoder", "transformer")}
    config = replace(pipe.config, vae=small)
    WanDMDPipeline(**parts, vae=WanVAE(small), config=config).save_pretrained(folder)
    return folder


def test_a_tiny_decoder_makes_the_whole_video_and_says_so(
    wan21_model, tiny_files, tmp_path, capsys
):
    tiny = tiny_files / "taew2_1.safetensors"
    options = [f"prompt={PROMPT}", f"checkpoint={wan21_model}", f"output_dir={tmp_path}"]
    options += ["height=64", "width=64", "num_frames=5"]
    given = [f"decoder={tiny}", "preview=true", f"preview_decoder={tiny}", "preflight=always"]
    assert run(*options, *given) == 0
    assert "not exact: decoded by a tiny decoder" in capsys.readouterr().err
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert record["decoder"] == "a tiny decoder, not exact"
    assert record["settings"]["decoder"]["value"]
    assert "decoder" in record["weights_sha256"]
    assert record["predicted_memory_bytes"]["decode"] > 0
    assert "vae" not in record["weights"]  # nobody needed it
    assert len(frames_of(path.with_suffix(".gif"))[0]) == 2  # one per latent frame
    # From Python it is the same video, and needs no VAE.
    pipeline = WanDMDPipeline.from_pretrained(wan21_model, vae=None)
    pipeline.decoder = load_tiny_decoder(tiny)
    size = {"height": 64, "width": 64, "num_frames": 5}
    latents = pipeline(PROMPT, seed=0, output_type="latent", **size).frames
    video = pipeline.decode_latents(latents)
    assert video.shape == (1, 3, 5, 64, 64)
    expected = torch.cat(list(pipeline.decoder.decode_stream(latents)), dim=2)
    torch.testing.assert_close(video, expected)
    # A record does not open files elsewhere: the decoder is given again.
    again = {"checkpoint": str(wan21_model), "output_dir": str(tmp_path)}
    with pytest.raises(WanError, match="give it as decoder="):
        job_of(read_record(path), RerunConfig(record=str(path), **again))
    job = job_of(read_record(path), RerunConfig(record=str(path), decoder=str(tiny), **again))
    assert job.config.decoder == str(tiny)
    assert not job.config.preview


def test_a_decoder_of_other_latents_is_refused_before_anything_is_loaded(tiny_files, tmp_path):
    for name, fits in (("taew2_1", "Wan2.1"), ("taew2_2", "Wan2.2")):
        options = [f"prompt={PROMPT}", f"output_dir={tmp_path}"]
        message = f"{name} decodes the latents of {fits}, and this model's are those of the mini"
        with pytest.raises(WanError, match=message):
            run(*options, f"decoder={tiny_files / name}.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["preview_decoder=a.safetensors"], "preview_decoder=a.safetensors without preview=:"),
        (["decoder=a.safetensors", "tile=4"], "decoder= and tile=4"),
        (["decoder=a.safetensors"], "a.safetensors: no such file"),
        (["decoder=a.pth"], "pickle"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({}, "a.pth")
    with pytest.raises(Exception, match=message):
        run(f"prompt={PROMPT}", *options)
