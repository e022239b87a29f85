"""A linear map from latents to colours: one pixel per latent, for previews.

An autoencoder's latents have no colours, but a linear map of their channels comes close enough to
see what a video will show. A map belongs to one autoencoder, which is known by the means that its
latents are normalised with; the number of channels alone would confuse the miniature with Wan2.1.
The maps here apply to normalised latents, as the transformer has them, and give RGB in [-1, 1].

C channels, T h w latent sizes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.errors import WanError
from wan.models.vae_config import VAEConfig

Factors = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class LatentSpace:
    """The latents of one autoencoder, and their colours.

    Attributes:
        name: for messages.
        means: the first of the autoencoder's `latents_mean`, to four decimals.
        factors: red, green and blue per channel.
        bias: the colour of latents that are all zero.
    """

    name: str
    means: tuple[float, ...]
    factors: Factors
    bias: tuple[float, float, float]

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (C, T, h, w) -> RGB (3, T, h, w), float32, about [-1, 1]."""
        factors = torch.tensor(self.factors, device=latents.device)
        bias = torch.tensor(self.bias, device=latents.device).view(3, 1, 1, 1)
        return torch.einsum("cthw,cr->rthw", latents.float(), factors) + bias


def latent_space(config: VAEConfig) -> LatentSpace | None:
    """The known latent space of an autoencoder with these settings; None for any other one."""
    means = config.latents_mean
    for space in LATENT_SPACES:
        pairs = zip(space.means, means, strict=False)
        if len(means) == len(space.factors) and all(abs(a - b) < 1e-3 for a, b in pairs):
            return space
    return None


def fit_latent_rgb(latents: Tensor, video: Tensor) -> tuple[Tensor, Tensor, float]:
    """The factors (C, 3) and the bias (3,) that come nearest to a video, by least squares.

    The colour of a latent is the mean over the pixels that it stands for: of one frame for the
    first one, and of as many as the stride in time for each later one.

    Args:
        latents: (B, C, T, h, w), normalised.
        video: (B, 3, F, H, W) in [-1, 1], what the latents were encoded from.

    Returns:
        Factors and bias in float64, and the share of the colours' variance that they explain.

    Raises:
        WanError: the sizes are not those of an autoencoder's input and output.
    """
    frames, height, width = latents.shape[2:]
    stride = (video.shape[2] - 1) // max(frames - 1, 1)
    if video.shape[2] != (frames - 1) * stride + 1 or len(video) != len(latents):
        raise WanError(f"latents {tuple(latents.shape)} are not those of a {tuple(video.shape)}")
    per_frame = F.adaptive_avg_pool3d(video.double(), (video.shape[2], height, width))
    later = per_frame[:, :, 1:].unflatten(2, (frames - 1, stride)).mean(dim=3)
    colours = torch.cat([per_frame[:, :, :1], later], dim=2).movedim(1, -1).flatten(0, -2)
    rows = latents.double().movedim(1, -1).flatten(0, -2)  # (B T h w, C)
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
    solution = torch.linalg.lstsq(rows, colours).solution  # (C + 1, 3)
    left = (colours - rows @ solution).square().sum()
    explained = 1 - left / (colours - colours.mean(dim=0)).square().sum()
    return solution[:-1], solution[-1], explained.item()


# The maps of Wan2.1 and Wan2.2 are those of ComfyUI (github.com/comfyanonymous/ComfyUI,
# comfy/latent_formats.py, `latent_rgb_factors` of Wan21 and Wan22), whose previews apply them to
# normalised latents too. That of the miniature was fitted by `fit_latent_rgb` on 16 clips of its
# world, of which it explains 90 % of the variance, and of other clips 89 %. It is fitted again by
# `pytest tests/test_preview.py -k least_squares`.
WAN_2_1 = LatentSpace(
    "Wan2.1",
    (-0.7571, -0.7089, -0.9113, 0.1075),
    (
        *((-0.1299, -0.1692, 0.2932), (0.0671, 0.0406, 0.0442)),
        *((0.3568, 0.2548, 0.1747), (0.0372, 0.2344, 0.142)),
        *((0.0313, 0.0189, -0.0328), (0.0296, -0.0956, -0.0665)),
        *((-0.3477, -0.4059, -0.2925), (0.0166, 0.1902, 0.1975)),
        *((-0.0412, 0.0267, -0.1364), (-0.1293, 0.074, 0.1636)),
        *((0.068, 0.3019, 0.1128), (0.0032, 0.0581, 0.0639)),
        *((-0.1251, 0.0927, 0.1699), (0.006, -0.0633, 0.0005)),
        *((0.3477, 0.2275, 0.295), (0.1984, 0.0913, 0.1861)),
    ),
    (-0.1835, -0.0868, -0.336),
)
WAN_2_2 = LatentSpace(
    "Wan2.2",
    (-0.2289, -0.0052, -0.1323, -0.2339),
    (
        *((0.0119, 0.0103, 0.0046), (-0.1062, -0.0504, 0.0165)),
        *((0.014, 0.0409, 0.0491), (-0.0813, -0.0677, 0.0607)),
        *((0.0656, 0.0851, 0.0808), (0.0264, 0.0463, 0.0912)),
        *((0.0295, 0.0326, 0.059), (-0.0244, -0.027, 0.0025)),
        *((0.0443, -0.0102, 0.0288), (-0.0465, -0.009, -0.0205)),
        *((0.0359, 0.0236, 0.0082), (-0.0776, 0.0854, 0.1048)),
        *((0.0564, 0.0264, 0.0561), (0.0006, 0.0594, 0.0418)),
        *((-0.0319, -0.0542, -0.0637), (-0.0268, 0.0024, 0.026)),
        *((0.0539, 0.0265, 0.0358), (-0.0359, -0.0312, -0.0287)),
        *((-0.0285, -0.1032, -0.1237), (0.1041, 0.0537, 0.0622)),
        *((-0.0086, -0.0374, -0.0051), (0.039, 0.067, 0.2863)),
        *((0.0069, 0.0144, 0.0082), (0.0006, -0.0167, 0.0079)),
        *((0.0313, -0.0574, -0.0232), (-0.1454, -0.0902, -0.0481)),
        *((0.0714, 0.0827, 0.0447), (-0.0304, -0.0574, -0.0196)),
        *((0.0401, 0.0384, 0.0204), (-0.0758, -0.0297, -0.0014)),
        *((0.0568, 0.1307, 0.1372), (-0.0055, -0.031, -0.038)),
        *((0.0239, -0.0305, 0.0325), (-0.0663, -0.0673, -0.014)),
        *((-0.0416, -0.0047, -0.0023), (0.0166, 0.0112, -0.0093)),
        *((-0.0211, 0.0011, 0.0331), (0.1833, 0.1466, 0.225)),
        *((-0.0368, 0.037, 0.0295), (-0.3441, -0.3543, -0.2008)),
        *((-0.0479, -0.0489, -0.042), (-0.066, -0.0153, 0.08)),
        *((-0.0101, 0.0068, 0.0156), (-0.069, -0.0452, -0.0927)),
        *((-0.0145, 0.0041, 0.0015), (0.0421, 0.0451, 0.0373)),
        *((0.0504, -0.0483, -0.0356), (-0.0837, 0.0168, 0.0055)),
    ),
    (0.0317, -0.0878, -0.1388),
)
MINIATURE = LatentSpace(
    "the miniature",
    (-0.084, 0.0122, 0.0891, 0.0109),
    (
        *((-0.4219, -0.2692, -0.2106), (0.359, 0.1458, 0.0277)),
        *((-1.3244, -0.7506, -0.5547), (-0.1496, -0.0647, -0.0365)),
        *((-0.2413, -0.0931, 0.0646), (-0.1704, 0.0532, 0.0908)),
        *((1.5242, 0.8022, 0.6062), (-0.1374, 0.0236, 0.041)),
        *((-0.6697, -0.3257, -0.2077), (-0.2195, -0.1473, -0.096)),
        *((-1.3253, -0.8321, -0.5656), (0.1402, -0.0422, -0.057)),
        *((-0.9875, -0.3193, -0.0541), (-0.2696, 0.0133, -0.0276)),
        *((-0.1968, -0.1739, -0.0946), (0.0416, -0.0278, -0.0433)),
    ),
    (-0.0218, -0.1122, -0.1971),
)
LATENT_SPACES = (WAN_2_1, WAN_2_2, MINIATURE)
