"""Sparse variants against the formula under their masks, on grids that tiles do not divide."""

import math
import warnings

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from wan.errors import WanError
from wan.models.attention import SPARSE, build_attention, math_attention, pattern, top_k
from wan.models.attention.pattern import Pattern, attend_blocks, block_mask, gathered, remembered
from wan.models.attention.top_k import TopK, as_mask, chosen_blocks, tiling

GRIDS = [(5, 4, 4), (3, 5, 7), (1, 3, 2), (4, 1, 9)]
VARIANTS = [
    ("spatial", {}),
    ("temporal", {}),
    ("frame_causal", {}),
    ("sliding_tile", {"tile": [2, 2, 3], "window": [1, 3, 3]}),
    ("sliding_tile", {"tile": [1, 2, 2], "window": [3, 3, 1]}),
    ("sliding_tile", {}),
    ("top_k", {"tile": [2, 2, 3], "keep": 0.3}),
    ("top_k", {"tile": [1, 2, 1], "keep": 1.0}),
]
IDS = [f"{name}-{'x'.join(map(str, o.get('tile', [])))}" for name, o in VARIANTS]


def inputs(grid, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 2, 3, math.prod(grid), 8)
    return [x.requires_grad_() for x in torch.randn(shape, generator=generator).unbind()]


def under_mask(q, k, v, mask):
    return math_attention(q, k, v, torch.zeros(()).where(mask, -math.inf))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)
def test_variants_equal_the_formula_under_their_mask_with_gradients(name, options, grid):
    attention, (q, k, v) = build_attention(name, **options), inputs(grid)
    out = attention(q, k, v, grid)
    expected = under_mask(q, k, v, attention.mask(q, k, grid))
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    ours = torch.autograd.grad((out * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=0)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("name", "options"), VARIANTS[:6], ids=IDS[:6])
def test_density_is_the_mean_of_the_mask_and_what_is_computed(name, options, grid, monkeypatch):
    attention, (q, k, v) = build_attention(name, **options), inputs(grid)
    mask, scores = attention.mask(q, k, grid), []

    def counted(q, k, v):
        scores.append(q.shape[:-1].numel() * k.shape[-2] / 6)  # of 2 samples with 3 heads
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr(pattern, "sdpa_attention", counted)
    attention(q, k, v, grid)
    assert attention.density(grid) == pytest.approx(float(mask.double().mean()))
    assert sum(scores) == pytest.approx(int(mask.sum()))


def test_density_of_chosen_tiles_is_that_of_the_mask_where_tiles_divide_the_grid():
    grid, attention = (4, 6, 6), TopK((2, 2, 3), keep=0.3)
    q, k, _ = inputs(grid)
    assert attention.density(grid) == pytest.approx(4 / 12)  # 0.3 x 12 tiles, rounded up
    assert float(attention.mask(q, k, grid).double().mean()) == pytest.approx(4 / 12)
    assert TopK(keep=0.2).num_kept(15) == 3


@pytest.mark.parametrize("grid", [(4, 6, 6), (3, 5, 7)])
def test_each_tile_sees_the_tiles_with_the_largest_product_of_means(grid):
    attention = TopK((2, 2, 3), keep=0.3)
    q, k, _ = inputs(grid)
    places = torch.cartesian_prod(*map(torch.arange, grid)) // torch.tensor(attention.tile)
    tiles, tile_of = places.unique(dim=0, return_inverse=True)  # (M, 3), (L,)
    members = torch.nn.functional.one_hot(tile_of).float()  # (L, M)
    means = [members.T @ x[1, 2] / members.sum(0)[:, None] for x in (q, k)]  # of real tokens only
    kept = (means[0] @ means[1].T).topk(attention.num_kept(len(tiles))).indices
    chosen = torch.zeros(len(tiles), len(tiles), dtype=torch.bool).scatter(1, kept, True)
    assert torch.equal(attention.mask(q, k, grid)[1, 2], chosen[tile_of][:, tile_of])


def test_all_tiles_are_dense_attention():
    grid, attention = (3, 5, 7), TopK((2, 2, 3), keep=1.0)
    q, k, v = inputs(grid)
    torch.testing.assert_close(attention(q, k, v, grid), math_attention(q, k, v))


def test_later_frames_change_no_earlier_one():
    grid, attention = (3, 2, 2), build_attention("frame_causal")
    q, k, v = inputs(grid)
    changed = [x.detach().clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, 8:] += 1
    before, after = attention(q, k, v, grid), attention(*changed, grid)
    assert torch.equal(before[:, :, :8], after[:, :, :8])
    assert not torch.equal(before[:, :, 8:], after[:, :, 8:])


def test_windows_move_inwards_at_the_border():
    """Every tile sees as many: the first of five sees the three first."""
    mask = build_attention("sliding_tile", tile=(1, 1, 1), window=(1, 1, 3)).mask(
        torch.zeros(1), torch.zeros(1), (1, 1, 5)
    )
    assert mask.int().tolist() == [
        *([1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0]),
        *([0, 0, 1, 1, 1], [0, 0, 1, 1, 1]),
    ]


def test_tiles_are_of_frames_rows_and_columns():
    attention = build_attention("sliding_tile", tile=(1, 1, 2), window=(1, 1, 1))
    mask = attention.mask(torch.zeros(1), torch.zeros(1), (1, 2, 4))
    pair = torch.ones(2, 2, dtype=torch.bool)  # two neighbours in a row see each other
    assert torch.equal(mask, torch.block_diag(pair, pair, pair, pair))


def test_what_inference_prepared_serves_training():
    grid, attention = (2, 3, 3), build_attention("sliding_tile", tile=(1, 1, 2))
    q, k, v = inputs(grid)
    with torch.inference_mode():
        attention(q, k, v, grid)
    attention(q, k, v, grid).sum().backward()
    assert v.grad is not None


@pytest.mark.parametrize(("name", "kept"), [("sliding_tile", gathered), ("top_k", tiling)])
def test_compiled_callers_make_windows_and_tiles_once(name, kept):
    grid, attention = (2, 3, 5), build_attention(name, tile=(1, 2, 2))
    q, k, v = (x.detach() for x in inputs(grid))
    expected = attention(q, k, v, grid)
    kept.cache_clear()
    compiled = torch.compile(attention, backend="eager", dynamic=False)
    for _ in range(2):
        torch.testing.assert_close(compiled(q, k, v, grid), expected)
    assert kept.cache_info().misses == 1
    assert kept.cache_info().hits > 0


def test_compiled_callers_make_block_masks_once(monkeypatch):
    made, create = [], torch.nn.attention.flex_attention.create_block_mask

    def counted(*args, **options):
        made.append(args)
        return create(*args, **options)

    monkeypatch.setattr("torch.nn.attention.flex_attention.create_block_mask", counted)
    grid, attention = (2, 3, 5), build_attention("sliding_tile", tile=(1, 2, 2))
    q, k, v = (x.detach() for x in inputs(grid))

    def on_gpu(q, k, v):
        mask = remembered(block_mask, attention, grid, q.device)
        return attend_blocks(q, k, v, *mask, kernel=lambda q, k, v, block_mask: q + 1)

    block_mask.cache_clear()
    compiled = torch.compile(on_gpu, backend="eager", dynamic=False)
    for _ in range(2):
        assert torch.equal(compiled(q, k, v), q + 1)
    assert len(made) == 1


@pytest.mark.parametrize(("name", "options"), VARIANTS[2:5], ids=IDS[2:5])
def test_block_masks_give_the_same(name, options, monkeypatch):
    """What runs on GPUs, with FlexAttention uncompiled; on CPUs it has no backward pass."""
    monkeypatch.setattr(pattern, "flex_kernel", lambda: flex_attention)
    grid, attention = (3, 5, 7), build_attention(name, **options)
    q, k, v = (x.detach() for x in inputs(grid))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow
        out = attend_blocks(q, k, v, *block_mask(attention, grid, q.device))
    torch.testing.assert_close(out, attention(q, k, v, grid), atol=2e-6, rtol=0)


def test_chosen_blocks_give_the_same(monkeypatch):
    monkeypatch.setattr(top_k, "flex_kernel", lambda: flex_attention)
    monkeypatch.setattr(top_k, "FLEX_BLOCK", 12)
    grid, attention = (3, 5, 7), TopK((2, 2, 3), keep=0.3)
    q, k, v = (x.detach() for x in inputs(grid))
    expected = attention(q, k, v, grid)
    monkeypatch.setattr(TopK, "_attend_gathered", TopK._attend_blocks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(attention(q, k, v, grid), expected, atol=2e-6, rtol=0)
    chosen, tiles = attention.choose(q, k, grid), tiling(grid, attention.tile, q.device)
    blocks = chosen_blocks(chosen, tiles.real.flatten(), 12).to_dense()
    assert torch.equal(blocks.bool(), as_mask(chosen))


def test_gpu_tiles_must_fill_the_kernels_blocks():
    attention = TopK((2, 2, 3))
    x = torch.zeros(1, 1, 2, 12, 8)
    with pytest.raises(WanError, match="multiple of 128"):
        attention._attend_blocks(x, x, x, None, None)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sliding_tile", {"tile": [2, 2]}, "three numbers"),
        ("sliding_tile", {"tile": [2, 2, 0]}, "three numbers"),
        ("sliding_tile", {"window": [1, 2, 3]}, "odd numbers"),
        ("sliding_tile", {"keep": 0.5}, "no option keep; it takes tile, window"),
        ("top_k", {"keep": 0.0}, "above 0"),
        ("top_k", {"keep": 1.5}, "up to 1"),
        ("spatial", {"tile": [1, 1, 1]}, "takes none"),
    ],
)
def test_options_that_mean_nothing_are_refused(name, options, message):
    with pytest.raises(WanError, match=message):
        build_attention(name, **options)


def test_what_alternates_is_asked_for_layer_by_layer():
    grid, attention = (3, 2, 4), build_attention("factorised")
    assert attention.of_layer(1).density(grid) == pytest.approx(1 / 8)
    x = torch.zeros(1, 1, 24, 8)
    for ask in (
        attention.density,
        lambda g: attention.mask(x, x, g),
        lambda g: attention(x, x, x, g),
    ):
        with pytest.raises(WanError, match=r"factorised is spatial or temporal .* of_layer"):
            ask(grid)


def test_every_pattern_by_name_is_tested_here():
    assert {name for name, _ in VARIANTS} | {"factorised"} == set(SPARSE)
    assert issubclass(SPARSE["factorised"], Pattern)
