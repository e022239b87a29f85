"""Make the videos of all jobs: load the model once, then denoise, decode, check and write."""

import json
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.cli import Run
from configs.progress import doing
from configs.rerun import typed_options
from configs.schema import SampleConfig, given_paths, kept_settings
from infer.loading import (
    LoadedModel,
    ModelCache,
    StageBars,
    model_folder,
    read_loras,
)
from infer.machine import environment, writable_folder
from infer.sample.jobs import MAX_CHECKED, Jobs
from infer.sample.record import (
    IN_COMMENT,
    RECORD_VERSION,
    UNFINISHED,
    Assistance,
    BadResultError,
    FinishedVideos,
    OutputFiles,
    Story,
    name_words,
    now,
    out_of_memory,
    reserve_files,
    save_latents,
)
from infer.sample.request import Request, describe, resolve_request
from infer.sharing import Sharing, join
from wan.errors import WanError, shortened, visible
from wan.files import expanded
from wan.media.images import write_image
from wan.media.video import contact_sheet, flaw, is_finite, to_uint8, write_video
from wan.miniature.captions import outside_world
from wan.models.attention import NetworkAttention, verified_attention
from wan.paths import kept_path
from wan.pipeline.arguments import known_dtype
from wan.pipeline.callbacks import StepFunction
from wan.pipeline.config import PipelineConfig
from wan.pipeline.folder import ModelFolder
from wan.pipeline.memory import GIB, MemoryEstimate, check_fits, estimate_memory, size
from wan.pipeline.memory_counts import MemoryRequest, rough_bytes, stored_dtypes
from wan.pipeline.preview import Preview, check_preview
from wan.pipeline.tiny_decoder import check_fits_latents, open_tiny_decoder
from wan.runtime.memory_meter import free_bytes
from wan.runtime.offload import resolve_device
from wan.sampling.denoiser import Denoiser
from wan.sampling.noise import draw_noise, sample_generators
from wan.sampling.samplers import OnX0
from wan.weights.digests import sha256_file
from wan.weights.hub import CONFIGS, STUDENT, TEACHER, resolve_model


@dataclass(frozen=True)
class Session:
    """A command after all decisions are made and the model is loaded.

    Attributes:
        run: the command's settings.
        requests: one per job, in order, each decided when its turn comes.
        num_videos: how many videos all of them make.
        model: the loaded model.
        output: the folder that videos are written to.
        memory: the memory estimate, or None if none was made.
        sharing: what several processes do.
        already: the records that `own_videos` left out, as their videos are made.
    """

    run: Run[SampleConfig]
    requests: Iterator[Request]
    num_videos: int
    model: LoadedModel
    output: Path
    memory: MemoryEstimate | None
    sharing: Sharing
    already: list[Path] = field(default_factory=list)

    def own_videos(self) -> Iterator[tuple[Request, int]]:
        """The videos that this process makes, with their seeds, each claimed when its turn comes.

        With `skip_done`, those that the folder holds already are named and left out.
        """
        finished: FinishedVideos | None = None
        videos = ((request, seed) for request in self.requests for seed in request.seeds)
        for number, (request, seed) in enumerate(videos, 1):
            if request.config.skip_done:
                finished = finished or FinishedVideos(self.output)
                found = self._already_made(finished, request, seed)
            else:
                found = None
            team = self.sharing.team
            if not self.sharing.together and not team.claim(f"video {number}"):
                continue
            if found is None:
                yield request, seed
            elif not self.sharing.helps:
                self.already.append(self.output / f"{found}.json")
                print(f"{found}: made already", file=sys.stderr)

    def _already_made(self, finished: FinishedVideos, request: Request, seed: int) -> str | None:
        """The name of a finished video; where all make it together, the main process looks."""

        def look() -> str | None:
            record = finished.take(identity(request), seed)
            return None if record is None else record.stem

        group = self.model.pipeline.parallel
        return look() if group is None else group.first(look)

    @property
    def several(self) -> bool:
        """Whether more than one video is made."""
        return self.num_videos > 1


TINY = "a tiny decoder, not exact"  # in a record
MAX_LOOKED_AT = 50  # images that are decoded before the first video is made


def prepare(
    run: Run[SampleConfig], jobs: Jobs, models: ModelCache, sharing: Sharing | None = None
) -> Session:
    """Decide all settings, refuse what cannot work, then load the model.

    The attention is built and verified here, each job's sampling plan is made here, and each JSON
    file of the model is read here; later code only uses the results.

    Args:
        sharing: what several processes do; None for one that is alone.

    Raises:
        WanError: the request is wrong (raised before weights are downloaded or read), or the
            weights are.
    """
    config = run.config
    sharing = Sharing() if sharing is None else sharing
    output = writable_folder(config.output_dir)
    device = resolve_device(config.device)
    dtype = known_dtype(config.dtype, device)
    folder = model_folder(config, CONFIGS)
    attention = verified_attention(config.attention, folder.config.transformer, device, dtype)
    dtype_name = str(dtype).removeprefix("torch.")
    resolve = partial(
        resolve_request,
        model=folder.config,
        attention=attention,
        device=str(device),
        dtype=dtype_name,
    )
    requests: list[Request] = []
    images: set[str | None] = set()
    for job in jobs.checked:
        look = job.config.image not in images and len(images) < MAX_LOOKED_AT
        requests.append(resolve(job, look=look))
        images.add(job.config.image)
    loras = read_loras(config, folder.config)
    check_decoders(config, folder.config)
    if folder.path in (STUDENT, TEACHER) and sharing.team.is_main:
        warn_outside_world(requests)
    if sharing.together:
        check_together(requests, sharing, device)
    if sharing.team.is_main:
        print(describe(requests[0], folder.path), file=sys.stderr)
        if jobs.count > 1:
            print(f"the first of {jobs.count} jobs; every video has a record", file=sys.stderr)
        if sharing.team.size > 1:
            print(sharing, file=sys.stderr)
    all_texts = len(requests) == jobs.count
    memory = check_memory(
        requests, all_texts, folder, attention, device, dtype, models, sharing, loras
    )
    # Now with the weights; the branch on the hub may have changed in between.
    path = resolve_model(config.checkpoint, config.revision, variant=config.variant)
    if path != folder.path or config.variant is not None:
        folder = model_folder(config)
    if memory is not None and None in memory.request.stored.values():  # now they can be looked at
        memory = check_memory(
            requests, all_texts, folder, attention, device, dtype, models, sharing, loras
        )
    try:
        with_vae = config.decoder is None or from_pictures(requests)
        model = models.get(folder, config, attention, loras, device, sharing, with_vae)
    except torch.OutOfMemoryError as error:
        raise WanError(out_of_memory()) from error
    each = chain(requests[:1], (resolve(job, look=False) for job in islice(jobs.each(), 1, None)))
    return Session(run, each, jobs.num_videos, model, output, memory, sharing)


def check_decoders(config: SampleConfig, model: PipelineConfig) -> None:
    """Refuse previews and tiny decoders that do not fit the model, from their headers alone."""
    given = [path for path in (config.decoder, config.preview_decoder) if path is not None]
    for kind in {open_tiny_decoder(path)[0] for path in given}:
        check_fits_latents(kind, model.vae)
    if config.preview and config.preview_decoder is None:
        check_preview(model.vae)


def warn_outside_world(requests: Sequence[Request]) -> None:
    """Say of the first request that the miniature cannot know what it cannot know, in a line."""
    sizes = ((one.prompt, one.height, one.width, one.num_frames) for one in requests)
    if found := next(filter(None, (outside_world(*size) for size in sizes)), None):
        warnings.warn(found, stacklevel=2)


def check_together(requests: Sequence[Request], sharing: Sharing, device: torch.device) -> None:
    """Refuse what many processes cannot make together, and let them meet.

    Raises:
        WanError: options that do not go together, or heads that cannot be shared out.
    """
    from wan.runtime.parallel import check_heads, check_options

    config = requests[0].config
    check_options(
        config.parallel.weights,
        offload=config.offload,
        compile=config.compile,
        quantized=config.quantize != "none",
        tile=config.tile,
    )
    for request in requests:
        check_heads(request.heads, sharing.size, sharing.halved(request.plan.guided))
    join(device.type)


def check_memory(
    requests: list[Request],
    all_texts: bool,
    folder: ModelFolder,
    attention: NetworkAttention,
    device: torch.device,
    dtype: torch.dtype,
    models: ModelCache,
    sharing: Sharing,
    loras: Collection[str],
) -> MemoryEstimate | None:
    """Estimate the memory of the largest job if it may matter; refuse what cannot fit.

    Args:
        all_texts: the requests hold all prompts; if not, the longest is taken to fill the model.
        loras: the parts that a LoRA is merged into.
    """
    config = requests[0].config
    if config.preflight == "never":
        return None
    largest = max(requests, key=lambda request: (request.tokens, request.plan.guided))
    # An estimate imports parts of PyTorch's compiler, which takes longer than a small model.
    rough = rough_bytes(folder.config, largest.latent_shape, dtype)
    if config.preflight == "auto" and rough <= GIB:
        return None
    if sharing.helps:
        return None
    what = (requests, all_texts, largest, folder, attention, device, dtype, loras)
    with doing("estimating the memory", quiet=not sharing.team.is_main):
        memory = estimate_memory(memory_request(*what))
    host = torch.device("cpu")
    free, free_host = (free_bytes(where) + models.bytes_on(where) for where in (device, host))
    if sharing.together:
        whole = "a part of" if sharing.sharded else "all"
        print(
            f"memory, predicted for one process alone: {memory}; with {sharing.size}, each holds "
            f"{whole} weights of the transformers, and a part of what computing takes "
            f"({size(free)} free on {device})",
            file=sys.stderr,
        )
        return memory  # an upper bound, which is no reason to refuse
    free_host //= sharing.on_this_machine
    free = free_host if device == host else free
    if sharing.team.is_main:
        each = " for each process" if sharing.team.size > 1 else ""
        free_text = f"({size(free)} free on {device}{each})"
        print(f"memory, predicted: {memory} {free_text}", file=sys.stderr)
    check_fits(memory, free, None if device == host else free_host)
    if (
        sharing.team.is_main
        and memory.mapped
        and free_host < memory.mapped + (memory.host or memory.peak)
    ):
        print(
            f"the weights do not all stay in the {size(free_host)} that are free: some are read "
            "from the disk again in every step",
            file=sys.stderr,
        )
    return memory


def memory_request(
    requests: list[Request],
    all_texts: bool,
    largest: Request,
    folder: ModelFolder,
    attention: NetworkAttention,
    device: torch.device,
    dtype: torch.dtype,
    loras: Collection[str],
) -> MemoryRequest:
    """The memory request of the largest job, with the longest prompt of all jobs."""

    def num_tokens(request: Request) -> int:
        texts = (request.prompt, request.config.negative_prompt or "")
        limit = request.max_sequence_length
        return max(len(folder.tokenizer(request.clean(text), limit).ids) for text in texts)

    config, length = largest.config, largest.max_sequence_length
    return MemoryRequest(
        folder.config,
        largest.latent_shape,
        largest.plan,
        prompt_tokens=max(map(num_tokens, requests)) if all_texts else length,
        max_sequence_length=length,
        device=device,
        dtype=dtype,
        attention=attention,
        has_image=from_pictures(requests),
        offload=config.offload,
        quantize=config.quantize,
        chunk_latents=config.chunk_latents,
        tile=config.tile,
        decoder=None if config.decoder is None else open_tiny_decoder(config.decoder)[0],
        stored=stored_dtypes(folder, changed=loras),
    )


def from_pictures(requests: Sequence[Request]) -> bool:
    """Whether a video may start from a picture; of very many settings not all are looked at."""
    some = any(request.config.image is not None for request in requests)
    return some or len(requests) >= MAX_CHECKED


def make_video(
    session: Session,
    request: Request,
    seed: int,
    bars: StageBars | None = None,
    on_files: Callable[[OutputFiles], None] | None = None,
) -> Story:
    """Make one video with its picture, latents and record; the story has its exit code.

    The record is written before the first step and after the last, so that there is one however
    the run ends.

    Args:
        bars: what is told how far each stage is; None draws bars on a terminal.
        on_files: called with the names of the files before the first stage.
    """
    config, pipeline = request.config, session.model.pipeline
    generators = sample_generators(seed, 1)
    bars = StageBars() if bars is None else bars
    with begin_story(session, request, seed) as story, torch.no_grad():
        record = story.record
        if on_files is not None:
            on_files(story.files)
        noise = pipeline.prepare_latents(
            1,
            height=request.height,
            width=request.width,
            num_frames=request.num_frames,
            generator=generators,
            frame_first=config.frame_first_noise,
        )
        story.hash(partial(record.__setitem__, "noise_sha256"), noise)
        with KeptLatents(noise, request, seed, story) as kept:
            with story.stage("encode_text", bars):
                context, negative = pipeline.encode_prompt(
                    request.prompt,
                    config.negative_prompt or None,
                    request.plan.guided,
                    max_sequence_length=request.max_sequence_length,
                    on_progress=bars,
                    clean=request.clean,
                )
            for name, text in (("prompt", context), ("negative_prompt", negative)):
                if text is not None:
                    story.hash(partial(record["text_sha256"].__setitem__, name), text)
            image, image_latents = request.first_frame(), None
            if image is not None:
                with story.stage("encode_image", bars):
                    image_latents = pipeline.encode_frames([image], 1)
                story.hash(partial(record.__setitem__, "image_latents_sha256"), image_latents)
            with story.stage("denoise", bars):
                kept.latents = pipeline.denoise(
                    request.plan,
                    noise,
                    context,
                    negative,
                    image_latents,
                    # Few-step sampling continues the random stream of the first noise.
                    renoise=lambda i: draw_noise(
                        request.latent_shape, generators, config.frame_first_noise
                    ),
                    on_step=kept.after_step(bars),
                    on_x0=preview_of(session, request, story),
                )
        story.hash(partial(record.__setitem__, "latents_sha256"), kept.latents)
        story.write()
        with story.stage("decode", bars):
            video = pipeline.decode_latents(kept.latents, bars)[0]
        if not session.sharing.helps:
            write_files(session, request, seed, video, story)
    return story


def preview_of(session: Session, request: Request, story: Story) -> OnX0 | None:
    """What writes the previews of a video; None without them, and where another process does."""
    if not request.config.preview or session.sharing.helps:
        return None
    print(f"preview: {story.files.preview}", file=sys.stderr)
    return Preview(session.model.pipeline, story.files.preview, session.model.preview_decoder).show


def begin_story(session: Session, request: Request, seed: int) -> Story:
    """The record of a new video and its files; nothing in a process that helps another one."""
    device = session.model.pipeline.device
    if session.sharing.helps:
        return Assistance(device)
    record = first_record(session, request, seed)
    words = name_words(request.prompt, session.run.title)
    files = reserve_files(session.output, identity(request), seed, record, words)
    if session.several:
        print(f"{files.stem}: {shortened(visible(request.prompt), 400)}", file=sys.stderr)
    places: list[str | Path] = [session.model.folder, *given_paths(request.config)]
    return Story(files, record, device, places)


def identity(request: Request) -> dict[str, Any]:
    """What a video is made from, as its record holds it: prompt, settings and their sources."""
    settings = {
        name: {"value": value, "from": source} for name, (value, source) in request.settings.items()
    }
    return {"prompt": request.prompt, "settings": settings}


class KeptLatents:
    """The latents that sampling has reached; as a context manager it always saves them."""

    def __init__(self, noise: Tensor, request: Request, seed: int, story: Story) -> None:
        self.latents, self.step = noise, 0
        self._request, self._seed, self._story = request, seed, story

    def after_step(self, bars: StageBars) -> StepFunction:
        """A function for `WanPipeline.denoise` to call after each step."""
        steps = len(self._request.plan.schedule)
        bars("denoise", 0, steps)

        def watch(denoiser: Denoiser, step: int, timestep: float, x: Tensor) -> None:
            self.latents, self.step = x, step + 1
            self._story.hash(self._story.record["steps_sha256"].append, x)
            bars("denoise", step + 1, steps)

        return watch

    def __enter__(self) -> "KeptLatents":
        return self

    def __exit__(self, *_: object) -> None:
        self._story.record["steps_done"] = self.step
        if isinstance(self._story, Assistance):
            return
        config = self._request.config
        about = {
            "prompt": self._request.prompt,
            "seed": self._seed,
            "checkpoint": kept_path(config.checkpoint, config.output_dir),
            "step": self.step,
            "steps": len(self._request.plan.schedule),
        }
        save_latents(self._story.files.latents, self.latents, **about)


def write_files(session: Session, request: Request, seed: int, video: Tensor, story: Story) -> None:
    """Write a decoded video (3, F, H, W) in [-1, 1] and its contact sheet; fill in the record.

    Raises:
        BadResultError: the video shows no picture, or is not finite.
    """
    config, files, record = request.config, story.files, story.record
    if not is_finite(video):
        raise BadResultError("the decoded video is not finite")
    frames = to_uint8(video, truncate=config.compat == "fastvideo")
    story.hash(partial(record.__setitem__, "pixels_sha256"), frames)
    if (problem := flaw(frames)) is not None:
        raise BadResultError(f"the video shows nothing: {problem}")
    with story.stage("write"), doing("writing the video"):
        story.finish_hashes()
        texts = _metadata(request, record) if config.embed_prompt else {}
        info = write_video(files.video, frames, request.fps, texts)
        record["video"] = {
            "file": files.video.name,
            "frames": info.decoded_frames,
            "height": info.height,
            "width": info.width,
            "fps": info.fps,
        }
        if config.contact_sheet:
            write_image(files.sheet, contact_sheet(frames))
    if not config.save_latents:
        files.latents.unlink()
    if session.model.digests is not None:
        with story.stage("hash"), doing("hashing the weights"):
            record["weights_sha256"] = session.model.digests.result()
    record["stage"] = "end"
    seconds = record["seconds"]
    seconds["total"] = round(sum(v for k, v in seconds.items() if k != "load"), 3)


def first_record(session: Session, request: Request, seed: int) -> dict[str, Any]:
    """The record of a video with everything that is known before the first step."""
    model, schedule = session.model, request.plan.schedule
    prompt = model.pipeline.tokenizer(request.clean(request.prompt), request.max_sequence_length)
    machine = environment(model.pipeline.device)
    if session.sharing.together:
        machine["processes"] = session.sharing.size
    record = {
        "record_version": RECORD_VERSION,
        "status": UNFINISHED,
        "stage": "start",
        "started": now(),
        "finished": None,
        "prompt": request.prompt,
        "negative_prompt": request.config.negative_prompt,
        "prompt_tokens": {"all": prompt.num_tokens_before_truncation, "read": len(prompt.ids)},
        "seed": seed,
        "image_sha256": None,
        "settings": identity(request)["settings"],
        "schedule": {
            "description": schedule.description,
            "timesteps": schedule.timesteps.tolist(),
            "sigmas": schedule.sigmas.tolist(),
        },
        "not_trained_for": list(request.plan.untrained),
        "latent_shape": list(request.latent_shape),
        "tokens": request.tokens,
        "config": kept_settings(asdict(request.config), request.config.output_dir),
        "presets": session.run.presets,
        "model_folder": kept_path(model.folder, session.output),
        "pipeline": type(model.pipeline).__name__,
        "weights": model.census,
        "decoder": None if request.config.decoder is None else TINY,
        "precision": request.precision,  # None: computed in the dtype of the weights
        "lora": model.merges,
        "weights_sha256": None,
        "noise_sha256": None,
        "text_sha256": {},
        "image_latents_sha256": None,
        "steps_sha256": [],
        "latents_sha256": None,
        "pixels_sha256": None,
        "video": None,
        "seconds": {"load": round(model.seconds, 3)},
        "begun": {"load": round(model.begun, 3)},
        "peak_memory_bytes": None,
        "environment": machine,
    }
    if request.config.image is not None:
        record["image_sha256"] = sha256_file(expanded(request.config.image))
    if session.memory is not None:  # for the largest job; `peak_memory_bytes` covers all so far
        memory = session.memory
        parts = {"host": memory.host, "mapped": memory.mapped}
        record["predicted_memory_bytes"] = memory.stages | parts
    return record


def _metadata(request: Request, record: dict[str, Any]) -> dict[str, str]:
    """Text fields of the mp4: enough to make the video again with the same model, and to compare.

    The comment holds the value of each setting, and under "record" what `infer.rerun` and
    `infer.diff` read of a record.
    """
    values = {name: value for name, (value, _) in request.settings.items() if value is not None}
    values |= {"seed": record["seed"], "num_videos": 1, "prompt": request.prompt}
    kept = {name: record[name] for name in IN_COMMENT} | {"config": typed_options(request.config)}
    return {
        "title": request.prompt,
        "comment": json.dumps(values | {"record": kept}, ensure_ascii=False),
    }
