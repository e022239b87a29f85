"""What a distillation run costs, before anything is loaded: `python -m train.distill plan=true`.

    print(format_plan(plan(PlanRequest(dit, latent_size=(31, 44, 80), num_gpus=8))))

The counts are those of `wan.runtime.costs`. Three things are assumptions and stand here as
constants or
arguments: the share of the GPU that is not ours, the room that a forward needs while it runs, and
the rate that is reached.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from train.rollout import mean_forwards
from wan.errors import WanError
from wan.models.dit_config import DiTConfig
from wan.runtime.costs import count_parameters, kept_by_block, kept_outside, network_work
from wan.weights.load import short

RECOMPUTE = ("none", "selective", "full")  # of `wan.models.recompute`, the fewest kept bytes last
# CUDA's context, NCCL's buffers and what the allocator cannot join.
RESERVE = 0.08


@dataclass(frozen=True)
class PlanRequest:
    """A run as it is planned; see `configs.distillation` and `configs.parallel`.

    Attributes:
        latent_size: (T, h, w) of the latents.
        text_rows: rows of the text that are attended.
        student_rank, critic_rank: of LoRAs; 0 trains all weights.
        student_density, score_density: share of full self-attention's scores that the student, and
            teacher and critic, compute.
        steps: of the student.
        exits: how each sample's last one is drawn, see `train.rollout.draw_exits`.
        truncate_gradient: whether it runs through a sample's last step only, or through all.
        critic_ratio: critic updates per student update. An iteration is one critic update.
        matching: whether the scores teach the student; if not, an iteration is a student update by
            regression.
        num_pairs, trajectory_steps, trajectory_guidance: of the teacher's trajectories for a
            regression; 0 pairs is none.
        adversarial: whether there is an adversarial term, which is not counted.
        batch_size: clips of all GPUs together.
        bfloat16: matrix products in bfloat16; trained weights, AdamW and the average are float32.
        frozen_bytes: per weight of networks that are not trained.
        checkpoint_blocks: see `wan.models.recompute`.
        shard: None for all GPUs that `replicate` and `sequence` leave.
        other_bytes: what else stays on each GPU, such as a text encoder.
        rate: FLOP/s of a GPU, measured or assumed. FastVideo's run of the 5B reached 285e12.
    """

    dit: DiTConfig
    latent_size: tuple[int, int, int]
    text_rows: int = 512
    student_rank: int = 0
    critic_rank: int = 0
    student_density: float = 1.0
    score_density: float = 1.0
    steps: int = 3
    exits: str = "stratified"
    truncate_gradient: bool = True
    critic_ratio: int = 5
    guidance: bool = True
    matching: bool = True
    num_pairs: int = 0
    trajectory_steps: int = 0
    trajectory_guidance: bool = True
    adversarial: bool = False
    batch_size: int = 8
    bfloat16: bool = True
    frozen_bytes: int = 4
    checkpoint_blocks: str = "full"
    num_gpus: int = 8
    shard: int | None = None
    replicate: int = 1
    sequence: int = 1
    gpu_memory: float = 80e9
    other_bytes: float = 0.0
    rate: float = 285e12
    iterations: int = 3000

    def __post_init__(self) -> None:
        if self.checkpoint_blocks not in RECOMPUTE:
            raise WanError(
                f"checkpoint_blocks={self.checkpoint_blocks}: choose {', '.join(RECOMPUTE)}"
            )
        for name in ("steps", "critic_ratio", "num_gpus", "replicate", "sequence", "iterations"):
            if getattr(self, name) < 1:
                raise WanError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("gpu_memory", "rate"):
            if not getattr(self, name) > 0:
                raise WanError(f"{name}={getattr(self, name)}: must be above 0")
        self.dit.token_grid(self.latent_size)  # refuses other sizes
        if self.num_shards * self.replicate != self.num_gpus:
            raise WanError(
                f"shard={self.shard}, replicate={self.replicate}, sequence={self.sequence}: their "
                f"product must be the number of GPUs, {self.num_gpus}"
            )
        if self.dit.num_attention_heads % self.sequence:
            raise WanError(
                f"sequence={self.sequence}: must divide the {self.dit.num_attention_heads} heads"
            )
        if self.batch_size < 1 or self.batch_size % self.num_groups:
            raise WanError(
                f"batch_size={self.batch_size}: counts the clips of all GPUs and must be a "
                f"multiple of the {self.num_groups} groups that see different ones"
            )

    @property
    def num_groups(self) -> int:
        """Of GPUs that share the tokens of a clip."""
        return self.num_gpus // self.sequence

    @property
    def num_shards(self) -> int:
        """GPUs that hold one copy of the weights."""
        if self.shard is None:
            return self.num_gpus // self.replicate
        return self.shard * self.sequence

    @property
    def chain(self) -> float:
        """Forwards of a sample up to its exit, on average.

        Several GPUs run as far as any of their samples goes: to the end, unless all exit together.
        """
        together = self.num_gpus == 1 or self.exits == "shared" or self.batch_size == 1
        return mean_forwards(self.steps, self.exits) if together else self.steps

    @property
    def student_forwards(self) -> int:
        """Through how many the student's backward pass goes, for a sample that stays to the end."""
        return self.steps if self.matching and not self.truncate_gradient else 1

    @property
    def num_tokens(self) -> int:
        return math.prod(self.dit.token_grid(self.latent_size))


# --- FLOPs ----------------------------------------------------------------------------------------


def iteration_flops(request: PlanRequest) -> dict[str, float]:
    """FLOPs per clip of one iteration: a critic update, and its share of a student update.

    Source of the counts: `train.dmd.Distillation`, without its adversarial term, what it samples
    to show, and saving. Regression starts from a stored state.
    """
    sizes = (request.dit, request.num_tokens, request.text_rows)
    recompute, scores = request.checkpoint_blocks, request.score_density
    student = network_work(*sizes, request.student_rank, recompute, density=request.student_density)
    critic = network_work(*sizes, request.critic_rank, recompute, density=scores)
    teacher = network_work(*sizes, density=scores)
    matching = request.matching
    chain = request.chain
    through = 1 if request.truncate_gradient else chain
    share = 1 / request.critic_ratio if matching else 1.0
    terms = matching * through + bool(request.num_pairs)
    return {
        "student forward (chain)": student.forward * (chain + share * (chain - through)) * matching,
        "student forward (with gradient)": student.forward * share * terms,
        "student backward": student.backward * share * terms,
        "student recomputed": student.recompute * share * terms,
        "critic forward": critic.forward * (1 + share) * matching,
        "critic backward": critic.backward * matching,
        "critic recomputed": critic.recompute * matching,
        "teacher forward": teacher.forward * (1 + request.guidance) * share * matching,
    }


def trajectory_flops(request: PlanRequest) -> float:
    """FLOPs of the teacher's trajectories, sampled once before the first iteration."""
    sizes = (request.dit, request.num_tokens, request.text_rows)
    forward = network_work(*sizes, density=request.score_density).forward
    return (
        forward * (1 + request.trajectory_guidance) * request.trajectory_steps * request.num_pairs
    )


# --- memory ---------------------------------------------------------------------------------------


def activation_bytes(request: PlanRequest, rank: int, forwards: int = 1) -> float:
    """Bytes that the backward pass of one update needs on one GPU.

    Args:
        forwards: through how many of them it goes. A block that is recomputed is there once.
    """
    dit, tokens = request.dit, -(-request.num_tokens // request.sequence)
    c = 2 if request.bfloat16 else 4
    autocast = request.bfloat16 and request.num_gpus == 1
    sizes: dict[str, Any] = {"compute_bytes": c, "rank": rank}
    block = kept_by_block(dit, tokens, request.text_rows, autocast=autocast, **sizes)
    outside = kept_outside(dit, tokens, request.text_rows, **sizes)
    stream = 4.0 * tokens * dit.width
    attention = tokens * (2 * c * dit.width + 8 * dit.num_attention_heads)
    kept, again = {
        "none": (block, 0.0),
        "selective": (stream + attention, block),
        "full": (stream, block),
    }[request.checkpoint_blocks]
    clips = request.batch_size / request.num_groups
    return (forwards * (dit.num_layers * kept + outside) + again) * clips


def workspace_bytes(request: PlanRequest) -> float:
    """Room for what lives only while a layer runs: about a feed-forward layer and two streams.

    Assumed, not measured. Guidance runs both captions as one batch.
    """
    tokens = -(-request.num_tokens // request.sequence)
    c = 2 if request.bfloat16 else 4
    one = tokens * (8 * request.dit.width + 2 * c * request.dit.ffn_dim)
    return float(one * (1 + request.guidance) * request.batch_size / request.num_groups)


def gathered_bytes(request: PlanRequest) -> float:
    """Weights in the dtype of the products, and gradients on their way, of what is at work."""
    counts, c = count_parameters(request.dit), 2 if request.bfloat16 else 4
    if request.num_gpus == 1:  # autocast's copies: of a forward, or of each that is kept whole
        copies = request.student_forwards if request.checkpoint_blocks == "none" else 1
        return float(copies * 2 * counts.total) if request.bfloat16 else 0.0
    outside = counts.total - request.dit.num_layers * counts.block
    return 2.0 * counts.block * c + counts.block * (c + 4) + outside * 4


@dataclass(frozen=True)
class RoleMemory:
    """Bytes of one network on each GPU. Gradients and activations exist during its update only."""

    weights: float
    optimizer: float = 0.0
    average: float = 0.0
    gradients: float = 0.0
    activations: float = 0.0

    @property
    def resident(self) -> float:
        return self.weights + self.optimizer + self.average

    @property
    def of_update(self) -> float:
        return self.gradients + self.activations


def frozen_bytes(request: PlanRequest) -> int:
    counts = count_parameters(request.dit)
    return request.frozen_bytes * (counts.total - counts.float32) + 4 * counts.float32


def trained_memory(request: PlanRequest, rank: int, student: bool) -> RoleMemory:
    """AdamW in float32: weight, gradient, two moments, and of the student an average."""
    counts = count_parameters(request.dit, rank)
    trained = 4 * (counts.pairs if rank else counts.total) / request.num_shards
    base = frozen_bytes(request) / request.num_shards if rank else 0.0
    if not (student or request.matching):
        return RoleMemory(base + trained)  # it is there, and never moves
    return RoleMemory(
        weights=base + trained,
        optimizer=2 * trained,
        average=trained * student,
        gradients=trained,
        activations=activation_bytes(request, rank, request.student_forwards if student else 1),
    )


# --- the plan -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What `estimate` found.

    Attributes:
        parameters: role -> (all, trained).
        flops: per clip and iteration, by part.
        memory: bytes per GPU by role; `workspace` and `gathered` come on top while one runs.
        hours: for all iterations.
        trajectory_hours: before them.
    """

    request: PlanRequest
    parameters: dict[str, tuple[int, int]]
    flops: dict[str, float]
    memory: dict[str, RoleMemory]
    workspace: float
    gathered: float
    hours: float
    trajectory_hours: float

    @property
    def peak(self) -> float:
        """Bytes per GPU in the larger update."""
        resident = sum(role.resident for role in self.memory.values()) + self.request.other_bytes
        update = max(role.of_update for role in self.memory.values())
        return resident + update + self.workspace + self.gathered

    @property
    def usable(self) -> float:
        return self.request.gpu_memory * (1 - RESERVE)

    @property
    def fits(self) -> bool:
        return self.peak <= self.usable


def estimate(request: PlanRequest) -> Plan:
    """The plan, whether it fits or not."""
    ranks = {"student": request.student_rank, "critic": request.critic_rank}
    memory = {
        "student": trained_memory(request, ranks["student"], student=True),
        "teacher": RoleMemory(frozen_bytes(request) / request.num_shards),
        "critic": trained_memory(request, ranks["critic"], student=False),
    }
    parameters = {"teacher": (count_parameters(request.dit).total, 0)}
    for role, rank in ranks.items():
        counts = count_parameters(request.dit, rank)
        parameters[role] = (counts.total + counts.pairs, counts.pairs if rank else counts.total)
    flops = iteration_flops(request)
    per_hour = 3600 * request.rate * request.num_gpus
    return Plan(
        request=request,
        parameters=parameters,
        flops=flops,
        memory=memory,
        workspace=workspace_bytes(request),
        gathered=gathered_bytes(request),
        hours=request.iterations * request.batch_size * sum(flops.values()) / per_hour,
        trajectory_hours=trajectory_flops(request) / per_hour,
    )


def plan(request: PlanRequest) -> Plan:
    """The plan of a run that fits.

    Raises:
        WanError: it does not; the message says by how much, and what would.
    """
    found = estimate(request)
    if found.fits:
        return found
    ways = "; ".join(remedies(request)) or "nothing here: take larger GPUs or smaller clips"
    raise WanError(
        f"{found.peak / 1e9:.1f} GB per GPU at the peak, {found.usable / 1e9:.1f} of "
        f"{request.gpu_memory / 1e9:.0f} GB can be used; what would fit: {ways}"
    )


# What the command calls what may be changed, where it has another name for it.
OPTIONS = {
    "student_rank": "student.lora.rank",
    "critic_rank": "scores.critic_lora.rank",
    "shard": "parallel.shard",
    "replicate": "parallel.replicate",
    "sequence": "parallel.sequence",
    "truncate_gradient": "student.truncate_gradient",
    "num_gpus": "machines.num_gpus",
}


def remedies(request: PlanRequest, limit: int = 4) -> list[str]:
    """Changes that would make a run fit: single ones, else the first combination that does."""
    found = [way for change in changes(request) if (way := fitting(request, change))]
    if found:
        return found[:limit]
    together: dict[str, Any] = {}
    for change in changes(request):
        together |= change
        if way := fitting(request, together):
            return [way]
    for factor in (2, 4, 8, 16, 32):
        num_gpus = factor * request.num_gpus  # and a clip for each
        more = {"num_gpus": num_gpus, "batch_size": num_gpus, "replicate": 1, "shard": None}
        for change in (more, together | more | {"sequence": 1}):
            if way := fitting(request, change):
                return [way]
    return []


def changes(request: PlanRequest) -> Iterator[dict[str, Any]]:
    """What a person may change, the harmless first."""
    for mode in RECOMPUTE[RECOMPUTE.index(request.checkpoint_blocks) + 1 :]:
        yield {"checkpoint_blocks": mode}
    yield {"shard": None, "replicate": 1}
    yield {"batch_size": request.num_groups}
    for sequence in (2, 4, 8):
        if sequence > request.sequence and request.num_gpus % sequence == 0:
            groups = request.num_gpus // sequence
            split = {"sequence": sequence, "shard": None, "replicate": 1, "batch_size": groups}
            if request.dit.num_attention_heads % sequence == 0:
                yield split
    yield {"truncate_gradient": True}
    yield {"critic_rank": request.critic_rank or 64}
    yield {"critic_rank": request.critic_rank or 64, "student_rank": request.student_rank or 64}


def fitting(request: PlanRequest, change: dict[str, Any]) -> str | None:
    """The change in words with its peak, if it is one and fits."""
    change = {name: value for name, value in change.items() if getattr(request, name) != value}
    if not change:
        return None
    found = estimate(replace(request, **change))
    if not found.fits:
        return None
    spelt = {"None": "null", "True": "true"}
    words = " ".join(f"{OPTIONS.get(n, n)}={spelt.get(str(v), v)}" for n, v in change.items())
    return f"{words} ({found.peak / 1e9:.1f} GB)"


# --- in words -------------------------------------------------------------------------------------


def format_plan(plan: Plan) -> str:
    """The plan for a person."""
    request = plan.request
    lines = [
        f"{request.num_tokens} tokens and {request.text_rows} text rows a clip, "
        f"{request.batch_size} clips an iteration on {request.num_gpus} GPUs "
        f"({request.num_shards} share the weights, {request.sequence} share a clip)",
        "",
        f"{'network':<10}{'parameters':>12}{'trained':>12}",
    ]
    for role in plan.memory:
        total, trained = plan.parameters[role]
        lines.append(f"{role:<10}{short(total):>12}{short(trained):>12}")
    columns = ("weights", "optimizer", "average", "gradients", "activations")
    lines += ["", f"{'GB per GPU':<10}" + "".join(f"{name:>12}" for name in columns)]
    for role, memory in plan.memory.items():
        cells = "".join(f"{getattr(memory, name) / 1e9:>12.2f}" for name in columns)
        lines.append(f"{role:<10}{cells}")
    lines += [
        f"while one runs: {plan.workspace / 1e9:.2f} GB work space, {plan.gathered / 1e9:.2f} GB "
        f"weights and gradients in transit; always: {request.other_bytes / 1e9:.2f} GB others",
        f"peak: {plan.peak / 1e9:.1f} GB of {plan.usable / 1e9:.1f} GB usable: "
        + ("fits" if plan.fits else "DOES NOT FIT"),
        "",
        "TFLOP per clip and iteration",
    ]
    lines += [f"  {part:<32}{flops / 1e12:>12.3g}" for part, flops in plan.flops.items()]
    together = sum(plan.flops.values())
    seconds = 3600 * plan.hours / request.iterations
    lines += [
        f"  {'together':<32}{together / 1e12:>12.3g}",
        "",
        f"{seconds:.3g} s per iteration at {request.rate / 1e12:.3g} TFLOP/s per GPU; "
        f"{plan.hours:.3g} h for {request.iterations} iterations, "
        f"{plan.hours * request.num_gpus:.3g} GPU hours",
    ]
    if request.num_pairs:
        lines.append(
            f"{plan.trajectory_hours:.3g} h before them for the teacher's {request.num_pairs} "
            "trajectories"
        )
    if request.adversarial:
        lines.append("not counted: the adversarial term, in FLOPs or memory")
    return "\n".join(lines)
