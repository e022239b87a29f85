"""Which known model a file is: the settings of weights that come without a config.json.

The official layout has a config.json for the transformer only, and ComfyUI's files have none:
their settings stand in the code that reads them. Here they are found by the shapes of the tensors,
for the released models and for the shipped miniature.

Source: the released repositories of both layouts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from wan.errors import WanError
from wan.files import parse_json, read_json
from wan.models.dit import WanDiT
from wan.models.dit_config import DiTConfig
from wan.models.umt5 import UMT5Config, UMT5Encoder
from wan.models.vae import VAEConfig, WanVAE
from wan.models.vae_config import VAE_2_1
from wan.paths import inside
from wan.weights.checkpoint import Checkpoint
from wan.weights.hub import STUDENT, TEACHER
from wan.weights.keys import COMPONENTS, PLAIN_WEIGHTS, detect_layout
from wan.weights.load import build_on_meta, match_names

# part -> the dataclass of its config.json, and its network
PARTS: dict[str, tuple[Any, type[nn.Module]]] = {
    "transformer": (DiTConfig, WanDiT),
    "vae": (VAEConfig, WanVAE),
    "text_encoder": (UMT5Config, UMT5Encoder),
}
CLASS_NAMES = {
    "transformer": ("WanTransformer3DModel", "WanModel"),
    "vae": ("AutoencoderKLWan",),
    "text_encoder": ("UMT5EncoderModel",),
}
# Where files of a layout without config.json carry theirs: as JSON in the safetensors metadata.
CONFIG_METADATA = "config"

HEAD_DIM = 128  # of every release; only this much can't be told from the shapes

Shapes = Mapping[str, tuple[int, ...]]  # of all tensors, by our names


def known_config(component: str, checkpoint: Checkpoint, or_else: str = "") -> dict[str, Any]:
    """The settings of a component's weights: what its config.json holds, or would hold.

    They are those of the config.json beside the file, else of the one inside it (as `infer.convert`
    writes it), else those of the known model that has these shapes: Wan2.1 and Wan2.2 transformers,
    both autoencoders, UMT5-XXL, and the parts of the miniature.

    Args:
        component: one of `wan.weights.keys.COMPONENTS`.
        or_else: what a caller can do beside putting a config.json there, for the message.

    Raises:
        WanError: the weights are of another component, of no known model, or quantised.
    """
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    beside = folder / "config.json"
    if beside.is_file() and is_config_of(component, read_json(inside(beside, folder))):
        return read_settings(beside)
    if CONFIG_METADATA in checkpoint.metadata:
        source = f"{checkpoint.path}: its metadata {CONFIG_METADATA}"
        values = parse_json(checkpoint.metadata[CONFIG_METADATA], source)
        if is_config_of(component, values):
            return values
    if (known := config_of_shapes(component, shapes_of(component, checkpoint))) is not None:
        return known
    raise WanError(
        f"{checkpoint.path}: no config.json of a {component} beside it, and its shapes are not "
        f"those of a known model: put its config.json beside it{or_else}"
    )


def read_settings(path: Path) -> dict[str, Any]:
    """The config.json of a component.

    Raises:
        WanError: it is missing or damaged, or describes quantised weights.
    """
    values = read_json(path)
    if quantised := values.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        by = "" if method is None else f", by {method}"
        raise WanError(
            f"{path}: a quantised model (quantization_config{by}); take the release with "
            f"{PLAIN_WEIGHTS}, and make it small while it is loaded with quantize=int8 or fp8"
        )
    return values


def component_of(checkpoint: Checkpoint) -> str:
    """Which component a checkpoint is, by its names.

    Raises:
        WanError: it is none, or of another kind, which the message names.
    """
    reasons = []
    for component in COMPONENTS:
        try:
            detect_layout(component, checkpoint.tensors)
        except WanError as error:
            reasons.append(error)
        else:
            return component
    # The transformer's reason also names a model of another kind.
    raise WanError(f"{checkpoint.path}: {reasons[0]}")


def is_config_of(component: str, values: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of this component, by its class name."""
    listed = values.get("architectures")
    names = [values.get("_class_name"), *(listed if isinstance(listed, list) else [])]
    return any(name in CLASS_NAMES[component] for name in names)


def shapes_of(component: str, checkpoint: Checkpoint) -> Shapes:
    """The shapes of a checkpoint's tensors, by our names."""
    stored = match_names(checkpoint, component).stored
    return {name: tensor.entry.shape for name, tensor in stored.items()}


def shapes_with(component: str, values: Mapping[str, Any]) -> Shapes:
    """The shapes of the parameters that a network with these settings has."""
    config_class, network_class = PARTS[component]
    config = config_class.from_json(dict(values))
    module = build_on_meta(lambda: network_class(config))
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def config_of_shapes(component: str, shapes: Shapes) -> dict[str, Any] | None:
    """The settings of the known model that has these shapes; None if no such model has them."""
    for file in (folder / component / "config.json" for folder in (STUDENT, TEACHER)):
        if file.is_file() and shapes_with(component, values := read_json(file)) == shapes:
            return values
    return RELEASED[component](shapes)


def released_vae(shapes: Shapes) -> dict[str, Any] | None:
    """The settings of the released autoencoder with these shapes."""
    channels = shapes.get("post_quant_conv.weight", (0,))[0]
    width = shapes.get("encoder.conv_in.weight", (0,))[0]
    return next((c for c in VAE_CONFIGS if (c["z_dim"], c["base_dim"]) == (channels, width)), None)


def released_text_encoder(shapes: Shapes) -> dict[str, Any] | None:
    """The settings of UMT5-XXL, if these are its shapes."""
    xxl = UMT5Config()
    same = shapes.get("token_embedding.weight") == (xxl.vocab_size, xxl.d_model)
    return xxl.to_json() if same else None


def released_transformer(shapes: Shapes) -> dict[str, Any] | None:
    """The settings of a transformer with the head width of all releases."""
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


RELEASED = {
    "transformer": released_transformer,
    "vae": released_vae,
    "text_encoder": released_text_encoder,
}

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
