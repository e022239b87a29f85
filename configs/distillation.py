"""The settings of `train.distill`."""

from dataclasses import dataclass, field

from configs.data import DataConfig
from configs.parallel import ParallelConfig
from configs.schema import (
    check_at_least,
    check_choice,
    check_device,
    check_every_step,
    check_positive,
    check_seed,
    option,
)
from configs.training import (
    CHECKPOINT_BLOCKS,
    LoopConfig,
    LoRAConfig,
    check_ema_decay,
    check_grad_clip,
)
from wan.errors import WanError
from wan.models.attention_config import AttentionConfig

EXITS = ("stratified", "late", "random", "shared")
GAN_HOSTS = ("critic", "teacher")
EXPORTS = ("last", "best")


@dataclass
class StudentConfig:
    """What the student is to be."""

    timesteps: list[float] = option([1000, 757, 522], "its steps, falling, 1000 = pure noise")
    warp: bool = option(False, "read timesteps as positions in the shifted table")
    table_shift: float = option(
        8.0, "shift of the table that gives sigmas, and warped steps (at shift 5, 750 -> 937.5)"
    )
    deterministic: bool = option(False, "between steps put back predicted noise, not fresh noise")
    exits: str = option(
        "stratified", "how each sample's last step is drawn: stratified, late, random, shared"
    )
    truncate_gradient: bool = option(
        True, "through a sample's last step only; false: through all of its steps, and their memory"
    )
    start: str | None = option(None, "folder of a student to start from; null: the teacher")
    lora: LoRAConfig = field(default_factory=LoRAConfig)

    def __post_init__(self) -> None:
        check_choice("student.exits", self.exits, EXITS)
        check_positive("student.table_shift", self.table_shift)
        if not self.timesteps:
            raise WanError("student.timesteps=[]: give at least one, such as [1000]")


@dataclass
class ScoreConfig:
    """The two score networks: the frozen teacher and the critic that follows the student."""

    guidance_scale: float = option(
        4.0, "of the teacher, standard form v_u + g (v_c - v_u); 1: none"
    )
    negative_prompt: str = option("", "the teacher's unconditional caption")
    shift: float = option(5.0, "of the noise levels at which scores are compared")
    lowest: float = option(0.02, "lowest noise level")
    highest: float = option(0.98, "highest noise level")
    clamp: bool = option(True, "levels beyond the bounds move onto them; false: drawn inside")
    critic_ratio: int = option(5, "critic updates per student update")
    critic_warmup: int = option(0, "critic updates before the student's first")
    critic_lora: LoRAConfig = field(default_factory=LoRAConfig)
    full_attention: bool = option(
        False, "teacher and critic attend fully whatever attention= says, which is the student's"
    )

    def __post_init__(self) -> None:
        for name in ("guidance_scale", "critic_ratio"):
            check_at_least(f"scores.{name}", getattr(self, name), 1)
        check_at_least("scores.critic_warmup", self.critic_warmup, 0)
        check_positive("scores.shift", self.shift)
        if not 0 < self.lowest < self.highest < 1:
            raise WanError(
                f"scores.lowest={self.lowest}, scores.highest={self.highest}: need "
                "0 < lowest < highest < 1"
            )


@dataclass
class GANConfig:
    """An optional adversarial term on features of the critic or the teacher; it needs clips."""

    weight: float = option(0.0, "of the term in the student's loss; 0 turns it off")
    critic_weight: float = option(0.01, "of the discriminator's loss")
    host: str = option("critic", "whose features are read: critic or teacher")
    blocks: list[int] = option([-1], "after which blocks; negative ones count from the end")

    def __post_init__(self) -> None:
        for name in ("weight", "critic_weight"):
            check_at_least(f"gan.{name}", getattr(self, name), 0)
        check_choice("gan.host", self.host, GAN_HOSTS)
        if not self.blocks:
            raise WanError("gan.blocks=[]: name at least one block")


@dataclass
class RegressionConfig:
    """An optional regression onto the teacher's own trajectories (knowledge distillation)."""

    weight: float = option(0.0, "of the term in the student's loss; 0 turns it off")
    final_weight: float | None = option(
        None,
        "its weight at the last step, approached in a straight line; null: the same throughout",
    )
    num_pairs: int = option(1024, "trajectories the teacher samples first")
    steps: int = option(24, "UniPC steps of each, about: the student's levels are among them")
    guidance_scale: float | None = option(None, "of the teacher there; null: that of the scores")
    shift: float | None = option(None, "of the teacher's grid; null: the model's own")
    folder: str | None = option(
        None, "where trajectories are kept; runs may share them; null: output_dir's own"
    )

    def __post_init__(self) -> None:
        check_at_least("regression.weight", self.weight, 0)
        for name in ("num_pairs", "steps"):
            check_at_least(f"regression.{name}", getattr(self, name), 1)
        if self.final_weight is not None:
            check_at_least("regression.final_weight", self.final_weight, 0)
            if not self.weight:
                raise WanError(
                    f"regression.final_weight={self.final_weight} with regression.weight=0: the "
                    "term is off; start above 0, or set regression.final_weight=null"
                )

    def weight_at(self, step: int, steps: int) -> float:
        """The weight at one of so many steps, the first being 0."""
        final = self.weight if self.final_weight is None else self.final_weight
        return self.weight + (final - self.weight) * step / max(1, steps - 1)


@dataclass
class PlanConfig:
    """The machines a plan is made for."""

    num_gpus: int = option(8, "how many")
    gpu_memory_gb: float = option(80.0, "memory of each, 10^9 bytes")
    tflops: float = option(285.0, "what each reaches, measured or assumed; FastVideo's 5B: 285")
    text_rows: int = option(512, "rows of the text that are attended")
    other_gb: float = option(0.0, "what else stays on each GPU, such as a text encoder")

    def __post_init__(self) -> None:
        for name in ("gpu_memory_gb", "tflops"):
            check_positive(f"machines.{name}", getattr(self, name))
        for name in ("num_gpus", "text_rows"):
            check_at_least(f"machines.{name}", getattr(self, name), 1)
        check_at_least("machines.other_gb", self.other_gb, 0)


@dataclass
class DistillConfig:
    """`train.distill`: a many-step teacher becomes a student of few steps."""

    plan: bool = option(False, "only say what the run would take; no weights are read or fetched")
    machines: PlanConfig = field(default_factory=PlanConfig)

    output_dir: str = option("runs/distill", "checkpoints, metrics, samples; the student in model/")
    checkpoint: str = option("builtin:miniature-teacher", "the teacher: a folder or a hub id")
    seed: int = option(0, "noise, noise levels, exits; of captions: data.seed")
    threads: int = option(2, "CPU threads")
    device: str = option("cpu", "auto, cpu, cuda, cuda:N")
    bfloat16: bool = option(True, "matrix products in bfloat16; weights stay float32")
    compile: bool = option(False, "compile the transformers' blocks")
    checkpoint_blocks: str = option(
        "none", "recomputed in the backward pass: none, full, selective"
    )
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    height: int | None = option(None, "pixels of what is made; null: the model's own")
    width: int | None = option(None, "pixels; null: the model's own")
    num_frames: int | None = option(None, "4k + 1; null: the model's own")
    max_text_tokens: int = option(512, "captions are cut there, with a warning")

    dmd_weight: float = option(1.0, "of distribution matching; 0 leaves regression alone")
    student: StudentConfig = field(default_factory=StudentConfig)
    scores: ScoreConfig = field(default_factory=ScoreConfig)
    gan: GANConfig = field(default_factory=GANConfig)
    regression: RegressionConfig = field(default_factory=RegressionConfig)

    batch_size: int = option(32, "captions per step")
    first_frame_share: float = option(0.0, "share of batches with a clean first frame (TI2V)")
    lr: float = option(1e-4, "peak learning rate of the student")
    critic_lr: float = option(1e-4, "peak learning rate of the critic")
    final_lr: float = option(0.5, "what the cosine leaves of both at the end")
    warmup: int = option(10, "steps of linear warm-up")
    beta1: float = option(0.0, "AdamW's first beta")
    beta2: float = option(0.999, "AdamW's second beta")
    weight_decay: float = option(0.01, "of matrices")
    grad_clip: float = option(1.0, "largest gradient norm")
    ema_decay: float = option(0.99, "of the averaged student that is kept")

    validation_captions: int = option(
        8, "captions sampled at each save, twice each, student beside teacher"
    )
    validation_steps: int = option(25, "Euler steps of the teacher for those")
    export: str = option("last", "which student is written at the end: last, or best by health")
    max_drift: float = option(
        3.0, "the run stops if the student's spread leaves the teacher's by it"
    )
    data: DataConfig = field(default_factory=DataConfig)
    omit: list[float] = option(
        [], "for the world: chances that captions leave things unsaid, in turn; []: always 0.15"
    )
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        check_device("device", self.device)
        check_seed("seed", self.seed)
        check_choice("export", self.export, EXPORTS)
        check_choice("checkpoint_blocks", self.checkpoint_blocks, CHECKPOINT_BLOCKS)
        check_every_step(self.attention)
        for name in ("lr", "critic_lr"):
            check_positive(name, getattr(self, name))
        check_grad_clip(self.grad_clip)
        check_ema_decay(self.ema_decay)
        for name in (
            *("batch_size", "threads", "max_text_tokens"),
            *("validation_captions", "validation_steps"),
        ):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("dmd_weight", self.dmd_weight, 0)
        if not 0 <= self.first_frame_share <= 1:
            raise WanError(f"first_frame_share={self.first_frame_share}: must lie in [0, 1]")
        if not self.max_drift > 1:
            raise WanError(f"max_drift={self.max_drift}: must be above 1 (3: a third to threefold)")
        if not (self.dmd_weight or self.regression.weight):
            raise WanError("dmd_weight=0 and regression.weight=0: nothing would teach the student")
        ratio, first = self.scores.critic_ratio, self.scores.critic_warmup
        if self.dmd_weight and self.loop.steps // ratio <= first // ratio:
            raise WanError(
                f"loop.steps={self.loop.steps}: the student moves in every {ratio}th step "
                f"(scores.critic_ratio) after the first {first} (scores.critic_warmup): never"
            )
        for chance in self.omit:
            if not 0 <= chance <= 1:
                raise WanError(f"omit={self.omit}: probabilities, from 0 to 1")
        if self.omit and (self.data.kind != "world" or self.gan.weight or self.first_frame_share):
            raise WanError(
                f"omit={self.omit}: is for captions alone; with data.kind=folder, gan.weight or "
                "first_frame_share they are those of the clips"
            )
        if self.gan.weight and not self.dmd_weight:
            raise WanError("gan.weight without dmd_weight: the term stands beside DMD's, not alone")
