"""The plan of a distillation run: the 5B's facts, what shards and shares save, refusals."""

import math
import re
from dataclasses import replace

import pytest

from train.estimate import (
    OPTIONS,
    RECOMPUTE,
    PlanRequest,
    RoleMemory,
    activation_bytes,
    estimate,
    format_plan,
    iteration_flops,
    plan,
    remedies,
    trajectory_flops,
)
from train.rollout import mean_forwards
from wan.errors import WanError
from wan.models.dit_config import DiTConfig
from wan.models.recompute import CHECKPOINT_BLOCKS
from wan.runtime.costs import kept_by_block, network_work

FULL_5B = DiTConfig()
CANONICAL = PlanRequest(FULL_5B, latent_size=(31, 44, 80), exits="shared")  # 121 frames of 704x1280


def test_an_iteration_of_the_5b_takes_what_is_known_of_it():
    """Counted elsewhere: 4.10 PFLOP, 7.92 forwards."""
    forward = network_work(FULL_5B, 27280, 512).forward
    total = sum(iteration_flops(CANONICAL).values())
    assert total == pytest.approx(4.10e15, rel=5e-3)
    assert total / forward == pytest.approx(7.92, rel=5e-3)


def test_an_iterations_forwards_are_those_of_the_chain():
    request = replace(CANONICAL, steps=3, critic_ratio=1, guidance=False)
    one = network_work(FULL_5B, 27280, 512).forward
    flops = iteration_flops(request)
    assert flops["student forward (chain)"] == 3 * one  # 2 for the critic's clips, 1 before its own
    assert flops["teacher forward"] == one
    assert iteration_flops(replace(request, guidance=True))["teacher forward"] == 2 * one
    assert iteration_flops(replace(request, steps=1))["student forward (chain)"] == one
    # Of several processes one waits for the other, unless all exit together.
    apart = iteration_flops(replace(request, exits="random"))
    assert apart["student forward (chain)"] == 5 * one
    alone = iteration_flops(replace(request, exits="random", num_gpus=1))
    assert alone["student forward (chain)"] == 3 * one
    split = iteration_flops(replace(request, exits="random", sequence=8, batch_size=1))
    assert split["student forward (chain)"] == 3 * one


def test_a_gradient_through_all_steps_costs_them_all():
    truncated = replace(CANONICAL, critic_ratio=1, num_pairs=9, trajectory_steps=4, exits="late")
    truncated = replace(truncated, num_gpus=1, batch_size=2, gpu_memory=400e9)
    whole = replace(truncated, truncate_gradient=False)
    one = network_work(FULL_5B, 27280, 512, checkpoint_blocks="full")
    flops = iteration_flops(whole)
    chain = mean_forwards(3, "late")
    assert flops["student forward (chain)"] == chain * one.forward  # the critic's clips
    assert flops["student forward (with gradient)"] == (chain + 1) * one.forward  # 1: regression
    assert flops["student backward"] == (chain + 1) * one.backward
    for mode, again in (("none", 0), ("full", 2)):  # three recomputed blocks are one at a time
        one_step = replace(truncated, checkpoint_blocks=mode)
        three = replace(whole, checkpoint_blocks=mode)
        block = kept_by_block(FULL_5B, 27280, 512, autocast=True, compute_bytes=2)
        kept = activation_bytes(one_step, 0)
        assert estimate(three).memory["student"].activations == 3 * kept - again * 2 * block
        copies = 3 if mode == "none" else 1
        assert estimate(three).gathered == copies * estimate(one_step).gathered
    assert plan(whole).memory["critic"] == plan(truncated).memory["critic"]
    tight = replace(whole, gpu_memory=1.2e9 * math.floor(plan(truncated).peak / 1e9))
    with pytest.raises(WanError, match=r"; student.truncate_gradient=true \("):
        plan(tight)


def test_regression_adds_a_forward_and_backward_and_trajectories_before():
    one = network_work(FULL_5B, 27280, 512).forward
    request = replace(CANONICAL, critic_ratio=2)
    both = replace(request, num_pairs=100, trajectory_steps=16)
    plain, more = iteration_flops(request), iteration_flops(both)
    doubled = {
        *("student forward (with gradient)", "student backward", "student recomputed"),
    }
    for part in plain:
        assert more[part] == plain[part] * (2 if part in doubled else 1)
    hours = 100 * 16 * 2 * one / (CANONICAL.rate * CANONICAL.num_gpus * 3600)
    assert estimate(both).trajectory_hours == pytest.approx(hours)
    assert estimate(request).trajectory_hours == 0
    assert "trajectories" not in format_plan(estimate(request))
    assert f"{hours:.3g} h before them for the teacher's 100" in format_plan(estimate(both))


def test_regression_alone_needs_neither_chain_nor_scores():
    alone = iteration_flops(
        replace(CANONICAL, matching=False, num_pairs=100, trajectory_steps=16, critic_ratio=5)
    )
    one = network_work(FULL_5B, 27280, 512, checkpoint_blocks="full")
    assert {part: flops for part, flops in alone.items() if flops} == {
        "student forward (with gradient)": one.forward,
        "student backward": one.backward,
        "student recomputed": one.recompute,
    }


def test_in_regression_alone_the_critic_only_lies_there():
    both = estimate(replace(CANONICAL, num_pairs=100, trajectory_steps=16))
    alone = estimate(replace(both.request, matching=False))
    assert alone.memory["critic"] == RoleMemory(both.memory["critic"].weights)
    assert alone.memory["student"] == both.memory["student"]


def test_trajectories_are_guided_as_they_will_be():
    guided = replace(CANONICAL, num_pairs=100, trajectory_steps=16, guidance=False)
    plain = replace(guided, trajectory_guidance=False)
    assert trajectory_flops(guided) == 2 * trajectory_flops(plain) > 0


def test_an_adversarial_term_is_said_not_to_be_counted():
    assert "not counted" in format_plan(estimate(replace(CANONICAL, adversarial=True)))
    assert "not counted" not in format_plan(estimate(CANONICAL))


# --- memory ---------------------------------------------------------------------------------------


def test_every_way_to_recompute_has_a_plan():
    assert set(RECOMPUTE) == set(CHECKPOINT_BLOCKS)


def test_recomputing_keeps_streams_and_one_block():
    kept = {
        mode: activation_bytes(replace(CANONICAL, checkpoint_blocks=mode), 0)
        for mode in ("none", "selective", "full")
    }
    assert kept["none"] > 6 * kept["selective"] > 6 * kept["full"]
    # Self- and cross-attention's outputs in bfloat16: 168 MB each, thirty times.
    assert kept["selective"] - kept["full"] == pytest.approx(2 * 30 * 168e6, rel=0.02)


def test_a_trained_5b_takes_sixteen_bytes_a_weight():
    memory = estimate(replace(CANONICAL, num_gpus=1, batch_size=1)).memory["critic"]
    assert memory.weights + memory.optimizer + memory.gradients == 16 * 4_999_787_712


def test_shards_divide_what_stays_and_sequence_what_comes():
    one = estimate(replace(CANONICAL, num_gpus=4, batch_size=4, replicate=4))
    shards = estimate(replace(CANONICAL, num_gpus=4, batch_size=4))
    split = estimate(replace(CANONICAL, num_gpus=4, batch_size=1, sequence=4))
    for role, memory in one.memory.items():
        assert shards.memory[role].resident == memory.resident / 4
        assert split.memory[role].resident == memory.resident / 4
        assert split.memory[role].activations <= memory.activations / 4 * 1.01
    # The same work for each clip, so the same time for as many clips.
    assert shards.hours == pytest.approx(4 * split.hours)


# --- verdicts -------------------------------------------------------------------------------------


def test_a_plan_that_fits_is_shown_in_full():
    request = replace(CANONICAL, num_gpus=16, batch_size=16)
    text = format_plan(plan(request))
    for role in ("student", "teacher", "critic"):
        assert re.search(rf"^{role} +5\.00 B", text, re.MULTILINE)
    assert "27280 tokens" in text
    assert ": fits" in text
    seconds = sum(iteration_flops(request).values()) / request.rate
    assert f"{seconds:.3g} s per iteration" in text
    assert f"{seconds * 3000 / 3600:.3g} h for 3000 iterations" in text


@pytest.mark.parametrize(
    "change",
    [
        {"num_gpus": 1, "batch_size": 1},
        {"num_gpus": 8, "replicate": 8},
        {"num_gpus": 16, "batch_size": 16, "checkpoint_blocks": "none"},
        {"num_gpus": 16, "batch_size": 64},
        {"num_gpus": 8, "gpu_memory": 24e9},
        {"num_gpus": 1, "batch_size": 1, "gpu_memory": 200e9, "truncate_gradient": False},
    ],
)
def test_a_plan_that_cannot_fit_is_refused_with_plans_that_do(change):
    request = replace(CANONICAL, **change)
    with pytest.raises(WanError, match=r"GB per GPU at the peak.*what would fit: ") as refusal:
        plan(request)
    ways = remedies(request)
    assert ways
    for way in ways:
        assert way in str(refusal.value)
        names = {option: name for name, option in OPTIONS.items()}
        changed = {}
        for word in way.rpartition(" (")[0].split():
            name, _, value = word.partition("=")
            spelt = {"null": None, "true": True}
            changed[names.get(name, name)] = (
                int(value) if value.isdigit() else spelt.get(value, value)
            )
        assert plan(replace(request, **changed)).fits


def test_no_way_is_said_to_be_none():
    with pytest.raises(WanError, match="take larger GPUs"):
        plan(replace(CANONICAL, gpu_memory=1e9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 9}, "multiple of the 8 groups"),
        ({"shard": 3}, "product must be the number of GPUs"),
        ({"num_gpus": 5, "sequence": 5, "batch_size": 1}, "must divide the 24 heads"),
        ({"checkpoint_blocks": "some"}, "choose none, selective, full"),
        ({"latent_size": (31, 45, 80)}, "multiples of"),
        ({"rate": 0.0}, "rate=0.0"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_requests_that_make_no_sense(change, message):
    with pytest.raises(WanError, match=message):
        replace(CANONICAL, **change)
