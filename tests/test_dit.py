import json
import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from wan.errors import WanError
from wan.models.dit import DiTConfig, PatchEmbedding, WanDiT, timestep_sinusoid
from wan.models.recompute import ATTENTION_KERNELS, CHECKPOINT_BLOCKS

TINY = DiTConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=2,
    ffn_dim=40,
    in_channels=4,
    out_channels=6,
    text_dim=10,
    freq_dim=16,
)
FRAMES = torch.tensor([[0.0, 937.0, 937.0], [0.0, 500.0, 500.0]])  # a clean first frame
TEXT_TOKENS = 5
WEIGHT_BIAS = ("weight", "bias")


def random_dit(seed=0, **options):
    dit = WanDiT(TINY, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            parameter.normal_(std=max(parameter[0].numel(), 4) ** -0.5, generator=generator)
            if name.endswith("norm.weight"):
                parameter.add_(1)
    return dit


def random_inputs(seed=1):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 4, 3, 4, 6, generator=generator)
    context = torch.randn(2, 12, 10, generator=generator)
    context[:, TEXT_TOKENS:] = 0
    return latents, context


def relative_rms(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("settings", "tensors", "numbers"),
    [
        ({}, 825, 4_999_787_712),
        (
            {"num_attention_heads": 12, "ffn_dim": 8960, "in_channels": 16, "out_channels": 16},
            825,
            1_418_996_800,
        ),
        (
            {
                "num_attention_heads": 40,
                "ffn_dim": 13824,
                "num_layers": 40,
                "in_channels": 16,
                "out_channels": 16,
            },
            1095,
            14_288_491_584,
        ),
    ],
    ids=["5B", "1.3B", "14B"],
)
def test_released_sizes_have_the_released_number_of_parameters(settings, tensors, numbers):
    with torch.device("meta"):
        dit = WanDiT(DiTConfig(**settings))
    assert len(dit.state_dict()) == tensors
    assert sum(p.numel() for p in dit.parameters()) == numbers


def test_parameters_carry_the_documented_names():
    names = set(WanDiT(TINY).state_dict())
    block = {name.removeprefix("blocks.1.") for name in names if name.startswith("blocks.1.")}
    attention = {f"{layer}.{p}" for layer in ("query", "key", "value", "out") for p in WEIGHT_BIAS}
    attention |= {"query_norm.weight", "key_norm.weight"}
    expected = {f"{kind}_attention.{name}" for kind in ("self", "cross") for name in attention}
    expected |= {
        f"{layer}.{p}" for layer in ("cross_norm", "ffn.up", "ffn.down") for p in WEIGHT_BIAS
    }
    assert block == expected | {"modulation"}
    layers = ["patch_embedding", "time_modulation", "head.proj"]
    layers += [f"{of}_embedding.{i}_proj" for of in ("time", "text") for i in ("in", "out")]
    outside = {f"{layer}.{p}" for layer in layers for p in WEIGHT_BIAS}
    assert {n for n in names if not n.startswith("blocks.")} == outside | {"head.modulation"}


def test_patch_embedding_is_a_strided_convolution():
    embedding = PatchEmbedding(4, 24, (1, 2, 2))
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(embedding.weight, generator=generator)
    torch.nn.init.normal_(embedding.bias, generator=generator)
    latents = torch.randn(2, 4, 3, 4, 6, generator=generator)
    conv = F.conv3d(latents, embedding.weight, embedding.bias, stride=(1, 2, 2))
    torch.testing.assert_close(embedding(latents), conv.flatten(2).transpose(1, 2))


def test_sinusoid_has_cosines_first_and_divides_by_half_the_width():
    sinusoid = timestep_sinusoid(torch.tensor([937.0]), 256)[0].double()
    frequency = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    expected = torch.cat(((937 * frequency).cos(), (937 * frequency).sin()))
    # float32 angles of up to 1000 radians: 1000 * 2^-24, twice
    torch.testing.assert_close(sinusoid, expected, atol=1.2e-4, rtol=0)


def test_one_timestep_may_be_given_per_video_frame_or_token():
    dit, (latents, context) = random_dit(), random_inputs()
    timestep = torch.tensor([937.0, 12.0])
    expected = dit(latents, timestep, context)
    per_frame = dit(latents, timestep.unsqueeze(1).expand(2, 3), context)
    per_token = dit(latents, timestep.unsqueeze(1).expand(2, 18), context)
    assert expected.shape == (2, 6, 3, 4, 6)
    torch.testing.assert_close(per_frame, expected, atol=5e-6, rtol=0)
    torch.testing.assert_close(per_token, expected, atol=5e-6, rtol=0)


def test_timesteps_per_frame_are_those_of_the_frames_tokens():
    dit, (latents, context) = random_dit(), random_inputs()
    per_frame = dit(latents, FRAMES, context)
    per_token = dit(latents, FRAMES.repeat_interleave(6, dim=1), context)
    torch.testing.assert_close(per_frame, per_token, atol=5e-6, rtol=0)
    assert relative_rms(per_frame, dit(latents, FRAMES[:, 1], context)) > 1e-2


def test_prepared_context_changes_no_bit():
    dit, (latents, context) = random_dit(), random_inputs()
    expected = dit(latents, FRAMES, context)
    assert torch.equal(dit(latents, FRAMES, dit.prepare_context(context)), expected)


@pytest.mark.parametrize("attention", ["sdpa", "math", "sliced"])
@pytest.mark.parametrize("num_tokens", [5, 9, 10, 11, 12])
def test_shared_padding_is_the_same_function(attention, num_tokens):
    dit, (latents, context) = random_dit(attention=attention), random_inputs()
    expected = random_dit()(latents, FRAMES, context)
    assert relative_rms(dit(latents, FRAMES, context, num_tokens), expected) < 2e-6
    cache = dit.prepare_context(context, num_tokens)
    assert relative_rms(dit(latents, FRAMES, cache), expected) < 2e-6


def test_shared_padding_stays_accurate_when_the_bias_is_rounded_to_bfloat16():
    dit, (latents, context) = random_dit(), random_inputs()
    context = torch.cat([context, torch.zeros(2, 500, 10)], dim=1)
    cache = dit.prepare_context(context, TEXT_TOKENS)
    assert cache.bias is not None
    count = float(cache.bias.bfloat16().float()[TEXT_TOKENS:].exp().sum())
    assert abs(count / 507 - 1) < 5e-4
    assert relative_rms(dit(latents, FRAMES, cache), dit(latents, FRAMES, context)) < 2e-6


def test_a_row_that_is_not_padding_cannot_be_shared():
    dit, (_, context) = random_dit(), random_inputs()
    with pytest.raises(WanError, match="not zero"):
        dit.prepare_context(context, TEXT_TOKENS - 1)
    with pytest.raises(WanError, match="12 text tokens"):
        dit.prepare_context(context, 13)


def test_zero_rows_of_the_text_are_attended():
    dit, (latents, context) = random_dit(), random_inputs()
    shorter = dit(latents, FRAMES, context[:, :TEXT_TOKENS])
    assert relative_rms(shorter, dit(latents, FRAMES, context)) > 1e-3


def test_samples_of_a_batch_do_not_touch_each_other():
    dit, (latents, context) = random_dit(), random_inputs()
    together = dit(latents, FRAMES, context)
    alone = dit(latents[1:], FRAMES[1:], context[1:])
    torch.testing.assert_close(together[1:], alone, atol=2e-6, rtol=0)


def to_bfloat16(dit):
    for name, parameter in dit.named_parameters():
        if not any(part in name for part in WanDiT.FLOAT32_PARAMETERS):
            parameter.data = parameter.data.bfloat16()
    return dit


def test_time_tables_and_last_layer_stay_in_float32():
    """As the official code computes them; diffusers keeps time_embedder, tables and norm2 so."""
    kept = {n for n, p in to_bfloat16(random_dit()).named_parameters() if p.dtype == torch.float32}
    assert {re.sub(r"blocks\.\d+\.", "", name) for name in kept} == {
        *(f"time_embedding.{i}_proj.{kind}" for i in ("in", "out") for kind in ("weight", "bias")),
        *("time_modulation.weight", "time_modulation.bias", "modulation", "head.modulation"),
        *("cross_norm.weight", "cross_norm.bias", "head.proj.weight", "head.proj.bias"),
    }


def residual_dtypes(dit, *arguments):
    seen = set()
    for block in dit.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    return dit(*arguments), seen


def test_mixed_weights_keep_a_float32_residual_and_output():
    latents, context = random_inputs()
    expected = random_dit()(latents, FRAMES, context)
    out, seen = residual_dtypes(to_bfloat16(random_dit()), latents, FRAMES, context)
    assert out.dtype == torch.float32
    assert seen == {torch.float32}
    assert relative_rms(out, expected) < 1e-2


def test_autocast_keeps_a_float32_residual_and_output():
    latents, context = random_inputs()
    expected = random_dit()(latents, FRAMES, context)
    with torch.autocast("cpu", torch.bfloat16):
        out, seen = residual_dtypes(random_dit(), latents, FRAMES, context)
    assert out.dtype == torch.float32
    assert seen == {torch.float32}
    assert relative_rms(out, expected) < 1e-2


def test_the_time_path_is_float32_whatever_the_weights():
    dit = random_dit()
    timestep = torch.tensor([937.0])
    expected = dit.time_embedding(timestep_sinusoid(timestep, 16))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dit.time_embedding(timestep_sinusoid(timestep, 16)), expected)
    neighbour = dit.time_embedding(timestep_sinusoid(timestep - 1, 16))  # equal in bfloat16
    assert not torch.equal(neighbour, expected)


def test_gradients_reach_every_parameter_and_the_text():
    dit, (latents, context) = random_dit(), random_inputs()
    context.requires_grad_()
    dit(latents, FRAMES, context, TEXT_TOKENS).square().mean().backward()
    assert [n for n, p in dit.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert context.grad is not None
    assert context.grad[:, :TEXT_TOKENS].any()


class CountKernels(TorchDispatchMode):
    """Counts runs of fused attention."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += any(op is getattr(torch.ops.aten, n).default for n in ATTENTION_KERNELS)
        return op(*args, **(kwargs or {}))


def test_recomputing_blocks_changes_no_gradient():
    latents, context = random_inputs()
    gradients = []
    for checkpoint_blocks in CHECKPOINT_BLOCKS:
        dit = random_dit(checkpoint_blocks=checkpoint_blocks)
        dit(latents, FRAMES, context).square().mean().backward()
        gradients.append([p.grad for p in dit.parameters()])
    assert all(
        torch.equal(a, b) for same in zip(*gradients, strict=True) for a, b in pairwise(same)
    )


def test_kept_attention_is_not_computed_again():
    latents, context = random_inputs()
    calls = {}
    for checkpoint_blocks in ("full", "selective"):
        counter = CountKernels()
        dit = random_dit(checkpoint_blocks=checkpoint_blocks)
        with counter:
            dit(latents, FRAMES, context).square().mean().backward()
        calls[checkpoint_blocks] = counter.count
    forward = 2 * TINY.num_layers  # self- and cross-attention
    assert calls == {"full": 2 * forward, "selective": forward}


def test_an_unknown_way_to_recompute_is_refused():
    with pytest.raises(WanError, match="choose none, full, selective"):
        WanDiT(TINY, checkpoint_blocks="some")


def test_fresh_weights_start_as_the_identity_and_learn():
    dit, (latents, context) = WanDiT(TINY), random_inputs()
    dit.init_weights(torch.Generator().manual_seed(0))
    assert not dit(latents, FRAMES, context).any()
    block_inputs = []
    dit.blocks[0].register_forward_hook(lambda m, i, o: block_inputs.extend((i[0], o)))
    optimizer = torch.optim.SGD(dit.parameters(), lr=0.5)
    losses = []
    for _ in range(12):
        loss = (dit(latents, FRAMES, context)[:, :4] - latents).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert torch.equal(block_inputs[0], block_inputs[1])
    assert losses[-1] < 0.95 * losses[0]
    assert all(p.grad.any() for n, p in dit.named_parameters() if ".out." in n or "down" in n)


def test_fresh_weights_come_from_the_generator_alone():
    first, second = WanDiT(TINY), WanDiT(TINY)
    for seed, dit in enumerate((first, second)):
        torch.manual_seed(seed)
        dit.init_weights(torch.Generator().manual_seed(7))
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latents": torch.zeros(1, 5, 3, 4, 6)}, r"need \(B, 4, T, H, W\)"),
        ({"latents": torch.zeros(1, 4, 3, 5, 6)}, "multiples of"),
        ({"timestep": torch.zeros(1, 4)}, "per latent frame"),
        ({"timestep": torch.zeros(2)}, "per latent frame"),
        ({"timestep": torch.tensor(3.0)}, "per latent frame"),
        ({"context": torch.zeros(1, 12, 11)}, r"need \(B, S, 10\)"),
        ({"latents": torch.zeros(1, 4, 1, 2, 2050)}, "no axis above 1024"),
    ],
)
def test_shapes_the_network_cannot_take_are_refused(arguments, message):
    good = {
        "latents": torch.zeros(1, 4, 3, 4, 6),
        "timestep": torch.zeros(1),
        "context": torch.zeros(1, 12, 10),
    }
    with pytest.raises(WanError, match=message):
        WanDiT(TINY)(**good | arguments)


OFFICIAL_5B = {
    "_class_name": "WanModel",
    "_diffusers_version": "0.33.0",
    "model_type": "ti2v",
    "dim": 3072,
    "eps": 1e-06,
    "ffn_dim": 14336,
    "freq_dim": 256,
    "in_dim": 48,
    "num_heads": 24,
    "num_layers": 30,
    "out_dim": 48,
    "text_len": 512,
}


def test_config_reads_both_released_forms():
    assert DiTConfig.from_json(OFFICIAL_5B) == DiTConfig()
    written = json.loads(json.dumps(TINY.to_json()))
    assert DiTConfig.from_json(written) == TINY
    # What the official code's __init__ takes, spelled out.
    spelled = {"qk_norm": True, "cross_attn_norm": True, "window_size": [-1, -1], "text_dim": 4096}
    assert DiTConfig.from_json(OFFICIAL_5B | spelled) == DiTConfig()
    assert DiTConfig.from_json(written | {"qk_norm": True, "window_size": None}) == TINY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_dim": 1280, "added_kv_proj_dim": 5120}, "image-to-video"),
        ({"vace_layers": [0, 2], "vace_in_channels": 96}, "VACE"),
        ({"_class_name": "WanVACETransformer3DModel"}, "WanVACETransformer3DModel"),
        ({"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
        ({"qk_norm": "rms_norm"}, "qk_norm='rms_norm'"),
        ({"qk_norm": False}, "qk_norm=False"),
        ({"window_size": [8, 8]}, r"window_size=\[8, 8\]"),
        ({"cross_attn_norm": False}, "cross_attn_norm=False"),
        ({"attention_type": "sparse"}, "unknown settings attention_type"),
        ({"patch_size": [1, 2]}, "patch_size"),
        ({"patch_size": [1, 2, 2.5]}, "patch_size"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"rope_max_seq_len": 0}, "rope_max_seq_len=0"),
        ({"ffn_dim": None}, "ffn_dim=None"),
        ({"eps": -1}, "eps=-1"),
    ],
)
def test_config_of_another_network_is_refused_by_name(change, message):
    with pytest.raises(WanError, match=message):
        DiTConfig.from_json(TINY.to_json() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "i2v"}, "image-to-video"),
        ({"model_type": "vace"}, "VACE"),
        ({"model_type": "s2v"}, "s2v"),
        ({"num_heads": 23}, "multiple of num_heads=23"),
        ({"num_heads": 0}, "multiple of num_heads=0"),
    ],
)
def test_official_config_of_another_network_is_refused_by_name(change, message):
    with pytest.raises(WanError, match=message):
        DiTConfig.from_json(OFFICIAL_5B | change)


def test_config_that_lacks_a_size_names_it():
    values = TINY.to_json()
    del values["ffn_dim"]
    with pytest.raises(WanError, match="lacks ffn_dim"):
        DiTConfig.from_json(values)
