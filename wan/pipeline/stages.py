"""The stages of a pipeline, each usable alone: encode text, encode an image, denoise, decode.

`PipelineStages` holds the parts and where they compute. `wan.pipeline.pipeline` puts the stages
together in one call, `wan.pipeline.switches` gives its settings diffusers' names.

B videos, C T h w latent sizes, F frames, H W pixels, S text tokens.
"""

import difflib
import inspect
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from wan.errors import WanError, check_names
from wan.models.attention import AttentionChoice, verified_attention
from wan.models.dit import WanDiT
from wan.models.taehv import TinyDecoder
from wan.models.tokenizer import Tokenizer, clean_prompt
from wan.models.umt5 import UMT5Encoder, encode_text
from wan.models.vae import WanVAE, decode_tiled
from wan.models.vae_config import CHUNK_LATENTS
from wan.pipeline.adapters import PipelineAdapters
from wan.pipeline.adopt import adopt_part, fitted_config
from wan.pipeline.arguments import known_dtype
from wan.pipeline.callbacks import Interrupted, StepFunction
from wan.pipeline.config import PipelineConfig
from wan.pipeline.folder import warn_of_attention
from wan.pipeline.inputs import (
    Generators,
    ImageInput,
    OnProgress,
    first_frames,
    negative_list,
    noise_streams,
    prompt_count,
    prompt_list,
    report,
)
from wan.pipeline.plan import SamplingPlan, SamplingRequest, plan_sampling
from wan.pipeline.tiny_decoder import check_fits_latents
from wan.precision import conv3d_warning
from wan.runtime.offload import (
    OFFLOAD,
    ExpertSlot,
    at_work,
    check_mapped_files,
    has_blocks,
    pin,
    resolve_device,
)
from wan.sampling.denoiser import Denoiser, Expert
from wan.sampling.noise import draw_noise
from wan.sampling.samplers import OnX0, sample
from wan.sampling.schedule import NUM_TIMESTEPS
from wan.weights.load import target_dtype
from wan.weights.quantize import QuantizedLinear

if TYPE_CHECKING:  # torch.distributed takes time to import, and most pipelines run alone
    from wan.runtime.parallel import ParallelGroup

MAX_CACHED_PROMPTS = 64
COMPILE = ("none", "dit", "all")
PARTS_IN_ORDER = ("tokenizer", "text_encoder", "vae", "transformer", "transformer_2")

P = TypeVar("P", bound="PipelineStages")


class Part:
    """A part of a pipeline as an attribute: it can be read, replaced, and set to None."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, pipeline: Any, owner: type | None = None) -> Any:
        return self if pipeline is None else pipeline._parts[self.name]

    def __set__(self, pipeline: Any, value: Any) -> None:
        pipeline.set_part(self.name, value)


class PipelineStages(PipelineAdapters):
    """The parts of a pipeline, and the stages that they compute.

    A part that no later call needs may be None: a pipeline with the text encoder alone encodes
    prompts, one without it takes `prompt_embeds`.

    Attributes:
        tokenizer, text_encoder, vae, transformer, transformer_2: the parts; each may be replaced.
        device: device that computes.
        offload: "none"; "stage": a module is copied to the device for its stage only; "block":
            at most two blocks of a transformer or text encoder are on the device at a time (see
            `wan.runtime.offload`). Results do not change.
        compile: "dit": the blocks of the transformers are compiled; "all": the VAE's decoder too.
        chunk_latents: latent frames that are decoded at a time, one more in the first chunk. Fewer
            need less memory; results change by the rounding of sums only.
        decoder: a tiny decoder that stands in for the VAE's, or None. It is fast and not exact: see
            `wan.pipeline.tiny_decoder.load_tiny_decoder`.
        parallel: the processes that share out the work, after `enable_parallelism`; None alone.
        last_timings: seconds per stage of the last call: encode_text, encode_image, denoise,
            decode.
    """

    tokenizer = Part()
    text_encoder = Part()
    vae = Part()
    transformer = Part()
    transformer_2 = Part()

    config: PipelineConfig
    device: torch.device
    offload: str
    compile: str
    chunk_latents: int
    parallel: "ParallelGroup | None"
    last_timings: dict[str, float]
    _parts: dict[str, Any]
    _decoder: TinyDecoder | None
    _prompt_cache: dict[tuple[str, int], Tensor]
    _prompt_source: Any

    def __init__(
        self,
        config: PipelineConfig,
        parts: Mapping[str, Any],
        device: str | torch.device,
        offload: str = "none",
        compile: str = "none",
    ) -> None:
        """Take parts that `wan.pipeline.adopt.adopt_part` has returned, or None, by name."""
        check_names("offload", [offload], OFFLOAD)
        check_names("compile", [compile], COMPILE)
        self.config = config
        self.offload = offload
        self.compile = compile
        self.chunk_latents = CHUNK_LATENTS
        self.parallel = None
        self.last_timings = {}
        self._decoder = None
        self._prompt_cache = {}
        self._prompt_source = None
        self._parts = {name: parts.get(name) for name in PARTS_IN_ORDER}
        self.to(device)
        self._compile(compile)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse attributes that a pipeline does not have, such as a misspelt part."""
        known = known_attributes(cast(Hashable, type(self)))
        if not hasattr(type(self), name) and name not in known:
            public = sorted(one for one in known if not one.startswith("_"))
            near = difflib.get_close_matches(name, [*public, *PARTS_IN_ORDER, "scheduler"], 1)
            meant = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(public)}"
            raise WanError(f"{type(self).__name__} has no attribute {name}{meant}")
        super().__setattr__(name, value)

    # --- parts and places -------------------------------------------------------------------------

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The networks that are there, by the names of their folders."""
        order = ("transformer", "transformer_2", "vae", "text_encoder")
        return {name: self._parts[name] for name in order if self._parts[name] is not None}

    def networks(self) -> dict[str, nn.Module]:
        """The transformers that are there, by the names of their folders."""
        return {n: module for n, module in self.modules.items() if n.startswith("transformer")}

    def set_part(self, name: str, value: Any) -> None:
        """Replace a part, or take it away with None.

        Raises:
            WanError: an object of another kind, or one whose sizes do not fit the other parts; or
                the weights are sharded.
        """
        if name in self.networks():
            self.refuse_sharded(f"another {name}")
        if value is not None:
            value = adopt_part(name, value)
            self.config = fitted_config(self.config, {name: value})
        self._parts[name] = value
        if isinstance(value, nn.Module):
            self._place(value)

    def part(self, name: str) -> Any:
        """A part that a stage needs.

        Raises:
            WanError: it is None.
        """
        if self._parts[name] is None:
            remedy = {
                "text_encoder": "give prompt_embeds (and negative_prompt_embeds for guidance)",
                "tokenizer": "give prompt_embeds (and negative_prompt_embeds for guidance)",
                "vae": 'call with output_type="latent", and without an image',
                "transformer_2": "set boundary_ratio to None for a model of one network",
            }.get(name, "load the pipeline with it")
            raise WanError(f"this pipeline has {name}=None: {remedy}")
        return self._parts[name]

    def to(self: P, *target: Any, device: Any = None, dtype: torch.dtype | None = None) -> P:
        """Compute on another device, or in another dtype, from now on.

        The weights move unless they are offloaded. In bfloat16, parameters that a network's
        `FLOAT32_PARAMETERS` names stay float32.

        Args:
            target: a device, a dtype, or both.

        Raises:
            WanError: no such device, a dtype other than float32 and bfloat16, or sharded weights.
        """
        self.refuse_sharded("another device or dtype")
        for one in target:
            if isinstance(one, torch.dtype):
                dtype = one
            else:
                device = one
        if device is not None:
            self.device = resolve_device(device)
            if self.parallel is not None:
                self.parallel.device = self.device
        if dtype is not None:
            known_dtype(dtype, self.device)
        for module in self.modules.values():
            if dtype is not None:
                cast_weights(module, dtype)
            self._place(module)
        self._warn_of_decoding()
        return self

    def _warn_of_decoding(self) -> None:
        """Say so where this build of PyTorch decodes badly on a GPU."""
        vae = self._parts.get("vae")
        if self.device.type != "cuda" or vae is None:
            return
        problem = conv3d_warning(torch.__version__, torch.backends.cudnn.version())
        if problem is not None and any(p.dtype == torch.bfloat16 for p in vae.parameters()):
            warnings.warn(problem, stacklevel=3)

    def refuse_sharded(self, what: str) -> None:
        """Refuse what would need whole weights where each process holds a part of them.

        Raises:
            WanError: the transformers' weights are sharded.
        """
        if self.parallel is not None and self.parallel.sharded:
            raise WanError(
                f"{what}: the weights are sharded over processes; do it before enable_parallelism, "
                'or use weights="whole"'
            )

    def _place(self, module: nn.Module) -> None:
        """Bring a network's weights to where `offload` keeps them."""
        module.to(self.device if self.offload == "none" else "cpu")
        if self.offload == "block" and self.device.type == "cuda" and has_blocks(module):
            pin(module)

    def _compile(self, what: str) -> None:
        """Compile blocks one by one: all share the compiled code, and offload runs between them."""
        if what == "none":
            return
        for network in self.networks().values():
            for block in cast(WanDiT, network).blocks:
                block.compile(dynamic=False)
        if what == "all" and self.vae is not None:
            self.part("vae").decoder.compile(dynamic=False)

    def set_offload(self, offload: str) -> None:
        """Use another kind of CPU offload from the next call on; see the class.

        Raises:
            WanError: the kind is unknown.
        """
        check_names("offload", [offload], OFFLOAD)
        self.refuse_sharded(f"offload={offload}")
        self.offload = offload
        self.to(self.device)

    def set_attention(self, attention: AttentionChoice) -> None:
        """Use another attention from the next call on.

        Args:
            attention: a name ("sdpa", "cudnn", "spatial", ..), an `AttentionConfig` (of
                `wan.models.attention_config`) with options, layers and steps, a function
                (q, k, v, bias=None), or the result of `wan.models.attention.verified_attention`.

        Raises:
            WanError: the choice is unknown or does not fit the model, or this device lacks the
                kernel or gets wrong results from it.
        """
        networks = self.networks()
        dtype = self._first_network().patch_embedding.weight.dtype
        chosen = verified_attention(attention, self.config.transformer, self.device, dtype)
        if all(cast(Any, network).attention == chosen for network in networks.values()):
            return
        warn_of_attention("this model", self.config.defaults.attention, str(chosen.config))
        if self.compile != "none":
            torch.compiler.reset()  # PyTorch stops compiling a block after 8 variants of it
        for network in networks.values():
            cast(Any, network).set_attention(chosen)

    @property
    def tile(self) -> int | None:
        """Latents per side of the tiles that are decoded, or None for whole frames.

        Tiles need less memory and are not exact: see `wan.models.vae.decode_tiled`.
        """
        return None if self.vae is None else self.vae.tile

    @tile.setter
    def tile(self, tile: int | None) -> None:
        if tile is None and self.vae is None:
            return
        vae = self.part("vae")
        vae.tile = tile
        vae.tile_overlap = 0 if tile is None else tile // 4

    @property
    def decoder(self) -> TinyDecoder | None:
        """The tiny decoder that is used in place of the VAE's, which then may be None.

        Raises:
            WanError: it was made for the latents of another model (when it is set).
        """
        return self._decoder

    @decoder.setter
    def decoder(self, decoder: TinyDecoder | None) -> None:
        if decoder is not None:
            check_fits_latents(decoder.kind, self.config.vae)
        self._decoder = decoder

    def plan(self, **request: Any) -> SamplingPlan:
        """Sampler, schedule and guidance of a call; arguments as for `SamplingRequest`."""
        return plan_sampling(self.config, SamplingRequest(**request))

    # --- the stages ------------------------------------------------------------

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        max_sequence_length: int | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        clean: Callable[[str], str] = clean_prompt,
        on_progress: OnProgress | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Encode texts to the DiT's context: two (B, S, text_dim), zero after the text's tokens.

        The second is for the negative prompt, None without guidance. Encoded texts are cached until
        the text encoder or the tokenizer changes.

        Args:
            max_sequence_length: S; None is the number that the model was trained with.
            device, dtype: of the result; None is the pipeline's device and the encoder's dtype.
            clean: text as typed -> text as the tokenizer gets it.

        Raises:
            WanError: a text and its embedding both given, or neither; counts that don't match.
        """
        length = max_sequence_length
        if length is None:
            length = self.config.defaults.max_sequence_length
        prompts = prompt_list(prompt, prompt_embeds)
        count = prompt_count(prompts, prompt_embeds)
        negatives = None
        if do_classifier_free_guidance:
            negatives = negative_list(negative_prompt, negative_prompt_embeds, count)
        for given in (prompt_embeds, negative_prompt_embeds):
            text_dim = self.config.transformer.text_dim
            if given is not None and (
                given.ndim != 3 or len(given) != count or given.shape[-1] != text_dim
            ):
                raise WanError(
                    f"embeddings {tuple(given.shape)} for {count} prompts: need (B, S, {text_dim})"
                )
        texts = [clean(text) for text in (*(prompts or []), *(negatives or []))]
        if self.parallel is None:
            encoded = self._encode(texts, length, on_progress)
        else:  # one process needs the text encoder
            encoded = self.parallel.first(lambda: self._encode(texts, length, on_progress))

        def context_of(texts: list[str] | None, given: Tensor | None) -> Tensor:
            if texts is not None:
                given = torch.stack([encoded[clean(text)] for text in texts])
            assert given is not None
            placed = given.to(device=self.device if device is None else device, dtype=dtype)
            return placed.repeat_interleave(num_videos_per_prompt, dim=0)

        context = context_of(prompts, prompt_embeds)
        if not do_classifier_free_guidance:
            return context, None
        return context, context_of(negatives, negative_prompt_embeds)

    def _encode(
        self, texts: list[str], length: int, on_progress: OnProgress | None
    ) -> dict[str, Tensor]:
        """The embedding (S, text_dim) of each clean text, on the CPU; from the cache if there."""
        if not texts:
            return {}
        encoder, tokenizer = self.part("text_encoder"), self.part("tokenizer")
        known = self._prompt_cache
        check_mapped_files(encoder)  # before its weights are looked at
        source = (tokenizer, weights_state(encoder))
        if source != self._prompt_source:
            known.clear()
            self._prompt_source = source
        missing = [text for text in dict.fromkeys(texts) if (text, length) not in known]
        if missing:
            with self._on_device(encoder):
                for done, text in enumerate(missing):
                    report(on_progress, "encode", done, len(missing))
                    context = context_of_text(encoder, tokenizer, text, length, self.device)
                    known[text, length] = context.cpu()
            report(on_progress, "encode", len(missing), len(missing))
        encoded = {text: known[text, length] for text in texts}
        for oldest in list(known)[: max(0, len(known) - MAX_CACHED_PROMPTS)]:
            del known[oldest]
        return encoded

    @torch.no_grad()
    def encode_image(
        self, image: ImageInput | list[ImageInput], height: int, width: int, count: int = 1
    ) -> Tensor:
        """Normalised latents of `count` first frames: (count, C, 1, h, w) float32 on the device.

        Raises:
            WanError: not an image, or neither one nor `count` of them.
        """
        return self.encode_frames(first_frames(image, height, width, count), count)

    def encode_frames(self, pixels: Sequence[Tensor], count: int) -> Tensor:
        """`encode_image` for frames (3, H, W) in [-1, 1] that have the video's size already."""
        vae = self.part("vae")

        def encode() -> Tensor:
            with self._on_device(vae):
                latents = [vae.encode_normalized(p[None, :, None].to(self.device)) for p in pixels]
            return torch.cat(latents)

        if self.parallel is None:
            latents = encode()
        else:
            latents = self.parallel.first(lambda: encode().cpu()).to(self.device)
        return latents.expand(count, -1, -1, -1, -1)

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        *,
        frame_first: bool = False,
    ) -> Tensor:
        """The noise to start from: (B, C, T, h, w).

        Args:
            num_channels_latents: C; None is that of the VAE.
            dtype, device: of the result; None is float32 on the pipeline's device.
            generator: a generator, or one per video; None is PyTorch's global one.
            latents: used instead of drawn noise.
            frame_first: see `wan.sampling.noise.draw_noise`.

        Raises:
            WanError: the size is illegal, or the latents have another shape.
        """
        if not isinstance(batch_size, int):
            raise WanError(
                f"prepare_latents: batch_size comes first, not a {type(batch_size).__name__}; this "
                "makes the noise alone, encode_image makes the latents of an image"
            )
        shape = self.config.latent_shape(height, width, num_frames)
        if num_channels_latents not in (None, shape[0]):
            raise WanError(f"num_channels_latents={num_channels_latents}: this VAE has {shape[0]}")
        if latents is None:
            generators, _ = noise_streams(None, generator, batch_size)
            latents = draw_noise(shape, generators, frame_first)
        if tuple(latents.shape) != (batch_size, *shape):
            raise WanError(
                f"latents {tuple(latents.shape)}: {batch_size} videos of {num_frames} frames at "
                f"{height}x{width} need {(batch_size, *shape)}"
            )
        place = self.device if device is None else device
        return latents.to(device=place, dtype=torch.float32 if dtype is None else dtype)

    @torch.no_grad()
    def denoise(
        self,
        plan: SamplingPlan,
        x: Tensor,
        context: Tensor,
        negative: Tensor | None = None,
        image_latents: Tensor | None = None,
        *,
        renoise: Callable[[int], Tensor] | None = None,
        on_step: StepFunction | None = None,
        on_x0: OnX0 | None = None,
    ) -> Tensor:
        """Noise to normalised latents: (B, C, T, h, w) float32 -> the same.

        Args:
            plan: sampler, schedule and guidance, from `plan`.
            x: the start, from `prepare_latents`.
            context, negative: (B, S, text_dim) each, from `encode_prompt`; the second only with
                guidance.
            image_latents: (B, C, 1, h, w), a clean first frame from `encode_image`.
            renoise: step -> fresh noise, shaped like x; for few-step sampling.
            on_step: called after every step, see `StepFunction`.
            on_x0: called before it as (step, x0), with the predicted clean latents, shaped like x.

        Raises:
            FloatingPointError: latents became infinite or NaN; names the step.
        """
        timesteps, steps = plan.schedule.timesteps.tolist(), len(plan.schedule)
        group = self.parallel
        at_work: AbstractContextManager[Any] = nullcontext()
        if group is not None:
            scales = (plan.guidance_scale, plan.guidance_scale_2)
            call = (tuple(x.shape), plan.sampler, timesteps, scales)
            group.check_alike("latents, sampler, timesteps and guidance_scale", call)
            x, context, negative, image_latents = group.tensors(x, context, negative, image_latents)
            at_work = group.at_work(self.networks().values(), plan.guided)
            if renoise is not None:
                renoise = shared_noise(group, renoise)
        slot = ExpertSlot(self.device, self.offload)

        def bring(network: Any) -> None:
            slot.close()
            self.adapters.write()  # what a callback has changed
            slot.bring(network)

        high_noise, low_noise, boundary = self._experts(plan, timesteps)
        denoiser = Denoiser(
            high_noise,
            context,
            negative,
            low_noise,
            boundary,
            image_latents,
            bring,
            self._first_network().attention.exact_timesteps(timesteps),
        )

        def after_step(i: int, timestep: float, sigma: float, x: Tensor) -> Tensor | None:
            if not bool(x.isfinite().all()):
                raise FloatingPointError(
                    f"latents are not finite after step {i + 1} of {steps} (timestep {timestep:g})"
                )
            return None if on_step is None else on_step(denoiser, i, timestep, x)

        def see(i: int, x0: Tensor) -> None:
            if on_x0 is not None and bool(x0.isfinite().all()):  # else `after_step` ends the run
                on_x0(i, denoiser.impose_image(x0))

        with closing(slot), at_work as denoiser.halves:
            watch = after_step if group is None else step_of_all(group, denoiser, after_step)
            try:
                x = sample(denoiser, x, plan.stepper(renoise), watch, on_x0 and see)
            except Interrupted as stopped:
                x = stopped.latents
        return denoiser.impose_image(x)

    def _experts(
        self, plan: SamplingPlan, timesteps: list[float]
    ) -> tuple[Expert, Expert | None, float | None]:
        """The networks that a schedule visits, the first one first, and where they hand over."""
        boundary = self.config.boundary_ratio
        high = boundary is None or max(timesteps) >= boundary * NUM_TIMESTEPS
        low = boundary is not None and min(timesteps) < boundary * NUM_TIMESTEPS
        high_noise = Expert(self.part("transformer"), plan.guidance_scale) if high else None
        low_noise = Expert(self.part("transformer_2"), plan.guidance_scale_2) if low else None
        if high_noise is None:
            assert low_noise is not None  # a schedule has at least one timestep
            return low_noise, None, None
        return high_noise, low_noise, boundary if low else None

    def _first_network(self) -> Any:
        """The transformer, or the only one of two experts that is there."""
        networks = self.networks()
        return next(iter(networks.values())) if networks else self.part("transformer")

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, on_progress: OnProgress | None = None) -> Tensor:
        """Normalised latents (B, C, T, h, w) -> video (B, 3, F, H, W) in [-1, 1], on the CPU."""
        total = len(latents) * latents.shape[2]
        vae = self.part("vae") if self.decoder is None else None
        config, done = self.config.vae, 0
        if self.decoder is not None and self.tile is not None:
            raise WanError("tiles with a tiny decoder: it takes little memory; leave tiling off")
        if self.parallel is not None:
            if self.tile is not None:
                raise WanError(
                    "tiles with many processes: these share out the rows of each frame, which "
                    "takes less memory too; leave tiling off"
                )
            (latents,) = self.parallel.tensors(latents)
        frames, height, width = latents.shape[2:]
        stride = config.spatial_stride
        num_frames = (frames - 1) * config.temporal_stride + 1
        video = torch.empty(len(latents), 3, num_frames, height * stride, width * stride)
        report(on_progress, "decode", 0, total)
        with nullcontext() if vae is None else self._on_device(vae):
            for one, room in zip(latents.to(self.device).split(1), video.split(1), strict=True):
                start = 0
                for chunk in self._decoded(vae, one):
                    count = chunk.shape[2]
                    room[:, :, start : start + count] = chunk  # float32 from here on
                    start += count
                    done += -(-count // config.temporal_stride)
                    report(on_progress, "decode", done, total)
        return video

    def _decoded(self, vae: WanVAE | None, latents: Tensor) -> Iterator[Tensor]:
        """Yield the frames of one video by chunks; with tiles, all frames at once."""
        if vae is None:
            assert self.decoder is not None
            yield from self.decoder.to(self.device).decode_stream(latents, self.chunk_latents)
        elif self.parallel is not None:
            with self.parallel.together():
                rows = self.parallel.rows(latents.shape[3])
                yield from vae.decode_stream(latents, self.chunk_latents, rows)
        elif vae.tile is None:
            yield from vae.decode_stream(latents, self.chunk_latents)
        else:
            yield decode_tiled(vae, latents, vae.tile, vae.tile_overlap, self.chunk_latents)

    # --- helpers ----------------------------------------------------------------------------------

    def _size(
        self, height: int | None, width: int | None, num_frames: int | None, latents: Tensor | None
    ) -> tuple[int, int, int]:
        """Height, width and number of frames: the caller's, else the latents', else the default."""
        defaults, vae = self.config.defaults, self.config.vae
        fallback = (defaults.height, defaults.width, defaults.num_frames)
        if latents is not None and latents.ndim == 5:
            frames, h, w = latents.shape[2:]
            stride = vae.spatial_stride
            fallback = (h * stride, w * stride, (frames - 1) * vae.temporal_stride + 1)
        size = (
            fallback[0] if height is None else height,
            fallback[1] if width is None else width,
            fallback[2] if num_frames is None else num_frames,
        )
        self.config.latent_shape(*size)
        return size

    def _on_device(self, module: nn.Module) -> AbstractContextManager[None]:
        return at_work(module, self.device, self.offload)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Time a stage; GPU work that was only queued counts too."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.last_timings[name] = time.perf_counter() - start


def shared_noise(
    group: "ParallelGroup", renoise: Callable[[int], Tensor]
) -> Callable[[int], Tensor]:
    """Noise that all processes draw, so that their generators move on; the main one's counts."""
    return lambda step: group.tensors(renoise(step))[0]


def step_of_all(
    group: "ParallelGroup", denoiser: Denoiser, after_step: Callable[..., Tensor | None]
) -> Callable[..., Tensor | None]:
    """After each step every process runs `after_step`, and then all go on alike.

    Latents and prompts that it replaces are taken from the main process; if it stops in one of
    them, it stops in all.
    """

    def watch(i: int, timestep: float, sigma: float, x: Tensor) -> Tensor | None:
        before, replaced = (denoiser.context, denoiser.negative_context), None

        def own() -> tuple[bool, bool, tuple[Any, ...]]:
            nonlocal replaced
            stopped = False
            try:
                replaced = after_step(i, timestep, sigma, x)
            except Interrupted as stop:
                stopped, replaced = True, stop.latents
            after = (denoiser.context, denoiser.negative_context)
            changed = any(one is not other for one, other in zip(before, after, strict=True))
            experts = (denoiser.high_noise, denoiser.low_noise)
            scales = tuple(one.guidance_scale for one in experts if one is not None)
            return stopped, replaced is not None, (changed, scales)

        told = group.agree(own)
        states = [state for _, _, state in told]
        group.check_equal(f"prompts changed, and guidance, after step {i + 1}", states)
        if states[0][0]:
            denoiser.set_context(*group.tensors(denoiser.context, denoiser.negative_context))
        if told[0][1]:  # the main process has other latents
            (replaced,) = group.tensors(x if replaced is None else replaced)
        else:
            replaced = None
        if any(stopped for stopped, _, _ in told):
            raise Interrupted(x if replaced is None else replaced)
        return replaced

    return watch


def context_of_text(
    encoder: Any, tokenizer: Any, text: str, length: int, device: torch.device
) -> Tensor:
    """The context (S, text_dim) of one clean text, by our classes or by transformers'."""
    if isinstance(encoder, UMT5Encoder) and isinstance(tokenizer, Tokenizer):
        return encode_text(encoder, tokenizer, [text], length, str)[0]
    if isinstance(tokenizer, Tokenizer):
        ids = torch.tensor([tokenizer(text, length).ids])
        mask = torch.ones_like(ids)
    else:
        tokens = tokenizer(
            [text],
            padding="max_length",
            max_length=length,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        ids, mask = tokens.input_ids, tokens.attention_mask
    used = int(mask.sum())
    states = encoder(ids.to(device), mask.to(device))[0][0]  # (S, text_dim)
    context = states.new_zeros(length, states.shape[-1])
    context[:used] = states[:used]
    return context


@cache
def known_attributes(kind: Any) -> frozenset[str]:
    """The attributes that the classes of a pipeline declare."""
    return frozenset(name for one in kind.__mro__ for name in inspect.get_annotations(one))


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert weights in place; those that must stay float32 and 8-bit ones are left."""
    network: Any = getattr(module, "_orig_mod", module)
    if not hasattr(network, "FLOAT32_PARAMETERS"):
        module.to(dtype)
        return
    for prefix, owner in network.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if isinstance(owner, QuantizedLinear) and name != "bias":
                continue
            whole = f"{prefix}.{name}" if prefix else name
            wanted = target_dtype(whole, parameter.dtype, dtype, network.FLOAT32_PARAMETERS)
            parameter.data = parameter.data.to(wanted)


def weights_state(module: nn.Module) -> tuple[Any, ...]:
    """A value that changes when a network's weights are replaced or changed in place.

    It holds the version that PyTorch counts up at changes in place, and a sample of the values,
    which also shows changes through `.data`. Tensors made in inference mode have no version.
    """
    state: list[Any] = []
    for parameter in module.parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 16)][:17].cpu()  # not every device has float64
        version = None if parameter.is_inference() else parameter._version
        state.append((id(parameter), version, parameter.dtype, sample.double().sum().item()))
    return tuple(state)
