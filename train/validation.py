"""Validation: what a model makes of a fixed set of captions, at each save.

For the miniature's world the detectors read how often a clip shows what its caption states. A
distilled student is also compared with its teacher, because the losses of DMD do not tell how good
it is: its gradient is not expected to shrink. Both sample the same captions from the same noise,
and what needs no detector is compared: how much moves, how saturated it is, how far latents spread,
how much two clips of one caption differ.

Each clip is measured where it was made, and only its numbers are kept and gathered: memory does not
grow with the number of captions or processes.
"""

import itertools
import math
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from train.parallel import Ranks
from wan.errors import WanError
from wan.media.images import write_image
from wan.media.labels import stacked
from wan.media.video import contact_sheet, to_uint8
from wan.miniature.captions import Caption, caption
from wan.miniature.detect import Score, accuracies, detect, score
from wan.miniature.world import sample_scene, scene_rng
from wan.models.vae import WanVAE

# V validation captions, each sampled twice: clips i and V + i. A clip is a video (3, F, H, W) in
# [-1, 1], and latents (C, T, h, w)

UNSEEN = 2**42  # stream of scenes that no training draws
PANEL = ((1, 0.0), (2, 0.0), (1, 0.5))  # (objects, chance that an attribute goes unsaid), in turn
RATIOS = ("motion_ratio", "saturation_ratio", "spread_ratio", "diversity_ratio")
SATURATED = 3.0  # of latents, whose mean is 0 and variance 1 over clips by the model's statistics
SHOWN = 4  # clips of the panel that are written


def world_panel(count: int, seed: int, kinds: Sequence[tuple[int, float]] = PANEL) -> list[Caption]:
    """Captions of held-out scenes.

    Args:
        kinds: (number of objects, chance that an attribute goes unsaid) of the scenes, in turn.
    """
    rng = random.Random(seed)
    return [
        caption(sample_scene(scene_rng(UNSEEN, i), "heldout", num_objects), rng, omit)
        for i, (num_objects, omit) in zip(range(count), itertools.cycle(kinds), strict=False)
    ]


def read_clip(video: Tensor, stated: Caption) -> Score:
    """What the detectors find in a clip (3, F, H, W) of what its caption states."""
    return score(detect(video), stated)


def shares(scores: Iterable[Score], prefix: str) -> dict[str, float]:
    """Share of what captions state that the detectors find in their clips.

    Returns:
        `prefix` and the attribute -> share; "joint" is that of clips that show all of it.
    """
    return {f"{prefix}_{name}": share for name, share in accuracies(scores).items()}


def motion(video: Tensor) -> float:
    """Mean absolute change of a pixel from frame to frame; 0 for a single frame."""
    return float(video.diff(dim=1).abs().mean()) if video.shape[1] > 1 else 0.0


def saturation(video: Tensor) -> float:
    """Mean spread of a pixel's three channels: its colourfulness, in [0, 2]."""
    return float((video.amax(dim=0) - video.amin(dim=0)).mean())


def saturated_share(latents: Tensor) -> float:
    """Share of numbers beyond +-SATURATED, in [0, 1]; 0.0027 if they are normal.

    Too much guidance, or a student that runs away along the score, shows here first.
    """
    return float((latents.detach().abs() > SATURATED).float().mean())


@dataclass(frozen=True)
class ClipNumbers:
    """What is kept of one clip of the panel.

    Attributes:
        motion, saturation: of its video.
        size, mean, square: of its latents: how many numbers, their mean and mean square.
        channels: of its latents: the mean of each channel.
        found: what the detectors find of its caption; None for another world.
        sheet: some of its frames; None if it is not shown.
    """

    motion: float
    saturation: float
    size: int
    mean: float
    square: float
    channels: tuple[float, ...]
    found: Score | None = None
    sheet: Image.Image | None = None


def measure_clip(
    latents: Tensor, video: Tensor, stated: Caption | None = None, shown: bool = False
) -> ClipNumbers:
    """The numbers of one clip.

    Args:
        stated: its caption, for the miniature's world.
        shown: whether its frames are wanted too.
    """
    values = latents.detach().cpu().double()  # not every device has float64
    return ClipNumbers(
        motion(video),
        saturation(video),
        values.numel(),
        float(values.mean()),
        float(values.square().mean()),
        tuple(values.mean(dim=(1, 2, 3)).tolist()),
        None if stated is None else read_clip(video, stated),
        sheet_of(video) if shown else None,
    )


def spread(clips: Sequence[ClipNumbers]) -> float:
    """Standard deviation of the latents of all clips together."""
    total = sum(clip.size for clip in clips)
    mean = sum(clip.mean * clip.size for clip in clips) / total
    square = sum(clip.square * clip.size for clip in clips) / total
    return math.sqrt(max(0.0, square - mean**2) * total / max(1, total - 1))


def diversity(clips: Sequence[ClipNumbers]) -> float:
    """How much two clips of one caption differ overall: rms over channels of the difference of
    their means over space and time, mean over captions.

    Where things are differs from noise to noise in any student, so whole latents keep their
    distance; what is lost first, the choice of what a caption leaves open, shows in the means.
    """
    one, other = torch.tensor([clip.channels for clip in clips], dtype=torch.float64).chunk(2)
    return float((one - other).square().mean(dim=1).sqrt().mean())


def ratios(student: Sequence[ClipNumbers], teacher: Sequence[ClipNumbers]) -> dict[str, float]:
    """Student over teacher: motion, saturation, spread of latents, diversity; 1 is ideal."""
    tiny = 1e-6

    def numbers(clips: Sequence[ClipNumbers]) -> list[float]:
        moves, colours = ([getattr(c, n) for c in clips] for n in ("motion", "saturation"))
        return [sum(moves) / len(clips), sum(colours) / len(clips), spread(clips), diversity(clips)]

    both = zip(RATIOS, numbers(student), numbers(teacher), strict=True)
    return {name: (ours + tiny) / (theirs + tiny) for name, ours, theirs in both}


def health(values: dict[str, float]) -> float:
    """One number in [0, 1] by which checkpoints are ranked.

    The product of min(r, 1 / r) over the ratios; where detectors can tell, times (1 + j) / 2 for a
    share j of captions that came true.
    """
    total = (1 + values.get("val_joint", 1.0)) / 2
    for name in RATIOS:
        total *= min(values[name], 1 / max(values[name], 1e-6))
    return total


def panel_numbers(
    student: Sequence[ClipNumbers], teacher: Sequence[ClipNumbers]
) -> dict[str, float]:
    """Everything that a save logs: ratios, what the detectors read of the world, health."""
    values = ratios(student, teacher)
    found, right = ([clip.found for clip in clips if clip.found] for clips in (student, teacher))
    if found:
        values |= shares(found, "val")
        values["teacher_joint"] = shares(right, "teacher")["teacher_joint"]
    values["health"] = health(values)
    return values


@torch.no_grad()
def decode_clip(vae: WanVAE, latents: Tensor) -> Tensor:
    """The video (3, F, H, W) of latents (C, T, h, w): float32, on the CPU."""
    chunks = vae.decode_stream(latents[None].to(vae.quant_conv.weight.device))
    return torch.cat([chunk.float().cpu() for chunk in chunks], dim=2)[0]


def sheet_of(video: Tensor) -> Image.Image:
    """Nine frames of a video (3, F, H, W), small."""
    return contact_sheet(to_uint8(video), max_frames=9, max_width=160)


class Pictures:
    """Files of one save in a run's samples/, whose names begin with the number of steps.

    A disk or a device's memory that is full costs the pictures, not the run: what cannot be made is
    noted, and `close` says so and removes what was written of this step.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.step = folder, step
        self.error: str | None = None

    def write(self, name: str, write: Callable[[Path], object]) -> None:
        """Let `write` write the file of that name; an error is noted."""

        def attempt() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(self.folder / f"{self.step:07d}-{name}")

        self.note(attempt)

    def note(self, attempt: Callable[[], object]) -> None:
        """Do something that the files need; an error is noted."""
        try:
            attempt()
        except (OSError, WanError, torch.OutOfMemoryError) as error:
            self.error = self.error or str(error)

    def close(self, ranks: Ranks) -> None:
        """End a save; all processes call it when they have written theirs."""
        errors = [error for error in ranks.gather(self.error) if error is not None]
        if errors and ranks.is_main:
            print(
                f"warning: {self.folder}: no pictures of step {self.step}: {errors[0]}",
                file=sys.stderr,
            )
            for path in self.folder.glob(f"{self.step:07d}-*"):
                path.unlink(missing_ok=True)


def write_panel(
    pictures: Pictures,
    captions: Sequence[str],
    student: Sequence[ClipNumbers],
    teacher: Sequence[ClipNumbers],
    triptych: Sequence[Image.Image],
) -> None:
    """A sheet of student above teacher for the captions that are shown, and the triptych.

    Args:
        triptych: a sample of the student, and what teacher and, if there is one, critic make of it
            noised.
    """
    pairs = [
        (f"{who}: {caption}", clip.sheet)
        for caption, *both in zip(captions, student, teacher, strict=True)
        for who, clip in zip(("student", "teacher"), both, strict=True)
        if clip.sheet is not None
    ]
    names = (
        f"student: {captions[0]}",
        "the teacher's prediction from the same, noised",
        "the critic's prediction from the same, noised",
    )
    three = list(zip(names[: len(triptych)], triptych, strict=True))  # two without a critic
    pictures.write("student-teacher.png", lambda path: write_image(path, stacked(pairs)))
    pictures.write("triptych.png", lambda path: write_image(path, stacked(three)))
