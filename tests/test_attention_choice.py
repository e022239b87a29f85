"""From a name or a config to what each layer calls at each step."""

import math

import pytest
import torch

from wan.errors import WanError
from wan.models.attention import (
    ATTENTION,
    BACKENDS,
    SPARSE,
    AttentionConfig,
    math_attention,
    network_attention,
    sdpa_attention,
)
from wan.models.attention.choice import SELF_TEST_GRID
from wan.models.attention.factorised import Spatial, Temporal
from wan.models.dit import WanDiT
from wan.models.dit_config import DiTConfig
from wan.sampling.schedule import unipc_schedule

CPU = torch.device("cpu")
GRID = (3, 2, 4)


def tiny_dit(attention="sdpa"):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 16, "num_layers": 2}
    channels = {"in_channels": 4, "out_channels": 4, "text_dim": 5, "freq_dim": 8}
    dit = WanDiT(DiTConfig(**sizes, **channels), attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return dit


def call(dit, latents, **options):
    with torch.no_grad():
        return dit(latents, torch.tensor([500.0]), torch.ones(1, 6, 5), **options)


def noise():
    return torch.randn(1, 4, 3, 4, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [*ATTENTION, "flash", *SPARSE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whatever_runs_on_a_cpu_stands_its_own_test(name, dtype):
    network_attention(name, 2).verify(16, CPU, dtype)


@pytest.mark.parametrize("name", sorted(set(BACKENDS) - {"flash"}))
def test_kernels_for_gpus_are_refused_on_a_cpu_with_an_alternative(name):
    with pytest.raises(WanError, match=f"attention={name}.*sdpa"):
        network_attention(name, 2).verify(16, CPU, torch.float32)


def test_a_kernel_that_computes_something_else_is_refused():
    def without_scale(q, k, v, bias=None):
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v

    with pytest.raises(WanError, match=r"off by .* choose sdpa"):
        network_attention(without_scale, 2).verify(16, CPU, torch.float32)


def test_a_refusal_names_the_function_and_holds_it_to_its_own_tolerance(monkeypatch):
    def rounded(q, k, v, bias=None):
        return 1.05 * math_attention(q, k, v, bias)

    monkeypatch.setitem(BACKENDS, "sage", rounded)
    network_attention("sage", 2).verify(16, CPU, torch.float32)
    monkeypatch.setitem(BACKENDS, "flash", lambda q, k, v: rounded(q, k, v))
    monkeypatch.setitem(ATTENTION, "math", lambda q, k, v, bias=None: rounded(q, k, v, bias))
    for name in ("sage", "spatial"):
        for exact in ("flash", "math"):
            chosen = network_attention(AttentionConfig(name, exact=exact, layers="0"), 2)
            with pytest.raises(WanError, match=f"attention={exact} is off"):
                chosen.verify(16, CPU, torch.float32)


def test_an_attention_to_the_text_that_loses_the_bias_is_refused():
    def without_bias(q, k, v, bias=None):
        return math_attention(q, k, v)

    with pytest.raises(WanError, match=r"off by .* choose sdpa"):
        network_attention(without_bias, 2).verify(16, CPU, torch.float32)


@pytest.mark.parametrize("name", SPARSE)
def test_in_the_self_test_every_sparse_variant_leaves_something_out(name):
    assert network_attention(name, 2).density(SELF_TEST_GRID) < 0.8


def test_sage_is_refused_where_gradients_are_wanted():
    x = torch.zeros(1, 1, 2, 4, requires_grad=True)
    with pytest.raises(WanError, match="no backward pass"):
        BACKENDS["sage"](x, x, x)


@pytest.mark.parametrize("name", [*SPARSE, "flash"])
def test_cross_attention_is_exact_whatever_is_chosen(name):
    assert network_attention(name, 2).cross is sdpa_attention
    assert network_attention(AttentionConfig(name, exact="math"), 2).cross is math_attention
    assert network_attention("math", 2).cross is math_attention


def test_factorised_alternates():
    layers = network_attention("factorised", 4).layers
    assert [layer.sparse for layer in layers] == [Spatial(), Temporal(), Spatial(), Temporal()]
    density = network_attention("factorised", 4).density(GRID)
    assert density == pytest.approx((1 / 3 + 1 / 8) / 2)


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("all", 3, [0, 1, 2]),
        ("2", 4, [2]),
        ("0-1 3", 5, [0, 1, 3]),
        ("0,2-", 5, [0, 2, 3, 4]),
        ("1-9", 3, [1, 2]),
    ],
)
def test_ranges_of_layers_and_steps(text, count, expected):
    for what in ("layers", "steps"):
        used = AttentionConfig(**{what: text}).uses(what, count)
        assert [i for i, use in enumerate(used) if use] == expected


@pytest.mark.parametrize("text", ["", "x", "-1", "1--2", "all 1", "1;2"])
def test_ranges_that_cannot_be_read_are_refused(text):
    with pytest.raises(WanError, match=r"attention\.steps="):
        AttentionConfig(steps=text)


@pytest.mark.parametrize("text", ["3", "3-", "2-1"])
def test_ranges_that_name_nothing_are_refused(text):
    with pytest.raises(WanError, match="none of the 3 layers"):
        network_attention(AttentionConfig("spatial", layers=text), 3)


def test_density_counts_layers_and_steps():
    config = AttentionConfig("spatial", layers="1-", steps="1-")
    attention = network_attention(config, 4)
    of_layers = (1 + 3 * (1 / 3)) / 4
    assert attention.density(GRID, num_steps=3) == pytest.approx((1 + 2 * of_layers) / 3)
    assert attention.exact_timesteps([1000.0, 757.0, 522.0]) == {1000.0}
    assert network_attention("spatial", 4).exact_timesteps([1000.0]) == frozenset()


def test_steps_at_one_timestep_are_not_told_apart():
    timesteps = unipc_schedule(100, 12.0).timesteps.tolist()
    assert timesteps[0] == timesteps[1]
    for steps in ("1-", "0"):
        chosen = network_attention(AttentionConfig("spatial", steps=steps), 4)
        with pytest.raises(
            WanError, match=r"attention\.steps=.*of 100 steps several.*timestep 999"
        ):
            chosen.exact_timesteps(timesteps)
    for steps, count in (("2-", 1), ("0-1", 98), ("all", 0)):
        chosen = network_attention(AttentionConfig("spatial", steps=steps), 4)
        assert len(chosen.exact_timesteps(timesteps)) == count


def test_a_config_says_what_is_not_as_usual():
    config = AttentionConfig("sliding_tile", window=[1, 3, 3], steps="1-")
    assert str(config) == "sliding_tile steps=1- window=[1, 3, 3]"


def test_frames_meet_in_the_layers_that_the_variant_leaves_out():
    x = noise()
    changed = x.clone()
    changed[:, :, 2] += 1
    for layers, meet in (("all", False), ("0", True)):
        dit = tiny_dit(AttentionConfig("spatial", layers=layers))
        first, other = (call(dit, latents)[:, :, :2] for latents in (x, changed))
        assert torch.equal(first, other) is not meet


def test_exact_calls_are_those_of_an_exact_network():
    dense, sparse = tiny_dit(), tiny_dit("temporal")
    assert torch.equal(call(sparse, noise(), exact=True), call(dense, noise()))
    assert not torch.allclose(call(sparse, noise()), call(dense, noise()), atol=1e-3)


def test_the_attention_of_a_network_can_be_changed():
    dit, expected = tiny_dit(), tiny_dit("frame_causal")
    dit.set_attention("frame_causal")
    assert torch.equal(call(dit, noise()), call(expected, noise()))
    dit.set_attention(AttentionConfig())
    assert torch.equal(call(dit, noise()), call(tiny_dit(), noise()))


def test_a_function_serves_all_attention():
    seen = []

    def watched(q, k, v, bias=None):
        seen.append(k.shape[2])
        return math_attention(q, k, v, bias)

    call(tiny_dit(watched), noise())
    assert seen == [math.prod(GRID), 6] * 2  # tokens, then text, in both layers


def test_training_reaches_every_weight_through_a_sparse_network():
    dit = tiny_dit(AttentionConfig("sliding_tile", tile=[1, 1, 2], window=[3, 1, 1]))
    dit(noise(), torch.tensor([500.0]), torch.ones(1, 6, 5)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in dit.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "sliding"}, "did you mean 'sliding_tile'"),
        ({"name": "spatial", "exact": "spatial"}, "choose one of sdpa"),
        ({"name": "spatial", "exact": "sage"}, "8-bit"),
        ({"name": "sdpa", "keep": 0.5}, "no option keep"),
        ({"name": "sdpa", "exact": "math"}, "nothing would call it, as attention=sdpa"),
        ({"name": "spatial", "exact": "flash"}, "all layers and steps, and sdpa the text"),
    ],
)
def test_choices_that_do_not_exist_are_refused(settings, message):
    with pytest.raises(WanError, match=message):
        network_attention(AttentionConfig(**settings), 2)


def test_an_exact_one_is_accepted_where_something_calls_it():
    for settings in ({"layers": "0"}, {"steps": "1-"}, {"name": "spatial"}, {"name": "math"}):
        network_attention(AttentionConfig(**settings, exact="math"), 2)
    network_attention(AttentionConfig("flash", exact="flash"), 2)
