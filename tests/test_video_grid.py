"""Videos side by side: places, labels, lengths, sizes."""

import numpy as np
import pytest

from infer.evaluate.video_grid import BACKGROUND, GAP, LINE_HEIGHT, video_grid
from wan.errors import WanError
from wan.media.video import write_video


def flat(level: int, frames: int = 2, height: int = 16, width: int = 64) -> np.ndarray:
    return np.full((frames, height, width, 3), level, np.uint8)


def test_every_video_is_below_its_label():
    grid = video_grid({"one": flat(200), "two": flat(100), "three": flat(150)})
    assert grid.shape == (2, 2 * (16 + LINE_HEIGHT + GAP) + GAP, 2 * (64 + GAP) + GAP, 3)
    top, left = GAP + LINE_HEIGHT, GAP
    assert (grid[:, top : top + 16, left : left + 64] == 200).all()
    assert (grid[:, top : top + 16, left + 68 : left + 132] == 100).all()
    below = top + 16 + GAP + LINE_HEIGHT
    assert (grid[:, below : below + 16, left : left + 64] == 150).all()
    for x in (left, left + 68):
        label = grid[0, GAP : GAP + LINE_HEIGHT, x : x + 64]
        assert label.max() > 200
    assert (grid[0, below - LINE_HEIGHT :, left + 68 :] == BACKGROUND).all()  # nobody's place


def test_long_labels_take_more_lines():
    short = video_grid({"a": flat(9)})
    long = video_grid({"several words that do not fit": flat(9)})
    assert (long.shape[1] - short.shape[1]) % LINE_HEIGHT == 0
    assert long.shape[1] > short.shape[1]
    assert long.shape[2] == short.shape[2]


def test_a_shorter_video_stays_at_its_last_frame_and_wide_ones_shrink(tmp_path):
    moving = np.concatenate([flat(50, 1), flat(90, 1), flat(130, 1)])
    grid = video_grid({"long": moving, "short": moving[:2]}, max_width=32)
    assert grid.shape[0] == 3
    y = GAP + LINE_HEIGHT + 2
    assert grid[:, y, GAP + 2, 0].tolist() == [50, 90, 130]
    assert grid[:, y, GAP + 38, 0].tolist() == [50, 90, 90]
    assert grid.shape[1] % 2 == grid.shape[2] % 2 == 0
    assert write_video(tmp_path / "grid.mp4", grid, 8).decoded_frames == 3


def test_videos_of_several_sizes_are_refused():
    with pytest.raises(WanError, match="one size"):
        video_grid({"a": flat(1), "b": flat(1, width=32)})


def test_videos_without_frames_or_width_are_refused():
    with pytest.raises(WanError, match="without frames: b"):
        video_grid({"a": flat(1), "b": flat(1, frames=0)})
    with pytest.raises(WanError, match="max_width=0: need at least 1"):
        video_grid({"a": flat(1)}, max_width=0)
