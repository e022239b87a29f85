"""Small animated pictures, for previews.

They are GIFs: every viewer, browser and editor plays them, whereas many show only the first frame
of an animated PNG or WebP, and an mp4 that is replaced while it plays stops. All frames share one
palette of 256 colours, so that colours do not flicker from frame to frame.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from wan.errors import WanError
from wan.files import written_beside
from wan.media.video import Frames

ENDING = ".gif"


def write_animation(path: Path, frames: Frames, seconds: float) -> None:
    """Replace a GIF as a whole; it plays again and again.

    It is not flushed to the disk: previews are replaced every few seconds.

    Args:
        path: ends in .gif.
        frames: (F, H, W, 3) uint8.
        seconds: how long each frame is shown; GIFs count hundredths, and viewers slow down what is
            shorter than two of them.

    Raises:
        WanError: the name ends otherwise.
        OSError: it can't be written.
    """
    if path.suffix.lower() != ENDING:
        raise WanError(f"{path}: the name of a preview must end in {ENDING}")
    count, height, width, _ = frames.shape
    column = Image.fromarray(np.ascontiguousarray(frames).reshape(count * height, width, 3))
    column = column.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    pictures = [column.crop((0, i * height, width, (i + 1) * height)) for i in range(count)]
    with written_beside(path, flush=False) as beside:
        pictures[0].save(
            beside,
            "GIF",
            save_all=True,
            append_images=pictures[1:],
            duration=max(20, round(seconds * 100) * 10),  # milliseconds
            loop=0,
            optimize=False,
        )
