"""Settings of the video autoencoder, and what sizes follow from them."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from wan.errors import WanError, errors_about
from wan.settings import bounded, check_settings

MOST_CHANNELS = 1 << 14  # far above every release

# Latent frames that are decoded at a time; it changes results by the rounding of sums only. With 1
# decoding needs less memory and 1.5 times as long (the miniature on a CPU); with 4 it needs more
# memory and about as long.
CHUNK_LATENTS = 2


@dataclass
class VAEConfig:
    """Settings of the autoencoder, under the names of the released `vae/config.json`."""

    base_dim: int = bounded(160, at_least=1, at_most=MOST_CHANNELS)
    decoder_base_dim: int | None = bounded(256, at_least=1, at_most=MOST_CHANNELS)
    z_dim: int = bounded(48, at_least=1, at_most=MOST_CHANNELS)
    dim_mult: tuple[int, ...] = bounded((1, 2, 4, 4), at_least=1, at_most=64, max_length=8)
    num_res_blocks: int = bounded(2, at_least=1, at_most=64)  # per level
    temperal_downsample: tuple[bool, ...] = (False, True, True)  # the released spelling
    is_residual: bool = True
    in_channels: int = 12
    out_channels: int = 12
    patch_size: int | None = bounded(2, at_least=1, at_most=64)
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = bounded((), above=0)

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.dim_mult:
            raise WanError("dim_mult=[]: at least one level is needed")
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise WanError(
                f"temperal_downsample has {len(self.temperal_downsample)} entries for "
                f"{len(self.dim_mult)} levels: one fewer than dim_mult is needed"
            )
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) not in (0, self.z_dim):
                raise WanError(
                    f"{name} has {len(getattr(self, name))} numbers, z_dim is {self.z_dim}"
                )
        if self.is_residual:
            self._check_shortcuts()
        pixels = 3 * (self.patch_size or 1) ** 2
        if (self.in_channels, self.out_channels) != (pixels, pixels):
            raise WanError(
                f"in_channels={self.in_channels}, out_channels={self.out_channels}: "
                f"patch_size={self.patch_size} makes {pixels} channels of an RGB frame"
            )

    def _check_shortcuts(self) -> None:
        """Refuse widths that the parameter-free shortcuts cannot group or repeat evenly."""
        times = [2 if t else 1 for t in self.temperal_downsample] + [1]
        spaces = [2] * len(self.temperal_downsample) + [1]
        down, up = (1, *self.dim_mult), (self.dim_mult[-1], *reversed(self.dim_mult))
        cells = [t * s * s for t, s in zip(times, spaces, strict=True)]
        for wide, narrow, cell in zip(down[:-1], down[1:], cells, strict=True):
            if wide * cell % narrow:
                raise WanError(
                    f"dim_mult={self.dim_mult}: the average-down shortcut cannot make {narrow} of "
                    f"{wide} x {cell} channels"
                )
        cells = [t * s * s for t, s in zip([*reversed(times[:-1]), 1], spaces, strict=True)]
        for wide, narrow, cell in zip(up[:-1], up[1:], cells, strict=True):
            if cell > 1 and narrow * cell % wide:
                raise WanError(
                    f"dim_mult={self.dim_mult}: the duplicate-up shortcut cannot make {narrow} x "
                    f"{cell} channels of {wide}"
                )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "VAEConfig":
        """Read a released `config.json`; a setting we would have to ignore is an error.

        A file of diffusers (one with `_class_name`) may omit settings: they are those of the Wan2.1
        VAE, which are diffusers' defaults. In other files they have the defaults of this class.
        """
        known = {f.name for f in fields(cls)}
        expected: dict[
            str, tuple[Any, ...] | None
        ] = {  # fields that follow from the others, or that only training used
            "attn_scales": ([],),
            "dropout": (0.0,),
            "clip_output": (False, True),  # decoding always clamps, as both references do
            "scale_factor_spatial": None,
            "scale_factor_temporal": None,
        }
        with errors_about("vae config.json"):
            settings = asdict(VAE_2_1) if "_class_name" in values else {}
            for name in ("latents_mean", "latents_std"):
                if name in settings and name not in values and values.get("z_dim", 16) != 16:
                    raise WanError(
                        f"z_dim={values['z_dim']} without {name}: it is known for "
                        f"z_dim=16 only; give {name}, or [] if latents are not normalised"
                    )
            for name, value in values.items():
                if name in known:
                    settings[name] = value
                elif name.startswith("_"):
                    continue
                elif name not in expected:
                    raise WanError(f"unknown setting {name}={value!r}")
                elif (allowed := expected[name]) is not None and value not in allowed:
                    raise WanError(f"{name}={value!r} is not supported")
            return cls(**settings)

    def to_json(self) -> dict[str, Any]:
        """The released `config.json` of this autoencoder."""
        return {
            "_class_name": "AutoencoderKLWan",
            **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()},
            "attn_scales": [],
            "dropout": 0.0,
            "clip_output": False,
            "scale_factor_spatial": self.spatial_stride,
            "scale_factor_temporal": self.temporal_stride,
        }

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent along height and width."""
        return (self.patch_size or 1) * 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_stride(self) -> int:
        """Frames per latent after the first."""
        return 2 ** sum(self.temperal_downsample)

    # The names of the two strides in the released config.json.
    @property
    def scale_factor_spatial(self) -> int:
        return self.spatial_stride

    @property
    def scale_factor_temporal(self) -> int:
        return self.temporal_stride

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames T of a clip of `num_frames` = stride * (T - 1) + 1 frames."""
        stride = self.temporal_stride
        if num_frames < 1 or (num_frames - 1) % stride:
            low = max(1, num_frames - (num_frames - 1) % stride)
            raise WanError(
                f"num_frames={num_frames}: the VAE takes {stride}k + 1 frames; "
                f"nearest are {low} and {low + stride}"
            )
        return (num_frames - 1) // stride + 1


# Also the defaults of diffusers' AutoencoderKLWan, for fields that a config.json omits.
VAE_2_1 = VAEConfig(
    base_dim=96,
    decoder_base_dim=None,
    z_dim=16,
    is_residual=False,
    in_channels=3,
    out_channels=3,
    patch_size=None,
    latents_mean=(
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    ),
    latents_std=(
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916),
    ),
)
