"""How far one video is from another, and how much one changes from frame to frame.

Pure functions of pixels: no network judges what people would prefer.

F frames, H W pixels. A video is (3, F, H, W) float in [0, 1].
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from wan.errors import WanError

WINDOW, SIGMA = 11, 1.5  # pixels; of the Gaussian that SSIM weighs neighbours by
K1, K2 = 0.01, 0.03


def psnr(video: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of the squared error over all pixels and frames.

    Infinite for two equal videos. Computed in float64.
    """
    _check(video, reference)
    error = float((video.double() - reference.double()).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(video: Tensor, reference: Tensor) -> float:
    """Structural similarity: mean over all whole windows, colours and frames; 1 for equal videos.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity",
    2004, eq. 13, with its 11 x 11 Gaussian window. Computed in float64, a frame at a time.

    Raises:
        WanError: shapes that differ, or frames smaller than the window.
    """
    _check(video, reference)
    if min(video.shape[2:]) < WINDOW:
        raise WanError(f"frames of {video.shape[2]}x{video.shape[3]}: SSIM needs {WINDOW}x{WINDOW}")
    frames = zip(video.unbind(1), reference.unbind(1), strict=True)
    return sum(_frame_ssim(x.double(), y.double()) for x, y in frames) / video.shape[1]


def _frame_ssim(x: Tensor, y: Tensor) -> float:
    """SSIM of two frames (3, H, W)."""
    c1, c2 = K1**2, K2**2  # the peak is 1
    mean_x, mean_y = _smooth(x), _smooth(y)
    variance_x = _smooth(x * x) - mean_x**2
    variance_y = _smooth(y * y) - mean_y**2
    covariance = _smooth(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return float((luminance * structure).mean())


def _smooth(frame: Tensor) -> Tensor:
    """Weighted means in every whole window: (3, H, W) -> (3, H - 10, W - 10)."""
    offsets = torch.arange(WINDOW, dtype=frame.dtype, device=frame.device) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    weights = weights / weights.sum()
    rows = F.conv2d(frame[:, None], weights[None, None, :, None])
    return F.conv2d(rows, weights[None, None, None, :])[:, 0]


def flicker(video: Tensor) -> float:
    """Mean absolute difference of successive frames; 0 for one that stands still.

    Movement counts as well as flicker: only the ratio to a video with the same movement means
    something. Source: temporal flickering of VBench, arXiv:2311.17982 (there 1 minus this).

    Raises:
        WanError: fewer than two frames.
    """
    if video.ndim != 4 or video.shape[1] < 2:
        raise WanError(f"video of shape {tuple(video.shape)}: flicker needs (3, F >= 2, H, W)")
    return float(video.double().diff(dim=1).abs().mean())


def _check(video: Tensor, reference: Tensor) -> None:
    if video.ndim != 4 or video.shape != reference.shape:
        shapes = f"{tuple(video.shape)} and {tuple(reference.shape)}"
        raise WanError(f"videos of shapes {shapes}: need the same (3, F, H, W)")
