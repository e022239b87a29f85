"""Jobs to files: load the model once, then denoise, keep the latents, decode, check, write."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.cli import INTERRUPTED, Run
from configs.schema import SampleConfig
from infer.loading import LoadedModel, ModelCache, StageBars, read_loras
from infer.sample.jobs import Job
from infer.sample.record import (
    RECORD_VERSION,
    OutputFiles,
    environment,
    now,
    peak_memory,
    reserve_files,
    save_latents,
    tensor_sha256,
    without_home,
    writable_folder,
    write_record,
)
from infer.sample.request import (
    PATH_OPTIONS,
    Request,
    describe,
    resolve_request,
    sampling_options,
    torch_dtype,
)
from wan.errors import WanError
from wan.media.video import contact_sheet, flaw, is_finite, to_uint8, write_video
from wan.models.attention import network_attention
from wan.models.tokenizer import Tokenizer, clean_prompt
from wan.pipeline.config import PipelineConfig, part_folder, read_pipeline_config
from wan.pipeline.memory import (
    GIB,
    MemoryPlan,
    MemoryRequest,
    check_fits,
    predict_memory,
    rough_bytes,
    size,
)
from wan.pipeline.pipeline import WanPipeline
from wan.runtime.memory_meter import free_bytes
from wan.runtime.offload import resolve_device
from wan.sampling.noise import sample_generators
from wan.weights.hub import CONFIGS, resolve_model

BAD_RESULT = 1


class BadResultError(RuntimeError):
    """The networks ran, and what came out is no picture."""


def generate(run: Run[SampleConfig], jobs: list[Job], models: ModelCache) -> int:
    """Make the videos of all jobs; returns the exit code.

    Everything that can be wrong with the request is found before weights are fetched or read.
    """
    config = run.config
    output = writable_folder(config.output_dir)
    device = resolve_device(config.device)
    dtype = torch_dtype(config.dtype, device)
    folder = resolve_model(config.checkpoint, config.revision, patterns=CONFIGS)
    model_config = read_pipeline_config(folder)
    dtype_name = str(dtype).removeprefix("torch.")
    requests = [resolve_request(job, model_config, str(device), dtype_name) for job in jobs]
    read_loras(config, model_config)
    transformer = model_config.transformer
    attention = network_attention(config.attention, transformer.num_layers)
    attention.verify(transformer.attention_head_dim, device, dtype)
    print(describe(requests[0], folder), file=sys.stderr)
    if len(requests) > 1:
        print(f"the first of {len(requests)} jobs; every video has a record", file=sys.stderr)
    # Prediction loads parts of PyTorch's compiler, which takes a second: longer than a small model.
    largest = max(requests, key=lambda request: request.tokens).latent_shape
    wanted = config.preflight == "always" or rough_bytes(model_config, largest, dtype) > GIB
    memory = None
    if wanted and config.preflight != "never":
        memory = predicted_memory(requests, model_config, folder, device, dtype)
        host = torch.device("cpu")
        free, free_host = (free_bytes(where) + models.bytes_on(where) for where in (device, host))
        print(f"memory, predicted: {memory} ({size(free)} free on {device})", file=sys.stderr)
        check_fits(memory, free, None if device == host else free_host)
    folder = resolve_model(config.checkpoint, config.revision)
    try:
        model = models.get(folder, config, device)
    except torch.OutOfMemoryError as error:
        raise WanError(_reason(error)) from error
    code = 0
    total = sum(request.config.num_videos for request in requests)
    for request in requests:
        for seed in request.seeds:
            done = make_video(run, request, seed, model, folder, output, memory, total > 1)
            code = max(code, done)
            if done == INTERRUPTED:
                return INTERRUPTED
    return code


def predicted_memory(
    requests: list[Request],
    model: PipelineConfig,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> MemoryPlan:
    """What the largest of some jobs will take."""
    tokenizer = Tokenizer.from_folder(part_folder(folder, "tokenizer"))

    def num_tokens(request: Request) -> int:
        texts = (request.prompt, request.config.negative_prompt or "")
        limit = request.max_sequence_length
        return max(len(tokenizer(clean_prompt(text), limit).ids) for text in texts)

    largest = max(requests, key=lambda request: request.tokens)
    config = largest.config
    return predict_memory(
        MemoryRequest(
            model,
            largest.latent_shape,
            largest.plan,
            prompt_tokens=max(map(num_tokens, requests)),
            max_sequence_length=largest.max_sequence_length,
            device=device,
            dtype=dtype,
            attention=config.attention,
            has_image=any(request.config.image is not None for request in requests),
            offload=config.offload,
            quantize=config.quantize,
            chunk_latents=config.chunk_latents,
            tile=config.tile,
        )
    )


def make_video(
    run: Run[SampleConfig],
    request: Request,
    seed: int,
    model: LoadedModel,
    folder: Path,
    output: Path,
    memory: MemoryPlan | None,
    one_of_many: bool,
) -> int:
    """One video with its companions; its exit code. The record tells the story up to the end."""
    record = first_record(run, request, seed, model, folder)
    if memory is not None:  # of the largest job, as the peak below is that of all jobs so far
        record["predicted_memory_bytes"] = memory.stages | {"host": memory.host}
    identity = {"prompt": request.prompt, "settings": record["settings"]}
    files = reserve_files(output, identity, seed)
    if one_of_many:
        print(f"{files.stem}: {request.prompt}", file=sys.stderr)
    write_record(files, record)
    try:
        _produce(request, seed, model, files, record)
        record["status"] = "done"
        code = 0
    except KeyboardInterrupt:
        record["status"] = "interrupted"
        code = INTERRUPTED
    except (BadResultError, FloatingPointError, torch.OutOfMemoryError) as error:
        record["status"] = f"failed: {_reason(error)}"
        code = BAD_RESULT
    except BaseException as error:
        record["status"] = f"failed: {type(error).__name__}: {error}"
        raise
    finally:
        record["finished"] = now()
        record["peak_memory_bytes"] = peak_memory(model.pipeline.device)
        write_record(files, record)
    kept = f"; latents kept in {files.latents}" if files.latents.exists() else ""
    if code == 0:
        print(files.video)
    elif code == INTERRUPTED:
        print(f"stopped during {record['stage']}{kept}", file=sys.stderr)
    else:
        print(f"error: {record['status'].removeprefix('failed: ')}{kept}", file=sys.stderr)
    return code


def _reason(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "out of memory on the GPU; try offload=stage or block, chunk_latents=1, quantize=int8, "
            "dtype=bfloat16, attention=sdpa, or a smaller height, width or num_frames"
        )
    return str(error)


def first_record(
    run: Run[SampleConfig], request: Request, seed: int, model: LoadedModel, folder: Path
) -> dict[str, Any]:
    """All that is known before the first step."""
    schedule = request.plan.schedule
    prompt = model.pipeline.tokenizer(clean_prompt(request.prompt), request.max_sequence_length)
    settings = {
        name: {"value": value, "from": source} for name, (value, source) in request.settings.items()
    }
    return {
        "record_version": RECORD_VERSION,
        "status": "running",
        "stage": "start",
        "started": now(),
        "finished": None,
        "prompt": request.prompt,
        "negative_prompt": request.config.negative_prompt,
        "prompt_tokens": {"all": prompt.num_tokens_before_truncation, "read": len(prompt.ids)},
        "seed": seed,
        "settings": settings,
        "schedule": {
            "description": schedule.description,
            "timesteps": schedule.timesteps.tolist(),
            "sigmas": schedule.sigmas.tolist(),
        },
        "not_trained_for": list(request.plan.untrained),
        "latent_shape": list(request.latent_shape),
        "tokens": request.tokens,
        "config": public_config(request.config),
        "presets": run.presets,
        "model_folder": without_home(folder),
        "pipeline": type(model.pipeline).__name__,
        "weights": model.census,
        "lora": model.merges,
        "weights_sha256": None,
        "noise_sha256": None,
        "latents_sha256": None,
        "video": None,
        "seconds": {"load": round(model.seconds, 3)},
        "peak_memory_bytes": None,
        "environment": environment(model.pipeline.device),
    }


def public_config(config: SampleConfig) -> dict[str, Any]:
    """The command's settings as typed, without the name of the person's home folder."""
    values = asdict(config)
    for name in PATH_OPTIONS:
        if values[name] is not None:
            values[name] = without_home(values[name])
    return values


def _produce(
    request: Request, seed: int, model: LoadedModel, files: OutputFiles, record: dict[str, Any]
) -> None:
    """Denoise, decode, check, write; fills in the record on the way."""
    config, seconds = request.config, record["seconds"]
    latents = _denoise(request, seed, model.pipeline, files, record)
    record["latents_sha256"] = tensor_sha256(latents)
    write_record(files, record)

    bars = StageBars()
    with _stage("decode", record):
        try:
            video = model.pipeline.decode_latents(latents, bars)[0]
        finally:
            bars.close()
    if not is_finite(video):
        raise BadResultError("the decoded video is not finite")
    frames = to_uint8(video)
    if (problem := flaw(frames)) is not None:
        raise BadResultError(f"the video shows nothing: {problem}")

    with _stage("write", record):
        texts = _metadata(request, seed) if config.embed_prompt else {}
        info = write_video(files.video, frames, request.fps, texts)
        record["video"] = {
            "file": files.video.name,
            "frames": info.decoded_frames,
            "height": info.height,
            "width": info.width,
            "fps": info.fps,
        }
        if config.contact_sheet:
            contact_sheet(frames).save(files.sheet)
    if not config.save_latents:
        files.latents.unlink()
    if model.digests is not None:
        with _stage("hash", record):
            record["weights_sha256"] = model.digests.result()
    record["stage"] = "end"
    seconds["total"] = round(sum(v for k, v in seconds.items() if k != "load"), 3)


def _denoise(
    request: Request,
    seed: int,
    pipeline: WanPipeline,
    files: OutputFiles,
    record: dict[str, Any],
) -> Tensor:
    """The final latents (1, C, T, h, w), saved; the last good ones are saved if it ends early."""
    config, total = request.config, len(request.plan.schedule)
    generators = sample_generators(seed, 1)
    noise = pipeline.prepare_latents(
        1,
        request.height,
        request.width,
        request.num_frames,
        generators,
        frame_first=config.frame_first_noise,
    )
    record["noise_sha256"] = tensor_sha256(noise)
    state: dict[str, Any] = {"latents": noise, "step": 0}

    def after_step(_: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> None:
        state.update(latents=tensors["latents"], step=step + 1)

    def keep() -> None:
        checkpoint = without_home(config.checkpoint)
        about = {"prompt": request.prompt, "seed": seed, "checkpoint": checkpoint}
        save_latents(files.latents, state["latents"], **about, step=state["step"], steps=total)
        record["steps_done"] = state["step"]

    options = sampling_options(config)
    options.pop("image")
    options["negative_prompt"] = config.negative_prompt or None
    bars = StageBars()
    with _stage("denoise", record):
        try:
            result = pipeline(
                request.prompt,
                image=request.first_frame(),
                height=request.height,
                width=request.width,
                num_frames=request.num_frames,
                latents=noise,
                generator=generators,  # few-step sampling draws on from here
                output_type="latent",
                callback_on_step_end=after_step,
                max_sequence_length=request.max_sequence_length,
                frame_first_noise=config.frame_first_noise,
                on_progress=bars,
                **options,
            )
            state["latents"] = result.frames  # type: ignore[union-attr]
        finally:
            bars.close()
            keep()
    # The pipeline's own clock tells its stages apart.
    record["seconds"].update({k: round(v, 3) for k, v in pipeline.last_timings.items()})
    return state["latents"]


def _metadata(request: Request, seed: int) -> dict[str, str]:
    """What the mp4 carries: enough to make it again with the same model."""
    values = {name: value for name, (value, _) in request.settings.items() if value is not None}
    for private in ("image", "lora", "lora_2"):  # paths tell about a person's machine
        values.pop(private, None)
    values |= {"seed": seed, "num_videos": 1, "prompt": request.prompt}
    return {
        "title": request.prompt,
        "comment": json.dumps(values, ensure_ascii=False),
    }


@contextmanager
def _stage(name: str, record: dict[str, Any]) -> Iterator[None]:
    record["stage"] = name
    started = time.perf_counter()
    yield
    record["seconds"][name] = round(time.perf_counter() - started, 3)
