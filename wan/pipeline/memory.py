"""The memory that a video will take, stage by stage, before any weight is read.

    plan = predict_memory(request)
    check_fits(plan, free_bytes(device), free_bytes(cpu))

Weights are counted from the networks built on the meta device, with the dtypes and the quantisation
that loading gives them; what the stages need beside them, by running the stages' own code there
(`wan.runtime.memory_meter`). So neither can drift from what is run. On a CPU the copies that its
kernels make and the holes of its heap are counted too, and the prediction is the resident memory of
the process, less Python and the libraries. Not counted on GPUs: workspaces of kernels, fragments,
the CUDA context. Compiled networks are counted as eager ones, which need more.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from wan.errors import WanError
from wan.models.attention import (
    ATTENTION,
    SPARSE,
    AttentionChoice,
    AttentionFunction,
    Grid,
    build_attention,
    sdpa_attention,
)
from wan.models.attention.pattern import Pattern, attend_blocks, block_mask
from wan.models.attention_config import AttentionConfig
from wan.models.dit import WanDiT
from wan.models.umt5 import UMT5Encoder
from wan.models.vae import WanVAE
from wan.models.vae_config import CHUNK_LATENTS
from wan.pipeline.config import PipelineConfig
from wan.pipeline.folder import QUANTIZED_PARTS, module_builders
from wan.pipeline.plan import SamplingPlan
from wan.runtime.memory_meter import FusedAttention, LiveBytes, ProcessBytes, peak_bytes
from wan.runtime.offload import OFFLOAD, has_blocks
from wan.sampling.denoiser import guide
from wan.sampling.samplers import build_sampler
from wan.sampling.schedule import Schedule
from wan.weights.load import GROUP_BYTES, build_on_meta, target_dtype
from wan.weights.quantize import is_quantized_weight, quantize
from wan.weights.tensor_reader import CHUNK_BYTES

META = torch.device("meta")
# Share of the free memory that stays for what is not counted.
RESERVE = 0.05
# What the holes of a process's heap add on the CPU, see `wan.runtime.memory_meter.ProcessBytes`.
# Measured with glibc 2.36: 0.2 to 0.4 in the one pass over an image, 0.3 to 0.8 where all forwards
# have the same sizes, 0.8 to 1.9 in decoding, whose chunks do not. The same program has others each
# time it runs, as its addresses are random.
HOLES = {"encode_text": 0.0, "encode_image": 0.2, "denoise": 0.6, "decode": 1.2}
GIB = 2**30


@dataclass(frozen=True)
class MemoryRequest:
    """A video and how it is to be made.

    Attributes:
        latent_shape: (C, T, h, w).
        plan: sampler, schedule and guidance.
        prompt_tokens: of the longest text.
        max_sequence_length: rows of the context.
        has_image: the video starts from a given frame.
        chunk_latents: latent frames that are decoded at a time.
        tile: latents per side of the tiles that are decoded, or None.
        malloc_keeps: on a CPU, whether malloc is glibc's as it comes, which keeps most of what is
            freed. With MALLOC_MMAP_THRESHOLD_=65536 it gives back and takes longer.
    """

    config: PipelineConfig
    latent_shape: tuple[int, int, int, int]
    plan: SamplingPlan
    prompt_tokens: int
    max_sequence_length: int
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    attention: AttentionConfig | str = "sdpa"
    has_image: bool = False
    offload: str = "none"
    quantize: str = "none"
    chunk_latents: int = CHUNK_LATENTS
    tile: int | None = None
    malloc_keeps: bool = True

    @property
    def grid(self) -> Grid:
        """Tokens along T, H and W."""
        return self.config.transformer.token_grid(self.latent_shape[1:])

    def counter(self, stage: str) -> LiveBytes:
        """What counts a stage's bytes on the device."""
        if self.device.type != "cpu":
            return LiveBytes()
        return ProcessBytes(HOLES[stage] if self.malloc_keeps else None)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes at the worst moment of each stage.

    Attributes:
        request: what it was made for.
        stages: on the device, by name: load, encode_text, [encode_image,] denoise, decode.
        host: beside a device that is not the CPU: weights kept there, and the finished video.
    """

    request: MemoryRequest
    stages: dict[str, int]
    host: int

    @property
    def worst(self) -> str:
        """The stage that needs most."""
        return max(self.stages, key=lambda name: self.stages[name])

    @property
    def peak(self) -> int:
        return self.stages[self.worst]

    def __str__(self) -> str:
        stages = ", ".join(f"{name} {size(n)}" for name, n in self.stages.items())
        return stages + (f"; host {size(self.host)}" if self.host else "")


def size(num_bytes: float) -> str:
    """For a person: `11.3 GiB`."""
    if num_bytes >= 0.1 * GIB:
        return f"{num_bytes / GIB:.1f} GiB"
    return f"{num_bytes / 2**20:.1f} MiB"


def predict_memory(request: MemoryRequest, known: dict[Any, Any] | None = None) -> MemoryPlan:
    """What each stage takes at its worst moment.

    Args:
        known: what was found for requests that differ in the options of `alternatives` only; it is
            looked up and added to.
    """
    found = {} if known is None else known

    def once(compute: Callable[[MemoryRequest], Any], *options: str) -> Any:
        """Anew only for other values of the options that it depends on."""
        key = (compute, *(str(getattr(request, name)) for name in options))
        if key not in found:
            found[key] = compute(request)
        return found[key]

    networks = once(networks_of, "dtype", "quantize")
    working = {
        "encode_text": ("text_encoder", once(text_bytes, "dtype", "quantize")),
        "denoise": ("transformer", once(denoise_bytes, "dtype", "quantize", "attention")),
        "decode": ("vae", once(decode_bytes, "dtype", "chunk_latents", "tile")),
    }
    if request.has_image:
        working["encode_image"] = ("vae", once(image_bytes, "dtype"))
    on_cpu = request.device.type == "cpu"
    loading = load_bytes(request, networks)
    stages = {"load": loading if on_cpu or request.offload == "none" else 0}
    for stage in ("encode_text", "encode_image", "denoise", "decode"):
        if stage in working:
            part, more = working[stage]
            stages[stage] = resident_bytes(request, networks, part) + more
    video = video_bytes(request)
    if on_cpu:
        stages["decode"] += written_bytes(request)
        return MemoryPlan(request, stages, 0)
    if request.offload == "none":
        return MemoryPlan(request, stages, video)
    kept = sum(host_bytes(request, module) for module in networks.values())
    return MemoryPlan(request, stages, max(kept + video, loading))


def check_fits(plan: MemoryPlan, free: int, free_host: int | None = None) -> None:
    """Refuse a plan that the device, or the host beside it, has no room for.

    Args:
        free: bytes of the device.
        free_host: bytes of the host, where the device is not the CPU.

    Raises:
        WanError: names the worst stage, what is free, and the first options that would do.
    """

    def problem_of(plan: MemoryPlan) -> str | None:
        """What is too large, and for where."""
        if plan.peak > free * (1 - RESERVE):
            needed = f"{plan.worst} would take {size(plan.peak)}, {size(free)} are free"
            return f"{plan.request.device}: {needed}"
        if free_host is not None and plan.host > free_host * (1 - RESERVE):
            what = "the finished video" if plan.request.offload == "none" else "weights and video"
            return f"the host: {what} would take {size(plan.host)}, {size(free_host)} are free"
        return None

    if (problem := problem_of(plan)) is None:
        return
    on_host = problem.startswith("the host")
    known: dict[Any, Any] = {}
    for options in alternatives(plan.request, on_host):
        other = predict_memory(replace(plan.request, **options), known)
        if problem_of(other) is None:
            words = " ".join(f"{name}={value_name(value)}" for name, value in options.items())
            beside = f" and {size(other.host)} of the host" if on_host else ""
            remedy = f"{words} would take {size(other.peak)}{beside}"
            break
    else:
        remedy = "no option here makes it fit: take a smaller height, width or num_frames"
    raise WanError(f"not enough memory on {problem}; {remedy} (preflight=never tries anyway)")


def alternatives(request: MemoryRequest, on_host: bool = False) -> Iterator[dict[str, Any]]:
    """Combinations of options that need less, those that change less of the video first.

    Chunks of one latent and a fused kernel in place of the written formula change numbers by the
    rounding of sums, offloading none; a dtype and quantisation do change them, and the borders of
    tiles can show.

    Args:
        on_host: it is the host that lacks memory, and less offloading that helps.
    """
    on_cpu, at = request.device.type == "cpu", OFFLOAD.index(request.offload)
    others = OFFLOAD[:at][::-1] if on_host else OFFLOAD[at + 1 :]
    name = request.attention if isinstance(request.attention, str) else request.attention.name
    choices: list[list[dict[str, Any]]] = [  # the last one varies fastest
        [{"tile": 16}] if request.tile is None and min(request.latent_shape[2:]) > 16 else [],
        [{"quantize": "int8"}] if request.quantize == "none" else [],
        [{"dtype": torch.bfloat16}] if request.dtype == torch.float32 else [],
        [] if on_cpu else [{"offload": way} for way in others],
        [{"chunk_latents": 1}] if request.chunk_latents > 1 else [],
        [{"attention": "sdpa"}] if name in ATTENTION and name != "sdpa" else [],
    ]
    for chosen in itertools.product(*([{}, *one] for one in choices)):
        if any(chosen):
            yield {name: value for one in chosen for name, value in one.items()}


def value_name(value: Any) -> str:
    return str(value).removeprefix("torch.")


# --- weights --------------------------------------------------------------------------------------


def weight_bytes(config: PipelineConfig, dtype: torch.dtype) -> int:
    """Of all networks in one dtype, in round numbers: what stays float32 counts as the others."""
    builders = module_builders(config)
    networks = [build_on_meta(builders[part]) for part in config.components]
    return sum(p.numel() for network in networks for p in network.parameters()) * dtype.itemsize


def rough_bytes(
    config: PipelineConfig, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> int:
    """About what latents of a (C, T, h, w) shape take with all weights: is predicting worth it?

    The finished frames; and the larger of decoding, 6 activations of a chunk at its largest, and a
    transformer's feed-forward layer.
    """
    vae, dit = config.vae, config.transformer
    _, frames, height, width = shape
    video = 12 * ((frames - 1) * vae.temporal_stride + 1) * height * width * vae.spatial_stride**2
    stride = vae.spatial_stride // (vae.patch_size or 1)
    chunk = 1 + CHUNK_LATENTS * vae.temporal_stride
    channels = (vae.decoder_base_dim or vae.base_dim) * max(vae.dim_mult[:2])
    decode = 6 * channels * chunk * height * width * stride**2
    tokens = math.prod(dit.token_grid(shape[1:]))
    denoise = tokens * (2 * dit.ffn_dim + 4 * dit.width)
    return weight_bytes(config, dtype) + video + max(decode, denoise) * dtype.itemsize


def networks_of(request: MemoryRequest) -> dict[str, Any]:
    return {part: network_of(request, part) for part in request.config.components}


def network_of(request: MemoryRequest, part: str) -> Any:
    """A network without values, with the dtypes that loading would give it."""
    build = module_builders(request.config, counted_attention(request))[part]
    module: Any = build_on_meta(build)
    float32 = type(module).FLOAT32_PARAMETERS
    state = {
        name: tensor.to(target_dtype(name, tensor.dtype, request.dtype, float32))
        for name, tensor in module.state_dict().items()
    }
    module.load_state_dict(state, assign=True)
    if part in QUANTIZED_PARTS:
        quantize(module, request.quantize)
    return module.eval().requires_grad_(False)


def counted_attention(request: MemoryRequest) -> AttentionChoice:
    """The attention that takes on meta what the request's takes on its device.

    Kernels of other packages do not run on meta, and need what PyTorch's fused kernel needs.
    """
    choice = request.attention
    config = AttentionConfig(choice) if isinstance(choice, str) else choice
    if config.name in ("flash3", "sage"):
        return "sdpa"
    if request.device.type == "cuda" and config.name in SPARSE:
        sparse: Any = build_attention(config.name, **config.options())
        if not getattr(sparse.of_layer(0), "DISJOINT", False):
            return counted_flex(sparse, request.grid)
    return choice


def counted_flex(sparse: Any, grid: Grid) -> AttentionFunction:
    """Overlapping windows on a GPU: FlexAttention, of which meta makes the result alone.

    The block mask is made in the first layer, and before it all (L, L) places that it sums up.
    """

    def kernel(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Tensor:
        return torch.empty_like(q)

    @cache
    def mask() -> tuple[Any, Tensor, Tensor]:
        return block_mask.__wrapped__(sparse, grid, META)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        if k.shape != q.shape:  # to the text
            return sdpa_attention(q, k, v, bias)
        if isinstance(sparse, Pattern):
            return attend_blocks(q, k, v, *mask(), kernel=kernel)
        return sparse.on_gpu(q, k, v, grid, kernel)

    return attend


def kept_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def resident_bytes(request: MemoryRequest, networks: dict[str, Any], part: str) -> int:
    """Weights on the device while one part is at work."""
    module = networks[part]
    everything = sum(kept_bytes(other) for other in networks.values())
    slots = 0
    if request.offload == "block" and has_blocks(module):
        slots = min(2, len(module.blocks)) * kept_bytes(module.blocks[0])
    if request.device.type == "cpu":  # nothing moves; the slots come on top
        return everything + slots
    if request.offload == "none":
        return everything
    return kept_bytes(module) - (kept_bytes(module.blocks) - slots if slots else 0)


def host_bytes(request: MemoryRequest, module: nn.Module) -> int:
    """Weights that stay on the host, beside a device that borrows them.

    A file may hold them as they are wanted; then they are its pages, and what is counted here is
    what the system must read again if it gives them up. Not so for what is pinned, of which PyTorch
    rounds every tensor up to a power of two.
    """
    if request.offload == "block" and request.device.type == "cuda" and has_blocks(module):
        sizes = (tensor.nbytes for tensor in module.state_dict().values())
        return sum(1 << (num_bytes - 1).bit_length() for num_bytes in sizes)
    return kept_bytes(module)


def load_bytes(request: MemoryRequest, networks: dict[str, Any]) -> int:
    """Weights that are kept, and what is on its way to them."""
    before = peak = 0
    for part, module in networks.items():
        before += kept_bytes(module)
        sizes = {name: tensor.numel() for name, tensor in module.state_dict().items()}
        passing = min(8, os.cpu_count() or 1) * min(CHUNK_BYTES, 4 * max(sizes.values()))
        if request.quantize != "none" and part in QUANTIZED_PARTS:
            quantized = [size for name, size in sizes.items() if is_quantized_weight(name)]
            # A group as it was read, and two float32 copies of the weight at hand; by then the
            # buffers of reading are gone.
            group = min(GROUP_BYTES, sum(quantized) * request.dtype.itemsize)
            passing = max(passing, group + 2 * 4 * max(quantized))
        peak = max(peak, before + passing)
    return peak


# --- what stages need beside them -----------------------------------------------------------------


def text_bytes(request: MemoryRequest) -> int:
    encoder: UMT5Encoder = network_of(request, "text_encoder")
    length, width = request.max_sequence_length, request.config.text_encoder.d_model

    def encode() -> Tensor:
        context = torch.zeros(1, length, width, dtype=request.dtype, device=META)
        tokens = min(request.prompt_tokens, length)
        context[0, :tokens] = encoder(torch.zeros(1, tokens, dtype=torch.int64, device=META))[0]
        return context

    with FusedAttention():
        return peak_bytes(encode, request.counter("encode_text"))


def denoise_bytes(request: MemoryRequest) -> int:
    """The sampler's states, the text's keys and values, and one forward of the network."""
    dit: WanDiT = network_of(request, "transformer")
    scale, plan = request.plan.guidance_scale, request.plan
    shape, steps = (1, *request.latent_shape), min(3, len(plan.schedule))
    schedule = Schedule(
        plan.schedule.timesteps[:steps],
        torch.cat([plan.schedule.sigmas[:steps], plan.schedule.sigmas[-1:]]),
        plan.schedule.description,
    )
    # Rows as `wan.sampling.denoiser.num_text_tokens` and `wan.models.dit.share_padding` leave them.
    rows = min(-(-(request.prompt_tokens + 2) // 8) * 8, request.max_sequence_length)
    text_dim = request.config.transformer.text_dim

    def context() -> Tensor:
        length = request.max_sequence_length
        return torch.empty(1, length, text_dim, dtype=request.dtype, device=META)

    def denoise(forward: int) -> Tensor:
        noise = torch.empty(shape, device=META)
        contexts = [context() for _ in range(1 + (scale != 1))]
        prepared = [dit.prepare_context(one[:, :rows]) for one in contexts]

        def velocity(x: Tensor, _: float) -> Tensor:
            x = x.clone() if request.has_image else x  # with the first frame put in
            memory.spike(forward)
            conditional = torch.empty(shape, device=META)
            if scale == 1:
                return conditional
            memory.spike(forward)
            return guide(conditional, torch.empty(shape, device=META), scale)

        options: dict[str, Any] = {}
        if plan.sampler == "few_step":
            options["renoise"] = lambda i: torch.empty(shape, device=META)
        x = build_sampler(plan.sampler)(velocity, noise, schedule, **options)
        del prepared
        return x

    with FusedAttention(), torch.no_grad():
        prepared = dit.prepare_context(context()[:, :rows])
        timestep = torch.zeros((1, shape[2]) if request.has_image else (1,), device=META)
        noise = torch.empty(shape, device=META)
        forward = peak_bytes(lambda: dit(noise, timestep, prepared), request.counter("denoise"))
        with request.counter("denoise") as memory:
            denoise(forward)
    return memory.peak


def image_bytes(request: MemoryRequest) -> int:
    """Encoding the first frame."""
    vae: WanVAE = network_of(request, "vae")
    stride = request.config.vae.spatial_stride
    height, width = (n * stride for n in request.latent_shape[2:])

    def encode() -> Tensor:
        return vae.encode(torch.empty(1, 3, 1, height, width, device=META))

    with FusedAttention():
        return peak_bytes(encode, request.counter("encode_image"))


def decode_bytes(request: MemoryRequest) -> int:
    """Decoding chunk by chunk, each handed over to the CPU; tiles are joined on the device."""
    channels, frames, height, width = request.latent_shape
    if request.tile is not None:
        height, width = min(height, request.tile), min(width, request.tile)
    # After two whole chunks beyond the first latent, decoding has reached its full working set.
    few = min(frames, 1 + 2 * request.chunk_latents)
    needed = chunks_bytes(replace(request, latent_shape=(channels, few, height, width)))
    if request.tile is None:
        return needed
    tile = video_bytes(replace(request, latent_shape=(channels, frames, height, width)))
    # A tile's frames, joined, in float32; all frames, and divided by their weights.
    return max(needed + video_bytes(request) + 2 * tile, 3 * video_bytes(request))


def chunks_bytes(request: MemoryRequest) -> int:
    vae: WanVAE = network_of(request, "vae")

    def decode() -> None:
        latents = torch.empty(1, *request.latent_shape, device=META)
        for _chunk in vae.decode_stream(latents, request.chunk_latents):
            pass  # it lives until the next one is there, as in the pipeline

    with FusedAttention():
        return peak_bytes(decode, request.counter("decode"))


def written_bytes(request: MemoryRequest) -> int:
    """Of the finished frames, those that are there while the last chunk is decoded.

    The system hands out a buffer's pages when they are first written.
    """
    channels, frames, height, width = request.latent_shape
    if request.tile is not None or frames <= 1 + request.chunk_latents:
        return 0
    last = (frames - 2) % request.chunk_latents + 1  # latents; the first chunk has one more
    shape = (channels, frames - last, height, width)
    return video_bytes(replace(request, latent_shape=shape))


def video_bytes(request: MemoryRequest) -> int:
    """The finished float32 frames."""
    vae = request.config.vae
    _, frames, height, width = request.latent_shape
    pixels = 3 * height * width * vae.spatial_stride**2
    return 4 * pixels * ((frames - 1) * vae.temporal_stride + 1)
