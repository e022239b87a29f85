"""Where the teacher's sampling goes from given noise: what a student can learn by regression.

Source: DMD, arXiv:2311.18828, section 3.3 (pairs of noise and result); CausVid, arXiv:2412.07772,
section 4.3 (states on the way as well, one per step of the student).

N trajectories, K noise levels of the student; latents (C, T, H, W).
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.progress import Steps
from train.parallel import ALONE, Ranks
from train.tensor_cache import TensorStore, key_of, only_writer, open_to_extend, open_to_read
from wan.sampling.noise import draw_noise, sample_generators
from wan.sampling.samplers import build_stepper, sample
from wan.sampling.schedule import NUM_TIMESTEPS, Schedule, euler_schedule, shift_sigmas

NAME = "trajectories"
SAMPLER = "unipc"
NOISE_SEED = 2_000_000  # of trajectory 0: clips that people and evaluations sample start elsewhere
PER_FILE = 32  # trajectories, or a few more; a killed run loses at most those of one file

Velocity = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Trajectories:
    """Teacher samples: the state at each of K noise levels, falling, and the end.

    States are the inputs of the network, which with UniPC are predicted and not corrected.
    They stay on the disk, (K + 1, C, T, H, W) float16 each: for a large model they are more than
    memory holds.
    """

    captions: list[str]
    keys: list[str]
    store: TensorStore
    levels: list[float]

    def batch(self, numbers: Sequence[int], sigmas: Tensor) -> tuple[Tensor, Tensor, list[str]]:
        """State of each chosen trajectory at one of the levels, (B,), its end and its caption.

        States and ends are (B, C, T, H, W) float32.
        """
        paths = torch.stack([self.store.read(self.keys[i]) for i in numbers])  # (B, K + 1, ...)
        steps = (torch.tensor(self.levels) - sigmas.cpu()[:, None]).abs().argmin(1)
        states = paths[torch.arange(len(numbers)), steps]
        return states.float(), paths[:, -1].float(), [self.captions[i] for i in numbers]


def grid_through(levels: Sequence[float], steps: int, shift: float) -> Schedule:
    """A grid of about `steps` steps that visits every one of the levels.

    Grid points nearer to a level than half a step, before the shift, are moved onto it.
    """
    grid = euler_schedule(steps, shift).sigmas[:-1].tolist()
    points, fixed = (shift_sigmas(torch.tensor(s), 1 / shift).tolist() for s in (grid, levels))
    kept = [
        sigma
        for sigma, point in zip(grid, points, strict=True)
        if all(abs(point - other) > 0.5 / steps for other in fixed)
    ]
    sigmas = torch.tensor([*sorted({*kept, *levels}, reverse=True), 0.0])
    description = f"{len(sigmas) - 1} steps, shift {shift:g}, through the student's levels"
    return Schedule(sigmas[:-1] * NUM_TIMESTEPS, sigmas, description)


def follow_flow(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    sigmas: Tensor,
    steps: int,
    shift: float,
) -> Tensor:
    """Where the flow leads from states that have noise levels of their own: (B, C, T, H, W).

    The idea is pi-Flow's, arXiv:2510.14974: a teacher shown the student's own states, which its
    trajectories may never pass through, corrects what is wrong in them.

    Args:
        velocity: (x, noise levels (B,)) -> the velocity of a teacher.
        sigmas: (B,), the levels of the states x.
        steps: UniPC steps of each sample, of equal length before the shift.
        shift: of the levels between, as in `wan.sampling.schedule.shift_sigmas`.
    """
    x, groups = x.clone(), []
    for level in sigmas.unique().tolist():
        start = shift_sigmas(torch.tensor(level), 1 / shift)
        grid = shift_sigmas(start * torch.linspace(1, 0, steps + 1), shift)
        schedule = Schedule(grid[:-1] * NUM_TIMESTEPS, grid, f"{steps} steps from {level:g}")
        groups.append((sigmas == level, schedule, build_stepper(SAMPLER, schedule)))
    for i in range(steps):
        now = torch.empty_like(sigmas)
        for members, schedule, _ in groups:
            now[members] = schedule.sigmas[i].to(now)
        found = velocity(x, now)  # all samples at once: processes run equally many forwards
        for members, _, stepper in groups:
            x[members] = stepper.step(i, x[members], found[members])
    return x


@torch.no_grad()
def sample_trajectories(
    teacher: Callable[[list[str]], Velocity],
    captions: Sequence[str],
    shape: Sequence[int],
    levels: Sequence[float],
    schedule: Schedule,
    folder: Path,
    identity: Sequence[Any],
    ranks: Ranks = ALONE,
    chunk: int = 32,
) -> Trajectories:
    """Sample the teacher once per caption; what is in `folder` already is not sampled again.

    Runs may share a folder: one that starts while another samples there waits for it.

    Args:
        teacher: captions -> their guided velocity.
        shape: (C, T, H, W) of one sample.
        levels: the student's noise levels, all of them in `schedule`; the first is its start.
        identity: all else that the teacher's velocity depends on, as plain data; part of the keys.
        ranks: the processes that sample together, each its share; the main one writes.
        chunk: captions that a process samples at once.
    """
    grid = schedule.sigmas.tolist()
    keys = [
        key_of(*identity, SAMPLER, grid, list(levels), list(shape), seed, text)
        for seed, text in enumerate(captions, NOISE_SEED)
    ]

    def states_of(numbers: list[int]) -> Tensor:
        seeds = [NOISE_SEED + i for i in numbers]
        x = draw_noise(shape, sample_generators(seeds, len(numbers))).to(ranks.device)
        found = [x] * (schedule.sigmas[0].item() in levels)

        def keep(i: int, timestep: float, sigma: float, x: Tensor) -> None:
            if sigma == 0 or any(abs(sigma - level) < 1e-6 for level in levels):
                found.append(x)

        velocity = teacher([captions[i] for i in numbers])
        sample(velocity, x, build_stepper(SAMPLER, schedule), keep)
        return torch.stack(found, dim=1).half()  # (B, K + 1, C, T, H, W)

    with ExitStack() as stack:
        with ranks.together():
            if ranks.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(only_writer(folder, f".{NAME}.lock", wait=True))
                store = open_to_extend(folder, NAME, verify=True)
        missing = ranks.first(
            [i for i, key in enumerate(keys) if ranks.is_main and key not in store]
        )
        done = len(keys) - len(missing)
        name = "trajectories of the teacher"
        bar = stack.enter_context(Steps(name, len(keys), done, quiet=not ranks.is_main))
        at_once = chunk * ranks.data_size
        per_file = at_once * -(-PER_FILE // at_once)
        for start in range(0, len(missing), per_file):
            numbers = missing[start : start + per_file]
            paths = ranks.spread_tensors(states_of, numbers, chunk)
            with ranks.together():
                if ranks.is_main:
                    tensors = dict(zip((keys[i] for i in numbers), paths.unbind(), strict=True))
                    store.add(tensors, {keys[i]: {"caption": captions[i]} for i in numbers})
            bar.add(len(numbers))
        store = open_to_read(folder, NAME)
        with ranks.together():  # so long nobody else may change what is there
            pass
    return Trajectories(list(captions), keys, store, list(levels))
