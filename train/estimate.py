"""What a distillation run takes, before anything is loaded: `python -m train.distill plan=true`.

    run = TrainingRun(config, dit, latent_size=(31, 44, 80))
    print(format_estimate(TrainingEstimate(run)))

The counts are those of `wan.runtime.costs`. Four things are assumptions, and stand here as
constants or in `configs.distillation.PlanConfig`: the share of the GPU that is not ours, the room
that a forward needs while it runs, the rate that is reached, and the main memory that a process
takes with nothing loaded.
"""

import itertools
import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from configs.distillation import DistillConfig
from train.parallel import check_batch_size, share_out
from train.rollout import mean_forwards
from wan.errors import WanError
from wan.models.dit_config import DiTConfig
from wan.runtime.costs import count_parameters, kept_by_block, kept_outside, network_work
from wan.weights.names import short

RECOMPUTE = ("none", "selective", "full")  # of `wan.models.recompute`, the fewest kept bytes last
ONE_COPY = {"parallel.shard": None, "parallel.replicate": 1}  # of the weights, over all GPUs
ONE_CLIP = {"gradient_accumulation": 1}  # where each group of GPUs has one
PROCESS_BYTES = 3e9  # of main memory: Python, PyTorch, and what CUDA and NCCL keep on the host
RESERVE = 0.08  # of the GPU: CUDA's context, NCCL's buffers, what the allocator cannot join


@dataclass(frozen=True)
class TrainingRun:
    """A run as it is estimated: its settings, and the sizes of the teacher's transformer.

    Attributes:
        latent_size: (T, h, w) of the latents.
        student_density, score_density: share of full self-attention's scores that the student, and
            teacher and critic, compute.
    Raises:
        WanError: the transformer takes no such latents, or the GPUs cannot share the work so.
    """

    config: DistillConfig
    dit: DiTConfig
    latent_size: tuple[int, int, int]
    student_density: float = 1.0
    score_density: float = 1.0

    def __post_init__(self) -> None:
        self.dit.token_grid(self.latent_size)  # refuses other sizes
        share_out(self.config.parallel, self.config.machines.num_gpus, "GPUs", hint="")
        sequence, heads = self.config.parallel.sequence, self.dit.num_attention_heads
        if heads % sequence:
            raise WanError(f"parallel.sequence={sequence}: must divide the {heads} heads")
        parts = self.config.gradient_accumulation
        check_batch_size(self.config.batch_size, self.num_groups, parts, "GPUs")

    @property
    def num_groups(self) -> int:
        """Groups of GPUs; those of a group share the tokens of a clip."""
        return self.config.machines.num_gpus // self.config.parallel.sequence

    @property
    def num_shards(self) -> int:
        """GPUs that hold one copy of the weights."""
        return self.config.machines.num_gpus // self.config.parallel.replicate

    @property
    def clips_at_once(self) -> int:
        """Clips that a group of GPUs has in memory together."""
        return self.config.batch_size // self.num_groups // self.config.gradient_accumulation

    @property
    def matching(self) -> bool:
        """Whether the scores teach the student; if not, an iteration is a step of regression."""
        return bool(self.config.dmd_weight)

    @property
    def guidance(self) -> bool:
        return self.config.scores.guidance_scale != 1

    @property
    def num_pairs(self) -> int:
        """Trajectories that the teacher samples first; 0 without regression."""
        return self.config.regression.num_pairs if self.config.regression.weight else 0

    @property
    def chain(self) -> float:
        """Forwards of a sample up to its exit, on average.

        Several GPUs run as far as any of their samples goes: to the end, unless all exit together.
        """
        config, steps = self.config, len(self.config.student.timesteps)
        return mean_forwards(steps, config.student.exits) if self.exit_together else steps

    @property
    def exit_together(self) -> bool:
        """Whether no sample runs further than its own exit."""
        config = self.config
        shared = config.student.exits == "shared"
        return config.machines.num_gpus == 1 or shared or config.batch_size == 1

    @property
    def chain_on_policy(self) -> float:
        """Forwards of a sample up to a state of its own, from which the teacher shows the way."""
        config, steps = self.config, len(self.config.student.timesteps)
        if not config.on_policy.weight:
            return 0.0
        exits = config.student.exits
        return mean_forwards(steps - 1, exits) if self.exit_together else steps - 1

    @property
    def student_forwards(self) -> int:
        """Forwards that the student's backward pass goes through, for a sample that exits last."""
        student = self.config.student
        return len(student.timesteps) if self.matching and not student.truncate_gradient else 1

    @property
    def num_tokens(self) -> int:
        return math.prod(self.dit.token_grid(self.latent_size))

    @property
    def bfloat16(self) -> bool:
        """Whether matrix products are in bfloat16, in which GPUs are fast."""
        return self.config.bfloat16 is not False

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in matrix products."""
        return 2 if self.bfloat16 else 4


def with_options(run: TrainingRun, change: dict[str, Any]) -> TrainingRun:
    """The run with options changed, by their names on the command line."""

    def changed(settings: Any, name: str, value: Any) -> Any:
        first, _, rest = name.partition(".")
        return replace(
            settings, **{first: changed(getattr(settings, first), rest, value) if rest else value}
        )

    config = reduce(lambda config, item: changed(config, *item), change.items(), run.config)
    return replace(run, config=config)


# --- FLOPs ----------------------------------------------------------------------------------------


def iteration_flops(run: TrainingRun) -> dict[str, float]:
    """FLOPs per clip of one iteration: a critic update, and its share of a student update.

    Source of the counts: `train.dmd.Distillation`, without its adversarial term, what it samples
    to show, and saving. Regression starts from a stored state.
    """
    config = run.config
    sizes = (run.dit, run.num_tokens, config.machines.text_rows)
    recompute, density = config.checkpoint_blocks, run.score_density
    rank = config.student.lora.rank
    student = network_work(*sizes, rank, recompute, density=run.student_density)
    critic = network_work(*sizes, config.scores.critic_lora.rank, recompute, density=density)
    teacher = network_work(*sizes, density=density)
    matching, chain = run.matching, run.chain
    through = 1 if config.student.truncate_gradient else chain
    share = 1 / config.scores.critic_ratio if matching else 1.0
    on_policy = bool(config.on_policy.weight)
    terms = matching * through + bool(run.num_pairs) + on_policy
    chains = (chain + share * (chain - through)) * matching + share * run.chain_on_policy
    views = (1 + run.guidance) * matching
    if on_policy:
        views += config.on_policy.steps * (1 + (config.on_policy_guidance != 1))
    return {
        "student forward (chain)": student.forward * chains,
        "student forward (with gradient)": student.forward * share * terms,
        "student backward": student.backward * share * terms,
        "student recomputed": student.recompute * share * terms,
        "critic forward": critic.forward * (1 + share) * matching,
        "critic backward": critic.backward * matching,
        "critic recomputed": critic.recompute * matching,
        "teacher forward": teacher.forward * views * share,
    }


def trajectory_flops(run: TrainingRun) -> float:
    """FLOPs of the teacher's trajectories, sampled once before the first iteration."""
    sizes = (run.dit, run.num_tokens, run.config.machines.text_rows)
    forward = network_work(*sizes, density=run.score_density).forward
    forwards = run.config.regression.steps * (1 + (run.config.regression_guidance != 1))
    return forward * forwards * run.num_pairs


# --- memory ---------------------------------------------------------------------------------------


def activation_bytes(run: TrainingRun, rank: int, forwards: int = 1) -> float:
    """Bytes that the backward pass of one update needs on one GPU.

    Args:
        forwards: how many it goes through. The activations of a recomputed block are there once.
    """
    dit, c, text = run.dit, run.compute_bytes, run.config.machines.text_rows
    tokens = -(-run.num_tokens // run.config.parallel.sequence)
    autocast = run.bfloat16 and run.config.machines.num_gpus == 1
    block = kept_by_block(dit, tokens, text, autocast=autocast, compute_bytes=c, rank=rank)
    outside = kept_outside(dit, tokens, text, compute_bytes=c, rank=rank)
    stream = 4.0 * tokens * dit.width
    attention = tokens * (2 * c * dit.width + 8 * dit.num_attention_heads)
    kept, again = {
        "none": (block, 0.0),
        "selective": (stream + attention, block),
        "full": (stream, block),
    }[run.config.checkpoint_blocks]
    return (forwards * (dit.num_layers * kept + outside) + again) * run.clips_at_once


def workspace_bytes(run: TrainingRun) -> float:
    """Room for what lives only while a layer runs: about a feed-forward layer and two streams.

    Assumed, not measured. Guidance runs both captions as one batch.
    """
    tokens = -(-run.num_tokens // run.config.parallel.sequence)
    one = tokens * (8 * run.dit.width + 2 * run.compute_bytes * run.dit.ffn_dim)
    return float(one * (1 + run.guidance) * run.clips_at_once)


def gathered_bytes(run: TrainingRun) -> float:
    """Bytes of weights gathered for computing, and of gradients on their way between GPUs.

    On several GPUs: two blocks' weights, as one is gathered ahead, one block's gradients, and in
    float32 what lies outside the blocks. On one GPU: autocast's copies.
    """
    counts, c = count_parameters(run.dit), run.compute_bytes
    if run.config.machines.num_gpus == 1:  # copies of one forward, or of each that is kept whole
        copies = run.student_forwards if run.config.checkpoint_blocks == "none" else 1
        return float(copies * 2 * counts.total) if run.bfloat16 else 0.0
    outside = counts.total - run.dit.num_layers * counts.block
    return 2.0 * counts.block * c + counts.block * (c + 4) + outside * 4


def host_bytes(run: TrainingRun, saved: float) -> float:
    """Bytes of main memory that one machine's processes take together.

    Each of several processes reads the networks one after another, whole and in float32, before
    its shards go to its GPU (`train.distill.run.load_networks`); the main one puts a student
    together again at the end. While training, each draws the noise of the whole batch and keeps
    its own; where clips are needed, their latents too. A checkpoint takes its shards from the GPU.
    What validation keeps, latents of a few clips, is not counted.

    Args:
        saved: bytes of one process's part of a checkpoint.
    """
    config = run.config
    processes = min(config.machines.num_gpus, config.machines.gpus_per_machine)
    network = 4.0 * count_parameters(run.dit, config.student.lora.rank).total
    clip = 4.0 * run.dit.in_channels * math.prod(run.latent_size)
    drawn = config.batch_size * clip * (2 if config.needs_clips else 1)
    saving = min(processes, run.num_shards)  # of several copies of the weights, one is saved
    return processes * PROCESS_BYTES + max(processes * max(network, drawn), saving * saved)


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


def trained_memory(run: TrainingRun, rank: int, student: bool) -> RoleMemory:
    """AdamW in float32: weight, gradient, two moments, and for the student an average."""
    counts = count_parameters(run.dit, rank)
    trained = 4 * (counts.pairs if rank else counts.total) / run.num_shards
    base = 4 * counts.total / run.num_shards if rank else 0.0
    return RoleMemory(
        weights=base + trained,
        optimizer=2 * trained,
        average=trained * student,
        gradients=trained,
        activations=activation_bytes(run, rank, run.student_forwards if student else 1),
    )


# --- together -------------------------------------------------------------------------------------


class TrainingEstimate:
    """What a run takes, whether it fits or not.

    Attributes:
        parameters: role -> (all, trained).
        flops: per clip and iteration, by part.
        memory: bytes per GPU by role; `workspace` and `gathered` come on top while one runs.
        peak: bytes per GPU in the larger update; `usable` are there.
        host: bytes of main memory per machine.
        hours: for all iterations; `trajectory_hours` come before them.
    """

    def __init__(self, run: TrainingRun) -> None:
        config, machines = run.config, run.config.machines
        total = count_parameters(run.dit).total
        self.run = run
        ranks = {"student": config.student.lora.rank}
        self.memory = {
            "student": trained_memory(run, ranks["student"], student=True),
            "teacher": RoleMemory(4 * total / run.num_shards),
        }
        if run.matching:  # the regressions have no critic
            ranks["critic"] = config.scores.critic_lora.rank
            self.memory["critic"] = trained_memory(run, ranks["critic"], student=False)
        self.parameters = {"teacher": (total, 0)}
        for role, rank in ranks.items():
            pairs = count_parameters(run.dit, rank).pairs
            self.parameters[role] = (total + pairs, pairs if rank else total)
        self.workspace, self.gathered = workspace_bytes(run), gathered_bytes(run)
        resident = sum(role.resident for role in self.memory.values()) + machines.other_gb * 1e9
        update = max(role.of_update for role in self.memory.values())
        self.peak = resident + update + self.workspace + self.gathered
        self.usable = machines.gpu_memory_gb * 1e9 * (1 - RESERVE)
        self.fits = self.peak <= self.usable
        self.host = host_bytes(run, sum(self.memory[role].resident for role in ranks))
        self.fits_host = self.host <= machines.host_memory_gb * 1e9
        self.flops = iteration_flops(run)
        per_hour = 3600 * machines.tflops * 1e12 * machines.num_gpus
        clips = config.loop.steps * config.batch_size
        self.hours = clips * sum(self.flops.values()) / per_hour
        self.trajectory_hours = trajectory_flops(run) / per_hour


def estimate_that_fits(run: TrainingRun) -> TrainingEstimate:
    """The estimate of a run that fits.

    Raises:
        WanError: it does not; the message says by how much, and which options would change that.
    """
    found, machines = TrainingEstimate(run), run.config.machines
    if not found.fits_host:
        raise WanError(
            f"{found.host / 1e9:.0f} GB of main memory per machine, and "
            f"machines.host_memory_gb={machines.host_memory_gb:g}: each process holds a network "
            "while it is loaded; use fewer GPUs of more machines (machines.gpus_per_machine=), "
            "or machines with more memory"
        )
    if found.fits:
        return found
    ways = "; ".join(remedies(run)) or "nothing here: take larger GPUs or smaller clips"
    raise WanError(
        f"{found.peak / 1e9:.1f} GB per GPU at the peak, {found.usable / 1e9:.1f} of "
        f"{machines.gpu_memory_gb:.0f} GB can be used; what would fit: {ways}"
    )


def remedies(run: TrainingRun) -> list[str]:
    """Options that make a run fit: up to four single changes, else the first sum of several."""
    found = [way for change in changes(run) if (way := fitting(run, change))]
    sums = list(itertools.accumulate(changes(run), operator.or_))
    every = sums[-1]
    for factor in (2, 4, 8, 16, 32):
        num_gpus = factor * run.config.machines.num_gpus  # with a clip for each
        more = {"machines.num_gpus": num_gpus, "batch_size": num_gpus} | ONE_CLIP | ONE_COPY
        sums += [more, every | more | {"parallel.sequence": 1}]
    return found[:4] or next(([way] for change in sums if (way := fitting(run, change))), [])


def changes(run: TrainingRun) -> Iterator[dict[str, Any]]:
    """Single changes that take less memory, the harmless first."""
    config, num_gpus = run.config, run.config.machines.num_gpus
    for mode in RECOMPUTE[RECOMPUTE.index(config.checkpoint_blocks) + 1 :]:
        yield {"checkpoint_blocks": mode}
    yield ONE_COPY
    yield {"gradient_accumulation": config.gradient_accumulation * run.clips_at_once}
    yield {"batch_size": run.num_groups} | ONE_CLIP
    for sequence in (2, 4, 8):
        divides = num_gpus % sequence == run.dit.num_attention_heads % sequence == 0
        if sequence > config.parallel.sequence and divides:
            clips = {"batch_size": num_gpus // sequence} | ONE_CLIP
            yield {"parallel.sequence": sequence} | clips | ONE_COPY
    yield {"student.truncate_gradient": True}
    loras: dict[str, Any] = {}
    if run.matching:  # the regressions have no critic
        loras = {"scores.critic_lora.rank": config.scores.critic_lora.rank or 64}
        yield loras
    yield loras | {"student.lora.rank": config.student.lora.rank or 64}


def fitting(run: TrainingRun, change: dict[str, Any]) -> str | None:
    """The change as it is typed, with its peak; None if it changes nothing or does not fit."""
    change = {
        name: value
        for name, value in change.items()
        if reduce(getattr, name.split("."), run.config) != value
    }
    found = TrainingEstimate(with_options(run, change)) if change else None
    if found is None or not (found.fits and found.fits_host):
        return None
    spelt = {"None": "null", "True": "true"}
    words = " ".join(f"{name}={spelt.get(str(v), v)}" for name, v in change.items())
    return f"{words} ({found.peak / 1e9:.1f} GB)"


UNITS = ("", "k", "M", "G", "T", "P")


def scale_of(numbers: Iterable[float]) -> tuple[float, str]:
    """The power of 1000 that fits the largest of some numbers, and its letter."""
    power = int(math.log10(max([1.0, *numbers]))) // 3
    power = min(power, len(UNITS) - 1)
    return 1000.0**power, UNITS[power]


def time_of(seconds: float) -> str:
    """A time in the unit that fits it."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 600:
        return f"{seconds:.3g} s"
    return f"{seconds / 3600:.3g} h"


def format_estimate(found: TrainingEstimate) -> str:
    """The estimate for a person."""
    run, config, machines = found.run, found.run.config, found.run.config.machines
    lines = [
        f"{run.num_tokens} video tokens and {machines.text_rows} text tokens a clip, "
        f"{config.batch_size} clips an iteration on {machines.num_gpus} GPUs "
        f"({run.num_shards} share the weights, {config.parallel.sequence} share a clip)",
        "",
        f"{'network':<10}{'parameters':>12}{'trained':>12}",
    ]
    for role in found.memory:
        total, trained = found.parameters[role]
        lines.append(f"{role:<10}{short(total):>12}{short(trained):>12}")
    columns = ("weights", "optimizer", "average", "gradients", "activations")
    sizes = [getattr(memory, name) for memory in found.memory.values() for name in columns]
    byte, letter = scale_of(sizes)
    unit = f"{letter}B"
    lines += ["", f"{unit + ' per GPU':<10}" + "".join(f"{name:>12}" for name in columns)]
    for role, memory in found.memory.items():
        cells = "".join(f"{getattr(memory, name) / byte:>12.2f}" for name in columns)
        lines.append(f"{role:<10}{cells}")
    lines += [
        f"while one runs: {found.workspace / byte:.2f} {unit} work space, "
        f"{found.gathered / byte:.2f} {unit} weights and gradients in transit; always: "
        f"{machines.other_gb:.2f} GB others",
        f"peak: {found.peak / 1e9:.1f} GB of {found.usable / 1e9:.1f} GB usable: "
        + ("fits" if found.fits else "DOES NOT FIT"),
        f"main memory of a machine with {machines.gpus_per_machine} GPUs: {found.host / 1e9:.0f} "
        f"of {machines.host_memory_gb:.0f} GB",
        "",
    ]
    parts = found.flops | {"together": sum(found.flops.values())}
    count, letter = scale_of(parts.values())
    lines.append(f"{letter}FLOP per clip and iteration")
    lines += [f"  {part:<32}{flops / count:>12.3g}" for part, flops in parts.items() if flops]
    lines += [
        "",
        f"{time_of(3600 * found.hours / config.loop.steps)} per iteration at "
        f"{machines.tflops:.3g} TFLOP/s per GPU; {time_of(3600 * found.hours)} for "
        f"{config.loop.steps} iterations, {found.hours * machines.num_gpus:.3g} GPU hours",
    ]
    if run.num_pairs:
        lines.append(
            f"{time_of(3600 * found.trajectory_hours)} before them for the teacher's "
            f"{run.num_pairs} trajectories"
        )
    if config.gan.weight:
        lines.append("not counted: the adversarial term, in FLOPs or memory")
    return "\n".join(lines)
