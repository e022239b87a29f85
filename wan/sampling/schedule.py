"""The noise levels that a sampler visits, and the timesteps that the model gets there.

Every schedule is made here, and the shift is applied here and nowhere else. It moves a uniform grid
towards high noise; each released model names its own (TI2V-5B 5, T2V-A14B 12, Wan2.1 at 480p 3).
S below is the number of steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wan.errors import WanError

NUM_TIMESTEPS = 1000  # the network's clock: timestep = 1000 * sigma
UNIPC_GRIDS = ("diffusers", "official")
FEW_STEP_TIMESTEPS = (1000, 757, 522)  # what the released three-step students were trained on
FEW_STEP_TABLE_SHIFT = 8.0


@dataclass(frozen=True, eq=False)
class Schedule:
    """The timesteps and noise levels of one sampling run, from noise to clean.

    Attributes:
        timesteps: (S,) float32 in [0, 1000], the network's input in each step.
        sigmas: (S + 1,) float32, the noise level before each step and, last, 0.
        description: where the numbers come from, in words.
    """

    timesteps: Tensor
    sigmas: Tensor
    description: str

    def __post_init__(self) -> None:
        steps = len(self.timesteps)
        if steps < 1 or self.timesteps.ndim != 1 or self.sigmas.shape != (steps + 1,):
            raise WanError(
                f"schedule with timesteps {tuple(self.timesteps.shape)} and sigmas "
                f"{tuple(self.sigmas.shape)}: need (S,) and (S + 1,), S at least 1"
            )
        sigmas = self.sigmas.tolist()
        if not (sigmas[0] <= 1 and sigmas[-1] == 0):  # also refuses NaN
            raise WanError(f"sigmas run from {sigmas[0]} to {sigmas[-1]}: need <= 1 down to 0")
        if not bool((self.sigmas.diff() < 0).all()):
            raise WanError(f"sigmas {sigmas} must fall from step to step: no two may be equal")

    def __len__(self) -> int:
        return len(self.timesteps)


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Move a schedule towards high noise: s' = k s / (1 + (k - 1) s).

    Source: SD3, arXiv:2403.03206, resolution-dependent shifting.

    Args:
        sigmas: any shape, noise levels in [0, 1].
        shift: k > 0; 1 changes nothing.

    Raises:
        WanError: the shift is not a positive number.
    """
    if not (shift > 0 and math.isfinite(shift)):
        raise WanError(f"shift={shift}: must be > 0 (1 leaves the schedule unchanged)")
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def euler_schedule(steps: int, shift: float) -> Schedule:
    """A uniform grid from 1 to 0, shifted once; fractional timesteps.

    diffusers' FlowMatchEuler gives the same schedule from the unshifted grid. With its defaults it
    shifts twice, which is not reproduced here.
    """
    sigmas = shift_sigmas(_grid(1.0, 0.0, steps), shift)
    timesteps = sigmas * NUM_TIMESTEPS
    return _schedule(timesteps, sigmas, f"{steps} Euler steps, uniform in sigma, shift {shift:g}")


def unipc_schedule(steps: int, shift: float, grid: str = "diffusers") -> Schedule:
    """The grid of UniPC for Wan, with timesteps cut down to integers.

    Args:
        steps: 1 to 1000.
        shift: see `shift_sigmas`.
        grid: before the shift, "diffusers" runs from 1 towards 0.001 and starts at 1 - 1e-6 so that
            log(1 - sigma) is finite; "official" runs from 0.999 towards 0. They differ as much as
            two different samplers do: sigmas by up to 4e-3 (50 steps, shift 5).
    """
    if grid not in UNIPC_GRIDS:
        raise WanError(f"UniPC grid {grid!r}: choose one of {', '.join(UNIPC_GRIDS)}")
    if grid == "official":
        sigmas = shift_sigmas(_grid(1 - 1 / NUM_TIMESTEPS, 0.0, steps), shift)
    else:
        sigmas = shift_sigmas(_grid(1.0, 1 / NUM_TIMESTEPS, steps), shift)
        sigmas[0] -= 1e-6
    timesteps = (sigmas * NUM_TIMESTEPS).long()
    return _schedule(timesteps, sigmas, f"{steps} UniPC steps, {grid} grid, shift {shift:g}")


def few_step_schedule(
    timesteps: Sequence[float] = FEW_STEP_TIMESTEPS,
    table_shift: float = FEW_STEP_TABLE_SHIFT,
    warp: bool = False,
) -> Schedule:
    """The schedule of a distilled student, from the timesteps that it was trained on.

    The network gets the listed numbers unchanged. A step's sigma is the nearest entry of the table
    1, 0.999, ... 0.001 after a shift by `table_shift`. An entry's timestep is 1000 times its sigma
    whatever the shift, so the shift only decides the rounding (6e-4 at most between shifts 3, 5 and
    8). Source: FastVideo `denoising.py`, whose sampler uses shift 8.

    Args:
        timesteps: falling numbers in (0, 1000].
        table_shift: shift of the table.
        warp: read q as the position 1000 - q in the table, so that a uniform list becomes a
            shifted one (self-forcing students; 750 with shift 5 becomes 937.5). The model is then
            given the looked-up value.

    Raises:
        WanError: an empty, rising or repeating list, or numbers outside (0, 1000].
    """
    wanted = torch.tensor([float(t) for t in timesteps], dtype=torch.float32)
    given = ", ".join(f"{t:g}" for t in timesteps)
    falling = bool((wanted.diff() < 0).all())
    if len(wanted) == 0 or not falling or not 0 < wanted[-1] <= wanted[0] <= NUM_TIMESTEPS:
        raise WanError(
            f"timesteps [{given}]: need a falling list of numbers above 0 and up to "
            f"{NUM_TIMESTEPS}, such as [1000, 757, 522]"
        )
    counts = torch.arange(NUM_TIMESTEPS, 0, -1, dtype=torch.float32)
    table = shift_sigmas(counts / NUM_TIMESTEPS, table_shift)  # (1000,) falling
    if warp:
        if bool((wanted != wanted.round()).any()):
            raise WanError(f"timesteps [{given}]: warping reads them as table positions, integers")
        wanted = table[NUM_TIMESTEPS - wanted.long()] * NUM_TIMESTEPS
    distance = (table[None, :] * NUM_TIMESTEPS - wanted[:, None]).abs()  # (S, 1000)
    sigmas = table[distance.argmin(dim=1)]
    words = (
        f"timesteps [{given}]{' warped' if warp else ''}, sigma table with shift {table_shift:g}"
    )
    return _schedule(wanted, sigmas, words)


def _grid(first: float, last: float, steps: int) -> Tensor:
    """`steps` evenly spaced float64 numbers from `first` towards `last`, which is left out."""
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= NUM_TIMESTEPS:
        raise WanError(f"steps={steps!r}: need a whole number from 1 to {NUM_TIMESTEPS}")
    # numpy's linspace, because the references use it: an ulp can move a truncated timestep.
    return torch.from_numpy(np.linspace(first, last, steps + 1)[:-1].copy())


def _schedule(timesteps: Tensor, sigmas: Tensor, description: str) -> Schedule:
    """Append the final sigma 0 and bring both to float32."""
    sigmas = torch.cat([sigmas.float(), torch.zeros(1)])
    return Schedule(timesteps.float(), sigmas, description)
