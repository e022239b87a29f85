"""The noise levels that a sampler visits, and the timesteps that the model gets there.

Every schedule is made here, and the shift is applied here and nowhere else. It moves a uniform grid
towards high noise; each released model names its own (TI2V-5B 5, T2V-A14B 12, Wan2.1 at 480p 3).
S below is the number of steps.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wan.errors import WanError

NUM_TIMESTEPS = 1000  # the network's clock: timestep = 1000 * sigma
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


def euler_schedule(
    steps: int | None,
    shift: float,
    grid: str = "uniform",
    sigmas: Sequence[float] | None = None,
) -> Schedule:
    """The grid of flow-match Euler, with fractional timesteps.

    Args:
        steps: 1 to 1000; None with `sigmas`.
        shift: see `shift_sigmas`.
        grid: "uniform" runs evenly from 1 towards 0 and is shifted once, as diffusers does with
            sigmas that the caller gives. "diffusers" is what its pipelines do with a number of
            steps: the ends of the table 1, 0.999, .. 0.001 are shifted, even numbers between them
            shifted again. "karras" (arXiv:2206.00364, eq. 5, rho 7), "exponential" and "beta"
            (arXiv:2407.12173, alpha = beta = 0.6) respace the latter between its ends.
        sigmas: falling numbers in (0, 1] to shift, in place of the evenly spaced ones.
    """
    check_grid("euler", grid)
    levels = given_sigmas(sigmas)
    if levels is not None:
        steps = len(levels)
    elif grid == "uniform":
        levels = _grid(1.0, 0.0, steps)
    else:
        # float32, as the table's own numbers are; the grid itself is float64.
        table_ends = shift_sigmas(torch.tensor([1, 1 / NUM_TIMESTEPS]), shift).tolist()
        first, last = (end * NUM_TIMESTEPS for end in table_ends)
        levels = torch.from_numpy(np.linspace(first, last, _check_steps(steps)) / NUM_TIMESTEPS)
    levels = shift_sigmas(levels, shift)
    if grid in RESPACED:
        high, low = levels[0].item(), levels[-1].item()
        levels = RESPACED[grid](high, low, len(levels))
    # The network's timestep is computed from the float32 sigma where diffusers does so.
    timesteps = (levels if grid == "uniform" else levels.float()) * NUM_TIMESTEPS
    spacing = {"uniform": "uniform in sigma", "diffusers": "diffusers grid (shifted twice)"}
    words = spacing.get(grid, f"{grid} grid")
    return _schedule(timesteps, levels, f"{steps} Euler steps, {words}, shift {shift:g}")


def unipc_schedule(
    steps: int | None,
    shift: float,
    grid: str = "diffusers",
    sigmas: Sequence[float] | None = None,
    ends: tuple[float, float] | None = None,
) -> Schedule:
    """The grid of UniPC for Wan, with timesteps cut down to integers.

    Args:
        steps: 1 to 1000; None with `sigmas`.
        shift: see `shift_sigmas`.
        grid: before the shift, "diffusers" runs from 1 towards 0.001 and starts at 1 - 1e-6 so that
            log(1 - sigma) is finite; "official" runs from 0.999, in float32, towards 0. They differ
            as much as two different samplers do: sigmas by up to 4e-3 (50 steps, shift 5). "karras"
            spaces s = sigma / (1 - sigma) between `ends` (arXiv:2206.00364, eq. 5, rho 7) and is
            not shifted; diffusers computes it so.
        sigmas: falling numbers in (0, 1] to shift, in place of the evenly spaced ones.
        ends: highest and lowest s of the grid "karras"; None for `vp_ends`.
    """
    check_grid("unipc", grid)
    levels = given_sigmas(sigmas)
    if grid == "karras":
        spaced = karras_sigmas(*(ends or vp_ends()), _check_steps(len(levels or ()) or steps))
        levels = spaced / (spaced + 1)
    elif levels is not None:
        levels = _below_one(shift_sigmas(levels, shift))
    elif grid == "official":
        start = float(np.float32(1 - 1 / NUM_TIMESTEPS))
        levels = shift_sigmas(_grid(start, 0.0, steps), shift)
    else:
        levels = _below_one(shift_sigmas(_grid(1.0, 1 / NUM_TIMESTEPS, steps), shift))
    timesteps = (levels * NUM_TIMESTEPS).long()
    moved = "" if grid == "karras" else f", shift {shift:g}"
    return _schedule(timesteps, levels, f"{len(levels)} UniPC steps, {grid} grid{moved}")


def dpm_schedule(
    steps: int | None,
    shift: float,
    grid: str = "diffusers",
    sigmas: Sequence[float] | None = None,
) -> Schedule:
    """The grid of DPM-Solver++ for Wan, with timesteps cut down to integers.

    Args:
        steps: 1 to 1000; None with `sigmas`.
        shift: see `shift_sigmas`.
        grid: before the shift, "diffusers" runs from 0.999 towards 0, "official" from 1 towards 0.
        sigmas: falling numbers in (0, 1] to shift, in place of the evenly spaced ones.
    """
    check_grid("dpm++", grid)
    levels = given_sigmas(sigmas)
    if levels is None and grid == "official":
        levels = _grid(1.0, 0.0, steps)
    elif levels is None:  # as 1 minus an even grid from below: an ulp can move a timestep
        rising = 1 - np.linspace(1, 1 / NUM_TIMESTEPS, _check_steps(steps) + 1)
        levels = torch.from_numpy(rising[:0:-1].copy())
    levels = shift_sigmas(levels, shift)
    timesteps = (levels * NUM_TIMESTEPS).long()
    words = f"{len(levels)} DPM-Solver++ steps, {grid} grid, shift {shift:g}"
    return _schedule(timesteps, levels, words)


# The grids of each sampler, the usual one first.
GRIDS: dict[str, tuple[str, ...]] = {
    "unipc": ("diffusers", "official", "karras"),
    "euler": ("uniform", "diffusers", "karras", "exponential", "beta"),
    "dpm++": ("diffusers", "official"),
    "few_step": ("uniform",),
}


def check_grid(sampler: str, grid: str) -> None:
    """Refuse a grid that a sampler does not have."""
    if grid not in GRIDS[sampler]:
        raise WanError(
            f"grid {grid!r} of sampler {sampler}: choose one of {', '.join(GRIDS[sampler])}"
        )


def vp_ends(
    beta_start: float = 0.0001, beta_end: float = 0.02, scaled: bool = False
) -> tuple[float, float]:
    """Highest and lowest sqrt((1 - a) / a) of a variance-preserving diffusion with 1000 betas.

    Args:
        beta_start, beta_end: the first and the last beta.
        scaled: the betas' square roots are evenly spaced, not the betas.
    """
    power = 0.5 if scaled else 1
    betas = torch.linspace(beta_start**power, beta_end**power, NUM_TIMESTEPS) ** (1 / power)
    a = (1 - betas).cumprod(0)
    levels = ((1 - a) / a) ** 0.5
    return levels[-1].item(), levels[0].item()


def karras_sigmas(high: float, low: float, steps: int) -> Tensor:
    """(S,) float64 numbers from high to low, even in the 7th root.

    Source: arXiv:2206.00364, eq. 5.
    """
    first, last = high ** (1 / 7), low ** (1 / 7)
    return torch.from_numpy((first + np.linspace(0, 1, steps) * (last - first)) ** 7)


def exponential_sigmas(high: float, low: float, steps: int) -> Tensor:
    """(S,) float64 numbers from high to low, even in the logarithm."""
    return torch.from_numpy(np.exp(np.linspace(math.log(high), math.log(low), steps)))


def beta_sigmas(high: float, low: float, steps: int) -> Tensor:
    """(S,) float64 numbers from high to low: quantiles of Beta(0.6, 0.6), dense at both ends.

    Source: arXiv:2407.12173.
    """
    places = [beta_quantile(1 - p, 0.6) for p in np.linspace(0, 1, steps)]
    return torch.tensor([low + place * (high - low) for place in places], dtype=torch.float64)


RESPACED: dict[str, Callable[[float, float, int], Tensor]] = {
    "karras": karras_sigmas,
    "exponential": exponential_sigmas,
    "beta": beta_sigmas,
}


def beta_quantile(p: float, a: float) -> float:
    """The x in [0, 1] below which a share p of the Beta(a, a) distribution lies, to 1e-15.

    Bisection on the distribution function, the power series of which converges at x <= 1/2
    (DLMF 8.17.7): I_x(a, a) = x^a / (a B(a, a)) * 2F1(a, 1 - a; a + 1; x).
    """
    if p > 0.5:
        return 1 - beta_quantile(1 - p, a)
    scale = math.exp(math.lgamma(2 * a) - 2 * math.lgamma(a)) / a

    def share_below(x: float) -> float:
        term, total = 1.0, 1.0
        for n in range(200):
            term *= (a + n) * (1 - a + n) / ((a + 1 + n) * (n + 1)) * x
            total += term
            if term < 1e-17 * total:
                break
        return scale * x**a * total

    low, high = 0.0, 0.5
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if share_below(middle) < p else (low, middle)
    return (low + high) / 2 if p > 0 else 0.0


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


def given_sigmas(sigmas: Sequence[float] | None) -> Tensor | None:
    """A caller's noise levels as (S,) float64; None if there are none.

    Raises:
        WanError: they are not falling numbers in (0, 1].
    """
    if sigmas is None:
        return None
    levels = torch.tensor([float(s) for s in sigmas], dtype=torch.float64)
    if len(levels) == 0 or bool((levels.diff() >= 0).any()) or not 0 < levels[-1] <= levels[0] <= 1:
        raise WanError(
            f"sigmas {levels.tolist()}: need falling numbers above 0 and up to 1; the last step to "
            "0 is added"
        )
    return levels


def _below_one(levels: Tensor) -> Tensor:
    """The same noise levels, the first one 1e-6 lower if it is 1."""
    if abs(levels[0].item() - 1) < 1e-6:
        levels[0] -= 1e-6
    return levels


def _check_steps(steps: int | None) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= NUM_TIMESTEPS:
        raise WanError(f"steps={steps!r}: need a whole number from 1 to {NUM_TIMESTEPS}")
    return steps


def _grid(first: float, last: float, steps: int | None) -> Tensor:
    """`steps` evenly spaced float64 numbers from `first` towards `last`, which is left out."""
    # numpy's linspace, because the references use it: an ulp can move a truncated timestep.
    return torch.from_numpy(np.linspace(first, last, _check_steps(steps) + 1)[:-1].copy())


def _schedule(timesteps: Tensor, sigmas: Tensor, description: str) -> Schedule:
    """Append the final sigma 0 and bring both to float32."""
    sigmas = torch.cat([sigmas.float(), torch.zeros(1)])
    return Schedule(timesteps.float(), sigmas, description)
