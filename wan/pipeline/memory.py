"""Estimate the memory that a video takes, stage by stage, before any weight is read.

    estimate = estimate_memory(request)
    check_fits(estimate, free_bytes(device), free_bytes(cpu))

Weights are counted from the networks on the meta device, with the dtypes and the quantisation that
loading gives them. The working memory of a stage is counted by running the stage's own code there
(`wan.runtime.memory_meter`), so that the estimate cannot drift from what is run.

Weights that stay views of their files are not counted as taken: the system drops their pages when
it needs room, and reads them again. Where they do not fit beside the rest, a run is slow.

Not counted on GPUs: workspaces of kernels, fragmentation and the CUDA context. On a CPU the working
memory is multiplied by `CPU_MARGIN`. Compiled networks are counted as eager ones, which need more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from wan.errors import WanError
from wan.models.attention import ATTENTION, network_attention
from wan.pipeline.memory_counts import (
    DECODER,
    MemoryRequest,
    decode_bytes,
    denoise_bytes,
    host_bytes,
    image_bytes,
    load_bytes,
    mapped_bytes,
    networks_of,
    resident_bytes,
    text_bytes,
    video_bytes,
)
from wan.runtime.offload import OFFLOAD, has_blocks

# Share of the free memory that is kept for what is not counted.
RESERVE = 0.05
# A CPU process needs more working memory than its tensors, by this factor: kernels copy operands
# into layouts of their own, and malloc keeps part of what is freed. The factor varied from 1.2 to
# 2.6 between runs of the miniature in float32 with glibc 2.36 (`tests/test_memory.py`); it was 10
# for convolutions in bfloat16 without AVX-512.
CPU_MARGIN = 3
GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the worst moment of each stage.

    Attributes:
        request: what the estimate is for.
        stages: bytes on the device, by stage: load, encode_text, [encode_image,] denoise, decode.
        host: bytes beside a device that is not the CPU: weights kept there, and the finished video.
        mapped: bytes of weights that stay views of their files, which are counted nowhere else.
    """

    request: MemoryRequest
    stages: dict[str, int]
    host: int
    mapped: int = 0

    @property
    def worst(self) -> str:
        """The stage that needs most."""
        return max(self.stages, key=lambda name: self.stages[name])

    @property
    def peak(self) -> int:
        return self.stages[self.worst]

    def __str__(self) -> str:
        stages = ", ".join(f"{name} {size(n)}" for name, n in self.stages.items())
        if self.host:
            stages += f"; host {size(self.host)}"
        return stages + (f"; weights mapped from files {size(self.mapped)}" if self.mapped else "")


def size(num_bytes: float) -> str:
    """A number of bytes in words: `11.3 GiB`."""
    if num_bytes >= 0.1 * GIB:
        return f"{num_bytes / GIB:.1f} GiB"
    return f"{num_bytes / 2**20:.1f} MiB"


def estimate_memory(request: MemoryRequest, known: dict[Any, Any] | None = None) -> MemoryEstimate:
    """Bytes that each stage takes at its worst moment.

    Args:
        known: a cache of partial results, read and filled here. Requests that share it may differ
            only in the options that `remedies` returns.
    """
    found = {} if known is None else known

    def once(compute: Callable[[MemoryRequest], Any], *options: str) -> Any:
        """Compute again only for other values of the options that the result depends on."""
        key = (compute, *(str(getattr(request, name)) for name in options))
        if key not in found:
            found[key] = compute(request)
        return found[key]

    networks = once(networks_of, "dtype", "quantize")
    mapped = mapped_bytes(request, networks)
    decoder = "vae" if request.decoder is None else DECODER
    working = {
        "encode_text": ("text_encoder", once(text_bytes, "dtype", "quantize")),
        "denoise": ("transformer", once(denoise_bytes, "dtype", "quantize", "attention")),
        "decode": (decoder, once(decode_bytes, "dtype", "chunk_latents", "tile")),
    }
    if request.has_image:
        working["encode_image"] = ("vae", once(image_bytes, "dtype"))
    on_cpu = request.device.type == "cpu"
    margin = CPU_MARGIN if on_cpu else 1
    loading = load_bytes(request, networks, mapped)
    stages = {"load": loading if on_cpu or request.offload == "none" else 0}
    for stage in ("encode_text", "encode_image", "denoise", "decode"):
        if stage in working:
            part, more = working[stage]
            stages[stage] = resident_bytes(request, networks, mapped, part) + int(margin * more)
    video = video_bytes(request)
    if on_cpu:
        stages["decode"] += video
        return MemoryEstimate(request, stages, 0, sum(mapped.values()))
    if request.offload == "none":
        return MemoryEstimate(request, stages, video)
    if request.offload == "block":  # pinned copies
        mapped = {part: n for part, n in mapped.items() if not has_blocks(networks[part])}
    kept = sum(host_bytes(request, module) for module in networks.values())
    views = sum(mapped.values())
    return MemoryEstimate(request, stages, max(kept - views + video, loading), views)


def check_fits(estimate: MemoryEstimate, free: int, free_host: int | None = None) -> None:
    """Refuse a request that needs more memory than the device or the host has free.

    Args:
        free: bytes that are free on the device.
        free_host: bytes that are free on the host, where the device is not the CPU.

    Raises:
        WanError: names the worst stage, what is free, and options with which the request fits.
    """

    def problem_of(estimate: MemoryEstimate) -> str | None:
        """A sentence that says what does not fit where; None if all fits."""
        request = estimate.request
        if estimate.peak > free * (1 - RESERVE):
            needed = f"{estimate.worst} would take {size(estimate.peak)}, {size(free)} are free"
            return f"{request.device}: {needed}"
        if free_host is not None and estimate.host > free_host * (1 - RESERVE):
            what = "the finished video" if request.offload == "none" else "weights and video"
            needed = f"{what} would take {size(estimate.host)}, {size(free_host)} are free"
            return f"the host: {needed}"
        return None

    if (problem := problem_of(estimate)) is None:
        return
    on_host = problem.startswith("the host")
    known: dict[Any, Any] = {}

    def with_options(options: dict[str, Any]) -> MemoryEstimate:
        return estimate_memory(replace(estimate.request, **options), known)

    def fits(options: dict[str, Any]) -> bool:
        return problem_of(with_options(options)) is None

    options = fewest(remedies(estimate.request, on_host), fits)
    remedy = "no option here makes it fit: take a smaller height, width or num_frames"
    if options is not None:
        other = with_options(options)
        words = " ".join(
            f"{name}={str(value).removeprefix('torch.')}" for name, value in options.items()
        )
        beside = f" and {size(other.host)} of the host" if on_host else ""
        remedy = f"{words} would take {size(other.peak)}{beside}"
    raise WanError(f"not enough memory on {problem}; {remedy} (preflight=never tries anyway)")


def remedies(request: MemoryRequest, on_host: bool = False) -> list[dict[str, Any]]:
    """Options that need less memory; those that change the video least come first.

    A fused attention kernel and chunks of one latent change results by the rounding of sums only,
    and offload changes nothing. Another dtype and quantisation do change results, and the borders
    of tiles can be visible.

    Args:
        on_host: the host lacks memory, not the device; then less offload helps.
    """
    at = OFFLOAD.index(request.offload)
    others = OFFLOAD[:at][::-1] if on_host else OFFLOAD[at + 1 :]
    name = network_attention(request.attention, request.config.transformer.num_layers).config.name
    options: list[dict[str, Any]] = []
    if name in ATTENTION and name != "sdpa":
        options.append({"attention": "sdpa"})
    if request.chunk_latents > 1:
        options.append({"chunk_latents": 1})
    if request.device.type != "cpu":
        options += [{"offload": way} for way in others]
    if request.dtype == torch.float32:
        options.append({"dtype": torch.bfloat16})
    if request.quantize == "none":
        options.append({"quantize": "int8"})
    if request.tile is None and request.decoder is None and max(request.latent_shape[2:]) > 16:
        options.append({"tile": 16})
    return options


def fewest(
    options: Sequence[dict[str, Any]], fits: Callable[[dict[str, Any]], bool]
) -> dict[str, Any] | None:
    """Add options in order until all fits, then drop those not needed; None if nothing fits."""
    chosen: dict[str, Any] = {}
    for option in options:
        chosen |= option
        if fits(chosen):
            for name in list(chosen)[::-1]:
                fewer = {other: value for other, value in chosen.items() if other != name}
                if fewer and fits(fewer):
                    chosen = fewer
            return chosen
    return None
