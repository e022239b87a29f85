"""The teacher's trajectories: what is kept of them, once, and by whom."""

import threading
import time

import pytest
import torch

from train.tensor_cache import only_writer
from train.trajectories import NOISE_SEED, follow_flow, grid_through, sample_trajectories
from wan.errors import WanError
from wan.sampling.noise import draw_noise, sample_generators
from wan.sampling.samplers import sample_unipc
from wan.sampling.schedule import few_step_schedule, shift_sigmas

SHAPE, CAPTIONS = (2, 1, 2, 2), ["red", "green", "blue"]
LEVELS = few_step_schedule([1000, 757, 522]).sigmas[:-1].tolist()
GRID = grid_through(LEVELS, 6, shift=3.0)


class Teacher:
    """Velocities that depend on caption, state and time, and a list of what was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, captions):
        self.asked.append(captions)
        size = torch.tensor([float(len(text)) for text in captions])[:, None, None, None, None]
        return lambda x, timestep: x * timestep / 1000 - 0.3 * size


def sample(folder, teacher, captions=CAPTIONS, identity=("a",)):
    return sample_trajectories(teacher, captions, SHAPE, LEVELS, GRID, folder, identity)


def test_a_grid_visits_every_level():
    for steps in (1, 3, 16, 50):
        sigmas = grid_through(LEVELS, steps, shift=5.0).sigmas
        assert (sigmas.diff() < 0).all()
        assert sigmas[-1] == 0
        assert all((sigmas - level).abs().min() < 1e-7 for level in LEVELS)


def test_a_grid_keeps_the_pace_of_its_shift():
    for steps, shift in ((16, 3.0), (24, 5.0), (24, 1.0), (50, 8.0)):
        sigmas = grid_through(LEVELS, steps, shift).sigmas
        pace = steps * shift_sigmas(sigmas, 1 / shift).diff().abs()  # in steps of the plain grid
        assert pace.min() >= 0.5
        assert pace.max() <= 1.51
        assert len(sigmas) == steps + 1


def test_states_and_ends_are_those_of_unipc(tmp_path):
    trajectories = sample(tmp_path, Teacher())
    noise = draw_noise(SHAPE, sample_generators([NOISE_SEED + i for i in range(3)], 3))
    seen = {1.0: noise}
    end = sample_unipc(
        Teacher()(CAPTIONS), noise, GRID, lambda i, t, sigma, x: seen.update({sigma: x})
    )
    for level in LEVELS:
        states, ends, captions = trajectories.batch([2, 0, 1], torch.full((3,), level))
        (expected,) = (x for sigma, x in seen.items() if abs(sigma - level) < 1e-6)
        torch.testing.assert_close(states, expected[[2, 0, 1]], rtol=1e-3, atol=1e-3)  # float16
        torch.testing.assert_close(ends, end[[2, 0, 1]], rtol=1e-3, atol=1e-3)
        assert captions == ["blue", "red", "green"]


def test_states_are_found_by_their_level_in_any_order(tmp_path):
    trajectories = sample(tmp_path, Teacher())
    mixed, _, _ = trajectories.batch([0, 1, 2], torch.tensor([LEVELS[2], LEVELS[0], LEVELS[1]]))
    for number, level in enumerate((LEVELS[2], LEVELS[0], LEVELS[1])):
        alone, _, _ = trajectories.batch([number], torch.tensor([level]))
        assert torch.equal(mixed[number], alone[0])


def test_the_flow_from_levels_of_their_own_ends_where_it_must():
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(2, 3, 2, 1, 2, 2, generator=generator)
    sigmas = torch.tensor([0.9, 0.64, 0.3])

    def straight(x, now):
        assert (now <= sigmas + 1e-6).all()
        return (x - target) / now[:, None, None, None, None]  # all data are one clip: exact

    for steps in (1, 5):
        torch.testing.assert_close(follow_flow(straight, x, sigmas, steps, 5.0), target)

    def spread(x, now):
        s = now[:, None, None, None, None]
        variance = (1 - s) ** 2 * 0.25 + s**2  # the data are N(0, 1/2^2)
        return (s - 0.25 * (1 - s)) / variance * x

    # The flow of a Gaussian keeps x / deviation.
    s = sigmas[:, None, None, None, None]
    exact = 0.5 * x / ((1 - s) ** 2 * 0.25 + s**2).sqrt()
    rough, fine = (
        (follow_flow(spread, x, sigmas, steps, 1.0) - exact).norm() / exact.norm()
        for steps in (5, 20)
    )
    assert rough < 0.05
    assert fine < rough / 8  # of second order: 16


def test_only_what_is_missing_is_sampled(tmp_path):
    first, more, other = Teacher(), Teacher(), Teacher()
    sample(tmp_path, first)
    extended = sample(tmp_path, more, [*CAPTIONS, "cyan"])
    sample(tmp_path, other, identity=("b",))
    assert (first.asked, more.asked, other.asked) == ([CAPTIONS], [["cyan"]], [CAPTIONS])
    at_once = sample(tmp_path / "at_once", Teacher(), [*CAPTIONS, "cyan"])
    assert extended.keys == at_once.keys
    for key in extended.keys:
        assert torch.equal(extended.store.read(key), at_once.store.read(key))


def test_a_run_waits_for_another_that_samples_in_its_folder(tmp_path, capsys):
    teacher = Teacher()
    thread = threading.Thread(target=sample, args=(tmp_path, teacher))
    with only_writer(tmp_path, ".trajectories.lock"):
        with (
            pytest.raises(WanError, match="another process"),
            only_writer(tmp_path, ".trajectories.lock"),
        ):
            pass
        thread.start()
        time.sleep(0.3)
        assert teacher.asked == []
    thread.join(timeout=30)
    assert teacher.asked == [CAPTIONS]
    assert "waiting" in capsys.readouterr().err
