"""Every attention against the formula, at the released models' head dimension and odd lengths."""

import importlib.util
import math

import pytest
import torch

from wan.errors import WanError
from wan.models.attention import ATTENTION, BACKENDS, build_attention, math_attention
from wan.models.attention.choice import QUANTISED_TOLERANCE, TOLERANCE

HEAD_DIM = 128
GRID = (3, 5, 7)  # tokens; no tile divides it
PACKAGES = {"flash3": "flash_attn_interface", "sage": "sageattention"}
# On a GPU the product of a tile of `top_k` must be a multiple of 128.
SPARSE = [
    ("spatial", {}),
    ("temporal", {}),
    ("frame_causal", {}),
    ("sliding_tile", {"tile": [2, 2, 3], "window": [1, 3, 3]}),
    ("top_k", {"tile": [4, 4, 8], "keep": 0.5}),
]


def inputs(queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = (queries, keys, keys)
    drawn = (torch.randn(2, 3, length, HEAD_DIM, generator=generator) for length in lengths)
    return [x.to(device, dtype) for x in drawn]


def assert_near(found: torch.Tensor, q, k, v, bias=None, tolerance: float | None = None) -> None:
    """Against the formula in float32 on the CPU, by the relative rms that `verify` allows."""
    assert found.dtype == q.dtype
    assert found.device.type == q.device.type
    exact = math_attention(*(x.float().cpu() for x in (q, k, v)), bias)
    error = float((found.float().cpu() - exact).norm() / exact.norm())
    assert error < (TOLERANCE[q.dtype] if tolerance is None else tolerance)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ATTENTION)
def test_exact_functions_equal_the_formula(device, name, dtype, with_bias):
    q, k, v = inputs(257, 131, dtype, device)
    bias = torch.linspace(-3, 3, 131).to(dtype).float() if with_bias else None
    out = build_attention(name)(q, k, v, None if bias is None else bias.to(device))
    assert_near(out, q, k, v, bias)


@pytest.mark.parametrize("name", BACKENDS)
def test_single_kernels_equal_the_formula_or_say_what_is_missing(device, name):
    q, k, v = inputs(257, 257, torch.bfloat16, device)
    package = PACKAGES.get(name)
    missing = None
    if device.type == "cpu":
        missing = None if name == "flash" else "runs on CUDA GPUs|PyTorch has no such kernel"
    elif package is not None and importlib.util.find_spec(package) is None:
        missing = f"the package {package} is not installed"
    if missing is not None:
        with pytest.raises(WanError, match=missing):
            build_attention(name)(q, k, v)
        return
    tolerance = QUANTISED_TOLERANCE if name == "sage" else None
    assert_near(build_attention(name)(q, k, v), q, k, v, tolerance=tolerance)


@pytest.mark.parametrize(("name", "options"), SPARSE, ids=[name for name, _ in SPARSE])
def test_sparse_variants_equal_the_formula_under_their_mask(device, name, options):
    length = math.prod(GRID)
    q, k, v = inputs(length, length, torch.bfloat16, device)
    attention = build_attention(name, **options)
    mask = attention.mask(q, k, GRID).cpu()
    assert not mask.all() or name == "top_k"  # whose tiles reach beyond this grid
    assert_near(attention(q, k, v, GRID), q, k, v, torch.zeros(()).where(mask, -math.inf))
