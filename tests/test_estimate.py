"""The estimate of a distillation run: the 5B's facts, what shards and shares save, refusals."""

import math
import re
from typing import Any

import pytest

from configs.distillation import DistillConfig, StudentConfig
from configs.training import LoopConfig
from train.distill.run import distill, training_run
from train.estimate import (
    PROCESS_BYTES,
    RECOMPUTE,
    TrainingEstimate,
    TrainingRun,
    activation_bytes,
    estimate_that_fits,
    format_estimate,
    iteration_flops,
    remedies,
    scale_of,
    time_of,
    trajectory_flops,
    with_options,
)
from train.rollout import mean_forwards
from wan.errors import WanError
from wan.models.dit_config import DiTConfig
from wan.models.recompute import CHECKPOINT_BLOCKS
from wan.runtime.costs import count_parameters, kept_by_block, network_work

FULL_5B = DiTConfig()
CANONICAL = TrainingRun(
    DistillConfig(
        batch_size=8,
        checkpoint_blocks="full",
        student=StudentConfig(exits="shared"),
        loop=LoopConfig(steps=3000),
    ),
    FULL_5B,
    latent_size=(31, 44, 80),  # 121 frames of 704x1280
)
REGRESSION = {"regression.weight": 1.0, "regression.num_pairs": 100, "regression.steps": 16}
NO_GUIDANCE = {"scores.guidance_scale": 1.0}


def changed(run: TrainingRun, *groups: dict[str, Any], **options: Any) -> TrainingRun:
    """Options by their names on the command line; `_` stands for a dot after a group's name."""
    named = {}
    for name, value in options.items():
        group, _, rest = name.partition("_")
        dotted = group in ("student", "scores", "parallel", "machines", "regression", "gan")
        named[f"{group}.{rest}" if dotted else name] = value
    for group in (*groups, named):
        run = with_options(run, group)
    return run


def test_an_iteration_of_the_5b_takes_what_is_known_of_it():
    """Counted elsewhere: 4.10 PFLOP, 7.92 forwards."""
    forward = network_work(FULL_5B, 27280, 512).forward
    total = sum(iteration_flops(CANONICAL).values())
    assert total == pytest.approx(4.10e15, rel=5e-3)
    assert total / forward == pytest.approx(7.92, rel=5e-3)


def test_an_iterations_forwards_are_those_of_the_chain():
    run = changed(CANONICAL, NO_GUIDANCE, scores_critic_ratio=1)
    one = network_work(FULL_5B, 27280, 512).forward
    flops = iteration_flops(run)
    assert flops["student forward (chain)"] == 3 * one  # 2 for the critic's clips, 1 before its own
    assert flops["teacher forward"] == one
    assert iteration_flops(changed(run, scores_guidance_scale=4.0))["teacher forward"] == 2 * one
    assert iteration_flops(changed(run, student_timesteps=[1000]))["student forward (chain)"] == one
    # Of several processes one waits for the other, unless all exit together.
    apart = iteration_flops(changed(run, student_exits="random"))
    assert apart["student forward (chain)"] == 5 * one
    alone = iteration_flops(changed(run, student_exits="random", machines_num_gpus=1))
    assert alone["student forward (chain)"] == 3 * one
    split = iteration_flops(changed(run, student_exits="random", parallel_sequence=8, batch_size=1))
    assert split["student forward (chain)"] == 3 * one


def test_a_gradient_through_all_steps_costs_them_all():
    truncated = changed(CANONICAL, REGRESSION, scores_critic_ratio=1, student_exits="late")
    truncated = changed(truncated, machines_num_gpus=1, machines_gpu_memory_gb=400, batch_size=2)
    whole = changed(truncated, student_truncate_gradient=False)
    one = network_work(FULL_5B, 27280, 512, checkpoint_blocks="full")
    flops = iteration_flops(whole)
    chain = mean_forwards(3, "late")
    assert flops["student forward (chain)"] == chain * one.forward  # the critic's clips
    assert flops["student forward (with gradient)"] == (chain + 1) * one.forward  # 1: regression
    assert flops["student backward"] == (chain + 1) * one.backward
    for mode, again in (("none", 0), ("full", 2)):  # three recomputed blocks are one at a time
        one_step = changed(truncated, checkpoint_blocks=mode)
        three = changed(whole, checkpoint_blocks=mode)
        block = kept_by_block(FULL_5B, 27280, 512, autocast=True, compute_bytes=2)
        kept = activation_bytes(one_step, 0)
        assert TrainingEstimate(three).memory["student"].activations == 3 * kept - again * 2 * block
        copies = 3 if mode == "none" else 1
        assert TrainingEstimate(three).gathered == copies * TrainingEstimate(one_step).gathered
    fits = estimate_that_fits(truncated)
    assert estimate_that_fits(whole).memory["critic"] == fits.memory["critic"]
    tight = changed(whole, machines_gpu_memory_gb=1.2 * math.floor(fits.peak / 1e9))
    with pytest.raises(WanError, match=r"; student.truncate_gradient=true \("):
        estimate_that_fits(tight)


def test_regression_adds_a_forward_and_backward_and_trajectories_before():
    one = network_work(FULL_5B, 27280, 512).forward
    run = changed(CANONICAL, scores_critic_ratio=2)
    both = changed(run, REGRESSION)
    plain, more = iteration_flops(run), iteration_flops(both)
    doubled = {
        *("student forward (with gradient)", "student backward", "student recomputed"),
    }
    for part in plain:
        assert more[part] == plain[part] * (2 if part in doubled else 1)
    hours = 100 * 16 * 2 * one / (285e12 * 8 * 3600)
    assert TrainingEstimate(both).trajectory_hours == pytest.approx(hours)
    assert TrainingEstimate(run).trajectory_hours == 0
    assert "trajectories" not in format_estimate(TrainingEstimate(run))
    assert f"{hours:.3g} h before them for the teacher's 100" in format_estimate(
        TrainingEstimate(both)
    )


def test_regression_from_own_states_adds_a_chain_and_the_teachers_way():
    run = changed(CANONICAL, scores_critic_ratio=2, machines_num_gpus=1)
    both = changed(run, {"on_policy.weight": 1.0, "on_policy.steps": 4})
    plain, more = iteration_flops(run), iteration_flops(both)
    forward = network_work(FULL_5B, 27280, 512).forward
    # From the second or third of three steps: 1.5 forwards before, in every second iteration.
    assert more["student forward (chain)"] - plain["student forward (chain)"] == pytest.approx(
        0.5 * 1.5 * forward
    )
    assert more["teacher forward"] - plain["teacher forward"] == pytest.approx(
        0.5 * 4 * 2 * forward
    )
    assert more["student backward"] == 2 * plain["student backward"]
    assert more["critic backward"] == plain["critic backward"]


def test_regression_alone_needs_neither_chain_nor_scores():
    alone = iteration_flops(changed(CANONICAL, REGRESSION, dmd_weight=0.0))
    one = network_work(FULL_5B, 27280, 512, checkpoint_blocks="full")
    assert {part: flops for part, flops in alone.items() if flops} == {
        "student forward (with gradient)": one.forward,
        "student backward": one.backward,
        "student recomputed": one.recompute,
    }


def test_regression_alone_has_no_critic():
    both = TrainingEstimate(changed(CANONICAL, REGRESSION))
    alone = TrainingEstimate(changed(both.run, dmd_weight=0.0))
    assert both.memory.keys() - alone.memory.keys() == {"critic"}
    assert alone.memory["student"] == both.memory["student"]
    assert "critic" not in format_estimate(alone)
    small = changed(alone.run, machines_num_gpus=1, batch_size=1)
    assert not any("critic" in way for way in remedies(small))


def test_trajectories_are_guided_as_they_will_be():
    guided = changed(CANONICAL, REGRESSION, NO_GUIDANCE, regression_guidance_scale=3.0)
    plain = changed(guided, regression_guidance_scale=None)
    assert trajectory_flops(guided) == 2 * trajectory_flops(plain) > 0


def test_an_adversarial_term_is_said_not_to_be_counted():
    assert "not counted" in format_estimate(TrainingEstimate(changed(CANONICAL, gan_weight=0.1)))
    assert "not counted" not in format_estimate(TrainingEstimate(CANONICAL))


# --- memory ---------------------------------------------------------------------------------------


def test_every_way_to_recompute_has_an_estimate():
    assert set(RECOMPUTE) == set(CHECKPOINT_BLOCKS)


def test_recomputing_keeps_streams_and_one_block():
    kept = {
        mode: activation_bytes(changed(CANONICAL, checkpoint_blocks=mode), 0)
        for mode in ("none", "selective", "full")
    }
    assert kept["none"] > 6 * kept["selective"] > 6 * kept["full"]
    # Self- and cross-attention's outputs in bfloat16: 168 MB each, thirty times.
    assert kept["selective"] - kept["full"] == pytest.approx(2 * 30 * 168e6, rel=0.02)


def test_a_trained_5b_takes_sixteen_bytes_a_weight():
    memory = TrainingEstimate(changed(CANONICAL, machines_num_gpus=1, batch_size=1)).memory[
        "critic"
    ]
    assert memory.weights + memory.optimizer + memory.gradients == 16 * 4_999_787_712


def test_shards_divide_what_stays_and_sequence_what_comes():
    four = changed(CANONICAL, machines_num_gpus=4, batch_size=4)
    one = TrainingEstimate(changed(four, parallel_replicate=4))
    shards = TrainingEstimate(four)
    split = TrainingEstimate(changed(four, parallel_sequence=4, batch_size=1))
    for role, memory in one.memory.items():
        assert shards.memory[role].resident == memory.resident / 4
        assert split.memory[role].resident == memory.resident / 4
        assert split.memory[role].activations <= memory.activations / 4 * 1.01
    # The same work for each clip, so the same time for as many clips.
    assert shards.hours == pytest.approx(4 * split.hours)


# --- verdicts -------------------------------------------------------------------------------------


def test_a_plan_that_fits_is_shown_in_full():
    run = changed(CANONICAL, machines_num_gpus=16, batch_size=16)
    text = format_estimate(estimate_that_fits(run))
    for role in ("student", "teacher", "critic"):
        assert re.search(rf"^{role} +5\.00 B", text, re.MULTILINE)
    assert "27280 video tokens" in text
    assert ": fits" in text
    seconds = sum(iteration_flops(run).values()) / 285e12
    assert f"{seconds:.3g} s per iteration" in text
    assert f"{seconds * 3000 / 3600:.3g} h for 3000 iterations" in text


@pytest.mark.parametrize(
    "change",
    [
        {"machines_num_gpus": 1, "batch_size": 1},
        {"machines_num_gpus": 8, "parallel_replicate": 8},
        {"machines_num_gpus": 16, "batch_size": 16, "checkpoint_blocks": "none"},
        {"machines_num_gpus": 16, "batch_size": 64},
        {"machines_num_gpus": 8, "machines_gpu_memory_gb": 24},
        {
            "machines_num_gpus": 1,
            "batch_size": 1,
            "machines_gpu_memory_gb": 200,
            "student_truncate_gradient": False,
        },
    ],
)
def test_a_plan_that_cannot_fit_is_refused_with_plans_that_do(change):
    run = changed(CANONICAL, **change)
    with pytest.raises(WanError, match=r"GB per GPU at the peak.*what would fit: ") as refusal:
        estimate_that_fits(run)
    ways = remedies(run)
    assert ways
    for way in ways:
        assert way in str(refusal.value)
        change = {}
        for word in way.rpartition(" (")[0].split():
            name, _, value = word.partition("=")
            spelt = {"null": None, "true": True}
            change[name] = int(value) if value.isdigit() else spelt.get(value, value)
        assert isinstance(estimate_that_fits(with_options(run, change)), TrainingEstimate)


def test_no_way_is_said_to_be_none():
    with pytest.raises(WanError, match="take larger GPUs"):
        estimate_that_fits(changed(CANONICAL, machines_gpu_memory_gb=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 9}, "multiple of the 8 groups"),
        ({"parallel_shard": 3}, "product must be the number of GPUs"),
        (
            {"parallel_sequence": 5, "machines_num_gpus": 5, "batch_size": 1},
            "must divide the 24 heads",
        ),
        ({"checkpoint_blocks": "some"}, "choose one of none, full, selective"),
        ({"machines_tflops": 0.0}, "machines.tflops=0.0"),
        ({"student_timesteps": []}, r"student.timesteps=\[\]"),
    ],
)
def test_requests_that_make_no_sense(change, message):
    with pytest.raises(WanError, match=message):
        changed(CANONICAL, **change)


def test_latents_that_the_transformer_does_not_take_are_refused():
    with pytest.raises(WanError, match="multiples of"):
        TrainingRun(CANONICAL.config, FULL_5B, latent_size=(31, 45, 80))


def test_main_memory_counts_every_process_of_a_machine():
    """A process holds a network while it is read, the noise of a batch, or its part of a save."""
    total = count_parameters(FULL_5B).total
    noise = 4 * 48 * 31 * 44 * 80

    def host(**options: Any) -> float:
        return TrainingEstimate(changed(CANONICAL, **options)).host

    saved = 4 * total * (1 + 2 + 1 + 1 + 2)  # the student with its average, and the critic
    assert host(machines_num_gpus=1, batch_size=1) == PROCESS_BYTES + saved
    assert host(machines_num_gpus=8) == 8 * (PROCESS_BYTES + 4 * total)
    assert host(machines_num_gpus=64, batch_size=64) == host(machines_num_gpus=8)
    many = {"machines_num_gpus": 8, "batch_size": 1024}
    assert host(**many) == 8 * (PROCESS_BYTES + 1024 * noise)
    assert host(**many, gan_weight=0.1) == 8 * (PROCESS_BYTES + 2 * 1024 * noise)
    with pytest.raises(WanError, match=r"per machine, and machines\.host_memory_gb=100"):
        estimate_that_fits(changed(CANONICAL, machines_host_memory_gb=100.0))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2e-5, "20 µs"), (0.25, "250 ms"), (90, "90 s"), (1800, "0.5 h"), (1e6, "278 h")],
)
def test_times_are_told_in_units_that_fit(seconds, text):
    assert time_of(seconds) == text


def test_sizes_are_told_in_units_that_fit():
    assert scale_of([0, 40e6, 3e6]) == (1e6, "M")
    assert scale_of([0.0]) == (1, "")


def test_a_released_teacher_is_planned_without_the_hub(monkeypatch):
    def asked(*_, **__):
        raise AssertionError("the hub is asked")

    monkeypatch.setattr("train.distill.run.resolve_model", asked)
    run = training_run(DistillConfig(checkpoint="Wan-AI/Wan2.2-TI2V-5B-Diffusers"))
    assert (run.latent_size, run.num_tokens) == ((31, 44, 80), 27280)
    with pytest.raises(WanError, match="need a falling list of numbers"):
        distill(DistillConfig(plan=True, student=StudentConfig(timesteps=[1000, 1200])))
