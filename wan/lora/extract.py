"""Extract a LoRA from two checkpoints: the difference between a trained model and its base.

The matrix of rank r that is closest to D = student - base, (out, in), keeps its r largest singular
values (Eckart and Young, 1936): up @ down with up = U sqrt(S) and down = sqrt(S) V'. The factors
come from the eigenvectors of the smaller Gram matrix. It squares the singular values, but float64
still resolves 1e-8 of the largest one, which is finer than float32 factors.

Only one tensor of each checkpoint is in memory at a time, beside the factors.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wan.errors import WanError
from wan.lora.merge import FILE_PREFIXES, pair_tensors
from wan.weights.checkpoint import Checkpoint, StoredTensor
from wan.weights.keys import released_name
from wan.weights.load import match_names
from wan.weights.names import grouped
from wan.weights.safetensors_file import read_bytes
from wan.weights.scaled import read_scale, restored

# The suffix of a whole difference in a LoRA file, by the last part of the official name. The names
# of diffusers have no form for modulation tables.
DIFF_SUFFIXES = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}


@dataclass(frozen=True)
class LayerChange:
    """How much of one changed parameter a LoRA keeps.

    Attributes:
        rank: rank of the pair; 0 if the file has no pair for this parameter.
        energy: sum of squares of the change.
        lost: sum of squares of the change minus what the file stores.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    energy: float
    lost: float

    @property
    def residual(self) -> float:
        """Share of the energy that is lost: 1 - (sum of kept s^2) / (sum of all s^2)."""
        return self.lost / self.energy


@dataclass
class ExtractedLoRA:
    """The tensors of a LoRA file by their names, and how much of each change they keep."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    changes: list[LayerChange] = field(default_factory=list)
    num_equal: int = 0  # parameters that are equal in both checkpoints

    @property
    def left_out(self) -> list[LayerChange]:
        """Changed parameters for which the file stores nothing."""
        return [change for change in self.changes if change.lost == change.energy]

    @property
    def residual(self) -> float:
        """Share of the energy of all changes together that is lost."""
        return sum(c.lost for c in self.changes) / sum(c.energy for c in self.changes)


@torch.no_grad()
def extract_lora(
    student: Checkpoint,
    base: Checkpoint,
    rank: int,
    *,
    diffs: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> ExtractedLoRA:
    """The LoRA that comes closest to `student` when merged into `base` at strength 1.

    Every changed weight matrix, the patch embedding's kernel among them, gets a pair. No alpha is
    written, which readers take as alpha = rank.

    Args:
        rank: largest rank of a pair; a matrix with a smaller side is kept in full.
        diffs: keep changed biases, norms and modulation tables as whole differences. The names are
            then the official ones after `diffusion_model.`; else diffusers' after `transformer.`.
        dtype: dtype of the stored tensors.
        device: device that computes the factors; it must support float64.
        on_progress: called as (parameters done, number of parameters).
    Raises:
        WanError: the checkpoints are of different networks, are equal, or differ by NaN or
            infinity; or the rank is below 1.
    """
    if rank < 1:
        raise WanError(f"rank={rank}: must be at least 1")
    both = list(paired(student, base))
    found = ExtractedLoRA()
    for done, (name, ours, theirs) in enumerate(both):
        if on_progress is not None:
            on_progress(done, len(both))
        delta = read_stored(ours).to(device, torch.float64) - read_stored(theirs).to(
            device, torch.float64
        )
        energy = float(delta.square().sum())
        if not math.isfinite(energy):
            raise WanError(f"{name}: {student.path} minus {base.path} is not finite")
        if energy == 0:
            found.num_equal += 1
            continue
        layout = "official" if diffs else "diffusers"
        kept, stored = 0, torch.zeros_like(delta)
        if name.endswith(".weight") and delta.ndim > 1:
            down, up = (factor.to(dtype) for factor in low_rank(delta.flatten(1), rank))
            kept, stored = len(down), (up.double() @ down.double()).view_as(delta)
            down = down.unflatten(1, delta.shape[1:])
            up = up.reshape(up.shape + (1,) * (delta.ndim - 2))
            found.tensors |= pair_tensors(name, down.cpu(), up.cpu(), layout)
        elif diffs:
            value = delta.to(dtype)
            stored = value.double()
            module, _, leaf = released_name("transformer", layout, name).rpartition(".")
            found.tensors[f"{FILE_PREFIXES[layout]}.{module}.{DIFF_SUFFIXES[leaf]}"] = value.cpu()
        lost = float((delta - stored).square().sum())
        found.changes.append(LayerChange(name, tuple(delta.shape), kept, energy, lost))
    if not found.changes:
        raise WanError(
            f"{student.path} and {base.path} hold equal weights: there is nothing to keep"
        )
    if not found.tensors:
        raise WanError(
            f"{student.path}: only biases, norms or tables differ from {base.path}, which pairs "
            "can't hold; keep them as whole differences with diffs=true"
        )
    return found


def low_rank(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of rank r: (down (r, in), up (out, r)) with delta ~ up @ down.

    Both factors have the same norm in each direction, so that their values have similar sizes.

    Args:
        delta: (out, in) float64.
        rank: r is this, or the smaller side of the matrix if that is less.
    """
    if delta.shape[0] > delta.shape[1]:
        down, up = low_rank(delta.T, rank)
        return up.T, down.T
    directions = torch.linalg.eigh(delta @ delta.T).eigenvectors  # ascending
    up = directions[:, -rank:].flip(1)  # (out, r) orthonormal
    down = up.T @ delta
    size = down.norm(dim=1).clamp(min=torch.finfo(delta.dtype).tiny).sqrt()
    return down / size[:, None], up * size


def paired(
    student: Checkpoint, base: Checkpoint
) -> Iterator[tuple[str, StoredTensor, StoredTensor]]:
    """Yield (our name, the student's tensor, the base's tensor); their layouts may differ."""
    ours, theirs = (match_names(checkpoint, "transformer") for checkpoint in (student, base))
    problems = []
    for here, names, other in ((student, ours, theirs), (base, theirs, ours)):
        alone = names.unexpected + [n for n in names.stored if n not in other.stored]
        if alone:
            problems.append(f"only in {here.path}: {grouped(alone)}")
    shapes = {
        name: f"{tensor.entry.shape} and {theirs.stored[name].entry.shape}"
        for name, tensor in ours.stored.items()
        if name in theirs.stored and tensor.entry.shape != theirs.stored[name].entry.shape
    }
    if shapes:
        problems.append(f"of other shapes: {grouped(shapes, shapes)}")
    if problems:
        raise WanError(f"two checkpoints of different networks: {'; '.join(problems)}")
    for name, tensor in ours.stored.items():
        yield name, tensor, theirs.stored[name]


def read_stored(stored: StoredTensor) -> Tensor:
    """Read a tensor into its own memory: pages of a mapped file would stay in memory longer."""
    tensor = torch.empty(stored.entry.shape, dtype=stored.entry.dtype)
    with stored.file.open() as file:
        read_bytes(file, tensor, stored.entry.start)
    if stored.scale is None:
        return tensor
    return restored(tensor, read_scale(stored.scale), torch.float32)
