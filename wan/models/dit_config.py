"""Settings of the diffusion transformer, and reading them from the config.json of a release.

Source: `transformer/config.json` of the Wan releases in diffusers' layout, `config.json` of the
official ones.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from wan.errors import WanError, errors_about
from wan.models.rope import axis_channels
from wan.settings import bounded, check_settings

# Far above every release, and low enough that a network of this size can be described at once.
MOST_WIDTH = 1 << 17
MOST_LAYERS = 1000


@dataclass
class DiTConfig:
    """Settings of the network, under the names of the released `transformer/config.json`."""

    num_attention_heads: int = bounded(24, at_least=1, at_most=MOST_WIDTH)
    attention_head_dim: int = bounded(128, at_least=1, at_most=MOST_WIDTH)
    num_layers: int = bounded(30, at_least=1, at_most=MOST_LAYERS)
    ffn_dim: int = bounded(14336, at_least=1, at_most=MOST_WIDTH)
    in_channels: int = bounded(48, at_least=1, at_most=MOST_WIDTH)
    out_channels: int = bounded(48, at_least=1, at_most=MOST_WIDTH)
    text_dim: int = bounded(4096, at_least=1, at_most=MOST_WIDTH)
    freq_dim: int = bounded(256, at_least=1, at_most=MOST_WIDTH)  # of the timestep's sinusoid
    patch_size: tuple[int, int, int] = bounded((1, 2, 2), at_least=1, at_most=64)  # T, H, W
    # The most tokens along one axis of the grid.
    rope_max_seq_len: int = bounded(1024, at_least=1, at_most=1 << 16)
    eps: float = bounded(1e-6, at_least=0, at_most=1)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.width > MOST_WIDTH:
            raise WanError(
                f"num_attention_heads={self.num_attention_heads}, attention_head_dim="
                f"{self.attention_head_dim}: the width must be at most {MOST_WIDTH}"
            )
        axis_channels(self.attention_head_dim)
        if self.freq_dim % 2:
            raise WanError(f"freq_dim={self.freq_dim}: must be even, half cosines and half sines")

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    def token_grid(self, latent_size: Sequence[int]) -> tuple[int, int, int]:
        """Tokens along T, H and W of latents with these T, H and W.

        Raises:
            WanError: a size is not a multiple of the patch size, or an axis is too long.
        """
        if any(n < 1 or n % p for n, p in zip(latent_size, self.patch_size, strict=True)):
            raise WanError(
                f"latents with T, H, W = {tuple(latent_size)}: must be multiples of "
                f"{self.patch_size}"
            )
        t, h, w = (n // p for n, p in zip(latent_size, self.patch_size, strict=True))
        if max(t, h, w) > self.rope_max_seq_len:
            raise WanError(f"a grid of {t}x{h}x{w} tokens: no axis above {self.rope_max_seq_len}")
        return t, h, w

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "DiTConfig":
        """Read a released `config.json`, in diffusers' field names or in the official ones.

        Raises:
            WanError: the network is of another kind, or a setting is unknown or missing.
        """
        values = {k: v for k, v in values.items() if not k.startswith("_") or k == "_class_name"}
        with errors_about("transformer config.json"):
            refuse_other_networks(values)
            values.pop("_class_name", None)
            if "dim" in values:
                values = official_to_released_names(values)
            fixed = {name: values.pop(name, value) for name, value in FIXED_SETTINGS.items()}
            fixed["window_size"] = values.pop("window_size", None)
            for name, value in (FIXED_SETTINGS | {"window_size": None}).items():
                if fixed[name] != value and fixed[name] not in SPELLINGS.get(name, ()):
                    raise WanError(f"{name}={fixed[name]!r}, only {value!r} is supported")
            known = [f.name for f in fields(cls)]
            if unknown := sorted(set(values) - set(known)):
                raise WanError(
                    f"unknown settings {', '.join(unknown)}; the file may be of another network"
                )
            required = [n for n in known if n not in ("patch_size", "rope_max_seq_len", "eps")]
            if missing := [name for name in required if name not in values]:
                raise WanError(f"it lacks {', '.join(missing)}")
            return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """The released `config.json` of this network, in diffusers' field names."""
        settings = asdict(self) | {"patch_size": list(self.patch_size)}
        return {"_class_name": "WanTransformer3DModel", **settings, **FIXED_SETTINGS}


# Settings that have one value in every supported release: read and checked, written, never varied.
FIXED_SETTINGS: dict[str, Any] = {
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}

# The same settings as official files spell them, where they do: there, normed queries and keys are
# True, and -1 is an attention window without an end.
SPELLINGS: dict[str, tuple[Any, ...]] = {
    "qk_norm": (True,),
    "window_size": ([-1, -1], (-1, -1)),
}

OFFICIAL_NAMES = {
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "num_heads": "num_attention_heads",
    "eps": "eps",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "num_layers": "num_layers",
    "patch_size": "patch_size",
    "text_dim": "text_dim",
}


IN_AND_OUT = (("in_channels", "in_dim"), ("out_channels", "out_dim"))


def refuse_other_networks(values: dict[str, Any]) -> None:
    """Refuse the config.json of a related network that is not supported.

    Raises:
        WanError: the network is VACE, image-to-video of Wan2.1, or not Wan.
    """
    supported = "supported are Wan2.1-T2V, Wan2.2-T2V-A14B and Wan2.2-TI2V-5B"
    class_name = values.get("_class_name", "WanModel")
    model_type = values.get("model_type", "t2v")
    if any(name.startswith("vace_") for name in values) or model_type == "vace":
        raise WanError(f"this is a VACE transformer, with control blocks of its own; {supported}")
    into, out = (values.get(name) or values.get(old) or 0 for name, old in IN_AND_OUT)
    channels = isinstance(into, int) and isinstance(out, int) and into > out > 0
    what = f"{into} input and {out} output channels" if channels else None
    if values.get("image_dim") or values.get("added_kv_proj_dim") or model_type in ("i2v", "flf2v"):
        what = "keys and values or input channels"
    if what is not None:
        raise WanError(
            f"this is an image-to-video transformer, with {what} for the image; {supported}"
        )
    if class_name not in ("WanTransformer3DModel", "WanModel") or model_type not in ("t2v", "ti2v"):
        raise WanError(
            f"_class_name={class_name!r}, model_type={model_type!r} is "
            f"not a transformer this project knows; {supported}"
        )


def official_to_released_names(values: dict[str, Any]) -> dict[str, Any]:
    """Translate the official config.json to diffusers' names; add the official default text_dim.

    Raises:
        WanError: a size is missing, or the width is not a multiple of the heads.
    """
    ignored = ("dim", "model_type", "text_len")  # text_len: the network takes any number of tokens
    values = {"text_dim": 4096} | values
    width, heads = values["dim"], values.get("num_heads")
    if type(width) is not int or type(heads) is not int or heads < 1 or width % heads:
        raise WanError(f"dim={width!r} must be a multiple of num_heads={heads!r}")
    renamed = {OFFICIAL_NAMES.get(k, k): v for k, v in values.items() if k not in ignored}
    return renamed | {"attention_head_dim": width // heads}
