"""Teacher, critic and student trained together and exported: the work of `train.distill`."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.cli import INTERRUPTED
from configs.distillation import DistillConfig
from configs.progress import doing
from configs.training import LoRAConfig
from train.artefact import Artefacts, TrainedLoRA, TrainedModel
from train.card import Origin
from train.checkpoint import best_checkpoint, load_checkpoint
from train.conditioning import (
    Texts,
    check_same_part,
    check_trainable,
    component_digests,
    load_frozen,
    transformer_digest,
)
from train.data import open_data, world_texts
from train.dmd import Clips, Distillation, Networks, latent_shape, student_schedules
from train.estimate import TrainingRun, estimate_that_fits, format_estimate
from train.kept import KeptRun
from train.loop import LORA_STARTS, START_DIGEST, check_apart, run_training
from train.lora import StartLoRA, kept_scales, read_start, train_lora, warn_of_attention
from train.metrics import check_mirrors
from train.optim import warn_of_warmup, with_precision
from train.parallel import Ranks, start
from train.state import TrainState
from train.tensor_cache import key_of
from train.trajectories import Trajectories, grid_through, sample_trajectories
from train.validation import (
    SHOWN,
    ClipNumbers,
    Pictures,
    decode_clip,
    measure_clip,
    panel_numbers,
    sheet_of,
    world_panel,
    write_panel,
)
from wan.errors import WanError
from wan.files import expanded
from wan.media.video import to_uint8, write_video
from wan.miniature.captions import OMIT, caption
from wan.miniature.world import sample_scene, scene_rng
from wan.models.attention import network_attention
from wan.models.attention_config import AttentionConfig
from wan.models.dit import WanDiT
from wan.models.dit_config import DiTConfig
from wan.models.vae import WanVAE
from wan.pipeline.config import (
    FEW_STEP,
    PipelineConfig,
    part_folder,
    read_pipeline_config,
    released_config,
)
from wan.pipeline.folder import load_part
from wan.sampling.schedule import euler_schedule
from wan.weights.checked import read_checked, write_checked
from wan.weights.checkpoint import open_checkpoint
from wan.weights.hub import CONFIGS, resolve_model
from wan.weights.load import load_state
from wan.weights.safetensors_file import read_header

TEACHER_DIGEST = "teacher_digest"  # of the teacher's transformer, in what a run keeps


def world_captions(config: DistillConfig) -> Callable[[int], Clips]:
    """Captions of scenes of the training split, new ones in every step."""
    omits = config.omit or [OMIT]

    def draw(step: int) -> Clips:
        captions = []
        for i in range(config.batch_size):
            rng = scene_rng(config.data.seed, step * config.batch_size + i)
            scene = sample_scene(rng, "train", two_objects=config.data.two_objects)
            captions.append(caption(scene, rng, omits[i % len(omits)]).text)
        return Clips(captions)

    return draw


def open_source(
    config: DistillConfig, settings: PipelineConfig, source: Path, ranks: Ranks
) -> tuple[Callable[[int], Clips], Texts, dict[str, Any]]:
    """A function that draws batches, one that encodes captions, and the data's identity."""
    size, seed, device = config.batch_size, config.seed, ranks.device
    if config.draws_captions:
        texts = world_texts(settings, source, device, config.max_text_tokens)
        return world_captions(config), texts, {}
    cache, texts, _ = open_data(config.data, settings, source, ranks, config.max_text_tokens)
    texts([config.scores.negative_prompt])  # refused here, and not after the networks were loaded
    if config.needs_clips and ranks.is_main and (warning := cache.repeats_in_batches(size)):
        print(warning, file=sys.stderr)

    def draw_clips(step: int) -> Clips:
        latents, captions = cache.batch(step, size, seed)
        return Clips(captions, latents)

    def draw_prompts(step: int) -> Clips:
        return Clips(cache.prompts(step, size, seed))

    return draw_clips if config.needs_clips else draw_prompts, texts, cache.identity()


def student_settings(config: DistillConfig, settings: PipelineConfig) -> PipelineConfig:
    """The pipeline's settings with the student in the teacher's place."""
    schedule = student_schedules(config)[0]
    return replace(
        settings,
        class_name=FEW_STEP,
        timesteps=tuple(round(t, 4) for t in schedule.timesteps.tolist()),
        defaults=replace(
            settings.defaults,
            num_inference_steps=len(schedule),
            guidance_scale=1.0,
            deterministic=config.student.deterministic,
        ),
    )


def load_networks(
    config: DistillConfig,
    settings: PipelineConfig,
    source: Path,
    ranks: Ranks,
    starts: Mapping[str, StartLoRA | None] | None = None,
) -> Networks:
    """Teacher, student and, for distribution matching, critic: float32, ready for this process.

    Each is read and sharded before the next: every process holds one whole network at a time.

    Args:
        starts: what `read_starts` gave.
    """
    starts = starts or {}
    half = torch.bfloat16 if config.bfloat16 else torch.float32
    start_from = None
    if config.student.start is not None:
        folder = resolve_start(config.student.start)
        start_from = open_checkpoint(part_folder(folder, "transformer"), model=folder)

    def load(name: str, attention: AttentionConfig) -> WanDiT:
        """A network from the teacher's weights; all but the teacher are trained."""
        trained = name != "teacher"
        dit: WanDiT = load_part(
            source,
            "transformer",
            settings.transformer,
            {"attention": attention, "checkpoint_blocks": config.checkpoint_blocks},
            dtype=torch.float32,
            device=ranks.loading_device,
            share_mapping=ranks.size > 1 or not trained,  # shards are copies of their own
        )
        dit.requires_grad_(trained)
        dit.attention.verify(settings.transformer.attention_head_dim, ranks.device, half)
        if name == "student" and start_from is not None:
            dit.load_state_dict(load_state(start_from, "transformer"))
        if trained:
            generator = torch.Generator().manual_seed(config.seed)
            train_lora(dit, loras_of(config)[name], starts.get(name), generator)
        if config.compile:
            for block in dit.blocks:
                block.compile()
        ranks.prepare(dit, bool(config.bfloat16))
        return dit

    teacher = load("teacher", config.score_attention)
    student = load("student", config.attention)
    critic = load("critic", config.score_attention) if config.dmd_weight else None
    return Networks(student, teacher, critic)


def resolve_start(name: str) -> Path:
    """The folder of a student to start from."""
    try:
        return resolve_model(name)
    except WanError as error:
        raise WanError(f"student.start={error}; train that student first") from error


def loras_of(config: DistillConfig) -> dict[str, LoRAConfig]:
    """The settings of the networks that may be trained as LoRAs."""
    return {"student": config.student.lora, "critic": config.scores.critic_lora}


def read_starts(config: DistillConfig, transformer: DiTConfig) -> dict[str, StartLoRA | None]:
    """The LoRA files that student and critic go on with; None without one."""
    options = {"student": "student.lora", "critic": "scores.critic_lora"}
    return {
        name: read_start(lora, transformer, options[name])
        for name, lora in loras_of(config).items()
    }


def artefacts_of(
    config: DistillConfig,
    settings: PipelineConfig,
    start_from: dict[str, Any] | None,
    source: Path,
    base: Path,
) -> Artefacts:
    """What becomes of the student: a folder in the released layout, and before it a LoRA file.

    Args:
        settings: the teacher's.
        start_from: what the run keeps of `student.lora.start`.
        source: the teacher's folder, whose other parts are copied.
        base: the folder whose transformer the student started from.
    """
    final, attention = student_settings(config, settings), config.attention
    origin = Origin.of("train.distill", config)
    if not config.student.lora.active:
        return Artefacts("student", [TrainedModel(source, final, attention, origin=origin)])
    scales = kept_scales(config.student.lora, start_from)
    pairs = (part_folder(base, "transformer"), scales)
    folded = TrainedModel(source, final, attention, pairs, origin=origin)
    return Artefacts("student", [TrainedLoRA(scales, attention), folded])


def left_by(run: KeptRun) -> Artefacts:
    """What becomes of the student of a run, by what the run's folder holds."""
    config = run.config(DistillConfig)
    source = run.model("checkpoint", config.checkpoint, TEACHER_DIGEST, transformer_digest)
    base, start = source, config.student.start
    if start is not None and config.student.lora.active:
        base = run.model("start", start, START_DIGEST, transformer_digest)
    kept = run.settings.get(lora_start("student"))
    return artefacts_of(config, read_teacher(config, source), kept, source, base)


def lora_start(network: str) -> str:
    """Under which name a run keeps what it started a network's LoRA from."""
    return f"{network}_lora_start"


def read_teacher(config: DistillConfig, source: Path) -> PipelineConfig:
    """The settings of a model folder.

    Raises:
        WanError: the model cannot be the teacher of this run.
    """
    settings = read_pipeline_config(source)
    if settings.class_name == FEW_STEP:
        raise WanError(
            f"checkpoint={config.checkpoint}: is a few-step student itself; a teacher is a "
            "WanPipeline, such as builtin:miniature-teacher"
        )
    check_trainable(settings, source, config.first_frame_share)
    return settings


def warn_of_omit(config: DistillConfig) -> None:
    """Say so where captions come with clips or a folder, and a preset's `omit` has no part."""
    if config.omit and not config.draws_captions:
        print(
            f"warning: omit={config.omit} is for drawn captions of the miniature's world and not "
            "used: these come with the data (omit=[] says so)",
            file=sys.stderr,
        )


def check_world(config: DistillConfig, settings: PipelineConfig) -> None:
    """Refuse captions of the miniature's world for a model of something else."""
    _, _, height, width = latent_shape(config, settings)
    if config.data.kind == "world" and height != width:
        raise WanError(
            "data.kind=world: captions of moving shapes in square clips, which "
            f"{config.checkpoint} does not make. Store prompts with train.preprocess prompts=FILE "
            "checkpoint=... and give data.kind=folder data.folder="
        )


def training_run(config: DistillConfig) -> TrainingRun:
    """The run as `train.estimate` takes it; of the teacher, only settings are read."""
    settings = released_config(config.checkpoint)  # without the hub
    if settings is None:
        settings = read_teacher(config, resolve_model(config.checkpoint, patterns=CONFIGS))
    config = with_lora_ranks(config, settings.transformer)
    size = latent_shape(config, settings)[1:]
    grid = settings.transformer.token_grid(size)
    densities = (
        network_attention(one, settings.transformer.num_layers).density(grid)
        for one in (config.attention, config.score_attention)
    )
    return TrainingRun(config, settings.transformer, size, *densities)


def with_lora_ranks(config: DistillConfig, transformer: DiTConfig) -> DistillConfig:
    """The settings with the largest rank of each LoRA file that they name, for an estimate."""
    starts = read_starts(config, transformer)
    ranks = {name: max(start.ranks) for name, start in starts.items() if start is not None}
    loras = {n: replace(lora, rank=ranks.get(n, lora.rank)) for n, lora in loras_of(config).items()}
    student = replace(config.student, lora=loras["student"])
    return replace(
        config, student=student, scores=replace(config.scores, critic_lora=loras["critic"])
    )


def distill(config: DistillConfig) -> int:
    student_schedules(config)  # refuses a wrong list before anything is loaded
    if config.plan:
        with doing("estimating what the run takes"):
            estimate = format_estimate(estimate_that_fits(training_run(config)))
        print(estimate)
        return 0
    torch.set_num_threads(config.threads)
    config.data.check_source()
    check_mirrors(config.loop)
    with start(config.parallel, config.device) as ranks:
        config = with_precision(config, expanded(config.output_dir), ranks)
        return run_distillation(config, ranks)


def run_distillation(config: DistillConfig, ranks: Ranks) -> int:
    ranks.share(config.batch_size, config.gradient_accumulation)  # refuses before anything is made
    with ranks.main_first():  # it downloads
        source = resolve_model(config.checkpoint)
    folder = expanded(config.output_dir)
    settings = read_teacher(config, source)
    check_world(config, settings)
    with ranks.main_first():  # it may download
        starts = read_starts(config, settings.transformer)
        base = source if config.student.start is None else resolve_start(config.student.start)
    if base != source:
        for part in ("text_encoder", "vae"):
            check_same_part(part, f"student.start={config.student.start}", base, source)
    inputs = {
        f"checkpoint={config.checkpoint}": source,
        f"student.start={config.student.start}": base,
    }
    for name, one in starts.items():
        if one is not None:
            option = LORA_STARTS[f"{lora_start(name)}.sha256"]
            inputs[f"{option}={loras_of(config)[name].start}"] = Path(one.lora.path)
    check_apart(folder, inputs)
    if ranks.is_main:
        warn_of_warmup(config.loop.steps, config.warmup)
        warn_of_omit(config)
        warn_of_attention(starts["student"], str(config.attention))
        warn_of_attention(starts["critic"], str(config.score_attention))
    folder.mkdir(parents=True, exist_ok=True)
    vae = load_frozen(source, "vae", settings.vae, ranks.device, torch.float32)
    with ranks.main_first():  # it may encode clips
        draw, texts, data_identity = open_source(config, settings, source, ranks)
    roles = "teacher, student and critic" if config.dmd_weight else "teacher and student"
    with doing(f"loading {roles}", quiet=not ranks.is_main):
        networks = load_networks(config, settings, source, ranks, starts)
    identity = asdict(config) | data_identity
    identity[TEACHER_DIGEST] = ranks.first(transformer_digest(source) if ranks.is_main else "")
    if config.student.start is not None:
        identity[START_DIGEST] = ranks.first(transformer_digest(base) if ranks.is_main else "")
    kept = {lora_start(name): one.to_json() for name, one in starts.items() if one is not None}
    identity |= kept
    run = Distillation(config, settings, networks, texts, draw, ranks)
    if (clips := draw(0).latents) is not None:  # the samples that are looked at have their size
        run.shape = clips.shape[1:]
    if config.regression.weight:
        encoder = ranks.first(component_digests(source)["text_encoder"] if ranks.is_main else "")
        digests = [identity[TEACHER_DIGEST], encoder]
        run.trajectories = make_trajectories(run, settings, folder, digests)
    state = run.new_state()
    validate = make_validation(run, settings, vae, folder, identity[TEACHER_DIGEST])
    artefacts = artefacts_of(config, settings, kept.get(lora_start("student")), source, base)
    step, loop = run.train_step, config.loop
    if not run_training(
        state, step, loop, folder, identity, validate, ranks, artefacts, True, type(config)
    ):
        return INTERRUPTED
    if config.export == "best":
        best = best_checkpoint(folder / "checkpoints", state.step)
        if best is None:
            raise WanError(f"export=best: no checkpoint in {folder} was measured; use export=last")
        state.load_tree(load_checkpoint(best, ranks))
        print(f"the healthiest checkpoint is {best.name}")
    artefacts.write_end(state, folder, ranks)
    return 0


def make_validation(
    run: Distillation, settings: PipelineConfig, vae: WanVAE, folder: Path, teacher_digest: str
) -> Callable[[TrainState], dict[str, float]]:
    """A function that measures the student before each checkpoint and writes `folder/samples`.

    The teacher's samples of the same captions are made first, once.
    """
    config, student = run.config, run.student
    known = None  # what the captions state, for the miniature's world
    if config.data.kind == "world":
        known = world_panel(config.validation_captions, config.seed)
        captions = [one.text for one in known]
    else:
        captions = first_captions(run.draw, config.validation_captions)
    captions *= 2  # two clips of each, which should differ
    with doing("the teacher's panel, to compare with", quiet=not run.ranks.is_main):
        finished = teacher_panel(run, settings, captions, folder, teacher_digest)
    run.teacher_std = float(finished.std())
    if config.dmd_weight:
        run.measure_teacher(captions, finished)

    def measure(number: int, latents: Tensor, video: Tensor) -> ClipNumbers:
        stated = None if known is None else known[number % len(known)]
        return measure_clip(latents, video, stated, number < SHOWN)

    def measure_teacher(numbers: list[int]) -> list[ClipNumbers]:
        return [measure(i, finished[i], decode_clip(vae, finished[i])) for i in numbers]

    numbers = range(len(captions))
    reference = run.ranks.spread(measure_teacher, numbers, 1, "clips of the teacher measured")

    def validate(state: TrainState) -> dict[str, float]:
        pictures = Pictures(folder / "samples", state.step)

        def look(number: int, latents: Tensor) -> tuple[ClipNumbers, Tensor | None]:
            video = decode_clip(vae, latents)
            if number < SHOWN and run.ranks.leads_group:
                frames, fps = to_uint8(video), settings.defaults.fps
                pictures.write(f"{number}.mp4", lambda path: write_video(path, frames, fps))
            first = latents.cpu().clone() if number == 0 else None
            return measure(number, latents, video), first

        with state.averages["student"].in_place(student):
            found = run.panel(captions, None, look)
        samples = [numbers for numbers, _ in found]
        first = found[0][1]
        assert first is not None
        three = run.triptych(first[None], captions[0])
        if run.ranks.is_main:
            sheets = [sheet_of(decode_clip(vae, latents)) for latents in three]
            write_panel(pictures, captions, samples, reference, sheets)
        pictures.close(run.ranks)
        return panel_numbers(samples, reference)

    return validate


def first_captions(draw: Callable[[int], Clips], count: int) -> list[str]:
    """The captions that training draws first, from as many batches as have them."""
    captions: list[str] = []
    batch = 0
    while len(captions) < count:
        captions += draw(batch).captions
        batch += 1
    return captions[:count]


def teacher_panel(
    run: Distillation,
    settings: PipelineConfig,
    captions: list[str],
    folder: Path,
    digest: str,
) -> Tensor:
    """The teacher's samples of the validation captions: made once, and kept in the run's folder.

    Returns:
        latents (2V, C, T, H, W) float32, on the CPU.
    """
    path = folder / "teacher_panel.safetensors"
    schedule = euler_schedule(run.config.validation_steps, settings.shift)
    scores = run.config.scores
    how = (digest, *teacher_settings(run.config, scores.guidance_scale), schedule.sigmas.tolist())
    key = key_of(*how, captions, list(run.shape))
    if run.ranks.first(run.ranks.is_main and is_panel(path, key)):
        return read_checked(path)["latents"]
    latents = torch.stack(run.panel(captions, schedule, lambda i, clip: clip.cpu().clone()))
    if run.ranks.is_main:
        write_checked(path, {"latents": latents}, {"key": key})
    return latents


def teacher_settings(config: DistillConfig, guidance: float) -> tuple[Any, ...]:
    """What the teacher's samples depend on, beside weights, captions, noise and steps."""
    attention = asdict(config.score_attention)
    shown = (config.max_text_tokens, guidance, config.scores.negative_prompt)
    return (attention, config.bfloat16, *shown)


def is_panel(path: Path, key: str) -> bool:
    """Whether a file holds the panel of that key, undamaged."""
    try:
        if not path.exists() or read_header(path).metadata.get("key") != key:
            return False
        return "latents" in read_checked(path)
    except WanError as error:
        print(f"warning: {error}; it is made again", file=sys.stderr)
        return False


def make_trajectories(
    run: Distillation, settings: PipelineConfig, output: Path, digests: Sequence[str]
) -> Trajectories:
    """The teacher's samples of the first captions that training draws, kept in a folder.

    Args:
        output: the run's own folder, for trajectories that have none in `regression.folder`.
        digests: of the teacher's transformer and of the text encoder.
    """
    config, regression = run.config, run.config.regression
    levels = sorted({s for one in run.schedules for s in one.sigmas[:-1].tolist()}, reverse=True)
    identity = [*digests, *teacher_settings(config, config.regression_guidance)]
    return sample_trajectories(
        lambda texts: run.teacher_velocity(texts, config.regression_guidance),
        first_captions(run.draw, regression.num_pairs),
        run.shape,
        levels,
        grid_through(levels, regression.steps, regression.shift or settings.shift),
        expanded(regression.folder) if regression.folder else output / "trajectories",
        identity,
        run.ranks,
        run.chunk,
    )
