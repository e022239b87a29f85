"""Is one set of clips better than another, and does a few-step student match its teacher?

Settings are compared on the same captions by a paired bootstrap: each round draws captions, with
replacement, and takes the same ones for both. All functions are pure.

N captions, D features, R bootstrap rounds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wan.errors import WanError
from wan.miniature.metrics import kernel_distance, kernel_terms

ROUNDS = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def resamples(num: int, rounds: int = ROUNDS, seed: int = 0) -> Tensor:
    """How often each of `num` captions is drawn in each bootstrap round: (R, N) float64.

    The same for the same arguments: using one for two settings is what makes a bootstrap paired.
    """
    drawn = torch.randint(num, (rounds, num), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(rounds, num, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))


def estimate(value: float, rounds: Tensor) -> Estimate:
    """A value with the percentile interval of its bootstrap rounds that have one.

    Raises:
        WanError: there is nothing to estimate from.
    """
    rounds = rounds[rounds.isfinite()]
    if not math.isfinite(value) or not len(rounds):
        raise WanError("no clip shows what is to be measured: there is nothing to estimate")
    tail = (1 - CONFIDENCE) / 2
    low, high = rounds.quantile(torch.tensor([tail, 1 - tail], dtype=rounds.dtype)).tolist()
    return Estimate(value, low, high)


def _means(values: Tensor, counts: Tensor) -> Tensor:
    """Means of values (N,), NaN where a caption has none, weighted by counts (R, N): (R,)."""
    known = values.isfinite().double()
    return counts @ values.double().nan_to_num(0) / (counts @ known)


def mean(values: Tensor) -> Estimate:
    """Mean over captions of (N,) values; NaN where a caption has none."""
    return estimate(float(values.nanmean()), _means(values, resamples(len(values))))


def _compared(one: Tensor, other: Tensor, compare: Callable[[Tensor, Tensor], Tensor]) -> Estimate:
    """Compare the means of two settings over the captions for which both have a number.

    A clip that shows nothing has no number. Its caption is dropped from both settings, so that none
    is scored on easier captions. Sets of captions differ in nothing but their number: the longer
    one is cut.
    """
    num = min(len(one), len(other))
    known = one[:num].isfinite() & other[:num].isfinite()
    one, other = (values[:num].where(known, math.nan) for values in (one, other))
    counts = resamples(num)
    rounds = compare(_means(one, counts), _means(other, counts))
    return estimate(float(compare(one.nanmean(), other.nanmean())), rounds)


def difference(one: Tensor, other: Tensor) -> Estimate:
    """Difference of the means of two settings over the same captions."""
    return _compared(one, other, torch.sub)


def ratio(one: Tensor, other: Tensor) -> Estimate:
    """Ratio of the means of two settings over the same captions."""
    return _compared(one, other, torch.div)


def distance(clips: Tensor, truth: Tensor) -> Estimate:
    """Kernel distance of features (N, D) to those of the same captions' truth."""
    terms = kernel_terms(clips, truth)
    return estimate(float(kernel_distance(terms)), kernel_distance(terms, resamples(len(terms))))


def floor_error(terms: Tensor) -> float:
    """The standard error of the kernel distance of two samples of one law.

    Its U-statistic is degenerate then: the mean over the other sample is zero for every clip, the
    variance is 2 E[h^2] / (N (N - 1)), and a bootstrap's would be too large.
    Source: Serfling, Approximation Theorems of Mathematical Statistics, 1980, section 5.5.2.

    Args:
        terms: (N, N) from `kernel_terms`.
    """
    num = len(terms)
    apart = ~torch.eye(num, dtype=torch.bool)
    return math.sqrt(2 * float(terms[apart].double().square().mean()) / (num * (num - 1)))


# --- is one as good as the other? -----------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A setting's numbers, one per caption and NaN where there is none, in the captions' order.

    Attributes:
        values: "joint", "pair_joint" (captions of two objects), "motion_ratio",
            "saturation_ratio", "residual", and per caption with many seeds "entropy", "cells".
        features, truth: (N, D) of the clips and of the truth of the same captions.
    """

    values: Mapping[str, Tensor]
    features: Tensor
    truth: Tensor


@dataclass(frozen=True)
class Clause:
    """One condition of a match: an estimate and the open range it must lie in.

    `enough` is whether there are captions enough for the interval to mean what it says.
    """

    name: str
    estimate: Estimate
    above: float = -math.inf
    below: float = math.inf
    enough: bool = True

    @property
    def verdict(self) -> str:
        """Whether the whole 95 % interval lies inside ("holds") or outside ("fails"), or "open"."""
        inside = self.above < self.estimate.low and self.estimate.high < self.below
        if inside and self.enough:
            return "holds"
        outside = self.estimate.high <= self.above or self.estimate.low >= self.below
        return "fails" if outside else "open"

    def __str__(self) -> str:
        bounds = [f"> {self.above:.3g}"] if math.isfinite(self.above) else []
        bounds += [f"< {self.below:.3g}"] if math.isfinite(self.below) else []
        return f"{self.verdict:<6} {self.name}: {self.estimate}, must be {' and '.join(bounds)}"


JOINT_MARGIN = 0.02
MIN_CAPTIONS = 100  # for shares: among fewer, two settings may well never differ
RATIO_MARGIN = 0.05
RESIDUAL_LIMIT = 1.1
DISTANCE_MARGIN = 0.1  # of the teacher's distance
# value -> what a reader calls it
RATIOS = {"motion_ratio": "motion ratio", "saturation_ratio": "saturation"}
DIVERSITY = {"entropy": "entropy of what is unsaid", "cells": "cells of the stage in use"}


def match(
    students: Sequence[Measured],
    teacher: Measured,
    floor: Measured,
    baseline: Measured | None = None,
) -> list[Clause]:
    """The conditions under which a student matches its teacher, each with its numbers.

    Joint accuracy at most 2 points lower; kernel distance larger by at most 10 % of the teacher's
    or twice the standard error of the floor's, whichever is more; motion and saturation within 5 %;
    entropy and coverage at least 95 %; residual at most 1.1 times; and, where there is a baseline
    (the teacher at the student's number of steps), joint accuracy above it.

    Args:
        students: of several trainings that differ in nothing but their seed. What is compared is
            their mean, caption by caption. The intervals are over captions, for these trainings:
            how far another training would differ is not in them.
        floor: the truth measured against other draws of the truth.
    Raises:
        WanError: a setting shows nothing to measure one of these by.
    """
    ours, theirs = _mean_of_trainings(students), teacher.values
    clauses = [
        _joint_clause(f"joint, {label}: difference", ours[name], theirs[name], -JOINT_MARGIN)
        for name, label in (("joint", "one object"), ("pair_joint", "two objects"))
        if name in ours and name in theirs
    ]
    clauses.append(_distance_clause(students, teacher, floor))
    for name, label in RATIOS.items():
        span = (1 - RATIO_MARGIN, 1 + RATIO_MARGIN)
        clauses.append(Clause(f"{label}: ratio", ratio(ours[name], theirs[name]), *span))
    for name, label in DIVERSITY.items():
        if name in ours and name in theirs:
            value = ratio(ours[name], theirs[name])
            clauses.append(Clause(f"{label}: ratio", value, 1 - RATIO_MARGIN))
    residual = ratio(ours["residual"], theirs["residual"])
    clauses.append(Clause("temporal residual: ratio", residual, below=RESIDUAL_LIMIT))
    if baseline is not None:
        few = baseline.values["joint"]
        clauses.append(
            _joint_clause("joint above the teacher at as few steps", ours["joint"], few, 0)
        )
    return clauses


def _mean_of_trainings(students: Sequence[Measured]) -> dict[str, Tensor]:
    """Each caption's mean over the trainings; NaN where one of them has no number for it."""
    means = {}
    for name in students[0].values:
        columns = [student.values[name] for student in students]
        num = min(map(len, columns))
        means[name] = torch.stack([column[:num].double() for column in columns]).mean(0)
    return means


def _joint_clause(name: str, one: Tensor, other: Tensor, above: float) -> Clause:
    enough = min(len(one), len(other)) >= MIN_CAPTIONS
    return Clause(name, difference(one, other), above, enough=enough)


def _distance_clause(students: Sequence[Measured], teacher: Measured, floor: Measured) -> Clause:
    num = min(len(one.features) for one in (*students, teacher, floor))
    *trainings, theirs, least = (
        kernel_terms(one.features[:num], one.truth[:num]) for one in (*students, teacher, floor)
    )
    ours = torch.stack(trainings).mean(0)
    margin = max(DISTANCE_MARGIN * float(kernel_distance(theirs)), 2 * floor_error(least))
    terms = ours - theirs
    value = estimate(float(kernel_distance(terms)), kernel_distance(terms, resamples(num)))
    return Clause("distance to the truth: difference", value, below=margin)


def verdict(clauses: Sequence[Clause]) -> str:
    """The clauses together: "match" if every one holds, "no match" if one fails, else "open".

    Open means that the clips are too few to tell.
    """
    verdicts = {clause.verdict for clause in clauses}
    if "fails" in verdicts:
        return "no match"
    return "open" if "open" in verdicts else "match"
