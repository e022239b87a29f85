"""What belongs to a release besides its weights: the configs of both layouts, and file names.

The official layout has a config.json for the transformer only; the settings of its VAE and text
encoder stand in the official code, and so do the scheduler's. They are written out here, under the
names of the diffusers layout. Source: the released repositories of both layouts.
"""

import json
from collections.abc import Mapping
from typing import Any

from wan.errors import WanError
from wan.files import read_json
from wan.models.dit_config import DiTConfig
from wan.models.umt5 import UMT5Config
from wan.models.vae import VAEConfig
from wan.models.vae_config import VAE_2_1
from wan.pipeline.config import BASE, PipelineConfig
from wan.sampling.scheduler_config import SchedulerSettings
from wan.weights.checkpoint import Checkpoint

# --- the settings of a component ------------------------------------------------------------------

CLASS_NAMES = {
    "transformer": ("WanTransformer3DModel", "WanModel"),
    "vae": ("AutoencoderKLWan",),
    "text_encoder": ("UMT5EncoderModel",),
}
# Where files of a layout without config.json carry theirs: as JSON in the safetensors metadata.
CONFIG_METADATA = "config"

HEAD_DIM = 128  # of every release; only this much can't be told from the shapes


def is_config_of(component: str, values: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of this component, by its class name."""
    names = [values.get("_class_name"), *(values.get("architectures") or [])]
    return bool(set(names) & set(CLASS_NAMES[component]))


def find_config(
    checkpoint: Checkpoint, component: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """The config.json of a component: the file beside it, the one inside it, or the release's.

    Args:
        shapes: of all tensors, by our names.
    Raises:
        WanError: there is none, and the shapes are not those of a release.
    """
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    beside = folder / "config.json"
    if beside.is_file() and is_config_of(component, values := read_json(beside)):
        return values
    if CONFIG_METADATA in checkpoint.metadata:
        try:
            values = json.loads(checkpoint.metadata[CONFIG_METADATA])
        except json.JSONDecodeError as error:
            raise WanError(f"{checkpoint.path}: its config is not JSON ({error})") from error
        if isinstance(values, dict) and is_config_of(component, values):
            return values
    if (known := config_of_shapes(component, shapes)) is not None:
        return known
    raise WanError(
        f"{checkpoint.path}: no config.json of a {component} beside it, and its shapes are not "
        "those of a release: give its settings as config=FILE"
    )


def config_of_shapes(
    component: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any] | None:
    """The config of the release that has these shapes; None if no release has them."""
    if component == "vae":
        channels = shapes.get("post_quant_conv.weight", (0,))[0]
        width = shapes.get("encoder.conv_in.weight", (0,))[0]
        return next(
            (c for c in VAE_CONFIGS if (c["z_dim"], c["base_dim"]) == (channels, width)), None
        )
    if component == "text_encoder":
        xxl = UMT5Config()
        same = shapes.get("token_embedding.weight") == (xxl.vocab_size, xxl.d_model)
        return xxl.to_json() if same else None
    needed = (
        "patch_embedding.weight",
        "head.proj.weight",
        "blocks.0.ffn.up.weight",
        "text_embedding.in_proj.weight",
        "time_embedding.in_proj.weight",
    )
    if any(name not in shapes for name in needed):
        return None
    patch, head, up, text, time = (shapes[name] for name in needed)
    width, in_channels, *patch_size = patch
    if width % HEAD_DIM or patch_size != [1, 2, 2]:
        return None
    return DiTConfig(
        num_attention_heads=width // HEAD_DIM,
        attention_head_dim=HEAD_DIM,
        num_layers=len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        ffn_dim=up[0],
        in_channels=in_channels,
        out_channels=head[0] // 4,
        text_dim=text[1],
        freq_dim=time[1],
    ).to_json()


def official_transformer_config(config: DiTConfig, model_type: str) -> dict[str, Any]:
    """The official config.json of a transformer.

    What the official code fixes is only written where this model differs.

    Args:
        model_type: "t2v", or "ti2v" for a model with a timestep per token.
    """
    values: dict[str, Any] = {
        "_class_name": "WanModel",
        "model_type": model_type,
        "dim": config.width,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "num_heads": config.num_attention_heads,
        "num_layers": config.num_layers,
        "out_dim": config.out_channels,
        "text_len": 512,
    }
    fixed = DiTConfig()
    for name in ("text_dim", "rope_max_seq_len"):
        if getattr(config, name) != getattr(fixed, name):
            values[name] = getattr(config, name)
    if config.patch_size != fixed.patch_size:
        values["patch_size"] = list(config.patch_size)
    return values


# --- a whole release ------------------------------------------------------------------------------

# File and folder names of the official layout.
EXPERT_FOLDERS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
TRANSFORMER_STEM = "diffusion_pytorch_model"
VAE_STEMS = ("Wan2.2_VAE", "Wan2.1_VAE")
TEXT_ENCODER_STEM = "models_t5_umt5-xxl-enc"
TOKENIZER_FOLDER = "google/umt5-xxl"
TOKENIZER_FILES = (
    "tokenizer.json",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def official_pipeline(configs: Mapping[str, Mapping[str, Any]], num_experts: int) -> PipelineConfig:
    """The settings of an official release, which stand in its code.

    Args:
        configs: of the transformer, the vae and the text_encoder.
        num_experts: 2 for A14B, whose high-noise expert hands over at sigma 0.875.
    """
    per_token = configs["transformer"].get("model_type") == "ti2v"
    shift = 12.0 if num_experts == 2 else 5.0  # 3 is for image to video at 480p
    return PipelineConfig(
        class_name=BASE,
        transformer=DiTConfig.from_json(dict(configs["transformer"])),
        vae=VAEConfig.from_json(dict(configs["vae"])),
        text_encoder=UMT5Config.from_json(dict(configs["text_encoder"])),
        boundary_ratio=0.875 if num_experts == 2 else None,
        expand_timesteps=per_token,
        scheduler=SchedulerSettings(shift=shift),
    )


VAE_2_2 = VAEConfig(
    latents_mean=(
        *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
        *(-0.1382, 0.0542, 0.2813, 0.0891, 0.157, -0.0098, 0.0375, -0.1825),
        *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
        *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123),
        *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.052, 0.3748),
        *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
    ),
    latents_std=(
        *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013),
        *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
        *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
        *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
        *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
        *(0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
    ),
)
VAE_CONFIGS = (VAE_2_1.to_json(), VAE_2_2.to_json())
