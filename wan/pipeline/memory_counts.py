"""Bytes of weights and of each stage's working memory, counted on the meta device.

`wan.pipeline.memory` adds them up. Layers of one kind run in turn and need the same memory, so only
two of them are run.
"""

import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from wan.models.attention import (
    SPARSE,
    AttentionChoice,
    AttentionFunction,
    Grid,
    NetworkAttention,
    build_attention,
    network_attention,
    sdpa_attention,
)
from wan.models.attention.pattern import Pattern, attend_blocks, block_mask
from wan.models.dit import WanDiT
from wan.models.taehv import TinyDecoder, TinyKind
from wan.models.umt5 import UMT5Encoder
from wan.models.vae import WanVAE
from wan.models.vae_config import CHUNK_LATENTS
from wan.pipeline.config import PipelineConfig
from wan.pipeline.folder import QUANTIZED_PARTS, ModelFolder, module_builders, part_builder
from wan.pipeline.parts import weight_kind
from wan.pipeline.plan import SamplingPlan
from wan.precision import working_dtype
from wan.runtime.costs import count_parameters
from wan.runtime.memory_meter import FusedAttention, LiveBytes, peak_bytes
from wan.runtime.offload import has_blocks
from wan.sampling.denoiser import guide
from wan.sampling.samplers import sample
from wan.sampling.schedule import Schedule
from wan.weights.checkpoint import holds_weights
from wan.weights.load import GROUP_BYTES, build_on_meta, match_names, target_dtype
from wan.weights.quantize import is_quantized_weight, quantize_layers
from wan.weights.tensor_reader import CHUNK_BYTES

META = torch.device("meta")
DECODER = "decoder"  # the part of a tiny decoder
# Our name -> dtype in the file; None for weights that are still to be fetched.
StoredDtypes = Mapping[str, torch.dtype] | None


@dataclass(frozen=True)
class MemoryRequest:
    """A video to make, and the options that its memory depends on.

    Attributes:
        config: the settings of the model.
        latent_shape: (C, T, h, w).
        plan: sampler, schedule and guidance.
        prompt_tokens: number of tokens of the longest text.
        max_sequence_length: number of text tokens that the transformer reads, padding included.
        device, dtype, attention, offload, quantize: as for `WanPipeline.from_pretrained`.
        has_image: the video starts from a given frame.
        chunk_latents: latent frames that are decoded at a time.
        tile: latents per side of the tiles that are decoded, or None for whole frames.
        decoder: the tiny decoder that decodes in place of the VAE's, if there is one. The VAE is
            then loaded for a given frame only.
        stored: part -> what `stored_dtypes` says of its weights. Weights that keep their dtype on
            the CPU are views of their files: the system may drop such pages and read them again,
            so they are not counted as taken. Of a part that is missing here nothing is a view.
    """

    config: PipelineConfig
    latent_shape: tuple[int, int, int, int]
    plan: SamplingPlan
    prompt_tokens: int
    max_sequence_length: int
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    attention: AttentionChoice = "sdpa"
    has_image: bool = False
    offload: str = "none"
    quantize: str = "none"
    chunk_latents: int = CHUNK_LATENTS
    tile: int | None = None
    decoder: TinyKind | None = None
    stored: Mapping[str, "StoredDtypes"] = field(default_factory=dict)

    @property
    def grid(self) -> Grid:
        """Number of tokens along T, H and W."""
        return self.config.transformer.token_grid(self.latent_shape[1:])

    @property
    def computing(self) -> "MemoryRequest":
        """The same in the dtype of products, in which working memory is counted."""
        return replace(self, dtype=working_dtype(self.dtype, self.device))


def weight_bytes(config: PipelineConfig, dtype: torch.dtype) -> int:
    """Bytes of all weights if every parameter had this dtype; float32 exceptions are ignored."""
    others = [part_builder(part, getattr(config, part)) for part in ("vae", "text_encoder")]
    count = sum(p.numel() for build in others for p in build_on_meta(build).parameters())
    num_experts = len(config.components) - len(others)
    count += num_experts * count_parameters(config.transformer).total
    return count * dtype.itemsize


def rough_bytes(
    config: PipelineConfig, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> int:
    """A rough upper estimate of peak memory, to decide whether the exact one should run.

    It adds weights, finished frames, and the larger of decoding (6 activations of a chunk at its
    largest) and a feed-forward layer of the transformer.

    Args:
        shape: (C, T, h, w) of the latents.
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
    """All networks that are loaded, without values, by part, with the dtypes that loading gives."""
    builders = module_builders(request.config, request.attention)
    idle = request.decoder is not None and not request.has_image
    parts = [part for part in request.config.components if part != "vae" or not idle]
    networks = {part: as_loaded(builders[part], request, part) for part in parts}
    if (kind := request.decoder) is not None:
        networks[DECODER] = build_on_meta(lambda: TinyDecoder(kind)).to(request.dtype)
    return networks


def as_loaded(build: Callable[[], nn.Module], request: MemoryRequest, part: str) -> Any:
    """A network on the meta device in the dtypes and the quantisation that loading gives it."""
    module: Any = build_on_meta(build)
    float32 = type(module).FLOAT32_PARAMETERS
    quantized: set[str] = set()
    if part in QUANTIZED_PARTS and request.quantize != "none":
        before = dict(module.named_parameters())
        quantize_layers(module, request.quantize)
        after = dict(module.named_parameters())  # 8-bit weights and their scales keep their dtypes
        quantized = {n for n in after if n not in before or after[n].dtype != before[n].dtype}
    state = {
        name: tensor
        if name in quantized
        else tensor.to(target_dtype(name, tensor.dtype, request.dtype, float32))
        for name, tensor in module.state_dict().items()
    }
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def shallow(request: MemoryRequest, part: str) -> Any:
    """A network to count working memory with: in the dtype of products, and of two layers, or of
    one layer per kind of attention.
    """
    config = request.config
    attention = counted_attention(request)
    kinds = tuple(dict.fromkeys(attention.layers))
    layers = kinds if len(kinds) > 1 else kinds * 2
    config = replace(
        config,
        transformer=replace(config.transformer, num_layers=len(layers)),
        text_encoder=replace(config.text_encoder, num_layers=2),
    )
    builders = module_builders(config, replace(attention, layers=layers))
    return as_loaded(builders[part], request.computing, part)


def counted_attention(request: MemoryRequest) -> NetworkAttention:
    """An attention that needs as much on the meta device as the request's on its own device.

    Kernels of other packages do not run on the meta device; they need as much as PyTorch's fused
    kernel.
    """
    num_layers = request.config.transformer.num_layers
    attention = network_attention(request.attention, num_layers)
    config = attention.config
    if config.name in ("flash3", "sage"):
        return network_attention("sdpa", num_layers)
    if request.device.type == "cuda" and config.name in SPARSE:
        sparse: Any = build_attention(config.name, **config.options())
        if not getattr(sparse.of_layer(0), "DISJOINT", False):
            return network_attention(counted_flex(sparse, request.grid), num_layers)
    return attention


def counted_flex(sparse: Any, grid: Grid) -> AttentionFunction:
    """FlexAttention for overlapping windows on a GPU; the meta device allocates only its result.

    The first layer builds the block mask, and for it the (L, L) mask that it summarises.
    """

    def kernel(q: Tensor, k: Tensor, v: Tensor, block_mask: Any) -> Tensor:
        return torch.empty_like(q)

    @cache
    def mask() -> tuple[Any, Tensor, Tensor]:
        return block_mask.__wrapped__(sparse, grid, META)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        if k.shape != q.shape:  # cross-attention
            return sdpa_attention(q, k, v, bias)
        if isinstance(sparse, Pattern):
            return attend_blocks(q, k, v, *mask(), kernel=kernel)
        return sparse.on_gpu(q, k, v, grid, kernel)

    return attend


def stored_dtypes(folder: ModelFolder, changed: Collection[str] = ()) -> dict[str, StoredDtypes]:
    """The dtypes of all weights that may stay in their files, by part; reads headers only.

    Args:
        changed: parts that a LoRA is merged into: all of their weights are read into memory.
    """
    found: dict[str, StoredDtypes] = {}
    for part in folder.config.components:
        if part in changed:
            continue
        found[part] = None
        if holds_weights(folder.part(part)):
            tensors = match_names(folder.checkpoint(part), weight_kind(part)).stored
            found[part] = {n: t.entry.dtype for n, t in tensors.items() if t.scale is None}
    return found


def mapped_bytes(request: MemoryRequest, networks: dict[str, Any]) -> dict[str, int]:
    """Bytes of weights, by part, that are views of their files once they are loaded."""
    if request.device.type != "cpu" and request.offload == "none":
        return {}

    def is_view(part: str, name: str, tensor: Tensor) -> bool:
        stored = request.stored[part]
        if stored is not None:
            return stored.get(name) == tensor.dtype
        # No doubt before the files can be looked at, but for 8-bit weights and their scales.
        weight = f"{name.removesuffix('scale')}weight" if name.endswith("scale") else name
        is_quantized = request.quantize != "none" and is_quantized_weight(weight)
        wide = tensor.is_floating_point() and tensor.dtype.itemsize > 1
        return wide and not (is_quantized and part in QUANTIZED_PARTS)

    return {
        part: sum(t.nbytes for n, t in module.state_dict().items() if is_view(part, n, t))
        for part, module in networks.items()
        if part in request.stored
    }


def kept_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def resident_bytes(
    request: MemoryRequest, networks: dict[str, Any], mapped: Mapping[str, int], part: str
) -> int:
    """Bytes of weights on the device while one part computes.

    Args:
        mapped: from `mapped_bytes`; not counted on a CPU.
    """
    module = networks[part]
    everything = sum(kept_bytes(other) for other in networks.values())
    slots = 0
    if request.offload == "block" and has_blocks(module):
        slots = min(2, len(module.blocks)) * kept_bytes(module.blocks[0])
    if request.device.type == "cpu":  # nothing moves; the slots come on top
        return everything + slots - sum(mapped.values())
    if request.offload == "none":
        return everything
    # With block offload, the slots are there in place of all blocks.
    return kept_bytes(module) - (kept_bytes(module.blocks) - slots if slots else 0)


def host_bytes(request: MemoryRequest, module: nn.Module) -> int:
    """Bytes of weights, mapped ones included, that stay on the host while a device gets copies.

    Blocks that a GPU streams are copied into pinned memory, and PyTorch rounds each tensor there up
    to a power of two.
    """
    if request.offload == "block" and request.device.type == "cuda" and has_blocks(module):
        sizes = (tensor.nbytes for tensor in module.state_dict().values())
        return sum(1 << (num_bytes - 1).bit_length() for num_bytes in sizes)
    return kept_bytes(module)


def load_bytes(
    request: MemoryRequest, networks: dict[str, Any], mapped: Mapping[str, int] | None = None
) -> int:
    """Peak bytes while loading: the weights read so far, and the buffers of the reader.

    Args:
        mapped: from `mapped_bytes`; not counted.
    """
    mapped = mapped or {}
    before = peak = 0
    for part, module in networks.items():
        before += kept_bytes(module) - mapped.get(part, 0)
        sizes = {name: tensor.numel() for name, tensor in module.state_dict().items()}
        passing = min(8, os.cpu_count() or 1) * min(CHUNK_BYTES, 4 * max(sizes.values()))
        if request.quantize != "none" and part in QUANTIZED_PARTS:
            quantized = [size for name, size in sizes.items() if is_quantized_weight(name)]
            # A group as it was read, and two float32 copies of the weight that is quantised; the
            # buffers of the reader are free by then.
            group = min(GROUP_BYTES, sum(quantized) * request.dtype.itemsize)
            passing = max(passing, group + 2 * 4 * max(quantized))
        peak = max(peak, before + passing)
    return peak


def text_bytes(request: MemoryRequest) -> int:
    """Working memory of encoding the longest text."""
    encoder: UMT5Encoder = shallow(request, "text_encoder")
    length, width = request.max_sequence_length, request.config.text_encoder.d_model

    def encode() -> Tensor:
        context = torch.zeros(1, length, width, dtype=request.dtype, device=META)
        tokens = min(request.prompt_tokens, length)
        context[0, :tokens] = encoder(torch.zeros(1, tokens, dtype=torch.int64, device=META))[0]
        return context

    with FusedAttention():
        return peak_bytes(encode)


def denoise_bytes(request: MemoryRequest) -> int:
    """Working memory of sampling: states, the text's keys and values, and one forward."""
    dit: WanDiT = shallow(request, "transformer")
    sizes, plan = request.config.transformer, request.plan
    guided = plan.guided  # by either of two experts
    # From the third step on, unipc holds as many states as it ever does.
    shape, steps = (1, *request.latent_shape), min(3, len(plan.schedule))
    schedule = Schedule(
        plan.schedule.timesteps[:steps],
        torch.cat([plan.schedule.sigmas[:steps], plan.schedule.sigmas[-1:]]),
        plan.schedule.description,
    )
    # The number that `num_text_tokens` and `wan.models.dit.share_padding` leave.
    tokens = min(-(-(request.prompt_tokens + 2) // 8) * 8, request.max_sequence_length)
    texts = (1 + guided) * request.max_sequence_length * sizes.text_dim * request.dtype.itemsize
    keys_values = (1 + guided) * 2 * sizes.num_layers * tokens * sizes.width
    with FusedAttention(), torch.no_grad():
        context = torch.empty(1, tokens, sizes.text_dim, dtype=request.dtype, device=META)
        prepared = dit.prepare_context(context)
        timestep = torch.zeros((1, shape[2]) if request.has_image else (1,), device=META)
        noise = torch.empty(shape, device=META)
        forward = peak_bytes(lambda: dit(noise, timestep, prepared))
        with LiveBytes() as memory:

            def velocity(x: Tensor, _: float) -> Tensor:
                x = x.clone() if request.has_image else x  # with the first frame put in
                memory.spike(forward)
                conditional = torch.empty(shape, device=META)
                if not guided:
                    return conditional
                memory.spike(forward)
                unconditional = torch.empty(shape, device=META)
                return guide(conditional, unconditional, 2.0)  # the scale changes no size

            noise = torch.empty(shape, device=META)
            stepper = replace(plan, schedule=schedule).stepper(
                lambda i: torch.empty(shape, device=META)
            )
            sample(velocity, noise, stepper)
    return texts + keys_values * request.computing.dtype.itemsize + memory.peak


def image_bytes(request: MemoryRequest) -> int:
    """Working memory of encoding the first frame."""
    vae: WanVAE = shallow(request, "vae")
    stride = request.config.vae.spatial_stride
    height, width = (n * stride for n in request.latent_shape[2:])

    def encode() -> Tensor:
        return vae.encode_normalized(torch.empty(1, 3, 1, height, width, device=META))

    with FusedAttention():
        return peak_bytes(encode)


def decode_bytes(request: MemoryRequest) -> int:
    """Working memory of decoding. Chunks go to the CPU; tiles are joined on the device."""
    channels, frames, height, width = request.latent_shape
    if request.tile is not None:
        height, width = min(height, request.tile), min(width, request.tile)
    # After two whole chunks beyond the first latent, decoding has reached its full working set.
    few = min(frames, 1 + 2 * request.chunk_latents)
    needed = chunks_bytes(replace(request, latent_shape=(channels, few, height, width)))
    if request.tile is None:
        return needed
    tile = video_bytes(replace(request, latent_shape=(channels, frames, height, width)))
    # A tile's frames, joined, in float32; or all frames, and their quotient by the weights.
    return max(needed + video_bytes(request) + 2 * tile, 3 * video_bytes(request))


def chunks_bytes(request: MemoryRequest) -> int:
    """Decoding all latents of a request, chunk by chunk, without keeping the frames."""
    if (kind := request.decoder) is None:
        decoder: WanVAE | TinyDecoder = shallow(request, "vae")
    else:
        decoder = build_on_meta(lambda: TinyDecoder(kind)).to(request.dtype)

    def decode() -> None:
        latents = torch.empty(1, *request.latent_shape, device=META)
        for _chunk in decoder.decode_stream(latents, request.chunk_latents):
            pass  # a chunk lives until the next one exists, as in the pipeline

    with FusedAttention():
        return peak_bytes(decode)


def video_bytes(request: MemoryRequest) -> int:
    """Bytes of the finished frames in float32."""
    vae = request.config.vae
    _, frames, height, width = request.latent_shape
    pixels = 3 * height * width * vae.spatial_stride**2
    return 4 * pixels * ((frames - 1) * vae.temporal_stride + 1)
