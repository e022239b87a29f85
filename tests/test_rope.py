import pytest
import torch
from reference.rope import rotate

from wan.errors import WanError
from wan.models.rope import apply_rope, axis_channels, rope_table


def test_released_heads_split_into_44_42_42():
    assert axis_channels(128) == (44, 42, 42)


@pytest.mark.parametrize("head_dim", [6, 16, 20, 32, 64, 128])
def test_axes_share_out_all_channels_in_pairs(head_dim):
    channels = axis_channels(head_dim)
    assert sum(channels) == head_dim
    assert all(c > 0 and c % 2 == 0 for c in channels)


@pytest.mark.parametrize("head_dim", [5, 7, 4, 0])
def test_a_head_without_a_pair_per_axis_is_refused(head_dim):
    with pytest.raises(WanError, match=f"head_dim={head_dim}"):
        axis_channels(head_dim)


@pytest.mark.parametrize("grid", [(1, 1, 1), (3, 2, 4), (2, 5, 3)])
def test_equals_the_loop_over_complex_numbers(grid):
    length = grid[0] * grid[1] * grid[2]
    x = torch.randn(length, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cos, sin = rope_table(grid, 20)
    turned = apply_rope(x.view(1, 1, length, 20), cos.double(), sin.double())
    # The tables are rounded to float32.
    torch.testing.assert_close(turned[0, 0], rotate(x, grid), atol=1e-6, rtol=0)


def test_scores_depend_on_offsets_only():
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 32, generator=generator)
    grid = (5, 6, 7)
    cos, sin = rope_table(grid, 32)
    length = cos.shape[0]
    queries = apply_rope(query.expand(1, 1, length, 32), cos, sin)[0, 0].unflatten(0, grid)
    keys = apply_rope(key.expand(1, 1, length, 32), cos, sin)[0, 0].unflatten(0, grid)
    offset = (2, 1, 3)
    scores = [
        queries[t, h, w] @ keys[t + offset[0], h + offset[1], w + offset[2]]
        for t in range(3)
        for h in range(5)
        for w in range(4)
    ]
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(60), atol=2e-5, rtol=0)


def test_rotation_keeps_lengths_and_the_first_token():
    x = torch.randn(2, 3, 24, 16, generator=torch.Generator().manual_seed(2))
    turned = apply_rope(x, *rope_table((2, 3, 4), 16))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])


def test_tables_come_from_float64():
    cos, sin = rope_table((1024, 1, 1), 128)
    exponent = torch.arange(22, dtype=torch.float64) / 22
    angle = 1023 * 10000.0**-exponent
    assert cos.dtype == sin.dtype == torch.float32
    # One rounding to float32; frequencies in float32 would be off by 3.7e-5 here.
    torch.testing.assert_close(cos[1023, :22].double(), angle.cos(), atol=6e-8, rtol=0)


def test_bfloat16_is_rounded_once_at_the_end():
    x = torch.randn(1, 2, 24, 16, generator=torch.Generator().manual_seed(3)).bfloat16()
    cos, sin = rope_table((2, 3, 4), 16)
    turned = apply_rope(x, cos, sin)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, apply_rope(x.float(), cos, sin).bfloat16())
