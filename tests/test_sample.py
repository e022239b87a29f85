"""The command from a prompt to files, on tiny models with random weights; and how it fails."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import tracemalloc
import weakref
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_pipeline import write_models

import infer.loading
import infer.sample.__main__
import infer.sample.generate
import infer.sample.jobs
import infer.sample.prepare
import infer.sample.request
import wan.weights.hub
from configs.cli import INTERRUPTED, USER_ERROR, execute
from configs.compose import compose_runs
from infer.loading import LoadedModel, StageBars
from infer.sample.__main__ import LINE, SampleCommand
from infer.sample.jobs import Jobs, read_jobs
from infer.sample.record import BAD_RESULT, VIDEO_NAME, OutputFiles, name_words, reserve_files
from infer.sample.request import with_official_negative
from wan.files import read_sealed
from wan.lora import LoRAMerge, read_lora
from wan.media.images import read_picture
from wan.media.video import read_video
from wan.models.attention import verified_attention
from wan.models.dit_config import DiTConfig
from wan.models.umt5 import UMT5Config
from wan.models.vae_config import VAE_2_1, VAEConfig
from wan.pipeline.config import PipelineConfig, read_pipeline_config
from wan.pipeline.pipeline import WanDMDPipeline, WanPipeline
from wan.sampling.noise import draw_noise, sample_generators
from wan.weights.digests import write_manifest
from wan.weights.hub import STUDENT, TEACHER, resolve_model

PROMPT = 'a red circle, moving: ${right} (or "left")'


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a TI2V base model, a student and a two-expert model."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture
def run(models, tmp_path, capsys):
    """Run the command on a model: (exit code, stdout, stderr); files go to tmp_path/out."""

    def run(*tokens: str, model: str = "base", command=None):
        arguments = [f"checkpoint={models / model}", f"output_dir={tmp_path / 'out'}"]
        given = {token.partition("=")[0] for token in tokens}
        arguments = [a for a in arguments if a.partition("=")[0] not in given]
        code = execute(command or SampleCommand(), LINE, "", [*arguments, *tokens])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def outputs(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "out").iterdir())


def only_record(tmp_path) -> dict:
    (path,) = (tmp_path / "out").glob("*.json")
    return read_sealed(path)


# --- what a good run leaves -----------------------------------------------------------------------


@pytest.mark.parametrize("fast", [False, True], ids=["slow", "fast"])
def test_header_and_record_say_in_which_precision_products_are(run, tmp_path, monkeypatch, fast):
    monkeypatch.setattr("wan.precision.cpu_is_fast_in_bfloat16", lambda: fast)
    code, _, err = run(f"prompt={PROMPT}", "dtype=bfloat16", "device=cpu")
    assert code == 0, err
    note = "weights bfloat16, computed in float32: this CPU has no fast bfloat16"
    assert (note in err.splitlines()) is not fast
    assert only_record(tmp_path)["precision"] == (None if fast else note)


def test_a_prompt_becomes_a_video_with_its_record(run, tmp_path, models):
    code, out, err = run(f"prompt={PROMPT}", "seed=5")
    assert code == 0, err
    video = Path(out.strip())
    assert [name.partition(".")[2] for name in outputs(tmp_path)] == [
        "json",
        "latents.safetensors",
        "mp4",
        "png",
    ]
    frames, info = read_video(video)
    assert frames.shape == (9, 32, 32, 3)
    assert info.fps == 8
    assert info.metadata["title"] == PROMPT
    assert json.loads(info.metadata["comment"])["seed"] == 5
    assert Image.open(video.with_suffix(".png")).size[0] > 32

    record = only_record(tmp_path)
    assert record["status"] == "done"
    assert (record["prompt"], record["seed"]) == (PROMPT, 5)
    assert record["settings"]["height"] == {"value": 32, "from": "checkpoint"}
    assert record["settings"]["seed"]["from"] == "command line"
    assert record["schedule"]["timesteps"] == [999.0, 909.0, 714.0]
    assert record["video"]["file"] == video.name
    noise = draw_noise((16, 3, 8, 8), sample_generators(5, 1))
    assert record["noise_sha256"] == hashlib.sha256(noise.numpy().tobytes()).hexdigest()
    latents = load_file(video.with_suffix(".latents.safetensors"))["latents"]
    assert record["latents_sha256"] == hashlib.sha256(latents.numpy().tobytes()).hexdigest()
    name = "vae/diffusion_pytorch_model.safetensors"
    content = (models / "base" / name).read_bytes()
    assert record["weights_sha256"][name] == hashlib.sha256(content).hexdigest()
    assert {"load", "encode_text", "denoise", "decode", "write", "total"} <= set(record["seconds"])
    assert record["peak_memory_bytes"]["process"] > 10**7
    assert record["environment"]["packages"]["torch"] == torch.__version__


def test_the_header_is_short_and_the_record_has_everything(run, tmp_path):
    _, _, err = run("prompt=x", "steps=2", "shift=3", "seed=7", "num_videos=2")
    assert err.splitlines()[:5] == [
        "model   base",
        "size    32x32, 9 frames: 48 tokens (3 x 4 x 4)",
        "steps   2 of unipc, t 999 750; guidance 5",
        "seed    7 to 8",
        "device  cpu, float32, attention sdpa",
    ]
    assert [line.partition(":")[2] for line in err.splitlines()[5:]] == [" x", " x"]  # the videos
    record = read_sealed(next((tmp_path / "out").glob("*.json")))
    assert record["settings"]["sampler.shift"] == {"value": 3.0, "from": "command line"}
    assert record["settings"]["height"] == {"value": 32, "from": "checkpoint"}
    assert record["schedule"]["timesteps"] == [999.0, 750.0]
    assert record["weights"]["transformer"].startswith("23.9 k parameters")
    _, _, err = run("prompt=x", "steps=20", "sampler=euler")
    assert "20 of euler, t 1000 989.6 978.3 965.9 .. 468.8 357.1 208.3;" in err


def test_with_verbose_the_header_tells_every_setting_and_its_source(run):
    _, _, err = run("prompt=x", "steps=2", "shift=3", "verbose=true")
    lines = [line.split("  ") for line in err.splitlines()]
    rows = {p[0].strip(): (next(filter(None, p[1:-1])).strip(), p[-1].strip()) for p in lines[:24]}
    assert rows["height"] == ("32", "checkpoint")
    assert rows["steps"] == ("2", "command line")
    assert rows["shift"] == ("3.0", "command line")
    assert rows["grid"] == ("diffusers", "checkpoint")
    assert rows["tokens"] == ("48 (3 x 4 x 4)", "computed")
    assert rows["self-attention"] == ("100.0% of dense", "computed")
    assert "999 (1.0000)  750 (0.7504)" in err
    assert "transformer: 23.9 k parameters" in err
    assert "float32" in err


def test_memory_is_predicted_and_what_cannot_fit_refused_unread(
    run, weights_stay_unread, monkeypatch
):
    monkeypatch.setattr(infer.sample.prepare, "free_bytes", lambda device: 1000)
    code, _, err = run("prompt=x", "preflight=always")
    assert code == USER_ERROR
    assert "memory, predicted: load" in err
    assert "not enough memory on cpu" in err


def test_a_prediction_is_kept_to_compare_with_the_peak(run, models):
    code, out, err = run("prompt=x", "preflight=always", "num_frames=17")
    assert code == 0, err
    record = json.loads(Path(out.strip()).with_suffix(".json").read_text())
    predicted = record["predicted_memory_bytes"]
    assert list(predicted) == ["load", "encode_text", "denoise", "decode", "host", "mapped"]
    assert predicted["host"] == 0  # all of it is on the CPU
    weights = sum(file.stat().st_size for file in (models / "base").rglob("*.safetensors"))
    assert predicted["mapped"] == pytest.approx(weights, rel=0.1)  # all of them are views
    assert all(predicted[stage] > 0 for stage in ("load", "encode_text", "denoise", "decode"))
    assert list(record["begun"]) == [name for name in record["seconds"] if name != "total"]
    _, out, _ = run("prompt=x", "num_frames=17")
    unpredicted = json.loads(Path(out.strip()).with_suffix(".json").read_text())
    assert unpredicted.keys() == record.keys() - {"predicted_memory_bytes"}


def test_chunks_of_decoding_are_chosen_recorded_and_predicted(run):
    seen = []
    for chunk in (1, 2, 4):
        code, out, err = run(
            "prompt=x", f"chunk_latents={chunk}", "num_frames=33", "preflight=always"
        )
        assert code == 0, err
        record = json.loads(Path(out.strip()).with_suffix(".json").read_text())
        assert record["settings"]["chunk_latents"]["value"] == chunk
        seen.append(record["predicted_memory_bytes"]["decode"])
    assert seen[0] < seen[1] < seen[2]
    code, _, err = run("prompt=x", "chunk_latents=0")
    assert code == USER_ERROR
    assert err == "error: chunk_latents=0: must be a number of at least 1\n"


def test_the_video_is_that_of_the_pipeline(run, tmp_path, models):
    """Loading noise from outside, saving latents and decoding apart change nothing."""
    pipe = WanDMDPipeline.from_pretrained(models / "student", dtype=torch.float32)
    _, out, _ = run("prompt=a blue square", "seed=7", model="student")
    latents = load_file(Path(out.strip()).with_suffix(".latents.safetensors"))["latents"]
    expected = pipe("a blue square", seed=7, output_type="latent").frames
    assert torch.equal(latents, expected)


def test_the_same_command_makes_the_same_video_under_a_new_name(run, tmp_path):
    first = Path(run("prompt=x", "hash_weights=false")[1].strip())
    content = first.read_bytes()
    second = Path(run("prompt=x", "hash_weights=false")[1].strip())
    assert first.name.startswith("00000_")
    assert second.name.startswith("00001_")
    assert first.name[6:] == second.name[6:]
    assert second.read_bytes() == content == first.read_bytes()


def test_options_switch_companions_off(run, tmp_path):
    run("prompt=secret words", "save_latents=false", "contact_sheet=false", "embed_prompt=false")
    assert [name.partition(".")[2] for name in outputs(tmp_path)] == ["json", "mp4"]
    (video,) = (tmp_path / "out").glob("*.mp4")
    assert b"secret" not in video.read_bytes()


def test_num_videos_counts_seeds_up(run, tmp_path):
    code, out, _ = run("prompt=x", "seed=3", "num_videos=2")
    assert code == 0
    assert [Path(line).stem[-3:] for line in out.splitlines()] == ["_s3", "_s4"]


def test_a_random_seed_is_drawn_and_recorded(run, tmp_path):
    lines = b'{"prompt": "a", "seed": -1}\n{"prompt": "b", "seed": -1}\n'
    (tmp_path / "jobs.txt").write_bytes(lines)
    code, out, err = run(f"prompt_file={tmp_path / 'jobs.txt'}")
    seeds = [int(Path(line).stem.rpartition("_s")[2]) for line in out.splitlines()]
    assert code == 0
    assert len(set(seeds)) == 2
    assert "random (seed=-1)" in err
    record = json.loads(Path(out.splitlines()[0]).with_suffix(".json").read_text())
    assert record["seed"] == record["settings"]["seed"]["value"] == seeds[0]
    assert record["settings"]["seed"]["from"] == "random (seed=-1)"


def test_a_seed_of_64_bits_makes_the_video_of_its_lower_32(run):
    code, out, err = run("prompt=x", f"seed={2**40 + 624}", "save_latents=true")
    large = load_file(Path(out.strip()).with_suffix(".latents.safetensors"))["latents"]
    _, out, _ = run("prompt=x", "seed=624", "save_latents=true")
    small = load_file(Path(out.strip()).with_suffix(".latents.safetensors"))["latents"]
    assert code == 0
    assert "warning: seed 1099511628400" in err
    assert "that of seed 624" in err
    assert torch.equal(large, small)


def test_a_negative_prompt_without_guidance_is_noted(run, tmp_path):
    code, _, err = run("prompt=x", "negative_prompt=y", "guidance_scale=0", model="base")
    assert code == 0
    assert "warning: negative_prompt has no effect" in err
    record = only_record(tmp_path)
    assert record["negative_prompt"] is None
    assert record["settings"]["guidance_scale"]["value"] == 1


def test_few_steps_of_a_base_model_drop_the_guidance_of_its_preset(run, tmp_path):
    """A student as a LoRA on its base: the preset's guidance is for the base's own weights."""
    code, _, err = run("model=wan22_ti2v_5b", "sampler=dmd3", "prompt=x", "dtype=float32",
                       "height=32", "width=32", "num_frames=1")  # fmt: skip
    assert code == 0, err
    record = only_record(tmp_path)["settings"]
    assert record["guidance_scale"] == {"value": 1.0, "from": "few_step"}
    assert (record["negative_prompt"]["value"], record["negative_prompt"]["from"]) == (
        None,
        "no guidance",
    )


@pytest.mark.parametrize(
    ("preset", "size"),
    [
        ("wan22_ti2v_5b", {}),
        ("wan22_t2v_a14b", {"num_attention_heads": 40, "num_layers": 40}),
        ("wan21_t2v_1_3b", {"num_attention_heads": 12, "num_layers": 30}),
    ],
)
def test_a_released_base_model_has_the_official_negative_prompt(preset, size):
    """From its folder alone as from its preset; a student and the miniature have none."""
    channels = {"in_channels": 48, "out_channels": 48}
    vae = VAEConfig()
    if size:
        channels = dict.fromkeys(channels, 16)
        vae = VAE_2_1
    model = PipelineConfig("WanPipeline", DiTConfig(**channels, **size), vae, UMT5Config())
    (of_preset,) = compose_runs(LINE, [f"model={preset}", "prompt=x"])
    (plain,) = compose_runs(LINE, ["checkpoint=folder", "prompt=x"])
    sources = dict(plain.sources)
    found = with_official_negative(plain.config, sources, model)
    assert found.negative_prompt == of_preset.config.negative_prompt
    assert sources["negative_prompt"] == "official code"
    (none,) = compose_runs(LINE, ["checkpoint=folder", "prompt=x", "negative_prompt="])
    assert with_official_negative(none.config, dict(none.sources), model).negative_prompt == ""
    student = replace(model, class_name="WanDMDPipeline", timesteps=(1000, 757, 522))
    small = read_pipeline_config(resolve_model(TEACHER))
    for other in (student, small):
        config = with_official_negative(plain.config, dict(plain.sources), other)
        assert config.negative_prompt is None


def test_compat_fastvideo_is_one_switch(run, tmp_path, models):
    code, out, _ = run('prompt=  a  "red" circle', "compat=fastvideo", model="student")
    record = only_record(tmp_path)["settings"]
    assert code == 0
    assert record["seed"] == {"value": 1024, "from": "compat=fastvideo"}
    assert record["frame_first_noise"] == {"value": True, "from": "compat=fastvideo"}
    latents = load_file(Path(out.strip()).with_suffix(".latents.safetensors"))["latents"]
    pipe = WanDMDPipeline.from_pretrained(models / "student", dtype=torch.float32)
    python = pipe('  a  "red" circle', compat="fastvideo", output_type="latent").frames
    assert torch.equal(latents, python)


@pytest.mark.parametrize(
    "example", [one for one in infer.sample.__main__.__doc__.splitlines() if " steps=" in one]
)
def test_examples_of_steps_are_what_their_model_was_trained_for(example):
    words = shlex.split(example)[3:]
    for point in compose_runs(LINE, [w for w in words if w != "-m"], sweep="-m" in words):
        model = read_pipeline_config(resolve_model(point.config.checkpoint))
        attention = verified_attention(
            point.config.attention, model.transformer, torch.device("cpu"), torch.float32
        )
        (job,) = read_jobs(point.config, point.sources).checked
        request = infer.sample.request.resolve_request(job, model, attention, "cpu", "float32")
        assert request.config.sampler.steps == point.config.sampler.steps


def test_a_sweep_loads_the_model_once_and_leaves_a_table_and_a_page(run, monkeypatch, tmp_path):
    loads = []

    class Counted(LoadedModel):
        def __init__(self, *args):
            loads.append(args)
            super().__init__(*args)

    monkeypatch.setattr(infer.loading, "LoadedModel", Counted)
    code, out, err = run("-m", "seed=0,1", "steps=1,2", "prompt=a, b")
    table = (tmp_path / "out" / "00000_sweep.md").read_text().splitlines()
    assert table[0] == "| steps | seed | seconds | video |"
    assert [line.split(" | ")[:2] for line in table[2:]] == [
        *(["| 1", "0"], ["| 2", "0"], ["| 1", "1"], ["| 2", "1"])
    ]
    videos = [Path(line).name for line in out.splitlines()]
    assert [line.split(" | ")[3][:-2] for line in table[2:]] == videos
    assert videos[0].startswith("00000_steps-1_")
    page = (tmp_path / "out" / "00000_sweep.html").read_text()
    assert str(tmp_path) not in page
    assert all(video in page for video in videos)
    assert code == 0, err
    assert len(out.splitlines()) == 4
    assert len(loads) == 1


def test_an_image_starts_the_video(run, tmp_path):
    Image.new("RGB", (64, 64), (200, 30, 40)).save(tmp_path / "a.png")
    code, _, err = run("prompt=x", f"image={tmp_path / 'a.png'}")
    assert code == 0, err
    assert "image a.png" in err.splitlines()[0]


def test_what_lies_behind_a_transparent_image_can_be_said(run, tmp_path):
    Image.new("RGBA", (32, 32)).save(tmp_path / "clear.png")
    image = f"image={tmp_path / 'clear.png'}"
    code, _, err = run("prompt=x", image, "image_background=[9,9,9]", "verbose=true")
    assert code == 0, err
    assert "image_background" in err


def test_images_of_a_prompt_file_are_read_one_at_a_time(run, tmp_path, monkeypatch):
    """Many of them are more than memory should hold."""
    read, most = [], 0

    def watched(*args):
        nonlocal most
        read.append(weakref.ref(image := read_picture(*args)))
        most = max(most, sum(one() is not None for one in read))
        return image

    monkeypatch.setattr(infer.sample.request, "read_picture", watched)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "jobs").write_text('{"prompt": "x", "image": "a.png"}\n' * 3)
    code, _, err = run(f"prompt_file={tmp_path / 'jobs'}", "steps=1")
    assert code == 0, err
    assert most == 1


@pytest.mark.parametrize(
    ("one", "other", "model"),
    [
        ("timesteps=[1000,900]", "timesteps=[1000,800]", "base"),
        ("frame_first_noise=true", "frame_first_noise=false", "student"),
        ("image_fit=crop", "image_fit=resize", "base"),
        ("steps=2", "steps=3", "base"),
    ],
)
def test_file_names_tell_videos_apart(run, tmp_path, one, other, model):
    Image.new("RGB", (32, 48)).save(tmp_path / "a.png")
    image = [f"image={tmp_path / 'a.png'}", "height=32"] if one.startswith("image") else []
    names = [run("prompt=x", *image, option, model=model)[1] for option in (one, one, other)]
    hashes = [Path(name).name.split("_")[-2] for name in names]
    assert hashes[0] == hashes[1] != hashes[2]


def test_an_image_decides_the_shape_unless_a_size_is_given(run, tmp_path):
    Image.new("RGB", (30, 60)).save(tmp_path / "tall.png")
    _, out, err = run("prompt=x", f"image={tmp_path / 'tall.png'}")
    assert read_video(out.strip())[0].shape[1:3] == (40, 24)
    assert "image's proportions" in err
    _, out, _ = run("prompt=x", f"image={tmp_path / 'tall.png'}", "height=32")
    assert read_video(out.strip())[0].shape[1:3] == (32, 32)


def test_a_prompt_longer_than_the_model_reads_is_said(run, tmp_path):
    _, _, err = run("prompt=" + "small red circle " * 20, "hash_weights=false")
    (line,) = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert "reads the first 16" in line
    tokens = only_record(tmp_path)["prompt_tokens"]
    assert tokens["read"] == 16 < tokens["all"]


# --- prompt files ---------------------------------------------------------------------------------


def test_a_prompt_file_gives_each_line_its_own_settings(run, tmp_path):
    path = tmp_path / "jobs.txt"
    path.write_bytes(
        "\ufeffa plain line: {with} ${signs}, and commas\r\n\r\n"
        '{"prompt": "zwei", "seed": 9, "height": 40, "num_frames": 5, "steps": 1}\r\n'.encode()
    )
    code, out, err = run(f"prompt_file={path}")
    assert code == 0, err
    one, two = (
        json.loads(Path(line).with_suffix(".json").read_text(encoding="utf-8"))
        for line in out.splitlines()
    )
    assert one["prompt"] == "a plain line: {with} ${signs}, and commas"
    assert (two["prompt"], two["seed"]) == ("zwei", 9)
    assert two["settings"]["height"] == {"value": 40, "from": "prompt file"}
    assert two["settings"]["width"] == {"value": 32, "from": "checkpoint"}
    assert len(two["schedule"]["timesteps"]) == 1
    assert two["video"]["frames"] == 5


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no prompt in it"),
        (b"\n \n", "no prompt in it"),
        (b"fine\n{broken", "line 2: starts with {"),
        (b'{"prompt": "a cat \\ud83d"}', "line 1: starts with {: 'a cat \\ud83d' holds half"),
        (b'{"seed": 3}', 'line 1: no "prompt"'),
        (b'{"prompt": ""}', "line 1: prompt= is empty"),
        (b'{"prompt": "x", "sede": 3}', "unknown sede"),
        (b'{"prompt": "x", "prompt": "y"}', "line 1: starts with {: the key 'prompt' occurs twice"),
        (b'{"prompt": "x\\u0000y"}', "line 1: prompt=: there is a zero byte"),
        (b'{"prompt": "x", "image": "a.png", "num_frames": 1}', "line 1: image with num_frames=1"),
        (b'{"prompt": "x", "seed": "3"}', "seed='3': need int"),
        (b'{"prompt": "x", "seed": true}', "seed=True: need int"),
        (b'{"prompt": "x", "steps": 2, "timesteps": [1000]}', "give only one"),
        (b'{"prompt": "x", "timesteps": ["a"]}', "need a list of numbers"),
        (b'x\nx\n{"prompt": "x", "height": 33}', "line 3: height=33"),
        ("\ufeffx".encode("utf-16"), "not UTF-8"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(run, tmp_path, content, words):
    (tmp_path / "jobs").write_bytes(content)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    code, _, err = run(f"prompt_file={tmp_path / 'jobs'}")
    assert code == USER_ERROR
    assert words in err
    assert err.count("\n") == 1


def many_lines(path: Path, count: int) -> Jobs:
    """The jobs of a prompt file: a text, a line of JSON with a seed, and so on."""
    pairs = (
        (f"a small red circle, take {n}", f'{{"prompt": "take {n}", "seed": {n}}}')
        for n in range(count // 2)
    )
    lines = [line for pair in pairs for line in pair]
    path.write_text("\n".join(lines))
    (run,) = compose_runs(LINE, [f"prompt_file={path}"])
    return read_jobs(run.config, run.sources)


def test_a_prompt_file_of_any_length_starts_at_once(tmp_path):
    """40,000 prompts are checked within seconds."""
    started = time.perf_counter()
    jobs = many_lines(tmp_path / "jobs", 40_000)
    assert time.perf_counter() - started < 20  # 2 s on two idle cores; it was a minute
    assert (jobs.count, jobs.num_videos, len(jobs.checked)) == (40_000, 40_000, 1)
    found = [(job.config.prompt, job.config.seed) for job in islice(jobs.each(), 8)]
    assert found[-2:] == [("a small red circle, take 3", 0), ("take 3", 3)]


def test_prompts_of_a_file_take_no_memory_beside_its_text(tmp_path):
    tracemalloc.start()
    jobs = many_lines(tmp_path / "jobs", 4000)
    assert sum(1 for _ in islice(jobs.each(), 100)) == 100
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < (tmp_path / "jobs").stat().st_size + 2**21  # 20 kB for each were 80 MB


def test_different_settings_are_checked_ahead_up_to_a_number(run, tmp_path, monkeypatch):
    monkeypatch.setattr(infer.sample.jobs, "MAX_CHECKED", 2)
    lines = [f'{{"prompt": "x", "height": {height}, "steps": 1}}' for height in (32, 40, 33)]
    (tmp_path / "jobs").write_text("\n".join(lines))
    code, out, err = run(f"prompt_file={tmp_path / 'jobs'}", "num_frames=1")
    assert code == USER_ERROR
    assert "2 different settings are checked now, further ones from line 3 on" in err
    assert len(out.splitlines()) == 2
    assert "line 3: height=33" in err.splitlines()[-1]
    lines[2] = '{"prompt": "", "height": 32}'  # what a line has of its own is always checked
    (tmp_path / "jobs").write_text("\n".join(lines))
    code, out, err = run(f"prompt_file={tmp_path / 'jobs'}", "num_frames=1")
    assert (code, out) == (USER_ERROR, "")
    assert "line 3: prompt= is empty" in err


def test_many_images_are_looked_at_when_their_turn_comes(run, tmp_path, monkeypatch):
    monkeypatch.setattr(infer.sample.prepare, "MAX_LOOKED_AT", 1)
    Image.effect_noise((32, 32), 50).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(content[:-100])  # its header is whole
    lines = [f'{{"prompt": "x", "image": "{name}.jpg", "steps": 1}}' for name in "ab"]
    (tmp_path / "jobs").write_text("\n".join(lines))
    code, out, err = run(f"prompt_file={tmp_path / 'jobs'}")
    assert code == USER_ERROR
    assert len(out.splitlines()) == 1
    assert "b.jpg: damaged" in err.splitlines()[-1]


def test_control_characters_of_a_prompt_are_shown_and_kept(run, tmp_path):
    """What a terminal would obey is printed as an escape; the model gets the text as typed."""
    prompt = "a \x1b[2Jred\x07 circle \u202eright\r"
    code, out, err = run(f"prompt={prompt}", "num_videos=2", "steps=1")
    assert code == 0
    assert r"a \x1b[2Jred\x07 circle \u202eright\r" in err
    assert not set(out + err) & set("\x1b\x07\r\u202e")
    record = json.loads(Path(out.splitlines()[0]).with_suffix(".json").read_text())
    assert record["prompt"] == prompt


@pytest.mark.parametrize("key", ["prompt", "negative_prompt"])
def test_a_text_of_a_megabyte_is_one_line(run, tmp_path, key):
    job = {"prompt": "x", key: "word " * 200_000}
    (tmp_path / "jobs").write_text(json.dumps(job))
    code, out, err = run(f"prompt_file={tmp_path / 'jobs'}")
    assert (code, out) == (USER_ERROR, "")
    assert f"line 1: {key}= has 1,000,000 characters: at most 100,000" in err
    assert len(err) < 2000


def test_html_that_is_escaped_without_end_is_told_before_weights_are_read(
    run, tmp_path, weights_stay_unread
):
    (tmp_path / "jobs").write_text("&" + "amp;" * 20_000)
    code, _, err = run(f"prompt_file={tmp_path / 'jobs'}")
    assert code == USER_ERROR
    assert "line 1: a prompt has HTML that is escaped more than 32 times" in err


# --- what is refused before weights are read ------------------------------------------------------


@pytest.fixture
def weights_stay_unread(monkeypatch):
    def refuse(*args):
        raise AssertionError("weights must not be read")

    monkeypatch.setattr(infer.loading, "LoadedModel", refuse)


@pytest.mark.parametrize(
    ("tokens", "model", "words"),
    [
        ([], "base", ["no prompt"]),
        (["prompt=x", "height=33"], "base", ["height=33", "32 and 40"]),
        (["prompt=x", "width=1"], "base", ["width=1", "nearest is 8"]),
        (["prompt=x", "num_frames=104"], "base", ["num_frames=104", "101 and 105"]),
        (["prompt=x", "num_frames=2", "height=9"], "base", ["num_frames=2", "height=9"]),
        (["prompt=x", "sampler.name=heun"], "base", ["heun", "euler"]),
        (["prompt=x", "attention=flash4"], "base", ["flash4", "did you mean 'flash'", "sdpa"]),
        (["prompt=x", "attention=spatial", "attention.layers=7-"], "base", ["layers", "none of"]),
        (["prompt=x", "attention=spatial", "attention.steps=99"], "base", ["steps", "none of"]),
        (["prompt=x", "attention=spatial", "attention.tile=[1,2,2]"], "base", ["no option tile"]),
        (["prompt=x", "attention.layers=x"], "base", ["attention.layers", "0-2 5 8-"]),
        (["prompt=x", "guidance_scale_2=3"], "base", ["two experts"]),
        (["prompt=x", "steps=4"], "student", ["error: steps=4: ", "[1000, 757, 522]"]),
        (["prompt=x", "guidance_scale=5"], "student", ["allow_untrained=true to see"]),
        (["prompt=x", "negative_prompt=y"], "student", ["negative_prompt"]),
        (["prompt=x", "deterministic=true"], "base", ["deterministic", "adds no noise"]),
        (["prompt=x", "max_sequence_length=8"], "student", ["max_sequence_length=8", "16 text"]),
        (["prompt=x", "image={png}"], "experts", ["image", "TI2V"]),
        (["prompt=x", "image={png}", "num_frames=1"], "base", ["only frame"]),
        (["prompt=x", "image={clear}"], "base", ["transparent", "image_background=[255,255,255]"]),
        (["prompt=x", "image={png}", "image_background=[0,0]"], "base", ["three numbers"]),
        (["prompt=x", "image_fit=resize"], "base", ["image_fit=", "without image="]),
        (["prompt=x", "image=missing.png"], "base", ["missing.png", "no such file"]),
        (["prompt=x", "image={txt}"], "base", ["note.txt", "not an image"]),
        (["prompt=x", "output_dir={txt}/a"], "base", ["output_dir=", "can't be written"]),
        (["prompt=x", "output_dir=/proc/a"], "base", ["output_dir=/proc/a", "can't be written"]),
        (["prompt=x", "checkpoint=/no/such"], "base", ["/no/such", "no such folder"]),
        (["prompt=x", "checkpoint={dir}"], "base", ["model_index.json"]),
        (["prompt=x", "prompt_file=y"], "base", ["only one"]),
        (["prompt_file=/no/such.txt"], "base", ["/no/such.txt"]),
        (["prompt_file={dir}"], "base", ["folder"]),
        (["prompt=x", "lora="], "base", ["lora= is empty"]),
        (["prompt=x", "output_dir="], "base", ["output_dir= is empty"]),
        (["prompt=x", "lora=missing.safetensors"], "base", ["missing.safetensors"]),
        (["prompt=x", "lora_2=y"], "base", ["lora_2=", "two experts"]),
        (["prompt=x", "lora=y,z:2"], "experts", ["LoRA y: no such file"]),
        (["prompt=x", "lora=someone/style"], "base", ["hf download someone/style"]),
        (["prompt=x", "lora=y,"], "base", ["lora=y,", "an entry is empty"]),
        (["prompt=x", "lora_strength=0.5"], "base", ["lora_strength=0.5 without lora="]),
        pytest.param(
            ["prompt=x", "device=cuda"],
            "base",
            ["device=cuda", "cpu"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_requests_that_cannot_work(run, tmp_path, weights_stay_unread, tokens, model, words):
    (tmp_path / "note.txt").write_text("no image")
    (tmp_path / "dir").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGBA", (8, 8)).save(tmp_path / "clear.png")
    names = {"txt": "note.txt", "dir": "dir", "png": "a.png", "clear": "clear.png"}
    places = {short: tmp_path / name for short, name in names.items()}
    code, out, err = run(*[t.format(**places) for t in tokens], model=model)
    assert code == USER_ERROR
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not out
    for word in words:
        assert word in err
    assert not list(tmp_path.glob("out/*.json"))


def test_weights_are_fetched_for_requests_that_can_work_alone(run, models, monkeypatch):
    asked = []

    def fetch(name, allow_patterns, **_):
        asked.append("*.safetensors" in allow_patterns)
        return str(models / "student")

    monkeypatch.setattr(wan.weights.hub, "snapshot_download", fetch)
    for option in ("height=33", "guidance_scale=5"):
        assert run("checkpoint=someone/model", "prompt=x", option)[0] == USER_ERROR
    assert asked == [False, False]
    code, _, err = run("checkpoint=someone/model", "prompt=x")
    assert code == 0, err
    assert asked[2:] == [False, True]


def test_verify_also_reads_the_parts_that_another_folder_lends(run, tmp_path):
    teacher = tmp_path / TEACHER.name
    for folder, place in ((TEACHER, teacher), (STUDENT, teacher / "student")):
        shutil.copytree(folder, place)
    shared = (teacher / "shared_parts.json").read_text().replace("../student", "student")
    (teacher / "shared_parts.json").write_text(shared)
    for folder in (teacher / "student", teacher):
        write_manifest(folder)
    tokens = ("prompt=x", f"checkpoint={tmp_path / TEACHER.name}", "verify=true", "steps=1")
    code, _, err = run(*tokens)
    assert code == 0
    assert "files match their sha256" in err
    weights = teacher / "student" / "vae/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, _, err = run(*tokens)
    assert code == USER_ERROR
    assert "vae/diffusion_pytorch_model.safetensors has other content" in err


def test_what_a_student_was_not_trained_for_can_be_insisted_on(run, tmp_path):
    code, _, err = run("prompt=x", "steps=2", "allow_untrained=true", model="student")
    assert code == 0
    assert "not what this model was trained for" in err
    assert only_record(tmp_path)["not_trained_for"] == ["num_inference_steps=2"]


def test_a_presets_negative_prompt_is_dropped_without_guidance(run, tmp_path):
    code, _, err = run("model=wan22_ti2v_5b", "prompt=x", "guidance_scale=1", "steps=1",
                       "height=32", "width=32", "num_frames=1", "dtype=float32")  # fmt: skip
    assert code == 0, err
    assert only_record(tmp_path)["negative_prompt"] is None


def test_damaged_weights_are_one_line(run, models, tmp_path):
    shutil.copytree(models / "base", tmp_path / "broken")
    path = tmp_path / "broken/transformer/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    code, _, err = run("prompt=x", f"checkpoint={tmp_path / 'broken'}")
    assert code == USER_ERROR
    assert "diffusion_pytorch_model.safetensors" in err.splitlines()[-1]
    path.unlink()
    assert run("prompt=x", f"checkpoint={tmp_path / 'broken'}")[0] == USER_ERROR


def test_a_lora_is_merged_and_one_for_another_model_refused(run, tmp_path):
    name = "diffusion_model.blocks.0.self_attn.q.{}.weight"
    for width, file in ((24, "fits"), (32, "other")):
        tensors = {
            name.format("lora_A"): torch.ones(2, width),
            name.format("lora_B"): torch.ones(width, 2),
        }
        save_file(tensors, tmp_path / f"{file}.safetensors")
    code, _, err = run("prompt=x", f"lora={tmp_path / 'fits.safetensors'}", "lora_strength=0.5")
    assert code == 0, err
    record = only_record(tmp_path)
    assert "strength 0.5" in record["lora"][0]
    plain = Path(run("prompt=x")[1].strip()).with_suffix(".json")
    other = json.loads(plain.read_text())["latents_sha256"]
    assert record["latents_sha256"] != other
    code, _, err = run("prompt=x", f"lora={tmp_path / 'other.safetensors'}")
    assert code == USER_ERROR
    assert "other.safetensors" in err


def style(path: Path, seed: int, front: str = "diffusion_model.") -> Path:
    """A LoRA file for the tiny models."""
    generator = torch.Generator().manual_seed(seed)
    stem = f"{front}blocks.0.self_attn.q"
    tensors = {
        f"{stem}.lora_A.weight": torch.randn(2, 24, generator=generator),
        f"{stem}.lora_B.weight": torch.randn(24, 2, generator=generator),
    }
    save_file(tensors, path)
    return path


def latents_of(run, *arguments, model: str = "base") -> tuple[str, dict]:
    """sha256 of the latents that a command makes, and its record."""
    code, out, err = run("prompt=x", "contact_sheet=false", *arguments, model=model)
    assert code == 0, err
    record = json.loads(Path(out.strip()).with_suffix(".json").read_text())
    return record["latents_sha256"], record


def test_several_loras_have_strengths_of_their_own(run, tmp_path, models):
    a, b = style(tmp_path / "a.safetensors", 1), style(tmp_path / "b, too.safetensors", 2)
    both, record = latents_of(run, f'lora=[{a}:0.5,"{b}":-2]', "lora_strength=0.5")
    assert record["settings"]["lora"]["value"] == ["a.safetensors:0.5", "b, too.safetensors:-2"]
    assert [line.split(" merged into ")[1] for line in record["lora"]] == [
        "1 parameters at strength 0.25",
        "1 parameters at strength -1",
    ]
    assert all(f.name in line for f, line in zip((a, b), record["lora"], strict=True))
    assert latents_of(run, f"lora={a}:0.25", f'lora="{b}":-1')[0] == both
    assert latents_of(run, f"lora={a}:0.25")[0] != both
    # The same from Python, merged while loading and as adapters.
    call = {"seed": 0, "output_type": "latent"}
    merges = [LoRAMerge(read_lora(a), 0.25), LoRAMerge(read_lora(b), -1.0)]
    merged = WanPipeline.from_pretrained(
        models / "base", dtype=torch.float32, loras={"transformer": merges}
    )
    adapted = WanPipeline.from_pretrained(models / "base", dtype=torch.float32)
    adapted.load_lora_weights(a, adapter_name="a")
    adapted.load_lora_weights(b, adapter_name="b")
    adapted.set_adapters(["a", "b"], [0.25, -1.0])
    for pipe in (merged, adapted):
        x = pipe("x", **call).frames
        assert hashlib.sha256(x.numpy().tobytes()).hexdigest() == both


def test_each_expert_has_loras_and_a_strength_of_its_own(run, tmp_path, models):
    a, b = style(tmp_path / "a.safetensors", 1), style(tmp_path / "b.safetensors", 2)
    latents = partial(latents_of, run, "steps=6", model="experts")
    high, record = latents(f"lora={a}")
    assert [line.partition(":")[0] for line in record["lora"]] == ["transformer"]
    low, record = latents(f"lora_2={b},{a}:0.1", "lora_strength_2=0.5")
    assert [line.partition(":")[0] for line in record["lora"]] == ["transformer_2"] * 2
    assert record["lora"][1].endswith("strength 0.05")
    weighed, record = latents(f"lora={a}", f"lora_2={b}", "lora_strength=0.5")
    assert [line.endswith("strength 0.5") for line in record["lora"]] == [True, True]
    plain, _ = latents()
    assert len({plain, high, low, weighed}) == 4


def test_a_lora_for_one_expert_does_not_go_to_the_other(run, tmp_path):
    low = style(tmp_path / "low.safetensors", 1, "diffusion_model.transformer_2.")
    code, _, err = run("prompt=x", f"lora={low}", model="experts")
    assert code == USER_ERROR
    assert "names say transformer_2" in err
    assert "as lora_2=" in err
    both = tmp_path / "both.safetensors"
    high = style(tmp_path / "high.safetensors", 2, "diffusion_model.transformer_1.")
    save_file(load_file(low) | load_file(high), both)
    _, _, err = run("prompt=x", f"lora={both}", model="experts")
    assert "those for transformer alone are used" in err
    _, _, err = run("prompt=x", f"lora={both}", f"lora_2={both}", model="experts")
    assert "alone are used" not in err


def test_a_strength_that_is_no_number_is_named(run, tmp_path):
    a = style(tmp_path / "a.safetensors", 1)
    code, _, err = run("prompt=x", f"lora={a}:much")
    assert code == 2
    assert f"lora={a}:much: 'much' is no number; write FILE:STRENGTH, as in {a}:0.8" in err


def test_a_strength_for_an_expert_without_a_lora_is_warned_of(run, tmp_path):
    a = style(tmp_path / "a.safetensors", 1)
    code, _, err = run("prompt=x", f"lora={a}", "lora_strength_2=0.5")
    assert code == 0
    assert "lora_strength_2=0.5 without lora_2=: it weighs nothing" in err


# --- runs that end early or badly -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "done", "steps"), [("encode", 0, 0), ("denoise", 2, 2), ("decode", 0, 3)]
)
def test_ctrl_c_keeps_what_there_is(run, tmp_path, monkeypatch, stage, done, steps):
    class Interrupting(StageBars):
        def __call__(self, at, count, total):
            super().__call__(at, count, total)
            if (at, count) == (stage, done):
                raise KeyboardInterrupt

    monkeypatch.setattr(infer.sample.generate, "StageBars", Interrupting)
    code, out, err = run("prompt=x", "-m", "seed=0,1")
    assert code == INTERRUPTED
    assert not out
    assert "latents kept in" in err
    assert "Traceback" not in err
    record = only_record(tmp_path)  # the second point of the sweep never began
    assert (record["status"], record["steps_done"]) == ("interrupted", steps)
    (latents,) = (tmp_path / "out").glob("*.safetensors")
    assert load_file(latents)["latents"].shape == (1, 16, 3, 8, 8)
    assert not list((tmp_path / "out").glob("*.mp4"))


@pytest.mark.parametrize(
    ("video", "words"),
    [
        (torch.full((1, 3, 9, 32, 32), -1.0), "black"),
        (torch.full((1, 3, 9, 32, 32), 0.3), "same colour"),
        (torch.full((1, 3, 9, 32, 32), float("nan")), "not finite"),
    ],
)
def test_a_result_that_shows_nothing_is_a_failure(run, tmp_path, monkeypatch, video, words):
    monkeypatch.setattr(WanPipeline, "decode_latents", lambda *args: video)
    code, out, err = run("prompt=x", "save_latents=false")
    assert code == BAD_RESULT
    assert words in err
    assert not out
    assert words in only_record(tmp_path)["status"]
    suffixes = [name.partition(".")[2] for name in outputs(tmp_path)]
    assert suffixes == ["json", "latents.safetensors"]


def test_latents_that_blow_up_are_a_failure_that_names_the_step(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "wan.pipeline.stages.Denoiser.__call__",
        lambda self, x, t: x * (float("nan") if t < 950 else 1),
    )
    code, _, err = run("prompt=x")
    assert code == BAD_RESULT
    assert "step 2 of 3" in err
    (latents,) = (tmp_path / "out").glob("*.safetensors")
    assert load_file(latents)["latents"].isfinite().all()
    assert only_record(tmp_path)["steps_done"] == 1


def test_a_full_disk_at_the_end_keeps_the_latents(run, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device", "x.mp4")

    monkeypatch.setattr(infer.sample.generate, "write_video", full)
    code, _, err = run("prompt=x", "save_latents=false")
    assert code == USER_ERROR
    assert "No space left" in err
    assert list((tmp_path / "out").glob("*.latents.safetensors"))
    assert "No space left" in only_record(tmp_path)["status"]


def test_the_record_is_whole_and_true_at_any_moment(run, tmp_path, monkeypatch):
    seen = []

    class Reading(StageBars):
        def __call__(self, at, count, total):
            super().__call__(at, count, total)
            seen.append((at, only_record(tmp_path)["status"]))

    monkeypatch.setattr(infer.sample.generate, "StageBars", Reading)
    assert run("prompt=x")[0] == 0
    assert {at for at, _ in seen} == {"encode", "denoise", "decode"}
    assert {status for _, status in seen} == {"unfinished"}  # what a killed process leaves
    assert only_record(tmp_path)["status"] == "done"


def test_a_disk_that_is_full_from_some_moment_on_leaves_whole_files_only(
    run, tmp_path, monkeypatch
):
    def full_after(writes):
        left = iter(range(writes))

        def flush(path):
            if next(left, None) is None:
                raise OSError(28, "No space left on device")

        return flush

    for writes in range(6):  # record, latents, record, video, sheet, record
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        monkeypatch.setattr("wan.files.flush_to_disk", full_after(writes))
        code, _, err = run("prompt=x")
        assert code == USER_ERROR
        assert "No space left" in err
        assert "Traceback" not in err
        assert not [name for name in outputs(tmp_path) if name.startswith(".")]
        if writes:
            assert only_record(tmp_path)["status"] in ("unfinished", "done")
        else:
            assert outputs(tmp_path) == []


# --- names and imports ----------------------------------------------------------------------------


def test_file_names_are_safe_short_and_never_taken_twice(tmp_path):
    names = [reserve_files(tmp_path, {"prompt": "../../etc/x:*"}, 3, {}).stem for _ in range(3)]
    assert [name[:6] for name in names] == ["00000_", "00001_", "00002_"]
    assert len(names[0]) == 5 + 1 + 8 + 1 + 2
    assert names[0][5:] == names[1][5:]
    assert reserve_files(tmp_path, {"prompt": "else"}, 3, {}).stem[6:] != names[0][6:]
    (tmp_path / "99999_x.txt").touch()
    assert reserve_files(tmp_path, {}, 0, {}).stem.startswith("100000_")


@pytest.mark.parametrize(
    ("prompt", "swept", "words"),
    [
        ("A small red circle, moving right: quickly!", "", "small-red-circle-moving-right"),
        ("a fox", "steps=4, seed=0", "steps-4"),
        ("a fox", "seed=0", "fox"),
        (
            "x",
            "checkpoint=/home/me/wan 5b, lora=[/a/b.safetensors:0.5]",
            "checkpoint-wan-5b-lora-b",
        ),
        ("Ünïcode, naïve", "", "unicode-naive"),
        ("一只狐狸", "", ""),
        ("../../CON:*?<|>", "", "con"),
        ("x" * 99_999, "", "x" * 32),
    ],
)
def test_names_say_what_was_asked_for_in_letters_that_any_system_takes(prompt, swept, words):
    assert name_words(prompt, swept) == words


def test_equal_words_are_other_names_and_older_ones_are_found(tmp_path):
    for number, prompt in enumerate(("a red fox", "the red fox!", "a red fox")):
        files = reserve_files(tmp_path, {"prompt": prompt}, 0, {}, name_words(prompt))
        assert files.stem.startswith(f"0000{number}_red-fox_")
        assert VIDEO_NAME.fullmatch(files.record.name)[2] == "0"
    assert VIDEO_NAME.fullmatch("00003_9f2c81d0_s42.json").groups() == ("9f2c81d0", "42")


def test_a_name_taken_by_another_process_is_left_alone(tmp_path, monkeypatch):
    taken = reserve_files(tmp_path, {}, 0, {})
    taken.record.write_text("theirs")
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(()))  # as if it came in between
    assert reserve_files(tmp_path, {}, 0, {}) == OutputFiles(tmp_path, f"00001{taken.stem[5:]}")
    assert taken.record.read_text() == "theirs"


def test_a_cold_start_loads_no_compiler_and_a_mistake_no_pytorch(models, tmp_path):
    code = (
        "import sys\n"
        "from configs.cli import execute\n"
        "from infer.sample.__main__ import LINE, SampleCommand\n"
        "assert execute(SampleCommand(), LINE, '', ['stps=3']) == 2\n"
        "assert 'torch' not in sys.modules\n"
        "assert execute(SampleCommand(), LINE, '', sys.argv[1:]) == 0\n"
        "slow = {'torch._dynamo', 'sympy', 'transformers', 'diffusers'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    arguments = [f"checkpoint={models / 'base'}", f"output_dir={tmp_path}", "prompt=x", "steps=1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert done.returncode == 0, done.stderr


def test_latents_are_as_readable_as_other_files(run, tmp_path):
    _, out, _ = run("prompt=x")
    video = Path(out.strip())
    modes = {p.stat().st_mode & 0o777 for p in video.parent.glob(f"{video.stem}*")}
    assert len(modes) == 1


def test_the_sheet_shows_the_frames(run, tmp_path):
    _, out, _ = run("prompt=x")
    sheet = np.asarray(Image.open(Path(out.strip()).with_suffix(".png")))
    frames, _ = read_video(out.strip())
    first = sheet[4:36, 4:36].astype(int)
    errors = [np.abs(first - frame).mean() for frame in frames]
    assert np.argmin(errors) == 0
    assert errors[0] < errors[1] / 2
