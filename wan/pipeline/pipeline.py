"""Load once, then prompt -> video.

`WanPipeline` runs base models, `WanDMDPipeline` few-step students, `WanImageToVideoPipeline` base
models with an image in front. All are read from the released folder layout and called with
diffusers' argument names. Samples of a batch go through every network one by one and have noise of
their own, so a video is the same in any batch.

B videos, C T h w latent sizes, F frames, H W pixels, S text tokens.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

import torch
from torch import Tensor

from wan.errors import WanError, check_names
from wan.models.attention import verified_attention
from wan.models.tokenizer import clean_prompt, strip_prompt
from wan.pipeline.adopt import adopt_part, config_of_parts, fitted_config
from wan.pipeline.arguments import (
    FROM_MODEL,
    FileArguments,
    FromModel,
    LoadingArguments,
    check_arguments,
    file_options,
    known_dtype,
    one_of,
    placement,
)
from wan.pipeline.callbacks import StepCallback, StepHook
from wan.pipeline.config import BASE, FEW_STEP, PipelineConfig
from wan.pipeline.folder import ModelFolder, load_modules, save_modules
from wan.pipeline.inputs import (
    CALLBACK_TENSORS,
    COMPAT,
    FASTVIDEO_SEED,
    X0,
    Generators,
    ImageInput,
    OnProgress,
    WanPipelineOutput,
    check_output,
    finished_frames,
    first_frames,
    lora_scale,
    noise_streams,
    prompt_count,
    prompt_list,
    report,
    video_count,
)
from wan.pipeline.parts import check_saving
from wan.pipeline.stages import COMPILE, PARTS_IN_ORDER
from wan.pipeline.switches import PipelineSwitches
from wan.runtime.offload import OFFLOAD
from wan.sampling.noise import draw_noise
from wan.sampling.schedule import FEW_STEP_TIMESTEPS, Schedule
from wan.weights.hub import resolve_model
from wan.weights.quantize import check_quantize, refuse_quantized
from wan.weights.save import size_in_bytes

PartOfModel = Any  # an object, a folder or file, None to leave the part out, or FROM_MODEL


class WanPipeline(PipelineSwitches):
    """A base model: text (and for TI2V an image) to video, with guidance.

    Use `from_pretrained`; the constructor takes parts that are loaded already.

    Attributes:
        safety_checker: called with the (F, 3, H, W) frames of a video in [0, 1]; returns True if
            they must not be shown.
    """

    CLASS_NAME: ClassVar[str] = BASE
    _callback_tensor_inputs: ClassVar[tuple[str, ...]] = CALLBACK_TENSORS

    safety_checker: Callable[[Tensor], bool] | None

    def __init__(
        self,
        tokenizer: Any = None,
        text_encoder: Any = None,
        vae: Any = None,
        scheduler: Any = None,
        transformer: Any = None,
        transformer_2: Any = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
        *,
        config: PipelineConfig | None = None,
        device: str | torch.device | None = None,
        offload: str = "none",
        compile: str = "none",
        safety_checker: Callable[[Tensor], bool] | None = None,
    ) -> None:
        """Assemble a pipeline from loaded parts; a part that no call needs may be None.

        Args:
            tokenizer, text_encoder, vae, transformer, transformer_2: objects of this project, or of
                diffusers and transformers: see `wan.pipeline.adopt.adopt_part`.
            scheduler: see `PipelineSwitches`; None takes what `config` says.
            boundary_ratio: noise level where two experts hand over; None for one network.
            expand_timesteps: the network was trained with a timestep per token (TI2V).
            config: settings that describe the parts, in place of boundary_ratio and
                expand_timesteps; None takes the settings of each part.
            device: device that computes; None is where the first network is.
            offload, compile: see `PipelineStages`.

        Raises:
            WanError: parts of other kinds, or parts that do not fit together.
        """
        given = {
            "tokenizer": tokenizer,
            "text_encoder": text_encoder,
            "vae": vae,
            "transformer": transformer,
            "transformer_2": transformer_2,
        }
        parts = {n: None if part is None else adopt_part(n, part) for n, part in given.items()}
        if config is None:
            config = config_of_parts(self.CLASS_NAME, parts, boundary_ratio, expand_timesteps)
        if config.class_name != self.CLASS_NAME:
            raise WanError(f"a {config.class_name} model: use wan.{config.class_name} for it")
        if transformer_2 is not None and config.boundary_ratio is None:
            warnings.warn(
                "transformer_2 without boundary_ratio, the noise level where two experts hand "
                "over: only transformer runs",
                stacklevel=2,
            )
        if device is None:
            networks = (parts[name] for name in ("transformer", "vae", "text_encoder"))
            found = (p.device for one in networks if one is not None for p in one.parameters())
            device = next(found, torch.device("cpu"))
        self._scheduler = None
        self._progress_bar_config = {}
        self._begin_call(1, 1.0, 1.0, None)
        super().__init__(config, parts, device, offload, compile)
        self.safety_checker = safety_checker
        if scheduler is not None:
            self.scheduler = scheduler

    def _begin_call(
        self, steps: int, scale: float, scale_2: float, kwargs: Mapping[str, Any] | None
    ) -> None:
        """Set what callbacks read and change."""
        self._interrupt = False
        self._guidance_scale = scale
        self._guidance_scale_2 = scale_2
        self._num_timesteps = steps
        self._current_timestep = None
        self._attention_kwargs = None if kwargs is None else dict(kwargs)

    # --- loading and saving -----------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | ModelFolder,
        *,
        transformer: PartOfModel = FROM_MODEL,
        transformer_2: PartOfModel = FROM_MODEL,
        vae: PartOfModel = FROM_MODEL,
        text_encoder: PartOfModel = FROM_MODEL,
        tokenizer: PartOfModel = FROM_MODEL,
        scheduler: Any = FROM_MODEL,
        **arguments: Unpack[LoadingArguments],
    ) -> Self:
        """Load a model.

        Args:
            name: a folder in the released layout, a hub id, or a `ModelFolder`, to which revision
                and parts were given when it was read: here they are refused.
            transformer, transformer_2, vae, text_encoder: a loaded object; or a folder or file with
                other weights, where a config.json in that folder is used; or None to do without
                that part. With another transformer, either pipeline class takes the rest from a
                folder of the other class.
            tokenizer: a loaded object, a folder, or None.
            scheduler: an object in place of the folder's, see `PipelineSwitches`.
            arguments: see `LoadingArguments`.

        Raises:
            WanError: the files or the arguments are wrong; settings are checked before weights.
        """
        check_arguments(arguments, LoadingArguments)
        offload, compiled = arguments.get("offload", "none"), arguments.get("compile", "none")
        check_names("offload", [offload], OFFLOAD)
        check_names("compile", [compiled], COMPILE)
        quantize = arguments.get("quantize", "none")
        check_quantize(quantize)
        parts = {
            "transformer": transformer,
            "transformer_2": transformer_2,
            "vae": vae,
            "text_encoder": text_encoder,
            "tokenizer": tokenizer,
        }
        where = placement(arguments, list(parts))
        paths = {n: Path(part) for n, part in parts.items() if isinstance(part, str | Path)}
        folder = cls._folder(name, paths, arguments)
        objects = {
            n: None if part is None else adopt_part(n, part)
            for n, part in parts.items()
            if n not in paths and not isinstance(part, FromModel)
        }
        config = cls._adopt(folder, {n for n, p in (paths | objects).items() if p is not None})
        if "boundary_ratio" in arguments:
            boundary = arguments["boundary_ratio"]
            alone = config.boundary_ratio is None and transformer_2 is FROM_MODEL
            if alone and boundary is not None:
                raise WanError(
                    f"boundary_ratio={boundary}: this model has one network; give the second one "
                    "as transformer_2= too"
                )
            config = replace(config, boundary_ratio=boundary)
        if "expand_timesteps" in arguments:
            config = replace(config, expand_timesteps=arguments["expand_timesteps"])
        if parts["transformer_2"] not in (None, FROM_MODEL) and config.boundary_ratio is None:
            raise WanError(
                "transformer_2: this model has one network, not two experts; give boundary_ratio "
                "too, the noise level where two experts hand over"
            )
        config = fitted_config(config, {n: p for n, p in objects.items() if p is not None})
        if "tokenizer" not in objects:  # nothing else reads it
            objects["tokenizer"] = None if text_encoder is None else folder.tokenizer
        attention = arguments.get("attention", "sdpa")
        modules = load_modules(
            folder,
            config,
            where,
            left_out=objects,
            attention=verified_attention(
                attention, config.transformer, where.device, where.dtype("transformer")
            ),
            offload=offload,
            quantize=quantize,
            loras=arguments.get("loras"),
            on_progress=arguments.get("on_progress"),
        )
        loaded: dict[str, Any] = objects | modules
        pipeline = cls(
            **loaded,
            config=config,
            device=where.device,
            offload=offload,
            compile=compiled,
            safety_checker=arguments.get("safety_checker"),
        )
        if not isinstance(scheduler, FromModel):
            pipeline.scheduler = scheduler
        return pipeline

    @classmethod
    def _folder(
        cls, name: Any, paths: Mapping[str, Path], arguments: Mapping[str, Any]
    ) -> ModelFolder:
        """The model's folder with its settings, read now unless the caller has read it."""
        options = file_options(arguments)
        if not isinstance(name, ModelFolder):
            folder = resolve_model(name, **options)
            return ModelFolder.read(folder, paths, arguments.get("variant"))
        if paths or options or arguments.get("variant") is not None:
            raise WanError(
                f"{name.path}: its settings are read already; give other parts and a variant to "
                "ModelFolder.read, and revision and offline to resolve_model"
            )
        return name

    @classmethod
    def _adopt(cls, folder: ModelFolder, given: set[str]) -> PipelineConfig:
        """The folder's settings for this class; refuses a folder that this class cannot run.

        Args:
            given: the parts that do not come from the folder.
        """
        config = folder.config
        if config.class_name == cls.CLASS_NAME:
            return config
        if "transformer" not in given:
            raise WanError(
                f"{folder.path}: its model_index.json says {config.class_name}; load it with "
                f"wan.{config.class_name}.from_pretrained"
            )
        timesteps = FEW_STEP_TIMESTEPS if cls.CLASS_NAME == FEW_STEP else None
        return replace(config, class_name=cls.CLASS_NAME, timesteps=timesteps)

    @classmethod
    def from_pipe(cls, pipeline: "WanPipeline", **changes: Any) -> Self:
        """A pipeline of this class with the parts of another one, which are shared.

        Args:
            changes: parts to replace, or settings of the constructor; or dtype (torch_dtype), which
                converts the shared parts. Left out, the dtypes stay.

        Raises:
            WanError: a change has no such name, or the model is one of the other class.
        """
        pipeline.refuse_sharded("from_pipe")
        wanted = one_of(changes, "dtype", "torch_dtype")
        changes = {n: v for n, v in changes.items() if n not in ("dtype", "torch_dtype")}
        known = [n for n in inspect.signature(WanPipeline.__init__).parameters if n != "self"]
        check_names("from_pipe", list(changes), [*known, "dtype", "torch_dtype"])
        parts = WanPipeline.components.fget(pipeline)  # type: ignore[attr-defined]
        parts |= {n: changes.pop(n) for n in parts if n in changes}
        settings: dict[str, Any] = {
            "config": pipeline.config,
            "device": pipeline.device,
            "offload": pipeline.offload,
            "safety_checker": pipeline.safety_checker,
        }
        config = replace(
            pipeline.config,
            **{n: changes.pop(n) for n in ("boundary_ratio", "expand_timesteps") if n in changes},
        )
        made = cls(**parts, **(settings | {"config": config} | changes))
        return made if wanted is None else made.to(known_dtype(wanted, made.device))

    @property
    def components(self) -> dict[str, Any]:
        """The parts and the scheduler by name, as the constructor takes them."""
        return {**{n: self._parts[n] for n in PARTS_IN_ORDER}, "scheduler": self.scheduler}

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "5GB",
        push_to_hub: bool = False,
    ) -> None:
        """Write the released layout, which diffusers' WanPipeline loads too; dtypes are kept.

        A model that is in the folder already is replaced, other files stay.

        Args:
            safe_serialization: False warns: no pickles are written.
            variant: put into the names of the weight files, as in `<name>.fp16.safetensors`.
            max_shard_size: bytes of one file, or a text such as "5GB".

        Raises:
            WanError: an upload is asked for, a part is missing or its files are unknown, or the
                weights are quantised.
        """
        check_saving(safe_serialization, push_to_hub)
        self.refuse_sharded("save_pretrained")
        for module in self.modules.values():
            refuse_quantized(module, "released layouts hold plain ones; load with quantize=none")
        parts = {name: self.part(name) for name in ("tokenizer", *self.config.components)}
        save_modules(Path(folder), self.config, parts, variant, size_in_bytes(max_shard_size))

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
        num_videos_per_prompt: int | None = 1,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: Mapping[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        *,
        image: ImageInput | list[ImageInput] | None = None,
        image_fit: str = "resize",
        timesteps: Sequence[float] | None = None,
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
            image: first frame, one for all or one per prompt: a picture, a path, an array
                (H, W, 3) or a tensor (3, H, W) with values in [0, 1].
            image_fit: "resize" stretches the image to height x width, as diffusers does; "crop"
                keeps its proportions and cuts its sides, as the official code does.
            height, width, num_frames: pixels and frames; illegal sizes are refused.
            num_inference_steps, timesteps, schedule: number of steps, or the timesteps themselves,
                or a whole schedule; at most one of them.
            guidance_scale, guidance_scale_2: up to 1 turns guidance off; the second is for the
                low-noise expert.
            num_videos_per_prompt: the videos of one prompt follow each other in the result.
            generator: a generator, or one per video, for the noise.
            latents: (B, C, T, h, w), the noise to start from. Few-step sampling then draws fresh
                noise as if `seed` had drawn the start, or the next numbers of `generator`.
            output_type: "np", "pt", "pil" or "latent"; see `WanPipelineOutput`.
            return_dict: False returns (frames,).
            attention_kwargs: {"scale": s} multiplies the strength of LoRA adapters in this call.
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after each step,
                with the tensors named in `callback_on_step_end_tensor_inputs` (or in its own
                `tensor_inputs`); may return a dict with tensors that replace them. It may stop the
                call by `pipeline.interrupt = True`, and change `pipeline._guidance_scale`.
            max_sequence_length: number of text tokens that the model reads, padding included; that
                of `prompt_embeds` if given. The model attends to padding, so another number than in
                training makes other videos; few-step students refuse it.
            seed: instead of generators: video j gets seed + j; or one seed per video. With neither,
                PyTorch's global generator draws the noise: `torch.manual_seed` seeds it.
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
        tensor_names = getattr(
            callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs
        )
        check_output(output_type, tensor_names, self.safety_checker, callback_on_step_end, latents)
        timesteps_used = plan.schedule.timesteps.tolist()
        self._experts(plan, timesteps_used)  # refuses a network that is needed and is not there
        self._first_network().attention.exact_timesteps(timesteps_used)
        if output_type != "latent" and self.decoder is None:
            self.part("vae")
        num_videos_per_prompt = video_count(num_videos_per_prompt)
        scale = lora_scale(attention_kwargs)
        prompts = prompt_list(prompt, prompt_embeds)
        count = prompt_count(prompts, prompt_embeds)
        batch = count * num_videos_per_prompt
        generators, seeds = noise_streams(seed, generator, batch)
        pixels: Any = None
        if image is not None:
            pixels = first_frames(image, height, width, count, image_fit)
        if latents is not None and seed is not None:  # advance the generators as a drawn start does
            shape = self.config.latent_shape(height, width, num_frames)
            draw_noise(shape, generators, frame_first_noise)
        x = self.prepare_latents(
            batch,
            height=height,
            width=width,
            num_frames=num_frames,
            generator=generators,
            latents=latents,
            frame_first=frame_first_noise,
        )
        self._begin_call(
            len(plan.schedule), plan.guidance_scale, plan.guidance_scale_2, attention_kwargs
        )
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
                clean=strip_prompt if as_fastvideo else clean_prompt,
                on_progress=on_progress,
            )
        image_latents = None
        if pixels is not None:
            with self._timed("encode_image"):
                image_latents = self.encode_frames(pixels, count)
                image_latents = image_latents.repeat_interleave(num_videos_per_prompt, dim=0)
        report(on_progress, "denoise", 0, len(plan.schedule))
        bar = self.progress_bar(total=len(plan.schedule)) if on_progress is None else nullcontext()
        with self._timed("denoise"), bar as shown, self.adapters.scaled(scale):
            hook = StepHook(
                self,
                len(plan.schedule),
                callback_on_step_end,
                tensor_names,
                on_progress,
                shown,
            )
            x = self.denoise(
                plan,
                x,
                context,
                negative,
                image_latents,
                renoise=lambda i: draw_noise(x.shape[1:], generators, frame_first_noise),
                on_step=hook,
                on_x0=hook.see_x0 if X0 in tensor_names else None,
            )
        self._current_timestep = None

        output = WanPipelineOutput(x, plan, seeds)
        if output_type != "latent":
            with self._timed("decode"):
                video = self.decode_latents(x, on_progress)
            output.frames, output.nsfw_content_detected = finished_frames(
                video, output_type, self.safety_checker, as_fastvideo
            )
        return output if return_dict else output.to_tuple()


class WanDMDPipeline(WanPipeline):
    """A few-step student: three network evaluations, no guidance.

    Refuses what it was not trained for (other steps, guidance, negative prompts, images) unless
    called with `allow_untrained=True`.
    """

    CLASS_NAME = FEW_STEP


class WanImageToVideoPipeline(WanPipeline):
    """A base model whose call takes the image first, as diffusers' class of this name does.

    Only for models that take an image as a clean first frame (TI2V): those with image keys, such as
    Wan2.1 I2V, are not supported.
    """

    def __init__(
        self, *args: Any, image_processor: Any = None, image_encoder: Any = None, **parts: Any
    ) -> None:
        """See `WanPipeline`; image_processor and image_encoder must be None.

        Raises:
            WanError: there is an image encoder, as models with image keys have.
        """
        if image_processor is not None or image_encoder is not None:
            raise WanError(
                "image_encoder: models with image keys (Wan2.1 I2V) are not supported; TI2V models "
                "have none"
            )
        super().__init__(*args, **parts)

    @property
    def image_processor(self) -> None:
        """None: it belongs to an image encoder."""
        return None

    @property
    def image_encoder(self) -> None:
        """None: TI2V models read the image with the VAE."""
        return None

    @image_encoder.setter
    def image_encoder(self, encoder: Any) -> None:
        if encoder is not None:
            raise WanError("image_encoder: models with image keys (Wan2.1 I2V) are not supported")

    @property
    def components(self) -> dict[str, Any]:
        """As in `WanPipeline`, with the two parts that TI2V models do not have."""
        return super().components | {"image_processor": None, "image_encoder": None}

    def __call__(  # type: ignore[override]
        self,
        image: ImageInput | list[ImageInput],
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        *args: Any,
        last_image: Any = None,
        image_embeds: Any = None,
        **kwargs: Any,
    ) -> WanPipelineOutput | tuple[Any]:
        """Make videos that start with an image; other arguments are those of `WanPipeline`.

        Raises:
            WanError: `last_image` or `image_embeds`, which other models take, are given.
        """
        for name, value in (("last_image", last_image), ("image_embeds", image_embeds)):
            if value is not None:
                raise WanError(f"{name}: models that take it (Wan2.1 I2V) are not supported")
        return super().__call__(prompt, negative_prompt, *args, image=image, **kwargs)


def image_first(call: Callable[..., Any], rest: Callable[..., Any]) -> inspect.Signature:
    """The signature of a call that takes an image, then everything that another call takes."""
    own = inspect.signature(call).parameters
    more = inspect.signature(rest).parameters
    kept = [one for name, one in more.items() if name != "image"]
    image = own["image"].replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
    extra = [own[name] for name in ("last_image", "image_embeds")]
    return inspect.Signature([kept[0], image, *kept[1:], *extra])


# What help() and scripts that look at the call see in place of *args and **kwargs.
WanImageToVideoPipeline.__call__.__signature__ = image_first(  # type: ignore[attr-defined]
    WanImageToVideoPipeline.__call__, WanPipeline.__call__
)


PIPELINES: dict[str, type[WanPipeline]] = {BASE: WanPipeline, FEW_STEP: WanDMDPipeline}


class DiffusionPipeline:
    """Loads a model of any class: its model_index.json says which one it is."""

    @classmethod
    def from_pretrained(cls, name: str | Path, **arguments: Any) -> WanPipeline:
        """Load a model; arguments and errors as for `WanPipeline.from_pretrained`."""
        parts = {n: arguments[n] for n in PARTS_IN_ORDER if n in arguments}
        paths = {n: Path(part) for n, part in parts.items() if isinstance(part, str | Path)}
        folder = WanPipeline._folder(name, paths, arguments)
        read = {*paths, *FileArguments.__annotations__}  # what reading the folder has used
        rest = {n: value for n, value in arguments.items() if n not in read}
        return PIPELINES[folder.config.class_name].from_pretrained(folder, **rest)
