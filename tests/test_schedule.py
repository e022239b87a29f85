"""Noise levels and timesteps, against published numbers and against diffusers."""

import math

import numpy as np
import pytest
import torch

from wan.errors import WanError
from wan.sampling.schedule import (
    Schedule,
    beta_quantile,
    euler_schedule,
    few_step_schedule,
    shift_sigmas,
    unipc_schedule,
)

# diffusers' UniPC with Wan's settings, 50 steps, flow_shift 5.
UNIPC_50 = [
    *(999, 995, 991, 987, 982, 978, 973, 968, 963, 957, 952, 946, 940, 934, 927, 921, 914, 906),
    *(899, 890, 882, 873, 864, 854, 844, 833, 822, 810, 797, 783, 769, 754, 738, 720, 702, 682),
    *(661, 638, 613, 586, 556, 524, 489, 450, 407, 359, 305, 244, 175, 96),
]


def test_unipc_50_steps_are_the_known_list():
    schedule = unipc_schedule(50, shift=5.0)
    assert schedule.timesteps.tolist() == UNIPC_50
    assert schedule.sigmas[0].item() == torch.tensor(1 - 1e-6).item()
    assert schedule.sigmas[-1] == 0


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0, 16.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 20, 40, 50, 100])
def test_unipc_grid_equals_diffusers(steps, shift):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift
    )
    scheduler.set_timesteps(steps)
    schedule = unipc_schedule(steps, shift)
    assert torch.equal(schedule.timesteps.long(), scheduler.timesteps)
    assert torch.equal(schedule.sigmas, scheduler.sigmas)


def test_official_unipc_grid_differs_from_diffusers_as_measured():
    ours, official = unipc_schedule(50, 5.0), unipc_schedule(50, 5.0, grid="official")
    assert official.sigmas[0].item() == pytest.approx(0.9998, abs=2e-7)
    assert official.timesteps[15:19].tolist() == [920, 913, 906, 898]
    assert official.timesteps[-2:].tolist() == [172, 92]
    assert int((ours.timesteps != official.timesteps).sum()) == 27
    assert (ours.sigmas - official.sigmas).abs().max().item() == pytest.approx(4.3e-3, abs=5e-5)


# The official code's own numbers, computed from its formulas: 0.999 in float32, then the shift.
@pytest.mark.parametrize(
    ("steps", "shift", "timesteps"),
    [
        (4, 1.0, [999, 749, 499, 249]),
        (9, 1.0, [999, 888, 777, 666, 555, 444, 333, 222, 111]),
        (3, 5.0, [999, 908, 713]),
    ],
)
def test_official_grid_starts_at_0_999_in_float32(steps, shift, timesteps):
    """In float64 it would start below: 9 steps at shift 1 gave 665 for 666."""
    assert unipc_schedule(steps, shift, "official").timesteps.tolist() == timesteps


@pytest.mark.parametrize("a", [0.6, 1.0, 2.0])
def test_beta_quantiles_are_those_of_the_distribution(a):
    """Against the share below the quantile, by the midpoint rule in u = x^a."""
    for p in (0.05, 0.25, 0.5):
        edges = np.linspace(0, beta_quantile(p, a) ** a, 100_001)
        u = (edges[1:] + edges[:-1]) / 2
        density = (1 - u ** (1 / a)) ** (a - 1) * math.gamma(2 * a) / math.gamma(a) ** 2 / a
        assert density.sum() * edges[1] == pytest.approx(p, abs=1e-9)
        assert beta_quantile(1 - p, a) == pytest.approx(1 - beta_quantile(p, a), abs=1e-12)
    assert (beta_quantile(0, a), beta_quantile(1, a)) == (0, 1)


def test_respaced_grids_keep_their_ends():
    plain = euler_schedule(9, 3.0, "diffusers")
    for grid in ("karras", "exponential", "beta"):
        schedule = euler_schedule(9, 3.0, grid)
        torch.testing.assert_close(schedule.sigmas[[0, -2]], plain.sigmas[[0, -2]])
        assert not torch.equal(schedule.sigmas, plain.sigmas)


@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
@pytest.mark.parametrize("steps", [1, 4, 33])
def test_euler_grid_equals_diffusers_given_unshifted_sigmas(steps, shift):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1].tolist())
    schedule = euler_schedule(steps, shift)
    # diffusers shifts in float32, we in float64: one unit in the last place of 1 and of 1000.
    torch.testing.assert_close(schedule.sigmas, scheduler.sigmas, rtol=0, atol=1.2e-7)
    torch.testing.assert_close(schedule.timesteps, scheduler.timesteps, rtol=0, atol=1.3e-4)


def test_euler_shift_is_applied_once():
    expected = [1, 0.9375, 0.8333333, 0.625, 0]
    assert euler_schedule(4, 5.0).sigmas.tolist() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("table_shift", "sigmas"),
    [
        (8.0, [1.0, 0.75675672, 0.52173913]),
        (5.0, [1.0, 0.75709784, 0.52156174]),
        (3.0, [1.0, 0.75668973, 0.52216429]),
    ],
)
def test_few_step_sigmas_are_the_nearest_table_entries(table_shift, sigmas):
    schedule = few_step_schedule([1000, 757, 522], table_shift)
    assert schedule.timesteps.tolist() == [1000, 757, 522]  # the model sees the list itself
    assert schedule.sigmas.tolist() == [*torch.tensor(sigmas).tolist(), 0]


def test_few_step_default_is_the_released_student():
    schedule = few_step_schedule()
    assert schedule.timesteps.tolist() == [1000, 757, 522]
    assert schedule.sigmas[1].item() == torch.tensor(0.75675672).item()


@pytest.mark.parametrize(
    ("table_shift", "warped"), [(5.0, [1000, 939.672, 845.207]), (8.0, [1000, 961.42, 897.29])]
)
def test_warped_lists_follow_the_shift(table_shift, warped):
    schedule = few_step_schedule([1000, 757, 522], table_shift, warp=True)
    assert schedule.timesteps.tolist() == pytest.approx(warped, abs=5e-3)
    assert (schedule.sigmas[:-1] * 1000).tolist() == pytest.approx(warped, abs=5e-3)


@pytest.mark.parametrize("shift", [0.3, 1.0, 5.0])
def test_shift_fixes_the_ends_keeps_the_order_and_inverts(shift):
    sigmas = torch.linspace(1, 0, 21, dtype=torch.float64)
    shifted = shift_sigmas(sigmas, shift)
    assert shifted[0].item() == pytest.approx(1, abs=1e-15)
    assert shifted[-1] == 0
    assert bool((shifted.diff() < 0).all())
    torch.testing.assert_close(shift_sigmas(shifted, 1 / shift), sigmas)


def test_description_names_what_was_used():
    assert few_step_schedule([900, 300]).description == (
        "timesteps [900, 300], sigma table with shift 8"
    )
    assert unipc_schedule(7, 5.0).description == "7 UniPC steps, diffusers grid, shift 5"


@pytest.mark.parametrize("steps", [0, -1, 1001, True, 2.0, "4"])
def test_illegal_step_counts_are_refused(steps):
    for make in (euler_schedule, unipc_schedule):
        with pytest.raises(WanError, match="need a whole number from 1 to 1000"):
            make(steps, 5.0)


@pytest.mark.parametrize("shift", [0, -1.0, float("nan"), float("inf")])
def test_illegal_shifts_are_refused(shift):
    with pytest.raises(WanError, match="must be > 0"):
        unipc_schedule(4, shift)


@pytest.mark.parametrize(
    "timesteps",
    [
        [],
        [522, 757],
        [757, 757],
        [1001, 500],
        [500, 0],
        [500, -1],
        [float("nan")],
        [900, float("nan")],
    ],
)
def test_illegal_timestep_lists_are_refused(timesteps):
    with pytest.raises(WanError, match="falling list"):
        few_step_schedule(timesteps)


def test_timesteps_that_share_a_table_entry_are_refused():
    with pytest.raises(WanError, match="no two may be equal"):
        few_step_schedule([1000, 999.999])


def test_an_unknown_grid_and_a_bad_schedule_are_refused():
    with pytest.raises(WanError, match="diffusers, official, karras"):
        unipc_schedule(4, 5.0, grid="beta")
    with pytest.raises(WanError, match=r"\(S \+ 1,\)"):
        Schedule(torch.ones(3), torch.tensor([1.0, 0.5, 0.0]), "by hand")
    with pytest.raises(WanError, match="<= 1 down to 0"):
        Schedule(torch.ones(1), torch.tensor([1.0, 0.5]), "by hand")
