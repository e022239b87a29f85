"""Weights in 8 bits: how far they are from the originals, what stays, and the way they are read."""

import pytest
import torch
from test_pipeline import DIT, TEXT, random_weights

from wan.errors import WanError
from wan.lora.files import LowRank
from wan.lora.merge import LoRA, LoRAMerge, merge_lora
from wan.models.dit import WanDiT
from wan.models.dit_config import DiTConfig
from wan.models.umt5 import UMT5Encoder
from wan.precision import working_dtype
from wan.weights.checkpoint import open_checkpoint
from wan.weights.load import build_on_meta, load_module
from wan.weights.quantize import (
    QuantizedLinear,
    is_quantized_weight,
    quantization_of,
    quantize,
    quantize_weight,
    restore_weight,
)
from wan.weights.save import save_component

KINDS = ("int8", "fp8")


def quantization_error(weight: torch.Tensor, kind: str) -> float:
    """Relative rms error of a weight (out, in) after quantisation."""
    exact = weight.float()
    error = restore_weight(*quantize_weight(weight, kind), torch.float32) - exact
    return float(error.norm() / exact.norm())


def forward(dit: WanDiT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 3, 8, 8, generator=generator)
    context = torch.randn(1, 6, DIT.text_dim, generator=generator)
    with torch.no_grad():
        return dit(latents, torch.tensor([500.0]), context)


def distance(x: torch.Tensor, exact: torch.Tensor) -> float:
    return float((x - exact).norm() / exact.norm())


def test_int8_is_off_by_at_most_half_a_step_of_each_channel():
    weight = torch.randn(5, 64) * torch.logspace(-3, 3, 5)[:, None]
    stored, scale = quantize_weight(weight, "int8")
    assert (stored.dtype, scale.shape) == (torch.int8, (5, 1))
    assert torch.equal(stored.abs().amax(1), torch.full((5,), 127, dtype=torch.int8))
    error = (restore_weight(stored, scale, torch.float32) - weight).abs()
    assert bool((error <= scale / 2 * 1.001).all())


def test_fp8_is_off_by_at_most_a_sixteenth_of_each_weight():
    weight = torch.randn(5, 64) * torch.logspace(-3, 3, 5)[:, None]
    stored, scale = quantize_weight(weight, "fp8")
    assert stored.dtype == torch.float8_e4m3fn
    error = (restore_weight(stored, scale, torch.float32) - weight).abs()
    # 3 bits of mantissa: half a step is 1/16 of the number; below 2^-6 steps are even, 2^-9.
    assert bool((error <= (weight.abs() / 16).maximum(scale * 2**-10) * 1.001).all())


@pytest.mark.parametrize("kind", KINDS)
def test_channels_of_zeros_and_single_outliers_survive(kind):
    weight = torch.zeros(3, 8)
    weight[1, 2] = -1e-30
    weight[2] = 3.0
    restored = restore_weight(*quantize_weight(weight, kind), torch.float32)
    torch.testing.assert_close(restored, weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("kind", "lowest", "highest"), [("int8", 0.005, 0.012), ("fp8", 0.02, 0.03)]
)
def test_the_error_of_normal_weights_is_what_the_formats_promise(kind, lowest, highest):
    # int8: step / sqrt(12) with a step of about 3.3 to 3.5 sigma / 127; e4m3: 2 to 3 %.
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    assert lowest < quantization_error(weight, kind) < highest


@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 0.02), ("fp8", 0.06)])
def test_the_network_stays_close_and_most_of_it_is_stored_in_8_bits(kind, tolerance):
    dit = random_weights(WanDiT(DIT), 2)
    exact = forward(dit)
    quantize(dit, kind)
    off = distance(forward(dit), exact)
    assert 0 < off < tolerance
    layers = [name for name, layer in dit.named_modules() if isinstance(layer, QuantizedLinear)]
    assert len(layers) == DIT.num_layers * 10
    assert all(layer.startswith("blocks.") for layer in layers)


def test_the_text_encoder_takes_it_too():
    encoder = random_weights(UMT5Encoder(TEXT), 1)
    ids = torch.tensor([[3, 5, 7, 1]])
    with torch.no_grad():
        exact = encoder(ids)
        quantize(encoder, "int8")
        off = distance(encoder(ids), exact)
    assert 0 < off < 0.03
    assert encoder.token_embedding.weight.dtype == torch.float32


def test_products_are_in_the_compute_dtype():
    dit = random_weights(WanDiT(DIT), 2).bfloat16()
    quantize(dit, "int8")
    seen = []
    dit.blocks[0].ffn.up.register_forward_hook(lambda layer, args, out: seen.append(out.dtype))
    forward(dit)
    assert seen == [working_dtype(torch.bfloat16, torch.device("cpu"))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cast_leaves_8_bit_weights_and_scales_alone(kind, dtype):
    dit = random_weights(WanDiT(DIT), 2)
    quantize(dit, kind)
    layer = dit.blocks[0].ffn.up
    stored, scale = layer.weight.clone(), layer.scale.clone()
    dit.to(dtype)
    assert (layer.weight.dtype, layer.scale.dtype) == (stored.dtype, torch.float32)
    assert torch.equal(layer.weight.float(), stored.float())
    assert torch.equal(layer.scale, scale)
    assert layer.bias.dtype == dtype
    assert quantization_of(dit) == kind
    with pytest.raises(WanError, match="quantise once"):
        quantize(dit, "int8")
    dit.to("meta", torch.bfloat16)
    assert layer.weight.is_meta
    assert (layer.weight.dtype, layer.bias.dtype) == (stored.dtype, torch.bfloat16)


def test_98_percent_of_the_5b_is_quantised():
    dit = build_on_meta(lambda: WanDiT(DiTConfig()))
    total = sum(p.numel() for p in dit.parameters())
    quantize(dit, "int8")
    stored = {name: p for name, p in dit.named_parameters() if p.dtype == torch.int8}
    assert sum(p.numel() for p in stored.values()) / total > 0.975


@pytest.mark.parametrize("kind", KINDS)
def test_loading_quantised_is_loading_and_then_quantising(tmp_path, kind, monkeypatch):
    dit = random_weights(WanDiT(DIT), 2)
    save_component(dit.state_dict(), tmp_path, "transformer")
    monkeypatch.setattr("wan.weights.load.GROUP_BYTES", 3000)  # several groups, some of one tensor
    loaded = load_module(
        lambda: WanDiT(DIT), open_checkpoint(tmp_path), "transformer", quantize=kind
    )
    quantize(dit, kind)
    expected, state = dit.state_dict(), loaded.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[n].float(), expected[n].float()) for n in expected)
    # Views of a mapped file are aligned otherwise, and kernels may add up in another order.
    torch.testing.assert_close(forward(loaded), forward(dit), rtol=1e-5, atol=1e-5)


def test_a_lora_is_merged_before_its_weights_are_quantised(tmp_path):
    dit = random_weights(WanDiT(DIT), 2)
    save_component(dit.state_dict(), tmp_path, "transformer")
    generator = torch.Generator().manual_seed(0)
    width, name = DIT.width, "blocks.1.self_attention.query.weight"
    pair = LowRank(torch.randn(2, width, generator=generator), torch.randn(width, 2), 0.5)
    lora = LoRA("style.safetensors", "test", 2, {name: pair}, {})
    loaded = load_module(
        lambda: WanDiT(DIT),
        open_checkpoint(tmp_path),
        "transformer",
        quantize="int8",
        changes=LoRAMerge(lora, 0.7).changes,
    )
    merge_lora(dit, lora, 0.7)
    quantize(dit, "int8")
    expected = dit.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in loaded.state_dict().items())
    with pytest.raises(WanError, match="quantised: merge a LoRA before"):
        merge_lora(loaded, lora)


def test_what_cannot_be_quantised_is_refused():
    dit = random_weights(WanDiT(DIT), 2)
    with pytest.raises(WanError, match="quantize=int4: choose none, int8, fp8"):
        quantize(dit, "int4")
    quantize(dit, "int8")
    with pytest.raises(WanError, match="quantise once"):
        quantize(dit, "fp8")


def test_exactly_the_named_weights_are_quantised():
    dit = random_weights(WanDiT(DIT), 2)
    before = dit.state_dict()
    names = {name for name in before if is_quantized_weight(name)}
    assert all(0 < quantization_error(before[name], "int8") < 0.02 for name in names)
    quantize(dit, "int8")
    assert names == {n for n, p in dit.named_parameters() if p.dtype == torch.int8}
