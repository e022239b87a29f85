"""Measures against values that can be computed by hand, and SSIM against its definition."""

import math

import pytest
import torch

from infer.evaluate.video_distance import WINDOW, flicker, psnr, ssim
from wan.errors import WanError


def noise(seed: int = 0, size: int = 16) -> torch.Tensor:
    return torch.rand(3, 2, size, size, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_a_constant_error():
    video = torch.full((3, 2, 4, 4), 0.25)
    assert psnr(video + 0.1, video) == pytest.approx(20.0, abs=1e-5)
    assert psnr(video + 0.01, video) == pytest.approx(40.0, abs=1e-4)
    assert psnr(video, video) == math.inf


def test_psnr_is_of_the_error_over_the_whole_clip():
    video, other = torch.zeros(3, 2, 4, 4), torch.zeros(3, 2, 4, 4)
    other[:, 1] = 1.0  # one frame wrong everywhere, the other right: mean squared error 1/2
    assert psnr(other, video) == pytest.approx(10 * math.log10(2))


def test_ssim_of_flat_videos_is_their_luminance_term():
    a, b = torch.full((3, 2, 16, 16), 0.4), torch.full((3, 2, 16, 16), 0.6)
    assert ssim(a, a) == pytest.approx(1)
    assert ssim(a, b) == pytest.approx((2 * 0.24 + 1e-4) / (0.16 + 0.36 + 1e-4), abs=1e-6)


def test_ssim_of_a_negative_is_negative():
    video = noise()
    assert ssim(1 - video, video) < -0.5
    assert ssim(video, noise(1)) == pytest.approx(ssim(noise(1), video))


def test_ssim_of_one_window_is_the_formula():
    """Frames as large as the window have one position: means under the Gaussian, written out."""
    x, y = (noise(seed, WINDOW)[:, :1].double() for seed in (0, 1))
    weights = [[0.0] * WINDOW for _ in range(WINDOW)]
    for row in range(WINDOW):
        for column in range(WINDOW):
            weights[row][column] = math.exp(-((row - 5) ** 2 + (column - 5) ** 2) / (2 * 1.5**2))
    window = torch.tensor(weights, dtype=torch.float64)
    window /= window.sum()
    values = []
    for a, b in zip(x[:, 0], y[:, 0], strict=True):
        mean_a, mean_b = (window * a).sum(), (window * b).sum()
        variance_a = (window * (a - mean_a) ** 2).sum()
        variance_b = (window * (b - mean_b) ** 2).sum()
        covariance = (window * (a - mean_a) * (b - mean_b)).sum()
        top = (2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
        bottom = (mean_a**2 + mean_b**2 + 1e-4) * (variance_a + variance_b + 9e-4)
        values.append(float(top / bottom))
    assert ssim(x, y) == pytest.approx(sum(values) / 3, rel=1e-9)


def test_flicker_is_the_mean_change_between_frames():
    still = noise()[:, :1].expand(3, 4, 16, 16)
    assert flicker(still) == 0
    blinking = torch.zeros(3, 5, 8, 8)
    blinking[:, 1::2] = 0.5
    assert flicker(blinking) == pytest.approx(0.5)


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_videos_of_other_shapes_are_refused(measure):
    with pytest.raises(WanError, match="same"):
        measure(noise(), noise()[:, :1])


def test_videos_that_are_too_small_are_refused():
    with pytest.raises(WanError, match="11x11"):
        ssim(noise(size=8), noise(size=8))
    with pytest.raises(WanError, match="F >= 2"):
        flicker(noise()[:, :1])
