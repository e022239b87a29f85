"""Flow matching of a transformer on clips: the work of `train.finetune`."""

import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.cli import INTERRUPTED
from configs.progress import Steps, doing
from configs.training import FinetuneConfig
from train.artefact import Artefacts, TrainedLoRA, TrainedModel
from train.card import Origin
from train.conditioning import Texts, check_trainable, transformer_digest
from train.data import LatentCache, open_data
from train.held_out import held_out_loss, hold_out, said_of
from train.kept import KeptRun
from train.loop import CLIPS, MODEL_DIGEST, check_apart, run_training, step_generator
from train.lora import StartLoRA, kept_scales, read_start, train_lora, warn_of_attention
from train.losses import flow_matching_loss, sample_sigmas
from train.metrics import check_mirrors
from train.optim import (
    EMA,
    apply_gradients,
    learning_rate,
    make_optimizers,
    trainable,
    warn_of_warmup,
    with_precision,
)
from train.parallel import Ranks, even_slices, start
from train.rollout import sampler_velocity
from train.samples import Sampler, open_sampler, sample_prompts, sampling_plan
from train.state import TrainState
from train.validation import decode_clip, read_clip, shares, world_panel
from wan.errors import WanError, errors_about
from wan.files import expanded, read_json
from wan.miniature.detect import Score
from wan.miniature.world import NUM_FRAMES, STAGE
from wan.models.dit import WanDiT
from wan.models.dit_config import DiTConfig
from wan.models.umt5 import UMT5Config
from wan.models.vae import VAEConfig, WanVAE
from wan.pipeline.config import (
    BASE,
    FEW_STEP,
    PipelineConfig,
    SamplingDefaults,
    component_config,
    override_defaults,
    part_folder,
    read_pipeline_config,
)
from wan.sampling.denoiser import Condition, predict_velocity
from wan.sampling.flow import add_noise, velocity_target
from wan.sampling.noise import draw_noise, sample_generators
from wan.sampling.samplers import sample_euler
from wan.sampling.schedule import NUM_TIMESTEPS, euler_schedule
from wan.sampling.scheduler_config import SchedulerSettings
from wan.weights.checkpoint import open_checkpoint
from wan.weights.hub import resolve_model
from wan.weights.load import load_module

LORA_START = "lora_start"  # what a run keeps of its lora.start=


def read_settings(config: FinetuneConfig, folder: Path) -> PipelineConfig:
    """The released settings, or for a network from scratch those of the frozen parts and `dit`."""
    if not config.from_scratch:
        settings = read_pipeline_config(folder)
        if settings.class_name == FEW_STEP and not config.few_step:
            raise WanError(
                f"checkpoint={config.checkpoint}: is a few-step student. Flow matching teaches the "
                "velocity between any two noise levels, of which its few jumps know nothing: it "
                "would unlearn them. Train the model that it was distilled from, as a LoRA that "
                "the student takes too, or distil again; few_step=true trains it all the same"
            )
        check_trainable(settings, folder, config.first_frame_share)
        return settings
    parts = {
        name: read_json(component_config(folder, name, {})) for name in ("vae", "text_encoder")
    }
    with errors_about("dit="):
        transformer = DiTConfig.from_json(config.dit)
    return PipelineConfig(
        class_name=BASE,
        transformer=transformer,
        vae=VAEConfig.from_json(parts["vae"]),
        text_encoder=UMT5Config.from_json(parts["text_encoder"]),
        expand_timesteps=config.first_frame_share > 0,
        scheduler=SchedulerSettings(shift=config.shift),
        defaults=override_defaults(SamplingDefaults(), config.sampling, "sampling"),
    )


def build_dit(
    config: FinetuneConfig,
    settings: PipelineConfig,
    folder: Path,
    ranks: Ranks,
    start_from: StartLoRA | None = None,
) -> WanDiT:
    """The transformer to train, in float32, ready for this process."""

    def build() -> WanDiT:
        return WanDiT(settings.transformer, config.attention, config.checkpoint_blocks)

    generator = torch.Generator().manual_seed(config.seed)
    if config.from_scratch:
        dit = build()
        dit.init_weights(generator)
        dit.to(ranks.loading_device)
    else:
        dit = load_module(
            build,
            open_checkpoint(part_folder(folder, "transformer"), model=folder),
            "transformer",
            dtype=torch.float32,
            device=ranks.loading_device,
            share_mapping=ranks.size > 1,  # shards are copies of their own
        )
        train_lora(dit, config.lora, start_from, generator)
    if config.compile:
        for block in dit.blocks:
            block.compile()
    ranks.prepare(dit, bool(config.bfloat16))
    return dit


def make_train_step(
    dit: WanDiT, texts: Texts, cache: LatentCache, config: FinetuneConfig, ranks: Ranks
) -> Callable[[TrainState], dict[str, float]]:
    """One step of flow matching on this process's share of a batch."""
    device = ranks.device
    own = ranks.share(config.batch_size, config.gradient_accumulation)
    parts = even_slices(own.stop - own.start, config.gradient_accumulation)
    weights = list(trainable(dit).values())

    def train_step(state: TrainState) -> dict[str, float]:
        generator = step_generator(config.seed, state.step)
        x0, captions = cache.batch(state.step, config.batch_size, config.seed)
        dropped = torch.rand(len(captions), generator=generator) < config.caption_dropout
        captions = ["" if drop else text for text, drop in zip(captions, dropped, strict=True)]
        sigma = sample_sigmas(len(x0), config.shift, generator)
        noise = torch.randn(x0.shape, generator=generator)
        given = float(torch.rand((), generator=generator)) < config.first_frame_share
        given = given and x0.shape[2] > 1  # of a single frame nothing would be left to make

        # All draws are of the whole batch: what a sample is does not depend on who computes it.
        x0, noise, sigma, captions = x0[own], noise[own], sigma[own], captions[own]
        total = sum(
            one_part(x0[rows], noise[rows], sigma[rows], captions[rows], given) for rows in parts
        )
        lr = learning_rate(state.step, config.lr, config.loop.steps, config.warmup, final=0.02)
        norm = apply_gradients(state.optimizers, weights, lr, config.grad_clip)
        state.averages["dit"].update(dit)
        return {"loss": total, "grad_norm": norm, "lr": lr, CLIPS: float(config.batch_size)}

    def one_part(
        x0: Tensor, noise: Tensor, sigma: Tensor, captions: list[str], given: bool
    ) -> float:
        """Add a part's gradient to the weights'; returns its part of the mean loss."""
        x0, noise, sigma = (each.to(device) for each in (x0, noise, sigma))
        context, num_tokens = texts(captions)
        condition = Condition(context, num_tokens, x0[:, :, :1] if given else None)
        x = add_noise(x0, noise, sigma)
        with torch.autocast(device.type, torch.bfloat16, enabled=bool(config.bfloat16)):
            velocity = predict_velocity(dit, x, NUM_TIMESTEPS * sigma, condition)
        weight = condition.frame_weight(x.shape[2])
        loss = flow_matching_loss(velocity, velocity_target(x0, noise), weight) / len(parts)
        loss.backward()
        return loss.item()

    return train_step


@torch.no_grad()
def validate(
    dit: WanDiT, texts: Texts, vae: WanVAE, config: FinetuneConfig, ranks: Ranks
) -> dict[str, float]:
    """Sample clips for held-out captions of the world and let the detectors read them."""
    captions = world_panel(config.validation_captions, config.seed, kinds=[(1, 0.0)])
    schedule = euler_schedule(config.validation_steps, config.shift)
    side = STAGE // vae.config.spatial_stride
    shape = (vae.config.z_dim, vae.config.latent_frames(NUM_FRAMES), side, side)

    def found(numbers: list[int]) -> list[Score]:
        said = [captions[number].text for number in numbers]
        context, num_tokens = texts(said + [""] * len(said))
        condition, null = (Condition(part, num_tokens) for part in context.chunk(2))
        guidance, bfloat16 = config.validation_guidance, bool(config.bfloat16)
        velocity = sampler_velocity(dit, condition, null, guidance, bfloat16)
        x = draw_noise(shape, sample_generators(numbers, len(numbers))).to(texts.device)
        with Steps("steps", len(schedule), quiet=not ranks.is_main) as steps:
            latents = sample_euler(velocity, x, schedule, lambda *_: steps.add())
        return [
            read_clip(decode_clip(vae, clip), captions[number])
            for number, clip in zip(numbers, latents, strict=True)
        ]

    own = ranks.share(config.batch_size, config.gradient_accumulation)
    at_once = (own.stop - own.start) // config.gradient_accumulation  # as in training
    numbers = range(len(captions))
    return shares(ranks.spread(found, numbers, at_once, "captions sampled and read"), "val")


def artefacts_of(
    config: FinetuneConfig, start_from: dict[str, Any] | None, source: Callable[[], Path]
) -> Artefacts:
    """What becomes of the trained transformer: a LoRA file, or a folder with all weights.

    Args:
        start_from: what the run keeps of `lora.start`.
        source: gives the folder of the model that training starts from; not called for a LoRA.
    """
    if config.lora.active:
        file = TrainedLoRA(kept_scales(config.lora, start_from), config.attention)
        return Artefacts("dit", [file])
    folder = source()
    origin = Origin.of("train.finetune", config)
    settings = read_settings(config, folder)
    model = TrainedModel(folder, settings, config.attention, origin=origin)
    return Artefacts("dit", [model])


def left_by(run: KeptRun) -> Artefacts:
    """What becomes of the transformer of a run, by what the run's folder holds."""
    config = run.config(FinetuneConfig)

    def source() -> Path:
        return run.model("checkpoint", config.checkpoint, MODEL_DIGEST, transformer_digest)

    return artefacts_of(config, run.settings.get(LORA_START), source)


def finetune(config: FinetuneConfig) -> int:
    config.data.check_source()
    check_mirrors(config.loop)
    config = replace(config, sample_prompts=sample_prompts(config))  # as they are read now
    torch.set_num_threads(config.threads)
    with start(config.parallel, config.device) as ranks:
        config = with_precision(config, expanded(config.output_dir), ranks)
        return train(config, ranks)


def train(config: FinetuneConfig, ranks: Ranks) -> int:
    ranks.share(config.batch_size, config.gradient_accumulation)  # refuses before anything is made
    with ranks.main_first():  # it downloads
        source = resolve_model(config.checkpoint)
    folder = expanded(config.output_dir)
    check_apart(folder, {f"checkpoint={config.checkpoint}": source})
    settings = read_settings(config, source)
    plan = sampling_plan(config, settings) if config.sample_prompts else None
    with ranks.main_first():  # it may download
        start_from = read_start(config.lora, settings.transformer)
    if start_from is not None:
        check_apart(folder, {f"lora.start={config.lora.start}": Path(start_from.lora.path)})
    if ranks.is_main:
        warn_of_warmup(config.loop.steps, config.warmup)
        warn_of_attention(start_from, str(config.attention))
    folder.mkdir(parents=True, exist_ok=True)

    with ranks.main_first():  # it encodes clips
        cache, texts, vae = open_data(config.data, settings, source, ranks, config.max_text_tokens)
    held: list[int] = []
    if config.validation_clips:
        cache, held = hold_out(cache, config.validation_clips)
        if ranks.is_main:
            print(said_of(cache, held), file=sys.stderr)
    if ranks.is_main and (warning := cache.repeats_in_batches(config.batch_size)):
        print(warning, file=sys.stderr)
    sampler: Sampler | None = None
    if plan is not None:
        shape = max(zip(cache.buckets, cache.shapes, strict=True), key=lambda of: len(of[0]))[1]
        sampler = open_sampler(config, settings, source, plan, shape, ranks, vae)
    with doing("loading the transformer", quiet=not ranks.is_main):
        dit = build_dit(config, settings, source, ranks, start_from)
    half = torch.bfloat16 if config.bfloat16 else torch.float32
    dit.attention.verify(settings.transformer.attention_head_dim, ranks.device, half)
    average = EMA(dit, config.ema_decay)
    state = TrainState(
        {"dit": dit},
        make_optimizers(dit, config.optimizer, config.lr, weight_decay=config.weight_decay),
        {"dit": average},
    )

    def on_save(state: TrainState) -> dict[str, float]:
        every, last = config.sample_every, state.step == config.loop.steps
        sampling = sampler is not None and (not every or state.step % every == 0 or last)
        samples: dict[str, dict[int, Tensor]] = {}
        values: dict[str, float] = {}

        def look(weights: str, prefix: str) -> None:
            """Measure and sample the network as it is now."""
            if held:
                loss = held_out_loss(dit, texts, cache, held, bool(config.bfloat16), ranks, prefix)
                values.update(loss)
            if sampling and sampler is not None:
                samples[weights] = sampler.sample(dit)

        if not (held or sampling or config.validation_captions):
            return {}
        look("current", "val_loss")
        with average.in_place(dit):
            if config.ema_decay:  # at 0 the average is the current weights
                look("ema", "val_loss_ema")
            if config.validation_captions and vae is not None:
                values.update(validate(dit, texts, vae, config, ranks))
            ranks.reshard(dit)
        if sampling and sampler is not None:
            sampler.write(folder / "samples", state.step, samples)
        return values

    train_step = make_train_step(dit, texts, cache, config, ranks)
    identity = asdict(config) | cache.identity()
    if not config.from_scratch:
        identity[MODEL_DIGEST] = ranks.first(transformer_digest(source) if ranks.is_main else "")
    if start_from is not None:
        identity[LORA_START] = start_from.to_json()
    artefacts = artefacts_of(config, identity.get(LORA_START), lambda: source)
    loop = config.loop
    if not run_training(
        state, train_step, loop, folder, identity, on_save, ranks, artefacts, schema=type(config)
    ):
        return INTERRUPTED
    artefacts.write_end(state, folder, ranks)
    return 0
