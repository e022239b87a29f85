"""Decide everything that a command needs before it makes a video, and load the model once."""

import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch

from configs.cli import Run
from configs.progress import doing
from configs.schema import SampleConfig
from infer.loading import LoadedModel, ModelCache, model_folder, read_loras
from infer.machine import writable_folder
from infer.sample.jobs import MAX_CHECKED, Jobs
from infer.sample.record import FinishedVideos, out_of_memory
from infer.sample.request import Request, describe, identity, resolve_request
from infer.sharing import Sharing, join
from wan.errors import WanError
from wan.miniature.captions import outside_world
from wan.models.attention import NetworkAttention, verified_attention
from wan.pipeline.arguments import known_dtype
from wan.pipeline.config import PipelineConfig
from wan.pipeline.folder import ModelFolder
from wan.pipeline.memory import GIB, MemoryEstimate, check_fits, estimate_memory, size
from wan.pipeline.memory_counts import MemoryRequest, rough_bytes, stored_dtypes
from wan.pipeline.preview import check_preview
from wan.pipeline.tiny_decoder import check_fits_latents, open_tiny_decoder
from wan.runtime.memory_meter import free_bytes
from wan.runtime.offload import resolve_device
from wan.weights.hub import CONFIGS, STUDENT, TEACHER, resolve_model

MAX_LOOKED_AT = 50  # images that are decoded before the first video is made


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
