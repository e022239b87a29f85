"""diffusers' names of a pipeline's settings, each one line that leads to ours.

A name whose effect a pipeline cannot give is refused with what to write instead; one whose effect
is always there warns only where it is turned off.
"""

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from wan.errors import WanError, check_names
from wan.media.images import fit_image
from wan.models.attention_config import AttentionConfig
from wan.pipeline.inputs import check_output, finished_frames, image_pixels
from wan.pipeline.schedulers import SCHEDULERS
from wan.pipeline.stages import PipelineStages
from wan.runtime.offload import resolve_device
from wan.sampling.scheduler_config import CLASS_OF
from wan.weights.quantize import QuantizedLinear


class VideoProcessor:
    """Images in and videos out, as scripts that call the stages by hand use it."""

    def preprocess(self, image: Any, height: int | None = None, width: int | None = None) -> Tensor:
        """Images in any accepted form as (B, 3, height, width) float32 in [-1, 1].

        Args:
            height, width: the new size; None keeps that of the image.
        """
        images = image if isinstance(image, list | tuple) else [image]
        pixels = [image_pixels(one) for one in images]
        height, width = height or pixels[0].shape[1], width or pixels[0].shape[2]
        return torch.stack([fit_image(one, height, width) for one in pixels])

    def postprocess_video(self, video: Tensor, output_type: str = "np") -> Any:
        """Decoded videos (B, 3, F, H, W) in [-1, 1] as "np", "pt" or "pil"."""
        check_output(output_type, (), None)
        return finished_frames(video.float().cpu(), output_type, None)[0]


class PipelineSwitches(PipelineStages):
    """A pipeline's settings and the state of a running call, under diffusers' names.

    Attributes:
        scheduler: decides the sampler, the grid of noise levels and its shift. It may be replaced
            by an object of `wan.sampling.schedulers`, or of diffusers.
        interrupt: set it in a callback to stop after the current step and decode its latents.
    """

    _scheduler: Any
    _interrupt: bool
    _guidance_scale: float
    _guidance_scale_2: float
    _num_timesteps: int
    _current_timestep: Tensor | None
    _attention_kwargs: dict[str, Any] | None
    _progress_bar_config: dict[str, Any]

    @property
    def scheduler(self) -> Any:
        if self._scheduler is None:
            settings = self.config.scheduler
            kind = SCHEDULERS.get(settings.class_name, SCHEDULERS[CLASS_OF[settings.sampler]])
            self._scheduler = kind.from_config(settings.to_json())
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self.config = self.config.with_scheduler(scheduler)
        self._scheduler = scheduler

    def register_to_config(self, **settings: Any) -> None:
        """Change settings of model_index.json: boundary_ratio and expand_timesteps.

        Raises:
            WanError: another name.
        """
        check_names("register_to_config", list(settings), ("boundary_ratio", "expand_timesteps"))
        self.config = replace(self.config, **settings)

    # --- the state of a call ----------------------------------------------------------------------

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @interrupt.setter
    def interrupt(self, stop: bool) -> None:
        self._interrupt = stop

    @property
    def guidance_scale(self) -> float:
        """The guidance of the running call; a callback changes it through `_guidance_scale`."""
        return self._guidance_scale

    @property
    def guidance_scale_2(self) -> float:
        """The guidance of the low-noise expert in the running call."""
        return self._guidance_scale_2

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1 or self._guidance_scale_2 > 1

    @property
    def num_timesteps(self) -> int:
        """The number of steps of the running call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """The timestep of the step that has just run; None outside a call."""
        return self._current_timestep

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        return self._attention_kwargs

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Arguments of tqdm for the progress bar of a call, such as disable=True."""
        self._progress_bar_config = settings

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """A bar of tqdm; by default only where stderr is a terminal."""
        alone = self.parallel is None or self.parallel.is_main
        settings = {"disable": None if alone else True}
        return tqdm(iterable, total=total, **{**settings, **self._progress_bar_config})

    @property
    def video_processor(self) -> VideoProcessor:
        return VideoProcessor()

    @property
    def vae_scale_factor_spatial(self) -> int:
        """Pixels per latent along height and width."""
        return self.config.vae.spatial_stride

    @property
    def vae_scale_factor_temporal(self) -> int:
        """Frames per latent after the first."""
        return self.config.vae.temporal_stride

    # --- places -----------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most weights of the first network."""
        network: Any = next(iter(self.modules.values()))
        return network.dtype if hasattr(network, "dtype") else next(network.parameters()).dtype

    @property
    def _execution_device(self) -> torch.device:
        return self.device

    def cuda(self, index: int | None = None) -> Any:
        """Compute on a CUDA device from now on."""
        return self.to("cuda" if index is None else f"cuda:{index}")

    def cpu(self) -> Any:
        """Compute on the CPU from now on."""
        return self.to("cpu")

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: str | torch.device = "cuda"
    ) -> None:
        """Compute on that device with `offload="stage"`."""
        self._offload_from("stage", gpu_id, device)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: str | torch.device = "cuda"
    ) -> None:
        """Compute on that device with `offload="block"`."""
        self._offload_from("block", gpu_id, device)

    def _offload_from(self, kind: str, gpu_id: int | None, device: str | torch.device) -> None:
        self.device = resolve_device(device if gpu_id is None else f"cuda:{gpu_id}")
        self.set_offload(kind)

    def enable_group_offload(
        self,
        onload_device: str | torch.device,
        offload_device: str | torch.device = "cpu",
        offload_type: str = "block_level",
        num_blocks_per_group: int | None = None,
        non_blocking: bool = False,
        use_stream: bool = False,
        record_stream: bool = False,
        low_cpu_mem_usage: bool = False,
        offload_to_disk_path: str | None = None,
        exclude_modules: str | list[str] | None = None,
    ) -> None:
        """Compute on a device with `offload="block"`: groups of one block, copied ahead.

        Args:
            onload_device: computes.
            offload_device: "cpu", where the weights are kept.
            offload_type: "block_level" or "leaf_level"; both are groups of one block here.
            num_blocks_per_group: None or 1.
            non_blocking, use_stream, record_stream, low_cpu_mem_usage: how diffusers copies; here
                blocks are always copied ahead on a stream of their own, from pinned memory.

        Raises:
            WanError: another number of blocks, a disk, or parts to leave out.
        """
        if offload_type not in ("block_level", "leaf_level"):
            raise WanError(f"offload_type={offload_type}: choose block_level")
        if num_blocks_per_group not in (None, 1):
            raise WanError(f"num_blocks_per_group={num_blocks_per_group}: a group is one block")
        if offload_to_disk_path is not None:
            raise WanError("offload_to_disk_path: weights are views of their files already")
        if torch.device(offload_device).type != "cpu" or exclude_modules:
            raise WanError("group offload keeps every part on the CPU: leave exclude_modules out")
        self._offload_from("block", None, onload_device)

    def enable_parallelism(
        self,
        weights: str = "whole",
        *,
        guidance: bool = True,
        device: str | torch.device | None = None,
    ) -> None:
        """Make each video together with all other processes of `torch.distributed`.

        Call it once in every process, after `init_process_group`. From then on all processes make
        the same calls and get the same results, which equal those of one process up to the
        rounding of sums. What goes into a call is the main process's (rank 0): noise, prompts, and
        what a callback returns. It alone encodes text and images, so the other processes may be
        loaded with text_encoder=None.

        Shared out are: the tokens of self-attention and everything between (Ulysses); with
        guidance and an even number of processes its two forwards, on a half each; and the rows of
        each frame in decoding, where there are at least as many rows of latents as processes.

        Args:
            weights: "whole": each device holds all; "sharded": each holds its part of the
                transformers' blocks, and gathers one while it computes (FSDP2). Load the model
                with device="cpu" for that.
            guidance: False computes both forwards of guidance in every process.
            device: computes from now on, e.g. this process's GPU; None is the pipeline's device.

        Raises:
            WanError: there is no process group, or it does not serve the device; or sharded
                weights with offload, LoRA adapters or 8-bit weights; or compiled networks.
        """
        if self.parallel is not None:
            raise WanError("enable_parallelism: it is on already")
        if not torch.distributed.is_available():
            raise WanError("enable_parallelism: this build of PyTorch has no torch.distributed")
        from wan.runtime.parallel import ParallelGroup, check_options

        networks = self.networks()
        layers = (layer for network in networks.values() for layer in network.modules())
        quantized = any(isinstance(layer, QuantizedLinear) for layer in layers)
        check_options(
            weights,
            offload=self.offload,
            compile=self.compile,
            quantized=quantized,
            tile=self.tile,
        )
        if weights == "sharded" and self.get_list_adapters():
            raise WanError("LoRA adapters with sharded weights: merge them, with loras=")
        place = self.device if device is None else resolve_device(device)
        group = ParallelGroup(place, networks.values(), weights, guidance=guidance)
        self.device = place
        for name, module in self.modules.items():
            if not (group.sharded and name in networks):
                self._place(module)
        self.parallel = group

    def maybe_free_model_hooks(self) -> None:
        """Do nothing: between calls no weights are left on the device under offload."""

    def remove_all_hooks(self) -> None:
        """Keep the weights on the device again."""
        self.set_offload("none")

    # --- attention and decoding -------------------------------------------------------------------

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Use sliced attention: exact, with less memory on devices without a fused kernel.

        Args:
            slice_size: a number of queries, "auto" or "max": the size that fits; None turns it off.
        """
        if slice_size is None:
            self.disable_attention_slicing()
        elif isinstance(slice_size, int):
            self.set_attention(AttentionConfig("sliced", slice_size=slice_size))
        else:
            self.set_attention("sliced")

    def disable_attention_slicing(self) -> None:
        """Let PyTorch choose the kernel again."""
        self.set_attention("sdpa")

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Use PyTorch's own memory-efficient attention, which computes the same function.

        Raises:
            WanError: one of xformers' operators is given.
        """
        if attention_op is not None:
            raise WanError(
                "attention_op: xformers is not used here; set_attention chooses a kernel"
            )
        self.set_attention("sdpa")

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Use PyTorch's attention, as before."""
        self.set_attention("sdpa")

    def enable_vae_slicing(self) -> None:
        """Decode the videos of a batch one by one, as a pipeline always does."""
        self.part("vae").enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Warn: a pipeline always decodes the videos of a batch one by one."""
        self.part("vae").disable_slicing()
        warnings.warn(
            "disable_vae_slicing: a pipeline always decodes the videos of a batch one by one",
            stacklevel=2,
        )

    def enable_vae_tiling(self) -> None:
        """Decode in tiles: less memory, not the same result."""
        self.part("vae").enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode whole frames."""
        self.part("vae").disable_tiling()
