"""The plan of a distillation run: counts against PyTorch's own, the 5B's facts, refusals."""

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from train.plan import (
    ATTENTION_BACKWARD,
    OPTIONS,
    PlanRequest,
    activation_bytes,
    count_parameters,
    estimate,
    format_plan,
    iteration_flops,
    kept_by_block,
    kept_outside,
    network_work,
    plan,
    remedies,
)
from wan.dit import WanDiT
from wan.dit_config import DiTConfig
from wan.errors import WanError
from wan.lora import add_lora, lora_state
from wan.weights import target_dtype

TINY = DiTConfig(
    num_attention_heads=2,
    attention_head_dim=24,
    num_layers=3,
    ffn_dim=136,
    in_channels=4,
    out_channels=6,
    text_dim=20,
    freq_dim=16,
)
FULL_5B = DiTConfig()
WAN_14B = DiTConfig(40, 128, 40, 13824, 16, 16)
SIZE = (3, 8, 10)  # latents
TOKENS, ROWS = 3 * 4 * 5, 12
CANONICAL = PlanRequest(FULL_5B, latent_size=(31, 44, 80))  # 121 frames of 704x1280


def meta(config: DiTConfig) -> WanDiT:
    with torch.device("meta"):
        return WanDiT(config)


# --- counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, FULL_5B, WAN_14B], ids=["tiny", "5B", "14B"])
def test_parameters_are_those_of_the_network(config):
    dit, counts = meta(config), count_parameters(config)
    assert counts.total == sum(p.numel() for p in dit.parameters())
    assert counts.block == sum(p.numel() for p in dit.blocks[1].parameters())
    assert counts.float32 == sum(
        p.numel()
        for name, p in dit.named_parameters()
        if target_dtype(name, p.dtype, torch.bfloat16, WanDiT.FLOAT32_PARAMETERS) == torch.float32
    )


def test_a_loras_parameters_are_those_of_its_pairs():
    dit = WanDiT(TINY)
    add_lora(dit, rank=5)
    assert count_parameters(TINY, 5).pairs == sum(t.numel() for t in lora_state(dit).values())


def tiny_dit(rank: int = 0, **options) -> WanDiT:
    dit = WanDiT(TINY, **options)
    dit.init_weights(torch.Generator().manual_seed(0))
    if rank:
        add_lora(dit, rank)
    return dit


def forward(dit: WanDiT) -> Tensor:
    context = torch.randn(1, ROWS, TINY.text_dim)
    return dit(torch.randn(1, TINY.in_channels, *SIZE), torch.tensor([300.0]), context)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("checkpoint_blocks", ["none", "full"])
def test_flops_are_those_that_pytorch_counts(rank, checkpoint_blocks):
    # attention="math" makes two products of attention, and PyTorch counts products only.
    dit = tiny_dit(rank, attention="math", checkpoint_blocks=checkpoint_blocks)
    with FlopCounterMode(display=False) as during_forward:
        velocity = forward(dit)
    with FlopCounterMode(display=False) as during_backward:
        velocity.sum().backward()
    work = network_work(TINY, TOKENS, ROWS, rank, checkpoint_blocks, attention_backward=2.0)
    assert during_forward.get_total_flops() == work.forward
    assert during_backward.get_total_flops() == work.backward + work.recompute


def test_selective_recomputing_spares_attention():
    modes = {m: network_work(TINY, TOKENS, ROWS, 0, m).recompute for m in ("selective", "full")}
    scores = 4 * TOKENS * (TOKENS + ROWS) * TINY.width * TINY.num_layers
    assert modes["full"] - modes["selective"] == scores


def test_fused_attention_costs_two_and_a_half_times_as_much_backwards():
    shape = (1, 2, 64, 24)
    backward = sdpa_backward_flop_count(shape, shape, shape, shape)
    assert backward == ATTENTION_BACKWARD * sdpa_flop_count(shape, shape, shape)


def test_the_5b_at_full_size_takes_what_is_known_of_it():
    """Counted elsewhere: 517.0 TFLOP a forward; a DMD iteration of 7.92 forwards, 4.10 PFLOP."""
    forward = network_work(FULL_5B, 27280, 512).forward
    assert forward == pytest.approx(517.0e12, rel=2e-3)
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


# --- memory ---------------------------------------------------------------------------------------


def measured_bytes(dit: WanDiT, autocast: bool) -> int:
    """Bytes of all that autograd keeps for the backward pass, weights and their casts left out."""
    weights = {p.untyped_storage().data_ptr() for p in dit.parameters()}
    shapes = {frozenset(p.shape) for p in dit.parameters() if p.ndim == 2}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        is_weight = tensor.ndim == 2 and frozenset(tensor.shape) in shapes
        if storage.data_ptr() not in weights and not is_weight:
            kept[storage.data_ptr()] = tensor
        return tensor

    with (
        saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        velocity = forward(dit)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    velocity.sum().backward()  # the graph lived until here, so no storage was counted twice
    return total


def cast_as_loaded(dit: nn.Module) -> None:
    for name, parameter in dit.named_parameters():
        if "lora_" not in name:
            dtype = target_dtype(name, torch.float32, torch.bfloat16, WanDiT.FLOAT32_PARAMETERS)
            parameter.data = parameter.data.to(dtype)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_activations_are_what_autograd_keeps(precision, rank):
    dit = tiny_dit(rank)
    if precision == "bfloat16":
        cast_as_loaded(dit)
    measured = measured_bytes(dit, precision == "autocast")
    sizes = {"compute_bytes": 4 if precision == "float32" else 2, "rank": rank}
    block = kept_by_block(
        TINY, TOKENS, ROWS, autocast=precision == "autocast", fused_norm=False, **sizes
    )
    expected = TINY.num_layers * block + kept_outside(TINY, TOKENS, ROWS, **sizes)
    assert expected == pytest.approx(measured, rel=0.1)


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
            changed[names.get(name, name)] = (
                int(value) if value.isdigit() else None if value == "null" else value
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
