"""Distribution matching distillation: `python -m train.distill recipe=dmd3`.

A many-step teacher becomes a student of one to four steps (DMD2, arXiv:2405.14867, without
pictures of the real world: captions are enough). Three networks, all from the teacher's weights:

    student   makes clips as it will when sampling; trained along critic minus teacher
    critic    learns by flow matching what the student's clips look like; the fake score
    teacher   frozen, guided; the real score

Optional terms: an adversarial one on features of critic or teacher (needs clips), and regression on
the teacher's own trajectories, which alone (dmd_weight=0) is knowledge distillation. What comes out
is a folder in the released layout, or a LoRA file.
"""

import copy
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs.distillation import DistillConfig
from infer.cli import INTERRUPTED, run_command
from infer.command_line import ATTENTION
from train.checkpoint import best_checkpoint, load_checkpoint
from train.data import open_data
from train.export import export_model
from train.frozen import TextRows, Texts, load_frozen, text_dtype
from train.gan import Discriminator, block_numbers, noised_logits
from train.health import Samples, decode, panel_numbers, world_panel, write_pictures
from train.loop import run_training, step_generator
from train.losses import (
    adversarial_loss,
    discriminator_loss,
    dmd_gradient,
    dmd_normalizer,
    flow_matching_loss,
    loss_with_gradient,
    sample_score_sigmas,
)
from train.optim import EMA, apply_gradients, learning_rate, make_optimizers
from train.parallel import World, start
from train.plan import PlanRequest, format_plan, plan
from train.rollout import (
    Condition,
    draw_exits,
    guided_velocity,
    guided_x0,
    predict_velocity,
    predict_x0,
    roll_out,
)
from train.state import TrainState
from train.trajectories import Trajectories, grid_through, sample_trajectories
from wan.checkpoint import open_checkpoint
from wan.digests import sha256_file
from wan.dit import WanDiT
from wan.errors import WanError
from wan.flow import add_noise, velocity_target
from wan.hub import CONFIGS, resolve_model
from wan.lora import add_lora, fold_lora
from wan.miniature.captions import caption
from wan.miniature.world import sample_scene, scene_rng
from wan.noise import draw_noise, sample_generators
from wan.pipeline_config import FEW_STEP, PipelineConfig, part_folder, read_pipeline_config
from wan.samplers import sample_euler, sample_few_step
from wan.schedule import NUM_TIMESTEPS, Schedule, euler_schedule, few_step_schedule
from wan.tokenizer import Tokenizer
from wan.umt5 import UMT5Encoder
from wan.vae import WanVAE
from wan.video import to_uint8, write_video
from wan.weights import load_state

CRITIC_BINS = 5  # the critic's loss is logged by noise level, in as many bins of [0, 1]
PANEL_SEED = 1_000_000  # noise of the validation samples: sample i has this plus i


@dataclass(frozen=True)
class Clips:
    """What a step reads: captions, and clips where a term needs them."""

    captions: list[str]
    latents: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """What a step is made from, this process's rows of it.

    Attributes:
        condition, null: the captions encoded, and the negative prompt as often.
        shape: (C, T, H, W) of what is to be made.
        clips: (B, C, T, H, W), or None.
    """

    condition: Condition
    null: Condition
    shape: Sequence[int]
    clips: Tensor | None


class Distillation:
    """The networks and the two updates; everything a step does, readable from `train_step` down."""

    def __init__(
        self,
        config: DistillConfig,
        settings: PipelineConfig,
        teacher: WanDiT,
        student: WanDiT,
        critic: WanDiT,
        texts: Texts,
        draw: Callable[[int], Clips],
        world: World,
    ) -> None:
        self.config, self.texts, self.draw, self.world = config, texts, draw, world
        self.teacher, self.student, self.critic = teacher, student, critic
        self.trajectories: Trajectories | None = None
        self.device = texts.device
        self.rows = world.rows(config.batch_size)
        self.schedule = student_schedule(config)
        self.shape = latent_shape(config, settings)
        self.gan_blocks: list[int] = []
        self.discriminator: Discriminator | None = None
        if config.gan.weight:
            layers = settings.transformer.num_layers
            self.gan_blocks = block_numbers(config.gan.blocks, layers)
            self.discriminator = Discriminator(settings.transformer.width, len(self.gan_blocks))
            self.discriminator.to(self.device)

    # --- state ------------------------------------------------------------------------------------

    def new_state(self) -> TrainState:
        config = self.config
        betas = (config.beta1, config.beta2)
        modules: dict[str, nn.Module] = {"student": self.student, "critic": self.critic}
        if self.discriminator is not None:
            modules["discriminator"] = self.discriminator
        rates = {name: config.lr if name == "student" else config.critic_lr for name in modules}
        optimizers = {
            name: make_optimizers(module, "adamw", rates[name], betas, config.weight_decay)["adamw"]
            for name, module in modules.items()
        }
        return TrainState(modules, optimizers, {"student": EMA(self.student, config.ema_decay)})

    # --- one iteration ----------------------------------------------------------------------------

    def train_step(self, state: TrainState) -> dict[str, float]:
        """Every `critic_ratio`-th iteration the student moves; then the critic follows, always."""
        generator = step_generator(self.config.seed, state.step)
        values: dict[str, float] = {}
        if self.config.dmd_weight == 0:
            return self.update_student(state, generator)
        if self.student_moves(state.step):
            values |= self.update_student(state, generator)
        return values | self.update_critic(state, generator)

    def student_moves(self, step: int) -> bool:
        scores = self.config.scores
        return step >= scores.critic_warmup and (step + 1) % scores.critic_ratio == 0

    def update_student(self, state: TrainState, generator: torch.Generator) -> dict[str, float]:
        config, values = self.config, {}
        total = torch.zeros((), device=self.device)
        if config.dmd_weight:
            loss, seen = self.matching_loss(state.step, generator)
            total, values = total + config.dmd_weight * loss, values | seen
        if self.trajectories is not None:
            loss = self.regression_loss(state.step, generator)
            total, values = (
                total + config.regression.weight * loss,
                values | {"regression": float(loss.detach())},
            )
        total.backward()
        check_gradients(state.step, "student", self.student)
        lr = self.rate(state.step, config.lr)
        parameters = trainable(self.student)
        values["student_grad_norm"] = apply_gradients(
            {"student": state.optimizers["student"]}, parameters, lr, config.grad_clip
        )
        for bystander in (self.critic, self.discriminator):  # the adversarial term passed them
            if bystander is not None:
                bystander.zero_grad(set_to_none=True)
        state.averages["student"].update(self.student)
        return values | {"loss_student": float(total.detach()), "lr": lr}

    def matching_loss(
        self, step: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """DMD's loss on fresh samples of the student, the adversarial term added."""
        config, scores = self.config, self.config.scores
        batch = self.batch(step, generator)
        condition, null = batch.condition, batch.null
        x0, exits = self.sample_student(batch, generator)
        sigma, noise = self.score_levels(generator), self.noise(batch.shape, generator)
        weight = condition.frame_weight(x0.shape[2])
        with torch.no_grad(), self.autocast():
            x = add_noise(x0, noise, sigma)
            x0_critic = predict_x0(self.critic, x, sigma, condition)
            x0_teacher = guided_x0(self.teacher, x, sigma, condition, null, scores.guidance_scale)
            gradient = dmd_gradient(x0, x0_teacher, x0_critic, weight)
        check_finite(step, x0_student=x0, x0_critic=x0_critic, x0_teacher=x0_teacher)
        drift = float(x0.detach().std() / x0_teacher.std())
        if not 1 / config.max_drift < drift < config.max_drift:
            raise WanError(
                f"step {step}: diverged: the student's x0 has {drift:.3g} times the spread of the "
                f"teacher's (max_drift={config.max_drift:g}); lower lr or scores.guidance_scale"
            )
        loss = loss_with_gradient(x0, gradient)
        values = {
            "dmd_gradient": float(gradient.square().mean().sqrt()),
            "dmd_normalizer": float(dmd_normalizer(x0.detach(), x0_teacher, weight).mean()),
            "student_mean": float(x0.detach().mean()),
            "student_std": float(x0.detach().std()),
            "student_drift": drift,
            "student_max": float(x0.detach().abs().max()),
        }
        counts = torch.bincount(exits, minlength=len(self.schedule)).tolist()
        values |= {f"exits_{i}": float(count) for i, count in enumerate(counts)}
        if self.discriminator is not None:
            with self.autocast():
                logits = self.logits(x0, noise, sigma, condition)
            adversarial = adversarial_loss(logits)
            loss = loss + config.gan.weight * adversarial
            values["gan_student"] = float(adversarial.detach())
        return loss, values

    def regression_loss(self, step: int, generator: torch.Generator) -> Tensor:
        """Squared distance of the student's x0 from where the teacher's trajectory ends."""
        assert self.trajectories is not None
        config = self.config
        count = len(self.trajectories.captions)
        rows = torch.randint(count, (config.batch_size,), generator=generator)[self.rows]
        exits = self.exits(generator)
        x, target, captions = self.trajectories.batch(rows.tolist(), exits)
        condition = Condition(*self.texts(captions))
        sigma = self.schedule.sigmas[exits].to(self.device)
        with self.autocast():
            x0 = predict_x0(self.student, x.to(self.device), sigma, condition)
        check_finite(step, x0_student=x0)
        return (x0 - target.to(self.device)).square().mean()

    def update_critic(self, state: TrainState, generator: torch.Generator) -> dict[str, float]:
        """Flow matching on new samples of the student as it is now."""
        config = self.config
        batch = self.batch(state.step, generator)
        condition = batch.condition
        with torch.no_grad():
            x0, _ = self.sample_student(batch, generator)
        sigma, noise = self.score_levels(generator), self.noise(batch.shape, generator)
        weight = condition.frame_weight(x0.shape[2])
        with self.autocast():
            x = add_noise(x0, noise, sigma)
            velocity = predict_velocity(self.critic, x, NUM_TIMESTEPS * sigma, condition)
        target = velocity_target(x0, noise)
        loss = flow_matching_loss(velocity, target, weight)
        values = {"critic_loss": float(loss.detach()), **loss_by_level(velocity, target, sigma)}
        optimizers = {"critic": state.optimizers["critic"]}
        if self.discriminator is not None:
            assert batch.clips is not None
            with self.autocast():
                verdicts = [self.logits(x, noise, sigma, condition) for x in (batch.clips, x0)]
            told_apart = discriminator_loss(*verdicts)
            loss = loss + config.gan.critic_weight * told_apart
            values["gan_critic"] = float(told_apart.detach())
            optimizers["discriminator"] = state.optimizers["discriminator"]
        loss.backward()
        check_gradients(state.step, "critic", self.critic)
        parameters = [p for name in optimizers for p in trainable(state.modules[name])]
        values["critic_grad_norm"] = apply_gradients(
            optimizers, parameters, self.rate(state.step, config.critic_lr), config.grad_clip
        )
        return values | {"memory_gb": peak_memory_gb(self.device)}

    # --- what both updates need -------------------------------------------------------------------

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        """Of a step; some batches are given their first frames."""
        drawn = self.draw(step)
        clips = None if drawn.latents is None else drawn.latents[self.rows].to(self.device)
        first = None
        if float(torch.rand((), generator=generator)) < self.config.first_frame_share:
            assert clips is not None
            first = clips[:, :, :1]
        context, num_rows = self.texts(drawn.captions[self.rows])
        negative = self.texts([self.config.scores.negative_prompt] * len(context))
        shape = self.shape if clips is None else clips.shape[1:]
        return Batch(Condition(context, num_rows, first), Condition(*negative, first), shape, clips)

    def sample_student(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Samples of the student (B, C, T, H, W) and the step each left the chain at (B,)."""
        exits = self.exits(generator)
        noises = [self.noise(batch.shape, generator) for _ in range(len(self.schedule))]
        deterministic, sharded = self.config.student.deterministic, self.world.size > 1
        with self.autocast():
            x0 = roll_out(
                self.student, batch.condition, self.schedule, exits, noises, deterministic, sharded
            )
        return x0, exits

    # Randomness is drawn for the whole batch: a process takes its own rows of it.

    def exits(self, generator: torch.Generator) -> Tensor:
        config, steps = self.config, len(self.schedule)
        return draw_exits(config.batch_size, steps, config.student.exits, generator)[self.rows]

    def score_levels(self, generator: torch.Generator) -> Tensor:
        scores, batch = self.config.scores, self.config.batch_size
        bounds = (scores.lowest, scores.highest)
        sigma = sample_score_sigmas(batch, scores.shift, bounds, generator, scores.clamp)
        return sigma[self.rows].to(self.device)

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        noise = torch.randn(self.config.batch_size, *shape, generator=generator)
        return noise[self.rows].to(self.device)

    def logits(self, x0: Tensor, noise: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        assert self.discriminator is not None
        host = self.critic if self.config.gan.host == "critic" else self.teacher
        return noised_logits(self.discriminator, host, self.gan_blocks, x0, noise, sigma, condition)

    def rate(self, step: int, peak: float) -> float:
        config = self.config
        return learning_rate(step, peak, config.loop.steps, config.warmup, config.final_lr)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bfloat16)

    # --- sampling for the panel and for trajectories ----------------------------------------------

    def teacher_velocity(
        self, captions: Sequence[str], guidance: float
    ) -> Callable[[Tensor, float], Tensor]:
        """The guided teacher as a sampler wants it."""
        condition = Condition(*self.texts(list(captions)))
        null = Condition(*self.texts([self.config.scores.negative_prompt] * len(captions)))

        def velocity(x: Tensor, timestep: float) -> Tensor:
            level = torch.full((len(x),), timestep, device=x.device)
            with self.autocast():
                return guided_velocity(self.teacher, x, level, condition, null, guidance)

        return velocity

    @torch.no_grad()
    def sample_panel(self, captions: Sequence[str], schedule: Schedule | None) -> Tensor:
        """Latents for captions from the panel's noise: the student's, or the teacher's."""
        generators = sample_generators(PANEL_SEED, len(captions))
        x = draw_noise(self.shape, generators).to(self.device)
        if schedule is not None:
            velocity = self.teacher_velocity(captions, self.config.scores.guidance_scale)
            return sample_euler(velocity, x, schedule)
        condition = Condition(*self.texts(list(captions)))

        def student_velocity(x: Tensor, timestep: float) -> Tensor:
            level = torch.full((len(x),), timestep, device=x.device)
            with self.autocast():
                return predict_velocity(self.student, x, level, condition)

        return sample_few_step(
            student_velocity,
            x,
            self.schedule,
            renoise=lambda i: draw_noise(self.shape, generators),
            deterministic=self.config.student.deterministic,
        )

    @torch.no_grad()
    def triptych(self, x0: Tensor, text: str) -> Tensor:
        """A sample (1, C, T, H, W), then what teacher and critic make of it noised: (3, ...)."""
        condition = Condition(*self.texts([text]))
        null = Condition(*self.texts([self.config.scores.negative_prompt]))
        x0, sigma = x0.to(self.device), torch.full((1,), 0.7, device=self.device)
        x = add_noise(x0, draw_noise(self.shape, sample_generators(0, 1)).to(self.device), sigma)
        guidance = self.config.scores.guidance_scale
        with self.autocast():
            teacher = guided_x0(self.teacher, x, sigma, condition, null, guidance)
            critic = predict_x0(self.critic, x, sigma, condition)
        return torch.cat([x0, teacher, critic])


# --- checks and small measures --------------------------------------------------------------------


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def check_finite(step: int, **tensors: Tensor) -> None:
    """Stop where a tensor has a number that is not finite; nothing is repaired.

    Raises:
        WanError: names the step, the tensor and how many.
    """
    for name, tensor in tensors.items():
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise WanError(f"step {step}: {bad} of {tensor.numel()} numbers in {name} not finite")


def check_gradients(step: int, role: str, module: nn.Module) -> None:
    """As `check_finite`, for the gradients of a module."""
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            check_finite(step, **{f"the gradient of {role}.{name}": parameter.grad})


def loss_by_level(velocity: Tensor, target: Tensor, sigma: Tensor) -> dict[str, float]:
    """The critic's mean squared error in each bin of noise levels that occurs."""
    error = (velocity.detach().float() - target).square().flatten(1).mean(1)
    bins = (sigma * CRITIC_BINS).long().clamp(max=CRITIC_BINS - 1)
    return {
        f"critic_loss_sigma_{b / CRITIC_BINS:.1f}": float(error[bins == b].mean())
        for b in bins.unique().tolist()
    }


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held so far, in 10^9 bytes: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# --- putting a run together -----------------------------------------------------------------------


def student_schedule(config: DistillConfig) -> Schedule:
    student = config.student
    shift = config.scores.shift if student.warp else student.table_shift
    return few_step_schedule(student.timesteps, shift, student.warp)


def latent_shape(config: DistillConfig, settings: PipelineConfig) -> tuple[int, int, int, int]:
    defaults = settings.defaults
    return settings.latent_shape(
        config.height or defaults.height,
        config.width or defaults.width,
        config.num_frames or defaults.num_frames,
    )


def world_captions(config: DistillConfig) -> Callable[[int], Clips]:
    """Captions of scenes of the training split, new ones in every step."""

    def draw(step: int) -> Clips:
        captions = []
        for row in range(config.batch_size):
            rng = scene_rng(config.data.seed, step * config.batch_size + row)
            captions.append(caption(sample_scene(rng, "train"), rng).text)
        return Clips(captions)

    return draw


def open_source(
    config: DistillConfig, settings: PipelineConfig, source: Path, device: torch.device
) -> tuple[Callable[[int], Clips], Texts]:
    """Where batches come from, and how their captions are encoded."""
    needs_clips = bool(config.gan.weight or config.first_frame_share)
    size, seed = config.batch_size, config.seed
    if config.data.kind == "world" and not needs_clips:
        build = partial(UMT5Encoder, settings.text_encoder)
        encoder = load_frozen(build, source, "text_encoder", device, text_dtype(device))
        rows = TextRows(
            encoder, Tokenizer.from_folder(part_folder(source, "tokenizer")), config.max_text_tokens
        )
        return world_captions(config), Texts(rows, device)
    cache, texts, _ = open_data(config.data, settings, source, device, config.max_text_tokens)

    def draw_clips(step: int) -> Clips:
        latents, captions = cache.batch(step, size, seed)
        return Clips(captions, latents)

    def draw_prompts(step: int) -> Clips:
        return Clips(cache.prompts(step, size, seed))

    return draw_clips if needs_clips else draw_prompts, texts


def student_settings(config: DistillConfig, settings: PipelineConfig) -> PipelineConfig:
    """The pipeline's settings with the student in the teacher's place."""
    schedule = student_schedule(config)
    return replace(
        settings,
        class_name=FEW_STEP,
        timesteps=tuple(round(t, 4) for t in schedule.timesteps.tolist()),
        defaults=replace(settings.defaults, num_inference_steps=len(schedule), guidance_scale=1.0),
    )


def load_networks(
    config: DistillConfig, settings: PipelineConfig, source: Path, device: torch.device
) -> tuple[WanDiT, WanDiT, WanDiT]:
    """Teacher, student, critic."""

    def build() -> WanDiT:
        return WanDiT(settings.transformer, config.attention, config.checkpoint_blocks)

    teacher = load_frozen(build, source, "transformer", device, torch.float32)
    critic = copy.deepcopy(teacher).requires_grad_(True)
    student = copy.deepcopy(critic)
    if config.student.start is not None:
        start_from = open_checkpoint(resolve_model(config.student.start) / "transformer")
        student.load_state_dict(load_state(start_from, "transformer"))
    for module, lora in ((student, config.student.lora), (critic, config.scores.critic_lora)):
        if lora.rank:
            generator = torch.Generator().manual_seed(config.seed)
            add_lora(module, lora.rank, lora.alpha, generator=generator)
    return teacher, student, critic


def read_teacher(config: DistillConfig, source: Path) -> PipelineConfig:
    settings = read_pipeline_config(source)
    if settings.class_name == FEW_STEP:
        raise WanError(
            f"checkpoint={config.checkpoint}: is a few-step student itself; a teacher is a "
            "WanPipeline, such as builtin:miniature-teacher"
        )
    if settings.boundary_ratio is not None:
        raise WanError(f"{source}: a model of two experts; models with one transformer only")
    if config.first_frame_share and not settings.expand_timesteps:
        raise WanError(
            f"first_frame_share={config.first_frame_share}: this model takes no first frame "
            "(expand_timesteps is false in its model_index.json)"
        )
    return settings


def plan_request(config: DistillConfig) -> PlanRequest:
    """The run as `train.plan` reckons it; of the teacher, only settings are read."""
    source = resolve_model(config.checkpoint, patterns=CONFIGS)
    settings, machines, parallel = read_teacher(config, source), config.machines, config.parallel
    return PlanRequest(
        settings.transformer,
        latent_shape(config, settings)[1:],
        text_rows=machines.text_rows,
        student_rank=config.student.lora.rank,
        critic_rank=config.scores.critic_lora.rank,
        steps=len(config.student.timesteps),
        critic_ratio=config.scores.critic_ratio,
        guidance=config.scores.guidance_scale != 1,
        batch_size=config.batch_size,
        bfloat16=config.bfloat16,
        checkpoint_blocks=config.checkpoint_blocks,
        num_gpus=machines.num_gpus,
        shard=parallel.shard,
        replicate=parallel.replicate,
        sequence=parallel.sequence,
        gpu_memory=machines.gpu_memory_gb * 1e9,
        other_bytes=machines.other_gb * 1e9,
        rate=machines.tflops * 1e12,
        iterations=config.loop.steps,
    )


def distill(config: DistillConfig) -> int:
    if config.plan:
        print(format_plan(plan(plan_request(config))))
        return 0
    torch.set_num_threads(config.threads)
    source = resolve_model(config.checkpoint)
    folder = Path(config.output_dir)
    settings = read_teacher(config, source)
    student_schedule(config)  # refuses a wrong list before anything is loaded
    config.data.check_source()
    with start(config.parallel, config.device) as world:
        return run_distillation(config, settings, source, folder, world)


def run_distillation(
    config: DistillConfig, settings: PipelineConfig, source: Path, folder: Path, world: World
) -> int:
    device = world.device
    folder.mkdir(parents=True, exist_ok=True)
    vae = load_frozen(partial(WanVAE, settings.vae), source, "vae", device, torch.float32)
    draw, texts = open_source(config, settings, source, device)
    teacher, student, critic = load_networks(config, settings, source, device)
    half = torch.bfloat16 if config.bfloat16 else torch.float32
    teacher.attention.verify(settings.transformer.attention_head_dim, device, half)
    for module in (teacher, student, critic):
        if config.compile:
            for block in module.blocks:
                block.compile()
        world.prepare(module, config.bfloat16)
    run = Distillation(config, settings, teacher, student, critic, texts, draw, world)
    if config.regression.weight:
        run.trajectories = make_trajectories(run, settings, source, folder)
    state = run.new_state()

    said = captions = None
    if config.data.kind == "world":
        said = world_panel(config.validation_captions, config.seed)
        captions = [one.text for one in said]
    else:
        captions = draw(0).captions[: config.validation_captions]
    reference = teacher_panel(run, settings, vae, captions, folder)

    def on_save(state: TrainState) -> dict[str, float]:
        with state.averages["student"].in_place(student):
            latents = run.sample_panel(captions, None)
        samples = decode(vae, latents)
        three = decode(vae, run.triptych(latents[:1], captions[0])).videos
        fps = settings.defaults.fps
        write_pictures(
            folder / "samples",
            state.step,
            samples,
            reference,
            list(three),
            lambda path, video: write_video(path, to_uint8(video), fps),
        )
        return panel_numbers(samples, reference, said)

    finished = run_training(state, run.train_step, config.loop, folder, asdict(config), on_save)
    if not finished:
        return INTERRUPTED
    if config.export == "best" and (best := best_checkpoint(folder / "checkpoints")):
        state.load_tree(load_checkpoint(best))
        print(f"the healthiest checkpoint is {best.name}")
    state.averages["student"].copy_to(student)
    final, rank = student_settings(config, settings), config.student.lora.rank
    if rank:
        print(f"wrote {export_model(student, source, final, folder, rank)}")
        fold_lora(student)
    print(f"wrote {export_model(student, source, final, folder, lora_rank=0)}")
    return 0


def teacher_panel(
    run: Distillation, settings: PipelineConfig, vae: WanVAE, captions: list[str], folder: Path
) -> Samples:
    """The teacher's samples for the panel; made once and kept."""
    path = folder / "teacher_panel.safetensors"
    if not path.exists():
        schedule = euler_schedule(run.config.validation_steps, settings.shift)
        beside = path.with_suffix(".part")
        save_file({"latents": run.sample_panel(captions, schedule).cpu()}, beside)
        beside.replace(path)
    return decode(vae, load_file(path)["latents"].to(run.device))


def make_trajectories(
    run: Distillation, settings: PipelineConfig, source: Path, folder: Path
) -> Trajectories:
    regression, config = run.config.regression, run.config
    guidance = regression.guidance_scale or config.scores.guidance_scale
    shift = regression.shift or settings.shift
    levels = run.schedule.sigmas[:-1].tolist()
    captions: list[str] = []
    batch = 0
    while len(captions) < regression.num_pairs:
        captions += run.draw(batch).captions
        batch += 1
    weights = sorted((source / "transformer").glob("*.safetensors"))
    return sample_trajectories(
        lambda texts: run.teacher_velocity(texts, guidance),
        captions[: regression.num_pairs],
        run.shape,
        levels,
        grid_through(levels, regression.steps, shift),
        folder / "trajectories",
        " ".join([*map(sha256_file, weights), str(guidance), config.scores.negative_prompt]),
        run.device,
    )


if __name__ == "__main__":
    run_command(
        distill,
        DistillConfig,
        "distill",
        text_keys=("scores.negative_prompt",),
        path_keys=("output_dir", "checkpoint", "student.start", "data.folder", "data.cache_dir"),
        shortcuts=ATTENTION,
    )
