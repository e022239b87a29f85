"""Parts that are given as objects, of this project or of another library, and their settings."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from wan.errors import WanError
from wan.models.dit_config import DiTConfig
from wan.models.umt5 import UMT5Config, UMT5Encoder
from wan.models.vae_config import VAE_2_1, VAEConfig
from wan.pipeline.config import FEW_STEP, PipelineConfig, model_defaults
from wan.pipeline.known_models import PARTS
from wan.pipeline.parts import FACES, vae_levels, weight_kind
from wan.sampling.schedule import FEW_STEP_TIMESTEPS
from wan.weights.keys import VAELevels, our_name
from wan.weights.load import build_on_meta

# Their classes whose weights have the names of the released layout.
THEIR_CLASSES = {"transformer": "WanTransformer3DModel", "vae": "AutoencoderKLWan"}


def adopt_part(part: str, given: Any) -> Any:
    """A part as the pipeline uses it: ours as it is, diffusers' network as ours.

    The weights of an adopted network are shared, not copied. A text encoder of another library
    stays what it is: it is called as transformers' encoders are.

    Args:
        part: a name in `PARTS`, or "transformer_2".
        given: an object, perhaps wrapped by torch.compile.

    Raises:
        WanError: it is no such network.
    """
    if part == "tokenizer":
        if callable(given):
            return given
        raise WanError(f"tokenizer: an object of type {type(given).__name__} cannot be called")
    kind = weight_kind(part)
    network = getattr(given, "_orig_mod", given)  # what torch.compile has wrapped
    if isinstance(network, PARTS[kind][1]):
        return given
    name = type(network).__name__
    if isinstance(network, nn.Module) and name == THEIR_CLASSES.get(kind):
        return adopted(kind, network)
    if kind == "text_encoder" and hasattr(getattr(network, "config", None), "d_model"):
        return given
    wanted = FACES[kind].__name__
    raise WanError(f"{part}: an object of type {name}; need a {wanted}, see wan.{wanted}")


def adopted(kind: str, theirs: Any) -> nn.Module:
    """Our network with the weights of diffusers' network, which are shared."""
    face: Any = FACES[kind]
    settings = face.settings(theirs.config, {})
    levels = vae_levels(settings) if kind == "vae" else None
    network = build_on_meta(lambda: face(settings))
    state = dict(renamed(kind, theirs.state_dict(keep_vars=True), levels))
    network.load_state_dict(state, assign=True)
    return network.train(theirs.training)


def renamed(
    kind: str, state: Mapping[str, Tensor], levels: VAELevels | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a state dict under our names."""
    for name, tensor in state.items():
        ours = our_name(kind, "diffusers", name, levels)
        if ours is None:
            raise WanError(f"{kind}: {name} is no parameter of Wan's; is it wrapped or quantised?")
        yield ours, tensor


def text_encoder_config(encoder: Any) -> UMT5Config:
    """The settings of a text encoder; of another library's, the width and vocabulary."""
    if isinstance(encoder, UMT5Encoder):
        return encoder.config
    return UMT5Config(vocab_size=encoder.config.vocab_size, d_model=encoder.config.d_model)


def fitted_config(config: PipelineConfig, parts: Mapping[str, Any]) -> PipelineConfig:
    """A pipeline's settings with those of some parts in their place.

    Raises:
        WanError: the parts do not fit the others.
    """
    changes: dict[str, Any] = {}
    for part, given in parts.items():
        if part == "text_encoder":
            changes[part] = text_encoder_config(given)
        elif part != "tokenizer":
            changes[weight_kind(part)] = given.config
    return replace(config, **changes)


def config_of_parts(
    class_name: str,
    parts: Mapping[str, Any],
    boundary_ratio: float | None,
    expand_timesteps: bool,
) -> PipelineConfig:
    """The settings of a pipeline that is put together from loaded parts.

    Sizes of a part that is None follow from the others: a VAE's from the transformer's latent
    channels (Wan has two, of 16 and 48), the width of the text from the transformer.
    """
    transformer, vae, encoder = (parts.get(n) for n in ("transformer", "vae", "text_encoder"))
    transformer = parts.get("transformer_2") if transformer is None else transformer
    channels = 16
    if transformer is not None:
        channels = transformer.config.in_channels
    elif vae is not None:
        channels = vae.config.z_dim
    text_dim = 4096
    if transformer is not None:
        text_dim = transformer.config.text_dim
    elif encoder is not None:
        text_dim = encoder.config.d_model
    dit_config = DiTConfig(in_channels=channels, out_channels=channels, text_dim=text_dim)
    vae_config = replace(VAE_2_1 if channels == 16 else VAEConfig(), z_dim=channels)
    return PipelineConfig(
        class_name,
        dit_config if transformer is None else transformer.config,
        vae_config if vae is None else vae.config,
        UMT5Config(d_model=text_dim) if encoder is None else text_encoder_config(encoder),
        boundary_ratio=boundary_ratio,
        expand_timesteps=expand_timesteps,
        timesteps=FEW_STEP_TIMESTEPS if class_name == FEW_STEP else None,
        defaults=model_defaults(
            vae_config if vae is None else vae.config, boundary_ratio is not None
        ),
    )
