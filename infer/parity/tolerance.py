"""How far two results are apart, one row of the table per comparison."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

# In bfloat16 nothing is equal; ours may be this much further from the float32 truth than theirs.
BFLOAT16_FACTOR = 1.2


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        rung: which part of the model.
        what: what was compared.
        max_abs: largest absolute difference; for what must be identical, how many things differ.
        relative_rms: rms of the difference over rms of the reference.
        tolerance: the largest `relative_rms` (or, for what must be identical, `max_abs`) that
            passes.
        note: the first tensor that diverges, or what the numbers count.
    """

    rung: str
    what: str
    max_abs: float
    relative_rms: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.relative_rms <= self.tolerance  # false for NaN


def distance(a: Tensor, reference: Tensor) -> tuple[float, float]:
    """Largest absolute and relative rms difference, in float64; infinite where shapes differ."""
    if a.shape != reference.shape:
        return float("inf"), float("inf")
    a, reference = a.detach().double(), reference.detach().double()
    difference = a - reference
    relative = difference.norm() / reference.norm() if difference.any() else difference.norm()
    return float(difference.abs().max()), float(relative)


def compare(
    rung: str, what: str, ours: Tensor, theirs: Tensor, tolerance: float, note: str = ""
) -> Row:
    """Hold one tensor against the reference's."""
    if ours.shape != theirs.shape:
        note = f"shape {tuple(ours.shape)}, reference {tuple(theirs.shape)}"
    return Row(rung, what, *distance(ours, theirs), tolerance, note)


def compare_to_truth(rung: str, what: str, ours: Tensor, theirs: Tensor, truth: Tensor) -> Row:
    """Compare our distance to the float32 result with the reference's own distance to it."""
    theirs_off = distance(theirs, truth)[1]
    note = f"{BFLOAT16_FACTOR} x the reference's own {theirs_off:.1e}"
    return Row(rung, what, *distance(ours, truth), BFLOAT16_FACTOR * theirs_off, note)


def count_differences(rung: str, what: str, differences: int, note: str = "") -> Row:
    """A row for what must be identical: names, ids, integer timesteps."""
    return Row(rung, what, differences, float(differences > 0), 0.0, note)


def compare_points(
    rung: str,
    what: str,
    points: Sequence[tuple[str, Tensor, Tensor]],
    tolerance: float,
) -> Row:
    """One row for several tensors (name, ours, theirs) in the order in which ours came about.

    The row has the worst numbers; its note names the first tensor beyond the tolerance.
    """
    worst_abs, worst_relative = 0.0, 0.0
    diverged = []
    for name, ours, theirs in points:
        max_abs, relative = distance(ours, theirs)
        if not relative <= tolerance:
            diverged.append(f"{name} ({relative:.1e})")
        worst_abs = max_abs if max_abs != max_abs else max(worst_abs, max_abs)
        worst_relative = relative if relative != relative else max(worst_relative, relative)
    note = f"{len(points)} tensors"
    if diverged:
        note = f"first divergence: {diverged[0]}; {len(diverged)} of {len(points)} tensors"
    return Row(rung, what, worst_abs, worst_relative, tolerance, note)


HEADER = ("rung", "compared", "max abs", "rel rms", "tolerance", "")


def table(rows: Iterable[Row]) -> str:
    """The rows as text, with a verdict each."""
    lines: list[tuple[str, ...]] = [HEADER]
    for row in rows:
        numbers = [f"{value:.1e}" if value else "0" for value in (row.max_abs, row.relative_rms)]
        tolerance = f"{row.tolerance:.1e}" if row.tolerance else "equal"
        verdict = "ok" if row.passed else "FAILED"
        lines.append((row.rung, row.what, *numbers, tolerance, f"{verdict}  {row.note}"))
    return aligned(lines, left=(0, 1, 5))


def aligned(lines: Sequence[Sequence[str]], left: Collection[int]) -> str:
    """Cells in columns of equal width: those of `left` begin at the left, the others end right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def place(index: int, cell: str) -> str:
        return cell.ljust(widths[index]) if index in left else cell.rjust(widths[index])

    return "\n".join(
        "  ".join(place(index, cell) for index, cell in enumerate(line)).rstrip() for line in lines
    )
