"""Several videos side by side in one, each under its name.

F frames, H height, W width; frames are (F, H, W, 3) uint8 RGB.
"""

import math
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw

from wan.errors import WanError
from wan.media.labels import BACKGROUND, LINE_HEIGHT, wrapped, write_lines
from wan.media.video import Frames

GAP = 4  # pixels


def video_grid(videos: Mapping[str, Frames], max_width: int = 256) -> Frames:
    """Videos by their labels, row by row on a grid that is about square.

    Labels are broken into lines that fit. Videos that are shorter than the longest stay at their
    last frame; those wider than `max_width` are scaled down.

    Returns:
        frames of even height and width, as mp4 needs them.
    Raises:
        WanError: no videos, one without frames, frames of several sizes, or no width for them.
    """
    if max_width < 1:
        raise WanError(f"max_width={max_width}: need at least 1 pixel")
    if empty := [name for name, video in videos.items() if not len(video)]:
        raise WanError(f"a grid of videos without frames: {', '.join(empty)}")
    sizes = {video.shape[1:3] for video in videos.values()}
    if len(sizes) != 1:
        raise WanError(f"a grid of videos of sizes {sorted(sizes)}: need one size")
    ((height, width),) = sizes
    if width > max_width:
        height, width = max(1, round(height * max_width / width)), max_width
    labels = {name: wrapped(name, width) for name in videos}
    head = LINE_HEIGHT * max(len(lines) for lines in labels.values())
    columns = math.ceil(math.sqrt(len(videos)))
    rows = math.ceil(len(videos) / columns)
    size = (columns * (width + GAP) + GAP, rows * (height + head + GAP) + GAP)
    canvas = Image.new("RGB", (size[0] + size[0] % 2, size[1] + size[1] % 2), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    corners = {}
    for place, (name, lines) in enumerate(labels.items()):
        row, column = divmod(place, columns)
        x, y = GAP + column * (width + GAP), GAP + row * (height + head + GAP)
        write_lines(pen, (x, y), lines)
        corners[name] = (x, y + head)
    frames = []
    for index in range(max(len(video) for video in videos.values())):
        for name, video in videos.items():
            picture = Image.fromarray(video[min(index, len(video) - 1)])
            if picture.size != (width, height):
                picture = picture.resize((width, height), Image.Resampling.LANCZOS)
            canvas.paste(picture, corners[name])
        frames.append(np.array(canvas))
    return np.stack(frames)
