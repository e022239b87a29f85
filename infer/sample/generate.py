"""Make one video: denoise, decode, check and write it, with its record and its latents."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.progress import doing
from configs.rerun import typed_options
from configs.schema import given_paths, kept_settings
from infer.loading import StageBars
from infer.machine import environment
from infer.sample.prepare import Session
from infer.sample.record import (
    IN_COMMENT,
    RECORD_VERSION,
    UNFINISHED,
    Assistance,
    BadResultError,
    OutputFiles,
    Story,
    name_words,
    now,
    reserve_files,
    save_latents,
)
from infer.sample.request import Request, identity
from wan.errors import shortened, visible
from wan.files import expanded
from wan.media.images import write_image
from wan.media.video import contact_sheet, flaw, is_finite, to_uint8, write_video
from wan.paths import kept_path
from wan.pipeline.callbacks import StepFunction
from wan.pipeline.preview import Preview
from wan.sampling.denoiser import Denoiser
from wan.sampling.noise import draw_noise, sample_generators
from wan.sampling.samplers import OnX0
from wan.weights.digests import sha256_file

TINY = "a tiny decoder, not exact"  # in a record


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
