"""What a network costs, against what PyTorch itself counts."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from wan.lora.merge import add_lora, lora_state
from wan.models.dit import WanDiT
from wan.models.dit_config import DiTConfig
from wan.models.umt5 import UMT5Config, UMT5Encoder
from wan.models.vae import VAEConfig, WanVAE
from wan.models.vae_layers import DoublingConv2d, convolve_layer
from wan.runtime.costs import (
    ATTENTION_BACKWARD,
    count_parameters,
    decode_work,
    encode_work,
    kept_by_block,
    kept_outside,
    network_work,
    text_work,
)
from wan.weights.load import target_dtype

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


def meta(config: DiTConfig) -> WanDiT:
    with torch.device("meta"):
        return WanDiT(config)


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


def test_a_forward_of_the_5b_at_full_size_is_what_is_known_of_it():
    assert network_work(FULL_5B, 27280, 512).forward == pytest.approx(517.0e12, rel=2e-3)


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
def test_activations_are_what_autograd_keeps(precision, rank, monkeypatch):
    monkeypatch.setattr("wan.precision.cpu_is_fast_in_bfloat16", lambda: True)  # as a GPU is
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


SMALL_VAES = {
    "2.2": VAEConfig(base_dim=8, decoder_base_dim=12, z_dim=6),
    "2.1": VAEConfig(4, None, 4, is_residual=False, patch_size=None, in_channels=3, out_channels=3),
}


def doubling_first(layer, x, rows=None):
    return convolve_layer(layer, F.interpolate(x, scale_factor=2.0))


@pytest.mark.parametrize("generation", SMALL_VAES)
@torch.no_grad()
def test_the_autoencoders_flops_are_those_that_pytorch_counts(generation, monkeypatch):
    """By the plain formula; ours takes fewer where pixels are doubled."""
    config = SMALL_VAES[generation]
    with torch.device("meta"):
        vae = WanVAE(config)
    side, stride = 3, config.spatial_stride
    with FlopCounterMode(display=False) as encoding:
        latents = vae.encode_normalized(
            torch.empty(1, 3, 17, side * stride, 2 * stride, device="meta")
        )
    with FlopCounterMode(display=False) as ours:
        vae.decode_normalized(latents, 2)
    monkeypatch.setattr(DoublingConv2d, "forward", doubling_first)
    with FlopCounterMode(display=False) as decoding:
        vae.decode_normalized(latents, 2)
    assert encoding.get_total_flops() == encode_work(config, 17, side * stride, 2 * stride)
    assert decoding.get_total_flops() == decode_work(config, 5, side, 2)
    assert ours.get_total_flops() < 0.98 * decode_work(config, 5, side, 2)


@torch.no_grad()
def test_the_text_encoders_flops_are_those_that_pytorch_counts():
    config = UMT5Config(vocab_size=9, d_model=12, d_kv=8, d_ff=20, num_layers=3, num_heads=2)
    with torch.device("meta"):
        encoder, ids = UMT5Encoder(config), torch.tensor([[1, 2, 3, 4, 5]])
    with FlopCounterMode(display=False) as encoding:  # on meta, attention is two products
        encoder(ids)
    assert encoding.get_total_flops() == text_work(config, 5)


def test_text_and_autoencoder_at_full_size_cost_what_is_known_of_them():
    assert text_work(UMT5Config(), 512) == pytest.approx(4.84e12, rel=2e-3)
    assert decode_work(VAEConfig(), 31, 44, 80) == pytest.approx(2011e12, rel=2e-3)
    assert encode_work(VAEConfig(), 121, 704, 1280) == pytest.approx(383e12, rel=5e-3)
