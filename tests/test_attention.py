import pytest
import torch
from reference.attention import attend

from wan.errors import WanError
from wan.models.attention import ATTENTION, build_attention


def inputs(dtype=torch.float32, queries=7, keys=5):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, queries, 8, generator=generator).to(dtype)
    k = torch.randn(2, 3, keys, 8, generator=generator).to(dtype)
    v = torch.randn(2, 3, keys, 8, generator=generator).to(dtype)
    return q, k, v


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("name", ATTENTION)
def test_every_variant_equals_the_loop(name, with_bias):
    q, k, v = inputs()
    bias = torch.linspace(-2, 3, 5) if with_bias else None
    out = build_attention(name)(q, k, v, bias)
    torch.testing.assert_close(out, attend(q, k, v, bias), atol=2e-6, rtol=0)


@pytest.mark.parametrize("slice_size", [1, 3, 7, 100])
def test_slices_of_any_size_give_the_same(slice_size):
    q, k, v = inputs()
    out = build_attention("sliced", slice_size=slice_size)(q, k, v)
    torch.testing.assert_close(out, ATTENTION["math"](q, k, v), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ATTENTION)
def test_bfloat16_stays_close_and_keeps_its_dtype(name):
    q, k, v = inputs(torch.bfloat16)
    out = build_attention(name)(q, k, v)
    assert out.dtype == torch.bfloat16
    expected = attend(q.float(), k.float(), v.float())
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=0)  # 2 roundings of 2^-9


@pytest.mark.parametrize("name", ATTENTION)
def test_a_bias_of_log_m_counts_a_key_m_times(name):
    q, k, v = inputs()
    repeated_k, repeated_v = (torch.cat([x, x[:, :, -1:].expand(-1, -1, 9, -1)], 2) for x in (k, v))
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, 10.0]).clamp(min=1).log()
    function = build_attention(name)
    expected = function(q, repeated_k, repeated_v)
    torch.testing.assert_close(function(q, k, v, bias), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ATTENTION)
def test_gradients_reach_every_input(name):
    q, k, v = (x.requires_grad_() for x in inputs())
    build_attention(name)(q, k, v).square().sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in (q, k, v))


def test_an_unknown_name_is_refused_with_the_nearest_known_one():
    with pytest.raises(WanError, match="did you mean 'sdpa'"):
        build_attention("spda")


def test_an_unknown_option_is_refused():
    with pytest.raises(WanError, match="no option slice_size; it takes none"):
        build_attention("sdpa", slice_size=4)
    with pytest.raises(WanError, match="at least 1"):
        build_attention("sliced", slice_size=0)
