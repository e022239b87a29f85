"""One iteration of distribution matching distillation, readable from `train_step` down.

Source: DMD2, arXiv:2405.14867: backward simulation, two time scales, an optional adversarial term;
DMD, arXiv:2311.18828: the optional regression onto trajectories; pi-Flow, arXiv:2510.14974: the one
from the student's own states. The formulas are in `train.losses`, the student's chain in
`train.rollout`, the teacher's in `train.trajectories`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from configs.distillation import DistillConfig
from configs.progress import Steps
from train.conditioning import Texts
from train.gan import Discriminator, block_numbers, noised_logits
from train.loop import CLIPS, Diverged, step_generator
from train.losses import (
    adversarial_loss,
    discriminator_loss,
    dmd_gradient,
    dmd_normalizer,
    flow_matching_loss,
    loss_with_gradient,
    mean_squared_error,
    sample_score_sigmas,
)
from train.optim import EMA, apply_gradients, learning_rate, make_optimizers, trainable
from train.parallel import Ranks, even_slices, joined
from train.rollout import (
    autocast,
    draw_exits,
    guided_x0,
    predict_x0,
    roll_out,
    sampler_velocity,
    states_at_exits,
    x0_at_exits,
)
from train.state import TrainState
from train.trajectories import Trajectories, follow_flow
from train.validation import saturated_share
from wan.errors import WanError
from wan.models.dit import WanDiT
from wan.pipeline.config import PipelineConfig
from wan.runtime.memory_meter import peak_memory
from wan.sampling.denoiser import Condition, guided_velocity, predict_velocity
from wan.sampling.flow import add_noise, velocity_target, x0_from_velocity
from wan.sampling.noise import draw_noise, sample_generators
from wan.sampling.samplers import sample_euler, sample_few_step
from wan.sampling.schedule import NUM_TIMESTEPS, Schedule, few_step_schedule

T = TypeVar("T")

CRITIC_BINS = 5  # the critic's loss is logged by noise level, in as many bins of [0, 1]
PANEL_SEED = 1_000_000  # noise of the validation samples: sample i has this plus i


@dataclass(frozen=True)
class Clips:
    """The data of a step: captions, and latents of clips where a term needs them."""

    captions: list[str]
    latents: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """What an update is made from: this process's samples, or a part of them.

    Attributes:
        condition: encoded captions.
        null: the encoded negative prompt, repeated once per caption.
        clips: (B, C, T, H, W), or None.
        schedule: the student's steps, K of them.
        exits: (B,), at which step each sample leaves the chain.
        for_all: as `states_at_exits` takes it: the last exit of all processes, or 0 alone.
        chain: K of (B, C, T, H, W): the noise that the student's chain starts from, then what each
            step puts back.
        sigma: (B,), noise levels at which scores are compared.
        noise: (B, C, T, H, W), what samples are noised with there.
        guidance: of the teacher, for all samples or (B, 1, 1, 1, 1) for each.
        shown: (B,), where the teacher sees the clip instead of the student's sample; None: nowhere.
    """

    condition: Condition
    null: Condition
    clips: Tensor | None
    schedule: Schedule
    exits: Tensor
    for_all: int
    chain: list[Tensor]
    sigma: Tensor
    noise: Tensor
    guidance: float | Tensor
    shown: Tensor | None


@dataclass(frozen=True)
class Networks:
    """The three roles: the teacher is frozen, student and critic are trained.

    Attributes:
        critic: None without distribution matching, which alone asks it.
    """

    student: WanDiT
    teacher: WanDiT
    critic: WanDiT | None


class Distillation:
    """The networks and the two updates; everything a step does, readable from `train_step` down."""

    def __init__(
        self,
        config: DistillConfig,
        settings: PipelineConfig,
        networks: Networks,
        texts: Texts,
        draw: Callable[[int], Clips],
        ranks: Ranks,
    ) -> None:
        self.config, self.texts, self.draw, self.ranks = config, texts, draw, ranks
        self.student, self.teacher = networks.student, networks.teacher
        self.critic = networks.critic
        self.trajectories: Trajectories | None = None
        self.teacher_std = 1.0  # of the teacher's own samples, once they are there
        # By the step that a sample leaves the chain at: the least and greatest spread of a clip.
        self.healthy = [(1.0, 1.0)] * len(config.student.timesteps)
        self.device = texts.device
        self.own = ranks.share(config.batch_size, config.gradient_accumulation)
        # Rows of them that are in memory at once: in sampling as in training.
        self.chunk = (self.own.stop - self.own.start) // config.gradient_accumulation
        self.rows = even_slices(self.own.stop - self.own.start, config.gradient_accumulation)
        self.schedules = student_schedules(config)
        self.schedule = self.schedules[0]  # in which the student is sampled
        self.shape: tuple[int, ...] = latent_shape(config, settings)
        self.gan_blocks: list[int] = []
        self.discriminator: Discriminator | None = None
        if config.gan.weight:
            layers = settings.transformer.num_layers
            self.gan_blocks = block_numbers(config.gan.blocks, layers)
            with torch.random.fork_rng(devices=[]):  # the same in all processes
                torch.manual_seed(config.seed)
                width = settings.transformer.width
                self.discriminator = Discriminator(width, len(self.gan_blocks))
            self.discriminator.to(ranks.loading_device)
            ranks.prepare(self.discriminator)

    # --- state ------------------------------------------------------------------------------------

    def new_state(self) -> TrainState:
        config = self.config
        betas = (config.beta1, config.beta2)
        trained = {
            "student": self.student,
            "critic": self.critic,
            "discriminator": self.discriminator,
        }
        modules: dict[str, nn.Module] = {n: net for n, net in trained.items() if net is not None}
        rates = {name: config.lr if name == "student" else config.critic_lr for name in modules}
        optimizers = {
            name: make_optimizers(module, "adamw", rates[name], betas, config.weight_decay)["adamw"]
            for name, module in modules.items()
        }
        return TrainState(modules, optimizers, {"student": EMA(self.student, config.ema_decay)})

    # --- one iteration ----------------------------------------------------------------------------

    def train_step(self, state: TrainState) -> dict[str, float]:
        """Every `critic_ratio`-th iteration the student moves, and the critic follows in each.

        Without distribution matching there is no critic to follow, and the student always moves.
        """
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
        config, values = self.config, dict[str, float]()
        total = 0.0
        # One backward pass per term: no two of them hold their activations at once.
        if config.dmd_weight:
            found = []
            for batch in self.batches(state.step, generator):
                loss, numbers = self.matching_loss(state.step, batch)
                total += self.backward(loss)
                found.append(numbers)
            values = joined(found)
            self.check_spread(state.step, values)
        if self.trajectories is not None:
            values["regression"] = 0.0
            weight = config.regression.weight_at(state.step, config.loop.steps)
            for pairs in self.pairs(generator):
                loss = self.regression_loss(state.step, *pairs)
                values["regression"] += float(loss.detach()) / len(self.rows)
                total += self.backward(weight * loss)
        if config.on_policy.weight:
            values["on_policy"] = 0.0
            for batch in self.batches(state.step, generator, first_exit=1):
                loss = self.on_policy_loss(state.step, batch)
                values["on_policy"] += float(loss.detach()) / len(self.rows)
                total += self.backward(config.on_policy.weight * loss)
        check_gradients(state.step, "student", self.student)
        lr = self.rate(state.step, config.lr)
        parameters = trainable(self.student).values()
        values["student_grad_norm"] = apply_gradients(
            {"student": state.optimizers["student"]}, parameters, lr, config.grad_clip
        )
        for bystander in (self.critic, self.discriminator):  # the adversarial term passed them
            if bystander is not None:
                bystander.zero_grad(set_to_none=True)
        state.averages["student"].update(self.student)
        counted = {"memory_gb": peak_memory_gb(self.device), CLIPS: float(config.batch_size)}
        return values | {"loss_student": total, "lr": lr, **counted}

    def backward(self, loss: Tensor) -> float:
        """Add the gradient of a part's mean loss; returns its share of the whole mean."""
        loss = loss / len(self.rows)
        loss.backward()
        return float(loss.detach())

    def matching_loss(self, step: int, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """DMD's weighted loss on fresh samples of the student, the adversarial term added."""
        config = self.config
        condition, null, sigma, noise = batch.condition, batch.null, batch.sigma, batch.noise
        assert self.critic is not None
        x0 = self.sample_student(batch)
        weight = condition.frame_weight(x0.shape[2])
        with torch.no_grad(), self.autocast():
            x = add_noise(x0, noise, sigma)
            x0_critic = predict_x0(self.critic, x, sigma, condition)
            if batch.shown is not None:
                assert batch.clips is not None
                # Data forcing, arXiv:2606.18478: the teacher's score where the data are
                there = add_noise(batch.clips, noise, sigma)
                x = torch.where(batch.shown[:, None, None, None, None], there, x)
            x0_teacher = guided_x0(self.teacher, x, sigma, condition, null, batch.guidance)
            gradient = dmd_gradient(x0, x0_teacher, x0_critic, weight)
        check_finite(step, x0_student=x0, x0_critic=x0_critic, x0_teacher=x0_teacher)
        loss = config.dmd_weight * loss_with_gradient(x0, gradient)
        values = {
            "dmd_gradient": float(gradient.square().mean().sqrt()),
            "dmd_normalizer": float(dmd_normalizer(x0.detach(), x0_teacher, weight).mean()),
            "student_mean": float(x0.detach().mean()),
            "student_std": float(x0.detach().std()),
            "student_drift": float(x0.detach().std()) / self.teacher_std,
            **self.spreads(x0.detach(), batch.exits),
            "student_max": float(x0.detach().abs().max()),
            "student_saturated": saturated_share(x0),
            "teacher_saturated": saturated_share(x0_teacher),
        }
        counts = torch.bincount(batch.exits, minlength=len(self.schedule)).tolist()
        values |= {f"exits_{i}": float(count) for i, count in enumerate(counts)}
        if self.discriminator is not None:
            with self.autocast():
                logits = self.logits(x0, noise, sigma, condition)
            adversarial = adversarial_loss(logits)
            loss = loss + config.gan.weight * adversarial
            values["gan_student"] = float(adversarial.detach())
        return loss, values

    def spreads(self, x0: Tensor, exits: Tensor) -> dict[str, float]:
        """Mean spread of clips (B, C, T, H, W), and the least and greatest healthy ones for it."""
        low, high = torch.tensor(self.healthy)[exits].mean(0).tolist()
        own = float(spread_of_clips(x0).mean())
        return {"clip_spread": own, "clip_spread_low": low, "clip_spread_high": high}

    def check_spread(self, step: int, values: dict[str, float]) -> None:
        """Stop where the samples of all processes spread more or less than the teacher's can.

        Early in the chain x0 is close to a mean over all clips of a caption, whose spread is small;
        a good student comes from there to the spread of finished samples. So both are healthy, and
        which clips and steps a batch has by chance does not matter.

        Raises:
            Diverged: the mean over clips is beyond `max_drift` times what `measure_teacher` found.
        """
        names = ("clip_spread", "clip_spread_low", "clip_spread_high")
        found = self.ranks.mean({name: values[name] for name in names})
        (spread, low, high), factor = (found[name] for name in names), self.config.max_drift
        if not low / factor < spread < high * factor:
            raise Diverged(
                f"step {step}: diverged: the student's clips spread by {spread:.3g}, the "
                f"teacher's by {low:.3g} to {high:.3g} from the same steps on "
                f"(max_drift={factor:g}); lower lr or scores.guidance_scale"
            )

    def pairs(self, generator: torch.Generator) -> Iterator[tuple[Schedule, Tensor, Tensor]]:
        """The student's steps, numbers of trajectories and which step (B,), part by part."""
        assert self.trajectories is not None
        count = len(self.trajectories.captions)
        schedule = self.draw_schedule(generator)
        numbers = torch.randint(count, (self.config.batch_size,), generator=generator)[self.own]
        exits = self.exits("stratified", generator)[self.own]
        for rows in self.rows:
            yield schedule, numbers[rows], exits[rows]

    def regression_loss(
        self, step: int, schedule: Schedule, numbers: Tensor, exits: Tensor
    ) -> Tensor:
        """Squared distance of the student's x0 from where the teacher's trajectory ends."""
        assert self.trajectories is not None
        x, target, captions = self.trajectories.batch(numbers.tolist(), schedule.sigmas[exits])
        condition = Condition(*self.texts(captions))
        with self.autocast():
            x0 = x0_at_exits(self.student, x.to(self.device), condition, schedule, exits)
        check_finite(step, x0_student=x0)
        return mean_squared_error(x0, target.to(self.device))

    def on_policy_loss(self, step: int, batch: Batch) -> Tensor:
        """Squared distance of the student's x0 from where the teacher goes from the same state.

        The states are the student's own, so its mistakes of the steps before are in them.
        """
        config, condition = self.config, batch.condition
        scale, way = config.on_policy_guidance, (config.on_policy.steps, config.on_policy.shift)
        chain = (batch.exits, batch.chain, config.student.deterministic, batch.for_all)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            timesteps = NUM_TIMESTEPS * sigma
            return guided_velocity(self.teacher, x, timesteps, condition, batch.null, scale)

        with torch.no_grad(), self.autocast():
            x = states_at_exits(self.student, condition, batch.schedule, *chain)
            sigmas = batch.schedule.sigmas[batch.exits].to(x.device)
            end = follow_flow(velocity, x, sigmas, *way)
        with self.autocast():
            x0 = x0_at_exits(self.student, x, condition, batch.schedule, batch.exits)
        check_finite(step, x0_student=x0, x0_teacher=end)
        weight = condition.frame_weight(x0.shape[2])
        return mean_squared_error(x0, condition.impose(end), weight)

    def update_critic(self, state: TrainState, generator: torch.Generator) -> dict[str, float]:
        """Flow matching on new samples of the student as it is now."""
        config = self.config
        found = []
        for batch in self.batches(state.step, generator):
            loss, numbers = self.critic_loss(batch)
            self.backward(loss)
            found.append(numbers)
        values = joined(found)
        optimizers = {"critic": state.optimizers["critic"]}
        if self.discriminator is not None:
            optimizers["discriminator"] = state.optimizers["discriminator"]
        for name in optimizers:
            check_gradients(state.step, name, state.modules[name])
        lr = self.rate(state.step, config.critic_lr)
        parameters = [p for name in optimizers for p in trainable(state.modules[name]).values()]
        values["critic_grad_norm"] = apply_gradients(optimizers, parameters, lr, config.grad_clip)
        counted = {"memory_gb": peak_memory_gb(self.device), CLIPS: float(config.batch_size)}
        return values | {"critic_lr": lr, **counted}

    def critic_loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Flow matching on samples of the student, the discriminator's loss added."""
        condition, sigma, noise = batch.condition, batch.sigma, batch.noise
        assert self.critic is not None
        with torch.no_grad():
            x0 = self.sample_student(batch)
        self.ranks.reshard(self.student)
        weight = condition.frame_weight(x0.shape[2])
        with self.autocast():
            x = add_noise(x0, noise, sigma)
            velocity = predict_velocity(self.critic, x, NUM_TIMESTEPS * sigma, condition)
        target = velocity_target(x0, noise)
        loss = flow_matching_loss(velocity, target, weight)
        values = {"critic_loss": float(loss.detach()), **loss_by_level(velocity, target, sigma)}
        if self.discriminator is not None:
            assert batch.clips is not None
            with self.autocast():
                verdicts = [self.logits(x, noise, sigma, condition) for x in (batch.clips, x0)]
            told_apart = discriminator_loss(*verdicts)
            loss = loss + self.config.gan.critic_weight * told_apart
            values["gan_critic"] = float(told_apart.detach())
        return loss, values

    # --- what both updates need -------------------------------------------------------------------

    def batches(
        self, step: int, generator: torch.Generator, first_exit: int = 0
    ) -> Iterator[Batch]:
        """This process's samples of one update, in `gradient_accumulation` parts.

        With probability `first_frame_share` its first frames are given, unless clips are of a
        single frame, of which nothing would be left to make.

        Args:
            first_exit: the first step at which samples leave the chain.
        """
        drawn = self.draw(step)
        clips = None if drawn.latents is None else drawn.latents[self.own]
        captions = drawn.captions[self.own]
        given = float(torch.rand((), generator=generator)) < self.config.first_frame_share
        assert clips is not None or not given
        shape = self.shape if clips is None else clips.shape[1:]
        schedule = self.draw_schedule(generator)
        exits = self.exits(self.config.student.exits, generator, first_exit)
        for_all = int(exits.max()) if self.ranks.size > 1 else 0
        chain = [self.noise(shape, generator) for _ in range(len(schedule))]
        levels = self.score_levels(generator, schedule, exits)
        exits, sigma, noise = exits[self.own], levels[self.own], self.noise(shape, generator)
        scores = self.config.scores
        plain = self.share_above(levels, scores.unguided_share, scores.unguided_above, generator)
        shown = self.share_above(levels, scores.clip_share, scores.clip_above, generator)
        negative = self.config.scores.negative_prompt
        for rows in self.rows:
            part = None if clips is None else clips[rows].to(self.device)
            first = part[:, :, :1] if part is not None and given and shape[1] > 1 else None
            condition = Condition(*self.texts(captions[rows]), first)
            yield Batch(
                condition,
                Condition(*self.texts([negative] * len(condition.context)), first),
                part,
                schedule,
                exits[rows],
                for_all,
                [each[rows].to(self.device) for each in chain],
                sigma[rows].to(self.device),
                noise[rows].to(self.device),
                scores.guidance_scale if plain is None else self.guidance(plain[rows]),
                None if shown is None else shown[rows].to(self.device),
            )

    def guidance(self, plain: Tensor) -> Tensor:
        """The teacher's guidance for each sample, (B, 1, 1, 1, 1): 1 where it is plain."""
        scale = torch.full(plain.shape, self.config.scores.guidance_scale)
        return scale.masked_fill(plain, 1.0)[:, None, None, None, None].to(self.device)

    def sample_student(self, batch: Batch) -> Tensor:
        """Samples of the student, (B, C, T, H, W)."""
        student = self.config.student
        chain = (batch.schedule, batch.exits, batch.chain, student.deterministic, batch.for_all)
        with self.autocast():
            return roll_out(self.student, batch.condition, *chain, student.truncate_gradient)

    # Randomness is drawn for the whole batch: a process takes its own samples of it.

    def draw_schedule(self, generator: torch.Generator) -> Schedule:
        """The student's steps for one update."""
        if len(self.schedules) == 1:
            return self.schedule
        return self.schedules[int(torch.randint(len(self.schedules), (), generator=generator))]

    def exits(self, how: str, generator: torch.Generator, first: int = 0) -> Tensor:
        """At which step from `first` on each sample of the whole batch leaves the chain, (B,)."""
        steps = len(self.schedule) - first
        return first + draw_exits(self.config.batch_size, steps, how, generator)

    def score_levels(self, generator: torch.Generator, schedule: Schedule, exits: Tensor) -> Tensor:
        """Noise levels at which the whole batch is compared, (B,)."""
        scores, batch = self.config.scores, self.config.batch_size
        bounds = (scores.lowest, scores.highest)
        # Phased DMD, arXiv:2510.27684, and TDM, arXiv:2503.06674: what the next step's noise hides
        # need not be right yet. Of the last exit, whose next level is 0, all levels are compared.
        above = schedule.sigmas[exits + 1] if scores.phased else None
        return sample_score_sigmas(batch, scores.shift, bounds, generator, scores.clamp, above)

    def share_above(
        self, levels: Tensor, share: float, lowest: float, generator: torch.Generator
    ) -> Tensor | None:
        """A share, by chance, of the samples above a noise level: (B,) bool; None for no share."""
        if not share:
            return None
        drawn = torch.rand(len(levels), generator=generator) < share
        return (drawn & (levels > lowest))[self.own]

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        noise = torch.randn(self.config.batch_size, *shape, generator=generator)
        return noise[self.own].clone()  # or the whole batch's would stay in memory

    def logits(self, x0: Tensor, noise: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        assert self.discriminator is not None
        host = self.critic if self.config.gan.host == "critic" else self.teacher
        assert host is not None  # the term stands beside distribution matching
        return noised_logits(self.discriminator, host, self.gan_blocks, x0, noise, sigma, condition)

    def rate(self, step: int, peak: float) -> float:
        config = self.config
        return learning_rate(step, peak, config.loop.steps, config.warmup, config.final_lr)

    def autocast(self) -> torch.autocast:
        return autocast(self.device, bool(self.config.bfloat16))

    # --- sampling for the panel and for trajectories ----------------------------------------------

    def teacher_velocity(
        self, captions: Sequence[str], guidance: float
    ) -> Callable[[Tensor, float], Tensor]:
        """The guided teacher's velocity as samplers call it."""
        condition = Condition(*self.texts(list(captions)))
        null = Condition(*self.texts([self.config.scores.negative_prompt] * len(captions)))
        return sampler_velocity(self.teacher, condition, null, guidance, bool(self.config.bfloat16))

    def start(self, generators: list[torch.Generator]) -> Tensor:
        """Pure noise of one sample each."""
        return draw_noise(self.shape, generators).to(self.device)

    @torch.no_grad()
    def panel(
        self,
        captions: Sequence[str],
        schedule: Schedule | None,
        look: Callable[[int, Tensor], T],
    ) -> list[T]:
        """Sample captions from the panel's noise and look at each clip where it was made.

        Args:
            schedule: of the teacher; None samples the student.
            look: (number, latents (C, T, H, W) on the device) -> what is kept of the clip; all
                processes get that, and no latents.
        """

        def sample(numbers: list[int]) -> list[T]:
            generators = sample_generators([PANEL_SEED + i for i in numbers], len(numbers))
            texts = [captions[i] for i in numbers]
            if schedule is None:
                latents = self.sample_few(self.student, texts, generators)
            else:
                velocity = self.teacher_velocity(texts, self.config.scores.guidance_scale)
                with Steps("steps", len(schedule), quiet=not self.ranks.is_main) as steps:
                    start = self.start(generators)
                    latents = sample_euler(velocity, start, schedule, lambda *_: steps.add())
            return [look(i, clip) for i, clip in zip(numbers, latents, strict=True)]

        what = f"clips of the {'student' if schedule is None else 'teacher'} sampled"
        found = self.ranks.spread(sample, range(len(captions)), self.chunk, what)
        self.ranks.reshard(self.student, self.teacher)
        return found

    @torch.no_grad()
    def measure_teacher(self, captions: Sequence[str], finished: Tensor) -> None:
        """Learn what spreads of clips are healthy.

        They lie between those of what the teacher sees at the student's steps, where a student
        begins, and those of its finished samples, where it is to end. Of several lists of steps,
        the first stands for all.

        Args:
            captions: of the panel, whose noise is used.
            finished: (B, C, T, H, W) samples of the teacher with guidance, on the CPU.
        """

        def spreads(numbers: list[int]) -> Tensor:
            seen: list[Tensor] = []
            generators = sample_generators([PANEL_SEED + i for i in numbers], len(numbers))
            texts = [captions[i] for i in numbers]
            self.sample_few(self.teacher, texts, generators, seen.append)
            return torch.stack([spread_of_clips(x0) for x0 in seen], dim=1)

        what = "clips of the teacher sampled in few steps"
        numbers = range(len(captions))
        found = self.ranks.spread_tensors(spreads, numbers, self.chunk, what)  # (B, K)
        self.ranks.reshard(self.teacher)
        found = torch.cat([found, spread_of_clips(finished)[:, None].expand_as(found)])
        self.healthy = list(zip(found.amin(0).tolist(), found.amax(0).tolist(), strict=True))

    def sample_few(
        self,
        dit: WanDiT,
        captions: list[str],
        generators: list[torch.Generator],
        on_x0: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Samples in the student's steps, made as it makes them when it is used.

        Args:
            on_x0: is given the clean latents that the network sees at each step.
        """
        condition = Condition(*self.texts(captions))
        network = sampler_velocity(dit, condition, condition, 1, bool(self.config.bfloat16))
        sigmas = iter(self.schedule.sigmas.tolist())

        def velocity(x: Tensor, timestep: float) -> Tensor:
            found = network(x, timestep)
            if on_x0 is not None:
                on_x0(x0_from_velocity(x, found, next(sigmas)))
            return found

        return sample_few_step(
            velocity,
            self.start(generators),
            self.schedule,
            renoise=lambda i: draw_noise(self.shape, generators),
            deterministic=self.config.student.deterministic,
        )

    @torch.no_grad()
    def triptych(self, x0: Tensor, text: str) -> Tensor:
        """A sample (1, C, T, H, W), then what teacher and critic make of it noised: (3, ...).

        Without a critic there are two.
        """
        condition = Condition(*self.texts([text]))
        null = Condition(*self.texts([self.config.scores.negative_prompt]))
        x0, sigma = x0.to(self.device), torch.full((1,), 0.7, device=self.device)
        x = add_noise(x0, draw_noise(self.shape, sample_generators(0, 1)).to(self.device), sigma)
        guidance = self.config.scores.guidance_scale
        with self.autocast():
            found = [x0, guided_x0(self.teacher, x, sigma, condition, null, guidance)]
            self.ranks.reshard(self.teacher)
            if self.critic is not None:
                found.append(predict_x0(self.critic, x, sigma, condition))
                self.ranks.reshard(self.critic)
        return torch.cat(found)


# --- checks and small measures --------------------------------------------------------------------


def check_finite(step: int, **tensors: Tensor) -> None:
    """Stop where a tensor has a number that is not finite; nothing is repaired.

    Raises:
        Diverged: names the step, the tensor and how many.
    """
    for name, tensor in tensors.items():
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise Diverged(f"step {step}: {bad} of {tensor.numel()} numbers in {name} not finite")


def check_gradients(step: int, role: str, module: nn.Module) -> None:
    """Stop where a gradient of a module is not finite; see `check_finite`."""
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            check_finite(step, **{f"the gradient of {role}.{name}": parameter.grad})


def spread_of_clips(x0: Tensor) -> Tensor:
    """Standard deviation of the latents of each clip, (B, C, T, H, W) -> (B,)."""
    return x0.flatten(1).float().std(1)


def loss_by_level(velocity: Tensor, target: Tensor, sigma: Tensor) -> dict[str, float]:
    """The critic's mean squared error in each bin of noise levels that occurs."""
    error = (velocity.detach().float() - target).square().flatten(1).mean(1)
    bins = (sigma * CRITIC_BINS).long().clamp(max=CRITIC_BINS - 1)
    return {
        f"critic_loss_sigma_{b / CRITIC_BINS:.1f}": float(error[bins == b].mean())
        for b in bins.unique().tolist()
    }


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held so far, in 10^9 bytes: by the GPU's tensors, or by this process on a CPU."""
    peak = peak_memory(device)
    return peak.get("cuda", peak["process"]) / 1e9


def student_schedules(config: DistillConfig) -> list[Schedule]:
    """The student's steps, for each of its lists.

    Raises:
        WanError: a list is wrong; or its second step leaves no room above it for the scores.
    """
    student, scores = config.student, config.scores
    found = [few_step_schedule(one, student.table_shift, student.warp) for one in student.lists]
    next_level = max(float(schedule.sigmas[1]) for schedule in found)
    if scores.phased and next_level >= scores.highest:
        raise WanError(
            f"scores.phased=true: the second step is at noise level {next_level:g}, and scores are "
            f"compared up to scores.highest={scores.highest:g}; give a higher one, or lower steps"
        )
    return found


def latent_shape(config: DistillConfig, settings: PipelineConfig) -> tuple[int, int, int, int]:
    defaults = settings.defaults
    return settings.latent_shape(
        config.height or defaults.height,
        config.width or defaults.width,
        config.num_frames or defaults.num_frames,
    )
