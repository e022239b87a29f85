"""The three networks under the names and with the calls that diffusers and transformers give them.

Each class is a network of `wan.models` with a face: a constructor that takes single settings,
`from_pretrained`, `from_single_file`, `from_config`, `save_pretrained`, and the call that scripts
make. There is no second implementation: the calls end in the methods of the network.

B videos, C T h w latent sizes, F frames, H W pixels, S text tokens, L video tokens, D width.
"""

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, Unpack, cast

import torch
from torch import Tensor, nn

from wan.errors import WanError
from wan.models.attention import AttentionChoice
from wan.models.dit import WanDiT
from wan.models.dit_config import DiTConfig
from wan.models.recompute import CHECKPOINT_BLOCKS
from wan.models.umt5 import UMT5Config, UMT5Encoder
from wan.models.vae import WanVAE, decode_tiled
from wan.models.vae_config import CHUNK_LATENTS, VAEConfig
from wan.paths import all_inside, inside
from wan.pipeline.arguments import PartArguments, check_arguments, file_options, placement
from wan.pipeline.config import part_folder
from wan.pipeline.known_models import PARTS, known_config, read_settings
from wan.weights.checkpoint import open_checkpoint
from wan.weights.hub import resolve_file, resolve_model
from wan.weights.keys import VAELevels
from wan.weights.load import load_module
from wan.weights.save import replace_component, size_in_bytes


def weight_kind(part: str) -> str:
    """The component name of a part: both experts are "transformer"."""
    return "transformer" if part == "transformer_2" else part


def vae_levels(config: VAEConfig) -> VAELevels:
    """The settings that the key table of a VAE depends on."""
    return VAELevels(config.is_residual, config.num_res_blocks)


T = TypeVar("T")

# diffusers' methods of a network that have no effect here -> what to do instead
ON_EVERY_PART = {
    "enable_group_offload": "call it on the pipeline, where it takes the same arguments",
    "enable_layerwise_casting": 'load with quantize="fp8", which keeps large layers in 8 bits',
}
ON_THE_TRANSFORMER = {
    "enable_cache": "every step is computed; a few-step student, see WanDMDPipeline, has three",
    "add_adapter": "wan.lora.merge.add_lora(network, rank) adds a LoRA to train",
    "enable_parallelism": "call it on the pipeline, which shares out decoding too",
    "load_lora_adapter": "use load_lora_weights of the pipeline",
    **dict.fromkeys(
        ("set_adapters", "delete_adapters", "enable_lora", "disable_lora", "fuse_lora"),
        "call it on the pipeline",
    ),
    "set_attn_processor": "set_attention chooses how attention is computed",
    "fuse_qkv_projections": "leave it out, it changes no video",
}


def refusing(methods: Mapping[str, str]) -> Callable[[type[T]], type[T]]:
    """A class decorator: the named methods raise a `WanError` that says what to do instead."""

    def refusal(name: str, remedy: str) -> Callable[..., None]:
        def method(self: Any, *args: Any, **kwargs: Any) -> None:
            raise WanError(f"{type(self).__name__}.{name} is not supported here: {remedy}")

        method.__name__ = name
        method.__doc__ = f"Raise a WanError: {remedy}."
        return method

    def decorate(owner: type[T]) -> type[T]:
        for name, remedy in methods.items():
            setattr(owner, name, refusal(name, remedy))
        return owner

    return decorate


@refusing(ON_EVERY_PART)
class PartFace(nn.Module):
    """Loading and saving of one network; each subclass is also the network itself.

    Attributes:
        COMPONENT: its name in `PARTS`.
        CLASS_DEFAULTS: settings that diffusers' class has where a caller gives none.
    """

    COMPONENT: ClassVar[str]
    CLASS_DEFAULTS: ClassVar[dict[str, Any]] = {}
    config: Any

    @classmethod
    def settings(cls, config: Any, changes: Mapping[str, Any]) -> Any:
        """The dataclass of settings from one, a mapping, an object of another library, or nothing.

        Args:
            changes: settings that replace or complete those of `config`.
        """
        config_class = PARTS[cls.COMPONENT][0]
        if isinstance(config, config_class) and not changes:
            return config
        return config_class.from_json(cls.CLASS_DEFAULTS | as_mapping(config) | dict(changes))

    @classmethod
    def from_config(cls, config: Any, **changes: Any) -> Self:
        """A network with those settings; its weights are not loaded."""
        return cast(Any, cls)(config, **changes)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, subfolder: str | None = None, **arguments: Unpack[PartArguments]
    ) -> Self:
        """Load one network, in evaluation mode.

        Args:
            name: a folder, a hub id or a shipped model.
            subfolder: the part's folder below it, such as "vae"; None if `name` is that folder.
            arguments: see `PartArguments`.

        Raises:
            WanError: the files or the arguments are wrong.
        """
        check_arguments(arguments, PartArguments)
        options = file_options(arguments)
        if subfolder is not None:
            patterns = (f"{subfolder}/*.safetensors", f"{subfolder}/*.json", "shared_parts.json")
            folder = part_folder(resolve_model(name, patterns=patterns, **options), subfolder)
        else:
            folder = resolve_model(name, **options)
            all_inside(folder, folder)
        if not (folder / "config.json").is_file():
            raise WanError(
                f"{folder / 'config.json'} is missing: give the folder of one network, or "
                f'subfolder="{cls.COMPONENT}" with the folder of a whole model'
            )
        return cls._load(folder, read_settings(folder / "config.json"), arguments)

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        config: Any = None,
        subfolder: str | None = None,
        **arguments: Unpack[PartArguments],
    ) -> Self:
        """Load one network from one safetensors file, in the names of any known layout.

        Args:
            path: a file, or the address of one on the hub.
            config: the settings, or a folder or hub id with its config.json; None finds the
                released model that has the file's shapes.
            subfolder: of `config`.
            arguments: see `PartArguments`.

        Raises:
            WanError: as `from_pretrained`; or no released model has these shapes.
        """
        check_arguments(arguments, PartArguments)
        options = file_options(arguments)
        file = resolve_file(path, **{n: v for n, v in options.items() if n != "variant"})
        if config is None:
            config = known_config(cls.COMPONENT, open_checkpoint(file), ", or give config=")
        elif isinstance(config, str | Path):
            folder = resolve_model(config, patterns=("*.json",), **options)
            place = folder if subfolder is None else part_folder(folder, subfolder)
            inside(place / "config.json", folder)
            config = read_settings(place / "config.json")
        return cls._load(file, config, arguments)

    @classmethod
    def _load(cls, place: Path, config: Any, arguments: PartArguments) -> Self:
        settings = cls.settings(config, {})
        where = placement(arguments, ())
        network: Any = load_module(
            lambda: cast(Any, cls)(settings),
            open_checkpoint(place, arguments.get("variant")),
            cls.COMPONENT,
            dtype=where.default,
            device=where.device,
            quantize=arguments.get("quantize", "none"),
        )
        return network.eval()

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "5GB",
        push_to_hub: bool = False,
    ) -> None:
        """Write config.json and the weights in the released layout, replacing older weights.

        Args:
            safe_serialization: False warns: no pickles are written.
            variant: put into the names of the files, as in `<name>.fp16.safetensors`.
            max_shard_size: bytes of one file, or a text such as "5GB".

        Raises:
            WanError: an upload is asked for, or the weights are quantised.
        """
        check_saving(safe_serialization, push_to_hub)
        levels = vae_levels(self.config) if self.COMPONENT == "vae" else None
        replace_component(
            self.state_dict(),
            Path(folder),
            self.COMPONENT,
            self.config.to_json(),
            vae_levels=levels,
            variant=variant,
            max_shard_bytes=size_in_bytes(max_shard_size),
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def num_parameters(self, only_trainable: bool = False) -> int:
        """The number of parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)


def check_saving(safe_serialization: bool, push_to_hub: bool) -> None:
    """Refuse an upload; warn that pickles are asked for, which are never written."""
    if not safe_serialization:
        warnings.warn(
            "safe_serialization=False asks for pickles: safetensors files are written instead",
            stacklevel=3,
        )
    if push_to_hub:
        raise WanError("push_to_hub=True: save to a folder, then run  hf upload owner/name FOLDER")


def as_mapping(config: Any) -> dict[str, Any]:
    """Settings as a dict: from a mapping, a dataclass, or an object that has `to_dict`."""
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return dict(config)
    if hasattr(config, "to_json"):
        return config.to_json()
    if is_dataclass(config) and not isinstance(config, type):
        return asdict(config)
    if hasattr(config, "to_dict"):
        return config.to_dict()
    raise WanError(f"config of type {type(config).__name__}: need a mapping of settings")


class Output:
    """A result of a network that is read by attribute, by name or by position."""

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())

    def __getitem__(self, key: int | slice | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


# --- the transformer ------------------------------------------------------------------------------


@dataclass
class TransformerOutput(Output):
    """`sample`: the velocity (B, C, T, h, w)."""

    sample: Tensor


# diffusers' names of attention kernels -> ours
ATTENTION_BACKENDS = {
    "native": "sdpa",
    "_native_math": "math",
    "_native_cudnn": "cudnn",
    "_native_flash": "flash",
    "flash": "flash",
    "_flash_3": "flash3",
    "sage": "sage",
}


@refusing(ON_THE_TRANSFORMER)
class WanTransformer3DModel(PartFace, WanDiT):
    """`wan.models.dit.WanDiT` under diffusers' name."""

    COMPONENT = "transformer"
    CLASS_DEFAULTS: ClassVar[dict[str, Any]] = {  # those of Wan2.1 T2V-14B
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "num_layers": 40,
        "ffn_dim": 13824,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
    }

    def __init__(
        self,
        config: DiTConfig | Mapping[str, Any] | None = None,
        attention: AttentionChoice = "sdpa",
        checkpoint_blocks: str = "none",
        **settings: Any,
    ) -> None:
        """Take the settings as one object, or one by one under the names of config.json."""
        WanDiT.__init__(self, self.settings(config, settings), attention, checkpoint_blocks)

    def forward(
        self,
        latents: Tensor | None = None,
        timestep: Tensor | None = None,
        context: Any = None,
        num_tokens: int | None = None,
        exact: bool = False,
        *,
        hidden_states: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_image: Tensor | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Velocity of noisy latents: our call, or diffusers' call.

        The call is diffusers' if `hidden_states`, `encoder_hidden_states` or `return_dict` is
        given: the result is then a `TransformerOutput`, or a tuple with return_dict=False, in the
        dtype of the latents. All other calls are those of `WanDiT.forward`, which returns float32.

        Args:
            hidden_states, encoder_hidden_states: diffusers' names for latents and context.
            timestep: (B,), or (B, L) per video token, in [0, 1000].
            encoder_hidden_states_image: None; networks with image keys are not supported.
            attention_kwargs: None or empty; a LoRA's scale is an argument of the pipeline's call.

        Raises:
            WanError: an argument is given twice, is missing or is not supported.
        """
        theirs = (hidden_states, encoder_hidden_states, return_dict)
        for name, one, other in (
            ("hidden_states", latents, hidden_states),
            ("encoder_hidden_states", context, encoder_hidden_states),
        ):
            if one is not None and other is not None:
                raise WanError(f"{name} is given twice: by position and by name")
        if encoder_hidden_states_image is not None:
            raise WanError(
                "encoder_hidden_states_image: networks with image keys are not supported"
            )
        if attention_kwargs:
            raise WanError(
                f"attention_kwargs={dict(attention_kwargs)}: give them to the pipeline's call"
            )
        x = latents if hidden_states is None else hidden_states
        text = context if encoder_hidden_states is None else encoder_hidden_states
        if x is None or timestep is None or text is None:
            raise WanError("the transformer needs hidden_states, timestep, encoder_hidden_states")
        velocity = WanDiT.forward(self, x, timestep, text, num_tokens, exact)
        if all(one is None for one in theirs):
            return velocity
        velocity = velocity.to(x.dtype)
        return (velocity,) if return_dict is False else TransformerOutput(velocity)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most weights."""
        return self.patch_embedding.weight.dtype

    def enable_gradient_checkpointing(self) -> None:
        """Keep only each block's input for the backward pass."""
        self.run_block = CHECKPOINT_BLOCKS["full"]

    def disable_gradient_checkpointing(self) -> None:
        """Keep all activations for the backward pass."""
        self.run_block = CHECKPOINT_BLOCKS["none"]

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.run_block is not CHECKPOINT_BLOCKS["none"]

    def set_attention_backend(self, backend: str) -> None:
        """Use an attention kernel by diffusers' name; `set_attention` knows more of them.

        Raises:
            WanError: another name; lists those that are known.
        """
        if backend not in ATTENTION_BACKENDS:
            raise WanError(
                f"attention backend {backend!r}: known are {', '.join(ATTENTION_BACKENDS)}; "
                "set_attention takes this project's own names"
            )
        self.set_attention(ATTENTION_BACKENDS[backend])

    def reset_attention_backend(self) -> None:
        """Let PyTorch choose the kernel again."""
        self.set_attention("sdpa")

    def cache_context(self, name: str) -> AbstractContextManager[None]:
        """Do nothing: no cache of an earlier step is ever used, so there is none to keep apart."""
        return nullcontext()

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compile the blocks one by one; arguments as for `torch.compile`."""
        for block in self.blocks:
            block.compile(*args, **kwargs)


# --- the autoencoder ------------------------------------------------------------------------------


@dataclass
class LatentDistribution:
    """The posterior of encoded videos: a Gaussian per latent, not normalised.

    Attributes:
        parameters: (B, 2 z, T, h, w), mean and log-variance.
    """

    parameters: Tensor

    @property
    def mean(self) -> Tensor:
        return self.parameters.chunk(2, dim=1)[0]

    @property
    def logvar(self) -> Tensor:
        return self.parameters.chunk(2, dim=1)[1].clamp(-30, 20)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * noise; a CPU generator gives the same noise on every device."""
        where = self.parameters.device if generator is None else generator.device
        noise = torch.randn(
            self.mean.shape, generator=generator, dtype=self.parameters.dtype, device=where
        )
        return self.mean + self.std * noise.to(self.parameters.device)


@dataclass
class EncoderOutput(Output):
    """`latent_dist`: the posterior of the latents."""

    latent_dist: LatentDistribution


@dataclass
class DecoderOutput(Output):
    """`sample`: the video (B, 3, F, H, W) in [-1, 1]."""

    sample: Tensor


TILE_PIXELS, TILE_STRIDE = 256, 192


class AutoencoderKLWan(PartFace, WanVAE):
    """`wan.models.vae.WanVAE` under diffusers' name: latents of these calls are not normalised.

    Attributes:
        use_slicing: `encode` and `decode` take the videos of a batch one by one.
    """

    COMPONENT = "vae"
    CLASS_DEFAULTS: ClassVar[dict[str, Any]] = {"_class_name": "AutoencoderKLWan"}

    def __init__(
        self, config: VAEConfig | Mapping[str, Any] | None = None, **settings: Any
    ) -> None:
        """Take the settings as one object, or one by one under the names of config.json."""
        WanVAE.__init__(self, self.settings(config, settings))
        self.use_slicing = False

    def encode(self, x: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[Any]:
        """Posterior of the latents of videos (B, 3, F, H, W) in [-1, 1].

        The pipeline normalises latents with `config.latents_mean` and `latents_std`;
        `encode_normalized` does both.
        """
        videos = x.split(1) if self.use_slicing else [x]
        moments = torch.cat([self.encode_moments(one, 4) for one in videos])
        posterior = LatentDistribution(moments)
        return EncoderOutput(posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Videos (B, 3, F, H, W) in [-1, 1] of latents (B, z, T, h, w) that are not normalised."""
        weight = self.post_quant_conv.weight
        if z.ndim != 5 or z.shape[1] != self.config.z_dim:
            raise WanError(f"latents {tuple(z.shape)}: need (B, {self.config.z_dim}, T, h, w)")
        videos = []
        for one in z.split(1) if self.use_slicing else [z]:
            if self.tile is None:
                chunks = self.decode_chunks(one.to(weight.dtype), CHUNK_LATENTS)
                videos.append(torch.cat(list(chunks), dim=2))
            else:
                mean, std = self.latent_statistics(z.device)
                tiled = (one.float() - mean) / std
                videos.append(decode_tiled(self, tiled, self.tile, self.tile_overlap))
        video = torch.cat(videos)
        return DecoderOutput(video) if return_dict else (video,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encode videos and decode the modes of their posteriors."""
        return self.decode(self.encode(sample)[0].mode(), return_dict)

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: float | None = None,
        tile_sample_stride_width: float | None = None,
    ) -> None:
        """Decode in square tiles that overlap: less memory, not the same result.

        Args:
            tile_sample_min_height, tile_sample_min_width: pixels per side of a tile, 256.
            tile_sample_stride_height, tile_sample_stride_width: pixels between tiles, 192.

        Raises:
            WanError: tiles that are not square, or no multiples of the spatial stride.
        """
        size = (tile_sample_min_height or TILE_PIXELS, tile_sample_min_width or TILE_PIXELS)
        step = (tile_sample_stride_height or TILE_STRIDE, tile_sample_stride_width or TILE_STRIDE)
        stride = self.config.spatial_stride
        if size[0] != size[1] or step[0] != step[1]:
            raise WanError(f"tiles of {size}, every {step} pixels: both must be square here")
        if size[0] % stride or step[0] % stride or not 0 < step[0] <= size[0]:
            raise WanError(
                f"tiles of {size[0]} pixels, every {step[0]}: both must be multiples of {stride}, "
                "and the second at most the first"
            )
        self.tile = int(size[0] // stride)
        self.tile_overlap = int((size[0] - step[0]) // stride)

    def disable_tiling(self) -> None:
        """Decode whole frames."""
        self.tile = None

    def enable_slicing(self) -> None:
        """Encode and decode the videos of a batch one by one, as a pipeline always does."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode a batch at once in the calls of this object."""
        self.use_slicing = False


# --- the text encoder -----------------------------------------------------------------------------


@dataclass
class TextOutput(Output):
    """`last_hidden_state`: one vector per token, (B, S, D)."""

    last_hidden_state: Tensor


class UMT5EncoderModel(PartFace, UMT5Encoder):
    """`wan.models.umt5.UMT5Encoder` under transformers' name and with its call."""

    COMPONENT = "text_encoder"

    def __init__(
        self, config: UMT5Config | Mapping[str, Any] | None = None, **settings: Any
    ) -> None:
        """Take the settings as one object, or one by one under the names of config.json."""
        UMT5Encoder.__init__(self, self.settings(config, settings))

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> TextOutput | tuple[Tensor]:
        """Encode token ids (B, S); the mask (B, S) is 1 at real tokens, 0 at padding."""
        mask = None if attention_mask is None else attention_mask.bool()
        states = self.encode_ids(input_ids, mask)
        return TextOutput(states) if return_dict else (states,)

    @property
    def dtype(self) -> torch.dtype:
        return self.token_embedding.weight.dtype


FACES: dict[str, type[PartFace]] = {
    "transformer": WanTransformer3DModel,
    "vae": AutoencoderKLWan,
    "text_encoder": UMT5EncoderModel,
}
