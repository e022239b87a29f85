"""The settings of `train.distill`."""

from dataclasses import dataclass, field
from typing import ClassVar

from configs.schema import Options, count, option, positive, seed_option, share
from configs.training import LoRAConfig, TransformerTrainConfig
from wan.errors import WanError
from wan.models.attention_config import AttentionConfig


@dataclass
class StudentConfig(Options):
    """The student: its steps, and how it is trained."""

    GROUP: ClassVar[str] = "student."

    timesteps: list[float] = option([1000, 757, 522], "its steps, falling, 1000 = pure noise")
    more_timesteps: list[list[int]] = option(
        [], "further lists with the same start and number; every update draws one of all"
    )
    warp: bool = option(False, "read timesteps as positions in the shifted table")
    table_shift: float = positive(
        8.0, "shift of the table that gives sigmas, and warped steps (at shift 5, 750 -> 937.5)"
    )
    deterministic: bool = option(False, "between steps put back predicted noise, not fresh noise")
    exits: str = option(
        "stratified",
        "how each sample's last step is drawn: stratified, late, random, shared",
        choices=("stratified", "late", "random", "shared"),
    )
    truncate_gradient: bool = option(
        True,
        "the gradient passes a sample's last step only; false: all steps, and keeps them",
    )
    start: str | None = option(None, "folder of a student to start from; null: the teacher")
    lora: LoRAConfig = field(default_factory=LoRAConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.timesteps:
            raise WanError("student.timesteps=[]: give at least one, such as [1000]")
        for number, steps in enumerate(self.more_timesteps):
            if steps in [self.timesteps, *self.more_timesteps[:number]]:
                raise WanError(
                    f"student.more_timesteps: {steps} is there already, in student.timesteps= or "
                    "before it; give other steps, or draw it no more often than the others"
                )
            if len(steps) != len(self.timesteps) or steps[0] != self.timesteps[0]:
                raise WanError(
                    f"student.more_timesteps: {steps} beside student.timesteps={self.timesteps}: "
                    "lists have the same number of steps and begin with the same one"
                )

    @property
    def lists(self) -> list[list[float]]:
        """All lists that the student learns; the first is what it is sampled in."""
        return [self.timesteps, *([float(t) for t in steps] for steps in self.more_timesteps)]


@dataclass
class ScoreConfig(Options):
    """The two score networks: the frozen teacher and the critic that follows the student."""

    GROUP: ClassVar[str] = "scores."

    guidance_scale: float = option(
        4.0, "guidance g of the teacher, v_u + g (v_c - v_u); 1: none", at_least=1
    )
    negative_prompt: str = option("", "the teacher's unconditional caption")
    shift: float = positive(5.0, "shift of the noise levels at which scores are compared")
    lowest: float = positive(0.02, "lowest noise level")
    highest: float = option(0.98, "highest noise level", below=1)
    clamp: bool = option(
        True, "clamp drawn levels to [lowest, highest]; false: draw only between them"
    )
    phased: bool = option(
        False, "compare samples that leave early only at levels above their next step's"
    )
    unguided_share: float = share(
        0.0, "chance that a sample's teacher is without guidance, at levels above unguided_above"
    )
    unguided_above: float = share(0.9, "see unguided_share", ("scores.unguided_share",))
    clip_share: float = share(
        0.0,
        "chance that the teacher sees the caption's clip in place of the student's sample, at "
        "levels above clip_above; it needs clips",
    )
    clip_above: float = share(0.0, "see clip_share", ("scores.clip_share",))
    critic_ratio: int = count(5, "critic updates per student update")
    critic_warmup: int = option(
        0, "critic updates before the student's first, at the least", at_least=0
    )
    critic_lora: LoRAConfig = field(default_factory=LoRAConfig)
    full_attention: bool = option(
        False, "teacher and critic attend fully whatever attention= says, which is the student's"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lowest < self.highest:
            raise WanError(
                f"scores.lowest={self.lowest}, scores.highest={self.highest}: need "
                "0 < lowest < highest < 1"
            )
        for name in ("unguided", "clip"):
            bound = getattr(self, f"{name}_above")
            if getattr(self, f"{name}_share") and bound >= self.highest:
                raise WanError(
                    f"scores.{name}_above={bound:g}: no level is above scores.highest="
                    f"{self.highest:g}; give a lower one"
                )
        if self.unguided_share and self.guidance_scale == 1:
            raise WanError(
                f"scores.unguided_share={self.unguided_share:g} with scores.guidance_scale=1: the "
                "teacher is without guidance everywhere; leave one of them out"
            )


# What must be given for groups of options to be read.
WITH_GAN, WITH_REGRESSION, PLAN = ("gan.weight",), ("regression.weight",), ("plan",)


@dataclass
class GANConfig(Options):
    """An optional adversarial term on features of the critic or the teacher; it needs clips."""

    GROUP: ClassVar[str] = "gan."

    weight: float = option(0.0, "weight of the term in the student's loss; 0: off", at_least=0)
    critic_weight: float = option(
        0.01, "weight of the discriminator's loss", at_least=0, needs=WITH_GAN
    )
    host: str = option(
        "critic",
        "whose features are read: critic or teacher",
        choices=("critic", "teacher"),
        needs=WITH_GAN,
    )
    blocks: list[int] = option(
        [-1], "after which blocks; negative ones count from the end", needs=WITH_GAN
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.blocks:
            raise WanError("gan.blocks=[]: name at least one block")


@dataclass
class RegressionConfig(Options):
    """An optional regression onto the teacher's own trajectories (knowledge distillation)."""

    GROUP: ClassVar[str] = "regression."

    weight: float = option(0.0, "weight of the term in the student's loss; 0: off", at_least=0)
    final_weight: float | None = option(
        None,
        "its weight at the last step, approached in a straight line; null: the same throughout",
        at_least=0,
        needs=WITH_REGRESSION,
    )
    num_pairs: int = count(1024, "trajectories the teacher samples first", needs=WITH_REGRESSION)
    steps: int = count(
        24,
        "UniPC steps per trajectory, or one more; the nearest become the student's timesteps",
        needs=WITH_REGRESSION,
    )
    guidance_scale: float | None = option(
        None,
        "guidance there; null: scores.guidance_scale",
        at_least=1,
        needs=WITH_REGRESSION,
    )
    shift: float | None = positive(
        None, "shift of the teacher's grid; null: the model's own", needs=WITH_REGRESSION
    )
    folder: str | None = option(
        None,
        "where trajectories are kept; runs may share them; null: output_dir's own",
        needs=WITH_REGRESSION,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.final_weight is not None and not self.weight:
            raise WanError(
                f"regression.final_weight={self.final_weight} with regression.weight=0: the "
                "term is off; start above 0, or set regression.final_weight=null"
            )

    def weight_at(self, step: int, steps: int) -> float:
        """The weight at one of so many steps, the first being 0."""
        final = self.weight if self.final_weight is None else self.final_weight
        return self.weight + (final - self.weight) * step / max(1, steps - 1)


@dataclass
class OnPolicyConfig(Options):
    """An optional regression onto where the teacher goes from the student's own states."""

    GROUP: ClassVar[str] = "on_policy."

    weight: float = option(0.0, "weight of the term in the student's loss; 0: off", at_least=0)
    steps: int = count(
        6, "UniPC steps of the teacher, from each state to clean latents", ("on_policy.weight",)
    )
    guidance_scale: float | None = option(
        None,
        "guidance there; null: scores.guidance_scale",
        at_least=1,
        needs=("on_policy.weight",),
    )
    shift: float = positive(1.0, "shift of its steps; 1: of equal length", ("on_policy.weight",))


@dataclass
class PlanConfig(Options):
    """The machines that `plan=true` makes its estimate for."""

    GROUP: ClassVar[str] = "machines."

    num_gpus: int = count(8, "number of GPUs", PLAN)
    gpu_memory_gb: float = positive(80.0, "memory of each GPU, 10^9 bytes", PLAN)
    gpus_per_machine: int = count(8, "GPUs, and so processes, of one machine", PLAN)
    host_memory_gb: float = positive(1000.0, "main memory of a machine, 10^9 bytes", PLAN)
    tflops: float = positive(
        285.0, "rate of each GPU, measured or assumed; FastVideo's 5B: 285", PLAN
    )
    text_rows: int = count(512, "text tokens that are attended", PLAN)
    other_gb: float = option(
        0.0, "what else stays on each GPU, such as a text encoder", at_least=0, needs=PLAN
    )


# Options that are read by distribution matching alone, by what needs samples of the student's
# chain, where there is more than one step, and where clips of the world are made.
OF_MATCHING = (
    *("scores.shift", "scores.lowest", "scores.highest", "scores.clamp", "scores.phased"),
    *("scores.unguided_share", "scores.clip_share", "scores.critic_ratio", "scores.critic_warmup"),
    *("scores.critic_lora.rank", "scores.critic_lora.start", "critic_lr", "max_drift"),
    "student.truncate_gradient",
)
OF_CHAINS = ("student.exits", "first_frame_share")
OF_STEPS = (
    "scores.phased",
    "student.exits",
    "student.truncate_gradient",
    "student.deterministic",
)
OF_CLIPS = ("data.cache_dir", "data.num_clips", "data.repeat_circling", "data.passes")


@dataclass
class DistillConfig(TransformerTrainConfig):
    """`train.distill`: a many-step teacher becomes a student of few steps."""

    plan: bool = option(False, "only say what the run would take; no weights are read or fetched")
    machines: PlanConfig = field(default_factory=PlanConfig)

    output_dir: str = option("runs/distill", "checkpoints, metrics, samples; the student in model/")
    seed: int = seed_option(0, "noise, noise levels, exits; of captions: data.seed")
    height: int | None = count(None, "pixels of what is made; null: the model's own")
    width: int | None = count(None, "pixels; null: the model's own")
    num_frames: int | None = count(None, "4k + 1; null: the model's own")

    dmd_weight: float = option(
        1.0, "weight of distribution matching; 0: off, the regressions alone", at_least=0
    )
    student: StudentConfig = field(default_factory=StudentConfig)
    scores: ScoreConfig = field(default_factory=ScoreConfig)
    gan: GANConfig = field(default_factory=GANConfig)
    regression: RegressionConfig = field(default_factory=RegressionConfig)
    on_policy: OnPolicyConfig = field(default_factory=OnPolicyConfig)

    lr: float = positive(1e-4, "peak learning rate of the student")
    critic_lr: float = positive(1e-4, "peak learning rate of the critic")
    final_lr: float = share(0.5, "share of both that the cosine leaves at the end")
    warmup: int = option(
        10,
        "iterations of linear warm-up, from the first on; critic_warmup may outlast it",
        at_least=0,
    )
    beta1: float = option(0.0, "AdamW's first beta", at_least=0, below=1)
    beta2: float = option(0.999, "AdamW's second beta", at_least=0, below=1)
    ema_decay: float = option(
        0.99, "decay of the averaged student, which is exported; 0: the latest", at_least=0, below=1
    )

    validation_captions: int = count(
        8, "captions sampled at each save, twice each, student beside teacher"
    )
    validation_steps: int = count(25, "Euler steps of the teacher for those")
    export: str = option(
        "last",
        "which student is written at the end: last, or best by health",
        choices=("last", "best"),
    )
    max_drift: float = option(
        3.0,
        "the run stops if clips of the student spread this much more or less than any of the "
        "teacher's, early in the chain or finished",
        above=1,
    )
    omit: list[float] = share(
        [],
        "for the world without clips: chances that captions leave things unsaid, in turn; []: "
        "always 0.15",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.dmd_weight or self.regression.weight or self.on_policy.weight):
            raise WanError(
                "dmd_weight=0, regression.weight=0, on_policy.weight=0: nothing would teach the "
                "student"
            )
        if self.on_policy.weight and len(self.student.timesteps) == 1:
            raise WanError(
                f"on_policy.weight={self.on_policy.weight} with one step: a student's own states "
                "begin with its second step; use regression.weight"
            )
        ratio, first = self.scores.critic_ratio, self.scores.critic_warmup
        if self.dmd_weight and self.loop.steps // ratio <= first // ratio:
            raise WanError(
                f"loop.steps={self.loop.steps}: with scores.critic_ratio={ratio} after the first "
                f"{first} steps (scores.critic_warmup) the student would never move"
            )
        if self.gan.weight and not self.dmd_weight:
            raise WanError("gan.weight without dmd_weight: the term stands beside DMD's, not alone")
        if self.scores.phased and self.student.deterministic:
            raise WanError(
                "scores.phased=true with student.deterministic=true: early mistakes count less "
                "because the next step's fresh noise hides them, and there is none; leave one out"
            )

    def idle(self) -> dict[str, str]:
        found = super().idle()
        if not self.dmd_weight:
            found |= dict.fromkeys(OF_MATCHING, "dmd_weight=0")
            if not self.on_policy.weight:
                found |= dict.fromkeys(OF_CHAINS, "dmd_weight=0 and on_policy.weight=0")
        if len(self.student.timesteps) == 1:
            found |= dict.fromkeys(OF_STEPS, "one step")
        if self.needs_clips:
            found |= dict.fromkeys(("height", "width", "num_frames"), "clips of their own size")
        if self.draws_captions:
            found |= dict.fromkeys(OF_CLIPS, "captions without clips")
        return found

    @property
    def needs_clips(self) -> bool:
        """Whether a term reads latents of clips."""
        return bool(self.gan.weight or self.first_frame_share or self.scores.clip_share)

    @property
    def draws_captions(self) -> bool:
        """Whether captions are drawn from the miniature's world, as `omit` says."""
        return self.data.kind == "world" and not self.needs_clips

    @property
    def regression_guidance(self) -> float:
        """Guidance of the teacher's trajectories."""
        return self.regression.guidance_scale or self.scores.guidance_scale

    @property
    def on_policy_guidance(self) -> float:
        """Guidance of the teacher from the student's own states."""
        return self.on_policy.guidance_scale or self.scores.guidance_scale

    @property
    def score_attention(self) -> AttentionConfig:
        """Attention of teacher and critic: where the student's is sparse they may attend fully."""
        if self.scores.full_attention:
            return AttentionConfig(self.attention.exact)
        return self.attention
