"""Fine-tuning on one's own clips, watched: held-out loss and samples at every save."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_distill
import torch

import train.finetune.run as module
import train.samples as samples
from configs.compose import compose_runs
from configs.data import DataConfig, PreprocessConfig
from configs.training import FinetuneConfig, LoopConfig, LoRAConfig
from train.checkpoint import list_checkpoints
from train.finetune.__main__ import LINE
from train.finetune.run import finetune
from train.metrics import read_metrics
from train.parallel import Ranks
from train.preprocess.run import preprocess
from train.samples import sample_prompts, short_name
from wan import WanPipeline
from wan.errors import WanError
from wan.media.video import read_video, write_video

teacher = test_distill.teacher
pytestmark = pytest.mark.filterwarnings("ignore:.*matrices of zeros")  # a fresh transformer has


@pytest.fixture(scope="module")
def data(teacher, tmp_path_factory) -> str:
    """Four clips, the first of them in two samples, encoded."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "clips").mkdir()
    rng = np.random.default_rng(0)
    for name, count in {"a": 10, "b": 5, "c": 5, "d": 5}.items():
        frames = rng.integers(0, 255, (count, 32, 32, 3), dtype=np.uint8)
        write_video(folder / f"clips/{name}.mp4", frames, 8)
        (folder / f"clips/{name}.txt").write_text(f"clip {name}")
    config = PreprocessConfig(
        clips=str(folder / "clips"),
        output_dir=str(folder / "encoded"),
        checkpoint=str(teacher),
        sizes=["5x32x32"],
        frames="chunk",
        threads=1,
    )
    assert preprocess(config) == 0
    return config.output_dir


def settings(tmp_path, teacher, data, **changes) -> FinetuneConfig:
    config = FinetuneConfig(
        output_dir=str(tmp_path / "run"),
        checkpoint=str(teacher),
        threads=1,
        batch_size=2,
        bfloat16=False,
        lr=1e-2,
        warmup=1,
        ema_decay=0.5,
        optimizer="adamw",
        validation_clips=1,
        sample_prompts=["a small red circle, moving"],
        sample_seed=3,
        data=DataConfig(kind="folder", folder=data),
        loop=LoopConfig(steps=2, log_every=1, save_every=1),
    )
    return replace(config, **changes)


def sampled(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "run/samples").iterdir())


def test_a_run_measures_what_it_does_not_see_and_shows_what_inference_makes(
    tmp_path, teacher, data, capsys
):
    config = settings(tmp_path, teacher, data)
    assert finetune(config) == 0
    assert "held out for validation: 1 of 4 clips" in capsys.readouterr().err
    rows = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if "val_loss" in row]
    assert [row["step"] for row in rows] == [0, 1]
    for name in ("val_loss", "val_loss_ema", "val_loss_sigma_0.1", "val_loss_ema_sigma_0.9"):
        assert rows[0][name] > 0
        assert rows[0][name] != rows[1][name]
    assert rows[1]["val_loss"] != rows[1]["val_loss_ema"]
    name = "1-a-small-red-circle-moving.mp4"
    steps = ("0000001", "0000002")
    assert sampled(tmp_path) == [f"{n}-{kind}-{name}" for n in steps for kind in ("current", "ema")]
    # The file is what the pipeline makes of the folder that the run wrote, but for its compression.
    pipe = WanPipeline.from_pretrained(tmp_path / "run/model", dtype=torch.float32)
    size = {"height": 32, "width": 32, "num_frames": 5}
    expected = tmp_path / "expected.mp4"
    made = pipe(config.sample_prompts[0], seed=3, **size).frames[0]
    write_video(expected, (made * 255).round().astype(np.uint8), 8)
    shown, _ = read_video(tmp_path / f"run/samples/0000002-ema-{name}")
    other, _ = read_video(tmp_path / f"run/samples/0000002-current-{name}")
    wanted = read_video(expected)[0].astype(int)
    assert np.abs(shown - wanted).mean() < 1 < np.abs(other - wanted).mean()


def test_what_is_held_out_is_part_of_what_a_run_is(tmp_path, teacher, data):
    few = settings(tmp_path, teacher, data, sample_prompts=[], sample_seed=0, validation_clips=0)
    assert finetune(few) == 0
    longer = replace(few, loop=replace(few.loop, steps=3))
    with pytest.raises(WanError, match=r"validation_clips: 0 there, 1 now"):
        finetune(replace(few, validation_clips=1))
    with pytest.raises(WanError, match=r"loop.steps: 2 there, 3 now"):  # and nothing else
        finetune(replace(longer, sample_prompts=["other"], sample_steps=2))


def test_a_lora_is_sampled_and_a_sample_costs_no_checkpoint(tmp_path, teacher, data, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/samples").touch()  # no folder can be made there
    loop = LoopConfig(steps=2, log_every=1, save_every=2)
    config = settings(tmp_path, teacher, data, lora=LoRAConfig(rank=2), loop=loop, sample_steps=1)
    assert finetune(config) == 0
    assert capsys.readouterr().err.count("no pictures of step") == 1
    assert len(list_checkpoints(tmp_path / "run/checkpoints")) == 1
    (tmp_path / "run/samples").unlink()
    assert finetune(replace(config, output_dir=str(tmp_path / "again/run"))) == 0
    assert len(sampled(tmp_path / "again")) == 2


@pytest.mark.parametrize("place", ["sample", "decode_clip"])
def test_a_device_without_memory_for_samples_costs_samples_alone(
    tmp_path, teacher, data, monkeypatch, capsys, place
):
    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(samples, place, full)
    loop = LoopConfig(steps=1, save_every=1)
    assert finetune(settings(tmp_path, teacher, data, loop=loop, sample_steps=1)) == 0
    assert "CUDA out of memory" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("samples/*"))
    assert (tmp_path / "run/model").is_dir()


def test_samples_come_when_they_are_asked_for_and_the_autoencoder_only_for_them(
    tmp_path, teacher, data, monkeypatch
):
    load, loaded = samples.load_frozen, []

    def watched(source, part, *rest):
        loaded.append(part)
        return load(source, part, *rest)

    monkeypatch.setattr(samples, "load_frozen", watched)
    loop = LoopConfig(steps=3, log_every=1, save_every=1)
    changes = {"sample_every": 2, "sample_steps": 1, "sample_size": "9x64x32", "ema_decay": 0.0}
    assert finetune(settings(tmp_path, teacher, data, loop=loop, **changes)) == 0
    assert {name.split("-")[0] for name in sampled(tmp_path)} == {"0000002", "0000003"}
    assert loaded == ["text_encoder", "vae", "vae"]
    frames, info = read_video(next((tmp_path / "run/samples").iterdir()))
    assert frames.shape == (9, 64, 32, 3)
    assert info.metadata["title"] == "a small red circle, moving"


def test_prompts_are_typed_as_they_are_or_read_from_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a blue star\n\na green square\n")
    arguments = ["sample_prompts=a cat, running ${x}", f"sample_prompts={file}"]
    (run,) = compose_runs(LINE, arguments)
    assert run.config.sample_prompts == ["a cat, running ${x}", str(file)]
    prompts = ["a cat, running ${x}", "a blue star", "a green square"]
    assert sample_prompts(run.config) == prompts
    (run,) = compose_runs(LINE, ["sample_prompts=[a red circle, 'a cat, running']"])
    assert sample_prompts(run.config) == ["a red circle", "a cat, running"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_prompts": ["x"], "sample_every": 3}, r"a multiple of loop\.save_every=200"),
        ({"sample_steps": 3}, r"sample_steps= without sample_prompts=: nothing is sampled"),
        ({"sample_seed": 3}, r"sample_seed= without sample_prompts=: nothing is sampled"),
        ({"sample_prompts": [f"{i}" for i in range(33)]}, "33 prompts, at most 32"),
        ({"sample_prompts": ["missing.txt"]}, r"missing\.txt"),
    ],
)
def test_samples_that_cannot_be_made_are_refused_before_anything_is(tmp_path, changes, message):
    config = FinetuneConfig(output_dir=str(tmp_path / "run"), checkpoint="none", **changes)
    with pytest.raises((WanError, OSError), match=message):
        finetune(config)
    assert not Path(config.output_dir).exists()


def test_a_file_without_prompts_is_refused_by_the_option_that_gave_it(tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(WanError, match=r"^sample_prompts=.*empty\.txt: no prompt in it"):
        sample_prompts(FinetuneConfig(sample_prompts=[str(tmp_path / "empty.txt")]))


@pytest.mark.parametrize(("prompts", "groups"), [(1, 4), (3, 2), (5, 4), (4, 2)])
def test_each_prompt_is_kept_by_one_group_however_many_there_are(prompts, groups, monkeypatch):
    made = []
    monkeypatch.setattr(samples.Sampler, "sample_one", lambda self, dit, prompt, bar: prompt)
    for group in range(groups):
        ranks = SimpleNamespace(
            data_rank=group,
            data_size=groups,
            size=groups,
            is_main=group == 0,
            gather=lambda mine: [mine] * groups,
            reshard=lambda dit: None,
        )
        ranks.spread = partial(Ranks.spread, ranks)
        plan = SimpleNamespace(schedule=[0])
        names = [f"{number}" for number in range(prompts)]
        sampler = samples.Sampler(names, "", None, plan, (), 0, False, 8, None, ranks)
        made += sampler.sample(None).items()
    assert made == [(number, f"{number}") for number in range(prompts)]


def test_clips_are_held_out_of_folders_only():
    with pytest.raises(WanError, match=r"validation_clips=2 with data\.kind=world"):
        FinetuneConfig(validation_clips=2)


def test_a_students_own_steps_are_kept(tmp_path):
    config = FinetuneConfig(sample_prompts=["x"], sample_steps=8, sample_guidance=5.0)
    settings = module.read_pipeline_config(module.resolve_model("builtin:miniature"))
    with pytest.raises(WanError, match=r"sample_steps, sample_guidance: .* a few-step student"):
        samples.sampling_plan(config, settings)
    plan = samples.sampling_plan(FinetuneConfig(sample_prompts=["x"]), settings)
    assert plan.sampler == "few_step"


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A cat, running!", "a-cat-running"),
        ("Кот / ../бежит", "кот-бежит"),
        ("word " * 50, "word-word-word-word-word-word-word-word"),
        ("...", ""),
    ],
)
def test_a_file_is_named_by_the_beginning_of_its_prompt(prompt, name):
    assert short_name(prompt) == name
