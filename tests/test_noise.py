"""Noise belongs to a seed: not to a batch, a device or a step order."""

import numpy as np
import pytest
import torch

from wan.errors import WanError
from wan.sampling.noise import MAX_SEED, draw_noise, sample_generators

SHAPE = (3, 5, 4, 6)  # C, T, H, W


def test_fastvideo_golden_numbers():
    """Seed 1024 at 121 x 704 x 1280: the start and two re-noisings, drawn frame first.

    FastVideo draws the re-noise in bfloat16, which is the same stream rounded.
    """
    generators = sample_generators(1024, 1)
    start, first, second = (
        draw_noise((48, 31, 44, 80), generators, frame_first=True)[0].transpose(0, 1)  # (T,C,H,W)
        for _ in range(3)
    )
    flat = start.flatten()
    assert flat[:4].tolist() == pytest.approx(
        [-1.1619741, 1.3112772, 0.1507265, 2.2698405], abs=1e-6
    )
    assert start[1, 0, 0, :2].tolist() == pytest.approx([-0.5112767, 0.6420824], abs=1e-6)
    assert flat[-2:].tolist() == pytest.approx([0.8949853, 0.4148110], abs=1e-6)
    flat = first.bfloat16().flatten()
    assert flat[:4].tolist() == [0.330078125, -0.7109375, 0.1533203125, -2.15625]
    assert flat[-2:].tolist() == [-0.431640625, -0.6484375]
    flat = second.bfloat16().flatten()
    assert flat[:4].tolist() == [0.640625, 2.3125, 0.734375, 0.5]
    assert flat[-2:].tolist() == [-0.6953125, 1.1640625]


def test_one_sample_draws_what_diffusers_draws():
    torch_utils = pytest.importorskip("diffusers.utils.torch_utils")
    reference = torch_utils.randn_tensor((1, *SHAPE), generator=torch.Generator().manual_seed(7))
    assert torch.equal(draw_noise(SHAPE, sample_generators(7, 1)), reference)


def test_a_sample_does_not_depend_on_its_batch():
    together = sample_generators(10, 3)
    batches = [draw_noise(SHAPE, together) for _ in range(2)]
    for j in range(3):
        alone = sample_generators(10 + j, 1)
        for batch in batches:
            assert torch.equal(draw_noise(SHAPE, alone)[0], batch[j])


def test_a_stream_continues_and_does_not_touch_the_global_one():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    generators = sample_generators(3, 1)
    assert not torch.equal(draw_noise(SHAPE, generators), draw_noise(SHAPE, generators))
    assert torch.equal(torch.get_rng_state(), before)


def test_frame_first_is_the_same_stream_in_another_order():
    ours = draw_noise(SHAPE, sample_generators(3, 2))
    theirs = draw_noise(SHAPE, sample_generators(3, 2), frame_first=True)
    assert theirs.shape == ours.shape == (2, *SHAPE)
    assert theirs.is_contiguous()
    assert torch.equal(theirs.transpose(1, 2).flatten(1), ours.flatten(1))


def test_noise_is_float32_on_the_cpu_whatever_the_defaults_are():
    generators = sample_generators(3, 1)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            noise = draw_noise(SHAPE, generators)
    finally:
        torch.set_default_dtype(torch.float32)
    assert noise.dtype == torch.float32
    assert torch.equal(noise, draw_noise(SHAPE, sample_generators(3, 1)))


def test_a_list_of_seeds_names_each_sample():
    noise = draw_noise(SHAPE, sample_generators([5, 9], 2))
    assert torch.equal(noise[1:], draw_noise(SHAPE, sample_generators(9, 1)))


@pytest.mark.parametrize("seed", [-1, -2, MAX_SEED + 1, 2**70, 1.5, "abc", True, [1, "x"]])
def test_illegal_seeds_are_refused(seed):
    with pytest.raises(WanError, match=r"whole number from 0|one per video"):
        sample_generators(seed, 2 if isinstance(seed, list) else 1)


def test_seeds_that_run_past_the_end_and_wrong_counts_are_refused():
    with pytest.raises(WanError, match=str(MAX_SEED + 1)):
        sample_generators(MAX_SEED, 2)
    with pytest.raises(WanError, match="3 seeds for 2 videos"):
        sample_generators([1, 2, 3], 2)


@pytest.mark.parametrize("seed", [2**32, 2**40 + 624, 2**63 + 5, MAX_SEED])
def test_a_seed_of_64_bits_is_taken_and_its_equal_named(seed):
    with pytest.warns(UserWarning, match=f"the noise is that of seed {seed % 2**32}$"):
        (large,) = sample_generators(seed, 1)
    assert large.initial_seed() == seed
    same = sample_generators(np.int64(seed % 2**32), 1)
    assert torch.equal(draw_noise(SHAPE, [large]), draw_noise(SHAPE, same))


class CudaGenerator:
    """Stands in for torch.Generator('cuda') where there is no GPU."""

    device = torch.device("cuda")


def test_a_generator_of_another_device_draws_there_and_at_once_for_all_samples(monkeypatch):
    """Numbers of a GPU depend on the shape of the draw: other libraries draw a batch at once."""

    class OnDevice:
        device = torch.device("meta")

    draws = []

    def noting(shape, **options):
        draws.append((tuple(shape), options["device"].type, options["generator"]))
        return torch.zeros(shape)

    monkeypatch.setattr(torch, "randn", noting)
    one, other = OnDevice(), OnDevice()
    assert draw_noise((3, 2, 4, 4), [one, one]).shape == (2, 3, 2, 4, 4)
    assert draws == [((2, 3, 2, 4, 4), "meta", one)]
    draws.clear()
    assert draw_noise((3, 2, 4, 4), [one, other]).shape == (2, 3, 2, 4, 4)
    assert draws == [((3, 2, 4, 4), "meta", one), ((3, 2, 4, 4), "meta", other)]
