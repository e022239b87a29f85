"""Load once, then prompt -> video.

`WanPipeline` runs base models, `WanDMDPipeline` few-step students; both are read from the released
folder layout and called with diffusers' argument names. Samples of a batch go through every network
one by one and have noise of their own, so a video is the same in any batch.

B videos, C T h w latent sizes, F frames, H W pixels, S text tokens.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from wan.errors import WanError, check_names
from wan.lora.merge import LoRAMerge
from wan.models.attention import AttentionChoice, verified_attention
from wan.models.dit import WanDiT
from wan.models.tokenizer import Tokenizer, clean_prompt, strip_prompt
from wan.models.umt5 import UMT5Encoder, encode_text
from wan.models.vae import WanVAE, decode_tiled
from wan.models.vae_config import CHUNK_LATENTS
from wan.pipeline.callbacks import Interrupted, StepCallback, StepFunction, StepHook
from wan.pipeline.config import BASE, FEW_STEP, PipelineConfig
from wan.pipeline.folder import ModelFolder, load_modules, save_modules, warn_of_attention
from wan.pipeline.inputs import (
    COMPAT,
    FASTVIDEO_SEED,
    Generators,
    ImageInput,
    OnProgress,
    WanPipelineOutput,
    check_output,
    finished_frames,
    first_frames,
    negative_list,
    noise_streams,
    prompt_count,
    prompt_list,
    report,
)
from wan.pipeline.plan import SamplingPlan, SamplingRequest, plan_sampling
from wan.runtime.offload import OFFLOAD, ExpertSlot, at_work, has_blocks, pin, resolve_device
from wan.sampling.denoiser import Denoiser, Expert
from wan.sampling.noise import draw_noise
from wan.sampling.samplers import sample
from wan.sampling.schedule import FEW_STEP_TIMESTEPS, Schedule
from wan.weights.hub import resolve_model
from wan.weights.quantize import check_quantize, refuse_quantized

MAX_CACHED_PROMPTS = 64
COMPILE = ("none", "dit", "all")
DTYPES = (torch.float32, torch.bfloat16)

P = TypeVar("P", bound="WanPipeline")


class WanPipeline:
    """A base model: text (and for TI2V an image) to video, with guidance.

    Use `from_pretrained`; the constructor takes parts that are loaded already.

    Attributes:
        last_timings: seconds per stage of the last call: encode_text, encode_image, denoise,
            decode.
        interrupt: set it in a callback to stop after the current step and decode its latents.
        tile: latents per side of the tiles that are decoded, or None for whole frames. Tiles need
            less memory and are not exact: see `wan.models.vae.decode_tiled`.
        chunk_latents: latent frames that are decoded at a time, one more in the first chunk. Fewer
            need less memory; results change by the rounding of sums only.
    """

    CLASS_NAME: ClassVar[str] = BASE

    def __init__(
        self,
        config: PipelineConfig,
        *,
        tokenizer: Tokenizer,
        text_encoder: UMT5Encoder,
        transformer: WanDiT,
        vae: WanVAE,
        transformer_2: WanDiT | None = None,
        device: str | torch.device = "cpu",
        offload: str = "none",
        compile: str = "none",
        tokenizer_folder: Path | None = None,
        safety_checker: Callable[[Tensor], bool] | None = None,
    ) -> None:
        """Assemble a pipeline from loaded parts.

        Args:
            config: its settings; must describe the given modules.
            device: device that computes.
            offload: "none"; "stage": a module is copied to the device for its stage only; "block":
                at most two blocks of a transformer or text encoder are on the device at a time (see
                `wan.runtime.offload`). Results do not change.
            compile: "dit" compiles the blocks of the transformers with torch.compile, which takes
                about a minute at the first step of each size; "all" the VAE's decoder too.
            tokenizer_folder: folder of the tokenizer's files, which `save_pretrained` copies.
            safety_checker: called with the (F, 3, H, W) frames of a video in [0, 1]; returns True
                if they must not be shown.
        """
        if config.class_name != self.CLASS_NAME:
            raise WanError(f"a {config.class_name} model: use wan.{config.class_name} for it")
        check_names("offload", [offload], OFFLOAD)
        check_names("compile", [compile], COMPILE)
        if (transformer_2 is None) != (config.boundary_ratio is None):
            raise WanError("transformer_2 and boundary_ratio: two experts need both, one neither")
        self.config = config
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.transformer = transformer
        self.transformer_2 = transformer_2
        self.vae = vae
        self.offload = offload
        self.compile = compile
        self.tokenizer_folder = tokenizer_folder
        self.safety_checker = safety_checker
        self.interrupt = False
        self.tile: int | None = None
        self.chunk_latents = CHUNK_LATENTS
        self.last_timings: dict[str, float] = {}
        self._prompt_cache: dict[tuple[str, int], Tensor] = {}
        self.to(device)
        self._compile(compile)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The networks by the names of their folders."""
        modules: dict[str, nn.Module] = {"transformer": self.transformer}
        if self.transformer_2 is not None:
            modules["transformer_2"] = self.transformer_2
        return modules | {"vae": self.vae, "text_encoder": self.text_encoder}

    def to(self: P, device: str | torch.device) -> P:
        """Compute on another device from now on; the weights move unless they are offloaded."""
        self.device = resolve_device(device)
        if self.offload == "none":
            for module in self.modules.values():
                module.to(self.device)
        if self.offload == "block" and self.device.type == "cuda":
            for module in self.modules.values():
                if has_blocks(module):
                    pin(module)
        return self

    def _compile(self, what: str) -> None:
        """Compile blocks one by one: all share the compiled code, and offload runs between them."""
        if what == "none":
            return
        for network in (self.transformer, self.transformer_2):
            for block in () if network is None else network.blocks:
                block.compile(dynamic=False)
        if what == "all":
            self.vae.decoder.compile(dynamic=False)

    def set_offload(self, offload: str) -> None:
        """Use another kind of CPU offload from the next call on; see the constructor.

        Raises:
            WanError: the kind is unknown.
        """
        check_names("offload", [offload], OFFLOAD)
        self.offload = offload
        if offload != "none":
            for module in self.modules.values():
                module.to("cpu")
        self.to(self.device)

    # The names that diffusers gives to these settings.

    def enable_model_cpu_offload(self, device: str | torch.device = "cuda") -> None:
        """Compute on that device with `offload="stage"`."""
        self.device = resolve_device(device)
        self.set_offload("stage")

    def enable_sequential_cpu_offload(self, device: str | torch.device = "cuda") -> None:
        """Compute on that device with `offload="block"`."""
        self.device = resolve_device(device)
        self.set_offload("block")

    def enable_attention_slicing(self) -> None:
        """Use sliced attention: exact, with less memory on devices without a fused kernel."""
        self.set_attention("sliced")

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
        dtype = self.transformer.patch_embedding.weight.dtype
        chosen = verified_attention(attention, self.config.transformer, self.device, dtype)
        if chosen == self.transformer.attention:
            return
        warn_of_attention("this model", self.config.defaults.attention, str(chosen.config))
        if self.compile != "none":
            torch.compiler.reset()  # PyTorch stops compiling a block after 8 variants of it
        for network in (self.transformer, self.transformer_2):
            if network is not None:
                network.set_attention(chosen)

    @classmethod
    def from_pretrained(
        cls: type[P],
        name: str | Path | ModelFolder,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = "cpu",
        attention: AttentionChoice = "sdpa",
        offload: str = "none",
        compile: str = "none",
        quantize: str = "none",
        loras: Mapping[str, LoRAMerge] | None = None,
        revision: str | None = None,
        offline: bool = False,
        transformer: str | Path | None = None,
        transformer_2: str | Path | None = None,
        vae: str | Path | None = None,
        text_encoder: str | Path | None = None,
        safety_checker: Callable[[Tensor], bool] | None = None,
        on_progress: OnProgress | None = None,
    ) -> P:
        """Load a model.

        Args:
            name: a folder in the released layout, a hub id, or a `ModelFolder`, to which revision
                and parts were given when it was read: here they are refused.
            dtype: dtype of the weights, float32 or bfloat16. Parameters that a module's
                `FLOAT32_PARAMETERS` names stay float32.
            device, offload, compile: see the constructor.
            quantize: "none", "int8" or "fp8" weights for the large layers of the transformers and
                the text encoder; see `wan.weights.quantize`.
            loras: "transformer" or "transformer_2" -> the LoRA that is merged into it while it is
                read, before it is quantised.
            attention: see `set_attention`.
            revision, offline: for a hub id, see `wan.weights.hub.resolve_model`.
            transformer, transformer_2, vae, text_encoder: a folder or file with other weights for
                that part; a config.json in that folder is used. With another transformer, either
                pipeline class takes the rest from a folder of the other class.
            on_progress: called as ("load", parts loaded, number of parts).

        Raises:
            WanError: the files or the arguments are wrong; settings are checked before weights.
        """
        if dtype not in DTYPES:
            raise WanError(
                f"dtype={dtype}: choose torch.bfloat16 or torch.float32 (float16 is too narrow for "
                "the text encoder)"
            )
        check_names("offload", [offload], OFFLOAD)
        check_names("compile", [compile], COMPILE)
        check_quantize(quantize)
        target = resolve_device(device)
        parts = {
            "transformer": transformer,
            "transformer_2": transformer_2,
            "vae": vae,
            "text_encoder": text_encoder,
        }
        overrides = {part: Path(path) for part, path in parts.items() if path is not None}
        if isinstance(name, ModelFolder):
            if overrides or revision is not None or offline:
                raise WanError(
                    f"{name.path}: its settings are read already; give other parts to "
                    "ModelFolder.read(path, overrides), and revision and offline to resolve_model"
                )
            folder = name
        else:
            folder = ModelFolder.read(resolve_model(name, revision, offline), overrides)
        config = cls._adopt(folder, overrides)
        tokenizer = folder.tokenizer
        modules = load_modules(
            folder,
            config,
            dtype=dtype,
            device=target if offload == "none" else torch.device("cpu"),
            attention=verified_attention(attention, config.transformer, target, dtype),
            quantize=quantize,
            loras=loras,
            on_progress=on_progress,
        )
        return cls(
            config,
            tokenizer=tokenizer,
            device=target,
            offload=offload,
            compile=compile,
            tokenizer_folder=folder.part("tokenizer"),
            safety_checker=safety_checker,
            **modules,
        )

    @classmethod
    def _adopt(cls, folder: ModelFolder, overrides: dict[str, Path]) -> PipelineConfig:
        """The folder's settings for this class; refuses a folder that this class cannot run."""
        config = folder.config
        if "transformer_2" in overrides and config.boundary_ratio is None:
            raise WanError("transformer_2: this model has one network, not two experts")
        if config.class_name == cls.CLASS_NAME:
            return config
        if "transformer" not in overrides:
            raise WanError(
                f"{folder.path}: its model_index.json says {config.class_name}; load it with "
                f"wan.{config.class_name}.from_pretrained"
            )
        timesteps = FEW_STEP_TIMESTEPS if cls.CLASS_NAME == FEW_STEP else None
        return replace(config, class_name=cls.CLASS_NAME, timesteps=timesteps)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the released layout, which diffusers' WanPipeline loads too; dtypes are kept.

        Raises:
            WanError: the folder holds something already, the tokenizer's files are unknown, or the
                weights are quantised.
        """
        for module in self.modules.values():
            refuse_quantized(module, "released layouts hold plain ones; load with quantize=none")
        save_modules(Path(folder), self.config, self.modules, self.tokenizer_folder)

    # --- the call ---------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_scale_2: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        *,
        image: ImageInput | list[ImageInput] | None = None,
        timesteps: Sequence[float] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        seed: int | Sequence[int] | None = None,
        sampler: str | None = None,
        grid: str | None = None,
        shift: float | None = None,
        schedule: Schedule | None = None,
        deterministic: bool | None = None,
        frame_first_noise: bool = False,
        compat: str = "none",
        allow_untrained: bool = False,
        on_progress: OnProgress | None = None,
    ) -> WanPipelineOutput | tuple[Any]:
        """Make videos. None means the model's own default.

        Args:
            prompt: one or more texts; or `prompt_embeds` (B, S, text_dim) from `encode_prompt`.
            negative_prompt: one for all, or one per prompt; "" if guidance is on and none given.
            image: first frame, one for all or one per prompt; resized to height x width. Tensors
                are (3, H, W) in [-1, 1].
            height, width, num_frames: pixels and frames; illegal sizes are refused.
            num_inference_steps, timesteps, schedule: number of steps, or the timesteps themselves,
                or a whole schedule; at most one of them.
            guidance_scale, guidance_scale_2: 1 turns guidance off; the second is for the low-noise
                expert.
            num_videos_per_prompt: the videos of one prompt follow each other in the result.
            generator: a CPU generator, or one per video, for the noise.
            latents: (B, C, T, h, w), the noise to start from. Few-step sampling then draws fresh
                noise as if `seed` had drawn the start, or the next numbers of `generator`.
            output_type: "np", "pt", "pil" or "latent"; see `WanPipelineOutput`.
            return_dict: False returns (frames,).
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after each step,
                with the tensors named in `callback_on_step_end_tensor_inputs`; may return a dict
                with tensors that replace them.
            max_sequence_length: number of text tokens that the model reads, padding included; that
                of `prompt_embeds` if given. The model attends to padding, so another number than in
                training makes other videos; few-step students refuse it.
            seed: instead of generators: video j gets seed + j; or one seed per video. With neither,
                a seed is drawn from PyTorch's global generator and returned.
            sampler: a name in `wan.sampling.samplers.SAMPLERS`.
            grid: one of the sampler's grids in `wan.sampling.schedule.GRIDS`.
            shift: moves the schedule towards high noise; 1 changes nothing.
            deterministic: few-step sampling adds predicted noise instead of fresh noise; None takes
                what the student was trained with.
            frame_first_noise: draw noise in FastVideo's order; see `wan.sampling.noise.draw_noise`.
            compat: "fastvideo" compares with FastVideo at the same seed: noise in its order, seed
                1024 where none is given, prompts that are only stripped, and "pil" images rounded
                down to 8 bits. States stay float32; FastVideo rounds them to bfloat16 at each step.
            allow_untrained: let a few-step student do what it was not trained for.
            on_progress: called as (stage, done, total), stages "encode", "denoise", "decode".

        Raises:
            WanError: an argument is wrong; raised before anything is computed.
            FloatingPointError: latents became infinite or NaN; names the step.
        """
        check_names("compat", [compat], COMPAT)
        as_fastvideo = compat == "fastvideo"
        frame_first_noise = frame_first_noise or as_fastvideo
        if as_fastvideo and seed is None and generator is None:
            seed = FASTVIDEO_SEED
        height, width, num_frames = self._size(height, width, num_frames, latents)
        if prompt_embeds is not None and prompt_embeds.ndim == 3:
            max_sequence_length = prompt_embeds.shape[1]
        plan = self.plan(
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            schedule=schedule,
            sampler=sampler,
            grid=grid,
            shift=shift,
            guidance_scale=guidance_scale,
            guidance_scale_2=guidance_scale_2,
            negative_prompt=negative_prompt is not None or negative_prompt_embeds is not None,
            image=image is not None,
            num_frames=num_frames,
            max_sequence_length=max_sequence_length,
            deterministic=deterministic,
            allow_untrained=allow_untrained,
        )
        check_output(output_type, callback_on_step_end_tensor_inputs, self.safety_checker)
        self.transformer.attention.exact_timesteps(plan.schedule.timesteps.tolist())
        if not isinstance(num_videos_per_prompt, int) or num_videos_per_prompt < 1:
            raise WanError(f"num_videos_per_prompt={num_videos_per_prompt}: need at least 1, whole")
        prompts = prompt_list(prompt, prompt_embeds)
        count = prompt_count(prompts, prompt_embeds)
        batch = count * num_videos_per_prompt
        generators, seeds = noise_streams(seed, generator, batch)
        pixels: Any = None
        if image is not None:
            pixels = first_frames(image, height, width, count)
        if latents is not None and seed is not None:  # advance the generators as a drawn start does
            shape = self.config.latent_shape(height, width, num_frames)
            draw_noise(shape, generators, frame_first_noise)
        x = self.prepare_latents(
            batch, height, width, num_frames, generators, latents, frame_first_noise
        )
        self.interrupt = False
        self.last_timings = {}

        with self._timed("encode_text"):
            context, negative = self.encode_prompt(
                prompts,
                negative_prompt,
                plan.guided,
                num_videos_per_prompt,
                prompt_embeds,
                negative_prompt_embeds,
                max_sequence_length,
                on_progress,
                strip_prompt if as_fastvideo else clean_prompt,
            )
        image_latents = None
        if pixels is not None:
            with self._timed("encode_image"):
                image_latents = self._encode_frames(pixels, count)
                image_latents = image_latents.repeat_interleave(num_videos_per_prompt, dim=0)
        hook = StepHook(
            self,
            len(plan.schedule),
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            on_progress,
        )
        report(on_progress, "denoise", 0, len(plan.schedule))
        with self._timed("denoise"):
            x = self.denoise(
                plan,
                x,
                context,
                negative,
                image_latents,
                renoise=lambda i: draw_noise(x.shape[1:], generators, frame_first_noise),
                on_step=hook,
            )

        output = WanPipelineOutput(x, plan, seeds)
        if output_type != "latent":
            with self._timed("decode"):
                video = self.decode_latents(x, on_progress)
            output.frames, output.nsfw_content_detected = finished_frames(
                video, output_type, self.safety_checker, as_fastvideo
            )
        return output if return_dict else (output.frames,)

    def plan(self, **request: Any) -> SamplingPlan:
        """Sampler, schedule and guidance of a call; arguments as for `SamplingRequest`."""
        return plan_sampling(self.config, SamplingRequest(**request))

    # --- the stages, each usable alone ------------------------------------------------------------

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
        on_progress: OnProgress | None = None,
        clean: Callable[[str], str] = clean_prompt,
    ) -> tuple[Tensor, Tensor | None]:
        """Encode texts to the DiT's context: two (B, S, text_dim), zero after the text's tokens.

        The second is for the negative prompt, None without guidance. Encoded texts are cached. The
        tokenizer gets `clean` of each text.

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
        encoded = self._encode(texts, length, on_progress)

        def context_of(texts: list[str] | None, given: Tensor | None) -> Tensor:
            if texts is not None:
                given = torch.stack([encoded[clean(text)] for text in texts])
            assert given is not None
            return given.to(self.device).repeat_interleave(num_videos_per_prompt, dim=0)

        context = context_of(prompts, prompt_embeds)
        if not do_classifier_free_guidance:
            return context, None
        return context, context_of(negatives, negative_prompt_embeds)

    def _encode(
        self, texts: list[str], length: int, on_progress: OnProgress | None
    ) -> dict[str, Tensor]:
        """The embedding (S, text_dim) of each clean text, on the CPU; from the cache if there."""
        known = self._prompt_cache
        missing = [text for text in dict.fromkeys(texts) if (text, length) not in known]
        if missing:
            with self._on_device(self.text_encoder):
                for done, text in enumerate(missing):
                    report(on_progress, "encode", done, len(missing))
                    context = encode_text(self.text_encoder, self.tokenizer, [text], length, str)
                    known[text, length] = context[0].cpu()
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
        return self._encode_frames(first_frames(image, height, width, count), count)

    def _encode_frames(self, pixels: Sequence[Tensor], count: int) -> Tensor:
        """`encode_image` for frames (3, H, W) that already have the video's size."""
        with self._on_device(self.vae):
            latents = [self.vae.encode(p[None, :, None].to(self.device)) for p in pixels]
        return torch.cat(latents).expand(count, -1, -1, -1, -1)

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        num_frames: int,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        frame_first: bool = False,
    ) -> Tensor:
        """The noise to start from: (B, C, T, h, w) float32 on the device.

        Args:
            generator: a CPU generator, or one per video; None draws a random seed.
            latents: used instead of drawn noise.

        Raises:
            WanError: the size is illegal, or the latents have another shape.
        """
        shape = self.config.latent_shape(height, width, num_frames)
        if latents is None:
            generators, _ = noise_streams(None, generator, batch_size)
            latents = draw_noise(shape, generators, frame_first)
        if tuple(latents.shape) != (batch_size, *shape):
            raise WanError(
                f"latents {tuple(latents.shape)}: {batch_size} videos of {num_frames} frames at "
                f"{height}x{width} need {(batch_size, *shape)}"
            )
        return latents.to(device=self.device, dtype=torch.float32)

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

        Raises:
            FloatingPointError: latents became infinite or NaN; names the step.
        """
        timesteps, steps = plan.schedule.timesteps.tolist(), len(plan.schedule)
        slot = ExpertSlot(self.device, self.offload)
        low_noise = None
        if self.transformer_2 is not None:
            low_noise = Expert(self.transformer_2, plan.guidance_scale_2)
        denoiser = Denoiser(
            Expert(self.transformer, plan.guidance_scale),
            context,
            negative,
            low_noise,
            self.config.boundary_ratio,
            image_latents,
            slot.bring,
            self.transformer.attention.exact_timesteps(timesteps),
        )

        def after_step(i: int, timestep: float, sigma: float, x: Tensor) -> Tensor | None:
            if not bool(x.isfinite().all()):
                raise FloatingPointError(
                    f"latents are not finite after step {i + 1} of {steps} (timestep {timestep:g})"
                )
            return None if on_step is None else on_step(denoiser, i, timestep, x)

        with closing(slot):
            try:
                x = sample(denoiser, x, plan.stepper(renoise), after_step)
            except Interrupted as stopped:
                x = stopped.latents
        return denoiser.impose_image(x)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, on_progress: OnProgress | None = None) -> Tensor:
        """Normalised latents (B, C, T, h, w) -> video (B, 3, F, H, W) in [-1, 1], on the CPU."""
        total = len(latents) * latents.shape[2]
        config, done = self.vae.config, 0
        frames, height, width = latents.shape[2:]
        stride = config.spatial_stride
        num_frames = (frames - 1) * config.temporal_stride + 1
        video = torch.empty(len(latents), 3, num_frames, height * stride, width * stride)
        report(on_progress, "decode", 0, total)
        with self._on_device(self.vae):
            for one, room in zip(latents.to(self.device).split(1), video.split(1), strict=True):
                start = 0
                for chunk in self._decoded(one):
                    count = chunk.shape[2]
                    room[:, :, start : start + count] = chunk  # float32 from here on
                    start += count
                    done += -(-count // config.temporal_stride)
                    report(on_progress, "decode", done, total)
        return video

    def _decoded(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield the frames of one video by chunks; with tiles, all frames at once."""
        if self.tile is None:
            yield from self.vae.decode_stream(latents, self.chunk_latents)
        else:
            yield decode_tiled(self.vae, latents, self.tile, self.tile // 4, self.chunk_latents)

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


class WanDMDPipeline(WanPipeline):
    """A few-step student: three network evaluations, no guidance.

    Refuses what it was not trained for (other steps, guidance, negative prompts, images) unless
    called with `allow_untrained=True`.
    """

    CLASS_NAME = FEW_STEP


PIPELINES: dict[str, type[WanPipeline]] = {BASE: WanPipeline, FEW_STEP: WanDMDPipeline}
