"""Distillation end to end on a tiny teacher: who moves when, resume, terms, what comes out."""

import json
import math
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train_checkpoint import assert_same

import train.distill.run as module
import train.dmd as dmd
from configs.data import DataConfig, PreprocessConfig
from configs.distillation import (
    DistillConfig,
    GANConfig,
    PlanConfig,
    RegressionConfig,
    ScoreConfig,
    StudentConfig,
)
from configs.training import LoopConfig, LoRAConfig
from train.checkpoint import list_checkpoints, load_latest
from train.conditioning import check_same_part
from train.data import folder_cache
from train.distill.run import distill
from train.metrics import read_metrics
from train.preprocess.run import preprocess
from wan import WanDMDPipeline
from wan.errors import WanError
from wan.lora.merge import read_lora
from wan.media.video import write_video
from wan.models.attention_config import AttentionConfig
from wan.models.dit import WanDiT
from wan.models.dit_config import DiTConfig
from wan.pipeline.config import BASE, SamplingDefaults, read_pipeline_config, write_configs
from wan.sampling.noise import sample_generators
from wan.sampling.scheduler_config import SchedulerSettings
from wan.weights.checkpoint import open_checkpoint
from wan.weights.hub import STUDENT, TEACHER
from wan.weights.load import load_state
from wan.weights.save import save_component

TINY = DiTConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=16,
    out_channels=16,
    text_dim=128,
    freq_dim=32,
    ffn_dim=32,
    num_layers=2,
)


pytestmark = pytest.mark.filterwarnings("ignore:.*matrices of zeros")  # a fresh transformer has


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A released folder with the miniature's frozen parts and a tiny random transformer."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(STUDENT / part, folder / part)
    settings = replace(
        read_pipeline_config(TEACHER),
        class_name=BASE,
        timesteps=None,
        transformer=TINY,
        defaults=SamplingDefaults(64, 64, 9, 8, 4, 3.0),
        scheduler=SchedulerSettings(shift=3.0),
    )
    write_configs(settings, folder)
    dit = WanDiT(TINY)
    generator = torch.Generator().manual_seed(0)
    dit.init_weights(generator)
    with torch.no_grad():
        dit.head.proj.weight.normal_(0, 0.3, generator=generator)
        for block in dit.blocks:  # zero in a new network, which reads no captions
            block.cross_attention.out.weight.normal_(0, 0.3, generator=generator)
    save_component(dit.state_dict(), folder / "transformer", "transformer")
    return folder


def settings(tmp_path: Path, teacher: Path, **changes) -> DistillConfig:
    config = DistillConfig(
        output_dir=str(tmp_path / "run"),
        checkpoint=str(teacher),
        threads=1,
        batch_size=3,
        bfloat16=False,
        scores=ScoreConfig(guidance_scale=2.0, shift=3.0, critic_ratio=2),
        lr=1e-3,
        critic_lr=1e-3,
        warmup=1,
        ema_decay=0.5,
        validation_captions=1,
        validation_steps=2,
        max_drift=1e3,
        data=DataConfig(cache_dir=str(teacher.parent / "cache"), num_clips=4),
        loop=LoopConfig(steps=4, log_every=1, save_every=2),
    )
    return replace(config, **changes)


def metrics(config: DistillConfig) -> list[dict]:
    return read_metrics(Path(config.output_dir, "metrics.jsonl"))


def student_weights(config: DistillConfig) -> dict[str, torch.Tensor]:
    return load_state(open_checkpoint(Path(config.output_dir) / "model/transformer"), "transformer")


def fresh_run(config: DistillConfig, monkeypatch) -> tuple[dmd.Distillation, dmd.TrainState]:
    """The run and its state as they are before the first step."""
    caught = []

    def catch(state, step, *rest, **options):
        caught.append((step.__self__, state))
        return False

    monkeypatch.setattr(module, "run_training", catch)
    distill(config)
    return caught[0]


def test_a_student_comes_out_that_the_pipeline_runs_in_its_own_steps(tmp_path, teacher):
    config = settings(tmp_path, teacher, student=StudentConfig([1000, 600]))
    assert distill(config) == 0
    pipe = WanDMDPipeline.from_pretrained(tmp_path / "run/model", dtype=torch.float32)
    assert pipe.config.timesteps == (1000, 600)
    steps = []
    frames = pipe(
        "a red circle", seed=0, callback_on_step_end=lambda p, i, t, kw: steps.append(t) or kw
    ).frames
    assert frames.shape == (1, 9, 64, 64, 3)
    assert [float(t) for t in steps] == [1000, 600]
    samples = {path.name for path in (tmp_path / "run/samples").iterdir()}
    assert {"0000004-student-teacher.png", "0000004-triptych.png", "0000004-0.mp4"} <= samples


def test_no_more_than_one_video_of_a_panel_is_in_memory(tmp_path, teacher, monkeypatch):
    decode, made = module.decode_clip, []

    def watched(*args):
        assert not any(one() is not None for one in made)
        video = decode(*args)
        made.append(weakref.ref(video))
        return video

    monkeypatch.setattr(module, "decode_clip", watched)
    loop = LoopConfig(steps=2, save_every=2)
    assert distill(settings(tmp_path, teacher, validation_captions=3, loop=loop)) == 0
    assert len(made) == 6 + 6 + 3  # teacher, student, triptych
    clips = {path.name for path in (tmp_path / "run/samples").glob("*.mp4")}
    assert clips == {f"0000002-{number}.mp4" for number in range(4)}


def test_the_log_says_what_a_run_is_judged_by(tmp_path, teacher):
    config = settings(tmp_path, teacher)
    distill(config)
    lines = metrics(config)
    steps = [line for line in lines if "critic_loss" in line]
    assert ["dmd_gradient" in line for line in steps] == [False, True, False, True]
    assert sum(steps[1][f"exits_{i}"] for i in range(3)) == 3
    assert any(name.startswith("critic_loss_sigma_") for name in steps[0])
    moves = {"dmd_normalizer", "student_mean", "student_std", "student_drift", "memory_gb", "lr"}
    moves |= {"student_saturated", "teacher_saturated"}
    assert [line.keys() >= moves for line in steps] == [False, True, False, True]
    for line in steps:
        assert line["critic_lr"] > 0
        assert line["clips_per_second"] == pytest.approx(3 / line["seconds_per_step"])
    saved = [line for line in lines if "health" in line]
    assert len(saved) == 2
    assert {"motion_ratio", "saturation_ratio", "spread_ratio", "val_joint"} <= saved[0].keys()


def test_a_run_that_is_cut_goes_on_bit_for_bit(tmp_path, teacher, monkeypatch):
    loop = LoopConfig(steps=6, log_every=1, save_every=3)  # between two moves of the student
    straight = settings(tmp_path / "a", teacher, loop=loop)
    distill(straight)
    cut = settings(tmp_path / "b", teacher, loop=loop)
    original = dmd.Distillation.train_step

    def stop_after_four(self, state):
        if state.step == 4:
            raise KeyboardInterrupt
        return original(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(dmd.Distillation, "train_step", stop_after_four)
        with pytest.raises(KeyboardInterrupt):
            distill(cut)
    assert [p.name for p in list_checkpoints(tmp_path / "b/run/checkpoints")] == ["step-0000003"]
    distill(cut)
    one, two = student_weights(straight), student_weights(cut)
    assert all(torch.equal(one[name], two[name]) for name in one)
    trees = [load_latest(Path(c.output_dir, "checkpoints")) for c in (straight, cut)]
    for part in ("step", "modules", "optimizers", "averages"):  # the critic's too
        assert_same(trees[0][part], trees[1][part])
    numbers = [[line.get("critic_loss") for line in metrics(c)] for c in (straight, cut)]
    assert numbers[0] == numbers[1]


def changed(before: dict[str, torch.Tensor], network: torch.nn.Module) -> bool:
    return any(not torch.equal(before[n], p) for n, p in network.named_parameters())


def weights_of(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in network.named_parameters()}


@pytest.mark.parametrize("gan", [GANConfig(), GANConfig(0.1), GANConfig(0.1, host="teacher")])
def test_each_update_moves_its_own_network_and_leaves_no_gradient_elsewhere(
    tmp_path, teacher, monkeypatch, gan
):
    run, state = fresh_run(settings(tmp_path, teacher, gan=gan), monkeypatch)
    networks = {"student": run.student, "critic": run.critic, "teacher": run.teacher}
    generator = torch.Generator().manual_seed(0)
    for mover, update in (("student", run.update_student), ("critic", run.update_critic)):
        before = {name: weights_of(network) for name, network in networks.items()}
        update(state, generator)
        for name, network in networks.items():
            assert changed(before[name], network) == (name == mover)
            assert all(p.grad is None for p in network.parameters())


def test_without_guidance_a_critic_that_is_the_teacher_gives_no_direction(
    tmp_path, teacher, monkeypatch
):
    scores = ScoreConfig(guidance_scale=1.0, critic_ratio=2)
    run, _ = fresh_run(settings(tmp_path, teacher, scores=scores), monkeypatch)
    _, values = run.matching_loss(0, *run.batches(0, torch.Generator().manual_seed(0)))
    assert values["dmd_gradient"] == 0


def test_the_discriminator_learns_and_the_student_sees_it(tmp_path, teacher, monkeypatch):
    run, state = fresh_run(settings(tmp_path, teacher, gan=GANConfig(1.0)), monkeypatch)
    before = weights_of(run.discriminator)
    values = run.update_critic(state, torch.Generator().manual_seed(0))
    assert changed(before, run.discriminator)
    assert values["gan_critic"] > 0

    def loss(dmd_weight: float) -> float:
        run.config = replace(run.config, dmd_weight=dmd_weight)
        return float(
            run.matching_loss(0, *run.batches(0, torch.Generator().manual_seed(0)))[0].detach()
        )

    whole, half = loss(1.0), loss(0.5)
    run.discriminator = None
    assert whole > loss(1.0) > 0
    assert half - loss(0.5) == pytest.approx(whole - loss(1.0))  # dmd_weight is of DMD alone


def test_regression_asks_at_the_times_at_which_the_student_samples(tmp_path, teacher, monkeypatch):
    config = settings(
        tmp_path,
        teacher,
        student=StudentConfig([1000, 757, 522]),
        regression=RegressionConfig(weight=1.0, num_pairs=4, steps=4),
        batch_size=3,
    )
    run, _ = fresh_run(config, monkeypatch)
    asked: set[float] = set()
    run.student.register_forward_pre_hook(lambda module, inputs: asked.update(inputs[1].tolist()))
    run.regression_loss(0, *next(run.pairs(torch.Generator().manual_seed(0))))
    assert asked == {1000.0, 757.0, 522.0}


def test_regression_alone_needs_no_critic_and_learns(tmp_path, teacher):
    config = settings(
        tmp_path,
        teacher,
        dmd_weight=0.0,
        student=StudentConfig([1000, 600], deterministic=True),
        regression=RegressionConfig(weight=1.0, num_pairs=4, steps=4),
        lr=3e-3,
        loop=LoopConfig(steps=40, log_every=10, save_every=40),
    )
    distill(config)
    losses = [line["regression"] for line in metrics(config) if "regression" in line]
    assert losses[-1] < 0.9 * losses[0]
    assert all("critic_loss" not in line for line in metrics(config))
    tree = load_latest(Path(config.output_dir, "checkpoints"))
    assert tree["modules"].keys() == tree["optimizers"].keys() == {"student"}
    pipe = WanDMDPipeline.from_pretrained(Path(config.output_dir, "model"), dtype=torch.float32)
    latents = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    one, other = (
        pipe("a red circle", latents=latents, seed=seed, output_type="latent").frames
        for seed in (1, 2)
    )
    assert torch.equal(one, other)  # it samples as it was trained, without fresh noise
    (shard,) = Path(config.output_dir, "trajectories").glob("*.safetensors")
    written = shard.stat().st_mtime_ns
    distill(config)  # finished already: nothing is sampled again
    assert shard.stat().st_mtime_ns == written


def test_the_weight_of_regression_may_change_in_a_straight_line(tmp_path, teacher):
    assert [RegressionConfig(1.0, 0.25).weight_at(step, 4) for step in range(4)] == [
        pytest.approx(weight) for weight in (1.0, 0.75, 0.5, 0.25)
    ]
    assert RegressionConfig(1.0).weight_at(3, 4) == RegressionConfig(1.0, 0.0).weight_at(0, 1) == 1
    regression = RegressionConfig(2.0, 0.0, num_pairs=4, steps=4)
    config = settings(tmp_path, teacher, dmd_weight=0.0, regression=regression)
    distill(config)
    trained = [line for line in metrics(config) if "regression" in line]
    weights = [line["loss_student"] / line["regression"] for line in trained]
    assert weights == pytest.approx([2, 4 / 3, 2 / 3, 0])


def test_runs_share_the_teachers_trajectories(tmp_path, teacher):
    shared = tmp_path / "trajectories"
    regression = RegressionConfig(weight=1.0, num_pairs=4, steps=4, folder=str(shared))
    changes = {"dmd_weight": 0.0, "loop": LoopConfig(steps=1), "regression": regression}
    distill(settings(tmp_path, teacher, **changes))
    (shard,) = shared.glob("*.safetensors")
    written = shard.stat().st_mtime_ns
    distill(settings(tmp_path, teacher, seed=1, output_dir=str(tmp_path / "second"), **changes))
    assert list(shared.glob("*.safetensors")) == [shard]
    assert shard.stat().st_mtime_ns == written
    assert not list(tmp_path.glob("*/trajectories"))
    third = {"output_dir": str(tmp_path / "third"), "bfloat16": True}
    distill(settings(tmp_path, teacher, **third, **changes))
    assert len(list(shared.glob("*.safetensors"))) == 2  # another teacher, as far as it is asked


def test_a_lora_student_is_written_as_lora_and_as_a_whole_model(tmp_path, teacher):
    config = settings(
        tmp_path,
        teacher,
        student=StudentConfig(lora=LoRAConfig(rank=2)),
        scores=ScoreConfig(2.0, critic_ratio=1, critic_lora=LoRAConfig(rank=2)),
    )
    distill(config)
    lora = read_lora(tmp_path / "run/pytorch_lora_weights.safetensors")
    assert any(pair.up.abs().max() > 0 for pair in lora.pairs.values())
    base = load_state(open_checkpoint(teacher / "transformer"), "transformer")
    merged = student_weights(config)
    moved = {name for name in base if not torch.equal(base[name], merged[name])}
    assert moved
    assert moved <= set(lora.names)


def test_a_given_first_frame_is_part_of_the_student_and_of_both_scores(tmp_path, teacher):
    config = settings(tmp_path, teacher, first_frame_share=1.0)
    assert distill(config) == 0


def test_clips_of_one_frame_are_made_whole(tmp_path, teacher, monkeypatch):
    config = settings(tmp_path, teacher, first_frame_share=1.0)
    run, state = fresh_run(config, monkeypatch)
    draw = run.draw

    def pictures(step):
        clips = draw(step)
        return replace(clips, latents=clips.latents[:, :, :1])

    run.draw = pictures
    (batch,) = run.batches(0, torch.Generator())
    assert batch.condition.first_frame is None
    assert batch.noise.shape[2] == 1
    assert all(math.isfinite(value) for value in run.train_step(state).values())


def test_a_panel_of_more_captions_than_a_batch_takes_those_of_the_next(
    tmp_path, teacher, monkeypatch
):
    """Of a folder, whose captions come as the batches of training do."""
    base = settings(tmp_path, teacher)
    opened, draw = module.open_source, module.world_captions(base)
    monkeypatch.setattr(module, "open_source", lambda config, *rest: opened(base, *rest))
    folder = DataConfig(kind="folder", folder=str(tmp_path))
    config = replace(base, data=folder, validation_captions=5)  # batch_size is 3
    seen = []

    def panel(run, settings, captions, *rest):
        seen.append(captions)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "teacher_panel", panel)
    with pytest.raises(KeyboardInterrupt):
        distill(config)
    five = (draw(0).captions + draw(1).captions)[:5]
    assert seen == [five * 2]


def test_distillation_reads_a_folder_of_prompts_and_clips(tmp_path, teacher):
    noise = np.random.default_rng(0).integers(0, 200, (9, 64, 64, 3), dtype=np.uint8)
    (tmp_path / "clips").mkdir()
    write_video(tmp_path / "clips/a.mp4", noise, 8)
    (tmp_path / "clips/a.txt").write_text("a gray wall")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square")
    data = PreprocessConfig(
        clips=str(tmp_path / "clips"),
        prompts=str(tmp_path / "prompts.txt"),
        output_dir=str(tmp_path / "data"),
        checkpoint=str(teacher),
        sizes=["9x64x64"],
        threads=1,
    )
    assert preprocess(data) == 0
    config = settings(
        tmp_path,
        teacher,
        data=DataConfig(kind="folder", folder=str(tmp_path / "data")),
        loop=LoopConfig(steps=2, log_every=1, save_every=2),
    )
    assert distill(config) == 0
    clips = replace(config, output_dir=str(tmp_path / "gan"), gan=GANConfig(weight=0.01))
    assert distill(clips) == 0
    saved = json.loads((tmp_path / "gan/config.json").read_text())
    assert saved["data_digest"] == folder_cache(tmp_path / "data", None).digest


@pytest.mark.parametrize(("weight", "shape"), [(0.0, (16, 3, 4, 4)), (0.01, (16, 5, 8, 8))])
def test_samples_have_the_size_of_the_clips_that_a_term_reads(tmp_path, teacher, weight, shape):
    loop = LoopConfig(steps=2, log_every=1, save_every=2)
    assert distill(settings(tmp_path, teacher, gan=GANConfig(weight), loop=loop)) == 0
    panel = load_file(tmp_path / "run" / "teacher_panel.safetensors")["latents"]
    assert panel.shape[1:] == shape


def test_a_number_that_is_not_finite_stops_the_run_and_is_named(tmp_path, teacher, monkeypatch):
    run, state = fresh_run(settings(tmp_path, teacher), monkeypatch)
    with torch.no_grad():
        run.critic.head.proj.bias[0] = float("nan")
    state.step = 1
    with pytest.raises(WanError, match=r"step 1: \d+ of \d+ numbers in x0_critic not finite"):
        run.train_step(state)


def test_a_gradient_of_the_discriminator_that_is_not_finite_is_named(
    tmp_path, teacher, monkeypatch
):
    config = settings(tmp_path, teacher, gan=GANConfig(0.1, host="teacher"))
    run, state = fresh_run(config, monkeypatch)
    with torch.no_grad():
        next(run.discriminator.parameters()).fill_(float("nan"))
    with pytest.raises(WanError, match=r"step 0: .* in the gradient of discriminator\.\S+ not"):
        run.update_critic(state, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("factor", [50, 0.0])
def test_a_student_whose_spread_leaves_the_teachers_stops_the_run(
    tmp_path, teacher, monkeypatch, factor
):
    run, state = fresh_run(settings(tmp_path, teacher, max_drift=3.0), monkeypatch)
    panel = load_file(tmp_path / "run/teacher_panel.safetensors")["latents"]
    assert run.teacher_std == pytest.approx(float(panel.std()))
    run.update_student(state, torch.Generator().manual_seed(0))
    clips = torch.randn(3, 16, 3, 4, 4)
    monkeypatch.setattr(dmd, "roll_out", lambda *args: (factor * clips).requires_grad_())
    with pytest.raises(WanError, match=r"step 0: diverged: .* lower lr"):
        run.update_student(state, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("exits", [0, 1, 2])
def test_a_student_that_is_its_teacher_is_healthy_wherever_its_clips_leave_the_chain(
    tmp_path, teacher, monkeypatch, exits
):
    """What the teacher sees grows along the chain to a third of what finished samples have."""
    run, _ = fresh_run(settings(tmp_path, teacher, max_drift=1.5), monkeypatch)
    left = torch.full((3,), exits)
    clips = torch.randn(3, 16, 3, 4, 4)
    clips /= dmd.spread_of_clips(clips)[:, None, None, None, None]

    def chain(dit, captions, generators, on_x0):
        assert dit is run.teacher
        for spread in (1, 2, 3):
            on_x0(spread * clips[: len(captions)])

    monkeypatch.setattr(run, "sample_few", chain)
    run.measure_teacher(["a", "b", "c"], 10 * clips)
    for spread in (1 + exits, 10):  # the student begins with the one and ends with the other
        run.check_spread(0, run.spreads(spread * clips, left))
    for spread in (0.6 * (1 + exits), 16):
        with pytest.raises(WanError, match="diverged"):
            run.check_spread(0, run.spreads(spread * clips, left))


def test_the_spread_of_the_teacher_is_that_of_what_it_sees_at_the_students_steps(
    tmp_path, teacher, monkeypatch
):
    run, _ = fresh_run(settings(tmp_path, teacher), monkeypatch)
    seen = []
    with torch.no_grad():
        generators = sample_generators([dmd.PANEL_SEED], 1)
        last = run.sample_few(run.student, ["a red circle"], generators, seen.append)
    assert len(seen) == 3
    assert torch.allclose(seen[-1], last, atol=1e-5)
    run.measure_teacher(["a red circle"], 1e3 * seen[0])  # the student is the teacher still
    assert [low for low, _ in run.healthy] == [float(x0.std()) for x0 in seen]


def test_what_captions_leave_unsaid_has_no_part_where_they_come_with_the_data(
    tmp_path, teacher, capsys
):
    loop = LoopConfig(steps=2, save_every=2)
    distill(settings(tmp_path / "drawn", teacher, omit=[0.5], loop=loop))
    assert "omit" not in capsys.readouterr().err
    distill(settings(tmp_path / "clips", teacher, omit=[0.5], loop=loop, gan=GANConfig(0.1)))
    assert "omit=[0.5] is for drawn captions" in capsys.readouterr().err


def test_the_teachers_panel_is_kept_for_the_same_teacher_and_guidance_only(
    tmp_path, teacher, monkeypatch
):
    file = tmp_path / "run/teacher_panel.safetensors"
    made = []
    for guidance in (2.0, 2.0, 5.0):
        scores = ScoreConfig(guidance_scale=guidance, critic_ratio=2)
        fresh_run(settings(tmp_path, teacher, scores=scores), monkeypatch)
        made.append((file.stat().st_mtime_ns, load_file(file)["latents"]))
    assert made[0][0] == made[1][0]
    assert not torch.equal(made[1][1], made[2][1])


def test_a_run_does_not_go_on_with_another_teacher(tmp_path, teacher):
    own = shutil.copytree(teacher, tmp_path / "teacher")
    config = settings(tmp_path, own, loop=LoopConfig(steps=2, save_every=2))
    distill(config)
    state = load_state(open_checkpoint(own / "transformer"), "transformer")
    changed = {name: tensor + 1 for name, tensor in state.items()}
    (own / "transformer/diffusion_pytorch_model.safetensors").unlink()
    save_component(changed, own / "transformer", "transformer")
    with pytest.raises(WanError, match="teacher_digest"):
        distill(replace(config, loop=LoopConfig(steps=4, save_every=2)))


def test_a_student_to_start_from_must_be_there(tmp_path, teacher):
    student = StudentConfig(start=str(tmp_path / "first/model"))
    with pytest.raises(WanError, match=r"student\.start=.*first/model.*train that student first"):
        distill(settings(tmp_path, teacher, student=student))


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_a_student_goes_on_with_the_parts_that_it_learnt_with(tmp_path, teacher, part):
    own = shutil.copytree(teacher, tmp_path / "student")
    file = next((own / part).glob("*.safetensors"))
    half = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(half, file)  # the same weights, stored otherwise
    check_same_part(part, "x", own, teacher)
    save_file({name: t * (1.1 if t.ndim == 1 else 1) for name, t in half.items()}, file)
    with pytest.raises(WanError, match=rf"student\.start=.*its {part} is not that of"):
        distill(settings(tmp_path, teacher, student=StudentConfig(start=str(own))))


def test_a_student_is_no_teacher(tmp_path, teacher):
    distill(settings(tmp_path, teacher))
    with pytest.raises(WanError, match="is a few-step student itself"):
        distill(settings(tmp_path / "again", tmp_path / "run/model"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dmd_weight": 0.0}, "nothing would teach"),
        ({"max_drift": 1.0}, "above 1"),
        (
            {"scores": ScoreConfig(critic_ratio=3, critic_warmup=4), "loop": LoopConfig(steps=5)},
            "after the first 4.*never",
        ),
        ({"export": "nicest"}, "last, best"),
        ({"omit": [0.15, 1.5]}, "omit=1.5: must be between 0 and 1"),
        ({"first_frame_share": 2.0}, "between 0 and 1|lie in"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, message):
    with pytest.raises(WanError, match=message):
        DistillConfig(**change)


def test_a_regression_that_is_off_has_no_weight_at_the_end():
    with pytest.raises(WanError, match="start above 0"):
        RegressionConfig(weight=0.0, final_weight=1.0)


def test_captions_leave_unsaid_what_they_are_told_to():
    whole, bare, alternating = (
        module.world_captions(DistillConfig(omit=omit, batch_size=40))(3).captions
        for omit in ([0.0], [1.0], [0.0, 1.0])
    )
    assert all("moving" not in text and "background" not in text for text in bare)
    assert alternating[0::2] == whole[0::2]
    assert alternating[1::2] == bare[1::2]
    plain = module.world_captions(DistillConfig(batch_size=40))(3).captions
    assert plain == module.world_captions(DistillConfig(omit=[0.15], batch_size=40))(3).captions
    assert len(set(plain) - {*whole, *bare}) > 10


def test_a_sparse_student_learns_from_full_attention_and_says_how_it_was_trained(
    tmp_path, teacher, recwarn
):
    attention = AttentionConfig("sliding_tile", tile=[1, 1, 1], window=[3, 1, 1])
    scores = ScoreConfig(critic_ratio=1, full_attention=True)
    config = settings(tmp_path, teacher, attention=attention, scores=scores)
    with pytest.MonkeyPatch.context() as patch:
        run, _ = fresh_run(config, patch)
    networks = (run.student, run.teacher, run.critic)
    assert [net.attention.config.name for net in networks] == ["sliding_tile", "sdpa", "sdpa"]
    request = module.training_run(replace(config, machines=PlanConfig(num_gpus=3)))
    assert request.student_density < request.score_density == 1
    assert distill(config) == 0
    folder = tmp_path / "run" / "model"
    trained = read_pipeline_config(folder).defaults.attention
    assert trained == "sliding_tile tile=[1, 1, 1] window=[3, 1, 1]"
    recwarn.clear()
    WanDMDPipeline.from_pretrained(folder, dtype=torch.float32, attention=attention)
    assert not [w for w in recwarn if "was trained with" in str(w.message)]
    with pytest.warns(UserWarning, match=r'attention=sliding_tile "attention.tile=\[1, 1, 1\]"'):
        WanDMDPipeline.from_pretrained(folder, dtype=torch.float32)
