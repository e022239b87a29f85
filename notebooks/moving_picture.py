"""Draw the README's moving picture, wan/miniature/steps.png: python notebooks/moving_picture.py

It shows one prompt and one seed at 50, 3 and 1 steps, the teacher above and its student below. The
clips come from `python -m infer.sample`; this file only puts them side by side. The student was
trained for three steps, so its other two clips need `allow_untrained=true`.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from infer.evaluate.video_grid import video_grid
from wan.media.video import Frames, read_video

PICTURE = Path(__file__).parents[1] / "wan" / "miniature" / "steps.png"
STEPS = (50, 3, 1)
FPS = 8  # of the miniature
REST = 6  # frames for which the last one stays before the loop begins again
COLOURS = 128  # enough for flat shapes and their edges, in half of the bytes of full colour


def sample(model: str, prompt: str, seed: int, folder: Path) -> list[Frames]:
    """The clips (F, H, W, 3) of one model, one per entry of STEPS."""
    steps = "steps=" + ",".join(map(str, STEPS))
    options = [f"model={model}", steps, f"seed={seed}", f"prompt={prompt}"]
    if model == "mini":
        options.append("allow_untrained=true")
    command = [sys.executable, "-m", "infer.sample", "-m", *options, f"output_dir={folder}"]
    subprocess.run(command, check=True)
    return [read_video(path)[0] for path in sorted(folder.glob("*.mp4"))]


def write_animation(frames: Frames, path: Path) -> None:
    """Write (F, H, W, 3) uint8 frames as an animated PNG that repeats for ever."""
    # One palette for all frames: with one each, flat areas would flicker.
    palette = Image.fromarray(np.concatenate(frames)).quantize(COLOURS)
    pages = [
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
        for frame in frames
    ]
    times = [1000 // FPS] * (len(pages) - 1) + [1000 // FPS * (1 + REST)]
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=times, loop=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", default="a small red circle moving right on a gray background")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=PICTURE)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        teacher = sample("mini-teacher", given.prompt, given.seed, Path(folder) / "teacher")
        student = sample("mini", given.prompt, given.seed, Path(folder) / "student")
    plural = {steps: f"{steps} step{'s' if steps > 1 else ''}" for steps in STEPS}
    clips = {f"teacher, {plural[s]}": clip for s, clip in zip(STEPS, teacher, strict=True)}
    clips |= {f"student, {plural[s]}": clip for s, clip in zip(STEPS, student, strict=True)}
    write_animation(video_grid(clips), given.output)
    print(f"wrote {given.output} ({given.output.stat().st_size / 1000:.0f} KB)")


if __name__ == "__main__":
    main()
