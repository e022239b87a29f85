"""The pipeline against diffusers on the same folder, and against its own promises.

The models are tiny, with random weights: two blocks, 16 latent channels, stride 4x4x4, 4x4 pixels a
latent, so a 32x32 video of 9 frames has 3 x 8 x 8 latents.
"""

import io
import json
import random
import shutil
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image

import wan
from wan.errors import WanError
from wan.models.dit import WanDiT
from wan.models.dit_config import DiTConfig
from wan.models.tokenizer import Tokenizer
from wan.models.tokenizer_export import write_tokenizer_folder
from wan.models.umt5 import UMT5Config, UMT5Encoder
from wan.models.vae import VAEConfig, WanVAE
from wan.pipeline.config import PipelineConfig, SamplingDefaults
from wan.pipeline.pipeline import WanDMDPipeline, WanPipeline
from wan.runtime.offload import visiting
from wan.sampling.noise import sample_generators
from wan.sampling.schedule import few_step_schedule, unipc_schedule
from wan.sampling.scheduler_config import SchedulerSettings

PROMPT = "a small red circle, moving right"
SIZE = {"height": 32, "width": 32, "num_frames": 9}
LATENT_SHAPE = (1, 16, 3, 8, 8)

DIT = DiTConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=2,
    ffn_dim=48,
    in_channels=16,
    out_channels=16,
    text_dim=24,
    freq_dim=16,
)
VAE = VAEConfig(
    base_dim=8,
    decoder_base_dim=8,
    z_dim=16,
    dim_mult=(1, 1, 2),
    num_res_blocks=1,
    temperal_downsample=(True, True),
    is_residual=False,
    in_channels=3,
    out_channels=3,
    patch_size=None,
    latents_mean=tuple(0.1 * i for i in range(16)),
    latents_std=tuple(1 + 0.1 * i for i in range(16)),
)
TEXT = UMT5Config(vocab_size=96, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
DEFAULTS = SamplingDefaults(**SIZE, fps=8, num_inference_steps=3, max_sequence_length=16)


def random_weights(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights whose effects are all of order one, so that no path is hidden by a small number."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1 and min(parameter.shape[:2]) > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.normal_(std=0.2, generator=generator)
                parameter.add_(1.0 if name.endswith(("norm.weight", "gamma")) else 0.0)
    return module.eval()


def write_tokenizer(folder) -> None:
    rng = random.Random(0)
    words = ["a", "small", "red", "blue", "circle", "square", "moving", "left", "right", "gray"]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(rng.choices(words, k=9)) for _ in range(300)]),
        model_writer=out,
        model_type="unigram",
        vocab_size=64,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        normalization_rule_name="nmt_nfkc",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    write_tokenizer_folder(out.getvalue(), folder, num_sentinels=5)


SHIFT_12 = SchedulerSettings(shift=12.0)


def build(tokenizer_folder, pipeline_class=WanPipeline, two_experts=False, **settings):
    config = PipelineConfig(
        pipeline_class.CLASS_NAME,
        DIT,
        VAE,
        TEXT,
        boundary_ratio=0.9 if two_experts else None,
        defaults=DEFAULTS,
        **settings,
    )
    return pipeline_class(
        config=config,
        tokenizer=Tokenizer.from_folder(tokenizer_folder),
        text_encoder=random_weights(UMT5Encoder(TEXT), 1),
        transformer=random_weights(WanDiT(DIT), 2),
        transformer_2=random_weights(WanDiT(DIT), 4) if two_experts else None,
        vae=random_weights(WanVAE(VAE), 3),
    )


def write_models(folder) -> None:
    """Write a TI2V base model, a student and a two-expert model below a folder."""
    tokenizer = folder / "tokenizer"
    write_tokenizer(tokenizer)
    build(tokenizer, expand_timesteps=True).save_pretrained(folder / "base")
    build(tokenizer, WanDMDPipeline, timesteps=(1000, 757, 522)).save_pretrained(folder / "student")
    build(tokenizer, two_experts=True).save_pretrained(folder / "experts")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tokenizer_folder, tmp_path_factory):
    """A TI2V base model in the released layout, written by our own code."""
    path = tmp_path_factory.mktemp("models") / "ti2v"
    build(tokenizer_folder, expand_timesteps=True).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pipe(folder):
    return WanPipeline.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def student(tokenizer_folder):
    return build(tokenizer_folder, WanDMDPipeline, timesteps=(1000, 757, 522))


def distance(ours, theirs) -> float:
    ours, theirs = (torch.as_tensor(x, dtype=torch.float64) for x in (ours, theirs))
    assert ours.shape == theirs.shape
    return ((ours - theirs).norm() / theirs.norm()).item()


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- parity with diffusers ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(folder):
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.WanPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_text_to_video_equals_diffusers(pipe, reference):
    settings = {
        **SIZE,
        "negative_prompt": "a blue square",
        "num_inference_steps": 6,
        "guidance_scale": 4.0,
        "max_sequence_length": 16,
    }
    theirs = reference(PROMPT, generator=seeded(), output_type="latent", **settings).frames
    ours = pipe(PROMPT, generator=seeded(), output_type="latent", **settings).frames
    assert ours.dtype == torch.float32
    assert distance(ours, theirs) <= 1e-4
    assert distance(ours, torch.randn(LATENT_SHAPE, generator=seeded())) > 0.3  # it did something
    frames = reference(PROMPT, generator=seeded(), **settings).frames
    assert distance(pipe(PROMPT, generator=seeded(), **settings).frames, frames) <= 1e-4


def test_image_to_video_equals_diffusers(pipe, reference):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.WanImageToVideoPipeline(
        **{
            name: getattr(reference, name)
            for name in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
        },
        expand_timesteps=True,
    )
    theirs.set_progress_bar_config(disable=True)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    settings = {
        **SIZE,
        "image": Image.fromarray(pixels),
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "max_sequence_length": 16,
        "output_type": "latent",
    }
    expected = theirs(prompt=PROMPT, generator=seeded(), **settings).frames
    ours = pipe(PROMPT, generator=seeded(), **settings).frames
    assert distance(ours, expected) <= 1e-4
    assert distance(ours[:, :, 0], pipe.encode_image(settings["image"], 32, 32)[:, :, 0]) == 0
    without = pipe(PROMPT, generator=seeded(), **(settings | {"image": None})).frames
    assert distance(without[:, :, 1:], ours[:, :, 1:]) > 0.01


@pytest.mark.parametrize(
    ("name", "changes", "sampler"),
    [
        ("UniPCMultistepScheduler", {}, "unipc"),
        ("UniPCMultistepScheduler", {"solver_order": 3}, "unipc"),
        ("UniPCMultistepScheduler", {"use_karras_sigmas": True}, "unipc"),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "euler"),
        ("DPMSolverMultistepScheduler", {}, "dpm++"),
    ],
)
def test_the_folders_scheduler_samples_as_in_diffusers(
    tokenizer_folder, tmp_path, name, changes, sampler
):
    diffusers = pytest.importorskip("diffusers")
    build(tokenizer_folder).save_pretrained(tmp_path / "plain")
    theirs = diffusers.WanPipeline.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = getattr(diffusers, name).from_config(theirs.scheduler.config, **changes)
    theirs.save_pretrained(tmp_path / "saved")
    ours = WanPipeline.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert ours.plan().sampler == sampler
    call = {"prompt": PROMPT, "negative_prompt": "", "num_frames": 5, "height": 32, "width": 32}
    call |= {
        "latents": ours.prepare_latents(1, None, 32, 32, 5, generator=seeded()),
        "output_type": "latent",
    }
    call |= {"num_inference_steps": 6, "guidance_scale": 3.0, "max_sequence_length": 512}
    a, b = ours(**call).frames, theirs(**call).frames
    assert ((a - b).norm() / b.norm()).item() < 1e-5
    ours.save_pretrained(tmp_path / "again")
    file = "scheduler/scheduler_config.json"
    written = json.loads((tmp_path / "again" / file).read_text())
    saved = json.loads((tmp_path / "saved" / file).read_text())
    saved.pop("lambda_min_clipped", None)  # -Infinity, which is not JSON
    assert written == saved
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", name]


@pytest.mark.parametrize(
    "fields",
    [
        {"_class_name": "LCMScheduler", "beta_start": 0.1},
        {"use_flow_sigmas": False},
        {"prediction_type": "epsilon", "flow_shift": 4.0},
        {"num_train_timesteps": 500},
    ],
)
def test_a_scheduler_that_cannot_be_followed_is_warned_of_and_kept(
    tokenizer_folder, tmp_path, fields
):
    build(tokenizer_folder).save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "scheduler" / "scheduler_config.json"
    content = json.loads(file.read_text()) | fields
    file.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"sampled by UniPC with shift \d unless") as seen:
        pipe = WanPipeline.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert any(next(iter(fields)) in str(w.message) or "LCM" in str(w.message) for w in seen)
    assert pipe.plan().sampler == "unipc"
    assert not pipe.config.scheduler.followed
    pipe.save_pretrained(tmp_path / "again")
    again = tmp_path / "again" / "scheduler" / "scheduler_config.json"
    assert json.loads(again.read_text()) == content


def test_compat_fastvideo_is_its_noise_seed_prompt_and_rounding(pipe):
    """One switch for what has to be equal to compare the same seed side by side."""
    odd = '  A  "red"   circle &amp; a square '
    call = {"num_inference_steps": 1, "num_frames": 5, "height": 32, "width": 32}
    ours = pipe(odd, compat="fastvideo", output_type="pil", **call)
    assert ours.seeds == [1024]
    embeds, _ = pipe.encode_prompt(odd.strip(), None, False, clean=str)
    assert not torch.equal(embeds, pipe.encode_prompt(odd, None, False)[0])
    parts = {"prompt_embeds": embeds, "negative_prompt": "", "seed": 1024}
    video = pipe(**parts, frame_first_noise=True, **call).frames[0]
    frames = np.stack([np.asarray(frame) for frame in ours.frames[0]])
    assert np.array_equal(frames, np.floor(video * np.float32(255)).astype(np.uint8))
    assert pipe(PROMPT, compat="fastvideo", seed=3, **call).seeds == [3]
    with pytest.raises(WanError, match="none, fastvideo"):
        pipe(PROMPT, compat="comfyui")


def test_two_experts_equal_diffusers(tokenizer_folder, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    build(tokenizer_folder, two_experts=True, scheduler=SHIFT_12).save_pretrained(tmp_path / "a14b")
    theirs = diffusers.WanPipeline.from_pretrained(tmp_path / "a14b", dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    ours = WanPipeline.from_pretrained(tmp_path / "a14b", dtype=torch.float32)
    settings = {
        **SIZE,
        "num_inference_steps": 5,
        "guidance_scale": 4.0,
        "guidance_scale_2": 3.0,
        "max_sequence_length": 16,
        "output_type": "latent",
    }
    timesteps = unipc_schedule(5, 12.0).timesteps
    assert 0 < int((timesteps >= 900).sum()) < 5  # both experts run
    expected = theirs(PROMPT, generator=seeded(), **settings).frames
    assert distance(ours(PROMPT, generator=seeded(), **settings).frames, expected) <= 1e-4
    assert (
        distance(
            ours(PROMPT, generator=seeded(), **(settings | {"guidance_scale_2": 4.0})).frames,
            expected,
        )
        > 1e-3
    )


@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_output_types_are_those_of_diffusers(pipe, reference, output_type):
    settings = {**SIZE, "num_inference_steps": 1, "guidance_scale": 1.0, "max_sequence_length": 16}
    theirs = reference(PROMPT, generator=seeded(), output_type=output_type, **settings).frames
    ours = pipe(PROMPT, generator=seeded(), output_type=output_type, **settings).frames
    assert type(ours) is type(theirs)
    if output_type == "pil":
        assert [len(video) for video in ours] == [len(video) for video in theirs] == [9]
        ours, theirs = (np.stack([np.asarray(f) for f in v[0]]).astype(int) for v in (ours, theirs))
        assert ours.shape == theirs.shape == (9, 32, 32, 3)
        assert np.abs(ours - theirs).max() <= 1  # a value on the edge may round either way
    else:
        assert ours.dtype == theirs.dtype
        assert distance(ours, theirs) <= 1e-4


def test_single_generator_for_a_batch_is_one_draw_as_in_diffusers(pipe):
    latents = pipe([PROMPT, "blue"], generator=seeded(), num_inference_steps=1, guidance_scale=1.0)
    noise = torch.randn((2, *LATENT_SHAPE[1:]), generator=seeded())
    given = pipe([PROMPT, "blue"], latents=noise, num_inference_steps=1, guidance_scale=1.0)
    assert np.array_equal(latents.frames, given.frames)


# --- a video is its own ---------------------------------------------------------------------------


def test_a_batch_gives_each_video_what_it_gives_alone(pipe):
    prompts = [PROMPT, "a blue square", "gray"]
    together = pipe(prompts, seed=5, negative_prompt="left", guidance_scale=3.0)
    assert together.seeds == [5, 6, 7]
    for j, prompt in enumerate(prompts):
        alone = pipe(prompt, seed=5 + j, negative_prompt="left", guidance_scale=3.0)
        assert np.array_equal(alone.frames[0], together.frames[j])


def test_a_few_step_batch_gives_each_video_what_it_gives_alone(student):
    together = student([PROMPT, "a blue square"], seed=[9, 4]).frames
    assert np.array_equal(student(PROMPT, seed=9).frames[0], together[0])
    assert np.array_equal(student("a blue square", seed=4).frames[0], together[1])


def test_videos_per_prompt_follow_each_other(pipe):
    output = pipe(["red", "blue"], seed=3, num_videos_per_prompt=2, num_inference_steps=1)
    assert output.seeds == [3, 4, 5, 6]
    alone = pipe("blue", seed=5, num_inference_steps=1)
    assert np.array_equal(output.frames[2], alone.frames[0])


def test_without_seed_and_generator_the_global_generator_draws(pipe):
    torch.manual_seed(1)
    output = pipe(PROMPT, num_inference_steps=1)
    again = pipe(PROMPT, num_inference_steps=1)
    assert output.seeds is None
    assert not np.array_equal(output.frames, again.frames)
    randoms = [pipe(PROMPT, seed=-1, num_inference_steps=1).seeds for _ in range(2)]
    assert randoms[0] != randoms[1]
    assert all(0 <= seed < 2**32 for (seed,) in randoms)
    repeated = pipe(PROMPT, seed=1, num_inference_steps=1)
    assert np.array_equal(repeated.frames, output.frames)


def test_prompts_are_remembered(pipe, monkeypatch):
    pipe("a red square", num_inference_steps=1, seed=0)
    calls = []
    forward = pipe.text_encoder.encode_ids
    monkeypatch.setattr(
        pipe.text_encoder, "encode_ids", lambda *a, **k: calls.append(1) or forward(*a, **k)
    )
    first = pipe("a red square", num_inference_steps=1, seed=0)
    assert not calls
    pipe.encode_prompt("red blue left", do_classifier_free_guidance=False)
    assert calls == [1]
    assert np.array_equal(first.frames, pipe("a red square", num_inference_steps=1, seed=0).frames)


# --- the stages alone -----------------------------------------------------------------------------


def test_stages_put_together_by_hand_are_the_call(pipe):
    context, negative = pipe.encode_prompt(PROMPT, "left")
    noise = pipe.prepare_latents(1, None, 32, 32, 9, generator=seeded())
    latents = pipe(
        prompt_embeds=context,
        negative_prompt_embeds=negative,
        latents=noise,
        output_type="latent",
    ).frames
    video = pipe.decode_latents(latents)
    assert video.shape == (1, 3, 9, 32, 32)
    assert video.abs().max() <= 1
    whole = pipe(PROMPT, "left", generator=seeded(), output_type="pt").frames
    torch.testing.assert_close(whole, (video / 2 + 0.5).transpose(1, 2), rtol=0, atol=1e-6)


def test_given_latents_set_the_size(pipe):
    noise = torch.randn(1, 16, 2, 8, 16, generator=seeded())
    assert pipe(PROMPT, latents=noise, num_inference_steps=1).frames.shape == (1, 5, 32, 64, 3)


def test_images_come_as_files_pictures_and_tensors(pipe, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    tensor = torch.from_numpy(pixels).permute(2, 0, 1) / 255 * 2 - 1
    expected = pipe.encode_image(Image.fromarray(pixels), 32, 32)
    assert torch.equal(pipe.encode_image(tmp_path / "image.png", 32, 32), expected)
    assert torch.equal(pipe.encode_image(tensor, 32, 32), expected)
    assert pipe.encode_image([tensor, tensor], 32, 32, count=2).shape == (2, 16, 1, 8, 8)


def test_images_are_one_or_one_per_prompt(pipe):
    dark, light = torch.full((3, 32, 32), -1.0), torch.full((3, 32, 32), 1.0)
    how = {"seed": 0, "num_inference_steps": 1, "height": 32, "width": 32, "num_frames": 5}
    how["num_videos_per_prompt"] = 2
    frames = pipe(["x", "x"], image=[dark, light], **how).frames
    alone = pipe(["x", "x"], image=light, **how).frames
    np.testing.assert_array_equal(frames[2:], alone[2:])
    assert not np.array_equal(frames[:2], alone[:2])
    with pytest.raises(WanError, match="2 images for 4 prompts"):
        pipe(["x"] * 4, image=[dark, light], **how)


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_every_sampler_can_be_chosen(pipe, sampler):
    output = pipe(PROMPT, seed=0, sampler=sampler, num_inference_steps=2, shift=3.0)
    assert output.plan.sampler == sampler
    assert f"{'Euler' if sampler == 'euler' else 'UniPC'} steps" in output.plan.schedule.description
    other = pipe(PROMPT, seed=0, sampler=sampler, num_inference_steps=2, shift=9.0)
    assert not np.array_equal(output.frames, other.frames)


def test_a_whole_schedule_can_be_given(pipe):
    schedule = unipc_schedule(2, 5.0, grid="official")
    assert pipe(PROMPT, seed=0, schedule=schedule).plan.schedule is schedule


# --- few-step students ----------------------------------------------------------------------------


def test_student_runs_its_timesteps_without_guidance(student):
    seen = []
    forward = student.transformer.forward

    def watch(latents, timestep, context, **options):
        seen.append(timestep.item())
        return forward(latents, timestep, context, **options)

    student.transformer.forward = watch
    try:
        output = student(PROMPT, seed=0)
    finally:
        student.transformer.forward = forward
    assert seen == [1000, 757, 522]
    assert output.plan.sampler == "few_step"
    assert torch.equal(output.plan.schedule.sigmas, few_step_schedule().sigmas)
    assert not output.plan.guided


def test_student_draws_fresh_noise_unless_deterministic(student):
    noise = torch.randn(LATENT_SHAPE, generator=seeded())

    def run(**options) -> np.ndarray:
        return student(PROMPT, latents=noise, **options).frames

    assert not np.array_equal(run(seed=1), run(seed=2))
    assert np.array_equal(run(seed=1), run(seed=1))
    assert np.array_equal(run(seed=1, deterministic=True), run(seed=2, deterministic=True))
    own = student.config
    student.config = replace(own, defaults=replace(own.defaults, deterministic=True))
    try:
        assert np.array_equal(run(seed=1), run(seed=2))
        assert not np.array_equal(run(seed=1, deterministic=False), run(seed=1))
    finally:
        student.config = own


@pytest.mark.parametrize("frame_first", [False, True])
def test_saved_noise_with_its_seed_is_the_seed(student, frame_first):
    """Re-noising goes on where the start's noise ended; it does not draw that again."""
    noise = student.prepare_latents(
        1, None, 32, 32, 5, generator=sample_generators(7, 1), frame_first=frame_first
    )
    how = {"height": 32, "width": 32, "num_frames": 5, "frame_first_noise": frame_first}
    replayed = student(PROMPT, seed=7, latents=noise, **how).frames
    assert np.array_equal(replayed, student(PROMPT, seed=7, **how).frames)


def test_frame_first_noise_is_another_draw_of_the_same_stream(student):
    plain, frame_first = student(PROMPT, seed=1), student(PROMPT, seed=1, frame_first_noise=True)
    assert not np.array_equal(plain.frames, frame_first.frames)


UNTRAINED = {
    "guidance_scale=5": {"guidance_scale": 5.0},
    "negative_prompt": {"negative_prompt": "ugly", "guidance_scale": 2.0},
    "num_inference_steps=4": {"num_inference_steps": 4},
    r"timesteps=\[900, 300\]": {"timesteps": [900, 300]},
    "sampler=unipc": {"sampler": "unipc"},
    "image": {"image": torch.zeros(3, 32, 32)},
}


@pytest.mark.parametrize("message", UNTRAINED)
def test_student_refuses_what_it_was_not_trained_for_unless_told(tokenizer_folder, message):
    student = build(
        tokenizer_folder, WanDMDPipeline, timesteps=(1000, 757, 522), expand_timesteps=True
    )
    with pytest.raises(WanError, match=f"{message}.*allow_untrained=True"):
        student(PROMPT, **UNTRAINED[message])
    output = student(PROMPT, seed=0, allow_untrained=True, **UNTRAINED[message])
    assert output.plan.untrained
    assert np.isfinite(output.frames).all()


def test_student_takes_its_own_recipe_said_aloud(student):
    plain = student(PROMPT, seed=0)
    aloud = student(
        PROMPT,
        seed=0,
        timesteps=[1000, 757, 522],
        guidance_scale=1.0,
        sampler="few_step",
    )
    assert np.array_equal(plain.frames, aloud.frames)
    assert np.array_equal(plain.frames, student(PROMPT, seed=0, num_inference_steps=3).frames)
    assert aloud.plan.untrained == ()


# --- hooks ----------------------------------------------------------------------------------------


def test_callback_sees_each_step_and_may_change_tensors(pipe):
    seen = []

    def callback(pipeline, i, t, tensors):
        assert pipeline is pipe
        seen.append((i, t.item(), sorted(tensors)))
        return {"latents": tensors["latents"] * 0} if i == 1 else {}

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    changed = pipe(
        PROMPT,
        seed=0,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=names,
    )
    timesteps = unipc_schedule(3, 5.0).timesteps.long().tolist()
    assert seen == [(i, t, sorted(names)) for i, t in enumerate(timesteps)]
    assert not np.array_equal(changed.frames, pipe(PROMPT, seed=0).frames)


def test_callback_equals_diffusers_when_it_changes_latents_and_prompts(pipe, reference):
    other = pipe.encode_prompt("blue", do_classifier_free_guidance=False)[0]

    def callback(pipeline, i, t, tensors):
        return {"latents": tensors["latents"] * 0.5, "prompt_embeds": other} if i == 1 else {}

    settings = {
        **SIZE,
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "max_sequence_length": 16,
        "output_type": "latent",
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["latents"],
    }
    theirs = reference(PROMPT, generator=seeded(), **settings).frames
    assert distance(pipe(PROMPT, generator=seeded(), **settings).frames, theirs) <= 1e-4


def test_interrupt_stops_after_the_step_at_hand(pipe):
    states = []

    def callback(pipeline, i, t, tensors):
        states.append(tensors["latents"])
        pipeline.interrupt = i == 1

    output = pipe(PROMPT, seed=0, callback_on_step_end=callback, output_type="latent")
    assert len(states) == 2
    assert torch.equal(output.frames, states[1])
    assert pipe(PROMPT, seed=0).frames.shape == (1, 9, 32, 32, 3)  # the next call is whole again


def test_latents_that_stop_being_finite_are_reported_with_their_step(pipe):
    def callback(pipeline, i, t, tensors):
        return {"latents": tensors["latents"] * float("nan")}

    with pytest.raises(FloatingPointError, match="after step 2 of 3"):
        pipe(PROMPT, seed=0, callback_on_step_end=callback)


def test_progress_and_timings_per_stage(pipe):
    seen = []
    pipe(
        "blue red right",
        image=torch.zeros(3, 32, 32),
        seed=0,
        on_progress=lambda *call: seen.append(call),
    )
    assert [call for call in seen if call[0] == "denoise"] == [("denoise", i, 3) for i in range(4)]
    assert seen[0][0] == "encode"
    assert seen[-1] == ("decode", 3, 3)
    stages = ["encode_text", "encode_image", "denoise", "decode"]
    assert list(pipe.last_timings) == stages
    assert all(seconds > 0 for seconds in pipe.last_timings.values())


@pytest.mark.parametrize("tile", [None, 4])
@pytest.mark.parametrize(("chunk", "num_chunks"), [(1, 8), (2, 4), (4, 2)])
def test_chunks_of_decoding_differ_by_rounding_only(pipe, monkeypatch, tile, chunk, num_chunks):
    latents = torch.randn(1, 16, 9, 8, 8, generator=seeded())
    monkeypatch.setattr(pipe, "tile", tile)
    expected = pipe.decode_latents(latents)
    monkeypatch.setattr(pipe, "chunk_latents", chunk)
    seen = []
    video = pipe.decode_latents(latents, lambda *call: seen.append(call))
    torch.testing.assert_close(video, expected, rtol=0, atol=2e-5)  # of float32 sums near 1
    assert len(seen) == 1 + (num_chunks if tile is None else 1)  # tiles come in one piece
    monkeypatch.setattr(pipe, "chunk_latents", 0)
    with pytest.raises(WanError, match="chunk_latents=0: must be at least 1"):
        pipe.decode_latents(latents)


def test_safety_checker_sees_frames_before_they_are_returned(pipe):
    shown = []

    def checker(frames):
        shown.append(frames)
        return len(shown) == 2

    pipe.safety_checker = checker
    try:
        output = pipe(["red", "blue"], seed=0, num_inference_steps=1)
        with pytest.raises(WanError, match="safety checker"):
            pipe("red", output_type="latent")
    finally:
        pipe.safety_checker = None
    assert [tuple(frames.shape) for frames in shown] == [(9, 3, 32, 32)] * 2
    assert output.nsfw_content_detected == [False, True]
    assert output.frames[0].max() > 0
    assert output.frames[1].max() == 0
    unchecked = pipe(["red", "blue"], seed=0, num_inference_steps=1)
    assert unchecked.nsfw_content_detected is None
    assert np.array_equal(unchecked.frames[0], output.frames[0])


def test_return_dict_false_gives_a_tuple(pipe):
    (frames,) = pipe(PROMPT, seed=0, num_inference_steps=1, return_dict=False)
    assert frames.shape == (1, 9, 32, 32, 3)


# --- loading and saving ---------------------------------------------------------------------------


def test_offload_by_stage_changes_nothing(folder, pipe):
    offloaded = WanPipeline.from_pretrained(folder, dtype=torch.float32, offload="stage")
    image = torch.zeros(3, 32, 32)
    ours = offloaded(PROMPT, image=image, seed=2).frames
    assert np.array_equal(ours, pipe(PROMPT, image=image, seed=2).frames)


def test_offloaded_experts_take_turns_on_the_device(tokenizer_folder, monkeypatch):
    pipeline = build(tokenizer_folder, two_experts=True, scheduler=SHIFT_12)
    expected = pipeline(PROMPT, seed=0).frames
    pipeline.offload = "stage"
    networks = {id(module): name for name, module in pipeline.modules.items()}
    visits = []

    @contextmanager
    def watched(module, device):
        visits.append(("in", networks[id(module)]))
        with visiting(module, device):
            yield
        visits.append(("out", networks[id(module)]))

    monkeypatch.setattr("wan.runtime.offload.visiting", watched)
    assert np.array_equal(pipeline("blue", seed=0).frames, pipeline("blue", seed=0).frames)
    first = ["text_encoder", "transformer", "transformer_2", "vae"]
    again = ["transformer", "transformer_2", "vae"]  # the prompt is known by then
    assert visits == [(way, name) for name in first + again for way in ("in", "out")]
    assert np.array_equal(pipeline(PROMPT, seed=0).frames, expected)


@pytest.fixture
def traced_only(monkeypatch):
    """The compiler's tracing, and its graphs run op by op: no C++ compiler is needed."""
    compile_module = torch.nn.Module.compile

    def trace(module, **options):
        compile_module(module, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", trace)


@pytest.mark.parametrize(("what", "offload"), [("dit", "block"), ("all", "none")])
def test_compiling_changes_no_video(tokenizer_folder, traced_only, what, offload):
    pipeline = build(tokenizer_folder)
    expected = pipeline(PROMPT, seed=4).frames
    pipeline.offload = offload
    pipeline._compile(what)
    assert pipeline.transformer.blocks[1]._compiled_call_impl is not None
    assert (pipeline.vae.decoder._compiled_call_impl is not None) == (what == "all")
    np.testing.assert_allclose(pipeline(PROMPT, seed=4).frames, expected, atol=1e-5)


def test_a_compiled_model_takes_one_attention_after_the_other(folder, pipe, traced_only):
    """PyTorch compiles a function in so many variants, and then, with a warning, no more."""
    compiled = WanPipeline.from_pretrained(folder, dtype=torch.float32, compile="dit")
    options = {"seed": 4, "num_inference_steps": 1, "output_type": "latent"}
    # Two of each attention: of the clip to itself and to the text.
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for name in ("spatial", "temporal", "sdpa"):
            compiled.set_attention(name)
            latents = compiled(PROMPT, **options).frames
    torch.testing.assert_close(latents, pipe(PROMPT, **options).frames, rtol=0, atol=1e-5)


def test_a_visit_leaves_the_module_as_it_was():
    module = torch.nn.BatchNorm1d(3).eval()
    before = dict(module.state_dict(keep_vars=True))
    with visiting(module, torch.device("meta")):
        assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
        assert isinstance(module.weight, torch.nn.Parameter)
    after = module.state_dict(keep_vars=True)
    assert all(after[name] is tensor for name, tensor in before.items())


def test_bfloat16_keeps_what_must_stay_float32(folder, pipe):
    half = WanPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in half.transformer.named_parameters()}
    assert dtypes["blocks.0.ffn.up.weight"] == torch.bfloat16
    assert dtypes["blocks.0.modulation"] == torch.float32
    assert half.vae.encoder.conv_in.weight.dtype == torch.float32
    assert half.vae.decoder.conv_in.weight.dtype == torch.bfloat16
    image = torch.full((3, 32, 32), 0.5)
    assert torch.equal(half.encode_image(image, 32, 32), pipe.encode_image(image, 32, 32))
    assert distance(half(PROMPT, seed=0).frames, pipe(PROMPT, seed=0).frames) < 0.1


def test_a_saved_folder_gives_the_same_video_and_settings(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "copy")
    copy = WanPipeline.from_pretrained(tmp_path / "copy", dtype=torch.float32)
    assert copy.config == pipe.config
    assert np.array_equal(copy(PROMPT, seed=0).frames, pipe(PROMPT, seed=0).frames)
    (tmp_path / "copy" / "notes.txt").write_text("mine")
    pipe.save_pretrained(tmp_path / "copy", max_shard_size="20KB")
    again = WanPipeline.from_pretrained(tmp_path / "copy", dtype=torch.float32)
    np.testing.assert_allclose(again(PROMPT, seed=0).frames, pipe(PROMPT, seed=0).frames, atol=1e-5)
    assert len(list((tmp_path / "copy" / "transformer").glob("*.safetensors"))) > 1
    assert (tmp_path / "copy" / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_saved_student_keeps_its_timesteps(tokenizer_folder, tmp_path):
    student = build(tokenizer_folder, WanDMDPipeline, timesteps=(1000, 600))
    student.save_pretrained(tmp_path / "student")
    loaded = WanDMDPipeline.from_pretrained(tmp_path / "student", dtype=torch.float32)
    assert loaded.plan().schedule.timesteps.tolist() == [1000, 600]
    index = json.loads((tmp_path / "student" / "model_index.json").read_text())
    del index["timesteps"]
    (tmp_path / "student" / "model_index.json").write_text(json.dumps(index))
    released = WanDMDPipeline.from_pretrained(tmp_path / "student", dtype=torch.float32)
    assert released.plan().schedule.timesteps.tolist() == [1000, 757, 522]


def test_a_student_transformer_in_a_base_folder(folder, tokenizer_folder, tmp_path):
    build(tokenizer_folder, WanDMDPipeline, timesteps=(1000, 757, 522)).save_pretrained(
        tmp_path / "student"
    )
    with pytest.raises(WanError, match=r"wan\.WanPipeline\.from_pretrained"):
        WanDMDPipeline.from_pretrained(folder)
    mixed = WanDMDPipeline.from_pretrained(
        folder, dtype=torch.float32, transformer=tmp_path / "student" / "transformer"
    )
    assert mixed.plan().schedule.timesteps.tolist() == [1000, 757, 522]


@pytest.fixture
def broken(folder, tmp_path):
    """A copy of the model to damage."""
    shutil.copytree(folder, tmp_path / "model")
    return tmp_path / "model"


def change_json(path, **changes) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v != "delete"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (("model_index.json", {"_class_name": "FluxPipeline"}), "WanPipeline, WanDMDPipeline"),
        (("model_index.json", {"_class_name": "WanDMDPipeline"}), "wan.WanDMDPipeline.from_pre"),
        (("model_index.json", {"boundary_ratio": 0.9}), "two experts need both"),
        (("sampling_defaults.json", {"hight": 3}), "hight"),
        (("scheduler/scheduler_config.json", {"flow_shift": "delete"}), "flow_shift"),
        (("transformer/config.json", {"in_channels": 36}), "image-to-video transformer"),
        (("transformer/config.json", {"text_dim": 4096}), "width 4096"),
        (("vae/config.json", {"z_dim": 48, "latents_mean": [], "latents_std": []}), "have 48"),
    ],
)
def test_a_folder_that_contradicts_itself_is_refused_before_weights(broken, damage, message):
    for weights in broken.rglob("*.safetensors"):
        weights.unlink()
    change_json(broken / damage[0], **damage[1])
    with pytest.raises(WanError, match=message):
        WanPipeline.from_pretrained(broken)


@pytest.mark.parametrize(
    "missing", ["model_index.json", "scheduler/scheduler_config.json", "vae/config.json"]
)
def test_a_missing_file_is_named(broken, missing):
    (broken / missing).unlink()
    with pytest.raises(WanError, match=missing.rpartition("/")[2]):
        WanPipeline.from_pretrained(broken)


def test_missing_weights_and_tokenizer_are_named(broken):
    shutil.rmtree(broken / "tokenizer")
    with pytest.raises(WanError, match="tokenizer"):
        WanPipeline.from_pretrained(broken)
    with pytest.raises(WanError, match="no such folder"):
        WanPipeline.from_pretrained(broken / "elsewhere")


def test_the_official_layout_is_recognised(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanModel", "dim": 3072}))
    with pytest.raises(WanError, match=r"official layout.*infer\.convert"):
        WanPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "flash4"}, "sdpa"),
        ({"offload": "disk"}, "none, stage, block"),
        ({"quantize": "int4"}, "none, int8, fp8"),
        ({"compile": "vae"}, "none, dit, all"),
        ({"device": "abacus"}, "abacus"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"transformer_2": "elsewhere"}, "one network"),
    ],
)
def test_impossible_choices_are_refused(folder, options, message):
    with pytest.raises(WanError, match=message):
        WanPipeline.from_pretrained(folder, **options)


# --- requests that cannot be met ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"height": 33}, "height=33: must be a multiple of 8; nearest are 32 and 40"),
        ({"width": 0}, "width=0: .* nearest is 8"),
        ({"num_frames": 120}, "num_frames=120: .* nearest are 117 and 121"),
        ({"num_frames": -1}, r"num_frames=-1: .* nearest is 1"),
        ({"height": 10**6}, "height=1000000: .* nearest is 8192"),
        ({"height": 30, "num_frames": 8}, "height=30.*num_frames=8"),
        ({"num_inference_steps": 0}, "steps=0"),
        ({"num_inference_steps": 5, "timesteps": [1000]}, "give one of them"),
        ({"timesteps": [500, 900]}, "falling"),
        ({"sampler": "dpm"}, "euler, unipc, dpm.., few_step"),
        ({"shift": -1.0}, "shift=-1"),
        ({"guidance_scale": -0.5}, "at least 0"),
        ({"guidance_scale": float("nan")}, "at least 0"),
        ({"guidance_scale_2": 3.0}, "two experts"),
        ({"negative_prompt": ["x", "y"]}, "2 negative prompts for 1"),
        ({"negative_prompt": "x", "negative_prompt_embeds": torch.zeros(1, 16, 24)}, "only one"),
        ({"prompt": None}, "give one"),
        ({"prompt_embeds": torch.zeros(1, 16, 24)}, "only one"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 16, 23)}, r"\(B, S, 24\)"),
        ({"prompt": []}, "list of texts"),
        ({"prompt": [3]}, "list of texts"),
        ({"num_videos_per_prompt": 0}, "at least 1"),
        ({"num_videos_per_prompt": 1.5}, "at least 1"),
        ({"seed": 1, "generator": seeded()}, "give one of them"),
        ({"generator": [seeded(), seeded()]}, "2 generators for 1 videos"),
        ({"seed": [1, 2]}, "2 seeds for 1"),
        ({"seed": -2}, "whole number"),
        ({"latents": torch.zeros(1, 15, 3, 8, 8)}, r"\(1, 15, 3, 8, 8\)"),
        ({"latents": torch.zeros(2, 16, 3, 8, 8)}, "1 videos"),
        ({"output_type": "gif"}, "np, pt, pil, latent"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
        ({"image": 3}, "type int"),
        ({"image": torch.zeros(3, 32, 32), "num_frames": 1}, "the image itself"),
        ({"image": [torch.zeros(3, 32, 32)] * 2}, "2 images for 1"),
        ({"deterministic": True}, "adds no noise"),
        ({"max_sequence_length": 0}, "at least 1"),
    ],
)
def test_impossible_requests_are_refused_before_work_begins(pipe, request_, message, monkeypatch):
    def too_late(*arguments):
        raise AssertionError("a network was run")

    for module in (pipe.text_encoder, pipe.transformer, pipe.vae.encoder):
        monkeypatch.setattr(module, "forward", too_late)
    pipe._prompt_cache.clear()
    with pytest.raises(WanError, match=message):
        pipe(**({"prompt": PROMPT} | request_))


def test_an_image_for_a_model_without_one_is_refused(tokenizer_folder):
    with pytest.raises(WanError, match="not trained to start from one"):
        build(tokenizer_folder)(PROMPT, image=torch.zeros(3, 32, 32))


def test_a_callback_that_returns_nonsense_is_refused(pipe):
    with pytest.raises(WanError, match=r"unknown latent; known"):
        pipe(PROMPT, seed=0, callback_on_step_end=lambda *a: {"latent": torch.zeros(1)})


def test_the_package_offers_both_pipelines():
    assert wan.WanPipeline is WanPipeline
    assert wan.WanDMDPipeline is WanDMDPipeline
    assert wan.WanError is WanError
    with pytest.raises(AttributeError, match="Flux"):
        wan.Flux  # noqa: B018


def test_diffusers_names_for_less_memory_change_no_number(student):
    expected = student(PROMPT, seed=3).frames
    try:
        for enable in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
            getattr(student, enable)(device="cpu")
            assert np.array_equal(student(PROMPT, seed=3).frames, expected)
        assert student.offload == "block"
        student.set_offload("none")
        student.enable_attention_slicing()
        np.testing.assert_allclose(student(PROMPT, seed=3).frames, expected, atol=1e-4)
        with pytest.raises(WanError, match="offload: unknown disk"):
            student.set_offload("disk")
    finally:
        student.set_offload("none")
        student.set_attention("sdpa")
